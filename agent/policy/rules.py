"""The policy file: one TOML, the same on all nodes. Its schema, defaults and the checks that types cannot express.
docs/policy.md is tested against this module. Pure."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.policy.classes import TaskClass, is_left_open
from shared.bucket import REFERENCE_HINT, is_reference
from shared.errors import Refused
from shared.keys import check_name

ANY = "*"
Count = Annotated[int, Meta(ge=0)]
Kind = Literal["card", "iban", "national_id", "email", "phone", "secret", "name"]
"""What the detectors find. ``national_id`` is a tax, social security or identity number of a configured region;
``secret`` an API key, a token or a private key."""
ProviderKind = Literal["openai", "anthropic", "openrouter", "compatible", "local"]
Country = Annotated[str, Meta(pattern="^[A-Z]{2}$")]
_URLS = {
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com/v1",
    "openrouter": "https://openrouter.ai/api/v1",
}


class Money(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one period; 0 is none. ``usd`` is an amount as text, like "25.00"."""

    requests: Count = 0
    prompt_tok: Count = 0
    completion_tok: Count = 0
    usd: str = ""


class KeyPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the client with an API key may do; ``id`` is its id in agent.toml, * any that no other entry names.

    ``models`` are served names, * any. ``classes`` may be used; ``task_class`` is the class of requests that name none.
    With ``outside = false`` nothing of it leaves the premises, whatever [[allow]] says. After the day ``expires``
    (YYYY-MM-DD, UTC) the key is refused. Limits hold for the whole rack; 0 is none."""

    id: str
    models: tuple[str, ...] = (ANY,)
    classes: tuple[TaskClass, ...] = ("ROUTINE", "REASONING", "ORCHESTRATION")
    task_class: TaskClass | None = None
    sensitive: bool = False
    outside: bool = True
    expires: str = ""
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    day: Money = Money()
    week: Money = Money()
    month: Money = Money()


class ModelPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A served name: the class of requests that name none, and whether all of them are SENSITIVE."""

    name: str
    task_class: TaskClass | None = None
    sensitive: bool = False


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model serves a class when the caller leaves the choice (`model: "auto"` or `"class:routine"`). Of the
    routes of a class those count whose ``up_to_tok`` holds prompt and answer (0: any); the first that can serve is
    taken."""

    task_class: TaskClass
    model: str
    up_to_tok: Count = 0


class Provider(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A place that is not the rack. ``kind`` local is an OpenAI-compatible server on the premises (Ollama, LM Studio):
    every address of its ``url`` must be private, and it gets SENSITIVE requests only with ``sensitive = true``. All
    others are outside. ``secret`` is a reference to the API key. ``usd_per_day`` and ``usd_per_month`` cap what the
    rack spends there; prices come from genai-prices unless ``usd_per_mtok_in`` and ``usd_per_mtok_out`` state them."""

    name: str
    kind: ProviderKind
    url: str = ""
    secret: str = ""
    sensitive: bool = False
    usd_per_day: str = ""
    usd_per_month: str = ""
    usd_per_mtok_in: str = ""
    usd_per_mtok_out: str = ""
    first_token_s: Annotated[float, Meta(gt=0, le=600)] = 60.0
    request_s: Annotated[float, Meta(gt=0, le=3600)] = 300.0

    @property
    def category(self) -> Literal["premises", "outside"]:
        """Whether it is on the premises."""
        return "premises" if self.kind == "local" else "outside"

    @property
    def base_url(self) -> str:
        """Its address, without a slash at the end."""
        return (self.url or _URLS.get(self.kind, "")).rstrip("/")


class Permission(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One [[allow]]: requests of these ``keys``, ``classes`` and ``models`` may be answered by a ``provider``, with its
    model ``use``. ``when`` full: only while the rack refuses them or no node can serve them, or when one has waited
    ``wait_s`` for its first token (0: however long). ``when`` always: they go there at once."""

    provider: str
    use: str
    keys: Annotated[tuple[str, ...], Meta(min_length=1)]
    classes: Annotated[tuple[TaskClass, ...], Meta(min_length=1)]
    models: Annotated[tuple[str, ...], Meta(min_length=1)]
    when: Literal["full", "always"] = "full"
    wait_s: Annotated[float, Meta(ge=0)] = 0.0


class Sensitive(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a text makes a request SENSITIVE: findings of ``kinds``, any of ``words`` (whole, in any case), a match
    of ``patterns`` (regular expressions). What else the detectors find is redacted where a request may leave."""

    kinds: tuple[Kind, ...] = ()
    words: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()


class Redaction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How what leaves the premises is redacted. ``regions`` are the countries whose phone numbers and national ids are
    known. ``patterns`` are further regular expressions; ``names`` finds names of persons by a local model, some
    and not all. An analysis that takes longer than ``time_out_s`` refuses the request."""

    regions: tuple[Country, ...] = ("DE", "US", "FR")
    patterns: tuple[str, ...] = ()
    names: bool = False
    time_out_s: Annotated[float, Meta(gt=0, le=60)] = 5.0


class Content(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of an answer is withheld from the client: ``secrets`` that the detectors find, matches of ``patterns``."""

    secrets: bool = False
    patterns: tuple[str, ...] = ()


class Admission(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Places that a model keeps free for a class and those above it, of the rows that it decodes together; a request
    waits at most ``starve_s`` for one of a higher class."""

    reserved_orchestration: Count = 0
    reserved_reasoning: Count = 0
    starve_s: Annotated[float, Meta(gt=0, le=600)] = 30.0


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """policy.toml. ``version`` is the operator's name for it; the audit adds a hash of its content."""

    version: str = "default"
    sensitive: Sensitive = Sensitive()
    redaction: Redaction = Redaction()
    content: Content = Content()
    admission: Admission = Admission()
    keys: tuple[KeyPolicy, ...] = ()
    models: tuple[ModelPolicy, ...] = ()
    routes: tuple[Route, ...] = ()
    providers: tuple[Provider, ...] = ()
    allow: tuple[Permission, ...] = ()


DEFAULT = Rules()
"""Without a policy file: every key may use every model, and nothing leaves the premises."""


def digest(rules: Rules) -> str:
    """Twelve hex digits that name exactly this content."""
    return hashlib.sha256(msgspec.json.encode(rules, order="deterministic")).hexdigest()[:12]


def of_key(rules: Rules, key_id: str) -> KeyPolicy:
    """The entry of a key: its own, else that of *, else one without limits."""
    own = {one.id: one for one in rules.keys}
    return own.get(key_id) or own.get(ANY) or KeyPolicy(id=ANY)


def of_model(rules: Rules, name: str) -> ModelPolicy:
    """The entry of a served name."""
    return next((one for one in rules.models if one.name == name), ModelPolicy(name=name))


def provider(rules: Rules, name: str) -> Provider:
    """A configured provider."""
    return next(one for one in rules.providers if one.name == name)


def dollars(text: str) -> Decimal | None:
    """An amount of the policy file; None for none. Raises Refused."""
    if not text:
        return None
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise Refused(f"{text!r} is not an amount of US dollars, like 25.00") from None
    if not amount.is_finite() or amount < 0:
        raise Refused(f"{text!r} is not an amount of US dollars, like 25.00")
    return amount


def check(rules: Rules) -> Sequence[str]:
    """Every problem that types cannot express, each with the path of its key."""
    return [
        *_check_names(rules),
        *_check_amounts(rules),
        *_check_keys(rules.keys),
        *_check_providers(rules.providers),
        *_check_allow(rules),
        *_check_patterns(rules),
        *_check_routes(rules.routes),
    ]


def _check_names(rules: Rules) -> Iterator[str]:
    named = [(f"keys[{n}].id", k.id) for n, k in enumerate(rules.keys) if k.id != ANY]
    named += [(f"models[{n}].name", m.name) for n, m in enumerate(rules.models)]
    named += [(f"providers[{n}].name", p.name) for n, p in enumerate(rules.providers)]
    for path, name in named:
        try:
            check_name(name, path)
        except Refused as error:
            yield error.message
    for table, names in (
        ("keys", [k.id for k in rules.keys]),
        ("models", [m.name for m in rules.models]),
        ("providers", [p.name for p in rules.providers]),
    ):
        yield from (f"{table}: duplicate name {n!r}" for n in sorted({n for n in names if names.count(n) > 1}))
    if not rules.version.strip():
        yield "version: must not be empty; name this policy, like 2026-12-01"


def _check_amounts(rules: Rules) -> Iterator[str]:
    amounts = [
        (f"providers[{n}].{field}", getattr(one, field))
        for n, one in enumerate(rules.providers)
        for field in ("usd_per_day", "usd_per_month", "usd_per_mtok_in", "usd_per_mtok_out")
    ]
    amounts += [
        (f"keys[{n}].{period}.usd", getattr(one, period).usd)
        for n, one in enumerate(rules.keys)
        for period in ("day", "week", "month")
    ]
    for path, text in amounts:
        try:
            dollars(text)
        except Refused as error:
            yield f"{path}: {error.message}"


def _check_keys(keys: Sequence[KeyPolicy]) -> Iterator[str]:
    for n, key in enumerate(keys):
        if key.expires and not is_day(key.expires):
            yield f"keys[{n}].expires: must be a day, like 2027-01-31"
        if key.task_class and key.task_class not in key.classes:
            yield f"keys[{n}].task_class: {key.task_class} is not in its classes"


def is_day(text: str) -> bool:
    """Whether a text is a date, YYYY-MM-DD."""
    try:
        return len(text) == 10 and bool(date.fromisoformat(text))
    except ValueError:
        return False


def _check_providers(providers: Sequence[Provider]) -> Iterator[str]:
    for n, one in enumerate(providers):
        path = f"providers[{n}]"
        if not one.base_url:
            yield f"{path}.url: is required for kind {one.kind}"
        elif not one.base_url.startswith(("https://", "http://") if one.kind == "local" else ("https://",)):
            yield f"{path}.url: must begin with https://" + (" or http://" if one.kind == "local" else "")
        if one.kind != "local" and not one.secret:
            yield f"{path}.secret: is required: a reference to the API key"
        if one.secret and not is_reference(one.secret):
            yield f"{path}.secret: {REFERENCE_HINT}"
        if one.sensitive and one.kind != "local":
            yield f"{path}.sensitive: SENSITIVE requests never leave the premises; only kind local may have it"
        if bool(one.usd_per_mtok_in) != bool(one.usd_per_mtok_out):
            yield f"{path}.usd_per_mtok_in: and usd_per_mtok_out need each other"


def _check_allow(rules: Rules) -> Iterator[str]:
    known = {one.name: one for one in rules.providers}
    for n, one in enumerate(rules.allow):
        path = f"allow[{n}]"
        if one.provider not in known:
            yield f"{path}.provider: no [[providers]] has the name {one.provider!r}"
        elif known[one.provider].kind == "local" and is_cloud_name(one.use):
            yield f"{path}.use: {one.use!r} runs in its vendor's cloud, not on the premises"
        if not one.use.strip():
            yield f"{path}.use: is required: the provider's model"


def is_cloud_name(model: str) -> bool:
    """Whether a model of a local server is computed by its vendor: Ollama's names end in ``-cloud`` or ``:cloud``."""
    return bool(re.search(r"[-:]cloud\s*$", model, re.IGNORECASE))


def _check_patterns(rules: Rules) -> Iterator[str]:
    tables = {
        "sensitive.patterns": rules.sensitive.patterns,
        "redaction.patterns": rules.redaction.patterns,
        "content.patterns": rules.content.patterns,
    }
    for path, patterns in tables.items():
        for n, pattern in enumerate(patterns):
            try:
                if re.compile(pattern).match(""):
                    yield f"{path}[{n}]: matches an empty text"
            except (re.error, RecursionError, OverflowError) as error:
                yield f"{path}[{n}]: invalid regular expression: {error}"
    for n, word in enumerate(rules.sensitive.words):
        if not word.strip():
            yield f"sensitive.words[{n}]: must not be empty"


def _check_routes(routes: Sequence[Route]) -> Iterator[str]:
    for n, one in enumerate(routes):
        if not one.model or is_left_open(one.model):
            yield f"routes[{n}].model: must be a served name"
