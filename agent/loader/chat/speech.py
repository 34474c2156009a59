"""Splits a model's output into reasoning, content and tool calls, by the markers of its family. Pure."""

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from agent.loader.chat import harmony
from agent.loader.chat.calls import CallFormat, Found, read
from agent.loader.stopping import overlap
from agent.wire.frames import ToolCall

THINK = ("<think>", "</think>")
"""What most models write around their reasoning."""
CONTENT, REASONING, CALL, HEADER = "content", "reasoning", "call", "header"


class Markers(NamedTuple):
    """How a model marks reasoning and calls; None where it has neither. ``silent`` tokens are no part of content. With
    ``unknown`` neither template nor vocabulary say whether it reasons: an answer that begins with THINK does."""

    reasoning: tuple[str, str] | None = None
    call: CallFormat | None = None
    silent: tuple[str, ...] = ()
    unknown: bool = False

    @property
    def channels(self) -> bool:
        """Whether its messages have headers (gpt-oss)."""
        return self.call is not None and self.call.channels


class Said(NamedTuple):
    """A piece of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: "Said") -> "Said":  # type: ignore[override]
        return Said(self.text + other.text, self.reasoning + other.reasoning, self.calls + other.calls)


class Speech:
    """Parses decoded text incrementally. A call is emitted when complete; one that cannot be parsed, or that names no
    function that was described, becomes text. Without ``tools`` there are no calls. ``new_id`` makes call ids."""

    def __init__(
        self, markers: Markers, tools: Sequence[str] = (), *, reasoning: bool = False, new_id: Callable[[], str] = str
    ) -> None:
        self._markers, self._new_id = markers, new_id
        self._tools = [{"type": "function", "function": json.loads(tool)} for tool in tools]
        self._names = {tool["function"]["name"] for tool in self._tools}
        # the template has begun the header of the first message
        self._state = HEADER if markers.channels else REASONING if reasoning else CONTENT
        self._edges = _edges(markers, bool(tools))
        self._plain = not any(self._edges.values()) and not self._may_be_bare
        self._held = self._lead = self._call = self._blank = self._function = ""
        self._begun = self.called = False
        self._start = "" if markers.unknown else None

    @property
    def reasoning(self) -> bool:
        """Whether the model is reasoning now."""
        return self._state == REASONING

    @property
    def _may_be_bare(self) -> bool:
        """Whether an answer that begins like a call is one: models forget the marker of calls in JSON."""
        form = self._markers.call
        return bool(self._tools) and form is not None and not self._markers.channels and (form.bare or form.in_json)

    def feed(self, text: str) -> Said:
        """The parts that ``text`` adds."""
        if self._start is not None:
            if (begun := self._started(self._start + text)) is None:
                return Said()
            text = begun
        if self._plain:
            return Said(text)
        found, self._held = Said(), self._held + text
        while (edge := self._next()) is not None:
            begin, marker = edge
            piece, self._held = self._held[:begin], self._held[begin + len(marker) :]
            found += self._piece(piece) + self._pass(marker)
        keep = max((overlap(self._held, mark) for mark in self._edges[self._state]), default=0)
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return found + self._piece(piece)

    def finish(self, *, cut: bool = False) -> Said:
        """The parts held back, once the text has ended. Where it was ``cut`` off, a call is none whose format does not
        tell whether it is complete: arguments might be missing."""
        if self._start is not None:
            text, self._start = self._start, None
            return self.feed(text) + self.finish(cut=cut)
        if self._plain:
            return Said()
        piece, self._held = self._held, ""
        found = self._piece(piece)
        if self._state == CALL:
            found += self._unread() if cut and not self._tells_its_end else self._called(self._function)
        elif self._state == HEADER and self._call.strip() and not self._call.startswith(harmony.BEGINS):
            found += self._unread()
        if self._blank.strip():  # what might have been a bare call
            self._lead, self._call, self._blank = "", self._blank, ""
            found += self._called("")
        return found

    def _started(self, text: str) -> str | None:
        """What an answer begins with, less the begin of reasoning; None while it may become that."""
        seen = text.lstrip()
        if seen != THINK[0] and THINK[0].startswith(seen):
            self._start = text
            return None
        self._start = None
        if not seen.startswith(THINK[0]):
            return text
        self._markers = self._markers._replace(reasoning=THINK)
        self._edges, self._plain, self._state = _edges(self._markers, bool(self._tools)), False, REASONING
        return seen.removeprefix(THINK[0])

    @property
    def _tells_its_end(self) -> bool:
        """Whether a call that can be read is complete, as one in JSON is."""
        form = self._markers.call
        return form is not None and form.constrained and (not self._function or bool(self._call.strip()))

    def _next(self) -> tuple[int, str] | None:
        """The next marker in what is held: (where, which); the longest of those that begin there."""
        found = [(at, -len(m), m) for m in self._edges[self._state] if (at := self._held.find(m)) >= 0]
        return min(found)[::2] if found else None

    def _piece(self, piece: str) -> Said:
        if self._state == REASONING:
            return Said(reasoning=piece)
        if self._state == CONTENT:
            return Said(text=self._content(piece))
        self._call += piece
        return Said()

    def _pass(self, marker: str) -> Said:
        """Cross a marker into the next state."""
        if self._markers.channels:
            return self._cross(marker)
        opens = self._markers.reasoning is not None and marker == self._markers.reasoning[0]
        form, was = self._markers.call, self._state
        if was == REASONING:
            self._state = CONTENT
        elif self._markers.reasoning is not None and marker == self._markers.reasoning[1]:
            return Said(self._content(marker)) if self._begun else Said()  # alone, it ends what was not begun
        elif was == CALL:
            return self._stop(marker)
        elif opens:
            self._state = REASONING
        elif form is not None and marker == form.marker and self._tools:
            self._state, self._lead = CALL, marker
        return Said()

    def _stop(self, marker: str) -> Said:
        """The end of a call, unless it stands inside one of its own texts."""
        if _open_text(self._call):
            self._call += marker
            return Said()
        said = self._called("", marker)
        self._state = CONTENT
        return said

    def _cross(self, marker: str) -> Said:
        """A marker of the channel protocol."""
        said = Said()
        if marker == harmony.MESSAGE and self._state == HEADER:
            head = harmony.header(self._call)
            self._call, self._function = "", head.function
            called = head.function in self._names or head.function.removeprefix("functions.") in self._names
            self._state = CALL if called else REASONING if head.channel == "analysis" else CONTENT
            return said
        if self._state == CALL:
            said = self._called(self._function)
        if marker in harmony.BEGINS:
            self._call = marker if self._state != HEADER else self._call + marker
            self._state = HEADER
        elif self._state != HEADER:
            self._state = CONTENT
        return said

    def _content(self, piece: str) -> str:
        """Content without the blank lines before it or between calls."""
        if self._begun:
            return piece
        self._blank += piece
        if not self._blank.strip() or (self._may_be_bare and self._like_call(self._blank)):
            return ""
        self._begun = True
        shown, self._blank = self._blank.lstrip(), ""
        return shown

    def _like_call(self, text: str) -> bool:
        """Whether a text may be the beginning of a call."""
        assert self._markers.call is not None
        shape = "".join(text.split())
        form = self._markers.call
        opening, sep = "".join((form.begin + form.open).split()), "".join(form.sep.split())
        starts = [opening + name + sep for name in self._names] if form.bare else []
        if form.in_json:
            rest = ['{"type":"function",', '{"function":', '{"parameters":', '{"arguments":']
            starts += [f'{lead}{{"name":"{name}"' for lead in ("", "[") for name in self._names] + rest
        return any(one.startswith(shape) or shape.startswith(one) for one in starts)

    def _called(self, function: str, marker: str = "") -> Said:
        """The calls in what was collected, or its text."""
        assert self._markers.call is not None
        if function:
            found: list[Found] = [(function, self._call.strip() or "{}")]
        else:
            found = read(self._markers.call, self._call, self._tools)
        calls = [call for one in found if (call := self._checked(one)) is not None]
        if not found or len(calls) < len(found):
            return self._unread(marker)
        self._lead = self._call = self._function = ""
        self.called = True
        return Said(calls=tuple(calls))

    def _checked(self, found: Found) -> ToolCall | None:
        """A call of a function that was described, with an object of arguments."""
        name = found[0] if found[0] in self._names else found[0].removeprefix("functions.").strip()
        arguments = found[1]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                return None
        if name not in self._names or not isinstance(arguments, dict):
            return None
        text = found[1] if isinstance(found[1], str) and found[1] else json.dumps(arguments, ensure_ascii=False)
        return ToolCall(id=self._new_id(), name=name, arguments=text)

    def _unread(self, marker: str = "") -> Said:
        self._begun = True
        text = self._lead + self._call + marker
        self._lead = self._call = self._function = ""
        return Said(text)


def _edges(markers: Markers, tools: bool) -> dict[str, tuple[str, ...]]:
    """The markers that matter in each state."""
    if markers.channels:
        every = (*harmony.BEGINS, *harmony.ENDS)
        return {CONTENT: every, REASONING: every, CALL: every, HEADER: (harmony.MESSAGE, *every)}
    call = markers.call if tools else None
    begins = [*(markers.reasoning or ()), call.marker if call else "", *markers.silent]
    return {
        CONTENT: tuple(filter(None, begins)),
        REASONING: (markers.reasoning[1],) if markers.reasoning else (),
        CALL: (call.stop,) if call and call.stop else (),
    }


def _open_text(json_text: str) -> bool:
    """Whether JSON ends inside a string."""
    return json_text.lstrip()[:1] in ("{", "[") and len(re.findall(r'(?<!\\)(?:\\\\)*"', json_text)) % 2 == 1
