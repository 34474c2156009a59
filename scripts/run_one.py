"""``make run``: one agent on the demo model, in the foreground, with its state under build/run/."""

import json
import os
import sys
from pathlib import Path

from scripts.fetch_demo_model import MAIN, SECOND, default_folder

BUILD = Path("build/run")


def main() -> int:
    """Write a configuration when there is none, then become the agent."""
    BUILD.mkdir(parents=True, exist_ok=True)
    config = BUILD / "agent.toml"
    if not config.exists():
        config.write_text(_toml())
    print(f"configuration: {config} (yours to edit)", flush=True)
    program = str(Path(sys.executable).parent / "mlxrack-agent")
    os.execv(program, [program, "run", "--config", str(config)])


def _toml() -> str:
    root = BUILD.resolve()
    models = "".join(
        f"\n[[models]]\nname = {json.dumps(name)}\npath = {json.dumps(str(default_folder() / name))}\n"
        f"preload = {'true' if name == MAIN else 'false'}\n"
        for name in (MAIN, SECOND)
    )
    return f"""[node]
id = "mini-1"
rack = "home"

[paths]
state = {json.dumps(str(root / "state"))}

[store]
kind = "directory"
path = {json.dumps(str(root / "bucket"))}
{models}"""


if __name__ == "__main__":
    sys.exit(main())
