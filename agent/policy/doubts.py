"""What of a valid policy is probably not meant: sentences for its operator. Nothing depends on them. Pure."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from agent.policy.classes import is_left_open
from agent.policy.patterns import backtracks
from agent.policy.rules import ANY, KeyPolicy, Permission, Provider, Rules, of_key, of_model
from shared.hosts import host_of, is_loopback


class Known(NamedTuple):
    """What a node knows beside its policy: the ids of the ``keys`` in agent.toml, and every served name of the rack
    with the rows of its model, 0 where they are not known."""

    keys: Collection[str] = ()
    models: Mapping[str, int] = {}


def doubts(rules: Rules, known: Known | None = None) -> list[str]:
    """Each begins with the path of its key. Without ``known`` nothing is said about keys and models."""
    return [
        *_patterns(rules),
        *_providers(rules),
        *_permissions(rules),
        *(_keys(rules, known.keys) if known is not None and known.keys else ()),
        *(_models(rules, known.models) if known is not None and known.models else ()),
    ]


def _patterns(rules: Rules) -> Iterator[str]:
    tables = {
        "sensitive": rules.sensitive.patterns,
        "redaction": rules.redaction.patterns,
        "content": rules.content.patterns,
    }
    for table, patterns in tables.items():
        for n, pattern in enumerate(patterns):
            if backtracks(pattern):
                told = "repeats a repetition, which takes exponential time on some texts; such a request is refused"
                yield f"{table}.patterns[{n}]: {told}"


def _providers(rules: Rules) -> Iterator[str]:
    used = {one.provider for one in rules.allow}
    for n, one in enumerate(rules.providers):
        path = f"providers[{n}]"
        if one.name not in used:
            yield f"{path}: no [[allow]] permits {one.name}, so nothing goes there"
        elif one.category == "outside" and not (one.usd_per_day or one.usd_per_month):
            yield f"{path}: usd_per_day and usd_per_month limit what {one.name} may cost; without them nothing does"
        if _in_clear(one):
            yield f"{path}.url: prompts go to {host_of(one.base_url)} unencrypted"


def _in_clear(one: Provider) -> bool:
    return one.base_url.lower().startswith("http://") and not is_loopback(host_of(one.base_url))


def _permissions(rules: Rules) -> Iterator[str]:
    for n, one in enumerate(rules.allow):
        if why := _never(one, rules):
            yield f"allow[{n}]: never matches: {why}"


def _never(one: Permission, rules: Rules) -> str:
    """Why no request can match an [[allow]]; "" when one can."""
    target = rules.by_provider[one.provider]
    outside, closed = target.category == "outside", not target.sensitive
    keys = (of_key(rules, ANY), *rules.keys) if ANY in one.keys else tuple(of_key(rules, name) for name in one.keys)
    if not any(key.outside for key in keys) and outside:
        return "nothing of its keys may leave the premises"
    if all(key.sensitive for key in keys) and closed:
        return "all requests of its keys are SENSITIVE"
    if all(of_model(rules, name).sensitive for name in one.models) and closed:
        return "all requests for its models are SENSITIVE"
    if not any(set(key.classes) & set(one.classes) for key in keys):
        return "its keys may use none of its classes"
    if not any(_shares(key, one) for key in keys):
        return "its keys may use none of its models"
    return ""


def _shares(key: KeyPolicy, one: Permission) -> bool:
    anything = ANY in key.models or ANY in one.models or any(is_left_open(name) for name in one.models)
    return anything or bool(set(key.models) & set(one.models))


def _keys(rules: Rules, known: Collection[str]) -> Iterator[str]:
    listed = [(f"keys[{n}].id", one.id) for n, one in enumerate(rules.keys)]
    listed += [(f"allow[{n}].keys", name) for n, one in enumerate(rules.allow) for name in one.keys]
    for path, name in listed:
        if name not in known and name != ANY:
            yield f"{path}: agent.toml has no [[keys]] with the id {name!r}"
    if rules.keys and ANY not in rules.by_key:
        bare = sorted(set(known) - set(rules.by_key))
        if bare:
            yield f"keys: no entry for {', '.join(bare)}, which may use everything; one with the id * is for all others"


def _models(rules: Rules, served: Mapping[str, int]) -> Iterator[str]:
    listed: list[tuple[str, Sequence[str]]] = [
        (f"routes[{n}].model", (one.model,)) for n, one in enumerate(rules.routes)
    ]
    listed += [(f"models[{n}].name", (one.name,)) for n, one in enumerate(rules.models)]
    listed += [(f"keys[{n}].models", one.models) for n, one in enumerate(rules.keys)]
    elsewhere = {name for one in rules.allow for name in one.models}
    for path, names in listed:
        for name in names:
            if name not in served and name != ANY and (path.startswith("routes") or name not in elsewhere):
                yield f"{path}: no node that answers serves {name!r}"
    yield from (
        f"routes: {name!r} is served by a node, but this name leaves the choice of the model to the routes"
        for name in served
        if is_left_open(name)
    )
    kept = rules.admission.reserved_orchestration + rules.admission.reserved_reasoning
    full = [name for name, rows in served.items() if 0 < rows <= kept]
    if full:
        yield f"admission: {kept} reserved rows leave none for ROUTINE requests of {', '.join(sorted(full))}"
