"""Fields without effect: accepted and named, or refused where the node's policy says so."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.api import ignored
from agent.api.openai import ELSEWHERE, parse_chat, parse_embeddings, parse_text
from agent.api.openai.fields import MAX_NAMED
from agent.config import Api
from shared.errors import Refused

REFUSE = Api(unknown_fields="refuse")
HI = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}


def body(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [HI], **more}).encode()


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"wibble": 1}, "wibble"),
    ({"extra_body": {"top_k": 1}}, "extra_body"),
    ({"guided_json": {}}, "guided_json"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"response_format": {**SCHEMA, "x": 1}}, "response_format.x"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
        "response_format.json_schema.x",
    ),
    ({"tools": [{**FUNCTION, "x": 1}]}, "tools[0].x"),
    ({"tools": [FUNCTION, {"type": "function", "function": {"name": "g", "x": 1}}]}, "tools[1].function.x"),
    ({"messages": [HI, {**HI, "wibble": 0}]}, "messages[1].wibble"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]}, "messages[0].content[0].y"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}, "z": 1}]}]},
        "messages[0].tool_calls[0].z",
    ),
]


@pytest.mark.parametrize(("more", "path"), UNKNOWN)
def test_an_unknown_field_is_named_or_refused(more: dict[str, Any], path: str) -> None:
    listed = path.translate(str.maketrans("", "", "0123456789"))
    assert parse_chat(body(**more)).ignored == (listed,)
    with pytest.raises(Refused) as caught:
        parse_chat(body(**more), REFUSE)
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", path)


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_well_known_fields_without_effect_are_accepted_and_listed_unless_neutral(name: str) -> None:
    plain = parse_chat(body())
    for policy in (Api(), REFUSE):
        request = parse_chat(body(**{name: {"other": 1}}), policy)
        assert (request.generate, request.ignored) == (plain.generate, (name,))
        for neutral in (None, *ELSEWHERE[name]):
            assert parse_chat(body(**{name: neutral}), policy) == plain


def test_other_endpoints_name_them_too() -> None:
    found = parse_text(b'{"model": "m", "prompt": "p", "wibble": 1, "num_ctx": 1}')
    assert found.ignored == ("wibble", "num_ctx")
    assert parse_embeddings(b'{"model": "m", "input": "x", "n": 2, "keep_alive": -1}').ignored == ("n", "keep_alive")
    with pytest.raises(Refused, match="wibble"):
        parse_embeddings(b'{"model": "m", "input": "x", "wibble": 2}', REFUSE)


def test_strict_reaches_the_engine() -> None:
    assert [parse_chat(body(), policy).generate.strict for policy in (Api(), Api(strict=True))] == [False, True]


def test_a_name_repeated_in_a_list_is_given_once() -> None:
    many = [{**HI, "a": 1, "b": 2}] * 50
    assert parse_chat(body(messages=many)).ignored == ("messages[].a", "messages[].b")


def test_an_empty_extra_of_a_message_is_no_field() -> None:
    empty: list[dict[str, Any]] = [{**HI, "attachments": [], "sender": None}]
    assert parse_chat(body(messages=empty), REFUSE) == parse_chat(body())


def test_the_number_of_names_is_bounded() -> None:
    assert len(parse_chat(body(**{f"x{n}": 1 for n in range(500)})).ignored) == MAX_NAMED


names = st.lists(st.text(max_size=200), max_size=200)


@settings(deadline=None)
@given(names)
def test_the_header_is_bounded_and_safe_whatever_the_names(found: list[str]) -> None:
    made = ignored.header(found)
    assert set(made) <= {"X-Mlxrack-Ignored"}
    for value in made.values():
        assert len(value) <= ignored.MAX_HEADER_CHARS + 20
        assert value.isascii()
        assert value.isprintable()


def test_the_header_counts_what_it_leaves_out() -> None:
    assert ignored.header([]) == {}
    assert ignored.header(["a", "b\r\nSet-Cookie: x", "a"]) == {"X-Mlxrack-Ignored": "a, b??Set-Cookie??x"}
    value = ignored.header(f"field_{n:03}" for n in range(100))["X-Mlxrack-Ignored"]
    shown = value.split(", ")
    assert shown[-1] == f"+{100 - len(shown) + 1} more"


def test_a_name_is_logged_once_and_only_if_it_looks_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(ignored.log, "info", lambda event, *, fields, **_: written.extend(fields))
    logged: set[str] = set()
    for _ in range(3):
        ignored.log_once(["num_ctx", "messages[].wibble", "messages[].content[].y", "9f3a", "My Name", "ключ"], logged)
    assert sorted(written) == ["messages[].content[].y", "messages[].wibble", "num_ctx", "other"]
    ignored.log_once([f"{chr(97 + n % 26)}{'x' * (n // 26)}" for n in range(900)], logged)
    assert len(logged) == ignored.MAX_LOGGED
