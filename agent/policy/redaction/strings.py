"""Every string of a request that may leave, in one order: the same walk reads them, and puts in what replaces them.
Pure."""

import json
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple, NoReturn

from msgspec.structs import replace

from agent.policy.outgoing import Called, Outgoing, Turn
from shared.errors import Refused

_TEXTS = {"model", "turns", "tools", "must_call", "schema", "stop", "reasoning_effort"}
_NUMBERS = {"one_call", "max_tokens", "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty"}
_FIELDS: dict[type, set[str]] = {
    Outgoing: _TEXTS | _NUMBERS,
    Turn: {"role", "content", "calls", "call_id"},
    Called: {"id", "name", "arguments"},
}
for _type, _known in _FIELDS.items():
    if set(_type.__struct_fields__) != _known:  # type: ignore[attr-defined]
        raise TypeError(f"{_type.__name__} has a field that redaction does not read")
_MOST_DEPTH = 200

Each = Callable[[str, str], str]
"""Gets a string and where it stands; returns what takes its place."""


class Texts(NamedTuple):
    """The strings of a request; ``joins`` are indices of those that follow each other and may divide a value; ``prose``
    are those that people or models read, not programs."""

    texts: tuple[str, ...]
    joins: tuple[tuple[int, ...], ...]
    prose: frozenset[int]


class _Number(str):
    """A number of a JSON text as it is written, so that no digit is lost."""


class _Pairs(list[tuple[str, Any]]):
    """An object of a JSON text, a name that occurs twice included."""


def texts_of(outgoing: Outgoing) -> Texts:
    """Every string of a request. Raises Refused with code ``not_redactable`` where one cannot be read."""
    texts, places = list[str](), list[str]()

    def read(text: str, place: str) -> str:
        texts.append(text)
        places.append(place)
        return text

    walked(outgoing, read)
    groups: dict[str, list[int]] = {}
    for n, place in enumerate(places):
        for name in _joins(place):
            groups.setdefault(name, []).append(n)
    prose = frozenset(n for n, place in enumerate(places) if place.startswith("content"))
    return Texts(tuple(texts), tuple(dict.fromkeys(tuple(one) for one in groups.values() if len(one) > 1)), prose)


def _joins(place: str) -> Iterator[str]:
    """The sequences that a string belongs to: all that is said, what one role says, one document, all arguments."""
    kind, _, whose = place.partition(" ")
    if kind == "content":
        yield from ("said", f"role {whose}")
    elif kind == "value":
        yield from ("said", f"document {whose}", "arguments") if whose.startswith("call") else (f"document {whose}",)
    elif kind == "stop":
        yield "stop"


def walked(outgoing: Outgoing, each: Each) -> Outgoing:
    """The request with every string replaced by what ``each`` makes of it. Raises Refused, as above, also where a
    string that cannot be another is to be replaced: the model, a role."""

    def text(value: object, place: str) -> str:
        if not isinstance(value, str):
            raise _unreadable("something that is not text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _unreadable("a text that is not valid Unicode") from None
        new = each(value, place)
        if new != value and place.startswith("fixed"):
            raise Refused(f"{place.split()[1]}: cannot be redacted", code="not_redactable")
        return new

    def call(one: Called, number: int) -> Called:
        arguments = one.arguments and _in_json(one.arguments, text, f"call {number}")
        return Called(id=text(one.id, "name"), name=text(one.name, "name"), arguments=arguments)

    def turn(one: Turn, number: int) -> Turn:
        return Turn(
            role=text(one.role, "fixed role"),
            content=text(one.content, f"content {one.role}"),
            calls=tuple(call(called, 1000 * number + n) for n, called in enumerate(one.calls)),
            call_id=text(one.call_id, "name"),
        )

    schema, effort, must_call = outgoing.schema, outgoing.reasoning_effort, outgoing.must_call
    return replace(
        outgoing,
        model=text(outgoing.model, "fixed model"),
        turns=tuple(turn(one, n) for n, one in enumerate(outgoing.turns)),
        tools=tuple(_in_json(one, text, f"tool {n}") for n, one in enumerate(outgoing.tools)),
        must_call=None if must_call is None else text(must_call, "name"),
        schema=None if schema is None else _in_json(schema, text, "schema"),
        stop=tuple(text(one, "stop") for one in outgoing.stop),
        reasoning_effort=None if effort is None else text(effort, "fixed reasoning_effort"),
    )


def _unreadable(what: str) -> Refused:
    return Refused(
        f"redaction: cannot read {what}; the request stays on the premises", code="not_redactable", param="messages"
    )


def _in_json(document: object, each: Callable[[object, str], str], name: str) -> str:
    """A JSON text with its strings, names and numbers replaced; the same text where none is."""
    if not isinstance(document, str):
        raise _unreadable("something that is not text")
    try:
        tree = json.loads(
            document, parse_int=_Number, parse_float=_Number, parse_constant=_no_json, object_pairs_hook=_Pairs
        )
        changed = list[bool]()
        written = _written(tree, lambda text, place: _noted(each(text, place), text, changed), name, 0)
    except (ValueError, RecursionError):
        raise _unreadable("arguments, a tool or a schema that are not valid JSON") from None
    return written if any(changed) else document


def _noted(new: str, old: str, changed: list[bool]) -> str:
    changed.append(new != old)
    return new


def _no_json(constant: str) -> NoReturn:
    raise ValueError(constant)


def _written(node: Any, each: Each, name: str, depth: int) -> str:
    """A value as JSON text."""
    if depth > _MOST_DEPTH:
        raise RecursionError
    if isinstance(node, _Number):
        plain = _plain(node)
        new = each(plain, f"value {name}")
        return str(node) if new == plain else json.dumps(new)
    if isinstance(node, str):
        return json.dumps(each(node, f"value {name}"), ensure_ascii=False)
    if isinstance(node, _Pairs):
        keys = [each(key, "name") for key, _ in node]
        if len(set(keys)) < len({key for key, _ in node}):
            raise _unreadable("two names of an object that would be the same")
        values = (_written(value, each, name, depth + 1) for _, value in node)
        return (
            "{"
            + ",".join(
                f"{json.dumps(key, ensure_ascii=False)}:{value}" for key, value in zip(keys, values, strict=True)
            )
            + "}"
        )
    if isinstance(node, list):
        return "[" + ",".join(_written(one, each, name, depth + 1) for one in node) + "]"
    return json.dumps(node)


def _plain(number: str) -> str:
    """A number without an exponent, which could hide its digits."""
    if "e" not in number.lower():
        return str(number)
    try:
        value = Decimal(number)
    except InvalidOperation:
        return str(number)
    return f"{value:f}" if -40 < value.adjusted() < 40 else str(number)
