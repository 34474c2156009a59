"""Closes windows: readings, counts and events of one window become one batch in the spool. In between, the open
window's counts are written to disk: an agent that is killed loses a quarter of a window, not all of it."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from agent.tasks import Tasks
from agent.telemetry.ledger import Ledger
from agent.telemetry.sensing import Sensing
from agent.telemetry.spool import Spool
from shared import __version__
from shared.batch import Batch
from shared.errors import RackError
from shared.logs import get_logger
from shared.records import EngineWindow, Event, HostSample, Record

DAY_MS = 86_400_000
REFRESH_S = 2.0
"""Timeout for the loaders' reports between two windows' ends."""
KEPT_BATCHES = 60
"""Windows held in memory while they cannot be written to disk."""
MOST_RECORDS = 1_000
"""Of one batch: more become further batches of the same window. Below what readers accept, in number and bytes."""

log = get_logger("agent.sampler")


def is_new_day(told_ms: int | None, began_ms: int) -> bool:
    """Whether no window of the UTC day that this one begins in had the daily records; the last that had them began at
    ``told_ms``, None for none yet. Reports are of whole days: each has its own, also where an agent runs for months. A
    clock that is set to another day is one more."""
    return told_ms is None or told_ms // DAY_MS != began_ms // DAY_MS


class Sources(NamedTuple):
    """Sources of records besides sensors and requests. ``windows`` takes the loaders' counts, which resets ``so_far``;
    ``standing`` are records of every window, ``metered`` drains the meters."""

    windows: Callable[[], Awaitable[list[EngineWindow]]]
    refresh: Callable[[], Awaitable[None]]
    so_far: Callable[[], list[EngineWindow]]
    standing: Callable[[], Sequence[Record]]
    metered: Callable[[], Sequence[Record]] = tuple
    on_sample: Callable[[HostSample], None] = lambda _: None


class Sampler:
    """Everything that happened since the last tick is in exactly one batch. ``daily`` are records of the first
    batch, and of the first one of each UTC day."""

    def __init__(
        self,
        spool: Spool,
        ledger: Ledger,
        sensing: Sensing,
        sources: Sources,
        *,
        boot_id: str,
        daily: Sequence[Record] = (),
        clock_skew_ms: Callable[[], int | None] = lambda: None,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spool, self._ledger, self._sensing, self._sources = spool, ledger, sensing, sources
        self._daily = tuple(daily)
        self._told_ms: int | None = None
        self._boot_id, self._clock_skew_ms = boot_id, clock_skew_ms
        self._wall_ms, self._clock = wall_ms, clock
        self._events: list[Event] = []
        self._unspooled: list[tuple[int, int, tuple[Record, ...]]] = []
        self._began_ms = wall_ms()
        self._ticking = asyncio.Lock()
        self._tasks = Tasks()
        self.lost_windows = 0
        self.disk_problem = ""
        self.last_sample: HostSample | None = None

    @property
    def held_windows(self) -> int:
        """How many closed windows are in memory because the disk failed; ``disk_problem`` says why."""
        return len(self._unspooled) if self.disk_problem else 0

    def emit(self, event: Event) -> None:
        """An event for the next batch."""
        self._events.append(event)

    async def tick(self) -> None:
        """Close the window. If the disk fails, the window stays in memory for the next tick. Once begun it is
        completed, even when the caller is cancelled: half a tick would count its window twice."""
        await self._tasks.finish(self._tick())

    async def keep(self) -> None:
        """Write the open window's counts so far to disk; sensors and meters are read at its end only. Skipped while a
        tick runs or closed windows could not be written."""
        if self._ticking.locked() or self._unspooled:
            return
        # an unresponsive loader must not delay the window's end
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFRESH_S):
                await self._sources.refresh()
        if not self._ticking.locked():
            await self._tasks.finish(self._keep())

    async def _tick(self) -> None:
        async with self._ticking:
            host = self.last_sample = await self._sensing.sample()
            self._sources.on_sample(host)
            windows = await self._sources.windows()
            # no await from here to the end of the window: what is drained is in this batch and in no other
            served, events = self._ledger.drain(), self._events
            self._events = []
            ended = self._wall_ms()
            # when the clock was set back, the window must still not end before it begins
            began, self._began_ms = min(self._began_ms, ended), ended
            standing = (*self._sources.standing(), *self._sources.metered())
            records: tuple[Record, ...] = (*self._due(began), *served, *windows, *standing, host, *events)
            self._told_ms = began if is_new_day(self._told_ms, began) else self._told_ms
            parts = range(0, len(records), MOST_RECORDS)
            self._unspooled += [(began, ended, records[at : at + MOST_RECORDS]) for at in parts]
            self.lost_windows += max(0, len(self._unspooled) - KEPT_BATCHES)
            self._unspooled = self._unspooled[-KEPT_BATCHES:]
            await self._spool_all()

    async def _keep(self) -> None:
        async with self._ticking:
            ended = self._wall_ms()
            began = min(self._began_ms, ended)
            others: list[Record] = [*self._sources.so_far(), *self._sources.standing(), *self._events]
            daily = self._due(began)
            # one batch, that an agent may be killed with: of more labels than fit the first ones
            served = self._ledger.so_far()[: max(0, MOST_RECORDS - len(daily) - len(others))]
            records = (*daily, *served, *others)[:MOST_RECORDS]
            batch = self.batch(self._spool.next_seq(), records, began, ended)
            await self._written(self._spool.keep, batch)

    def _due(self, began_ms: int) -> tuple[Record, ...]:
        return self._daily if is_new_day(self._told_ms, began_ms) else ()

    def batch(self, seq: int, records: tuple[Record, ...], began_ms: int, ended_ms: int) -> Batch:
        """A batch of some records."""
        identity = self._spool.identity
        return Batch(
            rack=identity.rack,
            node=identity.node,
            incarnation=identity.incarnation or 0,
            epoch=identity.epoch,
            seq=seq,
            t_start_ms=began_ms,
            t_end_ms=ended_ms,
            mono_ms=int(self._clock() * 1000),
            boot_id=self._boot_id,
            clock_skew_ms=self._clock_skew_ms(),
            agent_version=__version__,
            dropped_batches=self._spool.dropped + self.lost_windows,
            records=records,
        )

    def urgent_batch(self, seq: int, events: tuple[Event, ...]) -> Batch:
        """A batch with copies of events alone."""
        now = self._wall_ms()
        return self.batch(seq, events, now, now)

    async def _written(self, write: Callable[[Batch], None], batch: Batch) -> bool:
        try:
            await asyncio.to_thread(write, batch)
        except RackError as error:
            self.disk_problem = error.message
            log.error("spool_failed", code=error.code, reason=error.message, held=self.held_windows)
            return False
        self.disk_problem = ""
        return True

    async def _spool_all(self) -> None:
        while self._unspooled:
            began, ended, records = self._unspooled[0]
            batch = self.batch(self._spool.next_seq(), records, began, ended)
            if not await self._written(self._spool.append, batch):
                return
            self._unspooled.pop(0)
            log.info("window_closed", seq=batch.seq, records=len(records))
