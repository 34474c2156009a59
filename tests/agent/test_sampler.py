"""Windows: nothing is lost when a sensor is slow, and nobody waits for one that hangs."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import sampler as sampling
from agent.collectors.inference import Ledger
from agent.collectors.reading import Reading, Source
from agent.sampler import Sampler
from agent.spool import Spool


class Slow:
    """A collector whose calls go on until they are let go; it counts what it has given away."""

    name = "slow"

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.reads = self.polls = 0

    def poll(self) -> None:
        self.polls += 1
        self.go.wait(20)

    def read(self) -> Reading:
        self.reads += 1
        number = self.reads
        self.go.wait(20)
        return Reading({"swap_in_bytes": number}, {})

    def sources(self) -> list[Source]:
        return []


class Broken(Slow):
    name = "broken"

    def poll(self) -> None:
        raise ValueError

    def read(self) -> Reading:
        raise ValueError


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    one = Spool(tmp_path, node="n", rack="r", hardware="h", max_bytes=1 << 20, max_batches=1000)
    yield one
    one.close(clean=True)


def sampler(spool: Spool, *collectors: Any) -> Sampler:
    async def windows() -> list[Any]:
        return []

    return Sampler(
        spool, Ledger(), collectors, engine_windows=windows, standing=lambda: (), budget_bytes=1, boot_id="b"
    )


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.01)


async def test_a_window_that_meets_a_look_in_between_waits_for_it(spool: Spool) -> None:
    slow = Slow()
    one = sampler(spool, slow)
    slow.go.clear()
    poll = asyncio.create_task(one.poll())
    await until(lambda: slow.polls == 1)
    window = asyncio.create_task(one.sample())
    await asyncio.sleep(0.05)
    assert slow.reads == 0
    slow.go.set()
    sample = await window
    await poll
    assert (sample.swap_in_bytes, sample.sources_failed) == (1, {})


async def test_a_reading_that_comes_late_is_the_next_window_s(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "COLLECTOR_DEADLINE_S", 0.1)
    slow = Slow()
    one = sampler(spool, slow, Broken())
    slow.go.clear()
    sample = await one.sample()
    assert sample.swap_in_bytes is None
    assert sample.sources_failed == {"slow": "no answer within 0.1 s", "broken": "ValueError"}
    assert one.hangs
    await one.poll()
    assert slow.polls == 0, "one that hangs is not asked again"
    slow.go.set()
    await until(lambda: not one.hangs)
    assert (await one.sample()).swap_in_bytes == 1, "what it had counted is not lost"
    assert (await one.sample()).swap_in_bytes == 2
