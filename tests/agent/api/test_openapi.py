"""The OpenAPI document says what the code does: its routes, its fields, their values."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from agent.api.app import build
from agent.api.context import DESCRIBED, Context
from agent.api.openai import parse_chat, parse_embeddings, parse_text
from agent.api.openapi import OPERATIONS, document
from agent.config import AgentConfig, Api, Live, Node
from shared.errors import Refused

TOOL = {"type": "function", "function": {"name": "f"}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True, "logprobs": True, "tools": [TOOL]}
KINDS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "ChatRequest": (parse_chat, CHAT),
    "TextRequest": (parse_text, {"model": "m", "prompt": "x", "stream": True}),
    "EmbeddingsRequest": (parse_embeddings, {"model": "m", "input": "x"}),
}
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        -2,
        3,
        17,
        20,
        21,
        0.5,
        -0.5,
        1.5,
        2.5,
        10.5,
        100,
        101,
        2**31,
        2**31 + 1,
        2**63 - 1,
    ),
    *("", "a", "none", "auto", "required", "low", "float", "base64", "medium", "a" * 256, "a" * 257),
    *([], ["a"], [""], ["a"] * 5, ["a"] * 17, [1], [-1], [[1]], [[]], [None], [True], [{}], [TOOL], ["text"]),
    *(
        {},
        {"5": 1},
        {"5": 101},
        {"5": True},
        {"x": 1},
        {"1234567890": 1},
        {"include_usage": True},
        {"include_usage": 1},
    ),
    *({"type": "text"}, {"type": "json_object"}, {"type": "yaml"}, {"type": 1}),
    *([{"role": "user", "content": "x"}], [{"role": "nobody", "content": "x"}], [{"content": "x"}], [{"role": "user"}]),
    *([{"role": "assistant", "content": None}], [{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
    *([{"role": "user", "content": 1}], [{"role": "user", "content": "x", "name": 1}]),
    *([{"type": "function"}], [{"function": {"name": "a b"}}], [{"function": {"name": "g", "parameters": 1}}]),
)
BEYOND_A_SCHEMA = {
    ("messages", '[{"role": "user"}]'),  # content may be absent in some roles only
    ("tool_choice", "{}"),  # which objects name a tool depends on the tools
    *(("tool_choice", json.dumps(value)) for value in VALUES if isinstance(value, dict)),
}


@pytest.fixture(scope="module")
def served() -> dict[str, Any]:
    parts: dict[str, Any] = dict.fromkeys(Context.__struct_fields__, SimpleNamespace(taints=None, allowances=None))
    app = build(Context(**{**parts, "live": Live(AgentConfig(node=Node(id="n1", rack="r")))}))
    found: dict[str, Any] = json.loads(app[DESCRIBED])
    routes = {(r.method, r.resource.canonical) for r in app.router.routes() if r.resource and r.method != "HEAD"}
    assert routes == set(OPERATIONS), "every route is told, and no other"
    assert {(method.upper(), path) for path, how in found["paths"].items() for method in how} == routes
    return found


def refused_field(parse: Callable[..., object], body: dict[str, Any], policy: Api) -> str:
    """The field that a parser objects to; "" for none."""
    try:
        parse(json.dumps(body).encode(), policy)
    except Refused as error:
        return (error.param or "?").split(".")[0].split("[")[0]
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_told_and_no_other(served: dict[str, Any], kind: str) -> None:
    parse, body = KINDS[kind]
    told = set(served["components"]["schemas"][kind]["properties"])
    policy = Api(unknown_fields="refuse")
    unknown = {name for name in told if refused_field(parse, {**body, name: None}, policy) not in ("", name)}
    assert unknown == set()
    everywhere = {name for one in KINDS for name in served["components"]["schemas"][one]["properties"]}
    for name in (everywhere | {"wibble", "Model", "max_token"}) - told:
        with pytest.raises(Refused) as refused:
            parse(json.dumps({**body, name: "x"}).encode(), policy)
        assert (refused.value.code, refused.value.param) == ("unknown_parameter", name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_accepted_where_its_schema_says_so_and_nowhere_else(served: dict[str, Any], kind: str) -> None:
    parse, body = KINDS[kind]
    checker = Draft202012Validator({"$ref": f"#/components/schemas/{kind}", "components": served["components"]})
    different = []
    for name in served["components"]["schemas"][kind]["properties"]:
        for value in VALUES:
            if (name, json.dumps(value)) in BEYOND_A_SCHEMA:
                continue
            tried = {**body, name: value}
            says = checker.is_valid(tried)
            field = refused_field(parse, tried, Api())
            # without tools, or a stream, another field objects: that is not what the schema is asked here
            if says != (field != name):
                different.append((name, value, "schema accepts" if says else "schema refuses", field))
    assert different == []


def test_required_fields_are(served: dict[str, Any]) -> None:
    for kind, (parse, body) in KINDS.items():
        for name in served["components"]["schemas"][kind]["required"]:
            rest = {key: value for key, value in body.items() if key != name}
            assert refused_field(parse, rest, Api()) == name


def test_references_lead_somewhere() -> None:
    text = json.dumps(made := document("1", OPERATIONS))
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names == set(made["components"]["schemas"])
