"""Into the bucket: partitions, manifests, reports and state, each by a conditional write.

A lost condition means that another aggregator runs; this one gives up without harm and the next run goes on.
"""

from collections.abc import Sequence

import msgspec

from aggregator import parquet, rollup
from aggregator.manifest import Manifest
from aggregator.window import Fact, Meta, facts_of, meta_of
from shared import keys
from shared.batch import Batch
from shared.errors import NotFound, PreconditionFailed, Retryable
from shared.records import Served
from shared.store import ObjectStore, Stored

MAX_REVISIONS = 1000


def merge_day(store: ObjectStore, day: str, batches: Sequence[Batch]) -> None:
    """Add batches to every table of a day and renew its hourly rollup. Doing it again changes nothing."""
    facts = [fact for batch in batches for fact in facts_of(batch)]
    metas = [meta_of(batch) for batch in batches]
    for table in parquet.TABLES:
        mine = [f for f in facts if f.record.__struct_config__.tag == table]
        if mine or table == parquet.BATCH_TABLE:
            _merge(store, table, day, mine, metas)
    _hourly(store, day)


def commit(store: ObjectStore, manifest: Manifest) -> None:
    """Make a manifest the newest. Raises Retryable when another aggregator was faster."""
    body = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
    try:
        store.put_if_absent(keys.manifest_key(manifest.number), body)
    except PreconditionFailed:
        raise Retryable(f"commit manifest {manifest.number}: another aggregator was faster; run again") from None


def report(store: ObjectStore, cadence: str, period: str, name: str, extension: str, body: bytes) -> str:
    """Write a report as its next revision, unless the newest revision has the same bytes. Returns its key."""
    for revision in range(1, MAX_REVISIONS):
        key = keys.report_key(cadence, period, name, revision, extension)
        try:
            store.put_if_absent(key, body)
        except PreconditionFailed:
            following = keys.report_key(cadence, period, name, revision + 1, extension)
            if _optional(store, following) is None and store.get(key).body == body:
                return key
            continue
        return key
    raise Retryable(f"report {cadence}/{period}/{name}: over {MAX_REVISIONS} revisions")


def replace(store: ObjectStore, key: str, body: bytes, etag: str | None) -> None:
    """Write state over the version that was read; ``etag`` None when there was none. Raises Retryable when lost."""
    try:
        if etag is None:
            store.put_if_absent(key, body)
        else:
            store.put_if_match(key, body, etag)
    except PreconditionFailed:
        raise Retryable(f"write {key}: another aggregator changed it meanwhile; run again") from None


def _merge(store: ObjectStore, table: str, day: str, facts: list[Fact], metas: list[Meta]) -> None:
    key = keys.minute_key(table, day)
    old = _optional(store, key)
    body = parquet.write(table, facts, metas, old.body if old else None)
    if old is None or body != old.body:
        replace(store, key, body, old.etag if old else None)


def _hourly(store: ObjectStore, day: str) -> None:
    key = keys.hour_key("served", day)
    old = _optional(store, key)  # read before its source: a run in between then makes this write lose
    minutes = _optional(store, keys.minute_key("served", day))
    if minutes is None:
        return
    rows = [(f.meta, f.record) for f in parquet.read("served", minutes.body) if isinstance(f.record, Served)]
    body = parquet.write_rows(rollup.hourly(rows), rollup.ServedHour)
    if old is None or old.body != body:
        replace(store, key, body, old.etag if old else None)


def _optional(store: ObjectStore, key: str) -> Stored | None:
    try:
        return store.get(key)
    except NotFound:
        return None
