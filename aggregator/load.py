"""From the bucket: new segments of every node, checked; and windows over what has been rolled up.

A bad object never stops the rest: it is copied to quarantine/ byte for byte, counted, and named with its reason.
"""

from collections.abc import Iterable, Mapping

import msgspec

from aggregator import parquet
from aggregator.manifest import Manifest, Quarantined
from aggregator.window import DAY_MS, Fact, Meta, Span, Window, utc_day, utc_days
from shared import keys
from shared.batch import Batch, unseal
from shared.errors import NotFound, PreconditionFailed, Refused
from shared.store import Listed, ObjectStore, list_all

MAX_REASON = 200


class Fresh(msgspec.Struct, frozen=True, kw_only=True):
    """What is new since some cursors."""

    batches: tuple[Batch, ...]
    cursors: dict[str, str]
    segments: int
    quarantined: tuple[Quarantined, ...]


def newest_manifest(store: ObjectStore) -> Manifest:
    """The last commit; an empty one in a new bucket. Raises Refused when it cannot be read."""
    listed = list_all(store, keys.MANIFEST_PREFIX)
    if not listed:
        return Manifest()
    try:
        return msgspec.json.decode(store.get(listed[-1].key).body, type=Manifest)
    except msgspec.DecodeError as error:
        raise Refused(f"manifest {listed[-1].key}: {error}; delete it to roll up again from the one before") from None


def fresh(store: ObjectStore, rack: str, cursors: Mapping[str, str], prefix: str = keys.RAW_PREFIX) -> Fresh:
    """Read every segment after its folder's cursor, oldest first. ``prefix`` may be the urgent copies'.

    A folder is one incarnation of one node: within it keys only grow, between two of them they need not.
    """
    found: list[Batch] = []
    bad: list[Quarantined] = []
    reached = {folder: key for folder, key in cursors.items() if folder.startswith(prefix)}
    segments = 0
    for folder in _folders(store, prefix):
        for listed in list_all(store, folder, reached.get(folder, "")):
            if keys.is_claim(listed.key):
                continue
            ours = prefix != keys.RAW_PREFIX or _is_ours(listed.key)
            if ours:
                reached[folder] = listed.key  # a stranger's key may sort anywhere and must hide nothing
            batches, reason = _segment(store, listed, rack)
            if reason and (_keep_copy(store, listed.key) or ours):
                bad.append(Quarantined(key=listed.key, reason=reason[:MAX_REASON]))
            segments += bool(batches)
            found += batches
    return Fresh(batches=tuple(found), cursors=reached, segments=segments, quarantined=tuple(bad))


def window(store: ObjectStore, span: Span) -> Window:
    """Everything rolled up that ended in the span."""
    facts: list[Fact] = []
    batches: list[Meta] = []
    for day in utc_days(Span(span.name, span.since_ms - DAY_MS, span.until_ms, span.timezone)):
        for table in parquet.TABLES:
            body = _optional(store, keys.minute_key(table, day))
            if body is not None and table == parquet.BATCH_TABLE:
                batches += parquet.read_batches(body)
            elif body is not None:
                facts += parquet.read(table, body)
    return Window(span, facts, batches)


def by_day(batches: Iterable[Batch]) -> dict[str, list[Batch]]:
    """Batches by the UTC day in which they ended."""
    days: dict[str, list[Batch]] = {}
    for batch in batches:
        days.setdefault(utc_day(batch.t_end_ms), []).append(batch)
    return dict(sorted(days.items()))


def _segment(store: ObjectStore, listed: Listed, rack: str) -> tuple[list[Batch], str]:
    """A segment's good batches, and the reason why it is to be set aside; "" when all of them are good."""
    try:
        key = keys.parse_batch_key(listed.key) if listed.key.startswith(keys.RAW_PREFIX) else None
        batches = unseal(store.get(listed.key).body)
    except NotFound:
        return [], ""  # gone between the listing and the read: nothing of ours is ever deleted by us
    except Refused as error:
        return [], error.message
    good: list[Batch] = []
    reasons: list[str] = []
    for batch in batches:
        try:
            _check(batch, key, rack, listed.key)
            good.append(batch)
        except Refused as error:
            reasons.append(error.message)
    return good, reasons[0] if reasons else ""


def _check(batch: Batch, key: keys.RawKey | None, rack: str, name: str) -> None:
    """That a batch is what its key says, and lived when nodes live. Raises Refused."""
    if batch.rack != rack:
        raise Refused(f"{name}: it belongs to rack {batch.rack[:63]!r}, not to {rack!r}")
    utc_day(batch.t_end_ms)
    for record in batch.records:
        for field in ("t_ms", "last_seen_ms"):
            if field in record.__struct_fields__:
                utc_day(getattr(record, field))
    if key is None:
        if not name.startswith(f"{keys.URGENT_PREFIX}node={batch.node}/"):
            raise Refused(f"{name}: holds a batch of another node ({batch.node[:63]!r})")
        return
    if (batch.node, batch.incarnation, batch.epoch) != key[:3] or not key.first_seq <= batch.seq <= key.last_seq:
        raise Refused(f"{name}: holds a batch of another place ({batch.node[:63]!r}, {batch.epoch}, {batch.seq})")


def _folders(store: ObjectStore, prefix: str) -> list[str]:
    """The incarnations of every node under a prefix; an object that lies beside them stands for itself."""
    return [
        inner
        for outer in _children(store, prefix)
        for inner in (_children(store, outer) if outer.endswith("/") else [outer])
    ]


def _children(store: ObjectStore, prefix: str) -> list[str]:
    """Folders and objects directly under a prefix, found by skipping from one to the next."""
    found, after = [], ""
    while page := store.list_after(prefix, after, limit=1):
        name, slash, _ = page[0].key[len(prefix) :].partition("/")
        found.append(prefix + name + slash)
        # "0" is the character after "/": the next key beyond everything in this folder
        after = prefix + name + "0" if slash else page[0].key
    return found


def _is_ours(key: str) -> bool:
    try:
        keys.parse_batch_key(key)
    except Refused:
        return False
    return True


def _keep_copy(store: ObjectStore, key: str) -> bool:
    """Keep a bad object byte for byte; False when it was kept before, or cannot be."""
    try:
        store.put_if_absent(keys.quarantine_key(key), store.get(key).body)
    except (PreconditionFailed, NotFound, Refused):
        return False
    return True


def _optional(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.get(key).body
    except NotFound:
        return None
