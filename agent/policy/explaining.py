"""Why the policy decides as it does about one request, for its operator. Pure."""

from collections.abc import Iterator

import msgspec

from agent.policy.classes import is_left_open
from agent.policy.deciding import Obstacle, Place, Redact, Refuse, decide, fits, obstacle, sensitive_by
from agent.policy.facts import Facts
from agent.policy.rules import ANY, KeyPolicy, Money, Permission, Route, Rules, of_key, provider


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One [[allow]] and why it does not permit the request; ``why`` is "" when it does."""

    allow: int
    provider: str
    use: str
    why: str


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """One decision. ``decision`` is allow (it stays on the premises), redact (it may leave) or refuse, then with the
    client's ``code`` and ``message``. ``key_entry`` says which [[keys]] entry holds: own, * or none. ``sensitive`` are
    the reasons for which it is SENSITIVE, ``places`` sentences in order, ``routes`` why others are not among them."""

    decision: str
    code: str = ""
    message: str = ""
    key_id: str
    key_entry: str
    model: str
    task_class: str
    class_from: str
    sensitive: tuple[str, ...]
    places: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    asked: tuple[Asked, ...] = ()
    limits: tuple[str, ...] = ()


def explain(facts: Facts, rules: Rules) -> Explained:
    """What would happen to a request and why, from the functions that decide."""
    found, key = decide(facts, rules), of_key(rules, facts.key_id)
    reasons = sensitive_by(facts, rules)
    explained = Explained(
        decision="refuse",
        key_id=facts.key_id,
        key_entry="own" if facts.key_id in rules.by_key else "*" if key.id in rules.by_key else "none",
        model=facts.model,
        task_class=facts.task_class,
        class_from=_FROM[facts.class_from],
        sensitive=tuple(_REASONS[reason] for reason in reasons),
        routes=tuple(_routes(facts, rules, key)),
        limits=tuple(limits(key)),
    )
    if isinstance(found, Refuse):
        return msgspec.structs.replace(explained, code=found.code, message=found.message)
    asked = tuple(
        Asked(allow=n, provider=one.provider, use=one.use, why=_why_not(one, facts, rules, closed=bool(reasons)))
        for n, one in enumerate(rules.allow)
    )
    places = tuple(_sentence(one) for one in found.places)
    decision = "redact" if isinstance(found, Redact) else "allow"
    return msgspec.structs.replace(explained, decision=decision, places=places, asked=asked)


def limits(key: KeyPolicy) -> Iterator[str]:
    """What limits a key, a phrase each."""
    if key.requests_per_minute:
        yield f"{key.requests_per_minute:,} requests a minute"
    if key.tokens_per_minute:
        yield f"{key.tokens_per_minute:,} tokens a minute"
    for period in ("day", "week", "month"):
        yield from (f"{amount} a {period}" for amount in _amounts(getattr(key, period)))
    if key.expires:
        yield f"last day {key.expires}"
    if not key.outside:
        yield "nothing leaves the premises"
    if key.sensitive:
        yield "all requests are SENSITIVE"


def _amounts(money: Money) -> Iterator[str]:
    counts = {"requests": money.requests, "prompt tokens": money.prompt_tok, "answer tokens": money.completion_tok}
    yield from (f"{count:,} {unit}" for unit, count in counts.items() if count)
    if money.usd:
        yield f"{money.usd} USD"


def _sentence(one: Place) -> str:
    where = f"the rack: {one.model}" if one.category == "rack" else f"{one.provider} ({one.category}): {one.model}"
    if one.when == "first":
        return where
    waited = f", or has not begun after {one.wait_s:g} s" if one.wait_s else ""
    return f"{where}, when none before it takes the request{waited}"


def _why_not(one: Permission, facts: Facts, rules: Rules, *, closed: bool) -> str:
    found = obstacle(one, facts, rules, closed=closed)
    if found == "sensitive" and provider(rules, one.provider).category == "premises":
        return "it is SENSITIVE, and this provider does not have sensitive = true"
    return _OBSTACLES[found] if found is not None else ""


def _routes(facts: Facts, rules: Rules, key: KeyPolicy) -> Iterator[str]:
    """Why routes of a request that leaves the choice do not count."""
    if not is_left_open(facts.model):
        return
    for n, route in enumerate(rules.routes):
        if why := _no_route(route, facts, key):
            yield f"routes[{n}] ({route.model}): {why}"


def _no_route(route: Route, facts: Facts, key: KeyPolicy) -> str:
    if route.task_class != facts.task_class:
        return f"is for {route.task_class}"
    if "embeddings" in facts.features:
        return "embeddings need a model by name"
    if not fits(route, facts):
        length = facts.prompt_tok + facts.answer_tok
        return f"is for at most {route.up_to_tok:,} tokens, and prompt and answer may be {length:,}"
    return "" if ANY in key.models or route.model in key.models else "this key may not use the model"


_FROM = {
    "header": "the header names it",
    "body": "the body names it",
    "model": "the model's name or the policy for the model names it",
    "key": "the policy for the key names it",
    "guess": "nobody named one; it is guessed",
}
_REASONS = {
    "label": "its caller says so",
    "key": "all requests of this key are",
    "model": "all requests for a model that may get it are",
    "detector": "a detector finds something in its text",
    "detector_failed": "a detector failed",
    "taint": "some of its text was in a SENSITIVE request before",
    "taint_full": "the set of SENSITIVE texts is full",
    "taint_not_loaded": "the set of SENSITIVE texts is not loaded",
}
_OBSTACLES: dict[Obstacle, str] = {
    "sensitive": "it is SENSITIVE, and never leaves the premises",
    "key_stays": "the key has outside = false",
    "feature": "it uses what only the rack can do",
    "key": "the key is not in its keys",
    "class": "the class is not in its classes",
    "guessed": "the class was guessed, and guessed = true is not set",
    "model": "the model is not in its models",
}
