"""The OpenAI API: accepted requests, rejections that name the field, and response shapes."""

import base64
import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api import answers, openai
from agent.api.openai import parse_chat, parse_embeddings, parse_text
from agent.wire.frames import Candidate, Done, Scored, ToolCall
from shared.errors import Refused

BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "h", "strict": True}},
]
NO_TOOL = {"type": "function", "function": None}
PART = {"type": "text", "text": "x"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def parse(**more: Any) -> openai.AnswerRequest:
    return parse_chat(json.dumps({**BASE, **more}).encode())


def test_defaults() -> None:
    request = parse()
    assert (
        request.stream,
        request.generate.max_tokens,
        request.generate.temperature,
        request.generate.top_p,
        request.seed,
        request.generate.stop,
    ) == (False, None, 1.0, 1.0, None, ())


def test_all_supported_fields_are_accepted() -> None:
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
        request.generate.max_tokens,
        request.generate.temperature,
        request.generate.top_p,
        request.seed,
        request.generate.stop,
    ) == (True, True, 5, 0.0, 0.5, -3, ("a", "b"))


def test_max_completion_tokens_overrides_max_tokens() -> None:
    assert parse(max_completion_tokens=7, max_tokens=9).generate.max_tokens == 7


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(messages=[{"role": "developer", "content": "d"}, {"role": "user", "content": parts}])
    assert [(m.role, m.content) for m in request.generate.messages] == [("system", "d"), ("user", "ab")]


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
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "furious"}, "reasoning_effort"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "x" * 5000}}, "chat_template_kwargs"),
        ({"timings": "yes"}, "timings"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "x"}}]}, "tools[0].function.strict"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"function": None}]},
                },
            },
            "tool_choice",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"x-guidance": {}}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * (300 << 10)]}}}},
            "response_format.json_schema.schema",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
        ({"messages": [BASE["messages"][0]] * 10_001}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": "much"}, "presence_penalty"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"n_predict": 1.5}, "n_predict"),
        ({"max_completion_tokens": 5, "max_tokens": "5"}, "max_tokens"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": False}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": "0"}, "min_p"),
        ({"repetition_penalty": 0.01}, "repetition_penalty"),
        ({"repetition_penalty": False}, "repetition_penalty"),
        ({"repeat_penalty": -1}, "repeat_penalty"),
        ({"repeat_last_n": -2}, "repeat_last_n"),
        ({"repetition_context_size": "all"}, "repetition_context_size"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"response_format": {"type": "json_schema", "schema": 5}}, "response_format.schema"),
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
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
    ],
)
def test_an_invalid_field_is_named(more: dict[str, Any], param: str | None) -> None:
    with pytest.raises(Refused) as caught:
        parse(**more)
    assert param == caught.value.param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff", b"[" * 100_000])
def test_a_body_that_is_not_a_json_object_is_rejected(body: bytes) -> None:
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
def test_any_body_is_either_accepted_or_rejected(more: dict[str, Any]) -> None:
    with contextlib.suppress(Refused):
        assert parse(**more).generate.model == "m"


def test_messages_never_quote_values() -> None:
    with pytest.raises(Refused) as caught:
        parse(messages=[{"role": "MARKER", "content": "MARKER"}], temperature="MARKER")
    assert "MARKER" not in caught.value.message


def test_optional_fields_are_accepted() -> None:
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
    asked = request.generate
    assert (request.n, asked.logprobs, asked.frequency_penalty, asked.presence_penalty) == (3, 2, 0.5, -1.0)
    assert asked.logit_bias == ((3, 5.5), (7, -100.0))
    assert asked.schema is not None
    assert schema == json.loads(asked.schema)
    assert parse(logprobs=True).generate.logprobs == 0
    assert parse(response_format={"type": "json_object"}).generate.schema == '{"type": "object"}'
    asked = parse(reasoning_effort="low", chat_template_kwargs={"a": 1}, timings=True).generate
    assert (asked.reasoning_effort, asked.template_args) == ("low", '{"a": 1}')
    assert parse() == parse(response_format={"type": "text"}, n=1, logprobs=False, top_logprobs=0, logit_bias={})


@pytest.mark.parametrize(
    ("choice", "names", "must_call"),
    [
        (None, ["f", "h"], None),
        ("auto", ["f", "h"], None),
        ("none", [], None),
        ("required", ["f", "h"], ""),
        ({"type": "function", "function": {"name": "h"}}, ["f", "h"], "h"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOLS[1]]}}, ["h"], ""),
    ],
)
def test_tools_and_tool_choice(choice: Any, names: list[str], must_call: str | None) -> None:
    asked = parse(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).generate
    assert (names, must_call) == ([json.loads(tool)["name"] for tool in asked.tools], asked.must_call)
    assert asked.one_call == bool(names)


def test_a_conversation_with_tool_calls_is_parsed() -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "4"}]},
    ]
    _, called, result = parse(messages=turns).generate.messages
    assert (called.content, called.reasoning, called.calls) == (
        "",
        "hm",
        (ToolCall(id="c1", name="f", arguments="{}"),),
    )
    assert (result.role, result.content, result.call_id) == ("tool", "4", "c1")


@pytest.mark.parametrize(
    ("turn", "content"),
    [
        ({"role": "assistant", "content": None, "refusal": "no"}, "no"),
        ({"role": "assistant", "content": [], "tool_calls": [CALL]}, ""),
        ({"role": "tool", "tool_call_id": "c1", "content": None}, ""),
        ({"role": "tool", "tool_call_id": "c1", "content": []}, ""),
        ({"role": "assistant", "content": "x", "annotations": [{"type": "url"}], "audio": None}, "x"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "e"}}], "name": "n"},
            "x",
        ),
    ],
)
def test_histories_as_clients_return_them_are_accepted(turn: dict[str, Any], content: str) -> None:
    assert parse(messages=[*BASE["messages"], turn]).generate.messages[1].content == content


@pytest.mark.parametrize("field", ["chat_template_kwargs", "response_format", "tools", "metadata"])
def test_excessive_nesting_is_rejected(field: str) -> None:
    body = b'{"model": "m", "%s": %s}' % (field.encode(), b'{"a": ' * 900 + b"1" + b"}" * 900)
    with pytest.raises(Refused) as caught:
        parse_chat(body)
    assert caught.value.code == "invalid_json"


def test_text_offsets_continue_across_streamed_chunks() -> None:
    scored = [Scored(chosen=Candidate(text=t, raw=t.encode(), logprob=-1.0)) for t in ("ab", "c")]
    found = answers.text_logprobs(scored, 5)
    assert found is not None
    assert found["text_offset"] == [5, 7]


def test_tool_calls_are_sent_whole_and_as_deltas() -> None:
    call = ToolCall(id="c1", name="f", arguments='{"a": 1}')
    who = answers.Identity(answer_id="x", created=1, model="m", fingerprint="fp")
    choice = answers.Choice(index=0, text="", finish="tool_calls", reasoning="hm", calls=(call,))
    usage = answers.Usage(prompt_tok=5, cached_tok=2, completion_tok=4, reasoning_tok=1)
    whole = answers.chat_completion(who, [choice], usage)
    message = whole["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (None, "hm")
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}
    first, second = (delta["tool_calls"][0] for delta in answers.call_deltas(call, 3))
    assert (first["index"], second["index"], first["id"], first["function"]["name"]) == (3, 3, "c1", "f")
    assert first["function"]["arguments"] + second["function"]["arguments"] == '{"a": 1}'


def test_timings_include_rates() -> None:
    done = Done(
        id=1,
        finish="stop",
        prompt_tok=110,
        cached_tok=10,
        completion_tok=21,
        queue_us=1500,
        prefill_us=200_000,
        decode_us=1_000_000,
    )
    found = answers.timings(done)
    assert (found["queue_ms"], found["prompt_n"], found["cached_n"]) == (1.5, 100, 10)
    assert (found["prompt_per_second"], found["predicted_per_second"]) == (500.0, 20.0)
    assert (
        answers.timings(Done(id=1, finish="stop", prompt_tok=1, cached_tok=0, completion_tok=0))["predicted_per_second"]
        is None
    )


def embed(**more: Any) -> openai.EmbedRequest:
    return parse_embeddings(json.dumps({"model": "m", "input": "x", **more}).encode())


def test_embedding_input_accepts_four_shapes() -> None:
    assert embed().embed.inputs == ("x",)
    assert embed(input=["x", "y"]).embed.inputs == ("x", "y")
    assert embed(input=[1, 2]).embed.inputs == ((1, 2),)
    assert embed(input=[[1], [2, 3]]).embed.inputs == ((1,), (2, 3))
    assert (embed(encoding_format="base64").base64, embed(user="u").base64) == (True, False)
    assert (embed().embed.dimensions, embed(dimensions=8).embed.dimensions) == (None, 8)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": ""}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": [1, "x"]}, "input[0]"),
        ({"input": [-1]}, "input[0]"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": 5}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_an_invalid_embeddings_field_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        embed(**more)
    assert param == caught.value.param


def test_vectors_are_encoded_as_floats_or_base64() -> None:
    raw = struct.pack("<2f", 0.5, -1.0)
    numbers = answers.embeddings("m", [raw], 3, base64=False)
    assert (numbers["data"][0]["embedding"], numbers["usage"]["total_tokens"]) == ([0.5, -1.0], 3)
    written = answers.embeddings("m", [raw], 3, base64=True)["data"][0]["embedding"]
    assert raw == base64.b64decode(written)


def text(**more: Any) -> openai.AnswerRequest:
    return parse_text(json.dumps({"model": "m", "prompt": "p", **more}).encode())


def test_text_completions_are_parsed() -> None:
    assert (text().prompts, text().generate.max_tokens, text().generate.logprobs) == (("p",), 16, None)
    assert [text(max_tokens=one).generate.max_tokens for one in (-1, None, 3)] == [None, 16, 3]
    assert (text(prompt=["a", "b"], n=2).prompts, text(n=2).n, text(logprobs=5).generate.logprobs) == (("a", "b"), 2, 5)
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
def test_an_invalid_field_of_a_text_completion_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        text(**more)
    assert param == caught.value.param


def test_response_shapes_that_clients_parse() -> None:
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
