"""Render a page as Markdown, for a repository, a ticket or a chat."""

import re

from aggregator.report.page import CODE, Curve, Page, Section, Table, spaced
from aggregator.report.wording import figure

_BARS = " ▁▂▃▄▅▆▇█"


def render(page: Page) -> bytes:
    """The page as UTF-8."""
    parts = [f"# {_plain(page.title)}", "", _plain(page.lead), ""]
    for section in page.sections:
        parts += _section(section)
    if page.foot:
        parts += ["---", "", _plain(page.foot), ""]
    return "\n".join(parts).encode()


def bars(values: tuple[float, ...], width: int = 72) -> str:
    """Numbers as a row of block characters. Negative ones get the lowest block."""
    if not values:
        return ""
    step = max(1, -(-len(values) // width))
    means = [sum(values[n : n + step]) / len(values[n : n + step]) for n in range(0, len(values), step)]
    top = max(*means, 0.0) or 1.0
    return "".join(_BARS[max(1, round(max(0.0, one) / top * 8))] for one in means)


def _section(section: Section) -> list[str]:
    parts = [f"## {_plain(section.title)}", ""]
    for text in section.text:
        parts += [_plain(text), ""]
    if section.points:
        parts += [*(f"- {_plain(point)}" for point in section.points), ""]
    if section.steps:
        parts += [*(f"{n}. {_plain(step)}" for n, step in enumerate(section.steps, 1)), ""]
    if section.curve is not None:
        parts += _curve(section.curve)
    if section.table is not None:
        parts += _table(section.table)
    return parts


def _curve(curve: Curve) -> list[str]:
    title = f"{curve.title}, {curve.labels[0]} to {curve.labels[-1]}:" if curve.labels else curve.title
    parts = [_plain(title), "", "```"]
    parts += [
        f"{_fenced(name):12} {bars(values)} {figure(values[-1] if values else 0)} {curve.unit}"
        for name, values in curve.lines
    ]
    marked = [_plain(f"{curve.mark_text}."[:1].upper() + f"{curve.mark_text}."[1:]), ""] if curve.mark_text else []
    return [*parts, "```", "", *marked]


def _fenced(text: str) -> str:
    """A text within a block of code, which it cannot end."""
    return " ".join(text.split()).replace("`", "'")


def _table(table: Table) -> list[str]:
    rule = ["---:" if n in table.numbers else "---" for n in range(len(table.columns))]
    rows = [table.columns, rule, *table.rows]
    return [*("| " + " | ".join(_cell(c) for c in row) + " |" for row in rows), ""]


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|") or " "


def _plain(text: str) -> str:
    """A text that begins a line, where a few characters more have a meaning."""
    return _AT_START.sub(r"\1\\\2", _inline(text).strip())


def _inline(text: str) -> str:
    """A text in which nothing is active, whoever wrote it: no link, image, mention, markup or tag. Plain names and
    sentences stay as they are, and so do commands between backticks."""
    parts = CODE.split(" ".join(str(text).split("\n")))
    return "".join(part if n % 2 else _escaped(part) for n, part in enumerate(parts))


def _escaped(text: str) -> str:
    text = _ENTITY.sub("&amp;", spaced(text)).replace("\\", "\\\\")
    text = _ACTIVE.sub(r"\\\g<0>", text).replace("<", "&lt;")
    return _LINKED.sub(r"\g<0>&#8203;", text)


_ENTITY = re.compile(r"&(?=#?\w+;)")
_ACTIVE = re.compile(r"[*~`$]|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""Emphasis, code, formulas, links and images. An underscore within a word is none."""
_LINKED = re.compile(
    r"(?<![A-Za-z0-9])(?:[A-Za-z][A-Za-z0-9+.-]*:(?=//)|(?:mailto|javascript|data|xmpp|tel):(?=\S)|www\.)|@(?=\w)",
    re.IGNORECASE,
)
"""What becomes a link or a mention by itself; a space of no width behind it keeps it text."""
_AT_START = re.compile(r"^(\d{0,9})([#>+=.):-])(?=\s|$|[-=>#])")
