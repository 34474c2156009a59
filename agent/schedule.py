"""The agent's periodic jobs and their schedule, on one page.

Most run by the wall clock. Jobs that others depend on from second to second run by the event loop's monotonic clock,
which never jumps.
"""

import asyncio
import contextlib
import datetime as dt
import functools
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from agent.config import AgentConfig
from shared.logs import get_logger

MAINTAIN_S = 1.0
"""How often the pool maintains its resident models."""
JUMP_S = 1.0
"""An NTP-disciplined wall clock never moves by more between two checks."""

log = get_logger("agent.schedule")


class Job(NamedTuple):
    """Runs every ``every_s`` seconds; a run that is late or still running is skipped, never doubled. The first run is
    after that time plus ``later_s``, or at once."""

    name: str
    every_s: float
    run: Callable[[], Awaitable[object]]
    at_once: bool = False
    later_s: float = 0.0


def jobs(
    config: AgentConfig,
    *,
    sample: Callable[[], Awaitable[object]],
    keep: Callable[[], Awaitable[object]],
    push: Callable[[], Awaitable[object]],
    follow: Callable[[], Awaitable[object]],
) -> tuple[Job, ...]:
    """The agent's jobs."""
    window_s = config.telemetry.sample_s
    return (
        Job("sample", window_s, sample),
        # between two windows' ends, never on one
        Job("keep", window_s / 4, keep, later_s=-window_s / 8),
        # shortly after a window's end, so that the upload includes it
        Job("push", config.telemetry.upload_s, push, later_s=min(2.0, config.telemetry.upload_s / 4)),
        Job("follow", config.desired.follow_s, follow, at_once=True),
    )


def start(table: tuple[Job, ...]) -> AsyncIOScheduler:
    """Start a scheduler; the caller shuts it down."""
    scheduler = AsyncIOScheduler(timezone=dt.UTC)
    now = dt.datetime.now(dt.UTC)
    for job in table:
        scheduler.add_job(
            _quietly_cancelled(job.run),
            IntervalTrigger(seconds=job.every_s, timezone=dt.UTC),
            id=job.name,
            max_instances=1,
            coalesce=True,
            misfire_grace_time=None,
            next_run_time=now + dt.timedelta(seconds=0 if job.at_once else job.every_s + job.later_s),
        )
    scheduler.start()
    return scheduler


def _quietly_cancelled(run: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
    """At the end of the program what runs is cancelled, which the scheduler would log as a failure."""

    @functools.wraps(run)
    async def job() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await run()

    return job


def realign(scheduler: AsyncIOScheduler, table: tuple[Job, ...]) -> None:
    """Reschedule every job from now: the wall clock was set, so the next runs are hours away or long past."""
    now = dt.datetime.now(dt.UTC)
    for job in table:
        first = now + dt.timedelta(seconds=job.every_s + job.later_s)
        trigger = IntervalTrigger(seconds=job.every_s, start_date=first, timezone=dt.UTC)
        scheduler.reschedule_job(job.name, trigger=trigger)


class ClockWatch:
    """Detects jumps of the wall clock; ``on_jump`` receives the difference in seconds."""

    def __init__(
        self,
        on_jump: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._on_jump, self._clock, self._wall = on_jump, clock, wall
        self._offset_s = wall() - clock()

    def look(self) -> None:
        """Call this every few seconds."""
        offset_s = self._wall() - self._clock()
        jump_s, self._offset_s = offset_s - self._offset_s, offset_s
        if abs(jump_s) > JUMP_S:
            self._on_jump(jump_s)


class Timetable:
    """The jobs that run by the wall clock; rescheduled when it is set. ``on_jump`` receives the seconds."""

    def __init__(self, on_jump: Callable[[float], None]) -> None:
        self._on_jump = on_jump
        self._watch = ClockWatch(self._jumped)
        self._jobs: tuple[Job, ...] = ()
        self._scheduler: AsyncIOScheduler | None = None

    def start(self, table: tuple[Job, ...]) -> None:
        """Run these from now on."""
        self._jobs, self._scheduler = table, start(table)

    def retime(self, name: str, every_s: float) -> None:
        """Run a job at another interval from now on."""
        before, self._jobs = (
            self._jobs,
            tuple(job._replace(every_s=every_s) if job.name == name else job for job in self._jobs),
        )
        if self._scheduler is not None and before != self._jobs:
            realign(self._scheduler, tuple(job for job in self._jobs if job not in before))

    def look(self) -> None:
        """Call this every few seconds."""
        self._watch.look()

    def shutdown(self) -> None:
        """Start no further run."""
        if self._scheduler is not None:
            self._scheduler.shutdown(wait=False)

    def _jumped(self, jump_s: float) -> None:
        self._on_jump(jump_s)
        if self._scheduler is not None:
            realign(self._scheduler, self._jobs)


async def steadily(job: Job) -> None:
    """Run one job by the loop's clock until cancelled. A failure is logged, and the job runs again."""
    while True:
        try:
            await job.run()
        except Exception:
            log.error("job_failed", job=job.name, exc_info=True)
        await asyncio.sleep(job.every_s)
