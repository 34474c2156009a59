"""What may be done with a request, decided before routing, so that retries and continuations choose only among places
that are allowed. SENSITIVE is evaluated first. Pure."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from agent.policy.classes import is_left_open
from agent.policy.facts import Facts
from agent.policy.rules import ANY, KeyPolicy, Permission, Provider, Rules, of_key, of_model, provider

Category = Literal["rack", "premises", "outside"]
_RACK_ONLY = frozenset({"logprobs", "n", "prompt", "embeddings", "template_args", "sampling"})
"""Features that only the rack has."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request may be answered, and by which model there. ``when`` first: at once. ``when`` full: only if the
    places before it refuse it, or have not begun after ``wait_s`` (0: however long)."""

    category: Category
    model: str
    provider: str = ""
    when: Literal["first", "full"] = "first"
    wait_s: float = 0.0


class Allow(msgspec.Struct, frozen=True, kw_only=True):
    """It stays on the premises: ``places`` in order of preference."""

    places: tuple[Place, ...]


class Redact(msgspec.Struct, frozen=True, kw_only=True):
    """It may leave: ``places`` in order of preference, those outside only with what redaction has made of it."""

    places: tuple[Place, ...]


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """It is not served; ``code`` and ``message`` are for the client, ``param`` the field at fault."""

    code: str
    message: str
    param: str | None = None


Decision = Allow | Redact | Refuse


def decide(facts: Facts, rules: Rules) -> Decision:
    """The places of a request, or why it has none.

    1. The key: expired, or the model or the class is not among what it may use.
    2. SENSITIVE: only the rack, and servers on the premises that may have it.
    3. The models of the rack: the one asked for, or the routes of the class.
    4. Other places that an [[allow]] permits to exactly this key, class and model.

    The rack is among the places of every request that has any, so that a provider that fails costs no answer.
    """
    key = of_key(rules, facts.key_id)
    if (refused := _out_of_scope(facts, key)) is not None:
        return refused
    models = _models(facts, rules, key)
    if not models:
        return Refuse(
            code="no_route",
            message=f"the policy names no model for {facts.task_class} requests of this length; name a model",
            param="model",
        )
    closed = is_sensitive(facts, rules, key, models)
    elsewhere = [_place(one, rules) for one in rules.allow if _permits(one, facts, rules, models, key, closed=closed)]
    first = [one for one in elsewhere if one.when == "first"]
    rack = [Place(category="rack", model=name) for name in models]
    then = [one for one in elsewhere if one.when == "full"]
    places = tuple(dict.fromkeys((*first, *rack, *then)))
    return Redact(places=places) if any(one.category == "outside" for one in places) else Allow(places=places)


def _out_of_scope(facts: Facts, key: KeyPolicy) -> Refuse | None:
    if key.expires and facts.day > key.expires:
        return Refuse(code="key_expired", message="this API key has expired; ask the rack's operator for another one")
    if facts.task_class not in key.classes:
        allowed = ", ".join(key.classes) or "none"
        return Refuse(
            code="class_not_allowed", message=f"this API key may not send {facts.task_class}; allowed: {allowed}"
        )
    if not is_left_open(facts.model) and not _listed(facts.model, key.models):
        message = f"this API key may not use this model; allowed: {', '.join(key.models) or 'none'}"
        return Refuse(code="model_not_allowed", message=message, param="model")
    return None


def _models(facts: Facts, rules: Rules, key: KeyPolicy) -> list[str]:
    """Served names in order of preference."""
    if not is_left_open(facts.model):
        return [facts.model]
    length = facts.prompt_tok + facts.answer_tok
    return [
        route.model
        for route in rules.routes
        if route.task_class == facts.task_class
        and (not route.up_to_tok or length <= route.up_to_tok)
        and _listed(route.model, key.models)
    ]


def is_sensitive(facts: Facts, rules: Rules, key: KeyPolicy, models: Sequence[str]) -> bool:
    """Whether anything makes it SENSITIVE: what the facts say, or the policy for its key or for a model that may get
    it."""
    return bool(facts.sensitive) or key.sensitive or any(of_model(rules, name).sensitive for name in models)


def _permits(
    one: Permission, facts: Facts, rules: Rules, models: Sequence[str], key: KeyPolicy, *, closed: bool
) -> bool:
    """Whether an [[allow]] permits its provider to this request; ``closed``: it is SENSITIVE."""
    if not _may_have(provider(rules, one.provider), key, closed=closed) or _RACK_ONLY.intersection(facts.features):
        return False
    asked = (facts.model, *models)
    return (
        _listed(facts.key_id, one.keys)
        and facts.task_class in one.classes
        and any(_listed(name, one.models) for name in asked)
    )


def _may_have(target: Provider, key: KeyPolicy, *, closed: bool) -> bool:
    if target.category == "outside":
        return key.outside and not closed
    return target.sensitive or not closed


def _place(one: Permission, rules: Rules) -> Place:
    return Place(
        category=provider(rules, one.provider).category,
        model=one.use,
        provider=one.provider,
        when="first" if one.when == "always" else "full",
        wait_s=one.wait_s,
    )


def _listed(name: str, names: tuple[str, ...]) -> bool:
    return name in names or ANY in names
