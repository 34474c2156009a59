"""The policy file: one TOML, the same on all nodes: its schema and defaults. docs/policy.md is tested against this
module; agent/policy/checking.py checks what types cannot express. Pure."""

import hashlib
import re
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from functools import cache, cached_property
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from agent.policy.classes import TaskClass
from shared.errors import Refused

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


_DOLLARS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


class Money(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one period; 0 is none. ``usd`` is an amount as text, like "25.00"; "" is none."""

    requests: Count = 0
    prompt_tok: Count = 0
    completion_tok: Count = 0
    usd: str = ""


class KeyPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the client with an API key may do; ``id`` is its id in agent.toml, * any that no other entry names.

    ``models`` are served names, * any. ``classes`` may be used; ``task_class`` is the class of requests that name none.
    With ``sensitive`` all its requests are SENSITIVE. With ``outside = false`` nothing of it leaves the premises,
    whatever [[allow]] says. ``expires`` (YYYY-MM-DD, UTC) is its last day; then it is refused. Limits hold for the
    whole rack; 0 is none."""

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
    """A place that is not the rack; it gets nothing that no [[allow]] permits. ``kind`` local is an OpenAI-compatible
    server on the premises (Ollama, LM Studio): every address of its ``url`` must be private, and it gets SENSITIVE
    requests only with ``sensitive = true``. All others are outside. ``secret`` is a
    reference to the API key. ``usd_per_day`` and ``usd_per_month`` cap what the rack spends there; prices come from
    genai-prices unless ``usd_per_mtok_in`` and ``usd_per_mtok_out`` state them."""

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
    """One [[allow]]: requests of these ``keys``, ``classes`` and ``models`` (* any key, any model) may be answered by a
    ``provider``, with its model ``use``. A request that leaves the choice of the model is meant by that name (`auto`,
    `class:routine`), or when all models of its routes are named. A class that was guessed does not count unless
    ``guessed``. ``when`` full: only while the rack refuses them or no node can serve them, or when one has waited
    ``wait_s`` for its first token (0: however long). ``when`` always: they go there at once."""

    provider: str
    use: str
    keys: tuple[str, ...]
    classes: tuple[TaskClass, ...]
    models: tuple[str, ...]
    guessed: bool = False
    when: Literal["full", "always"] = "full"
    wait_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0


class Sensitive(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a text makes a request SENSITIVE: findings of ``kinds``, any of ``words`` (whole, in any case), a match
    of ``patterns`` (regular expressions). What else the detectors find is redacted where a request may leave. A message
    that was in a SENSITIVE request makes others so, unless it is one of ``common``, which all clients send."""

    kinds: tuple[Kind, ...] = ()
    words: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    common: tuple[str, ...] = ()


class Redaction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How what leaves the premises is redacted. ``regions`` are the countries whose phone numbers and national ids are
    known. ``patterns`` are further regular expressions; ``names`` finds names of persons with a local model: some,
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


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
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

    @cached_property
    def by_key(self) -> Mapping[str, KeyPolicy]:
        """``keys`` by id."""
        return {one.id: one for one in self.keys}

    @cached_property
    def by_model(self) -> Mapping[str, ModelPolicy]:
        """``models`` by name."""
        return {one.name: one for one in self.models}

    @cached_property
    def by_provider(self) -> Mapping[str, Provider]:
        """``providers`` by name."""
        return {one.name: one for one in self.providers}

    @cached_property
    def uses(self) -> frozenset[str]:
        """Models of providers that an [[allow]] names."""
        return frozenset(one.use for one in self.allow)

    @cached_property
    def content_digest(self) -> str:
        """See ``digest``."""
        return hashlib.sha256(msgspec.json.encode(_stated(self), order="deterministic")).hexdigest()[:12]


_ANY_KEY = KeyPolicy(id=ANY)
DEFAULT = Rules()
"""Without a policy file: every key may use every model, and nothing leaves the premises."""


def digest(rules: Rules) -> str:
    """Twelve hex digits that name exactly this content. What is not stated does not count, so that versions of this
    program with more keys agree on a file without them."""
    return rules.content_digest


def _stated(value: Any) -> Any:
    """A value without keys that are as their defaults."""
    if isinstance(value, tuple):
        return [_stated(one) for one in value]
    if not isinstance(value, msgspec.Struct):
        return value
    held = ((name, getattr(value, name), default) for name, default in _defaults(type(value)))
    return {name: _stated(one) for name, one, default in held if one != default}


@cache
def _defaults(kind: type[msgspec.Struct]) -> list[tuple[str, Any]]:
    return [(field.name, field.default) for field in msgspec.structs.fields(kind)]


def differing(mine: str, theirs: Mapping[str, str]) -> str:
    """What to know when nodes of one rack decide by different policies, by their digests; "" when all agree. A node of
    an earlier version has none (""), and decides like one without a policy file."""
    plain = digest(DEFAULT)
    others = sorted(node for node, one in theirs.items() if (one or plain) != mine)
    if not others:
        return ""
    seen = ", ".join(f"{node} ({theirs[node] or 'none'})" for node in others)
    return f"policy: this node has {mine}, and other nodes differ: {seen}; put the same file on all nodes"


def of_key(rules: Rules, key_id: str) -> KeyPolicy:
    """The entry of a key: its own, else that of *, else one without limits."""
    return rules.by_key.get(key_id) or rules.by_key.get(ANY) or _ANY_KEY


def of_model(rules: Rules, name: str) -> ModelPolicy:
    """The entry of a served name."""
    return rules.by_model.get(name) or ModelPolicy(name=name)


def provider(rules: Rules, name: str) -> Provider:
    """A configured provider. Raises KeyError for a name that ``check`` would not let pass."""
    return rules.by_provider[name]


def dollars(text: str) -> Decimal | None:
    """An amount of the policy file; None for none. Raises Refused."""
    if not text:
        return None
    if not _DOLLARS.fullmatch(text):
        raise Refused(f"{text[:20]!r} is not an amount of US dollars, like 25.00")
    return Decimal(text)


def is_day(text: str) -> bool:
    """Whether a text is a date, YYYY-MM-DD."""
    try:  # not a week date either: days are compared as texts
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def is_cloud_name(model: str) -> bool:
    """Whether a model of a local server is computed by its vendor, as Ollama's are whose name or tag is ``cloud`` or
    ends in it: ``qwen3-coder:480b-cloud``."""
    return any(re.search(r"(^|[-_.])cloud$", part) for part in re.split(r"[:/@]", model.strip().lower()))
