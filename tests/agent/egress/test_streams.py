"""Answers of providers as they come in, byte by byte: what is understood, and that nothing else is an answer."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.egress import anthropic_messages, openai_chat
from agent.egress.answers import Failure
from agent.egress.sse import MOST_EVENT_BYTES, Event, Events, Garbage
from agent.policy.outgoing import Called, End, Piece
from tests.fake_providers import (
    DONE,
    anthropic_chat,
    block,
    call_block,
    call_chunk,
    chunk,
    data,
    message_end,
    message_start,
    named,
    openai_calls,
    text_block,
    usage,
)
from tests.fake_providers import openai_chat as chat_of_openai

Readers = openai_chat.Reader | anthropic_messages.Reader


def read(reader: Readers, raw: Sequence[bytes]) -> tuple[str, str, tuple[Called, ...], End]:
    """What an answer says."""
    events, found = Events(), list[Piece | End]()
    for piece in raw:
        for event in events.feed(piece):
            if not reader.done:
                found += reader.take(event)
    if not reader.done:
        for event in events.feed(b"\n\n"):
            found += reader.take(event)
    *pieces, end = [*found, *reader.close()]
    assert isinstance(end, End)
    said = [one for one in pieces if isinstance(one, Piece)]
    calls = tuple(call for one in said for call in one.calls)
    return "".join(one.text for one in said), "".join(one.reasoning for one in said), calls, end


def openai() -> openai_chat.Reader:
    return openai_chat.Reader(lambda: "call_new")


def anthropic(*, by_tool: bool = False) -> anthropic_messages.Reader:
    return anthropic_messages.Reader(lambda: "call_new", answer_by_tool=by_tool)


# ---- events ----

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


@given(
    st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.booleans(),
)
def test_events_are_the_same_wherever_they_are_split(
    events: list[list[str]], end: str, sizes: list[int], bom: bool
) -> None:
    text = "".join(": comment" + end + "".join(f"data: {line}{end}" for line in lines) + end for lines in events)
    raw = b"\xef\xbb\xbf" * bom + text.encode()
    parser, found, at = Events(), list[Event](), 0
    for n in range(len(raw)):
        size = sizes[n % len(sizes)]
        found += parser.feed(raw[at : at + size])
        at += size
    assert found == [Event("", "\n".join(lines).encode()) for lines in events]
    assert Events().feed(raw) == found


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_garbage_never_breaks_the_parser_nor_a_reader(pieces: list[bytes]) -> None:
    for reader in (openai(), anthropic()):
        try:
            read(reader, pieces)
        except (Garbage, Failure):
            continue
        raise AssertionError("garbage was taken for an answer")


NAMES = "choices delta content tool_calls function arguments index id name finish_reason usage error type message"
FIELDS = st.sampled_from([*NAMES.split(), "content_block", "prompt_tokens", "input_tokens", "stop_reason", "text"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | FIELDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(st.lists(JSON, max_size=6), st.sampled_from([openai, anthropic]))
def test_any_json_is_an_answer_or_an_error_of_ours(values: list[Any], made: Callable[[], Readers]) -> None:
    try:
        _, _, calls, end = read(made(), [data(value) for value in values])
    except (Garbage, Failure):
        return
    assert end.finish in ("stop", "length", "tool_calls", "content_filter")
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
    assert all(n is None or n >= 0 for n in (end.prompt_tok, end.completion_tok, end.cached_tok, end.reasoning_tok))


@pytest.mark.parametrize("raw", [b"x" * 4096, b"data:\n" * 999, b"data: y\n" * 999])
def test_an_event_is_bounded(raw: bytes) -> None:
    parser, most = Events(), 0
    with pytest.raises(Garbage, match="1 MiB"):  # noqa: PT012
        for _ in range(3 * MOST_EVENT_BYTES // len(raw)):
            parser.feed(raw)
            most = max(most, len(parser._rest) + sum(map(len, parser._lines)))
    assert most <= MOST_EVENT_BYTES


# ---- OpenAI ----


def test_text_reasoning_and_usage() -> None:
    raw = [
        chunk({"role": "assistant", "reasoning": "thin"}),
        chunk({"reasoning_content": "king"}),
        chunk({"content": "Hel"}),
        b": OPENROUTER PROCESSING\n\n",
        chunk({"content": "lo"}),
        chunk(finish="stop"),
        usage(10, 7, cached=4, reasoning=5),
        DONE,
    ]
    end = End(finish="stop", prompt_tok=10, completion_tok=7, cached_tok=4, reasoning_tok=5)
    assert read(openai(), raw) == ("Hello", "thinking", (), end)


def test_parallel_calls_are_whole_and_in_order() -> None:
    calls = (("call_a", "weather", '{"city": "Köln", "days": 3}'), ("call_b", "clock", "{}"))
    _, _, found, end = read(openai(), openai_calls(*calls))
    assert [(one.id, one.name, one.arguments) for one in found] == list(calls)
    assert end.finish == "tool_calls"


CUT = [chunk({"content": "I call"}), call_chunk(0, call_id="c", name="f", arguments='{"a": 1}')]


@pytest.mark.parametrize(
    ("raw", "calls", "finish"),
    [
        ([*CUT, call_chunk(1, call_id="d", name="g", arguments='{"b": '), chunk(finish="length")], ["f"], "length"),
        ([*CUT, call_chunk(1, call_id="d", name="g"), chunk(finish="length")], ["f"], "length"),
        ([call_chunk(0, call_id="c", name="f", arguments='{"a": "unfinis'), chunk(finish="length")], [], "length"),
        ([*CUT, chunk(finish="content_filter")], [], "content_filter"),
        ([*CUT, chunk(finish="stop")], ["f"], "tool_calls"),
        ([call_chunk(0, call_id="c", name="f"), chunk(finish="tool_calls")], ["f"], "tool_calls"),
        ([chunk({"content": "x"}), chunk(finish="tool_calls")], [], "stop"),
    ],
)
def test_a_call_that_is_cut_is_dropped_and_never_guessed(raw: list[bytes], calls: list[str], finish: str) -> None:
    _, _, found, end = read(openai(), raw)
    assert ([one.name for one in found], end.finish) == (calls, finish)
    assert all(isinstance(json.loads(one.arguments), dict) for one in found)


@given(st.text(max_size=30), st.integers(0, 60))
def test_a_call_cut_anywhere_is_whole_or_gone(value: str, at: int) -> None:
    arguments = json.dumps({"a": value, "b": [1, {"c": None}]})
    raw = openai_calls(("id", "f", arguments))
    pieces = [*raw[: 2 + min(at, len(raw) - 5)], chunk(finish="length"), DONE]
    _, _, calls, end = read(openai(), pieces)
    assert end.finish == "length"
    assert [json.loads(one.arguments) for one in calls] in ([], [json.loads(arguments)])


@pytest.mark.parametrize(
    ("deltas", "names"),
    [
        # one index for all, as some servers have it; no index; arguments as an object; no id at all
        (
            [{"index": 0, "id": "a", "f": "x"}, {"index": 0, "id": "b", "f": "y"}, {"index": 0, "args": "{}"}],
            ["x", "y"],
        ),
        ([{"id": "a", "f": "x"}, {"id": "b", "f": "y"}], ["x", "y"]),
        ([{"index": 0, "id": "a", "f": "x", "args": {"k": 1}}], ["x"]),
        ([{"index": 0, "f": "x"}, {"index": 1, "f": "y"}], ["x", "y"]),
    ],
)
def test_calls_as_compatible_servers_send_them(deltas: list[dict[str, Any]], names: list[str]) -> None:
    raw = []
    for one in deltas:
        function = {**({"name": one["f"]} if "f" in one else {}), "arguments": one.get("args", "")}
        raw.append(chunk({"tool_calls": [{**{k: one[k] for k in ("index", "id") if k in one}, "function": function}]}))
    _, _, calls, _ = read(openai(), [*raw, chunk(finish="tool_calls"), DONE])
    assert [one.name for one in calls] == names
    assert all(one.id for one in calls)


LIES = {
    "no finish": [chunk({"content": "x"}), DONE],
    "nothing": [],
    "only done": [DONE],
    "breaks off": [chunk({"content": "x"})],
    "not JSON": [data(b"<html>")],
    "half JSON": [b'data: {"choices": [{"index"\n\n'],
    "not an object": [data([1])],
    "content is a number": [chunk({"content": 5}), chunk(finish="stop")],
    "unknown finish": [chunk(finish="because")],
    "two answers": [chunk(choices=[{"index": n, "delta": {"content": "x"}, "finish_reason": "stop"} for n in (0, 1)])],
    "another answer": [data({"choices": [{"index": 1, "delta": {"content": "x"}, "finish_reason": "stop"}]})],
    "more after the end": [chunk({"content": "x"}), chunk(finish="stop"), chunk({"content": "y"})],
    "a call after the end": [chunk(finish="stop"), call_chunk(0, call_id="a", name="f", arguments="{}")],
    "arguments are half": [call_chunk(0, call_id="a", name="f", arguments='{"a'), chunk(finish="tool_calls")],
    "arguments are a list": [call_chunk(0, call_id="a", name="f", arguments="[1]"), chunk(finish="tool_calls")],
    "arguments are a number": [
        chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": 5}}]})
    ],
    "a call without a name": [call_chunk(0, call_id="a", arguments="{}"), chunk(finish="tool_calls")],
    "a thousand calls": [call_chunk(n, call_id=f"a{n}", name="f", arguments="{}") for n in range(200)],
    "endless arguments": [call_chunk(0, arguments="x" * (1 << 18)) for _ in range(8)],
    "deep": [data(b'{"usage":' + b"[" * 100_000)],
    "choices is text": [data({"choices": "no"})],
    "invalid UTF-8": [b'data: {"choices": [{"delta": {"content": "\xff\xfe"}}]}\n\n'],
}


@pytest.mark.parametrize("raw", LIES.values(), ids=LIES)
def test_a_lie_is_no_answer_of_openais(raw: list[bytes]) -> None:
    with pytest.raises(Garbage) as caught:
        read(openai(), raw)
    assert "<html>" not in str(caught.value)


@pytest.mark.parametrize("raw", [data({"error": {"message": "m", "type": "server_error"}}), chunk(finish="error")])
def test_an_error_within_a_stream_of_openais(raw: bytes) -> None:
    with pytest.raises(Failure):
        read(openai(), [chunk({"content": "x"}), raw])


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"prompt": -5}, (None, 3, 0, 0)),
        ({"prompt": "9"}, (None, 3, 0, 0)),
        ({"completion": 2.5}, (9, None, 0, 0)),
        ({"completion": True}, (9, None, 0, 0)),
        ({"completion": 1 << 70}, (9, None, 0, 0)),
        ({"cached": 10}, (9, 3, 0, 0)),
        ({"cached": -1, "reasoning": 99}, (9, 3, 0, 0)),
        ({"cached": 9, "reasoning": 3}, (9, 3, 9, 3)),
    ],
)
def test_counts_that_cannot_be_are_unknown(counts: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    _, _, _, end = read(openai(), [chunk(finish="stop"), usage(**counts), DONE])
    assert (end.prompt_tok, end.completion_tok, end.cached_tok, end.reasoning_tok) == expected


@pytest.mark.parametrize("odd", [None, "text", [], 5, {}, {"prompt_tokens_details": "no"}])
def test_usage_of_any_kind(odd: Any) -> None:
    _, _, _, end = read(openai(), [chunk(finish="stop"), data({"choices": None, "usage": odd}), DONE])
    assert (end.prompt_tok, end.completion_tok) == (None, None)


def test_the_last_event_may_lack_its_line_end() -> None:
    raw = chat_of_openai("a")
    assert read(openai(), [*raw[:-1], raw[-1].rstrip()])[0] == "a"


# ---- Anthropic ----


def test_text_thinking_and_usage_of_anthropics() -> None:
    thinking = ({"type": "thinking_delta", "thinking": one} for one in ("hm", "m"))
    raw = [
        message_start(input_tokens=20, cache_read_input_tokens=70, cache_creation_input_tokens=10),
        *block(0, {"type": "thinking", "thinking": "", "signature": ""}, *thinking),
        named("ping"),
        *text_block(1, "Hel", "lo"),
        named("an_event_of_tomorrow", field=1),
        *message_end(output_tokens=15),
    ]
    end = End(finish="stop", prompt_tok=100, completion_tok=15, cached_tok=70)
    assert read(anthropic(), raw) == ("Hello", "hmm", (), end)


def test_parallel_calls_of_anthropics() -> None:
    raw = [
        message_start(),
        *text_block(0, "Looking."),
        *call_block(1, "toolu_a", "weather", '{"city":', ' "Köln"}'),
        *call_block(2, "toolu_b", "clock"),
        *message_end("tool_use"),
    ]
    text, _, calls, end = read(anthropic(), raw)
    assert (text, end.finish) == ("Looking.", "tool_calls")
    expected = [("toolu_a", "weather", {"city": "Köln"}), ("toolu_b", "clock", {})]
    assert [(one.id, one.name, json.loads(one.arguments)) for one in calls] == expected


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        *(("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("refusal", "content_filter")),
        ("model_context_window_exceeded", "length"),
    ],
)
def test_why_anthropics_ends(stop: str, finish: str) -> None:
    assert read(anthropic(), anthropic_chat("x", stop=stop))[3].finish == finish


def test_a_cut_call_of_anthropics_is_dropped() -> None:
    raw = [message_start(), *call_block(0, "a", "f", '{"x": 1}'), *call_block(1, "b", "g", '{"y": ')]
    _, _, calls, end = read(anthropic(), [*raw, *message_end("max_tokens")])
    assert ([one.name for one in calls], end.finish) == (["f"], "length")


def test_an_answer_by_tool_is_text() -> None:
    tool = anthropic_messages.ANSWER
    raw = [message_start(), *call_block(0, "a", tool, '{"x"', ": 1}"), *message_end("tool_use")]
    assert read(anthropic(by_tool=True), raw)[:3] == ('{"x": 1}', "", ())
    assert read(anthropic(by_tool=True), raw)[3].finish == "stop"
    assert [one.name for one in read(anthropic(), raw)[2]] == [tool]


LIES_OF_ANTHROPICS = {
    "no stop reason": [message_start(), *text_block(0, "x"), named("message_stop")],
    "breaks off": [message_start(), *text_block(0, "x")],
    "nothing": [],
    "unknown reason": anthropic_chat("x", stop="because"),
    "paused for tools of its own": anthropic_chat("x", stop="pause_turn"),
    "no type": [data({"delta": {}})],
    "not JSON": [b"event: ping\ndata: <html>\n\n"],
    "more after the end": [message_start(), *message_end()[:1], *text_block(0, "x")],
    "half a call": [message_start(), *call_block(0, "a", "f", '{"y": '), *message_end("tool_use")],
    "a call without a beginning": [*call_block(4, "a", "f", "{}")[1:], *message_end("tool_use")],
    "an index of text": [named("content_block_delta", index="a", delta={"type": "text_delta", "text": "x"})],
}  # fmt: skip


@pytest.mark.parametrize("raw", LIES_OF_ANTHROPICS.values(), ids=LIES_OF_ANTHROPICS)
def test_a_lie_is_no_answer_of_anthropics(raw: list[bytes]) -> None:
    with pytest.raises(Garbage):
        read(anthropic(), raw)


def test_an_error_within_a_stream_of_anthropics() -> None:
    error = {"type": "overloaded_error", "message": "Overloaded"}
    with pytest.raises(Failure) as caught:
        read(anthropic(), [message_start(), *text_block(0, "x"), named("error", error=error)])
    assert caught.value.kind == "overloaded_error"


@pytest.mark.parametrize("counts", [{"input_tokens": -1}, {"input_tokens": "5"}, {"cache_read_input_tokens": -1}])
def test_counts_of_anthropics_that_cannot_be(counts: dict[str, Any]) -> None:
    raw = [message_start(**counts), *text_block(0, "x"), *message_end()]
    end = read(anthropic(), raw)[3]
    assert (end.prompt_tok, end.completion_tok, end.cached_tok) == (None, 15, 0)
