"""Output of models split into reasoning, content and calls, however it arrives in pieces."""

import json
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loader.chat.calls import OWN, CallFormat, read
from agent.loader.chat.harmony import HARMONY
from agent.loader.chat.speech import Markers, Said, Speech

WEATHER = json.dumps({"name": "weather", "parameters": {"type": "object"}})
CLOCK = json.dumps({"name": "clock", "parameters": {"type": "object"}})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
USUAL = Markers(reasoning=("<think>", "</think>"), call=OWN)
BARE = Markers(call=CallFormat(open='{"name": "', sep='", "parameters": ', close="}", several=False))
CHANNELS = Markers(call=HARMONY)
WEATHER_CALL: tuple[str, object] = ("weather", {"town": "Oslo"})
CLOCK_CALL: tuple[str, object] = ("clock", {})
TO_WEATHER = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"town": "Oslo"}<|call|>'
Cuts = st.lists(st.integers(0, 300), max_size=12)


def said(text: str, cuts: list[int], markers: Markers = USUAL, *, reasoning: bool = False) -> Said:
    """Everything parsed from a text that arrives in pieces."""
    ids = (f"call_{number}" for number in count())
    speech = Speech(markers, (WEATHER, CLOCK), reasoning=reasoning, new_id=lambda: next(ids))
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = Said()
    for begin, end in pairwise(edges):
        found += speech.feed(text[begin:end])
    return found + speech.finish()


def calls(found: Said) -> list[tuple[str, object]]:
    """Names and arguments."""
    return [(call.name, json.loads(call.arguments)) for call in found.calls]


@given(Cuts)
def test_parsing_is_independent_of_chunk_boundaries(cuts: list[int]) -> None:
    found = said(f"<think>so <b>\n</think>\n\nHello {{x}} < y\n{CALL}\n{OTHER}", cuts)
    assert (found.reasoning, found.text.strip()) == ("so <b>\n", "Hello {x} < y")
    assert calls(found) == [WEATHER_CALL, CLOCK_CALL]
    assert len({call.id for call in found.calls}) == 2


@given(st.text(alphabet='<>/tool_calhink{}":, \n', max_size=60), Cuts)
def test_any_text_comes_out_the_same_in_pieces(text: str, cuts: list[int]) -> None:
    for markers in (USUAL, BARE, CHANNELS):
        assert said(text, cuts, markers) == said(text, [], markers)


@given(Cuts)
def test_reasoning_opened_by_the_template_is_not_content(cuts: list[int]) -> None:
    found = said("hm, hm</think>\n\nYes.", cuts, reasoning=True)
    assert (found.reasoning, found.text, found.calls) == ("hm, hm", "Yes.", ())


@given(Cuts)
def test_the_end_of_reasoning_alone_at_the_beginning_is_no_content(cuts: list[int]) -> None:
    assert said("\n</think>\n\nYes.", cuts) == Said("Yes.")


@given(Cuts)
def test_the_end_of_reasoning_in_the_middle_is_content(cuts: list[int]) -> None:
    assert said("It ends with </think>, always.", cuts) == Said("It ends with </think>, always.")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot json\n</tool_call>",
        '<tool_call>{"name": "weather"}</tool_call>',
        '<tool_call>\n{"name": "weather", "argu',
        "<tool_call>[]",
        '<tool_call>\n{"name": "forecast", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": "cut {"}\n</tool_call>',
    ],
)
def test_an_unparsable_or_undescribed_call_is_text(text: str) -> None:
    for cuts in ([], [3, 15], list(range(len(text)))):
        found = said(text, cuts)
        assert (found.text, found.calls) == (text, ())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"name": "weather", "parameters": {"town": "Oslo"}}', [WEATHER_CALL]),
        ('\n{"name":"weather","parameters":{"town":"Oslo"}}', [WEATHER_CALL]),
        ('{"type": "function", "name": "weather", "parameters": {"town": "Oslo"}}', [WEATHER_CALL]),
        ('{"name": "weather", "arguments": {"town": "Oslo"}}', [WEATHER_CALL]),
        ('[{"name": "weather", "parameters": {"town": "Oslo"}}]', [WEATHER_CALL]),
        ('{"name": "Anna", "parameters": {}}', []),
        ('{"town": "Oslo"}', []),
        ('The answer: {"name": "weather", "parameters": {}}', []),
    ],
)
def test_an_answer_that_is_a_call_needs_no_marker(text: str, found: list[object]) -> None:
    for cuts in ([], [1, 9, 20], list(range(len(text)))):
        parsed = said(text, cuts, BARE)
        assert calls(parsed) == found
        assert parsed.text == ("" if found else text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<|channel|>final<|message|>Hello", ("Hello", "", [])),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            ("Yes.", "Hm.", []),
        ),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant" + TO_WEATHER, ("", "Hm.", [WEATHER_CALL])),
        (" to=functions.clock<|channel|>commentary json<|message|>{}", ("", "", [CLOCK_CALL])),
        ("<|channel|>commentary<|message|>Let me see.<|end|>", ("Let me see.", "", [])),
        ("<|channel|>commentary to=functions.forecast<|message|>{}<|call|>", ("{}", "", [])),
    ],
)
def test_messages_with_headers_are_told_apart(text: str, wanted: tuple[object, ...]) -> None:
    for cuts in ([], [5, 30], list(range(len(text)))):
        found = said(text, cuts, CHANNELS)
        assert (found.text, found.reasoning, calls(found)) == wanted


def test_the_end_marker_inside_an_argument_ends_no_call() -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"town": "a</tool_call>b"}}\n</tool_call>'
    for cuts in ([], list(range(len(text)))):
        assert calls(said(text, cuts)) == [("weather", {"town": "a</tool_call>b"})]


KEYED = CallFormat(
    open="<call>\n<function=", sep=">\n", close="</call>", marker="<call>", stop="</call>", key=("<p=", ">", "</p>")
)
PARSED = CallFormat(marker="<call>", stop="</call>", parser=lambda text, tools: {"name": "clock", "arguments": {}})


@pytest.mark.parametrize(
    ("form", "text", "when_cut"),
    [
        (KEYED, "<call>\n<function=weather>\n<p=town>Oslo</p>\n<p=day>to", []),
        (KEYED, "<call>\n<function=weather>\n<p=town>Oslo</p>\n", []),
        (PARSED, "<call>clock", []),
        (OWN, CALL.removesuffix("\n</tool_call>"), [WEATHER_CALL]),
        (HARMONY, "<|channel|>commentary to=functions.clock <|constrain|>json<|message|>", []),
        (HARMONY, TO_WEATHER.removesuffix("<|call|>"), [WEATHER_CALL]),
    ],
)
def test_a_call_that_was_cut_off_is_text_unless_it_is_known_to_be_complete(
    form: CallFormat, text: str, when_cut: list[object]
) -> None:
    speech, whole = (Speech(Markers(call=form), (WEATHER, CLOCK)) for _ in range(2))
    cut = speech.feed(text) + speech.finish(cut=True)
    assert calls(cut) == when_cut
    assert bool(cut.text) != bool(when_cut) or form is HARMONY
    assert len((whole.feed(text) + whole.finish()).calls) == 1


@given(Cuts)
def test_reasoning_that_no_template_names_begins_an_answer_or_is_text(cuts: list[int]) -> None:
    unknown = Markers(call=OWN, unknown=True)
    assert said("<think>\nhm\n</think>\n\nYes.", cuts, unknown) == Said("Yes.", "\nhm\n", ())
    assert said(f"\n<think>hm</think>{CALL}", cuts, unknown).reasoning == "hm"
    for text in ("The tag <think> opens it.", "<thin", "<thanks>", "a"):
        assert said(text, cuts, unknown) == Said(text, "", ())
    alone = Speech(Markers(unknown=True))
    assert (alone.feed("  <") + alone.feed("b>") + alone.finish()).text == "  <b>"


def test_an_answer_that_is_cut_off_in_a_header_shows_none_of_it() -> None:
    for header in ("<|channel|>fin", "<|start|>assistant<|channel|>final"):
        assert said("<|channel|>analysis<|message|>hm<|end|>" + header, [9], CHANNELS) == Said("", "hm", ())
    assert said("no header at all", [3], CHANNELS).text == "no header at all"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (KEYED, "<function=weather>\n" + "<p=a>v " * 20_000),
        (KEYED, "<function=weather>\n<p=" + " " * 100_000),
        (CallFormat(open="[C]", sep="[A]", marker="[C]"), "a" * 200_000),
    ],
)
def test_a_long_text_without_a_call_is_read_in_a_moment(form: CallFormat, text: str) -> None:
    assert [found[1] for found in read(form, text, [])] in ([{}], [])


def test_keyed_arguments_are_read_mark_by_mark() -> None:
    text = "<function=weather>\n<p= town >\n a\nb \n</p> x <p=n></p><p=day>1</p><p=rest>cut"
    assert read(KEYED, text, []) == [("weather", {"town": " a\nb ", "n": "", "day": 1})]


def test_without_tools_a_call_is_text() -> None:
    speech = Speech(USUAL)
    assert (speech.feed(CALL) + speech.finish()).text == CALL
