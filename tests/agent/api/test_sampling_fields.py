"""Request fields of OpenAI's client and of local servers' clients: what each becomes in the frame for the engine."""

import json
from typing import Any, get_type_hints

import pytest
from msgspec import structs
from openai.types import EmbeddingCreateParams
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParamsNonStreaming

from agent.api.openai import AnswerRequest, parse_chat, parse_embeddings, parse_text
from agent.config import Api
from shared.errors import Refused

BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def parse(**more: Any) -> AnswerRequest:
    return parse_chat(json.dumps({**BASE, **more}).encode())


def outcome(parser: Any, body: dict[str, Any]) -> str:
    """The code of the refusal by a node that refuses unknown fields; "" when accepted."""
    try:
        parser(json.dumps(body).encode(), Api(unknown_fields="refuse"))
    except Refused as error:
        return error.code
    return ""


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ({"top_k": 40}, {"top_k": 40}),
        ({"min_p": 0.05}, {"min_p": 0.05}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repeat_penalty": 1.3, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repetition_penalty": 1.1, "repeat_last_n": 0}, {}),
        ({"repetition_penalty": 1.1, "repeat_last_n": 64}, {"repetition_penalty": 1.1, "repetition_window_tok": 64}),
        (
            {"repetition_penalty": 1.1, "repetition_context_size": 20},
            {"repetition_penalty": 1.1, "repetition_window_tok": 20},
        ),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"n_predict": 7}, {"max_tokens": 7}),
        ({"max_tokens": 7, "n_predict": 9}, {"max_tokens": 7}),
        ({"max_completion_tokens": -1, "max_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": (1 << 63) - 1}, {"max_tokens": 1 << 31}),
        *(({name: -1}, {}) for name in ("max_tokens", "max_completion_tokens", "n_predict", "top_k", "repeat_last_n")),
        *(({name: 0}, {}) for name in ("top_k", "min_p", "repetition_penalty", "repeat_penalty")),
        *(({name: 1.0}, {}) for name in ("repetition_penalty", "repeat_penalty", "typical_p")),
        *(({name: None}, {}) for name in ("top_k", "min_p", "repetition_penalty", "ignore_eos", "wibble")),
        ({"cache_prompt": True}, {}),
    ],
)
def test_sampling_fields_of_local_servers(more: dict[str, Any], changed: dict[str, Any]) -> None:
    request = parse(**more)
    assert request.generate == structs.replace(parse().generate, **changed)
    assert request.ignored == ()


def test_what_must_end_by_itself_does_not_ignore_its_end() -> None:
    for constrained in ({"tools": TOOLS}, {"response_format": {"type": "json_object"}}):
        request = parse(ignore_eos=True, **constrained)
        assert (request.generate.ignore_eos, request.ignored) == (False, ("ignore_eos",))


def test_every_parameter_of_the_official_client_is_known() -> None:
    """Accepted with or without effect or refused by name, but never taken for unknown."""
    parsers: list[tuple[Any, dict[str, Any], Any]] = [
        (CompletionCreateParamsNonStreaming, BASE, parse_chat),
        (TextParamsNonStreaming, {"model": "m", "prompt": "p"}, parse_text),
        (EmbeddingCreateParams, {"model": "m", "input": "x"}, parse_embeddings),
    ]
    for params, base, parser in parsers:
        for name in get_type_hints(params):
            assert outcome(parser, {**base, name: base.get(name, "?")}) != "unknown_parameter", name


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "written",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_object", "schema": SCHEMA},
    ],
)
def test_a_schema_is_found_where_servers_take_it(written: dict[str, Any]) -> None:
    request = parse(response_format=written)
    assert (json.loads(request.generate.schema or ""), request.ignored) == (SCHEMA, ())
