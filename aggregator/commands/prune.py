"""Delete raw segments, urgent copies and minute tables beyond their retention, and only what has been rolled up.

Nothing depends on the success of a deletion: the manifest is first updated to no longer rely on the objects.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta

import msgspec

from aggregator import load, parquet, publish
from aggregator.config import AggregatorConfig
from aggregator.manifest import Manifest
from shared import keys
from shared.errors import Refused
from shared.store import ObjectStore, each, find

Run = tuple[str, int, int]
"""Node, incarnation, epoch."""


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """Number of objects deleted, or to be deleted with a dry run."""

    raw: int
    minute: int
    days: tuple[str, ...]
    urgent: int = 0


def run(config: AggregatorConfig, store: ObjectStore, now: datetime, dry_run: bool = False) -> Pruned:
    """Delete expired objects. Raises Retryable when another run committed first."""
    manifest = load.newest_manifest(store)
    days = _days(config, manifest, now)
    old = {*days, *(day for day, made in manifest.days.items() if made.pruned)}
    if days and not dry_run:
        gone = {day: msgspec.structs.replace(manifest.days[day], minute_files=0, pruned=True) for day in days}
        made = {**manifest.days, **gone}
        after = msgspec.structs.replace(manifest, number=manifest.number + 1, days=made, quarantined=())
        publish.commit(store, after)
    reached = _reached(config, store, manifest, now)
    minute = (one.key for one in each(store, "minute/v1/") if _day_of(one.key) in old)
    return Pruned(
        raw=_deleted(store, _raw(store, manifest, reached), dry_run),
        minute=_deleted(store, minute, dry_run),
        days=tuple(days),
        urgent=_deleted(store, _urgent(store, reached), dry_run),
    )


def _deleted(store: ObjectStore, expired: Iterable[str], dry_run: bool) -> int:
    """Delete as they are listed; returns how many there were."""
    count = 0
    for key in expired:
        if not dry_run:
            store.delete(key)
        count += 1
    return count


def _days(config: AggregatorConfig, manifest: Manifest, now: datetime) -> list[str]:
    """Days whose minute tables have expired."""
    if not config.retention.minute_days:
        return []
    oldest = (now.astimezone(UTC) - timedelta(days=config.retention.minute_days)).date().isoformat()
    return [day for day, made in manifest.days.items() if day < oldest and not made.pruned]


def _raw(store: ObjectStore, manifest: Manifest, reached: Mapping[Run, int]) -> Iterator[str]:
    """Segments whose batches all ended before the first retained day, and that a commit has counted."""
    for folder, cursor in sorted(manifest.cursors.items()) if reached else ():
        for listed in each(store, folder):
            try:
                key = keys.parse_batch_key(listed.key)
            except Refused:
                continue
            if listed.key > cursor:
                break  # our keys, unlike foreign ones, have the same order in every store
            if key.last_seq <= reached.get((key.node, key.incarnation, key.epoch), -1):
                yield listed.key


def _urgent(store: ObjectStore, reached: Mapping[Run, int]) -> Iterator[str]:
    """Urgent copies of events in such batches, or of runs that ended before another that did."""
    newest: dict[tuple[str, int], int] = {}
    for node, incarnation, epoch in reached:
        newest[node, incarnation] = max(newest.get((node, incarnation), -1), epoch)
    for listed in each(store, keys.URGENT_PREFIX) if reached else ():
        try:
            key = keys.parse_urgent_key(listed.key)
        except Refused:
            continue
        run = (key.node, key.incarnation, key.epoch)
        if key.first_seq <= reached.get(run, -1) or key.epoch < newest.get(run[:2], -1):
            yield listed.key


def _reached(config: AggregatorConfig, store: ObjectStore, manifest: Manifest, now: datetime) -> dict[Run, int]:
    """The last sequence number of each run on the days beyond the retention of raw segments."""
    found: dict[Run, int] = {}
    if not config.retention.raw_days:
        return found
    oldest = (now.astimezone(UTC) - timedelta(days=config.retention.raw_days)).date().isoformat()
    with parquet.Database() as db:
        for day in (day for day in manifest.days if day < oldest):
            stored = find(store, keys.table_key("day", "run", day), keys.MOST_TABLE_BYTES)
            for row in db.rows(parquet.reading([db.file("run.parquet", stored.body)])) if stored else ():
                run = (row["node"], row["incarnation"], row["epoch"])
                found[run] = max(found.get(run, -1), row["last_seq"])
    return found


def _day_of(key: str) -> str:
    try:
        return keys.parse_table_key(key)[2]
    except Refused:
        return ""
