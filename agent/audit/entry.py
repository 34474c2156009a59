"""What the audit log records: typed fields, none of which can hold a text. A string is one of a fixed list, a hash, an
id that this program drew, or a name that an operator configured. Pure.

``Vocabulary.body`` is the only way to a line, and it enforces that whatever its caller passes: a name that nobody
configured is left out, and so is a value that its type does not admit.
"""

import contextlib
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from agent.policy.classes import AUTO, CLASS_PREFIX, CLASSES
from agent.policy.deciding import Category, Place
from agent.policy.facts import Facts
from agent.policy.rules import Kind as Finding

Count = Annotated[int, Meta(ge=0, le=2**53)]
RequestId = Annotated[str, Meta(pattern=r"\A(req_[0-9a-f]{24}(-\d{1,4})?)?\Z")]
Digest = Annotated[str, Meta(pattern=r"\A([0-9a-f]{8,64})?\Z")]
_IS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
Name = Annotated[str, Meta(pattern=rf"\A({_IS_NAME.pattern})?\Z")]
"""A name of the configuration; "" for none."""
Day = Annotated[str, Meta(pattern=r"\A[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")]
Currency = Annotated[str, Meta(pattern=r"\A([A-Z]{3})?\Z")]
Named = Literal["model", "key", "node", "provider", "policy", "code"]
"""What a name is of. A client chooses the model's name, so it is recorded only if something serves it."""
Known = Callable[[Named, str], bool]
"""Whether a name is one that an operator, or this program, has chosen."""
Fallback = Literal["", "no_replica", "full", "waited", "always"]
"""Why a request left the rack: no node can serve the model, all refused it, it had waited too long, or it always
does."""


Why = Literal["full", "read_only", "deleted", "no_answer", "error"]
"""Why the disk refused the log."""


class KeptFacts(Facts, frozen=True, kw_only=True):
    """Facts as they are recorded: with types that admit no text."""

    key_id: Name = ""
    model: Name
    aliases: tuple[Name, ...] = ()
    prompt_tok: Count = 0
    answer_tok: Count = 0
    day: Day = "1970-01-01"


class Allowed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A place that the decision allows; ``provider`` is "" for the rack."""

    category: Category
    provider: Name = ""


class Answered(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The place that answered: a ``node`` of the rack and the ``version`` of the model there, or a ``provider``."""

    category: Category
    provider: Name = ""
    node: Name = ""
    model: Name = ""
    version: Digest = ""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="line", tag="entry"):
    """One request. ``decided`` is written before the work on one that is SENSITIVE or may leave the premises, ``ended``
    at the end of every request.

    ``t_ms`` is the time in UTC, ``node`` the gateway. ``facts`` is what was known when it was decided; of a request
    that was refused before they are None and ``decision`` is "". ``sensitive``: whether anything made it so. ``code``
    names a refusal or an error. ``redacted`` counts findings by kind. ``cost_micro`` is in millionths of ``currency``.
    ``queue_us``, ``ttft_us`` and ``total_us`` are durations, None of what did not happen."""

    kind: Literal["decided", "ended"]
    t_ms: Count
    request: RequestId
    node: Name
    facts: Facts | None = None
    sensitive: bool = False
    policy: Name = ""
    policy_digest: Digest = ""
    decision: Literal["", "allow", "redact", "refuse"] = ""
    code: Name = ""
    places: tuple[Allowed, ...] = ()
    answered: Answered | None = None
    fallback: Fallback = ""
    redacted: dict[Finding, Count] = {}
    outcome: Literal["", "ok", "cancelled", "failed", "refused"] = ""
    reason: Literal["", "capacity", "limit", "request"] = ""
    prompt_tok: Count = 0
    cached_tok: Count = 0
    completion_tok: Count = 0
    reasoning_tok: Count = 0
    cost_micro: Count = 0
    currency: Currency = ""
    queue_us: Count | None = None
    ttft_us: Count | None = None
    total_us: Count | None = None
    status: Annotated[int, Meta(ge=0, le=599)] = 0
    streamed: bool = False


class Begin(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="line", tag="begin"):
    """The first line of each file. ``chain`` is the log's id, drawn once; ``epoch`` counts the agent's starts.
    ``prev`` is the hash of the last line of the file ``after`` ("" for none), which may end in ``torn`` bytes of a line
    that was not finished."""

    t_ms: Count
    chain: Digest
    epoch: Count
    node: Name
    prev: Digest
    after: Name = ""
    torn: Count = 0


class Gap(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="line", tag="gap"):
    """Since ``since_ms`` the disk refused the log: ``lost`` entries were not written, and of ``unsynced`` lines before
    it is not known whether they reached the disk."""

    t_ms: Count
    since_ms: Count
    lost: Count = 0
    unsynced: Count = 0
    why: Why = "error"


class Pruned(msgspec.Struct, frozen=True, kw_only=True, tag_field="line", tag="pruned"):
    """Files up to this sequence number have come to the end of their time and are deleted."""

    t_ms: Count
    through: Count


Line = Begin | Entry | Gap | Pruned


class _Kept(Entry, frozen=True, kw_only=True, omit_defaults=True, tag_field="line", tag="entry"):
    """An entry as it is read: with facts that hold no text."""

    facts: KeptFacts | None = None


_LEFT_OPEN = frozenset({AUTO, *(f"{CLASS_PREFIX}{one.lower()}" for one in CLASSES)})
_NOT_ADMITTED = (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError)
_OF_PLACE: tuple[Literal["provider", "node", "model"], ...] = ("provider", "node", "model")
_ENCODER = msgspec.json.Encoder()
_LINES: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Begin | _Kept | Gap | Pruned)
_TYPES = {field.name: field.type for field in msgspec.structs.fields(_Kept)}


def allowed(places: tuple[Place, ...]) -> tuple[Allowed, ...]:
    """The places of a decision as they are recorded, each once."""
    return tuple(dict.fromkeys(Allowed(category=one.category, provider=one.provider) for one in places))


class Vocabulary:
    """The names that may be recorded: those that ``known`` vouches for. What was known once stays so, since a model may
    be removed while its requests are answered; so it holds no more than were ever configured."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._names: set[tuple[Named, str]] = {(of, "") for of in get_args(Named)} | {("model", m) for m in _LEFT_OPEN}

    def body(self, entry: Entry) -> bytes:
        """An entry as JSON, of which no part is a text that nobody vouches for, or that its type does not admit."""
        names = _names(entry)
        if not self._names.issuperset(names):
            self._names.update(one for one in names if _IS_NAME.fullmatch(one[1]) and self._known(*one))
            if not self._names.issuperset(names):
                entry = self._reduced(entry)
        return encode(entry)

    def _reduced(self, entry: Entry) -> Entry:
        """The entry without the names that nobody vouches for."""
        facts, answered, replace = entry.facts, entry.answered, msgspec.structs.replace
        changed: dict[str, Any] = {
            "node": self._kept("node", entry.node),
            "policy": self._kept("policy", entry.policy),
            "code": self._kept("code", entry.code) or (entry.code and "other"),
            "places": tuple(replace(one, provider=self._kept("provider", one.provider)) for one in entry.places),
        }
        if facts is not None:
            aliases = tuple(name for name in facts.aliases if self._kept("model", name))
            kept = {"key_id": self._kept("key", facts.key_id), "model": self._kept("model", facts.model)}
            changed["facts"] = replace(facts, aliases=aliases, **kept)
        if answered is not None:
            changed["answered"] = replace(answered, **{of: self._kept(of, getattr(answered, of)) for of in _OF_PLACE})
        return replace(entry, **changed)

    def _kept(self, of: Named, name: str) -> str:
        return name if (of, name) in self._names else ""


def encode(line: Line) -> bytes:
    """A line as JSON. It is read back: what its types do not admit is left out."""
    try:
        encoded = _ENCODER.encode(line)
        _LINES.decode(encoded)
    except _NOT_ADMITTED:
        if not isinstance(line, Entry):
            raise
        return _ENCODER.encode(_Kept(**_admitted(line)))
    return encoded


def decode(line: bytes) -> Line | None:
    """A line of the log, its sequence number and hash passed over; None for one that this version does not know."""
    try:
        return _LINES.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _admitted(entry: Entry) -> dict[str, Any]:
    """The fields that their types admit, and what stands for those that an entry must have."""
    found = dict[str, Any](kind="ended", t_ms=0, request="", node="")
    for name, value in msgspec.to_builtins(entry).items():
        if name in _TYPES:
            with contextlib.suppress(*_NOT_ADMITTED):
                found[name] = msgspec.convert(value, _TYPES[name])
    return found


def _names(entry: Entry) -> list[tuple[Named, str]]:
    """Every name in an entry, and what it is of."""
    facts, answered = entry.facts, entry.answered
    found: list[tuple[Named, str]] = [("node", entry.node), ("policy", entry.policy), ("code", entry.code)]
    if facts is not None:
        found += (("key", facts.key_id), ("model", facts.model), *(("model", name) for name in facts.aliases))
    if answered is not None:
        found += (("provider", answered.provider), ("node", answered.node), ("model", answered.model))
    found += [("provider", place.provider) for place in entry.places]
    return found
