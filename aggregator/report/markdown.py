"""Render a page as Markdown, for a repository, a ticket or a chat."""

from aggregator.report.page import Curve, Page, Section, Table

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
    parts = [f"## {section.title}", ""]
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
    parts = [f"{curve.title}, {curve.labels[0]} to {curve.labels[-1]}:" if curve.labels else curve.title, "", "```"]
    parts += [
        f"{name:12} {bars(values)} {values[-1] if values else 0:,.6g} {curve.unit}" for name, values in curve.lines
    ]
    return [*parts, "```", ""]


def _table(table: Table) -> list[str]:
    rule = ["---:" if n in table.numbers else "---" for n in range(len(table.columns))]
    rows = [table.columns, rule, *table.rows]
    return [*("| " + " | ".join(_cell(c) for c in row) + " |" for row in rows), ""]


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|") or " "


def _plain(text: str) -> str:
    return str(text).replace("\n", " ").replace("<", "&lt;")
