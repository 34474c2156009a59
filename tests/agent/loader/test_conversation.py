"""Chat template input, grammars, and parsing of model output."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from agent.loader import conversation
from agent.loader.mlx.speech import Markers, Said, Speech, parse_json_call
from agent.wire.frames import Generate, Message, ToolCall

WEATHER = json.dumps(
    {
        "name": "weather",
        "description": "of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"$ref": "#/$defs/Town"}},
            "required": ["town"],
            "additionalProperties": False,
            "$defs": {"Town": {"enum": ["Rome", "Oslo"]}},
        },
    }
)
CLOCK = json.dumps({"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
SCHEMA = (
    '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}'
)
TOKENIZER = LLTokenizer("byte")


def ask(**more: Any) -> Generate:
    return Generate(id=1, model="m", max_tokens=9, messages=(Message(role="user", content="hi"),), **more)


def allows(grammar: str, text: str) -> bool:
    """Whether a complete answer matches the grammar."""
    matcher = LLMatcher(TOKENIZER, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("more", "answer", "allowed"),
    [
        ({"schema": SCHEMA}, '{"a": 5}', True),
        ({"schema": SCHEMA}, '{"a": "x"}', False),
        ({"schema": SCHEMA}, "prose", False),
        ({"tools": (WEATHER, CLOCK)}, "just prose with { braces } and <tags>", True),
        ({"tools": (WEATHER, CLOCK)}, f"let me see\n{CALL}", True),
        ({"tools": (WEATHER, CLOCK)}, f"{CALL}\n{OTHER}", True),
        ({"tools": (WEATHER, CLOCK)}, CALL.replace("Oslo", "Paris"), False),
        ({"tools": (WEATHER,)}, OTHER, False),
        ({"tools": (WEATHER, CLOCK), "must_call": ""}, CALL, True),
        ({"tools": (WEATHER, CLOCK), "must_call": ""}, OTHER, True),
        ({"tools": (WEATHER, CLOCK), "must_call": ""}, "prose", False),
        ({"tools": (WEATHER, CLOCK), "must_call": "clock"}, OTHER, True),
        ({"tools": (WEATHER, CLOCK), "must_call": "clock"}, CALL, False),
        ({"tools": (WEATHER,), "schema": SCHEMA}, CALL, True),
        ({"tools": (WEATHER,), "schema": SCHEMA}, '{"a": 5}', True),
        ({"tools": (WEATHER,), "schema": SCHEMA}, "prose", False),
    ],
)
def test_a_grammar_allows_the_requested_output(more: dict[str, Any], answer: str, allowed: bool) -> None:
    grammar = conversation.grammar(ask(**more), marker_is_token=False, json_calls=True)
    assert grammar is not None
    assert allows(grammar, answer) == allowed


def test_unconstrained_output_has_no_grammar() -> None:
    assert conversation.grammar(ask(), marker_is_token=False, json_calls=True) is None
    assert conversation.grammar(ask(tools=(CLOCK,)), marker_is_token=False, json_calls=False) is None


def test_tools_are_added_to_the_prompt_when_the_template_has_no_support() -> None:
    call = ToolCall(id="c", name="clock", arguments='{"zone": 1}')
    messages = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="time?"),
        Message(role="assistant", content="", calls=(call,)),
        Message(role="tool", content="12:00", call_id="c"),
    ]
    system, _, called, result = conversation.for_template(messages, [CLOCK], native_tools=False)
    assert system["content"].startswith("Be brief.")
    assert CLOCK in system["content"]
    assert called["content"] == '<tool_call>\n{"name": "clock", "arguments": {"zone": 1}}\n</tool_call>'
    assert (result["role"], "12:00" in result["content"]) == ("user", True)
    (told, _) = conversation.for_template(messages[1:2], [CLOCK], native_tools=False)
    assert (told["role"], CLOCK in told["content"]) == ("system", True)


def test_a_template_with_tool_support_gets_tools_as_objects() -> None:
    call = ToolCall(id="c", name="clock", arguments='{"zone": 1}')
    turn, result = conversation.for_template(
        [Message(role="assistant", content="", calls=(call,)), Message(role="tool", content="x", call_id="c")],
        [CLOCK],
        native_tools=True,
    )
    assert turn["tool_calls"][0]["function"] == {"name": "clock", "arguments": {"zone": 1}}
    assert result == {"role": "tool", "content": "x", "tool_call_id": "c"}


HERMES = Markers(reasoning=("<think>", "</think>"), call=("<tool_call>", "</tool_call>"), parse=parse_json_call)


def said(text: str, cuts: list[int], *, reasoning: bool = False) -> Said:
    """Everything parsed from a text that arrives in chunks."""
    speech = Speech(HERMES, (WEATHER, CLOCK), reasoning=reasoning)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [speech.feed(text[a:b]) for a, b in pairwise(edges)] + [speech.finish()]
    return Said("".join(p.text for p in parts), "".join(p.reasoning for p in parts), sum((p.calls for p in parts), ()))


@given(st.lists(st.integers(0, 200), max_size=12))
def test_parsing_is_independent_of_chunk_boundaries(cuts: list[int]) -> None:
    found = said(f"<think>so <b>\n</think>\n\nHello {{x}} < y\n{CALL}\n{OTHER}", cuts)
    assert (found.reasoning, found.text.strip()) == ("so <b>\n", "Hello {x} < y")
    assert [(c.name, json.loads(c.arguments)) for c in found.calls] == [("weather", {"town": "Oslo"}), ("clock", {})]
    assert len({c.id for c in found.calls}) == 2


@given(st.lists(st.integers(0, 80), max_size=8))
def test_reasoning_opened_by_the_template_is_not_content(cuts: list[int]) -> None:
    found = said("hm, hm</think>\n\nYes.", cuts, reasoning=True)
    assert (found.reasoning, found.text, found.calls) == ("hm, hm", "Yes.", ())


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot json\n</tool_call>",
        '<tool_call>{"name": "weather"}</tool_call>',
        '<tool_call>\n{"name": "weather", "argu',
        "<tool_call>[]",
    ],
)
def test_an_unparsable_tool_call_is_text(text: str) -> None:
    found = said(text, [3, 15])
    assert (found.text, found.calls) == (text, ())
