"""Render a report's Markdown for a terminal: aligned tables, or one block per row where they are too wide. Pure."""

import html
import re
import textwrap
from collections.abc import Sequence
from itertools import groupby

NARROWEST = 40
_ESCAPED = re.compile(r"\\([^A-Za-z0-9\s])")
_HEADING = re.compile(r"#{1,6} ")
_CELLS = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"-{3,}:?")


def render(markdown: str, width: int) -> str:
    """The text for a terminal of this many columns."""
    width = max(width, NARROWEST)
    out: list[str] = []
    for is_table, lines in groupby(markdown.split("\n"), key=lambda line: line.startswith("|")):
        block = list(lines)
        out += _table([_cells(line) for line in block], width) if is_table else _prose(block, width)
    return "\n".join(out)


def _prose(lines: Sequence[str], width: int) -> list[str]:
    out = []
    for line in lines:
        if heading := _HEADING.match(line):
            title = _plain(line[heading.end() :])
            first = heading.group() == "# "
            out += [title.upper() if first else title, ("=" if first else "-") * min(len(title), width)]
        else:
            indent = "  " if line.startswith("- ") else ""
            out += textwrap.wrap(_plain(line), width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return out


def _table(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    head, body = rows[0], [row for row in rows[1:] if not all(_RULE.fullmatch(cell) for cell in row)]
    sizes = [max(len(row[n]) if n < len(row) else 0 for row in (head, *body)) for n in range(len(head))]
    if sum(sizes) + 2 * len(sizes) <= width:
        rule = ["-" * size for size in sizes]
        return [_line(row, sizes) for row in (head, rule, *body)]
    names = max((len(name) for name in head), default=0)
    out = []
    for row in body:
        for name, cell in zip(head, row, strict=False):
            if cell:
                begin = f"  {name:{names}}  "
                out += textwrap.wrap(cell, width, initial_indent=begin, subsequent_indent=" " * len(begin))
        out.append("")
    return out


def _line(cells: Sequence[str], sizes: Sequence[int]) -> str:
    return "  ".join(f"{cell:{size}}" for cell, size in zip(cells, sizes, strict=False)).rstrip()


def _cells(line: str) -> list[str]:
    return [_plain(cell.strip()) for cell in _CELLS.split(line.strip())[1:-1]]


def _plain(text: str) -> str:
    """What the Markdown shows: nothing escaped, no characters of no width."""
    return html.unescape(_ESCAPED.sub(r"\1", text)).replace("\u200b", "")
