"""decide: what is SENSITIVE stays, what no [[allow]] permits stays, and every request has the rack among its places."""

import os
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.policy.deciding import Allow, Decision, Place, Redact, Refuse, decide, models_of, sensitive_by
from agent.policy.facts import Facts, Reason
from agent.policy.rules import DEFAULT, KeyPolicy, ModelPolicy, Provider, Route, Rules
from tests.agent.policy.made import PROVIDERS, any_facts, any_rules, facts, permission

reasons = st.sampled_from(get_args(Reason))
many = settings(max_examples=int(os.environ.get("MLXRACK_EXAMPLES", "60")), deadline=None)


def places(decided: Decision) -> tuple[Place, ...]:
    return () if isinstance(decided, Refuse) else decided.places


def outside(decided: Decision) -> list[str]:
    return [one.provider for one in places(decided) if one.category == "outside"]


def named(decided: Decision) -> list[str]:
    """Places as text: the rack's by model, others by provider; refusals by code."""
    if isinstance(decided, Refuse):
        return [decided.code]
    return [one.model if one.category == "rack" else f"{one.provider} {one.when}" for one in decided.places]


def wide_open(rules: Rules, *, guessed: bool = True) -> Rules:
    """The same, where everything else is permitted: what is closed then is closed by nothing but what a test is
    about."""
    every = tuple(permission(provider=one.name, guessed=guessed, keys=("*",)) for one in PROVIDERS)
    return msgspec.structs.replace(rules, allow=(*rules.allow, *every))


# ---- properties ----


@many
@given(any_facts, any_rules, reasons)
def test_what_is_sensitive_for_any_reason_goes_nowhere_that_may_not_have_it(
    one: Facts, rules: Rules, reason: Reason
) -> None:
    decided = decide(msgspec.structs.replace(one, sensitive=(reason,)), wide_open(rules))
    assert isinstance(decided, Allow | Refuse)
    assert {place.provider for place in places(decided)} <= {"", "studio"}


@many
@given(any_facts, any_rules, st.sampled_from(("key", "model", "alias", "route")))
def test_what_the_policy_makes_sensitive_goes_nowhere_either(one: Facts, rules: Rules, how: str) -> None:
    """By its key, by the model asked for, by another name of that, and by a model that a route may choose."""
    key = msgspec.structs.replace(rules.by_key.get(one.key_id) or KeyPolicy(id=one.key_id or "*"), sensitive=True)
    if how == "key":
        rules = msgspec.structs.replace(rules, keys=(*(k for k in rules.keys if k.id != key.id), key))
    else:
        reached = {"model": (one.model,), "alias": one.aliases, "route": models_of(one, rules)}[how]
        closed = tuple(ModelPolicy(name=name, sensitive=True) for name in reached[-1:])
        others = tuple(m for m in rules.models if m.name not in reached[-1:])
        rules = msgspec.structs.replace(rules, models=(*others, *closed))
        if not closed:
            return
    decided = decide(one, wide_open(rules))
    if how != "key" or one.key_id:
        assert {place.provider for place in places(decided)} <= {"", "studio"}


@many
@given(any_facts, any_rules)
def test_without_an_allow_nothing_leaves_the_rack(one: Facts, rules: Rules) -> None:
    decided = decide(one, msgspec.structs.replace(rules, allow=()))
    assert {place.category for place in places(decided)} <= {"rack"}


@many
@given(any_facts, any_rules)
def test_a_key_that_stays_goes_nowhere_outside(one: Facts, rules: Rules) -> None:
    stays = tuple(msgspec.structs.replace(key, outside=False) for key in rules.keys)
    rules = msgspec.structs.replace(rules, keys=(*(k for k in stays if k.id != "*"), KeyPolicy(id="*", outside=False)))
    assert outside(decide(one, wide_open(rules))) == []


@many
@given(any_facts, any_rules)
def test_a_guess_permits_nothing_that_is_not_permitted_to_guesses(one: Facts, rules: Rules) -> None:
    rules = msgspec.structs.replace(
        rules, allow=tuple(msgspec.structs.replace(each, guessed=False) for each in rules.allow)
    )
    decided = decide(msgspec.structs.replace(one, class_from="guess"), wide_open(rules, guessed=False))
    assert {place.category for place in places(decided)} <= {"rack"}


@many
@given(any_facts, any_rules)
def test_decisions_are_total_deterministic_and_have_the_rack(one: Facts, rules: Rules) -> None:
    decided = decide(one, rules)
    again = msgspec.convert(msgspec.to_builtins(rules), Rules)
    assert decided == decide(one, again)
    if not isinstance(decided, Refuse):
        assert any(place.category == "rack" for place in decided.places)
        assert len(set(decided.places)) == len(decided.places)
        order = [place.when for place in decided.places]
        assert order == sorted(order, key=["first", "full"].index)
        assert isinstance(decided, Redact) == bool(outside(decided))


@many
@given(any_facts, any_rules, reasons)
def test_another_reason_to_be_sensitive_adds_no_place(one: Facts, rules: Rules, reason: Reason) -> None:
    more = msgspec.structs.replace(one, sensitive=(*one.sensitive, reason))
    assert set(places(decide(more, rules))) <= set(places(decide(one, rules)))
    assert set(sensitive_by(one, rules)) <= set(sensitive_by(more, rules))


@many
@given(any_facts, any_rules, st.integers(0, 4))
def test_an_allow_that_is_removed_adds_no_place(one: Facts, rules: Rules, n: int) -> None:
    fewer = msgspec.structs.replace(rules, allow=rules.allow[:n] + rules.allow[n + 1 :])
    assert set(places(decide(one, fewer))) <= set(places(decide(one, rules)))


@many
@given(any_facts, any_rules)
def test_each_place_elsewhere_is_one_that_an_allow_names_for_exactly_this_request(one: Facts, rules: Rules) -> None:
    for place in places(decide(one, rules)):
        if place.category != "rack":
            assert any(
                (each.provider, each.use) == (place.provider, place.model)
                and (one.key_id in each.keys or "*" in each.keys)
                and one.task_class in each.classes
                and (
                    {"*", "auto", "class:routine", "class:reasoning"} & {*each.models}
                    or {*each.models} >= {*models_of(one, rules)}
                )
                for each in rules.allow
            )


# ---- tables ----

OPEN = Rules(providers=PROVIDERS, allow=(permission(),))
ROUTES = (
    Route(task_class="ROUTINE", model="small", up_to_tok=1000),
    Route(task_class="ROUTINE", model="large"),
    Route(task_class="REASONING", model="large"),
)


def rules(**more: Any) -> Rules:
    return Rules(providers=PROVIDERS, **more)


@pytest.mark.parametrize(
    ("asked", "policy", "expected"),
    [
        (facts(), DEFAULT, ["small"]),
        (facts(model="auto"), DEFAULT, ["no_route"]),
        (facts(), OPEN, ["small", "cloud full"]),
        (facts(key_id=""), OPEN, ["small", "cloud full"]),  # * is also who has no key
        (facts(), rules(allow=(permission(when="always"),)), ["cloud first", "small"]),
        (facts(), rules(allow=(permission(provider="ollama"),)), ["small", "ollama full"]),
        (facts(), rules(allow=(permission(), permission(keys=("web",)))), ["small", "cloud full"]),  # once
        # exactly this key, class and model
        (facts(), rules(allow=(permission(keys=("batch",)),)), ["small"]),
        (facts(key_id=""), rules(allow=(permission(keys=("web",)),)), ["small"]),
        *((facts(), rules(allow=(permission(**{names: ()}),)), ["small"]) for names in ("keys", "classes", "models")),
        (facts(), rules(allow=(permission(classes=("REASONING",)),)), ["small"]),
        (facts(), rules(allow=(permission(models=("large",)),)), ["small"]),
        (facts(model="smal"), rules(allow=(permission(models=("small",)),)), ["smal"]),
        (facts(model="Small"), rules(allow=(permission(models=("small",)),)), ["Small"]),
        (facts(model="gpt"), rules(allow=(permission(models=("gpt",)),)), ["gpt", "cloud full"]),  # only there
        (facts(class_from="guess"), OPEN, ["small"]),
        (facts(class_from="guess"), rules(allow=(permission(guessed=True),)), ["small", "cloud full"]),
        (facts(class_from="key"), OPEN, ["small", "cloud full"]),
        *((facts(features=(f,)), OPEN, ["small"]) for f in ("logprobs", "n", "prompt", "embeddings", "template_args")),
        (facts(features=("sampling", "tools")), OPEN, ["small"]),
        (facts(features=("tools", "schema")), OPEN, ["small", "cloud full"]),
        # keys
        (facts(), rules(keys=(KeyPolicy(id="web", expires="2026-11-26"),)), ["key_expired"]),
        (facts(), rules(keys=(KeyPolicy(id="web", expires="2026-11-27"),)), ["small"]),  # its last day
        (facts(), rules(keys=(KeyPolicy(id="*", expires="2026-11-26"),)), ["key_expired"]),
        (facts(), rules(keys=(KeyPolicy(id="*", expires="2026-11-26"), KeyPolicy(id="web"))), ["small"]),
        (facts(), rules(keys=(KeyPolicy(id="web", classes=("REASONING",)),)), ["class_not_allowed"]),
        (facts(), rules(keys=(KeyPolicy(id="web", models=("large",)),)), ["model_not_allowed"]),
        (facts(key_id="other"), rules(keys=(KeyPolicy(id="web", models=("large",)),)), ["small"]),
        (facts(), rules(keys=(KeyPolicy(id="web", outside=False),), allow=OPEN.allow), ["small"]),
        (
            facts(),
            rules(keys=(KeyPolicy(id="web", outside=False),), allow=(permission(provider="ollama"),)),
            ["small", "ollama full"],
        ),
        # the choice is left
        (facts(model="auto"), rules(routes=ROUTES), ["small", "large"]),
        (facts(model="AUTO", prompt_tok=999, answer_tok=1), rules(routes=ROUTES), ["small", "large"]),
        (facts(model="auto", prompt_tok=1000, answer_tok=1), rules(routes=ROUTES), ["large"]),
        (facts(model="class:reasoning", task_class="REASONING"), rules(routes=ROUTES), ["large"]),
        (facts(model="auto", task_class="ORCHESTRATION"), rules(routes=ROUTES), ["no_route"]),
        (facts(model="auto", features=("embeddings",)), rules(routes=ROUTES), ["no_route"]),
        (facts(model="auto"), rules(routes=ROUTES, keys=(KeyPolicy(id="web", models=("large",)),)), ["large"]),
        (facts(model="auto"), rules(routes=ROUTES, allow=(permission(models=("small",)),)), ["small", "large"]),
        (
            facts(model="auto"),
            rules(routes=ROUTES, allow=(permission(models=("small", "large")),)),
            ["small", "large", "cloud full"],
        ),
        (
            facts(model="Auto"),
            rules(routes=ROUTES, allow=(permission(models=("auto",)),)),
            ["small", "large", "cloud full"],
        ),
        (
            facts(model="class: ROUTINE"),
            rules(routes=ROUTES, allow=(permission(models=("class:routine",)),)),
            ["small", "large", "cloud full"],
        ),
        # SENSITIVE
        (facts(sensitive=("label",)), OPEN, ["small"]),
        (facts(), rules(allow=OPEN.allow, keys=(KeyPolicy(id="web", sensitive=True),)), ["small"]),
        (facts(key_id=""), rules(allow=OPEN.allow, keys=(KeyPolicy(id="*", sensitive=True),)), ["small"]),
        (facts(sensitive=("taint_full",)), rules(allow=(permission(provider="ollama"),)), ["small"]),
        (facts(sensitive=("detector",)), rules(allow=(permission(provider="studio"),)), ["small", "studio full"]),
        (facts(), rules(allow=OPEN.allow, models=(ModelPolicy(name="small", sensitive=True),)), ["small"]),
        (
            facts(aliases=("old-small",)),
            rules(allow=OPEN.allow, models=(ModelPolicy(name="old-small", sensitive=True),)),
            ["small"],
        ),
        (
            facts(model="auto"),
            rules(allow=OPEN.allow, routes=ROUTES, models=(ModelPolicy(name="large", sensitive=True),)),
            ["small", "large"],
        ),
    ],
)
def test_a_request_goes_to(asked: Facts, policy: Rules, expected: list[str]) -> None:
    assert named(decide(asked, policy)) == expected


def test_a_refusal_tells_the_client_what_it_may_use_and_never_what_it_sent() -> None:
    key = KeyPolicy(id="web", models=("large",), classes=("REASONING",))
    found = decide(facts(model="my-secret-name", task_class="REASONING"), rules(keys=(key,)))
    assert isinstance(found, Refuse)
    assert (found.code, found.param) == ("model_not_allowed", "model")
    assert "large" in found.message
    assert "my-secret" not in found.message


def test_a_provider_outside_never_has_sensitive_requests_even_if_nobody_checked_the_file() -> None:
    wrong = Provider(name="cloud", kind="openai", secret="env:K", sensitive=True)
    found = decide(facts(sensitive=("label",)), Rules(providers=(wrong,), allow=(permission(),)))
    assert named(found) == ["small"]


def test_the_wait_before_another_place_is_that_of_its_allow() -> None:
    found = decide(facts(), rules(allow=(permission(wait_s=7.0),)))
    assert places(found)[1] == Place(category="outside", model="gpt-5", provider="cloud", when="full", wait_s=7.0)
