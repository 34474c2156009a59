"""Formats of calls: what is written can be read, and what is learnt is what was rendered."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loader.chat.calls import (
    ID,
    NUMBER,
    OWN,
    CallFormat,
    Found,
    Probe,
    common_begin,
    common_end,
    learnt,
    pieces,
    read,
    written,
)
from tests.families import NAMES, known

LISTED = CallFormat("[TOOL_CALLS][", '{"name": "', '", "arguments": ', f', "id": "{ID}"}}', ", ", "]", "[TOOL_CALLS]")
BARE = CallFormat(open='{"name": "', sep='", "parameters": ', close="}", between="; ")
NESTED = CallFormat("<calls>", "<call>", "<sep>", "</call>", "", "</calls>", "<calls>", "</calls>")
HEADED = CallFormat("", "[TOOL_CALLS]", f"[CALL_ID]{ID}[ARGS]", "", "", "", "[TOOL_CALLS]")
ACTIONS = CallFormat(
    begin="<|START_ACTION|>[",
    open=f'\n    {{"tool_call_id": "{NUMBER}", "tool_name": "',
    sep='", "parameters": ',
    close="}",
    between=",",
    end="\n]<|END_ACTION|>",
    marker="<|START_ACTION|>",
    stop="<|END_ACTION|>",
)
FORMATS = [OWN, LISTED, BARE, NESTED, HEADED, ACTIONS]
TOOLS = [{"type": "function", "function": {"name": "book", "parameters": {"properties": {"n": {"type": "string"}}}}}]
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1000, 1000), st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
names = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_-]{0,20}", fullmatch=True)
calls = st.lists(st.tuples(names, st.dictionaries(st.text(max_size=8), values, max_size=4)), min_size=1, max_size=3)


def inside(form: CallFormat, text: str) -> list[str]:
    """The parts of a text between markers and stops, as a parser cuts them."""
    parts = text.split(form.marker)[1:] if form.marker else [text]
    return [part.rpartition(form.stop)[0] if form.stop else part for part in parts]


@given(calls)
def test_what_is_written_can_be_read(given_calls: list[Found]) -> None:
    control = ("[TOOL_CALLS]", "<calls>", "<tool_call>", "<|START_ACTION|>")
    for form in FORMATS:
        for some in (given_calls, given_calls[:1]):
            text = written(form, some)
            if any(text.count(word) > len(some) for word in control):
                continue  # a text of the call's own holds the marker
            found = [one for part in inside(form, text) for one in read(form, part, TOOLS)]
            assert found == [(name, arguments) for name, arguments in some], (form, text)


@pytest.mark.parametrize("name", NAMES)
def test_the_format_of_a_family_reads_what_it_writes(name: str) -> None:
    form = known(name).talk.form
    sent: list[Found] = [("get_weather", {"city": "Paris", "days": [1, 2]}), ("book", {})]
    if not form.constrained:
        form = OWN  # arguments between tags are written in our own format
    for some in (sent[:1], sent) if form.several else (sent[:1],):
        found = [one for part in inside(form, written(form, some)) for one in read(form, part, TOOLS)]
        assert found == some


@given(st.text(max_size=80), st.sampled_from(FORMATS))
def test_reading_raises_nothing(text: str, form: CallFormat) -> None:
    assert isinstance(read(form, text, TOOLS), list)
    assert isinstance(read(form._replace(key=("<k=", ">", "</k>")), text, TOOLS), list)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', [("f", {"a": 1})]),
        ('{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        ('{"arguments": {"a": 1}, "name": "f"}', [("f", {"a": 1})]),
        ('{"type": "function", "function": {"name": "f", "arguments": "{}"}}', [("f", "{}")]),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', [("f", {}), ("g", {})]),
        ('{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}', [("f", {}), ("g", {})]),
        ('{"tool_name": "f", "parameters": {}}', [("f", {})]),
        ('{"f": {"a": 1}}', [("f", {"a": 1})]),
        ('{"name": "f"}', []),
        ('{"arguments": 1}', []),
        ("[]", []),
        ("no call", []),
        ("{", []),
    ],
)
def test_json_calls_are_read_in_every_usual_form(text: str, wanted: list[Any]) -> None:
    assert read(OWN, text, TOOLS) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<f=book>\n<p=n>\n5\n</p>\n</f>", [("book", {"n": "5"})]),
        ("<f=book><p=m>5</p></f>", [("book", {"m": 5})]),
        ("<f=book><p=m>[1, 2]</p><p=n>two\nlines</p></f>", [("book", {"m": [1, 2], "n": "two\nlines"})]),
        ("<f=book></f>", [("book", {})]),
        ("<f=book><p=n>a</p></f><f=other><p=x>y</p></f>", [("book", {"n": "a"}), ("other", {"x": "y"})]),
        ("text", []),
    ],
)
def test_arguments_between_tags_have_the_types_of_their_parameters(text: str, wanted: list[Any]) -> None:
    form = CallFormat(open="<call><f=", sep=">", close="</f></call>", marker="<call>", key=("<p=", ">", "</p>"))
    assert read(form, text, TOOLS) == wanted


ONE = Probe("alpha", {"qcity": "one", "qunit": "two"}, "call_000000000one")
TWO = Probe("beta", {"qcity": "three", "qunit": "four"}, "call_000000000two")


@pytest.mark.parametrize("form", [OWN, LISTED, NESTED, HEADED, ACTIONS])
def test_a_format_is_learnt_from_what_is_rendered(form: CallFormat) -> None:
    def rendered(*probes: Probe) -> str:
        units = []
        for number, one in enumerate(probes):
            unit = f"{form.open}{one.name}{form.sep}{json.dumps(one.arguments)}{form.close}"
            units.append(unit.replace(NUMBER, str(number)).replace(ID, one.id))
        return form.begin + form.between.join(units) + form.end

    tokens = [form.marker, form.stop, "<call>", "</call>", "[CALL_ID]", "[ARGS]"]
    found = learnt(rendered(ONE), rendered(ONE, TWO), ONE, TWO, tokens)
    assert found is not None
    assert (found.marker, found.stop) == (form.marker, form.stop)
    for probe in ((ONE,), (ONE, TWO)):
        text = rendered(*probe)
        read_back = [one for part in inside(found, text) for one in read(found, part, TOOLS)]
        assert read_back == [(one.name, one.arguments) for one in probe]


def test_nothing_is_learnt_from_a_call_that_is_not_rendered() -> None:
    assert learnt("no call here", None, ONE, TWO, []) is None
    assert learnt("alpha was called", None, ONE, TWO, []) is None
    assert learnt("alpha(qcity='one', qunit='two')", None, ONE, TWO, []) is None


@given(st.text(alphabet="<ab>", max_size=12), st.text(alphabet="<ab>", max_size=12))
def test_what_two_texts_share_cuts_no_token(one: str, other: str) -> None:
    tokens = ["<ab>", "<a", "ba"]
    left, right = pieces(one, tokens), pieces(other, tokens)
    assert "".join(left) == one
    begin, end = common_begin(left, right), common_end(left, right)
    assert one.startswith(begin)
    assert other.startswith(begin)
    assert one.endswith(end)
    assert other.endswith(end)
    assert pieces(begin, tokens) == left[: len(pieces(begin, tokens))]
