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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from aggregator import ingest, load, publish
from aggregator.config import AggregatorConfig
from aggregator.manifest import Day, Manifest, Quarantined
from shared import logs
from shared.errors import Retryable
from shared.logs import get_logger
from shared.store import ObjectStore
from shared.store_open import open_store

PIECE_SEGMENTS = 12_000
"""Segments per commit: about a minute of work."""
PIECE_BYTES, MOST_BYTES = 256 << 20, 16 << 20
"""Limits of a piece and of a segment; agents write at most 256 KiB per segment."""
FEW_SEGMENTS = 300
"""Below this number, starting processes does not pay off."""
MOST_PROCESSES = 8

log = get_logger("aggregator.rollup")
Told = Callable[[str], None]
T = TypeVar("T")
_TEMPORARY = "mlxrack-rollup-"


def run(
    config: AggregatorConfig,
    store: ObjectStore,
    environ: Mapping[str, str] | None = None,
    told: Told = lambda _: None,
    again: bool = False,
) -> Manifest:
    """Roll up new segments; returns the latest manifest. ``told`` receives progress, ``environ`` resolves secrets for
    worker processes (none are started without it). ``again`` re-reads every segment still in the bucket. Raises
    Retryable when another run committed first."""
    manifest = load.newest_manifest(store)
    lost, torn = load.missing(store, manifest)
    if lost:
        log.warning("tables_missing", days=sorted(lost), reason="re-reading all segments still in the bucket")
        kept = {day: made for day, made in manifest.days.items() if day not in lost}
        manifest = _from_the_start(msgspec.structs.replace(manifest, days=kept))
    if again:
        manifest = _from_the_start(manifest)
    _sweep()
    pending = load.pending(store, manifest.cursors)
    with _workers(config, store, environ, len(pending)) as workers:
        if torn:
            days = workers.renew(sorted(torn), {})
            if not pending:
                manifest = _commit(store, manifest, {}, days, [])
        done = 0
        for piece in _pieces(pending):
            manifest = _piece(config, store, workers, manifest, piece)
            done += len(piece)
            told(f"{done:,} of {len(pending):,} segments, {manifest.batches:,} batches in total")
    return manifest


def _piece(
    config: AggregatorConfig, store: ObjectStore, workers: "_Workers", manifest: Manifest, piece: Sequence[load.Pending]
) -> Manifest:
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY) as name:
        outcomes = workers.spill([one.key for one in piece if one.size <= MOST_BYTES], Path(name))
        outcomes += [_too_large(one) for one in piece if one.size > MOST_BYTES]
        fresh = ingest.spilled(Path(name))
        closed = [day for day in fresh if day in manifest.days and manifest.days[day].pruned]
        late = sum(ingest.lines(fresh.pop(day)) for day in closed)
        days = workers.renew(list(fresh), fresh)
    if late:
        log.warning("late_batches_dropped", batches=late, days=closed, reason="the minute tables have been pruned")
        manifest = msgspec.structs.replace(manifest, too_late=manifest.too_late + late)
    return _commit(store, manifest, load.advanced(piece), days, outcomes)


def _from_the_start(manifest: Manifest) -> Manifest:
    """Reset the cursors and everything counted along with them."""
    return msgspec.structs.replace(manifest, cursors={}, segments=0, unknown_records=0, quarantined_total=0, too_late=0)


def _pieces(pending: Sequence[load.Pending]) -> Iterator[Sequence[load.Pending]]:
    """Split into pieces bounded in segments and bytes."""
    piece: list[load.Pending] = []
    size = 0
    for one in pending:
        if piece and (len(piece) == PIECE_SEGMENTS or size + one.size > PIECE_BYTES):
            yield piece
            piece, size = [], 0
        piece.append(one)
        size += min(one.size, MOST_BYTES)
    if piece:
        yield piece


def _too_large(one: load.Pending) -> ingest.Outcome:
    """Quarantine without fetching: larger than any segment of an agent."""
    return ingest.Outcome(one.key, 0, 0, f"{one.key}: {one.size:,} bytes, the limit of a segment is {MOST_BYTES:,}")


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
    outcomes: Sequence[ingest.Outcome],
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
    )
    publish.commit(store, made)
    log.info("rolled_up", manifest=made.number, segments=segments, batches=made.batches - manifest.batches)
    for one in bad:
        log.warning("quarantined", key=one.key, reason=one.reason)
    return made


class _Workers:
    """Executes the work in this process, or in worker processes with their own connections."""

    def __init__(self, config: AggregatorConfig, store: ObjectStore, pool: Executor | None, count: int) -> None:
        self._config, self._store, self._pool, self._count = config, store, pool, count

    def spill(self, wanted: Sequence[str], folder: Path) -> list[ingest.Outcome]:
        """Read segments and write their rows into a folder."""
        if self._pool is None:
            return ingest.spill(self._store, self._config.rack, wanted, folder)
        rack = self._config.rack
        # each node's segments are spread over the list; small shares keep all processes busy to the end
        shares = list(ingest.chunks(wanted, 4 * self._count))
        started = [
            self._pool.submit(_spill, rack, list(share), folder / str(number)) for number, share in enumerate(shares)
        ]
        return [outcome for share in _all(started) for outcome in share]

    def renew(self, days: Sequence[str], fresh: Mapping[str, Mapping[str, Sequence[Path]]]) -> dict[str, Day]:
        """Rebuild the tables of some days."""
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


def _spill(rack: str, wanted: Sequence[str], folder: Path) -> list[ingest.Outcome]:
    return ingest.spill(_opened[0], rack, wanted, folder)


def _renew(day: str, fresh: Mapping[str, Sequence[Path]]) -> Day:
    return publish.renew_day(_opened[0], day, fresh)
