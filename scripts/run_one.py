"""``make run``: one agent on the demo model, in the foreground, with its state under build/run/."""

import json
import os
import sys
from pathlib import Path

from scripts.common import agent_toml, script
from scripts.fetch_demo_model import MAIN, SECOND, default_folder

BUILD = Path("build/run")


def main() -> int:
    """Write a configuration when there is none, then exec the agent."""
    config = BUILD / "agent.toml"
    if not config.exists():
        models = "".join(
            f"\n[[models]]\nname = {json.dumps(name)}\npath = {json.dumps(str(default_folder() / name))}\n"
            f"preload = {json.dumps(name == MAIN)}\n"
            for name in (MAIN, SECOND)
        )
        agent_toml(BUILD, "mini-1", "home", models.lstrip())
    print(f"configuration: {config} (yours to edit)", flush=True)
    program = script("mlxrack-agent")
    os.execv(program, [program, "run", "--config", str(config)])


if __name__ == "__main__":
    sys.exit(main())
