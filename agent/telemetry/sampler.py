"""One tick: every collector with a deadline, the window's counts and events, one batch into the spool. In between, what
the open window has counted is kept on disk: an agent that is killed loses a quarter of a window, not all of it."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from agent.telemetry.ledger import Ledger
from agent.telemetry.sensors.reading import Collector, Reading
from agent.telemetry.spool import Spool
from shared import __version__
from shared.batch import Batch
from shared.errors import RackError
from shared.logs import get_logger
from shared.records import EngineWindow, Event, HostSample, Record

COLLECTOR_DEADLINE_S = 10.0
REFRESH_S = 2.0
"""For so long loaders are waited for between two windows' ends."""
KEPT_BATCHES = 60
"""Windows held in memory while the disk refuses them."""

log = get_logger("agent.telemetry.sampler")
T = TypeVar("T")


class Sampler:
    """Closes windows. Everything that happened since the last tick is in exactly one batch. ``standing`` are records of
    every window, ``metered`` gives what outlets have counted away, ``once`` are those of the first."""

    def __init__(
        self,
        spool: Spool,
        ledger: Ledger,
        collectors: Sequence[Collector],
        *,
        engine_windows: Callable[[], Awaitable[list[EngineWindow]]],
        engine_refresh: Callable[[], Awaitable[None]],
        engine_so_far: Callable[[], list[EngineWindow]],
        standing: Callable[[], Sequence[Record]],
        metered: Callable[[], Sequence[Record]] = tuple,
        meter_problems: Callable[[], Mapping[str, str]] = dict,
        once: Sequence[Record] = (),
        on_sample: Callable[[HostSample], None] = lambda _: None,
        budget_bytes: int,
        boot_id: str,
        clock_skew_ms: Callable[[], int | None] = lambda: None,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spool = spool
        self._ledger = ledger
        self._collectors = collectors
        self._engine_windows = engine_windows
        self._engine_refresh = engine_refresh
        self._engine_so_far = engine_so_far
        self._standing = standing
        self._metered = metered
        self._meter_problems = meter_problems
        self._once = tuple(once)
        self._on_sample = on_sample
        self._running: dict[str, asyncio.Future[Any]] = {}
        self._late: dict[str, asyncio.Future[Reading]] = {}
        self.budget_bytes = budget_bytes
        self._boot_id = boot_id
        self._clock_skew_ms = clock_skew_ms
        self._wall_ms = wall_ms
        self._clock = clock
        self._events: list[Event] = []
        self._unspooled: list[tuple[int, int, tuple[Record, ...]]] = []
        self._began_ms = wall_ms()
        self._ticking = asyncio.Lock()
        self._at_work: set[asyncio.Task[None]] = set()
        self.lost_windows = 0
        self.disk_problem = ""
        self.last_sample: HostSample | None = None

    @property
    def held_windows(self) -> int:
        """How many closed windows are in memory because the disk refuses them; ``disk_problem`` says why."""
        return len(self._unspooled) if self.disk_problem else 0

    @property
    def hangs(self) -> bool:
        """Whether a collector is still at work, for example in a call of the system that does not come back."""
        return bool(self._running)

    def emit(self, event: Event) -> None:
        """An event for the next batch."""
        self._events.append(event)

    async def sample(self) -> HostSample:
        """Read the machine now; a source that fails or hangs is named and the others count."""
        readings = await asyncio.gather(*(self._read(c) for c in self._collectors))
        fields: dict[str, Any] = {}
        failed = {f"meter {name}": problem for name, problem in self._meter_problems().items()}
        for reading in readings:
            fields.update(reading.fields)
            failed.update(reading.failed)
        return HostSample(**fields, memory_budget_bytes=self.budget_bytes, sources_failed=failed)

    async def poll(self) -> None:
        """Look at what changes from second to second."""
        polls = {asyncio.ensure_future(self._poll(c)) for c in self._collectors}
        await asyncio.wait(polls, timeout=COLLECTOR_DEADLINE_S)

    async def tick(self) -> None:
        """Close the window. A disk that refuses keeps the window in memory for the next tick.

        Once begun it is finished, even when who asked for it is gone: half a tick would count its window twice.
        """
        await self._whole(self._tick())

    async def keep(self) -> None:
        """Put what the open window has counted so far on disk; sensors and outlets are read at its end only. A tick
        that is at work, or windows that the disk has refused, come first."""
        if self._ticking.locked() or self._unspooled:
            return
        # a loader that does not answer must not keep the window from ending
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFRESH_S):
                await self._engine_refresh()
        if not self._ticking.locked():
            await self._whole(self._keep())

    async def _whole(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)
        await asyncio.shield(task)

    async def _tick(self) -> None:
        async with self._ticking:
            host = await self.sample()
            self.last_sample = host
            self._on_sample(host)
            windows = await self._engine_windows()
            # no await from here to the end of the window: what is drained is in this batch and in no other
            served, events = self._ledger.drain(), self._events
            self._events = []
            ended = self._wall_ms()
            # a clock that was set back must not make a window that ends before it begins
            began, self._began_ms = min(self._began_ms, ended), ended
            records: tuple[Record, ...] = (
                *self._once,
                *served,
                *windows,
                *self._standing(),
                *self._metered(),
                host,
                *events,
            )
            self._once = ()
            self._unspooled.append((began, self._began_ms, records))
            self.lost_windows += max(0, len(self._unspooled) - KEPT_BATCHES)
            self._unspooled = self._unspooled[-KEPT_BATCHES:]
            await self._spool_all()

    async def _keep(self) -> None:
        async with self._ticking:
            counted: list[Record] = [*self._ledger.so_far(), *self._engine_so_far()]
            records: tuple[Record, ...] = (*self._once, *counted, *self._standing(), *self._events)
            ended = self._wall_ms()
            batch = self.batch(self._spool.next_seq(), records, min(self._began_ms, ended), ended)
            await self._written(self._spool.keep, batch)

    def batch(self, seq: int, records: tuple[Record, ...], began_ms: int, ended_ms: int) -> Batch:
        """The envelope around some records."""
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
        """A copy of events on their own."""
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

    async def _read(self, collector: Collector) -> Reading:
        """What a collector read. One that is late is asked for its answer at the next window, not for another: what it
        has counted would be lost."""
        name = collector.name
        try:
            async with asyncio.timeout(COLLECTOR_DEADLINE_S):
                if (before := self._running.get(name)) is not None:
                    await asyncio.wait({before})
                if name not in self._late:
                    self._late[name] = self._begin(name, collector.read)
                found = await asyncio.shield(self._late[name])
        except TimeoutError:
            return Reading({}, {name: f"no answer within {COLLECTOR_DEADLINE_S:g} s"})
        except Exception as error:  # noqa: BLE001  # a sensor must never end the agent
            found = Reading({}, {name: type(error).__name__})
        self._late.pop(name, None)
        return found

    async def _poll(self, collector: Collector) -> None:
        if collector.name in self._running:
            return
        with contextlib.suppress(Exception):  # it says so itself when it is read
            await asyncio.shield(self._begin(collector.name, collector.poll))

    def _begin(self, name: str, look: Callable[[], T]) -> "asyncio.Future[T]":
        work = asyncio.get_running_loop().run_in_executor(None, look)
        self._running[name] = work
        work.add_done_callback(lambda done: self._running.pop(name, None) if self._running.get(name) is done else None)
        return work
