"""Copy a rack's bucket into another store: from an air-gapped rack to the company's, or onto a portable disk.

Immutable objects (raw segments, reports, manifests, quarantine) are written only where they are missing; tables are
overwritten. Each object is read back and compared. After an interruption the next run continues.
"""

import contextlib
import itertools
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from shared import keys
from shared.batch import digest
from shared.errors import NotFound, PreconditionFailed, Refused, Retryable
from shared.store import Listed, ObjectStore, each, find, list_all

IMMUTABLE = (keys.RAW_PREFIX, "quarantine/v1/", "report/v1/", "prices/v1/")
TABLES = keys.TABLE_PREFIXES
LAST = (keys.MANIFEST_PREFIX, "annotations/v1/", "inventory/v1/")
"""Copied after everything they refer to."""
CONNECTIONS = 8
TELL_EVERY = 500
STATE = "state/v1/sync.json"


class Copied(msgspec.Struct, kw_only=True):
    """Result of a run: objects written, bytes, objects already present, and clashes (an immutable object that differs
    on the two sides, which an operator has to resolve)."""

    written: int = 0
    bytes: int = 0
    present: int = 0
    clashes: list[str] = []


def run(
    source: ObjectStore, target: ObjectStore, *, raw: bool = True, told: Callable[[str], None] = lambda _: None
) -> Copied:
    """Copy everything that the target lacks. Raises Retryable if an object does not read back as written."""
    done = Copied(clashes=[])
    seen = _seen(target)
    # a manifest must not refer to objects written after the tables were listed
    last = {prefix: list_all(source, prefix) for prefix in LAST}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for prefix in (*(IMMUTABLE if raw else IMMUTABLE[1:]), *TABLES, *LAST):
            here = iter(last[prefix]) if prefix in last else each(source, prefix)
            wanted = _wanted(here, each(target, prefix), seen, prefix, done)
            while some := list(itertools.islice(wanted, TELL_EVERY)):
                results = pool.map(lambda one: _copy(source, target, one), some)
                for one, (size, clash) in zip(some, results, strict=True):
                    done.written += bool(size)
                    done.bytes += size
                    if clash:
                        done.clashes.append(one.key)
                    elif not prefix.startswith(IMMUTABLE):
                        seen[one.key] = one.etag
                told(f"{prefix}: {done.written:,} objects copied")
            tables = {key: etag for key, etag in seen.items() if not key.startswith(IMMUTABLE)}
            target.put(STATE, msgspec.json.encode(tables, order="sorted"))
    return done


def _wanted(
    here: Iterator[Listed], there: Iterator[Listed], seen: Mapping[str, str], prefix: str, done: Copied
) -> Iterator[Listed]:
    """What the target lacks. Its listing is kept on disk, since two stores may list in different orders."""
    with contextlib.closing(sqlite3.connect("")) as db:
        db.execute("CREATE TABLE there (key BLOB PRIMARY KEY, size TEXT) WITHOUT ROWID")
        db.executemany("INSERT OR REPLACE INTO there VALUES (?, ?)", ((_blob(one.key), str(one.size)) for one in there))
        done.present += db.execute("SELECT count(*) FROM there").fetchone()[0]
        for one in here:
            size = db.execute("SELECT size FROM there WHERE key = ?", (_blob(one.key),)).fetchone()
            if size != (str(one.size),) or (prefix not in IMMUTABLE and seen.get(one.key) != one.etag):
                yield one


def _blob(key: str) -> bytes:
    """A key for SQLite; a name on a disk may be no valid text."""
    return key.encode(errors="surrogateescape")


def _copy(source: ObjectStore, target: ObjectStore, one: Listed) -> tuple[int, bool]:
    """Bytes written, and whether the target holds a different object that must not be overwritten."""
    try:
        body = source.get(one.key, keys.MOST_TABLE_BYTES).body
    except NotFound:
        return 0, False  # deleted meanwhile by retention
    if not _put(target, one.key, body):
        return 0, digest(target.get(one.key, keys.MOST_TABLE_BYTES).body) != digest(body)
    if digest(target.get(one.key, keys.MOST_TABLE_BYTES).body) != digest(body):
        raise Retryable(f"sync {one.key}: read-back differs from what was written; run again")
    return len(body), False


def _put(target: ObjectStore, key: str, body: bytes) -> bool:
    """Whether it was written; False if an immutable object is already there."""
    write = target.put_if_absent if key.startswith((*IMMUTABLE, keys.MANIFEST_PREFIX)) else target.put
    try:
        write(key, body)
    except PreconditionFailed:
        return False
    return True


def _seen(target: ObjectStore) -> dict[str, str]:
    """The source's etag of each object at its last copy."""
    stored = find(target, STATE, keys.MOST_STATE_BYTES)
    try:
        return msgspec.json.decode(stored.body, type=dict[str, str]) if stored is not None else {}
    except (msgspec.DecodeError, RecursionError):
        raise Refused(f"{STATE} in the target: cannot be parsed; delete it to compare everything again") from None
