"""Hatch's build hook: the wheel asks for exactly the versions that it was tested with.

``constraints.txt`` says behind each ``#`` which extras need the package, directly or through others, or ``base``; so
an installation from the wheel alone, in any folder, is that of `make setup`. It runs while the wheel is built, with
nothing of ours installed.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_LINE = re.compile(r"(?P<pin>[^#;]+?)\s*(?:;\s*(?P<marker>[^#]+?)\s*)?#\s*(?P<extras>.+)")


def requirements(constraints: str) -> Iterator[str]:
    """A requirement for each extra of each annotated line, like ``numpy==2.4.6; extra == 'agent'``."""
    for line in constraints.splitlines():
        if match := _LINE.fullmatch(line.strip()):
            for extra in re.split(r",\s*", match["extras"]):
                of_extra = "" if extra == "base" else f"extra == '{extra}'"
                marker = " and ".join(part for part in (match["marker"], of_extra) if part)
                yield f"{match['pin']}; {marker}" if marker else match["pin"]


class PinsHook(BuildHookInterface[Any]):
    """Adds the pins to the wheel's metadata, beside the ranges of pyproject.toml."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling for each wheel; an editable one is installed with the constraints themselves."""
        if self.target_name == "wheel" and version == "standard":
            build_data["dependencies"] += requirements(Path(self.root, "constraints.txt").read_text(encoding="utf-8"))
