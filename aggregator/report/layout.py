"""How the PDF is set: its typeface, paragraphs, tables and sections. What they say comes from pdf.py.

The typeface is embedded. A character that it lacks comes from the configured fallback font, or is written as U+XXXX;
none becomes a box. Nothing is cut: a long cell goes on in further rows.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any
from xml.sax.saxutils import escape

from reportlab.graphics.shapes import Drawing, Line, Rect, String
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFError, TTFont
from reportlab.platypus import CondPageBreak, KeepTogether, Paragraph, Table, TableStyle

from aggregator.report.page import spaced
from shared.errors import Refused
from shared.resources import resource

INK, SOFT, FAINT, LINE = (colors.HexColor(c) for c in ("#1B2733", "#5B6B7A", "#F3F6F9", "#D5DDE5"))
BLUE, GOOD, BAD = (colors.HexColor(c) for c in ("#1F6FB2", "#1E8449", "#B03A2E"))
MARGIN = 18 * mm
WIDTH = A4[0] - 2 * MARGIN
REGULAR, BOLD = "NotoSans-Regular", "NotoSans-Bold"
ALL = ((0, 0), (-1, -1))
"""Every cell of a table."""
LONGEST_CELL = 700
"""Characters in one row of a table: a row cannot be taller than a page. What is longer goes on in the next row."""
MOST_ROWS = 12
"""Rows in which a text goes on; what is longer still (an operator's page of notes) says how much is left out."""
ONE_LINE = 13
"""A cell of no more characters stays on one line."""
INSET = 3.0
_BREAKS = "-/_.:,@+"
"""A long word is divided behind one of these."""
LEAST = 45 * mm
"""A section does not begin with less than this left on a page."""
SHORT = A4[1] / 3
"""A section of this height or less stays on one page."""
_WRITTEN = str.maketrans({"→": "->", "←": "<-", "−": "-", "≤": "<=", "≥": ">=", "\t": " ", "`": "'"})
"""What the typeface lacks and can be said in characters that it has."""
_RIGHT_TO_LEFT = ("R", "AL", "AN")


def _style(name: str, size: float, **more: Any) -> ParagraphStyle:
    values: dict[str, Any] = {"fontName": REGULAR, "fontSize": size, "leading": size * 1.36, "textColor": INK}
    return ParagraphStyle(name, **{**values, "splitLongWords": 1, **more})


BODY = _style("body", 9)
SMALL = _style("small", 7.5, textColor=SOFT)
CAPTION = _style("caption", 7.5, textColor=SOFT, keepWithNext=1)
CELL = _style("cell", 7.5)
NUMBER = _style("number", 7.5, alignment=2)
HEAD = _style("head", 7, textColor=SOFT, fontName=BOLD)
HEAD_RIGHT = _style("headright", 7, textColor=SOFT, fontName=BOLD, alignment=2)
TITLE = _style("title", 9.5, textColor=SOFT)
HEADLINE = _style("headline", 15, fontName=BOLD, leading=20, spaceAfter=4)
SECTION = _style("section", 12, fontName=BOLD, spaceBefore=13, spaceAfter=4, keepWithNext=1)


def kpi(colour: Any) -> ParagraphStyle:
    """The style of a key figure."""
    return _style("kpi", 14.5, fontName=BOLD, leading=19, textColor=colour)


def tinted(style: ParagraphStyle, colour: Any) -> ParagraphStyle:
    """The same style in a colour."""
    return ParagraphStyle(f"{style.name}-tinted", style, textColor=colour)


CARDS = 4
"""In one row."""
Card = tuple[str, str, str, str, bool | None]
"""What it is, its value, a note, its change against the span before, and the verdict."""


def colour(good: bool | None) -> Any:
    """The colour of a verdict."""
    return INK if good is None else (GOOD if good else BAD)


class Sheet:
    """Sets texts in the embedded typeface. ``fallback_font`` is the path of a TrueType font for what that lacks; ""
    for none. Raises Refused if it cannot be used."""

    def __init__(self, fallback_font: str = "") -> None:
        for name in (REGULAR, BOLD):
            pdfmetrics.registerFont(TTFont(name, str(resource(f"vendor/fonts/{name}.ttf"))))
        self._known = frozenset(pdfmetrics.getFont(REGULAR).face.charToGlyph)
        self._fallback = _registered(fallback_font) if fallback_font else ""
        self._more = frozenset(pdfmetrics.getFont(self._fallback).face.charToGlyph if self._fallback else ())

    def written(self, text: str) -> str:
        """A text in characters that can be drawn."""
        return "".join(_drawn(font, chars) for font, chars in self._runs(text))

    def p(self, text: str, style: ParagraphStyle) -> Paragraph:
        """A paragraph; nothing of the text is markup."""
        parts = []
        for font, chars in self._runs(text):
            drawn = _drawn(font, chars)
            parts.append(f'<font name="{font}">{escape(drawn)}</font>' if font else escape(drawn))
        return Paragraph("".join(parts), style)

    def plain(self, text: str) -> str:
        """A text for a single line that is not a paragraph, in the embedded typeface alone."""
        return "".join(
            one if ord(one) in self._known else f"U+{ord(one):04X}" for one in self.written(text).translate(_WRITTEN)
        )

    def section(self, title: str, *body: Any) -> list[Any]:
        """A heading and what belongs to it: on one page if it is short, and never a heading alone."""
        heading = self.p(title, SECTION)
        if sum(_height(one) for one in (heading, *body)) <= SHORT:
            return [KeepTogether([heading, *body])]
        return [CondPageBreak(LEAST), KeepTogether([heading, *body[: not isinstance(body[0], Table)]]),
                *body[not isinstance(body[0], Table):]]  # fmt: skip

    def table(
        self,
        head: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        text: Sequence[int] = (0,),
        tints: Sequence[Any] = (),
        total: bool = False,
    ) -> Table:
        """A table; the columns ``text`` are texts, the others numbers. Each is as wide as what it holds needs.
        ``tints`` are colours of the last cells, by row; ``total`` is whether the last row is a sum."""
        pieces = [(n, piece) for n, row in enumerate(rows) for piece in _pieces(row)]
        widths = _widths([[self.plain(one) for one in row] for row in (head, *(piece for _, piece in pieces))], text)
        cells = [[self.p(name, HEAD if n in text else HEAD_RIGHT) for n, name in enumerate(head)]]
        for number, piece in pieces:
            styles = [CELL if n in text else NUMBER for n in range(len(head))]
            if number < len(tints):
                styles[-1] = tinted(styles[-1], tints[number])
            shown = zip(piece, widths, styles, strict=True)
            cells.append([self.p(broken(value, width - 2 * INSET), style) for value, width, style in shown])
        more = [("LINEABOVE", (0, -1), (-1, -1), 0.8, SOFT)] if total else []
        return styled(Table(cells, colWidths=widths, repeatRows=1), more)

    def cards(self, cards: Sequence[Card]) -> Table:
        """Key figures side by side."""
        cells: list[Any] = [
            [self.p(name, SMALL), self.p(value, kpi(colour(good))), self.p(note, SMALL), self.p(change, SMALL)]
            for name, value, note, change, good in cards
        ]
        table = Table([cells[n : n + CARDS] for n in range(0, len(cells), CARDS)], colWidths=[WIDTH / CARDS] * CARDS)
        lines = [("BACKGROUND", *ALL, FAINT), ("INNERGRID", *ALL, 4, colors.white)]
        table.setStyle(TableStyle([*lines, *padding(left=8, top=5, bottom=6, right=4), ("VALIGN", *ALL, "TOP")]))
        return table

    def _runs(self, text: str) -> list[tuple[str | None, str]]:
        """Parts of a text by the font that has them: "" for the typeface itself, None for no font."""
        said = "".join(" " if one.isspace() else one for one in spaced(text).translate(_WRITTEN))
        whole = said.replace(" %", "\N{NO-BREAK SPACE}%")  # a percentage stays on one line
        return [(font, "".join(chars)) for font, chars in groupby(whole, self._font)]

    def _font(self, one: str) -> str | None:
        if unicodedata.category(one) in ("Cc", "Cf", "Co", "Cs"):
            return None
        if ord(one) in self._known:
            return ""
        # what is written from right to left would be set the wrong way round
        drawable = ord(one) in self._more and unicodedata.bidirectional(one) not in _RIGHT_TO_LEFT
        return self._fallback if drawable else None


def _drawn(font: str | None, chars: str) -> str:
    return chars if font is not None else " ".join(f"U+{ord(one):04X}" for one in chars)


def styled(table: Table, more: Sequence[Any] = ()) -> Table:
    """A table with the lines of all of them."""
    lines = [("LINEBELOW", (0, 0), (-1, 0), 0.8, LINE), ("LINEBELOW", (0, 1), (-1, -1), 0.35, LINE)]
    inside = padding(top=2.5, bottom=3, left=INSET, right=INSET)
    table.setStyle(TableStyle([*lines, ("VALIGN", *ALL, "TOP"), *inside, *more]))
    return table


def padding(**sizes: float) -> list[Any]:
    """Space within every cell, by side."""
    return [(f"{side.upper()}PADDING", *ALL, size) for side, size in sizes.items()]


def hatched(drawing: Drawing, x: float, y: float, wide: float, tall: float) -> None:
    """Draw a rectangle that stands for what is not known."""
    drawing.add(Rect(x, y, wide, tall, fillColor=FAINT, strokeColor=None))
    for at in range(0, int(tall - wide) + 1, 6):
        drawing.add(Line(x, y + at, x + wide, y + at + wide, strokeColor=LINE, strokeWidth=0.6))


def label(x: float, y: float, text: str, anchor: str) -> String:
    """A small text in a drawing; ``anchor`` is start, middle or end."""
    return String(x, y, text, fontName=REGULAR, fontSize=7, fillColor=SOFT, textAnchor=anchor)


def meter(share: float, colour: Any) -> Drawing:
    """A bar that is filled for a share."""
    wide = WIDTH * 0.18
    drawing = Drawing(wide, 8)
    drawing.add(Rect(0, 1, wide, 6, fillColor=LINE, strokeColor=None))
    drawing.add(Rect(0, 1, wide * min(1.0, share), 6, fillColor=colour, strokeColor=None))
    return drawing


def _registered(path: str) -> str:
    name = f"fallback-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    try:
        pdfmetrics.registerFont(TTFont(name, path))
    except (TTFError, OSError) as error:
        why = f"report.fallback_font {path!r}: {error}; give the path of a TrueType font (.ttf), or leave it out"
        raise Refused(why) from None
    return name


def _height(flowable: Any) -> float:
    return float(flowable.wrap(WIDTH, A4[1])[1])


def _pieces(row: Sequence[str]) -> list[list[str]]:
    """A row as one or more of a height that fits a page."""
    split = [_split(value) for value in row]
    most = max(map(len, split), default=1)
    return [[parts[n] if n < len(parts) else "" for parts in split] for n in range(most)]


def _split(text: str) -> list[str]:
    parts: list[str] = []
    while len(text) > LONGEST_CELL and len(parts) < MOST_ROWS - 1:
        cut = text.rfind(" ", LONGEST_CELL // 2, LONGEST_CELL)
        cut = cut if cut > 0 else LONGEST_CELL
        parts.append(text[:cut])
        text = text[cut:].lstrip()
    if len(text) > LONGEST_CELL:
        text = f"{text[:LONGEST_CELL]} … ({len(text) - LONGEST_CELL:,} more characters in the JSON report)"
    return [*parts, text]


def _widths(rows: Sequence[Sequence[str]], text: Sequence[int]) -> list[float]:
    """Widths of columns that add up to WIDTH: first what the longest word of each needs, or the longest number, then
    by what they wish."""
    needs, wishes = [], []
    for n in range(len(rows[0])):
        values = [(row[n], BOLD if row is rows[0] else REGULAR) for row in rows]
        divided = [
            (value.split() if len(value) > ONE_LINE and (n in text or font == BOLD) else [value], font)
            for value, font in values
        ]
        whole = [(part, font) for parts, font in divided for part in parts]
        needs.append(min(WIDTH / 4, max((_width(*one) for one in whole), default=0)) + 2 * INSET + 1)
        wishes.append(max(needs[-1], min(WIDTH / 2, max(_width(*one) for one in values) + 2 * INSET + 1)))
    spare, wished = WIDTH - sum(needs), sum(wishes) - sum(needs)
    if spare <= 0:
        return [need * WIDTH / sum(needs) for need in needs]
    if wished <= spare:
        return [wish + (spare - wished) / len(wishes) for wish in wishes]
    return [need + (wish - need) * spare / wished for need, wish in zip(needs, wishes, strict=True)]


def broken(text: str, width: float) -> str:
    """A text whose words all fit a column: longer ones are divided, behind a hyphen or the like where they have one.
    A space between two parts is always at the end of a line, since they do not fit one together."""
    return " ".join(part for word in text.split(" ") for part in _parts(word, width))


def _parts(word: str, width: float) -> list[str]:
    parts = []
    while _width(word, REGULAR) > width and len(word) > 1:
        most = next((n for n in range(2, len(word)) if _width(word[:n], REGULAR) > width), len(word)) - 1
        cut = max((n + 1 for n in range(most // 3, most) if word[n] in _BREAKS), default=most)
        parts.append(word[:cut])
        word = word[cut:]
    return [*parts, word]


def _width(text: str, font: str) -> float:
    return float(pdfmetrics.stringWidth(text[:400], font, CELL.fontSize))
