"""Reads every sensor with a timeout; one that fails or hangs loses its own fields only."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from agent.telemetry.sensors.reading import Collector, Reading, checked, merged
from shared.records import HostSample

COLLECTOR_DEADLINE_S = 10.0

T = TypeVar("T")


class Sensing:
    """``problems`` are those of sources read elsewhere. ``budget_bytes`` is the memory budget, for the sample."""

    def __init__(
        self, collectors: Sequence[Collector], *, budget_bytes: int, problems: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        self._collectors, self._problems, self.budget_bytes = collectors, problems, budget_bytes
        self._running: dict[str, asyncio.Future[Any]] = {}
        self._late: dict[str, asyncio.Future[Reading]] = {}

    @property
    def hangs(self) -> bool:
        """Whether a collector is still running, for example in a system call that does not return."""
        return bool(self._running)

    async def sample(self) -> HostSample:
        """Read the machine now; ``sources_failed`` names what could not be read."""
        readings = await asyncio.gather(*(self._read(c) for c in self._collectors))
        failed = {f"meter {name}": problem for name, problem in self._problems().items()}
        for reading in readings:
            failed.update(reading.failed)
        rest = HostSample(memory_budget_bytes=self.budget_bytes, sources_failed=failed)
        return merged(*(reading.sample for reading in readings), rest)

    async def poll(self) -> None:
        """Measure what changes from second to second."""
        polls = {asyncio.ensure_future(self._poll(c)) for c in self._collectors}
        await asyncio.wait(polls, timeout=COLLECTOR_DEADLINE_S)

    async def _read(self, collector: Collector) -> Reading:
        """A collector's reading. A late one is delivered with the next window, and no other reading is requested until
        then: its counts would be lost."""
        name = collector.name
        try:
            async with asyncio.timeout(COLLECTOR_DEADLINE_S):
                if (before := self._running.get(name)) is not None:
                    await asyncio.wait({before})
                if name not in self._late:
                    self._late[name] = self._begin(name, collector.read)
                found = checked(await asyncio.shield(self._late[name]))
        except TimeoutError:
            return Reading(HostSample(), {name: f"no answer within {COLLECTOR_DEADLINE_S:g} s"})
        except Exception as error:  # noqa: BLE001  # a sensor must never end the agent
            found = Reading(HostSample(), {name: type(error).__name__})
        self._late.pop(name, None)
        return found

    async def _poll(self, collector: Collector) -> None:
        if collector.name in self._running:
            return
        with contextlib.suppress(Exception):  # its failure is reported when it is read
            await asyncio.shield(self._begin(collector.name, collector.poll))

    def _begin(self, name: str, look: Callable[[], T]) -> "asyncio.Future[T]":
        work = asyncio.get_running_loop().run_in_executor(None, look)
        self._running[name] = work
        work.add_done_callback(lambda done: self._running.pop(name, None) if self._running.get(name) is done else None)
        return work
