"""OpenAI's requests, read: bytes to one validated structure, for chats and for plain text.

Nothing is ignored silently. A field that would change behaviour and is not supported is refused by name, unless its
value is the neutral one; advisory fields are accepted and do nothing (docs/api.md).
"""

import json
from collections.abc import Mapping
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


TEXT_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"echo": (False,), "suffix": ("",), "best_of": (1,)}
"""The same for text completions."""
MAX_CHOICES = 16


class AnswerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validated request: a conversation, or ``prompts`` to be continued as they stand.

    Each prompt (or the conversation) is answered ``n`` times. ``logprobs`` is how many of the likeliest tokens to
    report at each place, None for no report. ``schema`` is a JSON schema as text.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompts: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    schema: str | None = None
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


def parse_chat(body: bytes) -> AnswerRequest:
    """Read a chat completion's body. Raises Refused with ``param`` naming the field; values are never quoted."""
    tree = _object(body)
    _refuse_unsupported(tree, _CHAT, NEUTRAL)
    max_tokens = _integer(tree, "max_completion_tokens", 1, 1 << 31)
    return AnswerRequest(
        messages=_messages(tree),
        max_tokens=max_tokens if max_tokens is not None else _integer(tree, "max_tokens", 1, 1 << 31),
        logprobs=_chat_logprobs(tree),
        schema=_schema(tree),
        **_common(tree),
    )


def parse_text(body: bytes) -> AnswerRequest:
    """Read a text completion's body. Raises Refused as parse_chat does."""
    tree = _object(body)
    _refuse_unsupported(tree, _TEXT, TEXT_NEUTRAL)
    common = _common(tree)
    prompts = _prompts(tree)
    if len(prompts) * common["n"] > MAX_CHOICES:
        raise _wrong("n", f"at most {MAX_CHOICES} answers over all prompts")
    return AnswerRequest(
        prompts=prompts,
        max_tokens=_integer(tree, "max_tokens", 1, 1 << 31) or 16,
        logprobs=_integer(tree, "logprobs", 0, 5),
        **common,
    )


_SAMPLING = frozenset(
    {
        "model",
        "n",
        "stream",
        "stream_options",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "logprobs",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
    }
)
_CHAT = _SAMPLING | {"messages", "max_completion_tokens", "top_logprobs", "response_format"}
_TEXT = _SAMPLING | {"prompt"}


def _object(body: bytes) -> dict[str, Any]:
    try:
        tree = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise Refused("the body is not a JSON object", code="invalid_json")
    return tree


def _common(tree: dict[str, Any]) -> dict[str, Any]:
    """What both kinds of request share."""
    stream = _boolean(tree, "stream")
    return {
        "model": _model(tree),
        "n": _integer(tree, "n", 1, MAX_CHOICES) or 1,
        "stream": stream,
        "include_usage": _include_usage(tree, stream),
        "temperature": _number(tree, "temperature", 0.0, 2.0, 1.0),
        "top_p": _number(tree, "top_p", 0.0, 1.0, 1.0),
        "seed": _integer(tree, "seed", -(1 << 63), (1 << 63) - 1),
        "stop": _stop(tree),
        "frequency_penalty": _number(tree, "frequency_penalty", -2.0, 2.0, 0.0),
        "presence_penalty": _number(tree, "presence_penalty", -2.0, 2.0, 0.0),
        "logit_bias": _logit_bias(tree),
    }


def _refuse_unsupported(
    tree: dict[str, Any], supported: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]
) -> None:
    for name, value in tree.items():
        if name in supported or name in ADVISORY or (value is None and name in neutral):
            continue
        if name not in neutral:
            raise Refused(f"unknown field {_shown(name)}", code="unknown_parameter", param=_shown(name))
        if not any(_same(value, one) for one in neutral[name]):
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


def _prompts(tree: dict[str, Any]) -> tuple[str, ...]:
    prompt = tree.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise _wrong("prompt", "text, or a list of texts (token ids are not supported)")
    return tuple(prompts)


def _chat_logprobs(tree: dict[str, Any]) -> int | None:
    top = _integer(tree, "top_logprobs", 0, 20)
    if _boolean(tree, "logprobs"):
        return top or 0
    if top:
        raise Refused("top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs")
    return None


def _logit_bias(tree: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    bias = tree.get("logit_bias")
    if bias is None:
        return ()
    if not isinstance(bias, dict) or len(bias) > 1024:
        raise _wrong("logit_bias", "an object of at most 1024 token ids and numbers")
    pairs = []
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit()) or len(token) > 9:
            raise _wrong("logit_bias", "token ids as keys")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise _wrong("logit_bias", "numbers from -100 to 100")
        pairs.append((int(token), float(value)))
    return tuple(sorted(pairs))


def _schema(tree: dict[str, Any]) -> str | None:
    """The JSON schema that ``response_format`` asks for, as text; None for free text."""
    wanted = tree.get("response_format")
    if wanted is None:
        return None
    if not isinstance(wanted, dict):
        raise _wrong("response_format", "an object")
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    if kind != "json_schema":
        raise _wrong("response_format.type", "text, json_object or json_schema")
    inner = wanted.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise _wrong("response_format.json_schema.schema", "a JSON schema")
    return json.dumps(schema)


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
