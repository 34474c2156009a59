"""Read what is new under raw/, add it to the minute tables, renew the hourly ones, commit."""

import msgspec

from aggregator import load, publish
from aggregator.config import AggregatorConfig
from aggregator.manifest import Manifest
from shared.logs import get_logger
from shared.store import ObjectStore

log = get_logger("aggregator.rollup")


def run(config: AggregatorConfig, store: ObjectStore) -> Manifest:
    """Roll up everything new; returns the newest manifest. Stopped anywhere, the next run does the rest."""
    manifest = load.newest_manifest(store)
    fresh = load.fresh(store, config.rack, manifest.cursors)
    if fresh.cursors == manifest.cursors and not fresh.quarantined:
        return manifest
    for day, batches in load.by_day(fresh.batches).items():
        publish.merge_day(store, day, batches)
    distinct = len({batch.id for batch in fresh.batches})
    made = msgspec.structs.replace(
        manifest,
        number=manifest.number + 1,
        cursors=fresh.cursors,
        batches=manifest.batches + distinct,
        segments=manifest.segments + fresh.segments,
        unknown_records=manifest.unknown_records + sum(b.unknown_records for b in fresh.batches),
        quarantined=fresh.quarantined,
        quarantined_total=manifest.quarantined_total + len(fresh.quarantined),
    )
    publish.commit(store, made)
    log.info("rolled_up", manifest=made.number, segments=fresh.segments, batches=distinct)
    for bad in fresh.quarantined:
        log.warning("quarantined", key=bad.key, reason=bad.reason)
    return made
