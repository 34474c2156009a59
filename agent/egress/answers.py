"""What an answer of a provider is made of, whatever its API: counts that can be believed, calls that are whole, why it
ended. Pure."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from agent.egress.sse import Garbage
from agent.policy.outgoing import Called, End

Finish = Literal["stop", "length", "tool_calls", "content_filter"]
MOST_CALLS = 128
MOST_ARGUMENT_BYTES = 1 << 20
"""Of all calls of one answer together."""
_MOST_TOK = 1 << 31
T = TypeVar("T")


class Failure(Exception):
    """The provider says, in the middle of its answer, that it failed; ``kind`` is its own name of the error."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def decoded(data: bytes, kind: type[T]) -> T:
    """An event's data. Raises Garbage."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise Garbage("JSON that its API does not have") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Garbage("something that is not JSON") from None


def count(value: Any) -> int | None:
    """A number of tokens; None for what cannot be one. A count in words, or below zero, says nothing: the most that
    the answer may have cost stays reserved for it."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOK
    return value if good else None


def part(value: Any, whole: int | None) -> int:
    """How many of ``whole`` tokens; 0 for what cannot be a part of them."""
    found = count(value) or 0
    return found if whole is not None and found <= whole else 0


def mapping(value: Any) -> Mapping[str, Any]:
    """An object; an empty one for everything else."""
    return value if isinstance(value, dict) else {}


class Calls:
    """The calls of an answer while they are received. One that is cut is dropped, or fails the request; what is missing
    of it is never guessed. ``new_id`` makes the id of a call that came without one."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._parts: dict[int, tuple[str, str, list[str]]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def last(self) -> int:
        """The place of the latest call; -1 without one."""
        return next(reversed(self._parts), -1)

    def has(self, place: int, call_id: str) -> bool:
        """Whether the call at a place is the one of this id, as far as either is known."""
        known = self._parts.get(place, ("", "", []))[0]
        return not known or not call_id or known == call_id

    def add(self, place: int, *, call_id: str = "", name: str = "", arguments: str = "") -> None:
        """The next piece of the call at a place. Raises Garbage."""
        old_id, old_name, pieces = self._parts.get(place, ("", "", []))
        self._bytes += len(arguments) + len(name) + len(call_id)
        if (len(self._parts) >= MOST_CALLS and place not in self._parts) or self._bytes > MOST_ARGUMENT_BYTES:
            raise Garbage("calls beyond every measure")
        pieces.append(arguments)
        self._parts[place] = (old_id or call_id, old_name or name, pieces)

    def whole(self, *, cut: bool) -> tuple[Called, ...]:
        """The calls that are complete; of an answer that was ``cut`` the others are dropped. Raises Garbage for a call
        that is not complete at the end of an answer that was not."""
        found = []
        for call_id, name, pieces in self._parts.values():
            text = "".join(pieces).strip()
            arguments = text or ("" if cut else "{}")  # a function without parameters may be called without any
            if name and _is_object(arguments):
                found.append(Called(id=call_id or self._new_id(), name=name, arguments=arguments))
            elif not cut:
                raise Garbage("a call that is not complete, or whose arguments are not a JSON object")
        return tuple(found)


def end(finish: Finish, calls: int, usage: Mapping[str, int | None]) -> End:
    """The end of an answer. One that stopped after calls ended for their sake."""
    if finish == "stop" and calls:
        finish = "tool_calls"
    elif finish == "tool_calls" and not calls:
        finish = "stop"
    prompt, completion = usage.get("prompt"), usage.get("completion")
    return End(
        finish=finish,
        prompt_tok=prompt,
        completion_tok=completion,
        cached_tok=part(usage.get("cached"), prompt),
        reasoning_tok=part(usage.get("reasoning"), completion),
    )


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text.encode()), dict)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return False
