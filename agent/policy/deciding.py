"""What may be done with a request, decided before routing, so that retries and continuations choose only among places
that are allowed. SENSITIVE is evaluated first. Pure."""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from agent.policy.classes import is_left_open, written
from agent.policy.facts import Facts, Reason
from agent.policy.rules import ANY, KeyPolicy, Permission, Route, Rules, of_key, of_model, provider

Category = Literal["rack", "premises", "outside"]
RACK_ONLY = frozenset({"logprobs", "n", "prompt", "embeddings", "template_args", "sampling"})
"""Features that only the rack has."""
Obstacle = Literal["sensitive", "key_stays", "feature", "key", "class", "guessed", "model"]
"""Why an [[allow]] does not permit a request, in the order in which it is asked."""


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

    The rack is among the places of every request that has any, so that a provider that fails costs no answer. For any
    facts and for any rules that ``check`` finds no problem in, this raises nothing.
    """
    key = of_key(rules, facts.key_id)
    if (refused := _out_of_scope(facts, key)) is not None:
        return refused
    models = models_of(facts, rules)
    if not models:
        return _no_route(facts)
    closed = bool(sensitive_by(facts, rules))
    permitted = [_place(one, rules) for one in rules.allow if obstacle(one, facts, rules, closed=closed) is None]
    first = [one for one in permitted if one.when == "first"]
    rack = [Place(category="rack", model=name) for name in models]
    then = [one for one in permitted if one.when == "full"]
    places = tuple(dict.fromkeys((*first, *rack, *then)))
    return Redact(places=places) if any(one.category == "outside" for one in places) else Allow(places=places)


def sensitive_by(facts: Facts, rules: Rules) -> tuple[Reason, ...]:
    """Everything that makes it SENSITIVE: what the facts say, and the policy for its key or for a model that may get
    it. Of a request that leaves the choice, one SENSITIVE model among its routes is enough."""
    found = list(facts.sensitive)
    if of_key(rules, facts.key_id).sensitive:
        found.append("key")
    if any(of_model(rules, name).sensitive for name in (facts.model, *facts.aliases, *models_of(facts, rules))):
        found.append("model")
    return tuple(dict.fromkeys(found))


def models_of(facts: Facts, rules: Rules) -> tuple[str, ...]:
    """The served names of the rack that may answer it, in order of preference: those whose aliases ``Facts.aliases``
    has."""
    if not is_left_open(facts.model):
        return (facts.model,)
    usable = of_key(rules, facts.key_id).models
    return tuple(name for name in _routed(facts, rules) if _listed(name, usable))


def fits(route: Route, facts: Facts) -> bool:
    """Whether a route is for requests of this class and length."""
    length = facts.prompt_tok + facts.answer_tok
    return route.task_class == facts.task_class and (not route.up_to_tok or length <= route.up_to_tok)


def obstacle(one: Permission, facts: Facts, rules: Rules, *, closed: bool) -> Obstacle | None:
    """Why an [[allow]] does not permit its provider to this request; None where it does. ``closed``: it is
    SENSITIVE."""
    target = provider(rules, one.provider)
    if closed and (target.category == "outside" or not target.sensitive):
        return "sensitive"
    if target.category == "outside" and not of_key(rules, facts.key_id).outside:
        return "key_stays"
    if not RACK_ONLY.isdisjoint(facts.features):
        return "feature"
    if not _listed(facts.key_id, one.keys):
        return "key"
    if facts.task_class not in one.classes:
        return "class"
    if facts.class_from == "guess" and not one.guessed:
        return "guessed"
    return None if _means(one, facts, rules) else "model"


def _means(one: Permission, facts: Facts, rules: Rules) -> bool:
    """Whether an [[allow]] is about the model that was asked for. Where the choice was left open, it is about all
    models that may be chosen, or about leaving it open."""
    if not is_left_open(facts.model):
        return _listed(facts.model, one.models)
    return _listed(written(facts.model), one.models) or _all_listed(models_of(facts, rules), one.models)


def expired(key: KeyPolicy, day: str) -> Refuse | None:
    """Why the key may do nothing on this day (YYYY-MM-DD, UTC): its last one is over."""
    if not key.expires or day <= key.expires:
        return None
    return Refuse(code="key_expired", message="this API key has expired; ask the rack's operator for another one")


def not_usable(name: str, key: KeyPolicy) -> Refuse | None:
    """Why the key may not use a model of the rack."""
    if _listed(name, key.models):
        return None
    message = f"this API key may not use this model; allowed: {', '.join(key.models) or 'none'}"
    return Refuse(code="model_not_allowed", message=message, param="model")


def _out_of_scope(facts: Facts, key: KeyPolicy) -> Refuse | None:
    if (over := expired(key, facts.day)) is not None:
        return over
    if facts.task_class not in key.classes:
        allowed = ", ".join(key.classes) or "none"
        return Refuse(
            code="class_not_allowed", message=f"this API key may not send {facts.task_class}; allowed: {allowed}"
        )
    return None if is_left_open(facts.model) else not_usable(facts.model, key)


def _no_route(facts: Facts) -> Refuse:
    what = f"{facts.task_class} requests of this length and key"
    return Refuse(code="no_route", message=f"the policy names no model for {what}; name a model", param="model")


def _routed(facts: Facts, rules: Rules) -> tuple[str, ...]:
    """The routes of a request that leaves the choice. Of embeddings there are none: vectors of two models cannot be
    compared, so their model is named."""
    if "embeddings" in facts.features:
        return ()
    return tuple(dict.fromkeys(route.model for route in rules.routes if fits(route, facts)))


def _place(one: Permission, rules: Rules) -> Place:
    return Place(
        category=provider(rules, one.provider).category,
        model=one.use,
        provider=one.provider,
        when="first" if one.when == "always" else "full",
        wait_s=one.wait_s,
    )


def _listed(name: str, names: Sequence[str]) -> bool:
    return name in names or ANY in names


def _all_listed(wanted: Iterable[str], names: Sequence[str]) -> bool:
    return all(_listed(name, names) for name in wanted)
