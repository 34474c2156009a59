"""Publish to the bucket: partitions, manifests, reports and state, each by a conditional write.

A failed condition means that another aggregator is running; this one gives up safely and the next run continues.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from aggregator import parquet
from aggregator.calendar import DAY_MS
from aggregator.manifest import Day, Manifest, encode
from aggregator.tables import BATCH_TABLE, DAY_TABLES, HOUR_TABLES, MINUTE_TABLES
from shared import keys
from shared.batch import digest
from shared.errors import PreconditionFailed, Retryable
from shared.store import ObjectStore, Stored, find

MAX_REVISIONS = 1000


def renew_day(store: ObjectStore, day: str, fresh: Mapping[str, Sequence[Path]]) -> Day:
    """Merge rows (NDJSON files by table) into a day's minute tables and rebuild the tables derived from them.
    Idempotent."""
    # read before their sources: if another run rebuilds those in between, these conditional writes fail
    before = {key: find(store, key, keys.MOST_TABLE_BYTES) for key in _derived(day)}
    with parquet.Database() as db:
        minutes: dict[str, Path] = {}
        hashes: list[str] = []
        for table in MINUTE_TABLES:
            if (body := _merge(store, db, table, day, fresh.get(table, ()))) is not None:
                minutes[table] = db.file(f"minute-{table}.parquet", body)
                hashes.append(f"{table} {digest(body)}\n")
        hourly = parquet.hours(db, minutes)
        daily = parquet.days(db, hourly, DAY_MS)
        batches = _batches(db, minutes[BATCH_TABLE])
        # lost minute tables must not remove what was derived from them
        known = before[keys.table_key("hour", "run", day)]
        if known is not None and _told(db, known.body) > batches:
            hourly, daily = {}, {}
        bodies = {keys.table_key("hour", table, day): body for table, body in hourly.items()}
        bodies |= {keys.table_key("day", table, day): body for table, body in daily.items()}
        for key, body in bodies.items():
            old = before[key]
            if old is None or old.body != body:
                replace(store, key, body, old.etag if old else None)
    return Day(
        batches=batches,
        minute_files=len(minutes),
        hour_files=sum(key.startswith("hour/") for key in (bodies or _there(before))),
        day_files=sum(key.startswith("day/") for key in (bodies or _there(before))),
        sha256=digest("".join(hashes).encode()),
    )


def _batches(db: parquet.Database, path: Path) -> int:
    return int(db.rows(f"SELECT count(*) AS n FROM ({parquet.reading([path])})")[0]["n"])


def _told(db: parquet.Database, body: bytes) -> int:
    """Number of batches counted in an hour table of runs."""
    query = parquet.reading([db.file("known.parquet", body)])
    return int(db.rows(f"SELECT coalesce(sum(batches), 0) AS n FROM ({query})")[0]["n"])


def _there(found: Mapping[str, Stored | None]) -> list[str]:
    return [key for key, stored in found.items() if stored is not None]


def commit(store: ObjectStore, manifest: Manifest) -> None:
    """Commit a manifest as the latest. Raises Retryable when another aggregator committed first."""
    try:
        store.put_if_absent(keys.manifest_key(manifest.number), encode(manifest))
    except PreconditionFailed:
        raise Retryable(f"commit manifest {manifest.number}: another aggregator committed first; run again") from None


def report(store: ObjectStore, cadence: str, period: str, name: str, extension: str, body: bytes) -> str:
    """Write a report as its next revision, unless the latest revision has the same bytes. Returns its key."""
    for revision in range(1, MAX_REVISIONS):
        key = keys.report_key(cadence, period, name, revision, extension)
        try:
            store.put_if_absent(key, body)
        except PreconditionFailed:
            following = keys.report_key(cadence, period, name, revision + 1, extension)
            newest = find(store, following, keys.MOST_REPORT_BYTES) is None
            if newest and store.get(key, keys.MOST_REPORT_BYTES).body == body:
                return key
            continue
        return key
    raise Retryable(f"report {cadence}/{period}/{name}: more than {MAX_REVISIONS} revisions")


def replace(store: ObjectStore, key: str, body: bytes, etag: str | None) -> None:
    """Replace the state that was read; ``etag`` is None if there was none. Raises Retryable on a conflict."""
    try:
        if etag is None:
            store.put_if_absent(key, body)
        else:
            store.put_if_match(key, body, etag)
    except PreconditionFailed:
        raise Retryable(f"write {key}: changed by another aggregator meanwhile; run again") from None


def _merge(store: ObjectStore, db: parquet.Database, table: str, day: str, fresh: Sequence[Path]) -> bytes | None:
    """A minute table after merging these rows; None if there is none."""
    key = keys.table_key("minute", table, day)
    old = find(store, key, keys.MOST_TABLE_BYTES)
    if not fresh:
        return old.body if old else None
    body = parquet.merged(db, table, fresh, old.body if old else None)
    if old is None or body != old.body:
        replace(store, key, body, old.etag if old else None)
    return body


def _derived(day: str) -> list[str]:
    levels = (("hour", HOUR_TABLES), ("day", DAY_TABLES))
    return [keys.table_key(level, table, day) for level, tables in levels for table in tables]
