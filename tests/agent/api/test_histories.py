"""Conversations as clients hold them: what other servers added is accepted, and every refusal is documented."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ParsedChatCompletionMessage

from agent.api.openai import parse_chat, parse_embeddings, parse_text
from agent.config import Api
from agent.wire.frames import Message, ToolCall, decode, encode
from shared.errors import Refused

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = ToolCall(id="c1", name="f", arguments="{}")
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "4"}


def parse(*turns: Any, policy: Api | None = None) -> tuple[Message, ...]:
    body = json.dumps({"model": "m", "messages": turns}).encode()
    return parse_chat(body, policy or Api(unknown_fields="refuse")).generate.messages


def assistant(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", **more}


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (assistant(), {}),
        (assistant(content=None), {}),
        (assistant(content=[]), {}),
        (
            assistant(content="x", tool_calls=[], function_call=None, audio=None, refusal=None, images=[]),
            {"content": "x"},
        ),
        (assistant(content=None, refusal="no"), {"content": "no"}),
        (assistant(content="x", parsed={"a": 1}, annotations=[{"type": "url_citation"}]), {"content": "x"}),
        (assistant(content="x", id="msg_1", timestamp=1.5, index=0, type="message", status="done"), {"content": "x"}),
        (assistant(content="x", provider_specific_fields={"a": 1}, is_error=False, usage={}), {"content": "x"}),
        (assistant(content="x", reasoning_content="hm"), {"content": "x", "reasoning": "hm"}),
        (assistant(content="x", reasoning="hm"), {"content": "x", "reasoning": "hm"}),
        (assistant(content="x", thinking="hm"), {"content": "x", "reasoning": "hm"}),
        (assistant(content="x", reasoning_content="a", reasoning="b"), {"content": "x", "reasoning": "a"}),
        (assistant(content="x", reasoning_content="", reasoning="b"), {"content": "x", "reasoning": "b"}),
        (assistant(content="x", reasoning={"effort": "low"}), {"content": "x"}),
        (
            assistant(content="x", reasoning="b", reasoning_details=[{"type": "reasoning.text", "text": "b"}]),
            {"content": "x", "reasoning": "b"},
        ),
        (
            assistant(content="x", reasoning_content="a", thinking_blocks=[{"type": "thinking", "thinking": "a"}]),
            {"content": "x", "reasoning": "a"},
        ),
        (
            assistant(content=[{"type": "thinking", "thinking": "a", "signature": "s"}, {"type": "text", "text": "x"}]),
            {"content": "x", "reasoning": "a"},
        ),
        (assistant(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}]), {"reasoning": "a"}),
        (
            assistant(content=[{"type": "reasoning", "text": "a"}, {"type": "output_text", "text": "x"}]),
            {"content": "x", "reasoning": "a"},
        ),
        (
            assistant(content=[{"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]}]),
            {"reasoning": "a"},
        ),
        (
            assistant(content=[{"type": "redacted_thinking", "data": "x"}, {"type": "refusal", "refusal": "no"}]),
            {"content": "no"},
        ),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b", "id": 1}]},
            {"role": "user", "content": "ab"},
        ),
        (assistant(tool_calls=[CALL], content=None), {"calls": (CALLED,)}),
        (
            assistant(tool_calls=[{**CALL, "index": 0, "extra_content": {"google": {}}, "type": None}]),
            {"calls": (CALLED,)},
        ),
        (
            assistant(
                tool_calls=[{"id": "c1", "function": {"name": "f", "arguments": {"ü": [1]}, "parsed_arguments": {}}}]
            ),
            {"calls": (ToolCall(id="c1", name="f", arguments='{"ü": [1]}'),)},
        ),
        (
            assistant(tool_calls=[{"id": "c1", "function": {"name": "f", "arguments": None}}]),
            {"calls": (ToolCall(id="c1", name="f", arguments=""),)},
        ),
        (
            assistant(function_call={"name": "f", "arguments": "{}"}),
            {"calls": (ToolCall(id="call_1_0", name="f", arguments="{}"),)},
        ),
    ],
)
def test_an_answer_of_any_server_is_accepted_in_a_history(turn: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parse(USER, turn)[1] == Message(**{"role": "assistant", "content": "", **expected})


def test_results_find_their_calls() -> None:
    two = assistant(tool_calls=[CALL, {"function": {"name": "g", "arguments": "{}"}}])
    results = [{"role": "tool", "content": one} for one in ("first", "second")]
    assert [m.call_id for m in parse(USER, two, *results)] == ["", "", "c1", "call_1_1"]
    assert [m.call_id for m in parse(USER, two, RESULT, results[1])] == ["", "", "c1", "call_1_1"]
    old = assistant(content=None, function_call={"name": "f", "arguments": "{}"})
    old_result = {"role": "function", "name": "f", "content": "4"}
    assert parse(USER, old, old_result)[2] == Message(role="tool", content="4", call_id="call_1_0")
    twice = parse(USER, old, old_result, old, old_result)
    assert [m.call_id for m in twice if m.role == "tool"] == ["call_1_0", "call_3_0"]


def test_calls_that_share_an_id_are_answered_in_order() -> None:
    """Some servers number the calls of each turn anew, or name them like their function."""

    def turn(*names: str) -> dict[str, Any]:
        calls = [{"id": "x", "type": "function", "function": {"name": name, "arguments": "{}"}} for name in names]
        return {"role": "assistant", "tool_calls": calls}

    result = {"role": "tool", "tool_call_id": "x", "content": "4"}
    found = parse(USER, turn("f", "g"), result, result, turn("h"), result, USER, turn("i"), result, result)
    ids = {call.name: call.id for message in found for call in message.calls}
    assert len(set(ids.values())) == 4
    answered = [ids["f"], ids["g"], ids["h"], ids["i"], "x"]
    assert [message.call_id for message in found if message.role == "tool"] == answered


def test_the_official_client_s_own_messages_are_accepted() -> None:
    """Every field of the client's message objects, as a history holds them, with what this server adds."""
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
    message = assistant(content="x", refusal=None, tool_calls=[CALL], reasoning_content="hm", reasoning="hm")
    whole = ChatCompletion.model_validate(
        {
            "id": "a",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{**choice, "message": message}],
        }
    )
    call = {**CALL, "function": {**CALL["function"], "parsed_arguments": {"a": 1}}}  # type: ignore[dict-item]
    parsed = ParsedChatCompletionMessage[Any].model_validate({**message, "tool_calls": [call], "parsed": {"a": 1}})
    for one in (whole.choices[0].message, parsed):
        for more in ({}, {"exclude_none": True}, {"exclude_unset": True}):
            _, said, _ = parse(USER, one.model_dump(**more), RESULT)  # type: ignore[arg-type]
            assert said == Message(role="assistant", content="x", reasoning="hm", calls=(CALLED,))


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        *(
            ({"role": role, "content": [{"type": "text", "text": "x"}, part]}, "messages[1].content[1].type")
            for role in ("user", "assistant", "system")
            for part in (
                {"type": "image_url", "image_url": {"url": "data:"}},
                {"type": "input_image", "image_url": "data:"},
                {"type": "image", "source": {}},
                {"type": "input_audio", "input_audio": {}},
                {"type": "audio_url", "audio_url": {}},
                {"type": "video_url", "video_url": {}},
                {"type": "file", "file": {}},
                {"type": "input_file", "file_id": "x"},
                {"type": "document", "source": {}},
                {"type": ["text"]},
                {},
                5,
            )
        ),
        (assistant(audio={"id": "audio_1"}), "messages[1].audio"),
        ({**USER, "images": ["aGk="]}, "messages[1].images"),
    ],
)
def test_what_is_not_text_is_refused_by_name(turn: Any, param: str) -> None:
    with pytest.raises(
        Refused, match=r"this service reads text, no images, audio or files \(docs/models.md\)"
    ) as caught:
        parse(USER, turn)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[1].tool_call_id"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "messages[1].tool_call_id"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[1].tool_call_id"),
        ({**USER, "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({**USER, "function_call": {"name": "f"}}, "messages[1].function_call"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": {"type": "text"}}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "system"}, "messages[1].content"),
        (assistant(content=5), "messages[1].content"),
        (assistant(refusal=5), "messages[1].refusal"),
        (assistant(content="x", reasoning_content=5), "messages[1].reasoning_content"),
        (assistant(tool_calls={}), "messages[1].tool_calls"),
        (assistant(tool_calls=[5]), "messages[1].tool_calls[0]"),
        (assistant(tool_calls=[{"id": 5, "function": {"name": "f"}}]), "messages[1].tool_calls[0]"),
        (assistant(tool_calls=[{"function": {"arguments": "{}"}}]), "messages[1].tool_calls[0]"),
        (assistant(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]), "messages[1].tool_calls[0]"),
        (assistant(tool_calls=[{**CALL, "type": "custom"}]), "messages[1].tool_calls[0].type"),
        (assistant(function_call="f"), "messages[1].function_call"),
    ],
)
def test_a_wrong_type_or_meaning_is_named(turn: Any, param: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(USER, turn)
    assert caught.value.param == param
    assert documented(caught.value)


def causes() -> set[tuple[str, str]]:
    """(code, field) of every cause of a 400 on the page."""
    table = PAGE.read_text(encoding="utf-8").split("### Every cause of a 400")[1].split("\n\n")[2]
    rows = [re.findall(r"`([^`]+)`", cell) for line in table.splitlines() for cell in line.split("|")[1:3]]
    return {
        (code[0], name) for code, fields in zip(rows[::2], rows[1::2], strict=True) if code for name in fields or [""]
    }


CAUSES = causes()


def documented(error: Refused) -> bool:
    """Whether docs/api.md lists this refusal."""
    return error.code == "unknown_parameter" or (error.code, re.sub(r"\[\d+\]", "[]", error.param or "")) in CAUSES


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
ECHOES = ("reasoning", "thinking", "parsed", "annotations", "id", "wibble")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def objects(**known: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with any of these fields."""
    return st.fixed_dictionaries({}, optional=known)


text = st.text(max_size=5)
functions = st.fixed_dictionaries(
    {"name": st.just("f")}, optional={"arguments": st.none() | text | objects(a=anything)}
)
calls = st.fixed_dictionaries(
    {"function": functions}, optional={"id": text, "type": st.just("function"), "x": anything}
)
kinds = st.sampled_from(("text", "input_text", "output_text", "refusal", "thinking", "reasoning"))
parts = st.builds(
    lambda kind, said, more: {"type": kind, kind: said, "text": said, **more}, kinds, text, objects(id=text)
)
own = dict.fromkeys(("refusal", "name", "reasoning_content", "tool_call_id"), text)
added = objects(**dict.fromkeys(ECHOES, anything), **own)
turns = st.builds(
    lambda role, said, called, more: {"role": role, "content": said, **more} | (called if role == "assistant" else {}),
    st.sampled_from(ROLES),
    text | st.lists(parts, min_size=1, max_size=3),
    objects(tool_calls=st.lists(calls, max_size=2), function_call=functions, content=st.none() | st.just([])),
    added,
)
broken = st.builds(
    lambda turn, name, value: {**turn, name: value},
    turns,
    st.sampled_from(
        ("role", "content", "tool_calls", "tool_call_id", "function_call", "audio", "images", "refusal", "name")
    ),
    anything,
)
plain_turns = st.builds(
    lambda role, more: {"role": role, "content": "", **more},
    st.sampled_from(("system", "user", "assistant")),
    st.dictionaries(st.sampled_from((*ECHOES, "x", "y")), anything, max_size=3),
)
fields = (
    *(
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "n_predict",
        "n",
        "top_p",
    ),
    *("top_k", "min_p", "temperature", "seed", "stop", "logprobs", "top_logprobs", "frequency_penalty", "logit_bias"),
    *("presence_penalty", "repetition_penalty", "repeat_penalty", "repeat_last_n", "repetition_context_size"),
    *("ignore_eos", "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort", "timings"),
    *("chat_template_kwargs", "functions", "function_call", "audio", "modalities", "verbosity", "thinking", "wibble"),
    *("prompt", "echo", "suffix", "best_of", "input", "encoding_format", "dimensions"),
)
bodies = st.dictionaries(st.sampled_from(fields) | st.text(max_size=9), anything, max_size=8)
policies = st.builds(Api, unknown_fields=st.sampled_from(("ignore", "refuse")), strict=st.booleans())


def tried(parser: Any, body: dict[str, Any], policy: Api) -> tuple[Any, Refused | None]:
    """The parsed request, or its refusal."""
    try:
        return parser(json.dumps(body).encode(), policy), None
    except Refused as error:
        return None, error


@settings(max_examples=300, deadline=None)
@given(st.lists(turns, max_size=4) | st.lists(turns | broken | anything, max_size=4), policies)
def test_any_history_is_accepted_or_refused_for_a_documented_cause(history: list[Any], policy: Api) -> None:
    request, refusal = tried(parse_chat, {"model": "m", "messages": history}, policy)
    assert refusal is None or documented(refusal), (refusal.code, refusal.param)
    if request is not None:
        generate = request.generate
        assert decode(encode(generate)) == generate, "it reaches a worker as it is"
        assert len(generate.messages) == len(history)
        assert all(m.call_id for m in generate.messages if m.role == "tool")
        assert all(call.id for m in generate.messages for call in m.calls)


@settings(deadline=None)
@given(st.lists(plain_turns, min_size=1, max_size=5))
def test_what_clients_add_to_a_message_never_refuses_it(history: list[Any]) -> None:
    parse(*history, policy=Api())


@settings(max_examples=300, deadline=None)
@given(bodies, policies, st.booleans())
def test_any_body_is_accepted_or_refused_for_a_documented_cause(body: dict[str, Any], policy: Api, valid: bool) -> None:
    base: dict[str, Any] = {"model": "m", "messages": [USER], "prompt": "p", "input": "x"} if valid else {}
    for parser in (parse_chat, parse_text, parse_embeddings):
        _, refusal = tried(parser, body | base, policy)
        assert refusal is None or documented(refusal), (refusal.code, refusal.param)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_accepted_or_refused(raw: bytes) -> None:
    with contextlib.suppress(Refused):
        parse_chat(raw)
