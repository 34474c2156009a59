"""What of a policy file types cannot express: every problem, each with the path of its key. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from agent.policy.addresses import unfit_url
from agent.policy.classes import is_left_open, of_model, written
from agent.policy.patterns import problem
from agent.policy.rules import ANY, KeyPolicy, Permission, Provider, Route, Rules, dollars, is_cloud_name, is_day
from shared.bucket import REFERENCE_HINT, is_reference
from shared.errors import Refused
from shared.hosts import host_of
from shared.keys import check_name

MOST_ENTRIES = 10_000
"""Of a list, as of keys."""
MOST_ASKED = 1000
"""Of a list whose entries are each asked of each request."""
MOST_PATTERNS, MOST_WORDS, MOST_NAME_CHARS = 200, 2000, 256
_ODD = re.compile(r"[^!-~]|\\")
_FOR_CLIENTS = ("/chat/completions", "/completions", "/messages", "/embeddings", "/models")


def check(rules: Rules) -> Sequence[str]:
    """Every problem that types cannot express, each with the path of its key."""
    return [
        *_check_sizes(rules),
        *_check_names(rules),
        *_check_amounts(rules),
        *_check_keys(rules.keys),
        *_check_providers(rules.providers),
        *_check_allow(rules),
        *_check_detection(rules),
        *_check_routes(rules.routes),
    ]


def _check_sizes(rules: Rules) -> Iterator[str]:
    lists: tuple[tuple[str, Sequence[Any], int], ...] = (
        ("keys", rules.keys, MOST_ENTRIES),
        ("models", rules.models, MOST_ENTRIES),
        ("routes", rules.routes, MOST_ASKED),
        ("providers", rules.providers, MOST_ASKED),
        ("allow", rules.allow, MOST_ASKED),
        ("sensitive.words", rules.sensitive.words, MOST_WORDS),
        ("sensitive.patterns", rules.sensitive.patterns, MOST_PATTERNS),
        ("redaction.patterns", rules.redaction.patterns, MOST_PATTERNS),
        ("content.patterns", rules.content.patterns, MOST_PATTERNS),
    )
    yield from (f"{path}: {len(some):,} entries; at most {most:,}" for path, some, most in lists if len(some) > most)


def _check_names(rules: Rules) -> Iterator[str]:
    tables = {
        "keys": ("id", [one.id for one in rules.keys]),
        "models": ("name", [one.name for one in rules.models]),
        "providers": ("name", [one.name for one in rules.providers]),
    }
    for table, (field, names) in tables.items():
        for n, name in enumerate(names):
            if table != "keys" or name != ANY:
                yield from _name(f"{table}[{n}].{field}", name)
        yield from (f"{table}: duplicate {field} {name!r}" for name in _twice(names))
    yield from (
        f"models[{n}].name: {one.name!r} leaves the choice of the model to the routes"
        for n, one in enumerate(rules.models)
        if is_left_open(one.name)
    )
    version = rules.version
    if not version.strip() or not version.isprintable() or len(version) > MOST_NAME_CHARS:
        yield f"version: must be a name for this policy in one line of at most {MOST_NAME_CHARS} characters"


def _name(path: str, name: str) -> Iterator[str]:
    try:
        check_name(name, path)
    except Refused as error:
        yield f"{path}: {error.message.removeprefix(f'{path} ')}"


def _check_amounts(rules: Rules) -> Iterator[str]:
    caps = [
        (f"providers[{n}].{field}", getattr(one, field))
        for n, one in enumerate(rules.providers)
        for field in ("usd_per_day", "usd_per_month")
    ]
    caps += [
        (f"keys[{n}].{period}.usd", getattr(one, period).usd)
        for n, one in enumerate(rules.keys)
        for period in ("day", "week", "month")
    ]
    prices = [
        (f"providers[{n}].{field}", getattr(one, field))
        for n, one in enumerate(rules.providers)
        for field in ("usd_per_mtok_in", "usd_per_mtok_out")
    ]
    for path, text in (*caps, *prices):
        try:
            if dollars(text) == 0 and (path, text) in caps:
                yield f"{path}: 0 would let nothing pass; leave it out for no limit"
        except Refused as error:
            yield f"{path}: {error.message}"


def _check_keys(keys: Sequence[KeyPolicy]) -> Iterator[str]:
    for n, key in enumerate(keys):
        path = f"keys[{n}]"
        if key.expires and not is_day(key.expires):
            yield f"{path}.expires: must be a day, like 2027-01-31"
        if not key.classes or not key.models:
            yield f"{path}.{'models' if key.classes else 'classes'}: is empty; to stop a key, set expires to a past day"
        if key.task_class and key.classes and key.task_class not in key.classes:
            yield f"{path}.task_class: {key.task_class} is not in its classes"
        yield from _check_list(f"{path}.models", key.models)
        yield from _check_list(f"{path}.classes", key.classes)
        yield from (
            f"{path}.models[{i}]: {name!r} is not a served name; what it may get is decided by the routes"
            for i, name in enumerate(key.models)
            if is_left_open(name)
        )


def _check_list(path: str, names: Sequence[str]) -> Iterator[str]:
    yield from (f"{path}: {name!r} is listed twice" for name in _twice(names))
    if ANY in names and len(names) > 1:
        yield f"{path}: * is all of them; list nothing else, or leave it out"
    for n, name in enumerate(names):
        if not name.strip() or name != name.strip() or len(name) > MOST_NAME_CHARS or not name.isprintable():
            yield f"{path}[{n}]: must be a name of at most {MOST_NAME_CHARS} characters"
        elif ANY in name and name != ANY:
            yield f"{path}[{n}]: {name!r}: * stands for all, alone; parts of names are not matched"


def _check_providers(providers: Sequence[Provider]) -> Iterator[str]:
    for n, one in enumerate(providers):
        path = f"providers[{n}]"
        yield from (f"{path}.url: {why}" for why in _check_url(one))
        if one.kind != "local" and not one.secret:
            yield f"{path}.secret: is required: a reference to the API key"
        if one.secret and not is_reference(one.secret):
            yield f"{path}.secret: {REFERENCE_HINT}"
        if one.sensitive and one.kind != "local":
            yield f"{path}.sensitive: SENSITIVE requests never leave the premises; only kind local may have it"
        if bool(one.usd_per_mtok_in) != bool(one.usd_per_mtok_out):
            yield f"{path}.usd_per_mtok_in: and usd_per_mtok_out need each other"
        if one.first_token_s > one.request_s:
            yield f"{path}.first_token_s: is more than request_s"


def _check_url(one: Provider) -> Iterator[str]:
    url, local = one.base_url, one.kind == "local"
    if not url:
        yield f"is required for kind {one.kind}"
    elif not url.lower().startswith(("https://", "http://") if local else ("https://",)):
        yield "must begin with https://" + (" or http://" if local else "")
    elif not host_of(url) or not url.isascii() or any(character <= " " or character in "\\\x7f" for character in url):
        yield "must be an address without user, password or spaces, like https://api.example.com/v1"
    elif any(mark in url for mark in "?#"):
        yield "must have no query and no fragment; what a provider needs besides its key cannot be set"
    elif urlsplit(url).path.endswith(_FOR_CLIENTS):
        yield "is the address of one function; without it, it is like https://api.example.com/v1"
    elif why := unfit_url(url, one.category):
        yield why


def _check_allow(rules: Rules) -> Iterator[str]:
    for n, one in enumerate(rules.allow):
        path = f"allow[{n}]"
        if one.provider not in rules.by_provider:
            yield f"{path}.provider: no [[providers]] has the name {one.provider!r}"
        elif rules.by_provider[one.provider].kind == "local" and is_cloud_name(one.use):
            yield f"{path}.use: {one.use!r} runs in its vendor's cloud, not on the premises"
        if one.when == "always" and one.wait_s:
            yield f'{path}.wait_s: is for when = "full"; with "always" nothing is waited for'
        if one in rules.allow[:n]:
            yield f"{path}: is the same as allow[{rules.allow.index(one)}]"
        yield from _check_use(f"{path}.use", one.use)
        for field in ("keys", "classes", "models"):
            if not getattr(one, field):
                yield f"{path}.{field}: is empty, so it never matches"
        yield from _check_list(f"{path}.keys", one.keys)
        yield from _check_list(f"{path}.classes", one.classes)
        yield from _check_list(f"{path}.models", one.models)
        yield from _check_choices(path, one)


def _check_use(path: str, use: str) -> Iterator[str]:
    if not use.strip() or ANY in use or is_left_open(use):
        yield f"{path}: is required: exactly one of the provider's models"
    elif use != use.strip() or len(use) > MOST_NAME_CHARS or not use.isprintable():
        yield f"{path}: must be a model's name of at most {MOST_NAME_CHARS} characters"


def _check_choices(path: str, one: Permission) -> Iterator[str]:
    """Names like class:routine, which stand for a choice left open."""
    for n, name in enumerate(one.models):
        try:
            named = of_model(name)
        except Refused as error:
            yield f"{path}.models[{n}]: {error.message}"
            continue
        if is_left_open(name) and name != written(name):
            yield f"{path}.models[{n}]: is written {written(name)}"
        elif named is not None and named not in one.classes:
            yield f"{path}.models[{n}]: {named} is not in its classes, so it never matches"


def _check_detection(rules: Rules) -> Iterator[str]:
    tables = {
        "sensitive.patterns": rules.sensitive.patterns,
        "redaction.patterns": rules.redaction.patterns,
        "content.patterns": rules.content.patterns,
    }
    for path, patterns in tables.items():
        yield from (f"{path}[{n}]: {why}" for n, one in enumerate(patterns[:MOST_PATTERNS]) if (why := problem(one)))
        yield from (f"{path}: {text!r} is listed twice" for text in _twice(patterns))
    for n, word in enumerate(rules.sensitive.words):
        if not any(character.isalnum() for character in word) or len(word) > MOST_NAME_CHARS:
            yield f"sensitive.words[{n}]: must be a word with a letter or a digit"
    yield from (f"sensitive.words: {word!r} is listed twice" for word in _twice(rules.sensitive.words))
    yield from (f"sensitive.kinds: {kind!r} is listed twice" for kind in _twice(rules.sensitive.kinds))
    yield from (f"redaction.regions: {region!r} is listed twice" for region in _twice(rules.redaction.regions))
    if "name" in rules.sensitive.kinds and not rules.redaction.names:
        yield "sensitive.kinds: names are found only with redaction.names = true"
    if not rules.redaction.regions and {"phone", "national_id"} & set(rules.sensitive.kinds):
        yield "redaction.regions: is empty, so no phone number and no national id would be found"


def _check_routes(routes: Sequence[Route]) -> Iterator[str]:
    for n, one in enumerate(routes):
        if not one.model.strip() or ANY in one.model or is_left_open(one.model):
            yield f"routes[{n}].model: must be a served name"
        if one in routes[:n]:
            yield f"routes[{n}]: is the same as routes[{routes.index(one)}]"


def _twice(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)
