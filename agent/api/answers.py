"""Response bodies: OpenAI's objects from our counts and texts. Pure."""

import binascii
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from agent.wire.frames import Candidate, Done, Scored, ToolCall


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one answer."""

    prompt_tok: int
    cached_tok: int
    completion_tok: int
    reasoning_tok: int = 0


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One complete answer."""

    index: int
    text: str
    finish: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    scored: tuple[Scored, ...] | None = None


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that every object of one answer repeats."""

    answer_id: str
    created: int
    model: str
    fingerprint: str


def chat_completion(who: Identity, choices: Iterable[Choice], usage: Usage) -> dict[str, Any]:
    """A complete chat.completion object."""
    rendered = [
        {
            "index": choice.index,
            "message": _message(choice),
            "logprobs": chat_logprobs(choice.scored),
            "finish_reason": choice.finish,
        }
        for choice in choices
    ]
    return {**_head(who, "chat.completion"), "choices": rendered, "usage": usage_object(usage)}


def _message(choice: Choice) -> dict[str, Any]:
    # clients recognize a tool call by null content
    content = None if choice.calls and not choice.text else choice.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.calls:
        message["tool_calls"] = [_call(call, call.arguments) for call in choice.calls]
    return message


def call_deltas(call: ToolCall, number: int) -> list[dict[str, Any]]:
    """A tool call on a stream: its name first, then its arguments, both under its index in the answer."""
    begin = {"index": number, **_call(call, "")}
    rest = {"index": number, "function": {"arguments": call.arguments}}
    return [{"tool_calls": [begin]}, {"tool_calls": [rest]}]


def _call(call: ToolCall, arguments: str) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def chat_chunk(
    who: Identity,
    index: int,
    delta: dict[str, Any],
    *,
    finish: str | None = None,
    scored: Sequence[Scored] | None = None,
) -> dict[str, Any]:
    """One chat.completion.chunk object with one choice."""
    choice = {"index": index, "delta": delta, "logprobs": chat_logprobs(scored), "finish_reason": finish}
    return {**_head(who, "chat.completion.chunk"), "choices": [choice]}


def text_completion(who: Identity, choices: Iterable[Choice], usage: Usage | None, *, begin: int = 0) -> dict[str, Any]:
    """A text_completion object; a streamed piece is one too, with ``usage`` None and text offsets from ``begin``."""
    rendered = [
        {
            "index": choice.index,
            "text": choice.text,
            "logprobs": text_logprobs(choice.scored, begin),
            "finish_reason": choice.finish or None,
        }
        for choice in choices
    ]
    body = {**_head(who, "text_completion"), "choices": rendered}
    return body if usage is None else {**body, "usage": usage_object(usage)}


def usage_chunk(who: Identity, kind: str, usage: Usage) -> dict[str, Any]:
    """The last chunk of a stream when usage was requested: no choices, only token counts."""
    return {**_head(who, kind), "choices": [], "usage": usage_object(usage)}


def usage_object(usage: Usage) -> dict[str, Any]:
    """Token counts under OpenAI's names."""
    return {
        "prompt_tokens": usage.prompt_tok,
        "completion_tokens": usage.completion_tok,
        "total_tokens": usage.prompt_tok + usage.completion_tok,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tok},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tok},
    }


def annotated(body: dict[str, Any], ends: Sequence[Done], *, timed: bool) -> dict[str, Any]:
    """An answer with the timings of its first choice, if requested, and with what its choices violate of schemas."""
    unmet = list(dict.fromkeys(one for end in ends for one in end.unmet))
    timed_by = {"timings": timings(ends[0])} if timed and ends else {}
    return {**body, **timed_by, **({"warnings": unmet} if unmet else {})}


def timings(done: Done) -> dict[str, Any]:
    """Time that one answer spent in each phase, as the engine measured it; rates are tokens per second."""
    computed = done.prompt_tok - done.cached_tok
    return {
        "queue_ms": done.queue_us / 1000,
        "prompt_n": computed,
        "cached_n": done.cached_tok,
        "prompt_ms": done.prefill_us / 1000,
        "prompt_per_second": _rate(computed, done.prefill_us),
        "predicted_n": done.completion_tok,
        "predicted_ms": done.decode_us / 1000,
        # prefill yields the first token
        "predicted_per_second": _rate(done.completion_tok - 1, done.decode_us),
    }


def embeddings(model: str, vectors: Sequence[bytes], prompt_tok: int, *, base64: bool) -> dict[str, Any]:
    """The list object of POST /v1/embeddings, from vectors as little-endian float32."""
    data = [{"object": "embedding", "index": n, "embedding": _vector(v, base64)} for n, v in enumerate(vectors)]
    usage = {"prompt_tokens": prompt_tok, "total_tokens": prompt_tok}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _vector(raw: bytes, base64: bool) -> Any:
    if base64:
        return binascii.b2a_base64(raw, newline=False).decode()
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def _rate(count: int, us: int) -> float | None:
    return round(count / (us / 1e6), 2) if us > 0 and count > 0 else None


def chat_logprobs(scored: Sequence[Scored] | None) -> dict[str, Any] | None:
    """Log probabilities in the format of chats; None when they were not requested."""
    if scored is None:
        return None
    content = [{**_candidate(s.chosen), "top_logprobs": [_candidate(c) for c in s.top]} for s in scored]
    return {"content": content, "refusal": None}


def text_logprobs(scored: Sequence[Scored] | None, begin: int = 0) -> dict[str, Any] | None:
    """Log probabilities in the format of text completions; None when they were not requested. ``begin`` is the offset
    of the first, in characters of the answer."""
    if scored is None:
        return None
    offsets, at = [], begin
    for one in scored:
        offsets.append(at)
        at += len(one.chosen.text)
    return {
        "tokens": [s.chosen.text for s in scored],
        "token_logprobs": [s.chosen.logprob for s in scored],
        "top_logprobs": [{c.text: c.logprob for c in s.top} for s in scored],
        "text_offset": offsets,
    }


def error_body(message: str, *, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The error envelope that clients raise from."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models_list(names: Mapping[str, int]) -> dict[str, Any]:
    """GET /v1/models: served names with the second since which each is known."""
    data = [{"id": n, "object": "model", "created": t, "owned_by": "mlxrack"} for n, t in sorted(names.items())]
    return {"object": "list", "data": data}


def _head(who: Identity, kind: str) -> dict[str, Any]:
    return {
        "id": who.answer_id,
        "object": kind,
        "created": who.created,
        "model": who.model,
        "system_fingerprint": who.fingerprint,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {"token": candidate.text, "logprob": candidate.logprob, "bytes": list(candidate.raw)}
