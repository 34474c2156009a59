"""Programs of macOS that behave as public reports say: one file each, with the name of the program. They keep what they
know in a JSON file beside themselves, so that a command that a check prints can be run, and looked at again."""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def put(folder: Path, *names: str, **known: Any) -> Path:
    """Install programs in ``folder``, each with what it knows, by name. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        program = folder / name
        program.write_text(f"#!{sys.executable} -I\n" + (HERE / name).read_text(encoding="utf-8"))
        program.chmod(0o755)
        if name in known:
            (folder / f"{name}.json").write_text(json.dumps(known[name]))
    return folder


def known(folder: Path, name: str) -> Any:
    """What the program knows now."""
    return json.loads((folder / f"{name}.json").read_text())
