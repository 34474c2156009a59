"""Request bodies, each parsed to one validated structure.

Nothing is ignored silently. A field that would change behaviour and is not supported is refused by name, unless its
value is neutral; advisory fields are accepted without effect (docs/api.md).
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from agent.api.openai.conversation import MAX_SCHEMA_CHARS, RENDERER_KEY, messages, tools
from agent.api.openai.fields import boolean, integer, number, only, read_object, shown, unsupported, written, wrong
from agent.wire.frames import Embed, Generate
from shared.errors import Refused

MAX_STOPS = 4
MAX_STOP_CHARS = 256
ADVISORY = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    }
)
"""Accepted without effect: they identify the caller or are hints for a vendor's own infrastructure."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
"""Known fields that are not supported yet, with their neutral values; null is neutral everywhere."""


TEXT_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"echo": (False,), "suffix": ("",), "best_of": (1,)}
"""The same for text completions."""
EMBED_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"dimensions": ()}
"""The same for embeddings."""
MAX_CHOICES = 16
MAX_INPUTS = 2048
MAX_INPUT_TOK = 1 << 20
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_TEMPLATE_ARGS_CHARS = 4096


class AnswerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validated request: what to generate, for the conversation or for each of ``prompts``, ``n`` times. ``seed`` is
    None where the client set none."""

    generate: Generate
    prompts: tuple[str, ...] = ()
    n: int = 1
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    timings: bool = False


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validated request for embeddings. ``base64`` selects the encoding of the vectors."""

    embed: Embed
    base64: bool = False


def parse_chat(body: bytes) -> AnswerRequest:
    """Parse a chat completion's body. Raises Refused with ``param`` naming the field; values are never quoted."""
    tree = read_object(body)
    _refuse_unsupported(tree, _CHAT, NEUTRAL)
    max_tokens = integer(tree, "max_completion_tokens", 1, 1 << 31)
    callable_tools = tools(tree)
    generate = Generate(
        **_sampling(tree),
        messages=messages(tree),
        max_tokens=max_tokens if max_tokens is not None else integer(tree, "max_tokens", 1, 1 << 31),
        logprobs=_chat_logprobs(tree),
        schema=_schema(tree),
        tools=callable_tools.described,
        must_call=callable_tools.must_call,
        one_call=callable_tools.one_call,
        reasoning_effort=_effort(tree),
        template_args=_template_args(tree),
    )
    return AnswerRequest(generate=generate, **_delivery(tree))


def parse_text(body: bytes) -> AnswerRequest:
    """Parse a text completion's body. Raises Refused as parse_chat does."""
    tree = read_object(body)
    _refuse_unsupported(tree, _TEXT, TEXT_NEUTRAL)
    delivery = _delivery(tree)
    prompts = _prompts(tree)
    if len(prompts) * delivery["n"] > MAX_CHOICES:
        raise wrong("n", f"at most {MAX_CHOICES} answers over all prompts")
    generate = Generate(
        **_sampling(tree),
        max_tokens=integer(tree, "max_tokens", 1, 1 << 31) or 16,
        logprobs=integer(tree, "logprobs", 0, 5),
    )
    return AnswerRequest(generate=generate, prompts=prompts, **delivery)


def parse_embeddings(body: bytes) -> EmbedRequest:
    """Parse a request for embeddings. Raises Refused as parse_chat does."""
    tree = read_object(body)
    _refuse_unsupported(tree, _EMBED, EMBED_NEUTRAL)
    form = tree.get("encoding_format")
    if form not in (None, "float", "base64"):
        raise wrong("encoding_format", "float or base64")
    embed = Embed(id=0, model=_model(tree), inputs=_inputs(tree.get("input")))
    return EmbedRequest(embed=embed, base64=form == "base64")


_SAMPLING = frozenset(
    {
        *("model", "n", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"),
        *("frequency_penalty", "presence_penalty", "logit_bias", "timings"),
    }
)
_CHAT = _SAMPLING | {
    *("messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice"),
    *("parallel_tool_calls", "reasoning_effort", "chat_template_kwargs"),
}
_TEXT = _SAMPLING | {"prompt"}
_EMBED = frozenset({"model", "input", "encoding_format"})


def _delivery(tree: dict[str, Any]) -> dict[str, Any]:
    """How many answers, and how they are delivered."""
    stream = boolean(tree, "stream")
    return {
        "n": integer(tree, "n", 1, MAX_CHOICES) or 1,
        "seed": integer(tree, "seed", -(1 << 63), (1 << 63) - 1),
        "stream": stream,
        "include_usage": _include_usage(tree, stream),
        "timings": boolean(tree, "timings"),
    }


def _sampling(tree: dict[str, Any]) -> dict[str, Any]:
    """The fields that both kinds of request share."""
    return {
        "id": 0,
        "model": _model(tree),
        "temperature": number(tree, "temperature", 0.0, 2.0, 1.0),
        "top_p": number(tree, "top_p", 0.0, 1.0, 1.0),
        "stop": _stop(tree),
        "frequency_penalty": number(tree, "frequency_penalty", -2.0, 2.0, 0.0),
        "presence_penalty": number(tree, "presence_penalty", -2.0, 2.0, 0.0),
        "logit_bias": _logit_bias(tree),
    }


def _refuse_unsupported(
    tree: dict[str, Any], supported: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]
) -> None:
    for name, value in tree.items():
        if name in supported or name in ADVISORY or (value is None and name in neutral):
            continue
        if name not in neutral:
            raise Refused(f"unknown field {shown(name)}", code="unknown_parameter", param=shown(name))
        if not any(_same(value, one) for one in neutral[name]):
            raise Refused(f"{name} is not supported yet", code="unsupported_parameter", param=name)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, but 1 is not True; 0.0 is 0."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _model(tree: dict[str, Any]) -> str:
    if not isinstance(model := tree.get("model"), str) or not model:
        raise wrong("model", "a model's name")
    if len(model) > 256:
        raise wrong("model", "at most 256 characters")
    return model


def _prompts(tree: dict[str, Any]) -> tuple[str, ...]:
    prompt = tree.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise wrong("prompt", "a string or a list of strings (token ids are not supported)")
    return tuple(prompts)


def _chat_logprobs(tree: dict[str, Any]) -> int | None:
    top = integer(tree, "top_logprobs", 0, 20)
    if boolean(tree, "logprobs"):
        return top or 0
    if top:
        raise Refused("top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs")
    return None


def _logit_bias(tree: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    if (bias := tree.get("logit_bias")) is None:
        return ()
    if not isinstance(bias, dict) or len(bias) > 1024:
        raise wrong("logit_bias", "an object of at most 1024 token ids and numbers")
    pairs = []
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit()) or len(token) > 9:
            raise wrong("logit_bias", "token ids as keys")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise wrong("logit_bias", "numbers from -100 to 100")
        pairs.append((int(token), float(value)))
    return tuple(sorted(pairs))


def _schema(tree: dict[str, Any]) -> str | None:
    """The JSON schema that ``response_format`` requires, as text; None for free text."""
    if (wanted := tree.get("response_format")) is None:
        return None
    if not isinstance(wanted, dict):
        raise wrong("response_format", "an object")
    only(wanted, frozenset({"type", "json_schema"}), "response_format")
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    if kind != "json_schema":
        raise wrong("response_format.type", "text, json_object or json_schema")
    inner = wanted.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or not isinstance(schema, dict):
        raise wrong("response_format.json_schema.schema", "a JSON schema")
    only(inner, frozenset({"name", "description", "strict", "schema"}), "response_format.json_schema")
    # always strict
    boolean(inner, "strict", "response_format.json_schema.strict")
    found = written(schema, "response_format.json_schema.schema", MAX_SCHEMA_CHARS)
    if RENDERER_KEY in found:
        raise unsupported("response_format.json_schema.schema", f"{RENDERER_KEY} is not supported")
    return found


def _include_usage(tree: dict[str, Any], stream: bool) -> bool:
    if (options := tree.get("stream_options")) is None:
        return False
    if not isinstance(options, dict):
        raise wrong("stream_options", "an object")
    if not stream:
        raise Refused("stream_options needs stream: true", code="invalid_value", param="stream_options")
    only(options, frozenset({"include_usage", "include_obfuscation"}), "stream_options")
    return boolean(options, "include_usage", "stream_options.include_usage")


def _stop(tree: dict[str, Any]) -> tuple[str, ...]:
    if (stop := tree.get("stop")) is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise wrong("stop", f"a string or a list of at most {MAX_STOPS}")
    if not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise wrong("stop", f"strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _effort(tree: dict[str, Any]) -> str | None:
    effort = tree.get("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        raise wrong("reasoning_effort", f"one of {', '.join(EFFORTS)}")
    return effort if isinstance(effort, str) else None


def _template_args(tree: dict[str, Any]) -> str | None:
    args = tree.get("chat_template_kwargs")
    if args is None or args == {}:
        return None
    if not isinstance(args, dict):
        raise wrong("chat_template_kwargs", "an object")
    return written(args, "chat_template_kwargs", MAX_TEMPLATE_ARGS_CHARS)


def _inputs(found: Any) -> tuple[str | tuple[int, ...], ...]:
    """One text, several, or the same as token ids."""
    if isinstance(found, str) or (isinstance(found, list) and found and _is_token(found[0])):
        found = [found]
    if not isinstance(found, list) or not 0 < len(found) <= MAX_INPUTS:
        raise wrong("input", f"a string, token ids, or a list of at most {MAX_INPUTS} of them")
    return tuple(_input(one, f"input[{n}]") for n, one in enumerate(found))


def _input(one: Any, path: str) -> str | tuple[int, ...]:
    if isinstance(one, str) and one:
        return one
    if isinstance(one, list) and 0 < len(one) <= MAX_INPUT_TOK and all(_is_token(token) for token in one):
        return tuple(one)
    raise wrong(path, "a non-empty string or token ids")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
