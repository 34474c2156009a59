"""When a node times its models, with real loaders (fake engine): in idle time only, kept on disk, put to use."""

import asyncio
import json
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import AgentConfig, Live, Model
from agent.files.modelstore import ModelStore
from agent.models import idleness
from agent.models.figures import Figures
from agent.models.idleness import Standing, to_time
from agent.models.loaders import Loaders
from agent.models.pool import Pool
from agent.models.slot import Loaded
from agent.process import expectation
from agent.process.loader_process import LoaderProcess
from agent.wire.frames import Generate, Message, Tokens
from shared import chips
from shared.records import Event, ModelTimed

STEP_S, ROW_S, TPS = 0.0005, 0.0001, 200_000.0


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No moment of quiet has to pass first."""
    monkeypatch.setattr(idleness, "QUIET_S", 0.0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What loaders are told about timing, in order."""
    found: list[bool] = []
    plain = LoaderProcess.calibrate

    def calibrate(self: LoaderProcess, *, go: bool) -> None:
        found.append(go)
        plain(self, go=go)

    monkeypatch.setattr(LoaderProcess, "calibrate", calibrate)
    return found


def fake(name: str = "a", **more: Any) -> dict[str, Any]:
    speed = {"fake_step_s": STEP_S, "fake_row_s": ROW_S, "fake_prefill_tps": TPS}
    base = {"name": name, "engine": "fake", "path": f"weights of {name}", "need_bytes": 10, "preload": False}
    return {**base, **speed, **more}


@asynccontextmanager
async def running(
    folder: Path, *models: dict[str, Any], calibrate: bool = True
) -> AsyncIterator[tuple[Pool, list[Event]]]:
    config = {
        "node": {"id": "n1", "rack": "r"},
        "store": {"path": "x"},
        "models": list(models),
        "loader": {"threads": 1, "calibrate": calibrate},
        "memory": {"min_residency_s": 0.0},
    }
    events: list[Event] = []
    store = await asyncio.to_thread(ModelStore, folder / "models.json", folder / "models")
    live = Live(msgspec.convert(config, AgentConfig))
    loaders = Loaders(live, os.environ, prompts=folder / "prompts", on_report=lambda model, reported: None)
    pool = Pool(
        *(live, store, loaders),
        budget_bytes=10**9,
        emit=events.append,
        carried_by_peer=lambda _: False,
        figures=folder / "step_times.json",
    )
    try:
        for model in models:
            await pool.orders.load(model["name"])
        yield pool, events
    finally:
        await pool.stop(0.0)


def timed(events: list[Event]) -> list[ModelTimed]:
    return [event for event in events if isinstance(event, ModelTimed)]


async def until(pool: Pool, done: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Maintain the pool, oftener than a daemon does, until something is so."""
    async with asyncio.timeout(limit_s):
        while not done():
            await pool.maintain()
            await asyncio.sleep(0.02)


async def timed_during_a_change(pool: Pool, change: "asyncio.Task[Any]", told: list[bool]) -> list[str]:
    """Models that were changing when some loader was left to time its steps; the change is seen at least once."""
    found, seen = list[str](), 0
    while not change.done():
        await pool.maintain()
        changing = [one.model for one in pool.inventory.actual() if one.changing]
        seen += bool(changing)
        found += changing if told[-1:] == [True] else []
        await asyncio.sleep(0.02)
    assert seen
    return found


async def answer(pool: Pool, model: str = "a") -> str:
    request = Generate(id=0, model=model, messages=(Message(role="user", content="hello"),), max_tokens=3)
    with pool.lease(model) as lease:
        return "".join([one.text async for one in lease.generate(request) if isinstance(one, Tokens)])


async def test_an_idle_model_is_timed_and_its_figures_are_used_and_kept(tmp_path: Path) -> None:
    async with running(tmp_path, fake(), fake("b", fake_step_s=2 * STEP_S)) as (pool, events):
        said = await answer(pool)
        before = {one.model: one.steps for one in await pool.inventory.windows()}
        await until(pool, lambda: len(timed(events)) == 2)
        assert {one.model: one.steps for one in await pool.inventory.windows()} == dict.fromkeys(before, 0)
        assert await answer(pool) == said
        first = next(one for one in timed(events) if one.model == "a")
        assert first.rows == (1, 4, 8)
        assert first.step_us == pytest.approx([(STEP_S + ROW_S * r) * 1e6 for r in first.rows], abs=2)
        assert first.prompt_us == pytest.approx(1_000 / TPS * 1e6, rel=0.01)
        assert (2, 8) in set(zip(first.verify_rows, first.verify_tok, strict=True))
        view = next(one for one in pool.views() if one.name == "b")
        # nobody asked it for anything, and still a gateway knows how long it would take
        assert view.prefill_tps == pytest.approx(TPS, rel=0.01)
        assert view.gap_us is not None
        assert view.crowd is not None
        for rows in (1, 8):
            wanted_us = (2 * STEP_S + ROW_S * rows) * 1e6
            assert view.gap_us * (1 + view.crowd * rows / 8) == pytest.approx(wanted_us, rel=0.02)
        shown = pool.inventory.status()[0]["figures"]
        assert isinstance(shown, dict)
        assert list(shown["step_us"]) == ["1", "4", "8"]
    kept = tmp_path / "step_times.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert "hello" not in kept.read_text()


async def test_figures_survive_a_restart_and_belong_to_one_version_and_its_settings(
    tmp_path: Path, told: list[bool]
) -> None:
    async with running(tmp_path, fake()) as (pool, events):
        await until(pool, lambda: bool(timed(events)))
        (measured,) = timed(events)
    told.clear()
    async with running(tmp_path, fake()) as (pool, events):
        await until(pool, lambda: bool(timed(events)))
        assert timed(events)[0].measured_ms == measured.measured_ms
        assert True not in told
    for other in ({"path": "other weights"}, {"rows": 4}, {"fake_step_s": 3 * STEP_S}):
        async with running(tmp_path, fake(**other)) as (pool, events):
            await until(pool, lambda events=events: bool(timed(events)))  # type: ignore[misc]
            assert timed(events)[0].measured_ms > measured.measured_ms


LINE = {"rows": 1, "base_us": 900.0, "token_us": 0.1}
ROW = {**LINE, "points": [[64, 906.4], [1_000, 1_000.0]]}
TIMES: dict[str, Any] = {"prefill": [0.0, 5.0, 0.0], "decode": [ROW]}


async def kept_with(folder: Path, times: dict[str, Any]) -> dict[str, Any]:
    """A model whose kept figures, of 1970, are these."""
    kept, quick = folder / "step_times.json", fake(fake_step_s=1e-5, fake_row_s=0.0, fake_prefill_tps=1e6)
    async with running(folder, quick) as (pool, events):
        await until(pool, lambda: bool(timed(events)))
    file = json.loads(kept.read_text())
    ((key, known),) = file["known"].items()
    kept.write_text(json.dumps({**file, "known": {key: {**known, "measured_ms": 1, "times": times}}}))
    return quick


async def test_figures_of_a_former_version_are_used_until_the_model_is_timed_again(tmp_path: Path) -> None:
    """It knew a line per row count, which is wrong by a quarter at some lengths."""
    quick = await kept_with(tmp_path, {**TIMES, "decode": [LINE], "spread_ppm": 0})
    async with running(tmp_path, quick) as (pool, events):
        await until(pool, lambda: len(timed(events)) == 2)
        former, now = timed(events)
        assert (former.measured_ms, former.step_us) == (1, (1_000,))
        assert now.measured_ms > 1
    quick = await kept_with(tmp_path, TIMES)
    async with running(tmp_path, quick) as (pool, events):
        for _ in range(20):
            await pool.maintain()
        assert [one.measured_ms for one in timed(events)] == [1], "figures with points stay"


@pytest.mark.parametrize(
    "wrong",
    [
        {"decode": []},
        {"decode": [ROW, ROW]},
        {"decode": [{**ROW, "rows": 8}, ROW]},
        {"decode": [{**ROW, "rows": 0}]},
        {"decode": [{**ROW, "base_us": 1e308, "token_us": 1e308}]},
        {"decode": [{**ROW, "base_us": -9.0}]},
        {"decode": [{**ROW, "points": [[1_000, 906.4], [64, 1_000.0]]}]},
        {"prefill": [1e308, 1e308, 1e308]},
        {"verify": [{"rows": 1, "tokens": 2, "us": 1e300}]},
        {"took_us": 1 << 63},
        {"spread_ppm": -1},
    ],
)
async def test_impossible_figures_of_a_file_are_measured_again(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """With one of them in use each view of the model would raise, and so each request fail."""
    quick = await kept_with(tmp_path, {**TIMES, **wrong})
    async with running(tmp_path, quick) as (pool, events):
        await until(pool, lambda: bool(timed(events)))
        assert timed(events)[0].measured_ms > 1
        assert pool.views()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": 99}', b'{"format": 1, "known": {"x": 3}}', b"\xff" * 99])
async def test_a_damaged_file_is_measured_again(tmp_path: Path, damage: bytes) -> None:
    kept = tmp_path / "step_times.json"
    kept.write_bytes(damage)
    async with running(tmp_path, fake(fake_step_s=1e-5, fake_row_s=0.0, fake_prefill_tps=1e6)) as (pool, events):
        await until(pool, lambda: bool(timed(events)))
    assert json.loads(kept.read_text())["format"] == 1


async def test_nothing_is_timed_while_anybody_waits_or_a_model_is_changed(tmp_path: Path, told: list[bool]) -> None:
    slow = fake("b", fake_load_s=0.5)
    async with running(tmp_path, fake(fake_prefill_tps=2_000.0), slow) as (pool, events):
        await pool.orders.unload("b")
        told.clear()
        with pool.lease("a"):
            for _ in range(5):
                await pool.maintain()
            assert True not in told
        with pool.waiting("a"):
            await pool.maintain()
            assert True not in told
        loading = asyncio.create_task(pool.orders.load("b"))
        assert await timed_during_a_change(pool, loading, told) == []
        await until(pool, lambda: True in told)
        # what begins ends it at once, and not at the next look
        with pool.lease("b"):
            assert told[-1] is False
        await until(pool, lambda: told[-1])
        with pool.waiting("b"):
            assert told[-1] is False
        await until(pool, lambda: told[-1])
        await pool.orders.unload("b")
        assert told[-1] is False
        assert not timed(events)


async def test_a_swap_is_left_alone(tmp_path: Path, told: list[bool]) -> None:
    other = fake("b", fake_load_s=0.3)
    async with running(tmp_path, fake(fake_prefill_tps=2_000.0)) as (pool, _):
        await until(pool, lambda: True in told)
        swapping = asyncio.create_task(pool.orders.swap_to("a", msgspec.convert(other, Model)))
        assert await timed_during_a_change(pool, swapping, told) == []
        assert swapping.result().outcome == "flipped"


async def test_it_can_be_switched_off(tmp_path: Path, told: list[bool]) -> None:
    async with running(tmp_path, fake(), calibrate=False) as (pool, events):
        for _ in range(5):
            await pool.maintain()
        assert True not in told
        assert not timed(events)


async def test_a_model_that_dies_of_it_is_not_timed_for_ever(tmp_path: Path, told: list[bool]) -> None:
    """A GPU out of memory ends the loader; the model has to serve all the same."""
    async with running(tmp_path, fake(fake_prefill_tps=500.0)) as (pool, _):
        for _ in range(3):
            told.clear()
            await until(pool, lambda: True in told)
            pid = pool.inventory.status()[0]["pid"]
            assert isinstance(pid, int)
            os.kill(pid, signal.SIGKILL)
            await until(pool, lambda pid=pid: pool.inventory.status()[0]["pid"] not in (pid, None))  # type: ignore[misc]
        told.clear()
        for _ in range(10):
            await pool.maintain()
        assert True not in told


async def test_a_model_that_is_unloaded_while_it_is_timed_is_timed_another_day(
    tmp_path: Path, told: list[bool]
) -> None:
    async with running(tmp_path, fake(fake_prefill_tps=500.0)) as (pool, _):
        for _ in range(5):
            told.clear()
            await until(pool, lambda: True in told)
            await pool.orders.unload("a")
            await pool.orders.load("a")


async def test_figures_of_a_disturbed_machine_are_used_and_measured_again(
    tmp_path: Path, told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.models.figures.STEADY_PPM", -1)  # nothing is steady enough
    plain, learnt = Figures._learn, list[str]()

    async def learn(self: Figures, loaded: Loaded, *more: Any) -> None:
        learnt.append(loaded.name)
        await plain(self, loaded, *more)

    monkeypatch.setattr(Figures, "_learn", learn)
    async with running(tmp_path, fake(fake_step_s=1e-5, fake_row_s=0.0)) as (pool, events):
        await until(pool, lambda: len(learnt) == 3)
        assert len(timed(events)) == 1, "the steadier figures stay"
        told.clear()
        for _ in range(3):
            await pool.maintain()
        assert True not in told, "not for ever"


# ---- pure ----

STANDINGS = st.builds(
    Standing,
    name=st.sampled_from("abc"),
    settled=st.booleans(),
    in_flight=st.integers(0, 2),
    used_s=st.none() | st.floats(0, 10),
    due=st.booleans(),
)


@given(st.lists(STANDINGS, max_size=3), st.booleans(), st.booleans())
def test_a_model_is_timed_only_when_the_whole_node_is_idle(models: list[Standing], calm: bool, retiring: bool) -> None:
    name = to_time(models, calm=calm, retiring=retiring)
    idle = calm and not retiring and all(m.settled and not m.in_flight for m in models)
    quiet = all(m.used_s is None or m.used_s >= idleness.QUIET_S for m in models)
    assert (name is not None) == (idle and quiet and any(m.due for m in models))
    assert name is None or any(m.name == name and m.due for m in models)


def test_a_node_slower_than_its_chip_is_named_with_the_likely_causes() -> None:
    hopes = expectation.expected(chips.find("Apple M4"), 16, 4_000_000_000)
    assert hopes["decode_tps"] == pytest.approx(120e9 * 0.75 / 4e9, rel=0.2)
    for share, warns in ((1.2, False), (0.71, False), (0.69, True), (0.2, True)):
        figures = {"decode_tps": share * hopes["decode_tps"]}
        sentence = expectation.warning("m", figures, hopes, "Apple M4", [])
        assert bool(sentence) == warns
        assert not warns or all(word in sentence for word in ("heat", "low power", "swap", "% below", "Apple M4"))
    assert expectation.causes("nominal", 9, 0) == [
        "it is hot (throttled within the last minutes): see to its fan and its place"
    ]
    hot = expectation.causes("heavy", None, 5)
    assert "hot" in expectation.warning("m", {"decode_tps": 1.0}, hopes, "Apple M4", hot)
    assert expectation.causes("nominal", 0, 0) == expectation.causes("", None, None) == []


@pytest.mark.parametrize(
    ("brand", "memory_gb", "tok_s"),
    [("M1", 16, 14), ("M1 Max", 64, 61), ("M1 Ultra", 128, 84), ("M2 Ultra", 192, 94), ("M3 Ultra", 256, 92)],
)
def test_a_healthy_chip_is_not_called_slow(brand: str, memory_gb: int, tok_s: float) -> None:
    """As measured with 3.56 GiB of weights: llama.cpp discussion 4167."""
    hopes = expectation.expected(chips.find(brand), memory_gb, int(3.56 * chips.GIB))
    assert expectation.warning("m", {"decode_tps": tok_s}, hopes, brand, []) == ""
    assert expectation.warning("m", {"decode_tps": tok_s / 2}, hopes, brand, []) != ""


def test_a_small_model_is_not_expected_to_be_as_fast_as_its_weights_are_read() -> None:
    hopes = expectation.expected(chips.find("M4 Max"), 64, 80 << 20)
    assert expectation.warning("m", {"decode_tps": 350.0}, hopes, "M4 Max", []) == ""


@pytest.mark.parametrize("brand", ["Intel Xeon", "", "Apple M99"])
def test_an_unknown_chip_has_no_expectation_and_no_warning(brand: str) -> None:
    hopes = expectation.expected(chips.find(brand), 16, 4_000_000_000)
    assert hopes == {}
    assert expectation.warning("m", {"decode_tps": 0.1}, hopes, brand, []) == ""
    assert expectation.expected(chips.find("Apple M4"), 16, 0) == {}


@given(st.sampled_from(chips.known()), st.floats(1, 600), st.integers(1, 10**12))
def test_every_chip_of_the_table_has_an_expectation(chip: chips.Chip, memory_gb: float, weights: int) -> None:
    assert min(expectation.expected(chip, memory_gb, weights).values()) >= 0
