"""Copy a rack's bucket into another store: an air-gapped rack's into the company's, or onto a disk that is carried.

What never changes (raw segments, reports, manifests, quarantine) is written only where it is missing; a table is
written over its older self. Each object is read back and compared. Stopped anywhere, the next run does the rest.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from shared import keys
from shared.batch import digest
from shared.errors import NotFound, PreconditionFailed, Refused, Retryable
from shared.store import Listed, ObjectStore, list_all

IMMUTABLE = (keys.RAW_PREFIX, "quarantine/v1/", "report/v1/", "prices/v1/")
TABLES = keys.TABLE_PREFIXES
LAST = (keys.MANIFEST_PREFIX, "annotations/v1/", "inventory/v1/")
"""After everything they speak of."""
CONNECTIONS = 8
TELL_EVERY = 500
STATE = "state/v1/sync.json"


class Copied(msgspec.Struct, kw_only=True):
    """What a run did: objects written, bytes, objects that were there already, and clashes (an immutable object that
    differs on the two sides, which nobody may solve but a person)."""

    written: int = 0
    bytes: int = 0
    present: int = 0
    clashes: list[str] = []


def run(
    source: ObjectStore, target: ObjectStore, *, raw: bool = True, told: Callable[[str], None] = lambda _: None
) -> Copied:
    """Copy everything that the target lacks. Raises Retryable when what was written cannot be read back."""
    done = Copied(clashes=[])
    seen = _seen(target)
    # a manifest must not speak of what came after the tables were listed
    last = {prefix: list_all(source, prefix) for prefix in LAST}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for prefix in (*(IMMUTABLE if raw else IMMUTABLE[1:]), *TABLES, *LAST):
            there = {one.key: one for one in list_all(target, prefix)}
            here = last[prefix] if prefix in last else list_all(source, prefix)
            wanted = [one for one in here if _differs(one, there.get(one.key), seen, prefix)]
            done.present += len(there)
            results = pool.map(lambda one: _copy(source, target, one), wanted)
            for number, (one, (size, clash)) in enumerate(zip(wanted, results, strict=True), 1):
                done.written += bool(size)
                done.bytes += size
                if clash:
                    done.clashes.append(one.key)
                else:
                    seen[one.key] = one.etag
                if number % TELL_EVERY == 0:
                    told(f"{prefix}: {number:,} of {len(wanted):,}")
            tables = {key: etag for key, etag in seen.items() if not key.startswith(IMMUTABLE)}
            target.put(STATE, msgspec.json.encode(tables, order="sorted"))
    return done


def _differs(one: Listed, there: Listed | None, seen: dict[str, str], prefix: str) -> bool:
    if there is None or there.size != one.size:
        return True
    return prefix not in IMMUTABLE and seen.get(one.key) != one.etag


def _copy(source: ObjectStore, target: ObjectStore, one: Listed) -> tuple[int, bool]:
    """Bytes written, and whether the target holds something else that may not be written over."""
    try:
        body = source.get(one.key).body
    except NotFound:
        return 0, False  # gone meanwhile: by its retention
    if not _put(target, one.key, body):
        return 0, digest(target.get(one.key).body) != digest(body)
    if digest(target.get(one.key).body) != digest(body):
        raise Retryable(f"sync {one.key}: what was read back differs from what was written; run again")
    return len(body), False


def _put(target: ObjectStore, key: str, body: bytes) -> bool:
    """Whether it was written; False when something is there that stays."""
    if key.startswith(IMMUTABLE) or key.startswith(keys.MANIFEST_PREFIX):
        try:
            target.put_if_absent(key, body)
        except PreconditionFailed:
            return False
        return True
    target.put(key, body)
    return True


def _seen(target: ObjectStore) -> dict[str, str]:
    """The source's etag of each object as it was last copied."""
    try:
        return msgspec.json.decode(target.get(STATE).body, type=dict[str, str])
    except NotFound:
        return {}
    except msgspec.DecodeError:
        raise Refused(f"{STATE} in the target cannot be read; delete it to compare everything again") from None
