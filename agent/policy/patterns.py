"""An operator's regular expressions: compiled by the engine that runs them, and what is wrong with one. Pure."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import regex

MOST_CHARS = 1000
MOST_REPEATS = 10_000
"""Counted repetitions are unrolled when they are compiled: more of them, one within another, take gigabytes."""
MOST_DEPTH = 50
_MANY = 10
"""From here on a counted repetition of a repetition backtracks like an unbounded one."""
_TRIAL_S = 1.0
_TRIALS = ("", "a", "a b", "1", "a1\n-")
_COUNT = re.compile(r"\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\}")
_RECURSIVE = re.compile(r"\(\?(R|\d|[+-]\d|&|P>)")
_FUZZY = re.compile(r"\{[\d\s<=+,]*[eids][\d\s<=+,eids]*[:}]")


class _Atom(NamedTuple):
    """What the next quantifier repeats: the most repetitions within it, and whether one of them is unbounded."""

    repeats: int = 1
    open_ended: bool = False


def compiled(pattern: str) -> Any:
    """A pattern as the detectors and the content filter run it (`regex`, case-sensitive, Unicode); its searches take
    ``timeout=``. Raises regex.error."""
    return _compiled(pattern)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def problem(pattern: str) -> str:
    """Why a pattern cannot be used; "" when it can."""
    if len(pattern) > MOST_CHARS:
        return f"has {len(pattern):,} characters; at most {MOST_CHARS:,}"
    plain = _plain(pattern)
    if _FUZZY.search(plain) or _RECURSIVE.search(plain):
        return "approximate matching, like {e<=1}, and recursion are not supported; a brace itself is \\{"
    if why := _too_large(pattern):
        return why
    try:
        return _trial(compiled(pattern))
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError, IndexError) as error:
        return f"is not a regular expression: {error or type(error).__name__}"


def backtracks(pattern: str) -> bool:
    """Whether a repetition is repeated without bound, like ``(a+)+``: on some texts that takes a time that doubles with
    each character, so that the analysis ends by its time-out."""
    return any(open_ended for _, open_ended in _nested(pattern))


def _trial(made: Any) -> str:
    """Whether it matches nothing at all somewhere, and with it everywhere."""
    try:
        found = any(not one.group() for text in _TRIALS for one in made.finditer(text, timeout=_TRIAL_S))
    except TimeoutError:
        return "takes over a second on a short text"
    return "matches an empty text, and so everywhere" if found else ""


def _too_large(pattern: str) -> str:
    depth = 0
    for character in _plain(pattern):
        depth += (character == "(") - (character == ")")
        if depth > MOST_DEPTH:
            return f"nests groups more than {MOST_DEPTH} deep"
    repeats = max((repeats for repeats, _ in _nested(pattern)), default=1)
    return f"repeats up to {repeats:,} times; at most {MOST_REPEATS:,}" if repeats > MOST_REPEATS else ""


def _nested(pattern: str) -> Iterator[tuple[int, bool]]:
    """For each quantifier: the repetitions that it makes of what it repeats, and whether it repeats without bound what
    itself repeats so."""
    outer, atom = [_Atom()], _Atom()
    plain, at = _plain(pattern), 0
    while at < len(plain):
        character, width = plain[at], 1
        if character == "(":
            outer.append(_Atom())
        elif character == ")" and len(outer) > 1:
            atom = outer.pop()
        elif (found := _quantifier(plain, at)) is not None:
            most, width = found
            yield most * atom.repeats, atom.open_ended and most >= _MANY
            atom = _Atom(most * atom.repeats, atom.open_ended or most >= _MANY)
        elif character != "|":
            atom = _Atom()
        if character != "(":
            within = outer[-1]
            outer[-1] = _Atom(max(within.repeats, atom.repeats), within.open_ended or atom.open_ended)
        at += width


def _quantifier(plain: str, at: int) -> tuple[int, int] | None:
    """The most repetitions of the quantifier at a position, and its length; None where there is none. One without a
    bound counts as ``_MANY``, because it is not unrolled; what follows (lazy, possessive) changes neither."""
    count = _COUNT.match(plain, at)
    if plain[at] in "*+":
        most, end = _MANY, at + 1
    elif count is not None and count[0] not in ("{}", "{,}"):
        least, end = int(count["least"] or 0), count.end()
        most = int(count["most"]) if count["most"] else max(least, _MANY if count["comma"] else least)
    else:
        return None
    return most, end - at + (plain[end : end + 1] in ("?", "+"))


def _plain(pattern: str) -> str:
    """The pattern with every escape and every set as one letter, so that only groups and quantifiers are left."""
    return re.sub(r"\\[\s\S]|\[\^?\]?(?:\\[\s\S]|[^\]\\])*\]", "x", pattern)
