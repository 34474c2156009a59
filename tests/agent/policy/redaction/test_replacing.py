"""What may leave: every string is read, JSON stays JSON, and nothing else can be sent."""

import copy
import json
import pickle
import re
from functools import cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.policy.outgoing import Called, Outgoing, Turn
from agent.policy.redaction import Redacted
from agent.policy.redaction.detectors import Detectors, Found
from agent.policy.redaction.replacing import LABELS, on_premises, redact, replaced
from agent.policy.redaction.strings import texts_of
from agent.policy.rules import Kind, Provider, Rules
from shared.errors import Refused, Retryable

OUTSIDE = Provider(name="far", kind="openai", secret="op://vault/far/key")
PREMISES = Provider(name="near", kind="local", url="http://127.0.0.1:11434/v1")
NONCE = "bcdfghjkmnpqrtvwxzbcdfgh"
CARD, MAIL = "4111111111111111", "jane.doe@example.com"


@cache
def detectors() -> Detectors:
    return Detectors(Rules())


def chat(*contents: str, **more: object) -> Outgoing:
    turns = tuple(Turn(role="user", content=one) for one in contents)
    return msgspec.structs.replace(Outgoing(model="m", turns=turns), **more)


def sent(outgoing: Outgoing) -> Redacted:
    return redact(outgoing, OUTSIDE, detectors(), nonce=NONCE)


def test_no_string_of_a_request_is_left_out() -> None:
    """A value in any field: it is replaced, or the request is refused. A new field fails here and at the import."""
    tool = json.dumps(
        {
            "function": {
                "name": f"f_{CARD}",
                "description": MAIL,
                "parameters": {
                    "properties": {CARD: {"enum": [MAIL], "default": int(CARD), "examples": [[{"x": MAIL}]]}},
                    "required": [CARD],
                },
            }
        }
    )
    full = Outgoing(
        model="m",
        turns=(
            Turn(role="user", content=MAIL),
            Turn(
                role="assistant",
                content="",
                calls=(Called(id=f"id_{CARD}", name=f"f_{CARD}", arguments=f'{{"{CARD}": ["{MAIL}", {CARD}]}}'),),
            ),
            Turn(role="tool", content=CARD, call_id=f"id_{CARD}"),
        ),
        tools=(tool,),
        must_call=f"f_{CARD}",
        schema=json.dumps({"properties": {MAIL: {"const": CARD}}}),
        stop=(MAIL, CARD),
    )
    result = sent(full).outgoing
    told = msgspec.json.encode(result).decode()
    assert CARD not in told
    assert MAIL not in told
    call, tool_turn = result.turns[1].calls[0], result.turns[2]
    assert call.id == tool_turn.call_id
    assert call.name == result.must_call == json.loads(result.tools[0])["function"]["name"]
    assert re.fullmatch(r"[A-Za-z0-9_]{1,64}", call.name)
    parameters = json.loads(result.tools[0])["function"]["parameters"]
    assert set(parameters["properties"]) == set(parameters["required"])
    for field, bad in (("model", f"m-{CARD}"), ("reasoning_effort", MAIL), ("turns", (Turn(role=MAIL, content=""),))):
        with pytest.raises(Refused) as raised:
            sent(msgspec.structs.replace(full, **{field: bad}))
        assert raised.value.code == "not_redactable"
        assert CARD not in raised.value.message
        assert MAIL not in raised.value.message


def test_every_text_field_is_walked() -> None:
    texts = {one.name for one in msgspec.structs.fields(Outgoing) if "str" in str(one.type)}
    assert texts - {"turns"} == {"model", "tools", "must_call", "schema", "stop", "reasoning_effort"}


def test_what_has_no_findings_leaves_byte_for_byte() -> None:
    same = chat("hello", tools=('{"a" :  1.50, "a": 2}',), schema='{ "type":"object" }')
    assert sent(same).outgoing == same
    assert sent(same).counts == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tools": ("{not json",)},
        {"tools": ('{"a": NaN}',)},
        {"tools": ("[" * 5000 + "]" * 5000,)},
        {"schema": "{'a': 1}"},
        {"tools": (b"{}",)},
        {"turns": (Turn(role="user", content=b"bytes"),)},  # type: ignore[arg-type]
        {"turns": (Turn(role="user", content="\ud800"),)},
        {"turns": (Turn(role="assistant", content="", calls=(Called(id="1", name="f", arguments='{"a": '),)),)},
        {
            "turns": (
                Turn(role="assistant", content="", calls=(Called(id="1", name="f", arguments='{"a": "\\ud800"}'),)),
            )
        },
    ],
)
def test_what_cannot_be_read_is_refused_without_saying_what_it_says(wrong: dict[str, object]) -> None:
    with pytest.raises(Refused) as raised:
        sent(chat("x", **wrong))
    assert raised.value.code == "not_redactable"


def test_two_names_of_an_object_stay_two() -> None:
    told = sent(chat("x", tools=(f'{{"{CARD}": 1, "4111-1111-1111-1111": 2}}',))).outgoing.tools[0]
    assert sorted(json.loads(told).values()) == [1, 2]


@pytest.mark.parametrize("number", [CARD, f"{CARD}.0", "4.111111111111111e15", f"-{CARD}"])
def test_a_number_of_a_json_text_is_read_too(number: str) -> None:
    result = sent(chat("x", tools=(f'{{"pay": {number}}}',)))
    assert CARD not in result.outgoing.tools[0]
    assert "CARD" in json.loads(result.outgoing.tools[0])["pay"]
    big = '{"n": 123456789012345678901234567890, "f": 1e-7}'
    assert sent(chat("x", tools=(big,))).outgoing.tools[0] == big


def test_a_value_has_the_same_placeholder_wherever_it_is_said() -> None:
    result = sent(chat("4111 1111 1111 1111 or 4111-1111-1111-1111", f"{MAIL} {MAIL.upper()}"))
    first, second = (one.content for one in result.outgoing.turns)
    assert len(set(re.findall(r"CARD_\w+", first))) == 1
    assert len(set(re.findall(r"EMAIL_\w+", second))) == 1
    assert dict(result.counts) == {"card": 2, "email": 2}
    assert list(result.originals.values()) == ["4111 1111 1111 1111", MAIL]


def test_a_client_s_text_is_never_a_placeholder() -> None:
    taken = NONCE[:6]
    result = sent(chat(f"CARD_{taken.upper()}_1 is mine; {CARD}"))
    assert not any(taken in name for name in result.originals)
    with pytest.raises(Retryable):
        sent(chat(f"{NONCE} {CARD}"))


def test_a_value_divided_between_messages_parts_and_arguments_is_replaced() -> None:
    arguments = json.dumps({"a": CARD[:8], "b": CARD[8:]})
    divided = Outgoing(
        model="m",
        turns=(
            Turn(role="user", content=f"take {MAIL[:9]}"),
            Turn(role="assistant", content="go on"),
            Turn(role="user", content=MAIL[9:]),
            Turn(role="assistant", content="", calls=(Called(id="c", name="f", arguments=arguments),)),
        ),
    )
    told = msgspec.json.encode(sent(divided).outgoing).decode()
    assert not any(part in told for part in (MAIL[:9], MAIL[9:], CARD[:8], CARD[8:]))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(alphabet=st.characters(exclude_categories=["Cs"]))
        | st.sampled_from([CARD, MAIL]),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(alphabet=st.characters(exclude_categories=["Cs"])), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
@settings(max_examples=100, deadline=None)
def test_json_stays_json_of_the_same_shape(value: object) -> None:
    def shape(node: object) -> object:
        if isinstance(node, dict):
            return [shape(one) for one in node.values()]
        return [shape(one) for one in node] if isinstance(node, list) else "leaf"

    told = sent(chat("x", tools=(json.dumps(value),))).outgoing.tools[0]
    assert shape(json.loads(told)) == shape(value)
    assert MAIL not in told


@pytest.mark.parametrize(
    "found",
    [
        Found("card", 9, 0, 4, 0),
        Found("card", 0, 0, 400, 0),
        Found("card", 0, 5, 5, 0),
        Found("card", 0, -3, 2, 0),
        Found("of_tomorrow", 0, 0, 4, 0),
    ],
)
def test_findings_of_another_process_that_do_not_fit_send_nothing(found: Found) -> None:
    good = Found("card", 0, 1, 3, 1)
    for wrong in ([found], [good, found], [good, good]):
        with pytest.raises(Retryable) as raised:
            replaced(chat("0123456789"), OUTSIDE, wrong, nonce=NONCE)
        assert raised.value.code == "analysis_failed"


def test_every_kind_has_a_label() -> None:
    assert set(Kind.__args__) | {"pattern"} == set(LABELS)  # type: ignore[attr-defined]
    assert len(set(LABELS.values())) == len(LABELS)


def test_on_the_premises_a_request_is_as_it_is_and_outside_never() -> None:
    request = chat(CARD)
    assert on_premises(request, PREMISES).outgoing is request
    assert on_premises(request, PREMISES).category == "premises"
    with pytest.raises(Refused):
        on_premises(request, OUTSIDE)


def test_only_redaction_makes_what_leaves() -> None:
    result = sent(chat(CARD))
    with pytest.raises(TypeError):
        Redacted(object(), provider="far", category="outside", outgoing=chat(CARD), counts={}, originals={})
    with pytest.raises(TypeError):
        type("Mine", (Redacted,), {})
    with pytest.raises(AttributeError):
        result.outgoing = chat(CARD)
    with pytest.raises(AttributeError):
        del result.provider
    with pytest.raises(TypeError):
        result.originals["x"] = "y"  # type: ignore[index]
    for twin in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            twin(result)
    assert CARD not in repr(result)
    assert not hasattr(result, "__dict__")


def test_joins_follow_roles_and_documents() -> None:
    texts, joins, prose = texts_of(chat("a", "b", tools=('{"x": "c", "y": "d"}',)))
    named = [[texts[n] for n in one] for one in joins]
    assert ["a", "b"] in named
    assert ["c", "d"] in named
    assert {texts[n] for n in prose} == {"a", "b"}
