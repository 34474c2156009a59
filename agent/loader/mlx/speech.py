"""Splits a model's output into reasoning, content and tool calls, by the markers of its family."""

import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mlx_lm.generate import TextStateMachine

from agent.wire.frames import ToolCall

CONTENT, REASONING, CALL = "normal", "reasoning", "tool"

CallParser = Callable[[str, Any], Any]
"""(text between the markers, tools) -> one call or several, as {"name", "arguments"}; mlx-lm's format."""


class Markers(NamedTuple):
    """How a model marks reasoning and calls; None where it has neither."""

    reasoning: tuple[str, str] | None = None
    call: tuple[str, str] | None = None
    parse: CallParser | None = None


class Said(NamedTuple):
    """A piece of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


class Speech:
    """Parses decoded text incrementally. A call is emitted when complete; one that cannot be parsed becomes text."""

    def __init__(self, markers: Markers, tools: Sequence[str] = (), *, reasoning: bool = False) -> None:
        self._markers = markers
        self._tools = [{"type": "function", "function": json.loads(tool)} for tool in tools]
        self._plain = markers.reasoning is None and markers.call is None
        edges: dict[str, list[tuple[str, str]]] = {CONTENT: []}
        if markers.reasoning:
            edges[CONTENT].append((markers.reasoning[0], REASONING))
            edges[REASONING] = [(markers.reasoning[1], CONTENT)]
        if markers.call:
            edges[CONTENT].append((markers.call[0], CALL))
            edges[CALL] = [(markers.call[1], CONTENT)] if markers.call[1] else []
        self._state = TextStateMachine(edges).make_state(REASONING if reasoning else CONTENT)
        self._call = self._blank = ""
        self._begun = self.called = False

    @property
    def reasoning(self) -> bool:
        """Whether the model is reasoning now."""
        return bool(self._state[0] == REASONING)

    def feed(self, text: str) -> Said:
        """The parts that ``text`` adds."""
        if self._plain:
            return Said(text)
        was = self._state[0]
        self._state, segments = TextStateMachine.split(self._state, text)
        return self._of(segments, was)

    def finish(self) -> Said:
        """The parts held back, once the text has ended."""
        if self._plain:
            return Said()
        state = self._state[0]
        self._state, held, _ = TextStateMachine.flush(self._state)
        said = self._of([(state, held)], state)
        if state != CALL:
            return said
        calls = self._parsed()
        return said._replace(calls=said.calls + calls) if calls else said._replace(text=said.text + self._unread())

    def _of(self, segments: Sequence[tuple[str, str]], before: str) -> Said:
        text, reasoning = "", ""
        calls: tuple[ToolCall, ...] = ()
        for state, piece in segments:
            if before == CALL and state != CALL:
                found = self._parsed()
                calls += found
                text += "" if found else self._unread() + (self._markers.call or ("", ""))[1]
                self._call = ""
            if state == CALL:
                self._call += piece
            elif state == REASONING:
                reasoning += piece
            else:
                text += self._content(piece)
            before = state
        return Said(text, reasoning, calls)

    def _content(self, piece: str) -> str:
        """Content without the blank lines before it or between calls."""
        if self._begun:
            return piece
        self._blank += piece
        if not self._blank.strip():
            return ""
        self._begun = True
        shown, self._blank = self._blank.lstrip(), ""
        return shown

    def _parsed(self) -> tuple[ToolCall, ...]:
        assert self._markers.parse is not None
        try:
            found = self._markers.parse(self._call, self._tools)
            calls = tuple(_call(one) for one in (found if isinstance(found, list) else [found]))
        except Exception:  # noqa: BLE001  # a parser may raise anything for a model's output
            return ()
        self.called = self.called or bool(calls)
        return calls

    def _unread(self) -> str:
        self._begun = True
        return (self._markers.call or ("", ""))[0] + self._call


def parse_json_call(text: str, tools: Any) -> Any:
    """A call written as {"name": ..., "arguments": {...}}."""
    return json.loads(text)


def _call(found: Any) -> ToolCall:
    arguments = found["arguments"]
    return ToolCall(
        id=f"call_{secrets.token_hex(12)}",
        name=str(found["name"]),
        arguments=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    )
