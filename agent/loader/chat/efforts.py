"""How much a model reasons: what its chat template has variables or words for. Pure."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agent.loader.chat.turns import Turn
from agent.wire.frames import EFFORTS

Try = Callable[[Sequence[Turn], Sequence[Turn] | None, Mapping[str, Any], bool], str | None]
"""(turns, tools, variables, whether an answer begins) -> the rendered text, None if the template refuses it."""
_USUAL, _UNKNOWN = ("low", "medium", "high"), "qeffortword"
_NEGATIVE = ("no_", "skip", "disable", "hide")
_NO_EFFORT = ("no_think", "off", "disabled")
_QUIET = ("/no_think", "/nothink")
_ASKED: tuple[Turn, ...] = ({"role": "user", "content": "qword001"},)


class Switch(NamedTuple):
    """A variable that switches reasoning, and its values; None leaves it out."""

    variable: str
    on: Any
    off: Any


def efforts_of(text: Try, variables: Iterable[str]) -> tuple[str, tuple[str, ...]] | None:
    """The variable that takes an effort, and the efforts that it takes."""
    for name in sorted(variables):
        if "effort" not in name and "reasoning_mode" not in name:
            continue
        shown = {value: _asked(text, {name: value}) for value in (*EFFORTS, _UNKNOWN)}
        copied = (shown.pop(_UNKNOWN) or "").split(_UNKNOWN)
        # where any word is copied, those that the template does not treat specially mean nothing unless they are usual
        idle = {value for value in EFFORTS if len(copied) > 1 and shown[value] == value.join(copied)}
        taken = tuple(v for v, one in shown.items() if one is not None and (v in _USUAL or v not in idle))
        if len({shown[value] for value in taken}) > 1:
            return name, taken
    return None


def switch_of(text: Try, variables: Iterable[str]) -> Switch | None:
    """What switches reasoning: a truth, a budget of nothing, or an effort of another name."""
    known = sorted(variables, key=lambda one: (one != "enable_thinking", one))
    for name in known:
        if not re.search(r"think|reason", name) or re.search(r"effort|budget", name):
            continue
        on, off = (_asked(text, {name: value}) for value in (True, False))
        if on is not None and off is not None and on != off:
            negative = name.startswith(_NEGATIVE)
            return Switch(name, not negative, negative)
    return next((Switch(name, None, off) for name in known for off in _offs(text, name)), None)


def _offs(text: Try, name: str) -> Iterator[Any]:
    """Values of a variable with which nothing is reasoned, where it does not take the usual ones."""
    if "budget" in name and (without := _asked(text, {name: 0})) is not None and without != _asked(text, {name: 512}):
        yield 0
    if "effort" in name and _asked(text, {name: "none"}) is None:
        yield from (word for word in _NO_EFFORT if _asked(text, {name: word}) is not None)


def quiet_word(text: Try, source: str) -> str:
    """The word that switches reasoning off, where the template looks for one."""
    for word in _QUIET:
        if word not in source:
            continue
        said, loud = ([{"role": "system", "content": one}, *_ASKED] for one in (word, "qword002"))
        with_it, without = text(said, None, {}, True), text(loud, None, {}, True)
        if with_it and without and with_it.replace(word, "") != without.replace("qword002", ""):
            return word
    return ""


def _asked(text: Try, variables: Mapping[str, Any]) -> str | None:
    return text(_ASKED, None, variables, True)
