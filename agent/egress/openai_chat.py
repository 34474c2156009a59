"""OpenAI's chat completions API, as OpenAI, OpenRouter and compatible servers speak it. Pure.

What is lost: a schema is enforced only where it is one of OpenAI's strict ones, elsewhere the model is asked to follow
it. OpenAI's reasoning models take no temperature, ``top_p`` and penalties, so these are not sent to them. A refusal
arrives as text.
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from agent.egress.answers import Calls, Failure, Finish, count, decoded, end, mapping
from agent.egress.schemas import is_strict
from agent.egress.sse import Event, Garbage
from agent.policy.outgoing import Called, End, Outgoing, Piece, Turn
from agent.policy.rules import ProviderKind

PATH = "/chat/completions"
_REASONS = re.compile(r"(^|/)(o\d|gpt-(?!3|4)\d)", re.IGNORECASE)
"""OpenAI's models that reason, by name."""
_FINISH: dict[str, Finish] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}


def body(outgoing: Outgoing, kind: ProviderKind, max_tokens: int) -> dict[str, Any]:
    """The request, as JSON values. ``max_tokens`` is always sent: what an answer costs has an upper bound."""
    request: dict[str, Any] = {
        "model": outgoing.model,
        "messages": [_message(turn) for turn in outgoing.turns],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens" if kind == "openai" else "max_tokens": max_tokens,
        **_sampling(outgoing, reasons=kind in ("openai", "openrouter") and _REASONS.search(outgoing.model) is not None),
        **_tools(outgoing),
    }
    if outgoing.schema is not None:
        request["response_format"] = _format(msgspec.json.decode(outgoing.schema))
    if outgoing.reasoning_effort is not None:
        effort = outgoing.reasoning_effort
        request |= {"reasoning": {"effort": effort}} if kind == "openrouter" else {"reasoning_effort": effort}
    if kind == "openai":
        request["store"] = False
    if kind == "openrouter":
        request["provider"] = {"data_collection": "deny"}
    return request


def _sampling(outgoing: Outgoing, *, reasons: bool) -> dict[str, Any]:
    chosen = {
        "temperature": (outgoing.temperature, 1.0),
        "top_p": (outgoing.top_p, 1.0),
        "frequency_penalty": (outgoing.frequency_penalty, 0.0),
        "presence_penalty": (outgoing.presence_penalty, 0.0),
    }
    found: dict[str, Any] = {} if reasons else {name: v for name, (v, neutral) in chosen.items() if v != neutral}
    if outgoing.seed is not None:
        found["seed"] = outgoing.seed
    if outgoing.stop:
        found["stop"] = list(outgoing.stop)
    return found


def _message(turn: Turn) -> dict[str, Any]:
    if turn.role == "tool":
        return {"role": "tool", "tool_call_id": turn.call_id, "content": turn.content}
    if not turn.calls:
        return {"role": turn.role, "content": turn.content}
    return {"role": turn.role, "content": turn.content or None, "tool_calls": [_call(one) for one in turn.calls]}


def _call(call: Called) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tools(outgoing: Outgoing) -> dict[str, Any]:
    if not outgoing.tools:
        return {}
    described = [{"type": "function", "function": msgspec.json.decode(tool)} for tool in outgoing.tools]
    found: dict[str, Any] = {"tools": described}
    if outgoing.must_call is not None:
        named = {"type": "function", "function": {"name": outgoing.must_call}}
        found["tool_choice"] = named if outgoing.must_call else "required"
    if outgoing.one_call:
        found["parallel_tool_calls"] = False
    return found


def _format(schema: Any) -> dict[str, Any]:
    if schema == {"type": "object"}:
        return {"type": "json_object"}
    strict = {"strict": True} if is_strict(schema) else {}
    return {"type": "json_schema", "json_schema": {"name": "answer", **strict, "schema": schema}}


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: Any = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | list[Any] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None


class Reader:
    """Reads one answer. ``done`` once the provider has said that nothing follows."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self.done = False
        self._calls = Calls(new_id)
        self._places: dict[int, int] = {}
        self._finish: Finish | None = None
        self._usage: dict[str, int | None] = {}

    def take(self, event: Event) -> list[Piece]:
        """What one event adds to the answer. Raises Garbage, and Failure for an error that the provider reports."""
        if event.data.strip() == b"[DONE]":
            self.done = True
            return []
        chunk = decoded(event.data, _Chunk)
        if chunk.error is not None:
            raise Failure(error_kind(chunk.error))
        if isinstance(chunk.usage, dict):
            self._usage = _usage(chunk.usage)
        choices = chunk.choices or []
        if len(choices) > 1 or any(one.index != 0 for one in choices):
            raise Garbage("more than one answer")
        return [piece for one in choices if (piece := self._choice(one)) is not None]

    def close(self) -> list[Piece | End]:
        """The rest of the answer: its calls, and its end. Raises Garbage for one that breaks off."""
        if self._finish is None:
            raise Garbage("an answer that breaks off before its end")
        cut = self._finish == "length"
        calls = () if self._finish == "content_filter" else self._calls.whole(cut=cut)
        ended = end(self._finish, len(calls), self._usage)
        return [*([Piece(calls=calls)] if calls else []), ended]

    def _choice(self, choice: _Choice) -> Piece | None:
        delta = choice.delta or _Delta()
        text = _text(delta.content) + (delta.refusal or "")
        reasoning = delta.reasoning or delta.reasoning_content or ""
        if self._finish is not None and (text or reasoning or delta.tool_calls):
            raise Garbage("more of an answer after its end")
        for call in delta.tool_calls or ():
            self._call(call)
        if choice.finish_reason is not None:
            self._finish = _finished(choice.finish_reason)
        return Piece(text=text, reasoning=reasoning) if text or reasoning else None

    def _call(self, call: _Call) -> None:
        """Calls are told apart by their index; by their id where a server gives none, or the same to all."""
        name_id, function = call.id or "", call.function or _Function()
        index = call.index if call.index is not None else max(0, self._calls.last)
        place = self._places.setdefault(index, index)
        if not self._calls.has(place, name_id):
            place = self._places[index] = max(self._places.values()) + 1
        arguments = function.arguments
        if isinstance(arguments, dict):
            arguments = msgspec.json.encode(arguments).decode()
        if not isinstance(arguments, str | None):
            raise Garbage("a call whose arguments are not text")
        self._calls.add(place, call_id=name_id, name=function.name or "", arguments=arguments or "")


def error_kind(error: Any) -> str:
    """The provider's own name of an error: its type, or a code that says more."""
    found = mapping(error)
    named = [value for key in ("code", "type") if isinstance(value := found.get(key), str)]
    return next(iter(named), "")


def _finished(reason: str) -> Finish:
    if reason == "error":
        raise Failure("")
    if reason not in _FINISH:
        raise Garbage("an answer that ends for a reason that its API does not have")
    return _FINISH[reason]


def _text(content: str | list[Any] | None) -> str:
    if isinstance(content, list):
        return "".join(text for one in content if isinstance(text := mapping(one).get("text"), str))
    return content or ""


def _usage(usage: dict[str, Any]) -> dict[str, int | None]:
    return {
        "prompt": count(usage.get("prompt_tokens")),
        "completion": count(usage.get("completion_tokens")),
        "cached": count(mapping(usage.get("prompt_tokens_details")).get("cached_tokens")),
        "reasoning": count(mapping(usage.get("completion_tokens_details")).get("reasoning_tokens")),
    }
