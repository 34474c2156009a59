"""A conversation as the chat template of one model accepts it. Pure.

OpenAI's API accepts any order of roles; templates do not. A Manner says what to change before rendering, and is found
by a probe when the model is loaded (``agent.loader.chat.probe``).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from msgspec.structs import replace

from agent.loader.chat.calls import CallFormat, written
from agent.wire.frames import Message, ToolCall

Turn = dict[str, Any]
RAW = "raw_arguments"
"""The key under which arguments that are no JSON object are given to a template."""


class Manner(NamedTuple):
    """What a template needs. ``system``: a system message stays, or is folded into the next user message. ``systems``:
    several at the beginning stay, or are joined. ``later``: a system message after others stays, becomes a user
    message, or moves to the beginning. ``neighbours`` of one role stay, or are joined. ``start``: text of a user
    message put before a conversation that the assistant begins, None for none. ``empty`` assistant messages
    stay, or are dropped. ``ids`` of calls stay, are shortened to nine letters and digits, or name function and number.
    ``arguments`` are an object or text. ``parallel`` calls stay in one turn, or each is followed by its result.
    ``beside``: text beside calls stays, becomes a turn of its own, or is left out. ``calls`` and results are given as
    such, or written as text. ``reasoning`` is the key of an earlier turn's reasoning, "" to leave it out.
    ``described``: every tool gets a description."""

    system: Literal["native", "folded"] = "native"
    systems: Literal["native", "joined"] = "native"
    later: Literal["native", "user", "moved"] = "native"
    neighbours: Literal["native", "joined"] = "native"
    start: str | None = None
    empty: Literal["native", "dropped"] = "native"
    ids: Literal["native", "short", "numbered"] = "native"
    arguments: Literal["object", "text"] = "object"
    parallel: Literal["native", "split"] = "native"
    beside: Literal["native", "apart", "lost"] = "native"
    calls: Literal["native", "text"] = "native"
    reasoning: str = "reasoning_content"
    described: bool = False


PLAIN = Manner(
    system="folded", later="user", neighbours="joined", start=".", empty="dropped", calls="text", reasoning=""
)
"""What any template accepts: texts, from the user first, in turns."""


def turns(messages: Sequence[Message], manner: Manner, form: CallFormat, told: str = "") -> list[Turn]:
    """A conversation as dictionaries for a template. ``told`` is added to the system message."""
    changed = list(messages)
    for change in (_calls_as_text(form) if manner.calls == "text" else _apart, _systems, _order, _parallel):
        changed = list(change(changed, manner))
        if change is _systems and told:
            changed = _told(changed, told)
    names = Ids(manner.ids)
    return [_turn(message, manner, names) for message in _folded(changed, manner)]


def plain_text(found: Sequence[Turn]) -> str:
    """A conversation for a model without a chat template."""
    return "".join(f"{turn['role']}: {turn['content']}\n" for turn in found) + "assistant:"


def instructions(tools: Sequence[str], form: CallFormat) -> str:
    """Tool descriptions as text for a system message."""
    shape = written(form, [("FUNCTION", "{...}")])
    described = "\n".join(tools)
    return (
        f"These functions can be called:\n<tools>\n{described}\n</tools>\n"
        f"To call one, answer with\n{shape}\nand nothing else; its result comes with the next message."
    )


def tool_objects(tools: Sequence[str], manner: Manner) -> list[Turn]:
    """Tool descriptions as a template takes them."""
    found = [json.loads(tool) for tool in tools]
    if manner.described:
        found = [{**one, "description": one.get("description") or ""} for one in found]
    return [{"type": "function", "function": one} for one in found]


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments as an object, whatever an earlier turn holds: nothing is {}, a broken text is kept whole."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {RAW: text}


Change = Callable[[list[Message], Manner], Iterable[Message]]


def _calls_as_text(form: CallFormat) -> Change:
    def change(messages: list[Message], manner: Manner) -> Iterable[Message]:
        for one in messages:
            if one.role == "tool":
                yield Message(role="user", content=f"<tool_response>\n{one.content}\n</tool_response>")
            elif one.calls:
                calls = written(form, [(call.name, arguments_of(call.arguments)) for call in one.calls])
                yield replace(one, content=f"{one.content}\n{calls}" if one.content else calls, calls=())
            else:
                yield one

    return change


def _apart(messages: list[Message], manner: Manner) -> Iterable[Message]:
    """Text beside calls where a template would not render it."""
    for one in messages:
        if one.calls and one.content and manner.beside == "apart":
            yield replace(one, calls=())
            yield replace(one, content="", reasoning="")
        elif one.calls and manner.beside == "lost":
            yield replace(one, reasoning="")
        else:
            yield one


def _systems(messages: list[Message], manner: Manner) -> Iterable[Message]:
    count = next((n for n, one in enumerate(messages) if one.role != "system"), len(messages))
    leading, rest = messages[:count], messages[count:]
    if manner.later == "moved":
        leading, rest = leading + [m for m in rest if m.role == "system"], [m for m in rest if m.role != "system"]
    if len(leading) > 1 and (manner.systems == "joined" or manner.system == "folded"):
        leading = [_joined(leading)]
    yield from leading
    for one in rest:
        yield replace(one, role="user") if one.role == "system" and manner.later == "user" else one


def _told(messages: list[Message], told: str) -> list[Message]:
    if messages and messages[0].role == "system":
        return [_joined([messages[0], Message(role="system", content=told)]), *messages[1:]]
    return [Message(role="system", content=told), *messages]


def _folded(messages: list[Message], manner: Manner) -> list[Message]:
    """The system message at the beginning of the first user message, where the template refuses it."""
    if manner.system != "folded" or not messages or messages[0].role != "system":
        return messages
    system = replace(messages[0], role="user")
    if len(messages) > 1 and messages[1].role == "user":
        return [_joined([system, messages[1]]), *messages[2:]]
    return [system, *messages[1:]]


def _order(messages: list[Message], manner: Manner) -> Iterable[Message]:
    """Turns in an order that the template accepts."""
    groups: list[list[Message]] = []
    for one in messages:
        if manner.empty == "dropped" and one.role == "assistant" and not one.content.strip() and not one.calls:
            continue
        last = groups[-1][-1] if groups else None
        alike = last is not None and one.role in ("user", "assistant") and last.role == one.role and not last.calls
        if alike and manner.neighbours == "joined":
            groups[-1].append(one)
        else:
            groups.append([one])
    kept = [group[0] if len(group) == 1 else _joined(group) for group in groups]
    first = next((n for n, one in enumerate(kept) if one.role != "system"), len(kept))
    alone = manner.system == "folded" and first > 0
    if manner.start is not None and first < len(kept) and kept[first].role != "user" and not alone:
        kept.insert(first, Message(role="user", content=manner.start))
    return kept


def _parallel(messages: list[Message], manner: Manner) -> Iterable[Message]:
    """Each of several calls in a turn of its own, followed by its result."""
    results: dict[str, list[Message]] = {}
    for at, one in enumerate(messages):
        if manner.parallel == "native" or len(one.calls) < 2:
            if one.role == "tool" and (held := results.get(one.call_id)) and held[0] is one:
                held.pop(0)  # it stands behind its call already
                continue
            yield one
            continue
        answers = _results(messages[at + 1 :])
        for number, call in enumerate(one.calls):
            yield replace(one, calls=(call,)) if number == 0 else Message(role="assistant", content="", calls=(call,))
            if held := answers.get(call.id):
                results.setdefault(call.id, []).append(held[0])
                yield held.pop(0)


def _results(messages: Sequence[Message]) -> dict[str, list[Message]]:
    """The tool results that follow directly, by call id, which a history may use twice."""
    found: dict[str, list[Message]] = {}
    for one in messages:
        if one.role != "tool":
            break
        found.setdefault(one.call_id, []).append(one)
    return found


def _joined(messages: Sequence[Message]) -> Message:
    first = messages[0]
    return replace(
        first,
        content="\n\n".join(one.content for one in messages if one.content),
        reasoning="\n\n".join(one.reasoning for one in messages if one.reasoning),
        calls=sum((one.calls for one in messages), ()),
    )


class Ids:
    """Call ids as a template accepts them: the same id is always changed to the same one."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._made: dict[str, str] = {}
        self.functions: dict[str, str] = {}
        """The function that each call named."""

    def of(self, call: ToolCall) -> str:
        """The id of a call."""
        self.functions[call.id] = call.name
        if self._kind == "numbered":
            return self._made.setdefault(call.id, f"functions.{call.name}:{len(self._made)}")
        return self.named(call.id)

    def named(self, call_id: str) -> str:
        """The id of a call that a result names."""
        if self._kind == "native" or (self._kind == "short" and len(call_id) == _SHORT and call_id.isalnum()):
            return call_id
        return self._made.get(call_id) or hashlib.sha256(call_id.encode()).hexdigest()[:_SHORT]


_SHORT = 9
"""Length of the ids that Mistral's templates accept."""


def _turn(message: Message, manner: Manner, ids: Ids) -> Turn:
    turn: Turn = {"role": message.role, "content": message.content}
    if message.reasoning and manner.reasoning:
        turn[manner.reasoning] = message.reasoning
    if message.calls:
        turn["tool_calls"] = [
            {"id": ids.of(c), "type": "function", "function": {"name": c.name, "arguments": _arguments(c, manner)}}
            for c in message.calls
        ]
    if message.role == "tool":
        turn["tool_call_id"] = ids.named(message.call_id)
        if message.call_id in ids.functions:
            turn["name"] = ids.functions[message.call_id]
    return turn


def _arguments(call: ToolCall, manner: Manner) -> Any:
    found = arguments_of(call.arguments)
    return found if manner.arguments == "object" else json.dumps(found, ensure_ascii=False)
