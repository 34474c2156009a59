"""The content of a page (headings, sentences, tables, curves), independent of its rendering. Pure."""

import re
from collections.abc import Iterable, Sequence

import msgspec


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of text cells. ``numbers`` are the right-aligned columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One or more lines over the same points, which ``labels`` name. ``mark`` is the index of a point to point out, and
    ``mark_text`` what it is."""

    title: str
    labels: tuple[str, ...]
    lines: tuple[tuple[str, tuple[float, ...]], ...]
    unit: str = ""
    mark: int | None = None
    mark_text: str = ""


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A heading and its content, in this order: sentences, a list, numbered steps, a curve, a table."""

    title: str
    text: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    curve: Curve | None = None
    table: Table | None = None


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """``lead`` is the one-sentence summary."""

    title: str
    lead: str
    sections: tuple[Section, ...]
    foot: str = ""


CODE = re.compile(r"(`[A-Za-z0-9._-]+(?: [A-Za-z0-9._-]+)*`)")
"""A command or a name within a text, as every format shows it."""


_PERCENT = re.compile(r"(?<=\d)%(?=[\s.,;:)]|$)")


def spaced(text: str) -> str:
    """A text whose percentages all have one form, 99.9 %, whoever wrote it."""
    return _PERCENT.sub(" %", text)


def so_far(page: Page, until: str) -> Page:
    """A page of a span that is not over, which says so in its title and first sentence."""
    lead = f"{until[:1].upper()}{until[1:]}: {page.lead}"
    return msgspec.structs.replace(page, title=f"{page.title}, {until}", lead=lead)


def page_of(title: str, lead: str, sections: Iterable[Section | None], foot: str = "") -> Page:
    """A page of the sections that are there."""
    return Page(title=title, lead=lead, sections=tuple(one for one in sections if one is not None), foot=foot)


def table(columns: str, rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> Table:
    """A table; ``columns`` are names separated by bars. Without rows it shows "no data"."""
    names = tuple(name.strip() for name in columns.split("|"))
    empty = (("no data", *("" for _ in names[1:])),)
    return Table(columns=names, rows=tuple(tuple(row) for row in rows) or empty, numbers=tuple(numbers))
