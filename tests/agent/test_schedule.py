"""Scheduled jobs, also across clock changes."""

import asyncio
import datetime as dt
from typing import Any

import pytest

from agent import schedule
from agent.config import AgentConfig, Node
from agent.schedule import ClockWatch, Job


def test_clock_changes_are_detected_and_drift_is_not() -> None:
    mono, wall, jumps = [0.0], [1_000_000.0], list[float]()
    watch = ClockWatch(jumps.append, lambda: mono[0], lambda: wall[0])
    for _ in range(100):
        mono[0], wall[0] = mono[0] + 2.0, wall[0] + 2.01
        watch.look()
    assert jumps == []
    wall[0] -= 3600.0
    watch.look()
    watch.look()
    assert jumps == [pytest.approx(-3600.0)]
    wall[0] += 10 * 365 * 86400.0
    watch.look()
    assert len(jumps) == 2


async def test_jobs_continue_after_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1

    table = (Job("sample", 0.2, run),)
    scheduler = schedule.start(table)
    try:
        await asyncio.sleep(0.7)
        assert runs >= 2
        job: Any = scheduler.get_job("sample")
        # as if the clock had been an hour ahead when the next run was planned
        job.modify(next_run_time=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1))
        before = runs
        await asyncio.sleep(0.5)
        assert runs == before
        schedule.realign(scheduler, table)
        await asyncio.sleep(0.7)
        assert runs >= before + 2
    finally:
        scheduler.shutdown(wait=False)


async def test_after_a_clock_jump_jobs_keep_their_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None: ...

    config = AgentConfig(node=Node(id="n", rack="r"))
    table = schedule.jobs(config, sample=run, keep=run, push=run, follow=run)
    assert [(job.name, job.every_s, job.later_s) for job in table] == [
        ("sample", 60.0, 0.0),
        ("keep", 15.0, -7.5),
        ("push", 60.0, 2.0),
        ("follow", config.desired.follow_s, 0.0),
    ]
    scheduler = schedule.start(table)
    try:
        for _ in range(2):
            planned = {job.id: job.next_run_time for job in scheduler.get_jobs()}
            assert (planned["push"] - planned["sample"]).total_seconds() == pytest.approx(2.0, abs=0.1)
            assert (planned["sample"] - planned["keep"]).total_seconds() == pytest.approx(52.5, abs=0.1)
            schedule.realign(scheduler, table)
    finally:
        scheduler.shutdown(wait=False)


def test_a_failing_job_runs_again() -> None:
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        raise ValueError

    async def watched() -> None:
        task = asyncio.create_task(schedule.steadily(Job("x", 0.01, run)))
        async with asyncio.timeout(120):
            while runs <= 3:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    # not an async test: logging a traceback reads source files, which blocks briefly and may do so
    asyncio.run(watched())


async def test_a_job_that_is_cancelled_at_the_end_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    begun = asyncio.Event()

    async def waits() -> None:
        begun.set()
        await asyncio.sleep(3600)

    scheduler = schedule.start((schedule.Job("waits", 3600.0, waits, at_once=True),))
    async with asyncio.timeout(60):
        await begun.wait()
    scheduler.shutdown(wait=False)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert "raised an exception" not in caplog.text
