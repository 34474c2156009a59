"""The OpenAI wire: what is taken, what is refused by name, and what comes back."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import answers, openai
from agent.frames import Candidate, Scored
from agent.openai import parse_chat, parse_text
from shared.errors import Refused

BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parse(**more: Any) -> openai.AnswerRequest:
    return parse_chat(json.dumps({**BASE, **more}).encode())


def test_defaults() -> None:
    request = parse()
    assert (
        request.stream,
        request.max_tokens,
        request.temperature,
        request.top_p,
        request.seed,
        request.stop,
    ) == (False, None, 1.0, 1.0, None, ())


def test_everything_supported_is_taken() -> None:
    request = parse(
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=5,
        temperature=0,
        top_p=0.5,
        seed=-3,
        stop=["a", "b"],
    )
    assert (
        request.stream,
        request.include_usage,
        request.max_tokens,
        request.temperature,
        request.top_p,
        request.seed,
        request.stop,
    ) == (True, True, 5, 0.0, 0.5, -3, ("a", "b"))


def test_max_completion_tokens_goes_before_its_old_name() -> None:
    assert parse(max_completion_tokens=7, max_tokens=9).max_tokens == 7


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(messages=[{"role": "developer", "content": "d"}, {"role": "user", "content": parts}])
    assert [(m.role, m.content) for m in request.messages] == [("system", "d"), ("user", "ab")]


@pytest.mark.parametrize("name", sorted(openai.ADVISORY))
def test_advisory_fields_are_accepted(name: str) -> None:
    assert parse(**{name: "x"}) == parse()


@pytest.mark.parametrize(("name", "neutral"), [(n, v) for n, vs in openai.NEUTRAL.items() for v in (*vs, None)])
def test_neutral_values_of_unsupported_fields_are_accepted(name: str, neutral: Any) -> None:
    assert parse(**{name: neutral}) == parse()


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {"5": float("nan")}}, None),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": "much"}, "presence_penalty"),
        ({"wibble": 1}, "wibble"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
        ({"model": "x" * 300}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ],
)
def test_a_wrong_field_is_named(more: dict[str, Any], param: str | None) -> None:
    with pytest.raises(Refused) as caught:
        parse(**more)
    assert param == caught.value.param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        parse_chat(body)
    assert caught.value.code == "invalid_json"


@given(
    st.dictionaries(
        st.text(max_size=12),
        st.recursive(
            st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=9),
            lambda s: st.lists(s, max_size=3),
            max_leaves=4,
        ),
        max_size=5,
    )
)
def test_no_body_does_more_than_be_taken_or_refused(more: dict[str, Any]) -> None:
    with contextlib.suppress(Refused):
        assert parse(**more).model == "m"


def test_messages_never_quote_values() -> None:
    with pytest.raises(Refused) as caught:
        parse(messages=[{"role": "MARKER", "content": "MARKER"}], temperature="MARKER")
    assert "MARKER" not in caught.value.message


def test_further_fields_are_taken() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    request = parse(
        n=3,
        logprobs=True,
        top_logprobs=2,
        frequency_penalty=0.5,
        presence_penalty=-1,
        logit_bias={"7": -100, "3": 5.5},
        response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
    )
    assert (request.n, request.logprobs, request.frequency_penalty, request.presence_penalty) == (3, 2, 0.5, -1.0)
    assert request.logit_bias == ((3, 5.5), (7, -100.0))
    assert request.schema is not None
    assert schema == json.loads(request.schema)
    assert parse(logprobs=True).logprobs == 0
    assert parse(response_format={"type": "json_object"}).schema == '{"type": "object"}'
    assert parse() == parse(response_format={"type": "text"}, n=1, logprobs=False, top_logprobs=0, logit_bias={})


def text(**more: Any) -> openai.AnswerRequest:
    return parse_text(json.dumps({"model": "m", "prompt": "p", **more}).encode())


def test_text_completions_are_read() -> None:
    assert (text().prompts, text().max_tokens, text().logprobs) == (("p",), 16, None)
    assert (text(prompt=["a", "b"], n=2).prompts, text(n=2).n, text(logprobs=5).logprobs) == (("a", "b"), 2, 5)
    assert text() == text(echo=False, suffix=None, best_of=1)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 4}, "n"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_wrong_field_of_a_text_completion_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        text(**more)
    assert param == caught.value.param


def test_shapes_that_clients_parse() -> None:
    who = answers.Identity(answer_id="i", created=1, model="m", fingerprint="f")
    usage = answers.Usage(prompt_tok=3, cached_tok=1, completion_tok=2)
    scored = (Scored(chosen=Candidate(text="é", raw=b"\xc3\xa9", logprob=-0.5)),)
    choice = answers.Choice(index=0, text="t", finish="stop", scored=scored)
    whole = answers.chat_completion(who, [choice], usage)
    assert whole["usage"]["total_tokens"] == 5
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
    assert whole["choices"][0]["logprobs"]["content"][0]["bytes"] == [195, 169]
    assert (
        answers.chat_completion(who, [answers.Choice(index=0, text="", finish="stop")], usage)["choices"][0]["logprobs"]
        is None
    )
    last = answers.usage_chunk(who, "chat.completion.chunk", usage)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    plain = answers.text_completion(who, [choice], usage)
    assert plain["choices"][0]["logprobs"] == {
        "tokens": ["é"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{}],
        "text_offset": [0],
    }
