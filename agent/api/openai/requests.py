"""Request bodies, each parsed to one validated structure.

Strictness is for what changes behaviour: a known field that would change the answer and is not supported is refused by
name, unless its value is neutral. What has no effect is accepted and named (docs/api.md).
"""

from typing import Any

import msgspec

from agent.api.openai.conversation import MAX_SCHEMA_CHARS, RENDERER_KEY, messages, tools
from agent.api.openai.fields import Extras, boolean, integer, number, read_object, shown, unsupported, written, wrong
from agent.api.openai.known import ADVISORY, ELSEWHERE, NEUTRAL, TEXT_NEUTRAL, Neutral
from agent.config import Api
from agent.policy.classes import NOTHING, Declared, in_metadata
from agent.wire.frames import EFFORTS, Embed, Generate
from shared.errors import Refused

DEFAULT = Api()
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_CHOICES = 16
MAX_INPUTS = 2048
MAX_INPUT_TOK = 1 << 20
MAX_TOK = 1 << 31
MAX_TEMPLATE_ARGS_CHARS = 4096


class AnswerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validated request: what to generate, for the conversation or for each of ``prompts``, ``n`` times. ``seed`` is
    None where the client set none. ``ignored`` are fields without effect; ``declared`` is the body's task class."""

    generate: Generate
    prompts: tuple[str, ...] = ()
    n: int = 1
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    timings: bool = False
    ignored: tuple[str, ...] = ()
    declared: Declared = NOTHING


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validated request for embeddings. ``base64`` selects the encoding of the vectors; the others as above."""

    embed: Embed
    base64: bool = False
    ignored: tuple[str, ...] = ()
    declared: Declared = NOTHING


def parse_chat(body: bytes, policy: Api = DEFAULT) -> AnswerRequest:
    """Parse a chat completion's body. Raises Refused with ``param`` naming the field; values are never quoted."""
    tree, extras = read_object(body), Extras(policy)
    _sort_out(tree, CHAT, NEUTRAL, extras)
    callable_tools, schema = tools(tree, extras), _schema(tree, extras)
    generate = Generate(
        **_sampling(tree, policy),
        messages=messages(tree, extras),
        max_tokens=_max_tokens(tree),
        ignore_eos=_ignores_eos(tree, extras, constrained=bool(schema or callable_tools.described)),
        logprobs=_chat_logprobs(tree),
        schema=schema,
        tools=callable_tools.described,
        must_call=callable_tools.must_call,
        one_call=callable_tools.one_call,
        reasoning_effort=_effort(tree),
        template_args=_template_args(tree),
    )
    declared = in_metadata(tree.get("metadata"))
    return AnswerRequest(generate=generate, **_delivery(tree, extras), ignored=extras.names, declared=declared)


def parse_text(body: bytes, policy: Api = DEFAULT) -> AnswerRequest:
    """Parse a text completion's body. Raises Refused as parse_chat does."""
    tree, extras = read_object(body), Extras(policy)
    _sort_out(tree, TEXT, TEXT_NEUTRAL, extras)
    delivery = _delivery(tree, extras)
    prompts = _prompts(tree)
    if len(prompts) * delivery["n"] > MAX_CHOICES:
        raise wrong("n", f"at most {MAX_CHOICES} answers over all prompts")
    given = any(tree.get(name) is not None for name in _MAX_TOKENS)
    generate = Generate(
        **_sampling(tree, policy),
        max_tokens=_max_tokens(tree) if given else 16,
        ignore_eos=_ignores_eos(tree, extras, constrained=False),
        logprobs=integer(tree, "logprobs", 0, 5),
    )
    declared = in_metadata(tree.get("metadata"))
    return AnswerRequest(generate=generate, prompts=prompts, **delivery, ignored=extras.names, declared=declared)


def parse_embeddings(body: bytes, policy: Api = DEFAULT) -> EmbedRequest:
    """Parse a request for embeddings. Raises Refused as parse_chat does."""
    tree, extras = read_object(body), Extras(policy)
    _sort_out(tree, EMBED, {}, extras)
    form = tree.get("encoding_format")
    if form not in (None, "float", "base64"):
        raise wrong("encoding_format", "float or base64")
    embed = Embed(
        id=0, model=_model(tree), inputs=_inputs(tree.get("input")), dimensions=integer(tree, "dimensions", 1, MAX_TOK)
    )
    declared = in_metadata(tree.get("metadata"))
    return EmbedRequest(embed=embed, base64=form == "base64", ignored=extras.names, declared=declared)


_MAX_TOKENS = ("max_completion_tokens", "max_tokens", "n_predict")
_SAMPLING = frozenset(
    {
        *("model", "n", "stream", "stream_options", "temperature", "top_p", "seed", "stop", "logprobs", *_MAX_TOKENS),
        *("frequency_penalty", "presence_penalty", "logit_bias", "timings", "top_k", "min_p", "ignore_eos"),
        *("repetition_penalty", "repeat_penalty", "repetition_context_size", "repeat_last_n"),
    }
)
CHAT = _SAMPLING | {
    *("messages", "top_logprobs", "response_format", "tools", "tool_choice"),
    *("parallel_tool_calls", "reasoning_effort", "chat_template_kwargs"),
}
TEXT = _SAMPLING | {"prompt"}
EMBED = frozenset({"model", "input", "encoding_format", "dimensions"})


def _delivery(tree: dict[str, Any], extras: Extras) -> dict[str, Any]:
    """How many answers, and how they are delivered."""
    stream = boolean(tree, "stream")
    return {
        "n": integer(tree, "n", 1, MAX_CHOICES) or 1,
        "seed": integer(tree, "seed", -(1 << 63), (1 << 63) - 1),
        "stream": stream,
        "include_usage": _include_usage(tree, stream, extras),
        "timings": boolean(tree, "timings"),
    }


def _sampling(tree: dict[str, Any], policy: Api) -> dict[str, Any]:
    """The fields that both kinds of request share."""
    return {
        "id": 0,
        "model": _model(tree),
        "temperature": number(tree, "temperature", 0.0, 2.0, 1.0),
        "top_p": number(tree, "top_p", 0.0, 1.0, 1.0),
        "top_k": integer(tree, "top_k", 1, MAX_TOK, off=(-1, 0)) or 0,
        "min_p": number(tree, "min_p", 0.0, 1.0, 0.0),
        "stop": _stop(tree),
        "frequency_penalty": number(tree, "frequency_penalty", -2.0, 2.0, 0.0),
        "presence_penalty": number(tree, "presence_penalty", -2.0, 2.0, 0.0),
        "logit_bias": _logit_bias(tree),
        "strict": policy.strict,
        **_repetition(tree),
    }


def _repetition(tree: dict[str, Any]) -> dict[str, Any]:
    """The repetition penalty under mlx-lm's names, or else under llama.cpp's."""
    factor = number(tree, "repeat_penalty", 0.1, 10.0, 1.0, off=(0,))
    last = integer(tree, "repeat_last_n", 0, MAX_TOK, off=(-1,))
    window = integer(tree, "repetition_context_size", 1, MAX_TOK, off=(-1, 0))
    factor = number(tree, "repetition_penalty", 0.1, 10.0, factor, off=(0,))
    return {"repetition_penalty": 1.0 if last == 0 else factor, "repetition_window_tok": window or last or 0}


def _max_tokens(tree: dict[str, Any]) -> int | None:
    """The longest answer, None for no limit but the model's; the frame's bound exceeds every context length."""
    given = [integer(tree, name, 1, (1 << 63) - 1, off=(-1,)) for name in _MAX_TOKENS]
    return next((min(one, MAX_TOK) for one in given if one is not None), None)


def _ignores_eos(tree: dict[str, Any], extras: Extras, *, constrained: bool) -> bool:
    """Whether the end tokens are masked; what a schema or tools constrain must be able to end."""
    wanted = boolean(tree, "ignore_eos")
    if wanted and constrained:
        extras.idle("ignore_eos")
    return wanted and not constrained


def _sort_out(tree: dict[str, Any], supported: frozenset[str], neutral: Neutral, extras: Extras) -> None:
    """Refuse what would change the answer and is not supported; name what has no effect. Null is absent."""
    for name, value in tree.items():
        if value is None or name in supported or name in ADVISORY:
            continue
        idle = any(_same(value, one) for one in (*neutral.get(name, ()), *ELSEWHERE.get(name, ())))
        if name in neutral and not idle:
            raise Refused(f"{name} is not supported", code="unsupported_parameter", param=name)
        if name in ELSEWHERE and not idle:
            extras.idle(name)
        elif name not in neutral and name not in ELSEWHERE:
            extras.unknown(shown(name))


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


def _schema(tree: dict[str, Any], extras: Extras) -> str | None:
    """The JSON schema that ``response_format`` requires, as text; None for free text."""
    if (wanted := tree.get("response_format")) is None:
        return None
    if not isinstance(wanted, dict):
        raise wrong("response_format", "an object")
    kind, path = wanted.get("type"), "response_format"
    extras.beyond(wanted, _SCHEMA_KEYS | {"type", "json_schema"}, path)
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise wrong(f"{path}.type", "text, json_object or json_schema")
    inner: Any = wanted  # llama.cpp and others take the schema beside the type
    if wanted.get("schema") is None:
        if kind == "json_object":
            return '{"type": "object"}'
        inner, path = wanted.get("json_schema"), f"{path}.json_schema"
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise wrong(f"{path}.schema", "a JSON schema")
    extras.beyond(inner, _SCHEMA_KEYS | {"type", "json_schema"}, path)
    # always strict
    boolean(inner, "strict", f"{path}.strict")
    found = written(schema, f"{path}.schema", MAX_SCHEMA_CHARS)
    if RENDERER_KEY in found:
        raise unsupported(f"{path}.schema", f"{RENDERER_KEY} is not supported")
    return found


_SCHEMA_KEYS = frozenset({"name", "description", "strict", "schema"})


def _include_usage(tree: dict[str, Any], stream: bool, extras: Extras) -> bool:
    if (options := tree.get("stream_options")) is None:
        return False
    if not isinstance(options, dict):
        raise wrong("stream_options", "an object")
    if not stream:
        raise Refused("stream_options needs stream: true", code="invalid_value", param="stream_options")
    extras.beyond(options, frozenset({"include_usage", "include_obfuscation"}), "stream_options")
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
