"""Conversations as templates accept them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loader.chat.calls import OWN
from agent.loader.chat.turns import PLAIN, RAW, Ids, Manner, Turn, arguments_of, instructions, tool_objects, turns
from agent.wire.frames import Message, ToolCall

CLOCK = json.dumps({"name": "clock", "parameters": {"type": "object", "properties": {}}})


def say(role: str, content: str, **more: Any) -> Message:
    return Message(role=role, content=content, **more)


def calling(*ids: str, content: str = "", arguments: str = "{}") -> Message:
    return say("assistant", content, calls=tuple(ToolCall(id=one, name="clock", arguments=arguments) for one in ids))


def result(one: str, content: str) -> Message:
    return say("tool", content, call_id=one)


def shown(found: list[Turn]) -> list[tuple[str, str]]:
    """Roles and contents, with the number of calls."""
    return [(turn["role"], turn["content"] + "*" * len(turn.get("tool_calls", []))) for turn in found]


def changed(messages: list[Message], **more: Any) -> list[tuple[str, str]]:
    return shown(turns(messages, Manner(**more), OWN))


S, S2, U, V, A, B = (
    say(role, name)
    for role, name in (
        ("system", "s"),
        ("system", "t"),
        ("user", "u"),
        ("user", "v"),
        ("assistant", "a"),
        ("assistant", "b"),
    )
)


@pytest.mark.parametrize(
    ("messages", "manner", "wanted"),
    [
        ([S, U, A, V], {}, [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")]),
        ([S, U], {"system": "folded"}, [("user", "s\n\nu")]),
        ([S, A, U], {"system": "folded"}, [("user", "s"), ("assistant", "a"), ("user", "u")]),
        ([S], {"system": "folded"}, [("user", "s")]),
        ([S, S2, U], {"systems": "joined"}, [("system", "s\n\nt"), ("user", "u")]),
        ([S, U, S2], {"later": "user"}, [("system", "s"), ("user", "u"), ("user", "t")]),
        ([S, U, S2], {"later": "user", "neighbours": "joined"}, [("system", "s"), ("user", "u\n\nt")]),
        ([U, S, A], {"later": "moved"}, [("system", "s"), ("user", "u"), ("assistant", "a")]),
        ([U, V, A, B], {"neighbours": "joined"}, [("user", "u\n\nv"), ("assistant", "a\n\nb")]),
        ([A, U], {"start": "."}, [("user", "."), ("assistant", "a"), ("user", "u")]),
        ([S, A], {"start": "."}, [("system", "s"), ("user", "."), ("assistant", "a")]),
        ([U, say("assistant", " "), V], {"empty": "dropped"}, [("user", "u"), ("user", "v")]),
        ([calling("1"), result("1", "x")], {"empty": "dropped"}, [("assistant", "*"), ("tool", "x")]),
        (
            [calling("1", "2", content="c"), result("1", "x"), result("2", "y")],
            {"parallel": "split"},
            [("assistant", "c*"), ("tool", "x"), ("assistant", "*"), ("tool", "y")],
        ),
        (
            [calling("1", "1"), result("1", "x"), result("1", "y"), U],
            {"parallel": "split"},
            [("assistant", "*"), ("tool", "x"), ("assistant", "*"), ("tool", "y"), ("user", "u")],
        ),
        (
            [calling("1", "1"), result("1", "x"), U, result("1", "y")],
            {"parallel": "split"},
            [("assistant", "*"), ("tool", "x"), ("assistant", "*"), ("user", "u"), ("tool", "y")],
        ),
        ([calling("1", content="c")], {"beside": "apart"}, [("assistant", "c"), ("assistant", "*")]),
        ([calling("1", content="c"), result("1", "x")], {}, [("assistant", "c*"), ("tool", "x")]),
    ],
)
def test_turns_are_changed_as_a_template_needs(
    messages: list[Message], manner: dict[str, Any], wanted: list[tuple[str, str]]
) -> None:
    assert changed(messages, **manner) == wanted


def test_calls_and_results_may_be_text() -> None:
    found = turns(
        [U, calling("1", content="c", arguments='{"zone": 1}'), result("1", "12:00")], Manner(calls="text"), OWN
    )
    assert shown(found)[1] == ("assistant", 'c\n<tool_call>\n{"name": "clock", "arguments": {"zone": 1}}\n</tool_call>')
    assert (found[2]["role"], "12:00" in found[2]["content"]) == ("user", True)


def test_what_is_told_joins_the_system_message() -> None:
    told = instructions([CLOCK], OWN)
    assert CLOCK in told
    assert turns([S, U], Manner(), OWN, told)[0] == {"role": "system", "content": f"s\n\n{told}"}
    assert turns([U], Manner(), OWN, told)[0] == {"role": "system", "content": told}
    assert turns([U], PLAIN, OWN, told) == [{"role": "user", "content": f"{told}\n\nu"}]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("  ", {}),
        ("{}", {}),
        ('{"a": [1]}', {"a": [1]}),
        ('{"a": "cut', {RAW: '{"a": "cut'}),
        ("[1]", {RAW: "[1]"}),
        ("null", {RAW: "null"}),
    ],
)
def test_arguments_of_earlier_calls_are_objects(text: str, wanted: dict[str, Any]) -> None:
    assert arguments_of(text) == wanted
    (turn,) = turns([calling("1", arguments=text)], Manner(arguments="object"), OWN)
    assert turn["tool_calls"][0]["function"]["arguments"] == wanted
    (turn,) = turns([calling("1", arguments=text)], Manner(arguments="text"), OWN)
    assert json.loads(turn["tool_calls"][0]["function"]["arguments"]) == wanted


@given(st.lists(st.text(max_size=12), min_size=1, max_size=8))
def test_ids_are_changed_consistently(given_ids: list[str]) -> None:
    for kind in ("native", "short", "numbered"):
        ids = Ids(kind)
        made = [ids.of(ToolCall(id=one, name="clock", arguments="{}")) for one in given_ids]
        assert [ids.named(one) for one in given_ids] == made
        if kind == "short":
            assert all(len(one) == 9 and one.isalnum() for one in made)
        if kind == "numbered":
            assert len(set(made)) == len(set(given_ids))


def test_a_result_names_the_call_and_its_function() -> None:
    (call, back) = turns([calling("toolu_0123456789abc"), result("toolu_0123456789abc", "x")], Manner(ids="short"), OWN)
    assert back["tool_call_id"] == call["tool_calls"][0]["id"] != "toolu_0123456789abc"
    assert back["name"] == "clock"


def test_every_tool_has_a_description_where_a_template_needs_one() -> None:
    (tool,) = tool_objects([CLOCK], Manner(described=True))
    assert tool["function"]["description"] == ""
    assert "description" not in tool_objects([CLOCK], Manner())[0]["function"]


conversations = st.lists(
    st.one_of(
        st.sampled_from(["system", "user", "assistant"]).map(lambda role: (role, 0)),
        st.just(("tool", 0)),
        st.integers(1, 3).map(lambda count: ("assistant", count)),
    ),
    min_size=1,
    max_size=10,
)
manners = st.builds(
    Manner,
    system=st.sampled_from(["native", "folded"]),
    systems=st.sampled_from(["native", "joined"]),
    later=st.sampled_from(["native", "user", "moved"]),
    neighbours=st.sampled_from(["native", "joined"]),
    start=st.sampled_from([None, "", "."]),
    empty=st.sampled_from(["native", "dropped"]),
    ids=st.sampled_from(["native", "short", "numbered"]),
    parallel=st.sampled_from(["native", "split"]),
    beside=st.sampled_from(["native", "apart"]),
    calls=st.sampled_from(["native", "text"]),
)


def numbered(kinds: list[tuple[str, int]]) -> list[Message]:
    """A conversation in which every text stands once; results name the calls before them, ids repeat."""
    found: list[Message] = []
    for number, (role, count) in enumerate(kinds):
        ids = tuple(f"c{(number + n) % 3}" for n in range(count))
        more: dict[str, Any] = {"call_id": f"c{number % 3}"} if role == "tool" else {}
        calls = tuple(
            ToolCall(id=one, name="clock", arguments=json.dumps({"n": number * 10 + n})) for n, one in enumerate(ids)
        )
        found.append(say(role, f"<{number}>", calls=calls, **more))
    return found


@given(conversations, manners)
def test_no_text_and_no_call_is_lost_or_doubled(kinds: list[tuple[str, int]], manner: Manner) -> None:
    messages = numbered(kinds)
    whole = json.dumps(turns(messages, manner, OWN)).replace("\\", "")
    for message in messages:
        assert whole.count(message.content) == 1
        for call in message.calls:
            number = json.loads(call.arguments)["n"]
            assert whole.count(f'"n": {number}}}') == 1


@given(conversations)
def test_the_plain_manner_takes_turns_from_the_user_on(kinds: list[tuple[str, int]]) -> None:
    roles = [turn["role"] for turn in turns(numbered(kinds), PLAIN, OWN)]
    assert roles == ["user" if number % 2 == 0 else "assistant" for number in range(len(roles))]
    assert all("tool_calls" not in turn for turn in turns(numbered(kinds), PLAIN, OWN))
