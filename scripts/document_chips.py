"""``make docs``: generates the table of docs/hardware.md from shared/chips.toml."""

import sys
from pathlib import Path

from shared.chips import markdown

PAGE = Path(__file__).parent.parent / "docs/hardware.md"
BEGIN, END = "<!-- chips: generated -->\n", "\n<!-- chips: end -->"


def main() -> int:
    """Rewrite the generated part of the page."""
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(head + BEGIN + markdown() + END + rest.split(END.lstrip("\n"), 1)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
