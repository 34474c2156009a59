"""``make families``: runs every family of tests/families through prompt, grammar and parser, one cell for each kind of
request, and writes the matrix into docs/models.md. Exits 1 where a cell is wrong.

``MLXRACK_TEMPLATES`` names a folder of real ones: a folder each with chat_template.jinja, tokenizer_config.json and, if
known, expect.json, which says what such a model writes. Their matrix is printed, not written.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from scripts.common import parser
from tests.families import NAMES, Family, known
from tests.families.cells import CELLS, Cell, cell

PAGE = Path(__file__).parent.parent / "docs/models.md"
BEGIN, END = "<!-- families: generated -->\n", "<!-- families: end -->"

Row = Mapping[str, Cell]


def row(family: Family) -> Row:
    """A family's cells by column."""
    return {name: cell(family, name) for name in CELLS}


def matrix(rows: Mapping[str, Row], about: Mapping[str, str]) -> str:
    """The matrix as Markdown: what is wrong, the limits and the remarks stand below it, by number."""
    notes: dict[str, int] = {}
    lines = [f"| family | {' | '.join(CELLS)} |", f"|---{'|---' * len(CELLS)}|"]
    for name, cells in rows.items():
        shown = [_shown(one, notes) for one in cells.values()]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    lines += ["", *(f"{number}. {note}" for note, number in notes.items())]
    if about:
        lines += ["", *(f"- `{name}`: {text}" for name, text in about.items())]
    return "\n".join(lines) + "\n"


def _shown(found: Cell, notes: dict[str, int]) -> str:
    number = f" ({notes.setdefault(found.note, len(notes) + 1)})" if found.note else ""
    return f"{'' if found.state == 'limit' else found.state}{number}".strip()


def page(generated: str) -> str:
    """The documentation with a new matrix."""
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return head + BEGIN + generated + END + rest.split(END, 1)[1]


def committed() -> tuple[dict[str, Row], str]:
    """The families of this repository, and their matrix as the documentation shows it."""
    rows = {name: row(known(name)) for name in NAMES}
    return rows, matrix(rows, {name: known(name).about for name in NAMES})


def _real(folders: Iterable[Path]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for folder in folders:
        try:
            rows[folder.name] = row(Family(folder))
        except Exception as error:  # noqa: BLE001  # a fetched folder may hold anything
            rows[folder.name] = {name: Cell("WRONG", f"does not load: {error}") for name in CELLS}
        print(f"{folder.name}: {_summary(rows[folder.name])}", file=sys.stderr)
    return rows


def _summary(cells: Row) -> str:
    wrong = [f"{name}: {one.note}" for name, one in cells.items() if one.state == "WRONG"]
    return "; ".join(wrong)[:2000] or "ok"


def main() -> int:
    """Print the matrix; write that of the committed families into the documentation."""
    options = parser(__doc__)
    options.add_argument("families", nargs="*", help="names; all if none is given")
    options.add_argument("--json", action="store_true", help="print the cells as JSON")
    chosen = options.parse_args()
    rows, generated = committed()
    PAGE.write_text(page(generated), encoding="utf-8")
    if held := os.environ.get("MLXRACK_TEMPLATES"):
        folders = sorted(path.parent for path in Path(held).glob("*/tokenizer_config.json"))
        rows |= _real(folder for folder in folders if not chosen.families or folder.name in chosen.families)
    rows = {name: cells for name, cells in rows.items() if not chosen.families or name in chosen.families}
    as_json = {name: {column: one._asdict() for column, one in cells.items()} for name, cells in rows.items()}
    print(json.dumps(as_json, indent=1) if chosen.json else matrix(rows, {}))
    wrong = [name for name, cells in rows.items() if _summary(cells) != "ok"]
    print(f"{len(rows) - len(wrong)} of {len(rows)} families without a wrong cell", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
