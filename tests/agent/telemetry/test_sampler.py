"""Windows: a slow sensor loses nothing, and a hanging one blocks nothing."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.telemetry import sampler as sampling
from agent.telemetry import sensing as reading
from agent.telemetry.ledger import Answered, Ledger
from agent.telemetry.sampler import Sampler, Sources
from agent.telemetry.sensing import Sensing
from agent.telemetry.sensors.reading import Reading, Source
from agent.telemetry.spool import Spool
from shared.batch import MAX_RECORDS, Batch, decode, seal, unseal
from shared.records import EngineWindow, Hardware, HostSample, OutletReading, PeerDown, Record, Resident, Served


class Slow:
    """A collector whose calls block until released; it counts the readings it has returned."""

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
        return Reading(HostSample(swap_in_bytes=number), {})

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


async def nothing() -> None: ...


def sensing(*collectors: Any) -> Sensing:
    return Sensing(collectors, budget_bytes=1)


def sampler(spool: Spool, *collectors: Any) -> Sampler:
    async def windows() -> list[Any]:
        return []

    return Sampler(*(spool, Ledger(), sensing(*collectors), Sources(windows, nothing, list, lambda: ())), boot_id="b")


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not what():
            await asyncio.sleep(0.01)


async def test_closing_a_window_waits_for_a_running_poll(spool: Spool) -> None:
    slow = Slow()
    one = sensing(slow)
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


async def test_a_late_reading_goes_to_the_next_window(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "COLLECTOR_DEADLINE_S", 0.1)
    slow = Slow()
    one = sensing(slow, Broken())
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


def answered(tokens: int) -> Answered:
    return Answered(model="m", outcome="ok", prompt_tok=3, completion_tok=tokens, total_us=5)


class Counted(Sampler):
    """With an engine that has produced 10 tokens, a resident model and an outlet that returns its reading once."""

    def __init__(self, spool: Spool, refresh: Callable[[], Awaitable[None]] = nothing) -> None:
        self.ledger = Ledger()
        self.readings = [OutletReading(meter="o", nodes=("n",), power_mw=1, power_max_mw=1, energy_mj=1, covered_us=1)]

        def so_far() -> list[EngineWindow]:
            return [EngineWindow(model="m", version="v", decode_tok=10)]

        async def windows() -> list[EngineWindow]:
            return so_far()

        resident = Resident(model="m", version="v", state="ready")
        sources = Sources(windows, refresh, so_far, lambda: (resident,), metered=self._take)
        super().__init__(spool, self.ledger, sensing(), sources, boot_id="b")

    def _take(self) -> list[OutletReading]:
        taken, self.readings = self.readings, []
        return taken


def kinds(records: tuple[Record, ...]) -> list[type]:
    return [type(one) for one in records]


def files(spool: Spool) -> dict[str, Batch]:
    return {path.name: decode(path.read_bytes()) for path in spool._folder.glob("e*")}


async def test_an_open_window_is_persisted_and_counted_once(spool: Spool) -> None:
    one = Counted(spool)
    one.ledger.record(answered(4))
    one.emit(PeerDown(t_ms=1, peer="p", last_seen_ms=0))
    await one.keep()
    ((name, kept),) = files(spool).items()
    assert (name, kept.seq) == ("e00000001-0000000001.open", 1)
    assert kinds(kept.records) == [Served, EngineWindow, Resident, PeerDown]
    assert await asyncio.to_thread(spool.waiting) == [], "nobody sends a window that is open"

    one.ledger.record(answered(5))
    await one.keep()
    await one.tick()
    ((name, sealed),) = files(spool).items()
    assert (name, sealed.t_start_ms) == ("e00000001-0000000001.batch", kept.t_start_ms)
    assert kinds(sealed.records) == [Served, EngineWindow, Resident, OutletReading, HostSample, PeerDown]
    (served,) = [r for r in sealed.records if isinstance(r, Served)]
    assert (served.requests, served.completion_tok) == (2, 9)

    await one.keep()
    following = files(spool)["e00000001-0000000002.open"]
    assert kinds(following.records) == [EngineWindow, Resident], "the last window's is not in it"
    assert following.t_start_ms == sealed.t_end_ms


DAY = sampling.DAY_MS


@pytest.mark.parametrize(
    ("told_ms", "began_ms", "due"),
    [
        (None, 0, True),
        (0, 60_000, False),
        (0, DAY - 1, False),
        (DAY - 1, DAY, True),
        (3 * DAY, 3 * DAY, False),
        (3 * DAY, 9 * DAY + 5, True),
        (3 * DAY, 2 * DAY, True),
    ],
)
def test_a_day_is_new_in_its_first_window(told_ms: int | None, began_ms: int, due: bool) -> None:
    assert sampling.is_new_day(told_ms, began_ms) is due


async def test_what_the_machine_is_is_said_once_in_each_day(spool: Spool) -> None:
    """A window over midnight is of the day before; the first that lies in a day says it, and its kept part, too."""

    async def windows() -> list[Any]:
        return []

    machine, now = Hardware(model="Mac16,11", chip="Apple M4 Pro", memory_bytes=1), [DAY - 90_000]
    one = Sampler(
        *(spool, Ledger(), sensing(), Sources(windows, nothing, list, lambda: ())),
        boot_id="b",
        daily=(machine,),
        wall_ms=lambda: now[0],
    )
    said: list[tuple[int, bool]] = []
    for at_ms in (DAY - 30_000, DAY + 30_000, DAY + 90_000, DAY + 150_000, 3 * DAY, 3 * DAY + 60_000):
        now[0] = at_ms
        await one.keep()
        (open_window,) = [batch for name, batch in files(spool).items() if name.endswith(".open")]
        await one.tick()
        batch = max(files(spool).values(), key=lambda found: found.seq)
        said.append((batch.t_start_ms, machine in batch.records))
        assert (machine in open_window.records) is said[-1][1]
    assert [t_ms for t_ms, is_said in said if is_said] == [DAY - 90_000, DAY + 30_000, 3 * DAY]


class Misspelt(Slow):
    name = "misspelt"

    def read(self) -> Reading:
        return Reading({"fan_rpmm": 1}, {})  # type: ignore[arg-type]


class Mistyped(Slow):
    name = "mistyped"

    def read(self) -> Reading:
        return Reading(HostSample(swap_out_bytes="many"), {})  # type: ignore[arg-type]


async def test_a_wrong_field_or_type_loses_its_own_source_only() -> None:
    sample = await sensing(Misspelt(), Slow(), Mistyped()).sample()
    assert sample.swap_in_bytes == 1
    assert sample.swap_out_bytes is None
    assert set(sample.sources_failed) == {"misspelt", "mistyped"}


async def test_a_closing_window_is_not_also_persisted(spool: Spool) -> None:
    slow = Slow()
    one = sampler(spool, slow)
    slow.go.clear()
    closing = asyncio.create_task(one.tick())
    await until(lambda: slow.reads == 1)
    await one.keep()
    assert files(spool) == {}
    slow.go.set()
    await closing
    assert list(files(spool)) == ["e00000001-0000000001.batch"]


async def test_an_unresponsive_loader_does_not_delay_a_window(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs() -> None:
        await asyncio.sleep(60)

    one = Counted(spool, hangs)
    one.ledger.record(answered(4))
    keeping = asyncio.create_task(one.keep())
    await asyncio.sleep(0.01)
    await one.tick()
    assert list(files(spool)) == ["e00000001-0000000001.batch"], "closed meanwhile"
    keeping.cancel()
    monkeypatch.setattr(sampling, "REFRESH_S", 0.05)
    await one.keep()
    assert "e00000001-0000000002.open" in files(spool), "what is known without it is kept"


async def test_an_unreadable_meter_is_named_in_the_window() -> None:
    one = Sensing((), budget_bytes=1, problems=lambda: {"shelf": "refuses the password"})
    assert (await one.sample()).sources_failed == {"meter shelf": "refuses the password"}


async def test_a_window_of_many_labels_becomes_several_batches(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_max_bytes", 1 << 30)
    one, long = Counted(spool), "x" * 40
    labels = [f"{long}{n}" for n in range(MAX_RECORDS + 100)]
    for label in labels:
        one.ledger.record(Answered(model="m", outcome="ok", key_id=label, total_us=5))
    one.emit(PeerDown(t_ms=1, peer="p", last_seen_ms=0))
    await one.keep()
    (kept,) = files(spool).values()
    assert len(kept.records) == sampling.MOST_RECORDS
    assert {EngineWindow, Resident, PeerDown} < set(kinds(kept.records))
    await one.tick()
    made = sorted(files(spool).values(), key=lambda batch: batch.seq)
    assert [batch.seq for batch in made] == list(range(1, len(made) + 1))
    assert len({(batch.t_start_ms, batch.t_end_ms) for batch in made}) == 1
    records = [record for batch in made for record in batch.records]
    assert sorted(r.key_id for r in records if isinstance(r, Served)) == sorted(labels)
    assert sum(not isinstance(r, Served) for r in records) == 5
    for waiting in await asyncio.to_thread(spool.waiting):
        assert await asyncio.to_thread(spool.read, waiting) is not None, "nothing is put aside"
    for batch in made:
        assert unseal(seal([batch])) == [batch], "however alike its records are"


async def test_a_disk_error_loses_no_counts(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, body: bytes, *, synced: bool = True) -> None:
        raise OSError(28, "No space left on device")

    one = Counted(spool)
    one.ledger.record(answered(4))
    with monkeypatch.context() as patched:
        patched.setattr("shared.durable.write_whole", full)
        await one.keep()
        await one.tick()
        assert (one.held_windows, one.disk_problem[-23:]) == (1, "No space left on device")
        await one.keep()
        assert files(spool) == {}
    one.ledger.record(answered(5))
    await one.keep()
    assert files(spool) == {}, "the refused window comes first, under this number"
    await one.tick()
    first, second = files(spool).values() if len(files(spool)) == 2 else pytest.fail("two windows")
    assert (one.held_windows, one.disk_problem) == (0, "")
    tokens = {b.seq: [r.completion_tok for r in b.records if isinstance(r, Served)] for b in (first, second)}
    assert tokens == {1: [4], 2: [5]}
