"""Anthropic's Messages API, natively. Pure.

What is lost: ``seed`` and the penalties, which it does not have; temperatures above 1, which count as 1; temperature
and ``top_p`` of models from Claude 4.7 on, which refuse them; effort of models before Claude 4.6. All system messages
are one, before the conversation. A schema is enforced by the API where it has only keywords that the API knows;
elsewhere the answer is the input of a tool that the model has to call, which follows the schema as well as the model
does.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from agent.egress.answers import Calls, Failure, Finish, count, decoded, end, mapping
from agent.egress.schemas import closed, is_plain
from agent.egress.sse import Event, Garbage
from agent.policy.outgoing import Called, End, Outgoing, Piece, Turn
from shared.errors import Refused

PATH = "/messages"
VERSION = "2023-06-01"
ANSWER = "mlxrack_answer"
"""The tool whose input is the answer, where a schema can be had in no other way."""
_MODEL = re.compile(r"claude-(?:[a-z]+-)?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_EFFORTS = {"minimal": "low", "none": "low"}
_FINISH: dict[str, Finish] = {
    **dict.fromkeys(("end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("max_tokens", "model_context_window_exceeded"), "length"),
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def body(outgoing: Outgoing, max_tokens: int) -> dict[str, Any]:
    """The request, as JSON values. Raises Refused for what the API cannot express."""
    version = _version(outgoing.model)
    system = "\n\n".join(turn.content for turn in outgoing.turns if turn.role == "system" and turn.content)
    request: dict[str, Any] = {
        "model": outgoing.model,
        "max_tokens": max_tokens,
        "messages": _messages(outgoing.turns),
        "stream": True,
        **_thinking(outgoing, version),
    }
    if system:
        request["system"] = system
    if outgoing.stop:
        if not all(one.strip() for one in outgoing.stop):
            raise _cannot("stop: takes no text of white space alone", "stop")
        request["stop_sequences"] = list(outgoing.stop)
    _add_tools(request, outgoing)
    return request


def by_tool(outgoing: Outgoing) -> bool:
    """Whether the answer is the input of a tool."""
    if outgoing.schema is None or outgoing.must_call is not None:
        return False
    return _version(outgoing.model) < (4, 5) or not is_plain(msgspec.json.decode(outgoing.schema))


def _version(model: str) -> tuple[int, int]:
    """Of a model, by its name; a name without one is taken for the newest."""
    found = _MODEL.search(model.lower())
    return (int(found[1]), int(found[2] or 0)) if found else (99, 0)


def _thinking(outgoing: Outgoing, version: tuple[int, int]) -> dict[str, Any]:
    """Effort and sampling. Beside an effort no temperature is taken, and with a call that must be made no thinking."""
    if (effort := outgoing.reasoning_effort) is not None and version >= (4, 6):
        found: dict[str, Any] = {"output_config": {"effort": _EFFORTS.get(effort, effort)}}
        if effort not in _EFFORTS and outgoing.must_call is None and not by_tool(outgoing):
            found["thinking"] = {"type": "adaptive"}
        return found
    if version >= (4, 7):
        return {}
    if outgoing.temperature != 1.0:
        return {"temperature": min(outgoing.temperature, 1.0)}  # newer models do not take both
    return {"top_p": outgoing.top_p} if outgoing.top_p != 1.0 else {}


def _add_tools(request: dict[str, Any], outgoing: Outgoing) -> None:
    tools = [_tool(msgspec.json.decode(one)) for one in outgoing.tools]
    choice: dict[str, Any] | None = None
    if outgoing.must_call is not None:
        choice = {"type": "tool", "name": outgoing.must_call} if outgoing.must_call else {"type": "any"}
    if by_tool(outgoing):
        schema = mapping(msgspec.json.decode(outgoing.schema or "{}"))
        if schema.get("type") != "object":
            raise _cannot("response_format: needs a schema of type object", "response_format")
        choice = {"type": "any"} if tools else {"type": "tool", "name": ANSWER, "disable_parallel_tool_use": True}
        tools.append({"name": ANSWER, "description": "Give the final answer.", "input_schema": schema})
    elif outgoing.schema is not None and outgoing.must_call is None:
        wanted = {"type": "json_schema", "schema": closed(msgspec.json.decode(outgoing.schema))}
        request["output_config"] = {**request.get("output_config", {}), "format": wanted}
    if tools:
        request["tools"] = tools
        if outgoing.one_call:
            choice = {**(choice or {"type": "auto"}), "disable_parallel_tool_use": True}
        if choice is not None:
            request["tool_choice"] = choice


def _tool(described: dict[str, Any]) -> dict[str, Any]:
    schema = described.get("parameters") or {"type": "object", "properties": {}}
    about = {"description": described["description"]} if described.get("description") else {}
    return {"name": described["name"], **about, "input_schema": {"type": "object", **schema}}


def _messages(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    """Turns of one role after another are one message, so that the results of parallel calls stand together."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        if turn.role == "system" or not (blocks := list(_blocks(turn))):
            continue
        role = "assistant" if turn.role == "assistant" else "user"
        if found and found[-1]["role"] == role:
            found[-1]["content"] += blocks
        else:
            found.append({"role": role, "content": blocks})
    if not found or found[0]["role"] != "user":
        raise _cannot("messages: must begin with a user's message that is not empty", "messages")
    return found


def _blocks(turn: Turn) -> Iterator[dict[str, Any]]:
    if turn.role == "tool":
        yield {"type": "tool_result", "tool_use_id": _id(turn.call_id), "content": turn.content}
    elif turn.content.strip():  # the API takes no empty text
        yield {"type": "text", "text": turn.content}
    for call in turn.calls:
        yield {"type": "tool_use", "id": _id(call.id), "name": call.name, "input": _input(call)}


def _id(call_id: str) -> str:
    """An id as the API takes it: other clients' ids hold dots and colons."""
    return call_id if _ID.fullmatch(call_id) else "call_" + hashlib.sha256(call_id.encode()).hexdigest()[:24]


def _input(call: Called) -> Any:
    try:
        found = msgspec.json.decode((call.arguments.strip() or "{}").encode())
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _cannot("messages: the arguments of every call must be a JSON object", "messages")
    return found


def _cannot(what: str, param: str) -> Refused:
    return Refused(f"{what} (Anthropic's API)", code="provider_refused", param=param)


class _Block(msgspec.Struct):
    type: str
    id: str = ""
    name: str = ""
    text: str | None = None
    thinking: str | None = None
    input: Any = None


class _Delta(msgspec.Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _Message(msgspec.Struct):
    usage: Any = None


class _Event(msgspec.Struct):
    type: str
    index: int = 0
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: Any = None
    error: Any = None


class Reader:
    """Reads one answer. ``answer_by_tool``: the input of the tool ``ANSWER`` is its text. ``done`` once the provider
    has said that nothing follows."""

    def __init__(self, new_id: Callable[[], str], *, answer_by_tool: bool = False) -> None:
        self.done = False
        self._calls = Calls(new_id)
        self._by_tool = answer_by_tool
        self._answer: int | None = None
        self._finish: Finish | None = None
        self._usage: dict[str, Any] = {}

    def take(self, event: Event) -> list[Piece]:
        """What one event adds to the answer. Raises Garbage, and Failure for an error that the provider reports."""
        found = decoded(event.data, _Event)
        match found.type:
            case "error":
                raise Failure(str(mapping(found.error).get("type", "")))
            case "message_start" if found.message is not None:
                self._usage |= mapping(found.message.usage)
            case "content_block_start" if found.content_block is not None:
                return self._began(found.index, found.content_block)
            case "content_block_delta" if found.delta is not None:
                return self._goes_on(found.index, found.delta)
            case "message_delta":
                self._usage |= mapping(found.usage)
                if found.delta is not None and found.delta.stop_reason is not None:
                    self._finish = _finished(found.delta.stop_reason)
            case "message_stop":
                self.done = True
        return []  # pings, and events that are added to the API later

    def close(self) -> list[Piece | End]:
        """The rest of the answer: its calls, and its end. Raises Garbage for one that breaks off."""
        if self._finish is None:
            raise Garbage("an answer that breaks off before its end")
        cut = self._finish == "length"
        calls = () if self._finish == "content_filter" else self._calls.whole(cut=cut)
        finish: Finish = "stop" if self._finish == "tool_calls" and not calls else self._finish
        return [*([Piece(calls=calls)] if calls else []), end(finish, len(calls), _usage(self._usage))]

    def _began(self, place: int, block: _Block) -> list[Piece]:
        self._open()
        if block.type != "tool_use":
            return _piece(block.text or "", block.thinking or "")
        if self._by_tool and block.name == ANSWER:
            if self._answer is not None:
                raise Garbage("more than one answer")
            self._answer = place
        else:
            whole = msgspec.json.encode(block.input).decode() if block.input else ""
            self._calls.add(place, call_id=block.id, name=block.name, arguments=whole)
        return []

    def _goes_on(self, place: int, delta: _Delta) -> list[Piece]:
        self._open()
        if delta.type != "input_json_delta":
            return _piece(delta.text, delta.thinking)
        if place == self._answer:
            return _piece(delta.partial_json, "")
        self._calls.add(place, arguments=delta.partial_json)
        return []

    def _open(self) -> None:
        if self._finish is not None:
            raise Garbage("more of an answer after its end")


def _piece(text: str, reasoning: str) -> list[Piece]:
    return [Piece(text=text, reasoning=reasoning)] if text or reasoning else []


def _finished(reason: str) -> Finish:
    if reason not in _FINISH:
        raise Garbage("an answer that ends for a reason that its API does not have, or that needs tools of its own")
    return _FINISH[reason]


def _usage(usage: dict[str, Any]) -> dict[str, int | None]:
    """Its prompt is counted in three parts; with one of them not a number, all of it is unknown."""
    parts = [count(usage.get(f"{name}input_tokens") or 0) for name in ("cache_read_", "cache_creation_")]
    fresh = count(usage.get("input_tokens"))
    known = [one for one in (fresh, *parts) if one is not None]
    return {
        "prompt": sum(known) if len(known) == 3 else None,
        "completion": count(usage.get("output_tokens")),
        "cached": parts[0],
        "reasoning": count(mapping(usage.get("output_tokens_details")).get("thinking_tokens")),
    }
