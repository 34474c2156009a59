"""Requests as the APIs of providers have them: what is translated, what is lost, and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.egress.anthropic_messages import ANSWER, by_tool
from agent.egress.prices import body
from agent.egress.schemas import closed, is_plain, is_strict
from agent.policy.outgoing import Called, Outgoing, Turn
from shared.errors import Refused
from tests.agent.egress.made import egress, outgoing, provider, sealed

URL = {"compatible": "https://x.example/v1", "local": "http://127.0.0.1:1/v1"}


def sent(kind: str, request: Outgoing) -> Any:
    """The request as JSON."""
    return json.loads(body(provider(kind, url=URL.get(kind, "")), request))


# ---- OpenAI ----


@pytest.mark.parametrize("kind", ["openai", "openrouter", "compatible", "local"])
def test_neutral_values_are_not_sent_and_a_limit_always_is(kind: str) -> None:
    request = sent(kind, outgoing())
    extra = {"openai": {"store"}, "openrouter": {"provider"}}.get(kind, set())
    limit = "max_completion_tokens" if kind == "openai" else "max_tokens"
    assert set(request) == {"model", "messages", "stream", "stream_options", limit} | extra
    assert request[limit] == 4096
    assert sent(kind, outgoing(max_tokens=7))[limit] == 7


SAMPLING: dict[str, Any] = {"temperature": 0.0, "top_p": 0.5, "frequency_penalty": 0.5, "presence_penalty": -1.0}


@pytest.mark.parametrize(
    ("kind", "model", "taken"),
    [
        *(("openai", name, False) for name in ("o1", "o3-mini", "o4-mini", "gpt-5", "gpt-5.2-mini", "gpt-6")),
        *(("openai", name, True) for name in ("gpt-4o", "gpt-4.1", "gpt-3.5-turbo", "chatgpt-4o-latest")),
        *(("openrouter", name, False) for name in ("openai/o3", "openai/gpt-5")),
        *(("openrouter", name, True) for name in ("meta-llama/llama-4", "openai/gpt-4o", "anthropic/claude-opus-4.6")),
        *(("local", name, True) for name in ("gpt-oss:20b", "gpt-5-like", "qwen3:8b")),
    ],
)
def test_models_that_reason_get_no_sampling(kind: str, model: str, taken: bool) -> None:
    request = sent(kind, outgoing(model=model, **SAMPLING))
    assert {name: request[name] for name in SAMPLING if name in request} == (SAMPLING if taken else {})


CLOSED = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
OPEN = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "object"}, {"type": "json_object"}),
        (CLOSED, {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": CLOSED}}),
        (OPEN, {"type": "json_schema", "json_schema": {"name": "answer", "schema": OPEN}}),
    ],
)
def test_a_schema_is_strict_where_it_can_be(schema: Any, expected: Any) -> None:
    assert sent("openai", outgoing(schema=json.dumps(schema)))["response_format"] == expected


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        (CLOSED, True),
        (OPEN, False),
        ({**CLOSED, "required": []}, False),
        ({**CLOSED, "properties": {"a": OPEN}}, False),
        ({**CLOSED, "properties": {"a": {"type": "array", "items": CLOSED}}}, True),
        ({**CLOSED, "properties": {"a": {"type": "array", "items": OPEN}}}, False),
        ({**CLOSED, "properties": {"a": {"anyOf": [CLOSED, OPEN]}}}, False),
        ({**CLOSED, "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": OPEN}}, False),
        ({**CLOSED, "properties": {"type": CLOSED}, "required": ["type"]}, True),
        ({**CLOSED, "properties": {"type": OPEN}, "required": ["type"]}, False),
        (True, False),
        ([], False),
        ({"anyOf": "no"}, False),
        ({"properties": 5, "additionalProperties": False}, False),
        ({**CLOSED, "required": [{}, "a"]}, True),
    ],
)
def test_which_schemas_openai_takes_as_strict(schema: Any, strict: bool) -> None:
    assert is_strict(schema) == strict


# ---- Anthropic ----


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("claude-3-5-sonnet-20241022", {"temperature": 0.0}),
        ("claude-opus-4-20250514", {"temperature": 0.0}),
        ("claude-sonnet-4-5", {"temperature": 0.0}),
        ("claude-opus-4-6", {"temperature": 0.0}),
        ("claude-opus-4-7", {}),
        ("claude-haiku-5-5", {}),
        ("claude-opus-5", {}),
        ("claude-of-tomorrow", {}),
    ],
)
def test_sampling_goes_to_models_that_take_it(model: str, expected: Any) -> None:
    request = sent("anthropic", outgoing(model=model, seed=1, **SAMPLING))
    known = {"model", "max_tokens", "messages", "stream"}
    assert {name: value for name, value in request.items() if name not in known} == expected


def test_effort_and_thinking() -> None:
    request = sent("anthropic", outgoing(model="claude-opus-4-7", reasoning_effort="high", temperature=0.2))
    assert (request["output_config"], request["thinking"]) == ({"effort": "high"}, {"type": "adaptive"})
    assert "temperature" not in request
    request = sent("anthropic", outgoing(model="claude-opus-4-7", reasoning_effort="none"))
    assert "thinking" not in request
    forced = outgoing(model="claude-opus-4-7", reasoning_effort="high", tools=('{"name":"f"}',), must_call="f")
    assert "thinking" not in sent("anthropic", forced), "a call that must be made goes with no thinking"
    assert "output_config" not in sent("anthropic", outgoing(model="claude-sonnet-4-5", reasoning_effort="high"))


def test_a_plain_schema_is_enforced_by_the_api() -> None:
    request = sent("anthropic", outgoing(model="claude-opus-4-7", schema=json.dumps(OPEN), reasoning_effort="low"))
    assert request["output_config"] == {"effort": "low", "format": {"type": "json_schema", "schema": CLOSED}}
    assert "tools" not in request


@pytest.mark.parametrize("model", ["claude-sonnet-4-0", "claude-opus-4-7"])
@pytest.mark.parametrize("tools", [(), ('{"name":"f"}',)])
def test_any_other_schema_is_a_tool_that_has_to_be_called(model: str, tools: tuple[str, ...]) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}}
    asked = outgoing(model=model, schema=json.dumps(schema), tools=tools, reasoning_effort="high")
    assert by_tool(asked)
    request = sent("anthropic", asked)
    assert request["tools"][-1]["input_schema"] == schema
    forced = {"type": "tool", "name": ANSWER, "disable_parallel_tool_use": True}
    assert request["tool_choice"] == ({"type": "any"} if tools else forced)
    assert "thinking" not in request


def test_a_call_that_must_be_made_goes_before_a_schema() -> None:
    asked = outgoing(model="claude-opus-4-7", schema=json.dumps(OPEN), tools=('{"name":"f"}',), must_call="")
    request = sent("anthropic", asked)
    assert not by_tool(asked)
    assert (request["tool_choice"], "output_config" in request) == ({"type": "any"}, False)


def test_one_call_at_a_time() -> None:
    request = sent("anthropic", outgoing(model="claude-opus-4-7", tools=('{"name":"f"}',), one_call=True))
    assert request["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}


@pytest.mark.parametrize(
    ("request_of", "param"),
    [
        (outgoing(Turn(role="assistant", content="x"), model="claude"), "messages"),
        (outgoing(Turn(role="system", content="x"), model="claude"), "messages"),
        (outgoing(Turn(role="user", content=" \n"), model="claude"), "messages"),
        (outgoing(model="claude", stop=("\n",)), "stop"),
        (outgoing(model="claude-2-1", schema='{"type": "array"}'), "response_format"),
        (
            outgoing(
                Turn(role="user", content="x"),
                Turn(role="assistant", content="", calls=(Called(id="a", name="f", arguments="{"),)),
                model="claude",
            ),
            "messages",
        ),
    ],
)
def test_what_anthropic_cannot_be_asked_is_refused_before_it_is_sent(request_of: Outgoing, param: str) -> None:
    with pytest.raises(Refused) as caught:
        egress(provider("anthropic"), model=request_of.model).send(sealed(request_of))
    assert (caught.value.code, caught.value.param) == ("provider_refused", param)


@pytest.mark.parametrize(
    ("schema", "plain"),
    [
        (OPEN, True),
        (CLOSED, True),
        ({"type": "object"}, False),
        ({**OPEN, "additionalProperties": True}, False),
        ({**OPEN, "properties": {"a": {"type": "string", "minLength": 2}}}, False),
        ({**OPEN, "properties": {"a": {"$ref": "#"}}}, False),
        ({**OPEN, "properties": {"a": {"type": "array", "items": {"anyOf": [OPEN, {"const": 1}]}}}}, True),
        ({"anyOf": 5}, False),
        ({"properties": [], "type": "object"}, False),
        (False, False),
    ],
)
def test_which_schemas_anthropic_enforces(schema: Any, plain: bool) -> None:
    assert is_plain(schema) == plain
    if plain:
        assert is_strict({**closed(schema), "required": list(schema["properties"])}) or "anyOf" in str(schema)


# ---- any request ----

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
KEYWORDS = st.sampled_from(
    ["type", "properties", "required", "items", "anyOf", "additionalProperties", "$defs", "enum", "object"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS | TEXT, inner, max_size=4),
    max_leaves=10,
)


OBJECTS = st.dictionaries(st.sampled_from(["type", "properties", "items", "anyOf"]) | TEXT, VALUES, max_size=4)
CALLS = st.lists(st.builds(Called, id=TEXT, name=TEXT, arguments=TEXT | OBJECTS.map(json.dumps)), max_size=2)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
TURNS = st.lists(st.builds(Turn, role=ROLES, content=TEXT, calls=CALLS.map(tuple), call_id=TEXT), max_size=5)
MODELS = st.sampled_from(["claude-3-haiku", "claude-opus-4-7", "gpt-4o", "o3"]) | TEXT


@settings(max_examples=50)
@given(
    st.builds(
        Outgoing,
        model=MODELS,
        turns=TURNS.map(tuple),
        tools=st.lists(st.builds(lambda p: json.dumps({"name": "f", "parameters": p}), OBJECTS), max_size=2).map(tuple),
        must_call=st.none() | st.sampled_from(["", "f"]),
        one_call=st.booleans(),
        schema=st.none() | OBJECTS.map(json.dumps),
        temperature=st.floats(0, 2),
        stop=st.lists(TEXT.filter(bool), max_size=2).map(tuple),
        reasoning_effort=st.none() | st.sampled_from(["none", "minimal", "low", "max"]),
    ),
    st.sampled_from(["openai", "anthropic", "openrouter", "compatible", "local"]),
)
def test_any_request_is_translated_or_refused(request_of: Outgoing, kind: str) -> None:
    try:
        found = sent(kind, request_of)
    except Refused as error:
        found = {"refused": error.param}
    if "refused" in found:
        assert kind == "anthropic"
        assert found["refused"] in ("messages", "stop", "response_format")
        return
    assert found["model"] == request_of.model
    assert found["stream"] is True
    assert found.get("max_tokens", found.get("max_completion_tokens")) == 4096


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_a_schema_that_is_too_deep_is_refused(kind: str) -> None:
    deep = json.dumps(OPEN)
    for _ in range(5000):
        deep = f'{{"type":"array","items":{deep}}}'
    request = outgoing(schema=deep, model="claude-opus-4-7")
    with pytest.raises(Refused, match="deep"):
        egress(provider(kind), model="claude-opus-4-7").send(sealed(request))
