"""Playing recorded decisions under another policy, and explaining one: both say what decide does."""

from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings

from agent.policy.deciding import Allow, Redact, Refuse, decide, sensitive_by
from agent.policy.explaining import explain, limits
from agent.policy.facts import Facts
from agent.policy.replay import Changes, Outcome, replay
from agent.policy.rules import DEFAULT, KeyPolicy, ModelPolicy, Money, Provider, Route, Rules
from tests.agent.policy.made import PROVIDERS, any_facts, any_rules, facts, permission

PRICED = Provider(name="cloud", kind="openai", secret="env:K", usd_per_mtok_in="2.00", usd_per_mtok_out="8.00")
OTHER = Provider(name="other", kind="anthropic", secret="env:K")
CLOSED = Rules(version="closed")
OPEN = Rules(version="open", providers=(PRICED,), allow=(permission(keys=("batch",)),))
ALWAYS = Rules(version="always", providers=(PRICED,), allow=(permission(keys=("batch",), when="always"),))


def at_rack(n: int, **more: Any) -> Outcome:
    return Outcome(request_id=f"req_{n}", category="rack", model="small", prompt_tok=1000, completion_tok=500, **more)


def overflowed(n: int, usd: str = "0.01") -> Outcome:
    return Outcome(
        request_id=f"req_{n}",
        category="outside",
        provider="cloud",
        model="gpt-5",
        prompt_tok=1000,
        completion_tok=500,
        usd=usd,
    )


def spent(changes: Changes) -> tuple[dict[str, tuple[int, str]], dict[str, tuple[int, str]]]:
    return tuple({one.place: (one.requests, one.usd) for one in some} for some in (changes.before, changes.after))  # type: ignore[return-value]


def test_what_the_rack_served_stays_there_and_may_leave_is_told() -> None:
    recorded = [(facts(key_id="batch"), at_rack(1)), (facts(key_id="web"), at_rack(2))]
    changes = replay(recorded, CLOSED, OPEN)
    assert spent(changes) == ({"rack": (2, "0")}, {"rack": (2, "0")})
    assert (changes.requests, changes.may_leave_before, changes.may_leave_after) == (2, 0, 1)
    (newly,) = changes.newly
    assert (newly.key_id, newly.before, newly.after, newly.examples) == (
        *("batch", "stays on the premises", "may leave", ("req_1",)),
    )
    assert changes.moves == ()


def test_what_goes_elsewhere_at_once_costs_its_price() -> None:
    changes = replay([(facts(key_id="batch"), at_rack(n)) for n in range(4)], CLOSED, ALWAYS)
    each = (Decimal("2.00") * 1000 + Decimal("8.00") * 500) / 1_000_000
    assert spent(changes)[1] == {"outside cloud": (4, str((4 * each).normalize()))}
    (move,) = changes.moves
    assert (move.before, move.after, move.requests) == ("rack", "outside cloud", 4)
    assert move.examples == ("req_0", "req_1", "req_2")


def test_what_overflowed_waits_when_nothing_lets_it_out() -> None:
    changes = replay([(facts(key_id="batch"), overflowed(1))], OPEN, CLOSED)
    assert spent(changes) == ({"outside cloud": (1, "0.01")}, {"rack": (1, "0")})
    assert [(one.before, one.after) for one in changes.moves] == [("outside cloud", "rack")]
    assert (changes.may_leave_before, changes.may_leave_after) == (1, 0)


def test_what_overflowed_goes_to_the_first_place_that_may_have_it_now() -> None:
    to_other = Rules(providers=(PRICED, OTHER), allow=(permission(provider="other"), permission()))
    changes = replay([(facts(key_id="batch"), overflowed(1))], OPEN, to_other)
    (after,) = changes.after
    assert (after.place, after.requests, after.usd, after.unpriced) == ("outside other", 1, "0", 1)
    same = replay([(facts(key_id="batch"), overflowed(1, usd=""))], OPEN, OPEN)
    assert (same.before, same.moves) == (same.after, ())
    assert same.after[0].unpriced == 1


def test_refusals_before_and_after_are_told_by_their_codes() -> None:
    strict = Rules(keys=(KeyPolicy(id="web", classes=("REASONING",)),))
    recorded = [
        (facts(), at_rack(1)),
        (facts(), Outcome(request_id="req_2", refused="class_not_allowed")),
        (facts(key_id="batch"), Outcome(request_id="req_3", refused="overloaded")),
    ]
    tighter = replay(recorded, CLOSED, strict)
    assert {one.place: one.requests for one in tighter.after} == {
        "refused: class_not_allowed": 2,
        "refused: overloaded": 1,
    }
    looser = replay(recorded[1:], strict, CLOSED)
    assert {one.place for one in looser.before} == {"refused: class_not_allowed", "refused: overloaded"}
    assert {one.place for one in looser.after} == {"rack", "refused: overloaded"}, "the rack would still be full"


def test_another_price_may_be_given() -> None:
    changes = replay([(facts(key_id="batch"), at_rack(1))], CLOSED, ALWAYS, lambda *_: Decimal(3))
    assert spent(changes)[1] == {"outside cloud": (1, "3")}


@settings(max_examples=60, deadline=None)
@given(any_facts, any_rules, any_rules)
def test_every_request_is_counted_once_before_and_after(one: Facts, old: Rules, new: Rules) -> None:
    outcomes = (at_rack(1), overflowed(2), Outcome(refused="overloaded"), Outcome(refused="key_expired"))
    changes = replay([(one, each) for each in outcomes], old, new)
    assert changes.requests == sum(s.requests for s in changes.before) == sum(s.requests for s in changes.after) == 4
    assert replay([(one, each) for each in outcomes], old, new) == changes
    if any(spent.place.startswith("outside") for spent in changes.after):
        assert changes.may_leave_after, "nothing is said to go where the policy lets nothing go"
    if old == new:
        assert changes.newly == ()


# ---- explain ----


@settings(max_examples=60, deadline=None)
@given(any_facts, any_rules)
def test_an_explanation_says_what_is_decided(one: Facts, rules: Rules) -> None:
    decided, found = decide(one, rules), explain(one, rules)
    assert found.decision == {Allow: "allow", Redact: "redact", Refuse: "refuse"}[type(decided)]
    assert len(found.sensitive) == len(sensitive_by(one, rules))
    if isinstance(decided, Refuse):
        assert (found.code, found.message, found.asked) == (decided.code, decided.message, ())
        return
    assert len(found.places) == len(decided.places)
    permitted = {(asked.provider, asked.use) for asked in found.asked if not asked.why}
    assert permitted == {(p.provider, p.model) for p in decided.places if p.category != "rack"}
    assert [asked.allow for asked in found.asked] == list(range(len(rules.allow)))
    msgspec.json.encode(found)


@pytest.mark.parametrize(
    ("asked", "policy", "expected"),
    [
        (facts(sensitive=("taint",)), OPEN, "it is SENSITIVE, and never leaves the premises"),
        (
            facts(sensitive=("label",)),
            Rules(providers=PROVIDERS, allow=(permission(provider="ollama"),)),
            "it is SENSITIVE, and this provider does not have sensitive = true",
        ),
        (
            facts(key_id="batch"),
            msgspec.structs.replace(OPEN, keys=(KeyPolicy(id="batch", outside=False),)),
            "the key has outside = false",
        ),
        (facts(key_id="batch", features=("logprobs",)), OPEN, "it uses what only the rack can do"),
        (facts(key_id="web"), OPEN, "the key is not in its keys"),
        (
            facts(),
            Rules(providers=(PRICED,), allow=(permission(classes=("REASONING",)),)),
            "the class is not in its classes",
        ),
        (facts(key_id="batch", class_from="guess"), OPEN, "the class was guessed, and guessed = true is not set"),
        (facts(), Rules(providers=(PRICED,), allow=(permission(models=("large",)),)), "the model is not in its models"),
        (facts(key_id="batch"), OPEN, ""),
    ],
)
def test_the_first_reason_why_an_allow_does_not_permit_it_is_told(asked: Facts, policy: Rules, expected: str) -> None:
    assert [one.why for one in explain(asked, policy).asked] == [expected]


def test_why_routes_do_not_count_is_told() -> None:
    rules = Rules(
        keys=(KeyPolicy(id="web", models=("small",)),),
        routes=(
            Route(task_class="REASONING", model="small"),
            Route(task_class="ROUTINE", model="small", up_to_tok=10),
            Route(task_class="ROUTINE", model="large"),
        ),
    )
    found = explain(facts(model="auto", prompt_tok=9, answer_tok=2), rules)
    assert (found.decision, found.code) == ("refuse", "no_route")
    assert found.routes == (
        "routes[0] (small): is for REASONING",
        "routes[1] (small): is for at most 10 tokens, and prompt and answer may be 11",
        "routes[2] (large): this key may not use the model",
    )


def test_what_makes_it_sensitive_and_the_entry_of_its_key_are_told() -> None:
    rules = Rules(keys=(KeyPolicy(id="*", sensitive=True),), models=(ModelPolicy(name="small", sensitive=True),))
    found = explain(facts(sensitive=("label",)), rules)
    assert found.sensitive == (
        "its caller says so",
        "all requests of this key are",
        "all requests for a model that may get it are",
    )
    assert found.key_entry == "*"
    assert explain(facts(), DEFAULT).key_entry == "none"
    assert explain(facts(), Rules(keys=(KeyPolicy(id="web"),))).key_entry == "own"


def test_limits_of_a_key_are_told() -> None:
    key = KeyPolicy(
        id="k",
        requests_per_minute=5,
        tokens_per_minute=9000,
        week=Money(prompt_tok=7, completion_tok=8, requests=9, usd="1.50"),
        outside=False,
        expires="2027-01-01",
    )
    assert list(limits(key)) == [
        *("5 requests a minute", "9,000 tokens a minute", "9 requests a week", "7 prompt tokens a week"),
        *("8 answer tokens a week", "1.50 USD a week", "last day 2027-01-01", "nothing leaves the premises"),
    ]
    assert list(limits(KeyPolicy(id="k"))) == []
