"""Copy a rack's bucket into another store: a backup, from an air-gapped rack to the company's, or onto a portable disk.

What never changes (raw segments, reports, manifests, quarantine) is written only where it is missing; the rest is
replaced. Each object is read back and compared. After an interruption the next run continues.
"""

import contextlib
import hashlib
import itertools
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from shared import keys
from shared.batch import digest
from shared.desired import Moment
from shared.errors import NotFound, PreconditionFailed, Refused, Retryable
from shared.store import Listed, ObjectStore, each, find, list_all

CONNECTIONS = 8
TELL_EVERY = 500
PART_BYTES = 32 << 20
"""A larger object is copied in parts of this size, which are all of it that is ever in memory."""
STATE = "state/v1/sync.json"
"""In the copy: the source's etag of each object that may change, at its last copy."""
COPY = "state/v1/copy.json"
"""In the copy: whose it is, and whether it is whole."""
MARKER = "state/v1/restore.json"
"""In a bucket that is being restored, or was."""
LEASE_PREFIX = "state/v1/lease-"
OWN = (STATE, COPY, MARKER, LEASE_PREFIX)
"""Belongs to one place alone: a lease that is copied would be held by nobody."""


class Rule(NamedTuple):
    """How objects of a prefix are copied. ``once``: never overwritten, a difference is a conflict. ``by_size``: they
    cannot change, so one of the same size is the same. ``models``: only with --models."""

    once: bool = False
    by_size: bool = False
    models: bool = False


_FIXED = Rule(once=True, by_size=True)
_CHANGING = Rule()
RULES: dict[str, Rule] = {
    "raw/": _FIXED,
    "urgent/": _FIXED,
    "audit/": _FIXED,
    "quarantine/": _FIXED,
    "report/": _FIXED,
    "prices/": _FIXED,
    "minute/": _CHANGING,
    "hour/": _CHANGING,
    "day/": _CHANGING,
    "release/": _CHANGING,
    "models/": Rule(models=True),
    # after the versions that it names
    "desired/": _CHANGING,
    "state/": _CHANGING,
    "annotations/": _CHANGING,
    "inventory/": _CHANGING,
    # after everything that it counts: without it a copy is not whole
    "manifest/": Rule(once=True),
}
"""Every prefix of the layout, in the order of copying."""
LATE = (keys.MODEL_PREFIX, "manifest/")
"""Listed before anything else and written after the rest of their prefix, so that they name nothing that is missing."""


class Copied(msgspec.Struct, kw_only=True):
    """Result of a run: objects written, bytes, objects already present, and clashes (an immutable object that differs
    on the two sides, which an operator has to resolve)."""

    written: int = 0
    bytes: int = 0
    present: int = 0
    clashes: list[str] = []


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """Whose copy a store holds, and of when. ``finished_ms`` is 0 until a run has copied everything once; ``raw`` and
    ``models`` tell whether it has them."""

    rack: str
    began_ms: Moment
    finished_ms: Moment = 0
    raw: bool = True
    models: bool = False


class _Claim(msgspec.Struct):
    spool_id: str


class Memory(NamedTuple):
    """What earlier runs copied (key to the source's etag), and how to keep it for the next."""

    seen: dict[str, str]
    save: Callable[[Mapping[str, str]], None]


Told = Callable[[str], None]


def run(
    source: ObjectStore,
    target: ObjectStore,
    rack: str = "",
    *,
    raw: bool = True,
    models: bool = False,
    told: Told = lambda _: None,
) -> Copied:
    """Copy everything that the target lacks. Raises Refused if the target is not a copy of this rack's bucket,
    Retryable if an object does not read back as written."""
    before = copy_of(target)
    if before is not None and before.rack != rack:
        raise Refused(f"sync: the target holds the copy of rack {before.rack}, this one is {rack}; use another target")
    seen = _seen(target)
    if before is None and seen is None and target.list_after(keys.MANIFEST_PREFIX, limit=1):
        raise Refused("sync: the target is itself the bucket of an aggregator, not a copy; are the two interchanged?")
    _check_history(source, target)
    made = Copy(rack=rack, began_ms=_now_ms(), raw=raw, models=models)
    finished = before.finished_ms if before is not None else 0
    _write_copy(target, msgspec.structs.replace(made, finished_ms=finished))
    memory = Memory(seen or {}, lambda all_of: _save(target, all_of))
    done = copied(source, target, wanted(raw=raw, models=models), memory, told=told)
    if not done.clashes:
        _write_copy(target, msgspec.structs.replace(made, finished_ms=_now_ms()))
    return done


def wanted(*, raw: bool = True, models: bool = False) -> list[str]:
    """The prefixes that are copied, in order."""
    return [prefix for prefix, rule in RULES.items() if (raw or prefix != "raw/") and (models or not rule.models)]


def copied(
    source: ObjectStore,
    target: ObjectStore,
    prefixes: Iterable[str],
    memory: Memory,
    *,
    held_back: bool = False,
    told: Told = lambda _: None,
) -> Copied:
    """Copy these prefixes. With ``held_back``, manifests are not written once there was a conflict."""
    done = Copied(clashes=[])
    # what names other objects must not name any that were written after those were listed
    late = {prefix: list_all(source, prefix) for prefix in LATE}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for prefix in _passes(prefixes):
            if held_back and done.clashes and prefix == "manifest/":
                break
            here = iter(late[prefix]) if prefix in late else _not_late(each(source, prefix))
            lacking = _lacking(here, each(target, prefix), memory.seen, done)
            while some := list(itertools.islice(lacking, TELL_EVERY)):
                results = pool.map(lambda one: _copy(source, target, one), some)
                for one, (size, clash) in zip(some, results, strict=True):
                    done.written += bool(size)
                    done.bytes += size
                    if clash:
                        done.clashes.append(one.key)
                    elif not _rule(one.key).by_size:
                        memory.seen[one.key] = one.etag
                told(f"{prefix}: {done.written:,} objects copied")
            memory.save(memory.seen)
    return done


def copy_of(store: ObjectStore) -> Copy | None:
    """Whose copy a store holds; None if it holds none, or one by a version that did not say."""
    stored = find(store, COPY, keys.MOST_LEASE_BYTES)
    try:
        return msgspec.json.decode(stored.body, type=Copy) if stored is not None else None
    except (msgspec.DecodeError, RecursionError):
        raise Refused(f"{COPY}: cannot be parsed; delete it if this is the copy that you mean") from None


def _check_history(source: ObjectStore, target: ObjectStore) -> None:
    """Raises Refused where the copy has a commit that the source lacks: tables of a bucket that was lost must not be
    replaced by those of the one after it."""
    newest = ""
    for listed in each(target, keys.MANIFEST_PREFIX):
        newest = listed.key
    if newest and _digest(source, newest) != _digest(target, newest):
        why = "this bucket was lost, replaced or is older than its copy"
        raise Refused(
            f"sync: the copy has a commit that the bucket has not ({newest}), so {why}: bring it back with "
            "`mlxrack-aggregator restore`, or use another target; the copy was left as it is"
        )


def _passes(prefixes: Iterable[str]) -> Iterator[str]:
    for prefix in prefixes:
        yield prefix
        yield from (one for one in LATE if one != prefix and one.startswith(prefix))


def _rule(key: str) -> Rule:
    # claims of two spools have the same size; what is said about a claim may change
    return Rule(once=key.endswith("/claim")) if keys.is_claim(key) else RULES[key[: key.index("/") + 1]]


def _not_late(listed: Iterator[Listed]) -> Iterator[Listed]:
    return (one for one in listed if not one.key.startswith((*LATE, *OWN)))


def _lacking(
    here: Iterator[Listed], there: Iterator[Listed], seen: Mapping[str, str], done: Copied
) -> Iterator[Listed]:
    """What the target lacks. Its listing is kept on disk, since two stores may list in different orders."""
    with contextlib.closing(sqlite3.connect("")) as db:
        db.execute("CREATE TABLE there (key BLOB PRIMARY KEY, size TEXT) WITHOUT ROWID")
        theirs = ((_blob(one.key), str(one.size)) for one in there if not one.key.startswith(OWN))
        db.executemany("INSERT OR REPLACE INTO there VALUES (?, ?)", theirs)
        done.present += db.execute("SELECT count(*) FROM there").fetchone()[0]
        for one in here:
            size = db.execute("SELECT size FROM there WHERE key = ?", (_blob(one.key),)).fetchone()
            if size != (str(one.size),) or not (_rule(one.key).by_size or seen.get(one.key) == one.etag):
                yield one


def _blob(key: str) -> bytes:
    """A key for SQLite; a name on a disk may be no valid text."""
    return key.encode(errors="surrogateescape")


def _copy(source: ObjectStore, target: ObjectStore, one: Listed) -> tuple[int, bool]:
    """Bytes written, and whether the target holds a different object that must not be overwritten."""
    try:
        if one.size > PART_BYTES:
            return _copy_large(source, target, one)
        body = source.get(one.key, keys.MOST_TABLE_BYTES).body
    except NotFound:
        return 0, False  # deleted meanwhile by retention
    if not _put(target, one.key, body):
        there = target.get_part(one.key, 0, PART_BYTES) if keys.is_claim(one.key) else b""
        if not there or not _completes(body, there):
            return 0, not _completes(there, body) and _digest(target, one.key) != digest(body)
        target.put(one.key, body)
    if _digest(target, one.key) != digest(body):
        raise _unequal(one.key)
    return len(body), False


def _completes(claim: bytes, other: bytes) -> bool:
    """Whether a claim is another one, completed: the first versions of agents wrote the spool's id alone."""
    try:
        return msgspec.json.decode(claim, type=_Claim).spool_id.encode() == other
    except (msgspec.DecodeError, RecursionError):
        return False


def _copy_large(source: ObjectStore, target: ObjectStore, one: Listed) -> tuple[int, bool]:
    """The same by way of a file on this machine's disk."""
    whole = hashlib.sha256()
    with tempfile.TemporaryFile() as file:
        for part in _parts(source, one.key):
            whole.update(part)
            file.write(part)
        if not (size := file.tell()):
            return 0, False
        if _rule(one.key).once and (there := _digest(target, one.key)) is not None:
            return 0, there != whole.hexdigest()
        file.seek(0)
        target.put_file(one.key, file)
    if _digest(target, one.key) != whole.hexdigest():
        raise _unequal(one.key)
    return size, False


def _parts(store: ObjectStore, key: str) -> Iterator[bytes]:
    start = 0
    while part := store.get_part(key, start, PART_BYTES):
        yield part
        start += len(part)
        if len(part) < PART_BYTES:
            return


def _digest(store: ObjectStore, key: str) -> str | None:
    """The SHA-256 of an object of any size; None if there is none."""
    found = hashlib.sha256()
    try:
        for part in _parts(store, key):
            found.update(part)
    except NotFound:
        return None
    return found.hexdigest()


def _unequal(key: str) -> Retryable:
    return Retryable(f"sync {key}: read-back differs from what was written; run again")


def _put(target: ObjectStore, key: str, body: bytes) -> bool:
    """Whether it was written; False if an immutable object is already there."""
    write = target.put_if_absent if _rule(key).once else target.put
    try:
        write(key, body)
    except PreconditionFailed:
        return False
    return True


def _seen(target: ObjectStore) -> dict[str, str] | None:
    """The source's etag of each object at its last copy; None if there was no copy."""
    stored = find(target, STATE, keys.MOST_STATE_BYTES)
    try:
        return msgspec.json.decode(stored.body, type=dict[str, str]) if stored is not None else None
    except (msgspec.DecodeError, RecursionError):
        raise Refused(f"{STATE} in the target: cannot be parsed; delete it to compare everything again") from None


def _save(target: ObjectStore, seen: Mapping[str, str]) -> None:
    target.put(STATE, msgspec.json.encode(seen, order="sorted"))


def _write_copy(target: ObjectStore, copy: Copy) -> None:
    target.put(COPY, msgspec.json.encode(copy))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
