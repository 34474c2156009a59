"""Entries: whatever its caller passes, no text gets into a line that nobody vouches for."""

from typing import Any, Literal, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from agent.audit.entry import (
    Allowed,
    Answered,
    Begin,
    Entry,
    Gap,
    KeptFacts,
    Line,
    Named,
    Pruned,
    Vocabulary,
    _Kept,
    allowed,
    decode,
)
from agent.gateway import outcomes
from agent.policy.deciding import Allow, Redact, decide
from agent.policy.facts import Facts
from agent.policy.rules import Permission, Provider, Rules

NAMES: dict[str, set[str]] = {
    "model": {"chat", "gpt-x"},
    "key": {"team"},
    "node": {"n1", "n2"},
    "provider": {"openai"},
    "policy": {"2026-12-01"},
    "code": {"no_route"},
}
MARKER = "Zq7 my IBAN is DE89"


def known(of: Named, name: str) -> bool:
    return name in NAMES[of]


def body(entry: Entry) -> bytes:
    return Vocabulary(known).body(entry)


FULL = Entry(
    kind="ended",
    t_ms=1_793_000_000_000,
    request=f"req_{'ab' * 12}",
    node="n1",
    facts=Facts(
        key_id="team", model="chat", task_class="REASONING", class_from="header", sensitive=("label",), day="2026-11-27"
    ),
    sensitive=True,
    policy="2026-12-01",
    policy_digest="ab" * 6,
    decision="redact",
    code="no_route",
    places=(Allowed(category="rack"), Allowed(category="outside", provider="openai")),
    answered=Answered(category="outside", provider="openai", node="n2", model="gpt-x", version="ab" * 8),
    fallback="full",
    redacted={"email": 2, "card": 1},
    outcome="ok",
    reason="",
    prompt_tok=100,
    cached_tok=5,
    completion_tok=7,
    reasoning_tok=1,
    cost_micro=1234,
    currency="USD",
    queue_us=1,
    ttft_us=2,
    total_us=3,
    status=200,
    streamed=True,
)


def test_an_entry_is_read_as_it_was_written() -> None:
    found = decode(body(FULL))
    assert isinstance(found, Entry)
    assert msgspec.to_builtins(found) == msgspec.to_builtins(FULL)


def strings(kind: inspect.Type) -> list[inspect.StrType]:
    """Every string type that a type may hold."""
    match kind:
        case inspect.StrType():
            return [kind]
        case inspect.StructType():
            return [one for field in kind.fields for one in strings(field.type)]
        case inspect.UnionType():
            return [one for inner in kind.types for one in strings(inner)]
        case inspect.VarTupleType():
            return strings(kind.item_type)
        case inspect.DictType():
            return [*strings(kind.key_type), *strings(kind.value_type)]
        case inspect.IntType() | inspect.BoolType() | inspect.NoneType() | inspect.LiteralType():
            return []
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", [_Kept, Begin, Gap, Pruned])
def test_every_string_of_a_line_has_a_pattern_that_admits_no_text(kind: type[Line]) -> None:
    found = strings(inspect.type_info(kind))
    assert found or kind in (Gap, Pruned)
    for one in found:
        assert one.pattern is not None, "a new field needs a type of its own"
        assert one.pattern.startswith(r"\A"), one
        assert one.pattern.endswith(r"\Z"), "$ admits a line break"
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(msgspec.json.encode(MARKER), type=annotated(one.pattern))


def annotated(pattern: str) -> Any:
    from typing import Annotated

    return Annotated[str, msgspec.Meta(pattern=pattern)]


def test_facts_are_recorded_with_all_that_they_hold() -> None:
    assert set(KeptFacts.__struct_fields__) == set(Facts.__struct_fields__) > {"model"}


def test_outcomes_are_the_gateway_s() -> None:
    types = {field.name: set(get_args(field.type)) for field in msgspec.structs.fields(Entry)}
    assert types["outcome"] == {"", *get_args(outcomes.Outcome)}
    assert types["reason"] == set(get_args(outcomes.Reason))


ODD = st.text(st.characters(categories=("Cs", "Cc", "Ll")), min_size=1, max_size=4)
TEXTS = st.one_of(st.just(MARKER), st.text(), ODD, st.from_regex(r"[A-Za-z0-9._:/-]{1,80}", fullmatch=True))
FIELDS = ("request", "node", "policy", "policy_digest", "decision", "code", "fallback", "outcome", "reason", "currency")
PLACED = ("category", "provider", "node", "model", "version")
TOLD = ("key_id", "model", "task_class", "class_from", "day")
Where = Literal["entry", "answered", "facts", "place", "sensitive", "features", "redacted", "kind"]
VOCABULARY = {name for names in NAMES.values() for name in names}


def planted(where: Where, field: str, text: Any) -> Entry:
    replace = msgspec.structs.replace
    assert FULL.answered is not None
    assert FULL.facts is not None
    match where:
        case "answered":
            return replace(FULL, answered=replace(FULL.answered, **{field: text}))
        case "facts":
            return replace(FULL, facts=replace(FULL.facts, **{field: text}))
        case "sensitive" | "features":
            return replace(FULL, facts=replace(FULL.facts, **{where: (text,)}))
        case "place":
            return replace(FULL, places=(replace(FULL.places[1], provider=text),))
        case "redacted":
            return replace(FULL, redacted={text: 1})
        case "kind":
            return replace(FULL, kind=text)
    return replace(FULL, **{field: text})


PLACES_OF: dict[Where, tuple[str, ...]] = {
    "entry": FIELDS,
    "answered": PLACED,
    "facts": TOLD,
    **dict.fromkeys(("sensitive", "features", "place", "redacted", "kind"), ("",)),
}


@given(st.sampled_from(sorted(PLACES_OF)), st.data(), TEXTS)
def test_no_text_gets_into_a_line_from_any_field(where: Where, data: st.DataObject, text: str) -> None:
    field = data.draw(st.sampled_from(PLACES_OF[where]))
    line = body(planted(where, field, text))
    found = decode(line)
    assert isinstance(found, Entry)
    assert b"\n" not in line
    told = leaves(msgspec.to_builtins(found))
    before = leaves(msgspec.to_builtins(FULL)) | {"", "other"}
    new = told - before
    if new:  # a value of the fixed lists, or an id, a hash, a day or a currency by its shape
        assert new == {text}
        assert field in ("request", "policy_digest", "version", "day", "currency") or text in fixed()


def leaves(tree: Any) -> set[str]:
    if isinstance(tree, dict):
        return {leaf for key, value in tree.items() for leaf in ({key} | leaves(value))}
    if isinstance(tree, list | tuple):
        return {leaf for value in tree for leaf in leaves(value)}
    return {tree} if isinstance(tree, str) else set()


def fixed() -> set[str]:
    found = {"", *VOCABULARY}
    pending: list[Any] = [field.type for kind in (Entry, KeptFacts, Answered) for field in msgspec.structs.fields(kind)]
    while pending:
        one = pending.pop()
        found |= {one} if isinstance(one, str) else set()
        pending += get_args(one)
    return found


@pytest.mark.parametrize("text", [MARKER, "chat\n", "chat ", "ch\u0430t", "x" * 63, "CHAT", "team", "\ud800x"])
def test_a_model_that_nothing_serves_is_not_recorded(text: str) -> None:
    line = body(planted("facts", "model", text))
    found = decode(line)
    assert isinstance(found, Entry)
    assert found.facts is not None
    assert found.facts.model == ""
    assert found.facts.key_id == "team", "the rest is"
    assert text.encode("utf-8", "replace") not in line or text == "team"


def test_a_name_that_was_known_once_stays_so() -> None:
    """A model may be removed while its requests are answered."""
    served = {"chat"}
    vocabulary = Vocabulary(lambda of, name: name in served if of == "model" else known(of, name))
    assert b'"model":"chat"' in vocabulary.body(FULL)
    served.clear()
    assert b'"model":"chat"' in vocabulary.body(FULL)
    assert b'"model":"chat"' not in Vocabulary(lambda of, name: False).body(FULL)


@pytest.mark.parametrize("model", ["auto", "class:routine", "class:orchestration"])
def test_a_model_that_was_left_open_is_recorded_as_it_was_asked_for(model: str) -> None:
    found = decode(body(planted("facts", "model", model)))
    assert isinstance(found, Entry)
    assert found.facts is not None
    assert found.facts.model == model


def test_a_configured_name_that_could_be_a_text_costs_only_itself() -> None:
    assert FULL.answered is not None
    odd = msgspec.structs.replace(FULL, answered=msgspec.structs.replace(FULL.answered, model="our best model"))
    found = decode(Vocabulary(lambda of, name: True).body(odd))
    assert isinstance(found, Entry)
    assert found.answered == Answered(category="outside", provider="openai", node="n2", version="ab" * 8)


def test_an_unknown_code_is_recorded_as_one() -> None:
    found = decode(body(planted("entry", "code", "a_code_of_tomorrow")))
    assert isinstance(found, Entry)
    assert found.code == "other"


@pytest.mark.parametrize("value", [-1, 2**60, "7", None, 1.5, True, MARKER])
def test_a_count_that_is_none_costs_only_itself(value: Any) -> None:
    found = decode(body(planted("entry", "prompt_tok", value)))
    assert isinstance(found, Entry)
    assert found.prompt_tok == 0
    assert found.completion_tok == 7


def test_the_places_of_a_decision_are_recorded_once_each() -> None:
    rules = Rules(
        providers=(Provider(name="openai", kind="openai", secret="env:KEY"),),
        allow=tuple(
            Permission(provider="openai", use=use, keys=("*",), classes=("ROUTINE",), models=("*",))
            for use in ("a", "b")
        ),
    )
    decision = decide(Facts(model="chat", class_from="header"), rules)
    assert isinstance(decision, Allow | Redact)
    assert allowed(decision.places) == (Allowed(category="rack"), Allowed(category="outside", provider="openai"))


@given(st.binary(max_size=200))
def test_anything_is_decoded_or_passed_over(line: bytes) -> None:
    assert decode(line) is None or isinstance(decode(line), Entry | Begin | Gap | Pruned)
