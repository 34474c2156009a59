"""A text as detectors read it: Unicode folded, escapes decoded, wraps closed up, and how to get back to the original's
positions. Nothing is changed but what detectors see; what they find is replaced in the original. Pure."""

import html
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache

_DECODINGS = 3
"""Escapes within escapes that are decoded: ``%2534`` takes two."""
_LOOK_ALIKES = str.maketrans(
    "АВЕКМНОРСТХУІЅЈАаеорсхуіѕјΑΒΕΖΗΙΚΜΝΟΡΤΥΧορ·•∙。−⁄∕‗", "ABEKMHOPCTXYISJAaeopcxyisjABEZHIKMNOPTYXop....-//_"
)
"""Cyrillic and Greek letters that are drawn like Latin ones, and marks that are used as separators."""
_SPECIAL = re.compile(r"[^\t\n\r\x20-\x7e]")
_ESCAPE = re.compile(
    r"""\\{1,8}u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\{1,8}u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})
    |\\{1,8}u\{?(?P<code>[0-9a-fA-F]{4,6}(?=\})|[0-9a-fA-F]{4})\}?|\\{1,8}U(?P<long>[0-9a-fA-F]{8})|\\{1,8}x\{?(?P<hex>[0-9a-fA-F]{2})\}?
    |\\{1,8}(?P<octal>[0-3][0-7]{2})|\\{1,8}(?P<letter>[nrtbf"'/@.+_-])
    |(?P<percent>(?:%[0-9a-fA-F]{2})+)|(?P<entity>&\#[xX]?[0-9a-fA-F]{1,7};?|&[a-zA-Z]{2,24};)""",
    re.VERBOSE,
)
_QUOTED = re.compile(r"=[ \t]*\r?\n|(?:=[0-9A-F]{2})+")
_TAGS = re.compile("[\U000e0020-\U000e007e]")
_WRAP = re.compile(r" *[\t\n\r\xa0][ \t\n\r\xa0]*")
_CONTROLS = {"n": "\n", "r": "\n", "t": "\t", "b": "", "f": ""}


class View:
    """``text`` made of another view by ``edits``: (start, end) here, (start, end) below, in order, disjoint."""

    __slots__ = ("_starts", "below", "edits", "text")

    def __init__(self, text: str, below: "View | None" = None, edits: list[tuple[int, int, int, int]] | None = None):
        self.text, self.below, self.edits = text, below, edits or []
        self._starts = [one[0] for one in self.edits]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The positions in the original of ``text[start:end]``, which is not empty."""
        view: View | None = self
        while view is not None and view.below is not None:
            start, end = view._down(start)[0], view._down(end - 1)[1]
            view = view.below
        return start, end

    def crossed(self, start: int, end: int) -> list[tuple[int, int, int, int]]:
        """The edits inside ``text[start:end]``, those at its ends left out."""
        return self.edits[bisect_right(self._starts, start) : bisect_right(self._starts, end - 1)]

    def touched(self, start: int, end: int) -> bool:
        """Whether ``text[start:end]`` holds anything of an edit."""
        n = bisect_right(self._starts, end - 1)
        return n > 0 and self.edits[n - 1][1] > start

    def windows(self, margin: int) -> Iterator[tuple[int, int]]:
        """The parts of the text that are at most so far from an edit."""
        begin = end = 0
        for start, stop, _, _ in self.edits:
            if start - margin > end:
                if end > begin:
                    yield begin, end
                begin = start - margin
            end = min(len(self.text), stop + margin)
        if end > begin:
            yield begin, end

    def _down(self, at: int) -> tuple[int, int]:
        """Where the character at a position begins and ends below."""
        n = bisect_right(self._starts, at) - 1
        if n < 0:
            return at, at + 1
        _, end, below_start, below_end = self.edits[n]
        if at < end:
            return below_start, below_end
        return below_end + at - end, below_end + at - end + 1


def edited(below: View, pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str]) -> View:
    """The view with every match replaced; the same one where nothing changes."""
    pieces, edits, at, length = list[str](), list[tuple[int, int, int, int]](), 0, 0
    for match in pattern.finditer(below.text):
        new = replace(match)
        if new == match.group():
            continue
        kept = below.text[at : match.start()]
        start = length + len(kept)
        length = start + len(new)
        pieces += (kept, new)
        edits.append((start, length, match.start(), match.end()))
        at = match.end()
    if not edits:
        return below
    pieces.append(below.text[at:])
    return View("".join(pieces), below, edits)


def folded(view: View) -> View:
    """Without invisible characters and combining marks; every digit, letter, dash and space in its plain form."""
    return view if view.text.isascii() and view.text.isprintable() else edited(view, _SPECIAL, _fold)


def _fold(match: re.Match[str]) -> str:
    return fold_character(match.group())


@cache
def fold_character(character: str) -> str:
    """One character in its plain form: "" for an invisible one, U+00A0 for every space that is not U+0020."""
    category = unicodedata.category(character)
    if category in ("Zl", "Zp") or character == "\x85":
        return "\n"
    if category == "Zs":
        return "\xa0"
    if category[0] == "M" or category in ("Cc", "Cf", "Cn", "Cs"):
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Pd":
        return "-"
    plain = unicodedata.normalize("NFKD", character).translate(_LOOK_ALIKES)
    return "".join(one for one in plain if unicodedata.category(one) not in ("Mn", "Cf"))


def readings(text: str) -> Iterator[View]:
    """Every view that detectors read: as it is, and with each layer of escapes decoded."""
    original = View(text)
    view = folded(original)
    yield view
    for _ in range(_DECODINGS):
        decoded = edited(view, _ESCAPE, _decode)
        if decoded is view:
            break
        yield (view := folded(decoded))
    if _QUOTED.search(text):
        quoted = edited(folded(original), _QUOTED, _unquote)
        yield folded(quoted)
    if _TAGS.search(text):
        yield folded(edited(original, _TAGS, lambda match: chr(ord(match.group()) - 0xE0000)))


def closed_up(view: View) -> View:
    """Without line breaks, tabs and unusual spaces, for a value that one of them divides."""
    return edited(view, _WRAP, lambda _: "")


def _decode(match: re.Match[str]) -> str:
    kind, text = match.lastgroup, match.group(match.lastgroup or 0)
    if kind == "low":
        return chr(0x10000 + ((int(match["high"], 16) & 0x3FF) << 10) + (int(match["low"], 16) & 0x3FF))
    if kind in ("code", "long", "hex", "octal"):
        code = int(text, 8 if kind == "octal" else 16)
        return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else match.group()
    if kind == "letter":
        return _CONTROLS.get(text, text)
    if kind == "percent":
        return bytes.fromhex(text.replace("%", "")).decode("utf-8", "ignore") or match.group()
    return html.unescape(text if text.endswith(";") else text + ";")


def _unquote(match: re.Match[str]) -> str:
    return bytes.fromhex(re.sub(r"=\s*\n|=", "", match.group())).decode("utf-8", "ignore")
