"""Read new segments under raw/, merge them into the minute tables, rebuild hour and day tables, commit.

A large backlog (a first run, the end of an outage) is processed in pieces, each with its own commit, by as many
processes as there are cores. After an interruption the next run continues.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from aggregator import load, parquet, publish
from aggregator.config import AggregatorConfig
from aggregator.manifest import Day, Manifest, Quarantined
from aggregator.raw import ingest
from aggregator.raw.cleaning import MOST_NAME, text
from aggregator.raw.progress import MOST_BYTES, Outcome, Pending, Progress, node_of
from shared import bucket_rack, keys, logs
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger
from shared.store import ObjectStore
from shared.store_open import open_store

SPILL_BYTES = 1 << 30
"""Limit of a piece as unpacked rows on disk; half of what is free there if that is less. An ordinary piece has a third
of it."""
FEW_SEGMENTS = 300
"""Below this number, starting processes does not pay off."""
MOST_PROCESSES = 8

log = get_logger("aggregator.rollup")
Told = Callable[[str], None]
Faults = list[RackError]
T = TypeVar("T")
_TEMPORARY = "mlxrack-rollup-"


def run(
    config: AggregatorConfig,
    store: ObjectStore,
    environ: Mapping[str, str] | None = None,
    told: Told = lambda _: None,
    again: bool = False,
    faults: Faults | None = None,
) -> Manifest:
    """Roll up new segments; returns the latest manifest. ``told`` receives progress, ``environ`` resolves secrets for
    worker processes (none are started without it). ``again`` re-reads every segment still in the bucket. Raises
    Retryable when another run committed first, and Refused (code wrong_rack) when the bucket is another rack's by what
    it says, or by what all nodes write.
    ``faults`` receives what is wrong although the rest is committed (codes wrong_rack, all_quarantined)."""
    _check_rack(config, store)
    manifest = load.newest_manifest(store)
    lost, torn = load.missing(store, manifest)
    if lost:
        log.warning("tables_missing", days=sorted(lost), reason="re-reading all segments still in the bucket")
        kept = {day: made for day, made in manifest.days.items() if day not in lost}
        manifest = _from_the_start(msgspec.structs.replace(manifest, days=kept))
    if again:
        manifest = _from_the_start(manifest)
    _sweep()
    backlog = load.pending(store, manifest.cursors)
    progress = Progress(backlog.segments, manifest.unread, time.time_ns() // 1_000_000)
    with _workers(config, store, environ, len(backlog.segments)) as workers:
        if torn:
            days = workers.renew(sorted(torn), {})
            if not backlog.segments:
                manifest = _commit(store, manifest, {}, days, [])
        while piece := progress.piece():
            manifest = _piece(config, store, workers, manifest, progress, piece)
            told(f"{progress.done:,} of {len(backlog.segments):,} segments, {manifest.batches:,} batches in total")
        if again:
            _tell_what_stays(manifest, workers.renewed)
    manifest = _with_unread(store, manifest, progress, backlog.unlisted)
    if progress.counted:
        bucket_rack.tell(store, config.rack)
    _judge(config, progress, manifest, faults)
    return manifest


def _check_rack(config: AggregatorConfig, store: ObjectStore) -> None:
    """Once a bucket says whose it is, a name in aggregator.toml is not believed against all its nodes."""
    if (theirs := bucket_rack.told(store)) not in ("", config.rack):
        theirs = text(theirs, MOST_NAME)
        why = (
            f"this bucket is that of rack {theirs!r} ({keys.RACK}), aggregator.toml says {config.rack!r}: set rack = "
            f"{theirs!r} there, or correct its [store]; if the rack was renamed, delete {keys.RACK} from the bucket"
        )
        raise Refused(f"rollup: {why}", code="wrong_rack")


def _judge(config: AggregatorConfig, progress: Progress, manifest: Manifest, faults: Faults | None) -> None:
    """What is wrong with all new objects, or with all of a node."""
    racks, all_nodes = progress.strangers(manifest.cursors)
    if racks:
        fault = _wrong_rack(config.rack, racks, len(progress.foreign), all_nodes)
        if all_nodes:
            raise fault
    elif progress.bad and not progress.counted:
        key, reason = next(iter(progress.bad.items()))
        why = f"rollup: nothing was counted, and all {len(progress.bad):,} new objects are in quarantine: {reason}"
        fault = Refused(why if key in reason else f"{why} ({key})", code="all_quarantined")
    else:
        return
    if faults is None:
        log.warning(fault.code, reason=fault.message)
    else:
        faults.append(fault)


def _wrong_rack(rack: str, racks: Mapping[str, str], objects: int, all_nodes: bool) -> Refused:
    names = sorted({text(one) for one in racks.values()})
    others = " and ".join(repr(one) for one in names)
    stays = f"their {objects:,} objects are neither counted nor set aside, and read again by the next run"
    if all_nodes:
        who = "all nodes write" if len(racks) > 1 else f"node {_node(next(iter(racks)))}, the only one, writes"
        remedy = f"set rack = {names[0]!r} there" if len(names) == 1 else "correct one of them"
        why = f"{who} rack {others}, aggregator.toml says {rack!r}: {remedy}, or correct its [store]; {stays}"
    else:
        who = ", ".join(_node(one) for one in sorted(racks))
        why = (
            f"{who} {'write' if len(racks) > 1 else 'writes'} rack {others}, this bucket is that of {rack!r}: correct "
            f"node.rack or [store] there; {stays}. Of a node that is gone, delete raw/v1/node=ID/"
        )
    return Refused(f"rollup: {why}", code="wrong_rack")


def _node(folder: str) -> str:
    return text(folder.rpartition("node=")[2])


def _tell_what_stays(manifest: Manifest, renewed: Collection[str]) -> None:
    """Days of which no segment is left to be read again."""
    if stay := sorted(manifest.days.keys() - set(renewed)):
        why = "their segments have been deleted (retention.raw_days); their tables stay as they are"
        log.warning("days_not_read_again", days=len(stay), first=stay[0], last=stay[-1], reason=why)


def _piece(
    config: AggregatorConfig,
    store: ObjectStore,
    workers: "_Workers",
    manifest: Manifest,
    progress: Progress,
    piece: Sequence[Pending],
) -> Manifest:
    """Read a piece, merge it, commit it. Raises Retryable when even one segment is too much for the disk."""
    try:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY) as name:
            outcomes = workers.spill([one.key for one in piece if one.size <= MOST_BYTES], Path(name))
            outcomes += [_too_large(one) for one in piece if one.size > MOST_BYTES]
            outage = _outage(config, store, outcomes, progress.witnesses(outcomes, manifest.cursors))
            fresh = ingest.spilled(Path(name))
            closed = [day for day in fresh if day in manifest.days and manifest.days[day].pruned]
            late = sum(ingest.lines(fresh.pop(day)) for day in closed)
            days = workers.renew(list(fresh), fresh)
    except OSError as error:
        if not parquet.is_full(error):
            raise
        if not progress.too_much(piece):
            raise Retryable(f"rollup: {parquet.full_disk()}", code="disk_full") from None
        log.warning("piece_too_large", segments=len(piece), reason=parquet.full_disk())
        return manifest
    if late:
        log.warning("late_batches_dropped", batches=late, days=closed, reason="the minute tables have been pruned")
        manifest = msgspec.structs.replace(manifest, too_late=manifest.too_late + late)
    cursors, settled = progress.read(piece, [one for one in outcomes if not (outage and one.unread)])
    for one in (misplaced := progress.misplaced()):
        ingest.keep_copy(store, one.key)
    moved, more = progress.settle(misplaced)
    cursors, settled = {**cursors, **moved}, [*settled, *more]
    made = _commit(store, manifest, cursors, days, settled)
    if outage:
        raise Retryable(f"rollup: nothing new could be read any more, {outage}; what was read before is committed")
    return made


def _outage(config: AggregatorConfig, store: ObjectStore, outcomes: Sequence[Outcome], witnesses: Sequence[str]) -> str:
    """Why nothing can be read of any node: the store's fault, and not that of the nodes. "" if something can be."""
    unread = next((f"{one.key}: {one.unread}" for one in outcomes if one.unread), "")
    return unread if unread and not ingest.gives_out_any(store, config.rack, witnesses) else ""


def _with_unread(store: ObjectStore, manifest: Manifest, progress: Progress, unlisted: Mapping[str, str]) -> Manifest:
    """Commit which objects could not be read, and which nodes are another rack's, if that has changed. Raises Retryable
    if nothing could be read at all."""
    for key, one in progress.unread.items():
        log.warning(
            "unreadable", key=text(key), reason=text(one.reason), effect="this node's later segments wait for it"
        )
    for folder, reason in unlisted.items():
        log.warning("unlisted", key=text(folder), reason=text(reason), effect="this node's new segments wait for it")
    kept = {key: one for key, one in manifest.unread.items() if key.startswith(tuple(unlisted))}
    unread = {**kept, **progress.unread}
    racks, all_nodes = progress.strangers(manifest.cursors)
    strangers = manifest.strangers if all_nodes else racks  # a bucket that may not be ours is left as it is
    if unread.keys() != manifest.unread.keys() or strangers != manifest.strangers:
        changed = {"number": manifest.number + 1, "unread": unread, "strangers": strangers}
        manifest = msgspec.structs.replace(manifest, **changed, quarantined=())
        publish.commit(store, manifest)
    if (progress.unread or unlisted) and not progress.done:
        key, reason = next(iter({**{k: one.reason for k, one in progress.unread.items()}, **unlisted}.items()))
        raise Retryable(f"rollup: nothing new could be read, {key} for example: {reason}")
    return manifest


def _from_the_start(manifest: Manifest) -> Manifest:
    """Reset the cursors and everything counted along with them."""
    return msgspec.structs.replace(
        manifest,
        cursors={},
        unread={},
        segments=0,
        unknown_records=0,
        quarantined_total=0,
        aside={},
        foreign={},
        strangers={},
        too_late=0,
    )


def _too_large(one: Pending) -> Outcome:
    """Quarantine without fetching: larger than any segment of an agent."""
    return Outcome(one.key, 0, 0, f"{one.key}: {one.size:,} bytes, the limit of a segment is {MOST_BYTES:,}")


def _sweep() -> None:
    """Remove temporary folders of killed runs after a day."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > 86_400:
                shutil.rmtree(folder, ignore_errors=True)


def _commit(
    store: ObjectStore,
    manifest: Manifest,
    cursors: Mapping[str, str],
    days: Mapping[str, Day],
    outcomes: Sequence[Outcome],
) -> Manifest:
    bad = tuple(Quarantined(key=one.key, reason=one.reason) for one in outcomes if one.reason)
    segments = sum(bool(one.batches) for one in outcomes)
    unmoved = all(manifest.cursors.get(folder) == key for folder, key in cursors.items())
    if unmoved and not bad and all(manifest.days.get(day) == made for day, made in days.items()):
        return manifest
    made = msgspec.structs.replace(
        manifest,
        number=manifest.number + 1,
        cursors={**manifest.cursors, **cursors},
        days=dict(sorted({**manifest.days, **days}.items())),
        segments=manifest.segments + segments,
        unknown_records=manifest.unknown_records + sum(one.unknown_records for one in outcomes),
        quarantined=bad,
        quarantined_total=manifest.quarantined_total + len(bad),
        aside=_by_day(manifest.aside, [one for one in outcomes if one.reason]),
        foreign=_by_day(manifest.foreign, [one for one in outcomes if one.misplaced]),
    )
    publish.commit(store, made)
    log.info("rolled_up", manifest=made.number, segments=segments, batches=made.batches - manifest.batches)
    _tell_of(bad)
    return made


def _by_day(known: Mapping[str, int], some: Sequence[Outcome]) -> dict[str, int]:
    counts = Counter({**known})
    counts.update(one.day for one in some)
    return dict(sorted(counts.items()))


def _tell_of(bad: Sequence[Quarantined]) -> None:
    """One line for each node and kind of reason, with an example of each."""
    kinds: dict[tuple[str, str], list[Quarantined]] = {}
    for one in bad:
        kinds.setdefault((node_of(one.key), one.reason.replace(one.key, "")), []).append(one)
    for same in kinds.values():
        log.warning("quarantined", key=text(same[0].key), objects=len(same), reason=text(same[0].reason))


class _Workers:
    """Executes the work in this process, or in worker processes with their own connections."""

    def __init__(self, config: AggregatorConfig, store: ObjectStore, pool: Executor | None, count: int) -> None:
        self._config, self._store, self._pool, self._count = config, store, pool, count
        self.renewed: set[str] = set()

    def spill(self, wanted: Sequence[str], folder: Path) -> list[Outcome]:
        """Read segments and write their rows into a folder: as many as fit there."""
        budget = min(SPILL_BYTES, shutil.disk_usage(folder).free // 2)
        if self._pool is None:
            return ingest.spill(self._store, self._config.rack, wanted, folder, budget)
        rack = self._config.rack
        # each node's segments are spread over the list; small shares keep all processes busy to the end
        shares = list(ingest.chunks(wanted, 4 * self._count))
        started = [
            self._pool.submit(_spill, rack, list(share), folder / str(number), budget // len(shares))
            for number, share in enumerate(shares)
        ]
        return [outcome for share in _all(started) for outcome in share]

    def renew(self, days: Sequence[str], fresh: Mapping[str, Mapping[str, Sequence[Path]]]) -> dict[str, Day]:
        """Rebuild the tables of some days."""
        self.renewed.update(days)
        if self._pool is None:
            return {day: publish.renew_day(self._store, day, fresh.get(day, {})) for day in days}
        started: dict[str, Future[Day]] = {day: self._pool.submit(_renew, day, fresh.get(day, {})) for day in days}
        return dict(zip(started, _all(list(started.values())), strict=True))


def _all(started: Sequence[Future[T]]) -> list[T]:
    """All results. On a failure, wait for the others, which still write into a folder about to be deleted."""
    try:
        return [one.result() for one in started]
    except BrokenProcessPool:
        raise Retryable("rollup: a worker process ended unexpectedly, possibly out of memory; run again") from None
    finally:
        for one in started:
            one.cancel()
        wait(started)


@contextmanager
def _workers(
    config: AggregatorConfig, store: ObjectStore, environ: Mapping[str, str] | None, segments: int
) -> Iterator[_Workers]:
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    if environ is None or segments < FEW_SEGMENTS or count < 2:
        yield _Workers(config, store, None, 1)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _begin, (config, dict(environ))) as pool:
        try:
            yield _Workers(config, store, pool, count)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_opened: list[ObjectStore] = []


def _begin(config: AggregatorConfig, environ: Mapping[str, str]) -> None:
    """Initialise a worker process: logs warnings only, opens its own connection."""
    logs.configure(None, level="warning")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _opened.append(open_store(config.store, environ))


def _end_with_parent() -> None:
    """Exit with the parent, so that a killed run leaves no worker processes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _spill(rack: str, wanted: Sequence[str], folder: Path, most_bytes: int) -> list[Outcome]:
    return ingest.spill(_opened[0], rack, wanted, folder, most_bytes)


def _renew(day: str, fresh: Mapping[str, Sequence[Path]]) -> Day:
    return publish.renew_day(_opened[0], day, fresh)
