"""The OpenAI wire, both ways: bytes to a ChatRequest, answers to the shapes that clients parse.

Nothing is ignored silently. A field that would change behaviour and is not supported is refused by name, unless its
value is the neutral one; advisory fields are accepted and do nothing (docs/api.md).
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from agent.frames import Message
from shared.errors import Refused

MAX_STOPS = 4
MAX_STOP_CHARS = 256
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ADVISORY = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Accepted without effect: they name the caller or advise a vendor's own machinery."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Known fields that are not supported yet, with the values that ask for nothing; null asks for nothing everywhere."""


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validated chat completion request."""

    model: str
    messages: tuple[Message, ...]
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one answer."""

    prompt_tok: int
    cached_tok: int
    completion_tok: int


def parse_request(body: bytes) -> ChatRequest:
    """Read a request body. Raises Refused with ``param`` naming the field at fault; values are never quoted."""
    try:
        tree = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise Refused("the body is not a JSON object", code="invalid_json")
    _refuse_unsupported(tree)
    stream = _boolean(tree, "stream")
    max_tokens = _integer(tree, "max_completion_tokens", 1, 1 << 31)
    if max_tokens is None:
        max_tokens = _integer(tree, "max_tokens", 1, 1 << 31)
    return ChatRequest(
        model=_model(tree),
        messages=_messages(tree),
        stream=stream,
        include_usage=_include_usage(tree, stream),
        max_tokens=max_tokens,
        temperature=_number(tree, "temperature", 0.0, 2.0, 1.0),
        top_p=_number(tree, "top_p", 0.0, 1.0, 1.0),
        seed=_integer(tree, "seed", -(1 << 63), (1 << 63) - 1),
        stop=_stop(tree),
    )


def completion(
    *, answer_id: str, created: int, model: str, fingerprint: str, text: str, finish: str, usage: Usage
) -> dict[str, Any]:
    """A whole chat.completion object."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": usage_object(usage),
    }


def chunk(
    *, answer_id: str, created: int, model: str, fingerprint: str, delta: dict[str, Any], finish: str | None = None
) -> dict[str, Any]:
    """One chat.completion.chunk object with one choice."""
    return {
        "id": answer_id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }


def usage_chunk(*, answer_id: str, created: int, model: str, fingerprint: str, usage: Usage) -> dict[str, Any]:
    """The last chunk when the caller asked for usage: no choice, only counts."""
    empty = chunk(answer_id=answer_id, created=created, model=model, fingerprint=fingerprint, delta={})
    return {**empty, "choices": [], "usage": usage_object(usage)}


def usage_object(usage: Usage) -> dict[str, Any]:
    """Token counts as OpenAI names them."""
    return {
        "prompt_tokens": usage.prompt_tok,
        "completion_tokens": usage.completion_tok,
        "total_tokens": usage.prompt_tok + usage.completion_tok,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tok},
    }


def error_body(message: str, *, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The error envelope that clients raise from."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models_list(names: Mapping[str, int]) -> dict[str, Any]:
    """GET /v1/models: served names with the second since which each is known."""
    data = [{"id": n, "object": "model", "created": t, "owned_by": "mlxrack"} for n, t in sorted(names.items())]
    return {"object": "list", "data": data}


_SUPPORTED = frozenset(
    {
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
    }
)


def _refuse_unsupported(tree: dict[str, Any]) -> None:
    for name, value in tree.items():
        if name in _SUPPORTED or name in ADVISORY or (value is None and name in NEUTRAL):
            continue
        if name not in NEUTRAL:
            raise Refused(f"unknown field {_shown(name)}", code="unknown_parameter", param=_shown(name))
        if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            raise Refused(f"{name} is not supported yet", code="unsupported_parameter", param=name)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, but 1 is not True; 0.0 is 0."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _shown(name: str) -> str:
    """A field name fit for an error: a stranger chose it."""
    return name[:64]


def _model(tree: dict[str, Any]) -> str:
    model = tree.get("model")
    if not isinstance(model, str) or not model:
        raise _wrong("model", "a model's name")
    if len(model) > 256:
        raise _wrong("model", "at most 256 characters")
    return model


def _messages(tree: dict[str, Any]) -> tuple[Message, ...]:
    messages = tree.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list with at least one message")
    return tuple(_message(item, f"messages[{n}]") for n, item in enumerate(messages))


def _message(item: Any, path: str) -> Message:
    if not isinstance(item, dict):
        raise _wrong(path, "an object")
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{path}.role", f"one of {', '.join(_ROLES)}")
    for key, value in item.items():
        if key not in ("role", "content", "name", "refusal") and value not in (None, []):
            raise Refused(
                f"{path}.{_shown(key)} is not supported", code="unsupported_parameter", param=f"{path}.{_shown(key)}"
            )
    return Message(role=_ROLES[role], content=_content(item.get("content"), f"{path}.content"))


def _content(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _wrong(path, "text, or a list of text parts")
    texts = []
    for n, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise Refused(
                f"{path}[{n}]: only parts of type text are supported",
                code="unsupported_parameter",
                param=f"{path}[{n}].type",
            )
        if not isinstance(part.get("text"), str):
            raise _wrong(f"{path}[{n}].text", "text")
        texts.append(part["text"])
    return "".join(texts)


def _include_usage(tree: dict[str, Any], stream: bool) -> bool:
    options = tree.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _wrong("stream_options", "an object")
    if not stream:
        raise Refused("stream_options needs stream: true", code="invalid_value", param="stream_options")
    for key in options:
        if key not in ("include_usage", "include_obfuscation"):
            raise Refused(
                f"unknown field stream_options.{_shown(key)}",
                code="unknown_parameter",
                param=f"stream_options.{_shown(key)}",
            )
    return _boolean(options, "include_usage", "stream_options.include_usage")


def _stop(tree: dict[str, Any]) -> tuple[str, ...]:
    stop = tree.get("stop")
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise _wrong("stop", f"a string or a list of at most {MAX_STOPS}")
    if not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise _wrong("stop", f"strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _boolean(tree: dict[str, Any], name: str, path: str | None = None) -> bool:
    value = tree.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong(path or name, "true or false")
    return value


def _integer(tree: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = tree.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(name, f"a whole number from {low} to {high}")
    return value


def _number(tree: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = tree.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _wrong(name, f"a number from {low:g} to {high:g}")
    return float(value)


def _wrong(param: str, expected: str) -> Refused:
    return Refused(f"{param}: expected {expected}", code="invalid_value", param=param)


Parser = Callable[[bytes], ChatRequest]
