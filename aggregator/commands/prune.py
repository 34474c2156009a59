"""Delete raw segments and minute tables beyond their retention, and only what has been rolled up.

Nothing depends on the success of a deletion: the manifest is first updated to no longer rely on the objects.
"""

from datetime import UTC, datetime, timedelta

import msgspec

from aggregator import load, parquet, publish
from aggregator.config import AggregatorConfig
from aggregator.manifest import Manifest
from shared import keys
from shared.errors import Refused
from shared.store import ObjectStore, find, list_all


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """Number of objects deleted, or to be deleted with a dry run."""

    raw: int
    minute: int
    days: tuple[str, ...]


def run(config: AggregatorConfig, store: ObjectStore, now: datetime, dry_run: bool = False) -> Pruned:
    """Delete expired objects. Raises Retryable when another run committed first."""
    manifest = load.newest_manifest(store)
    raw = _raw(config, store, manifest, now)
    days = _days(config, manifest, now)
    old = {*days, *(day for day, made in manifest.days.items() if made.pruned)}
    minute = [one.key for one in list_all(store, "minute/v1/") if _day_of(one.key) in old]
    if not dry_run:
        if days:
            gone = {day: msgspec.structs.replace(manifest.days[day], minute_files=0, pruned=True) for day in days}
            made = {**manifest.days, **gone}
            after = msgspec.structs.replace(manifest, number=manifest.number + 1, days=made, quarantined=())
            publish.commit(store, after)
        for key in (*raw, *minute):
            store.delete(key)
    return Pruned(raw=len(raw), minute=len(minute), days=tuple(days))


def _days(config: AggregatorConfig, manifest: Manifest, now: datetime) -> list[str]:
    """Days whose minute tables have expired."""
    if not config.retention.minute_days:
        return []
    oldest = (now.astimezone(UTC) - timedelta(days=config.retention.minute_days)).date().isoformat()
    return [day for day, made in manifest.days.items() if day < oldest and not made.pruned]


def _raw(config: AggregatorConfig, store: ObjectStore, manifest: Manifest, now: datetime) -> list[str]:
    """Segments whose batches all ended before the first retained day, and that a commit has counted."""
    if not config.retention.raw_days:
        return []
    oldest = (now.astimezone(UTC) - timedelta(days=config.retention.raw_days)).date().isoformat()
    reached = _reached(store, [day for day in manifest.days if day < oldest])
    found = []
    for folder, cursor in sorted(manifest.cursors.items()):
        for listed in list_all(store, folder):
            if listed.key > cursor:
                break
            try:
                key = keys.parse_batch_key(listed.key)
            except Refused:
                continue
            if key.last_seq <= reached.get((key.node, key.incarnation, key.epoch), -1):
                found.append(listed.key)
    return found


def _reached(store: ObjectStore, days: list[str]) -> dict[tuple[str, int, int], int]:
    """The last sequence number of each run on these days."""
    found: dict[tuple[str, int, int], int] = {}
    with parquet.Database() as db:
        for day in days:
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
