"""What the grammars of answers allow, byte by byte."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from agent.loader.chat.calls import ID, OWN, CallFormat
from agent.loader.chat.grammar import Arguments, announced, call_grammar, literal, schema_grammar
from agent.loader.chat.harmony import HARMONY

BYTES = LLTokenizer("byte")
TOWN = {
    "type": "object",
    "properties": {"town": {"enum": ["Rome", "Oslo"]}},
    "required": ["town"],
    "additionalProperties": False,
}
TOOLS = (Arguments("weather", TOWN), Arguments("clock", {"type": "object", "additionalProperties": False}))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
BARE = CallFormat(open='{"name": "', sep='", "parameters": ', close="}", several=False)
LISTED = CallFormat("[TOOL_CALLS][", '{"name": "', '", "arguments": ', f', "id": "{ID}"}}', ", ", "]", "[TOOL_CALLS]")
NESTED = CallFormat("<calls>", "<call>", "<sep>", "</call>", "", "</calls>", "<calls>", "</calls>")
DUMPED = CallFormat(
    begin="<tool_call>\n[",
    open=f'\n  {{\n    "id": "{ID}",\n    "type": "function",\n    "function": {{\n      "name": "',
    sep='",\n      "arguments": ',
    close="\n    }\n  }",
    between=",",
    end="\n]\n</tool_call>",
    marker="<tool_call>",
    stop="</tool_call>",
)


def allows(grammar: str, text: str) -> bool:
    """Whether a complete answer matches a grammar."""
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def continues(form: CallFormat, answer: str) -> bool:
    """Whether free text that announces a call may go on as it does."""
    plan = announced(TOOLS, form, literal)
    assert plan.announced is not None
    assert plan.call is not None
    found = plan.announced.search(answer)
    assert found is not None
    grammar = plan.call(found)
    return grammar is None or allows(grammar, answer[found.end() :])


@pytest.mark.parametrize(
    ("schema", "answer", "allowed"),
    [
        (None, CALL, True),
        (None, CLOCK, True),
        (None, CALL.replace("Oslo", "Paris"), False),
        (None, CALL.replace("weather", "forecast"), False),
        (None, "prose", False),
        (SCHEMA, CALL, True),
        (SCHEMA, '{"a": 5}', True),
        (SCHEMA, '{"a": "x"}', False),
        (SCHEMA, "prose", False),
    ],
)
def test_a_forced_call_or_a_schema_allows_nothing_else(schema: Any, answer: str, allowed: bool) -> None:
    assert allows(call_grammar(TOOLS, OWN, literal, schema), answer) == allowed


@pytest.mark.parametrize(("answer", "allowed"), [('{"a": 5}', True), ('{"a": "x"}', False), ("prose", False)])
def test_a_schema_holds_the_answer(answer: str, allowed: bool) -> None:
    assert allows(schema_grammar(SCHEMA, OWN, literal), answer) == allowed


@pytest.mark.parametrize("form", [BARE, LISTED._replace(begin="[", close="}", marker="")])
@pytest.mark.parametrize(
    "schema",
    [
        SCHEMA,
        {"type": "object", "properties": {"name": {"type": "string"}}, "additionalProperties": False},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "object"},
    ],
)
def test_a_call_without_a_marker_stands_beside_an_answer_that_begins_as_it_does(form: CallFormat, schema: Any) -> None:
    grammar = call_grammar(TOOLS, form, literal, schema)
    assert allows(grammar, form.begin + form.open + "weather" + form.sep + '{"town": "Rome"}' + form.close + form.end)
    answers = ['{"a": 5}', '{"name": "weathers"}', "[1, 2]", "{}"]
    wanted = [allows(schema_grammar(schema, OWN, literal), one) for one in answers]
    assert [allows(grammar, one) for one in answers] == wanted
    assert any(wanted)


@pytest.mark.parametrize(
    ("form", "answer", "allowed"),
    [
        (OWN, CALL, True),
        (OWN, f"well, {CALL}", True),
        (OWN, CALL.replace("\n", ""), True),
        (OWN, CALL.replace(": ", ":").replace(", ", ","), True),
        (OWN, CALL.replace('{"', '{\n  "'), True),
        (OWN, CALL.replace("arguments", "parameters"), True),
        (OWN, CALL.replace("Oslo", "Paris"), False),
        (OWN, CALL.replace('"Oslo"', "7"), False),
        (OWN, CALL.replace("weather", "forecast"), False),
        (OWN, CALL.replace("\n", "\n" * 40), False),
        (BARE, '{"name": "weather", "parameters": {"town": "Rome"}}', True),
        (BARE, '{"name": "weather", "parameters": {"town": "Paris"}}', False),
        (LISTED, '[TOOL_CALLS][{"name": "weather", "arguments": {"town": "Rome"}, "id": "a1B2c3D4e"}]', True),
        (LISTED, '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Rome"}}]', True),
        (
            LISTED,
            '[TOOL_CALLS][{"name": "weather", "arguments": {"town": "Rome"}}, {"name": "clock", "arguments": {}}]',
            True,
        ),
        (
            LISTED,
            '[TOOL_CALLS][{"name": "weather", "arguments": {"town": "Rome"}}, {"name": "x", "arguments": {}}]',
            False,
        ),
        (NESTED, '<calls><call>weather<sep>{"town": "Rome"}</call><call>clock<sep>{}</call></calls>', True),
        (NESTED, '<calls>\n<call>weather<sep>{"town":"Rome"}</call></calls>', True),
        (NESTED, '<calls><call>weather<sep>{"town": 1}</call></calls>', False),
        (DUMPED, '<tool_call>\n[\n  {"name": "weather", "arguments": {"town": "Rome"}}\n]\n</tool_call>', True),
        (DUMPED, '<tool_call>[{"name": "weather", "arguments": {"town": 3}}]</tool_call>', False),
        (
            HARMONY,
            '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"town": "Rome"}<|call|>',
            True,
        ),
        (HARMONY, '<|channel|>commentary to=functions.weather<|message|>{"town": "Paris"}<|call|>', False),
        (HARMONY, "<|channel|>commentary to=functions.forecast<|message|>anything", True),
    ],
)
def test_a_call_that_is_announced_is_held_to_its_schema_in_any_white_space(
    form: CallFormat, answer: str, allowed: bool
) -> None:
    assert continues(form, answer) == allowed


@given(st.text(alphabet=" \n\t", max_size=16), st.text(alphabet=" \n", max_size=16))
def test_white_space_around_a_call_is_free(before: str, after: str) -> None:
    assert continues(OWN, f'<tool_call>{before}{{"name": "clock", "arguments": {{}}}}{after}</tool_call>')


def test_a_trial_grammar_compiles_for_every_format() -> None:
    for form in (OWN, BARE, LISTED, NESTED, DUMPED, HARMONY):
        trial = announced(TOOLS, form, literal).trial()
        assert trial is not None
        assert not LLMatcher(BYTES, trial, log_level=0).is_error()
    assert announced(TOOLS, OWN._replace(key=("<", ">", "<")), literal).trial() is None


def test_settings_of_the_compiler_are_ours() -> None:
    assert json.dumps({"x-guidance": {}})[2:12] in schema_grammar(SCHEMA, OWN, literal)
