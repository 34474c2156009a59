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
    """Read every segment after its group's cursor, oldest first. ``prefix`` may be the urgent copies'."""
    found: list[Batch] = []
    bad: list[Quarantined] = []
    reached, segments = dict(cursors), 0
    for group in _groups(store, prefix):
        for listed in list_all(store, group, reached.get(group, "")):
            reached[group] = listed.key
            if keys.is_claim(listed.key):
                continue
            batches, reason = _segment(store, listed, rack)
            if reason:
                bad.append(Quarantined(key=listed.key, reason=reason))
                _keep_copy(store, listed.key)
            else:
                segments += 1
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
    """A segment's batches, or none and the reason."""
    try:
        key = keys.parse_batch_key(listed.key) if listed.key.startswith(keys.RAW_PREFIX) else None
        batches = unseal(store.get(listed.key).body)
        for batch in batches:
            _check(batch, key, rack, listed.key)
    except NotFound:
        return [], ""  # gone between the listing and the read: nothing of ours is ever deleted by us
    except Refused as error:
        return [], error.message
    return batches, ""


def _check(batch: Batch, key: keys.RawKey | None, rack: str, name: str) -> None:
    """That a batch is what its key says. Raises Refused."""
    if batch.rack != rack:
        raise Refused(f"{name}: it belongs to rack {batch.rack[:63]!r}, not to {rack!r}")
    utc_day(batch.t_end_ms)
    if batch.t_start_ms > batch.t_end_ms:
        raise Refused(f"{name}: a window ends before it starts")
    if key is None:
        return
    if (batch.node, batch.incarnation, batch.epoch) != key[:3] or not key.first_seq <= batch.seq <= key.last_seq:
        raise Refused(f"{name}: holds a batch of another place ({batch.node[:63]!r}, {batch.epoch}, {batch.seq})")


def _groups(store: ObjectStore, prefix: str) -> list[str]:
    """Each first folder under a prefix (one per node), found by skipping from one to the next."""
    found, after = [], ""
    while page := store.list_after(prefix, after, limit=1):
        rest = page[0].key[len(prefix) :]
        folder, slash, _ = rest.partition("/")
        group = prefix + folder + slash
        found.append(group)
        # "0" is the character after "/": the next key beyond everything in this folder
        after = prefix + folder + "0" if slash else page[0].key
    return found


def _keep_copy(store: ObjectStore, key: str) -> None:
    try:
        store.put_if_absent(keys.quarantine_key(key), store.get(key).body)
    except (PreconditionFailed, NotFound, Refused):
        return  # it is there already, or cannot be kept under this name; the manifest names it


def _optional(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.get(key).body
    except NotFound:
        return None
