"""The pool with real loader processes (fake engine): loads, leases, evictions, swaps, crashes."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from agent.config import AgentConfig, Live
from agent.files.modelstore import ModelStore
from agent.models.loaders import Loaders
from agent.models.pool import Pool
from agent.process.loader_process import LoaderProcess
from agent.wire.frames import Done, Generate, Message, Reported, Tokens, Working
from shared.errors import RackError, Refused, Retryable
from shared.records import Event, LoaderExited, MemoryPressed, ModelEvicted, ModelLoaded, ModelMissed, SwapFinished


def fake(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "engine": "fake",
        "path": f"weights of {name}",
        "need_bytes": 10,
        "preload": False,
        "fake_held_bytes": 1,
        **more,
    }


@asynccontextmanager
async def running(
    tmp_path: Path,
    *models: dict[str, Any],
    budget: int = 100,
    carried: bool = False,
    memory: dict[str, Any] | None = None,
) -> AsyncIterator[tuple[Pool, list[Event]]]:
    config = msgspec.convert(
        {
            "node": {"id": "n1", "rack": "r"},
            "store": {"path": "x"},
            "models": list(models),
            "limits": {"drain_s": 5.0},
            "loader": {"threads": 1},
            "memory": {"min_residency_s": 0.0, **(memory or {})},
        },
        AgentConfig,
    )
    events: list[Event] = []
    store = await asyncio.to_thread(ModelStore, tmp_path / "models.json", tmp_path / "models")
    live = Live(config)
    loaders = Loaders(live, os.environ, prompts=tmp_path / "prompts", on_report=lambda model, reported: None)
    pool = Pool(live, store, loaders, budget_bytes=budget, emit=events.append, carried_by_peer=lambda _: carried)
    try:
        yield pool, events
    finally:
        await pool.stop(0.0)


def ask(model: str, *, tokens: int = 5, text: str = "hello") -> Generate:
    return Generate(
        id=0, model=model, messages=(Message(role="user", content=text),), max_tokens=tokens, temperature=0.0
    )


async def answer(pool: Pool, model: str, **more: Any) -> tuple[str, str]:
    """The version that answered, and its text."""
    with pool.lease(model) as lease:
        texts = [a.text async for a in lease.generate(ask(model, **more)) if isinstance(a, Tokens)]
        return lease.version, "".join(texts)


def of(events: list[Event], kind: type[Any]) -> list[Any]:
    return [e for e in events if isinstance(e, kind)]


async def until(done: Callable[[], bool], limit_s: float = 120.0) -> None:
    async with asyncio.timeout(limit_s):
        while not done():
            await asyncio.sleep(0.02)


async def test_a_loaded_model_answers_and_an_unloaded_one_does_not(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a")) as (pool, events):
        with pytest.raises(Retryable):
            await answer(pool, "a")
        await pool.orders.load("a")
        version, text = await answer(pool, "a")
        assert version
        assert len(text.split()) == 5
        pid = pool.inventory.status()[0]["pid"]
        await pool.orders.unload("a")
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)  # type: ignore[arg-type]
        assert [e.reason for e in of(events, ModelEvicted)] == ["ordered"]
        assert len(of(events, ModelLoaded)) == 1


async def test_concurrent_loads_of_one_model_start_one_loader(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a")) as (pool, events):
        await asyncio.gather(*(pool.orders.load("a") for _ in range(5)))
        assert len(of(events, ModelLoaded)) == 1


async def test_an_idle_model_is_evicted_before_a_busy_one(tmp_path: Path) -> None:
    models = [fake(n, need_bytes=40, fake_step_s=0.02) for n in "abc"]
    async with running(tmp_path, *models) as (pool, events):
        await pool.orders.load("a")
        await pool.orders.load("b")
        await answer(pool, "b")
        busy = asyncio.create_task(answer(pool, "a", tokens=60))
        await until(lambda: pool.views()[0].in_flight == 1)
        await pool.orders.load("c")
        (evicted,) = of(events, ModelEvicted)
        assert (evicted.model, evicted.reason, evicted.for_model, evicted.bytes, evicted.requests_last_hour) == (
            "b",
            "memory",
            "c",
            40,
            1,
        )
        _, text = await busy
        assert len(text.split()) == 60


async def test_insufficient_memory_reports_the_missing_bytes(tmp_path: Path) -> None:
    async with running(
        tmp_path, fake("a", need_bytes=5 * 10**6, pinned=True), fake("b", need_bytes=7 * 10**6), budget=10**7
    ) as (pool, _):
        await pool.orders.load("a")
        with pytest.raises(Refused, match="2 MB over the memory budget of 10 MB; in use, pinned or just loaded: a"):
            await pool.orders.load("b")
        assert pool.inventory.status()[1]["state"] == "cold", "room may come back"
        assert "2 MB over the memory budget" in str(pool.inventory.status()[1]["reason"])
        assert await answer(pool, "a")


async def test_a_queued_model_loads_when_memory_becomes_free(tmp_path: Path) -> None:
    models = (fake("a", need_bytes=60, fake_step_s=0.02), fake("b", need_bytes=60))
    async with running(tmp_path, *models) as (pool, _):
        await pool.orders.load("a")
        busy = asyncio.create_task(answer(pool, "a", tokens=40))
        await until(lambda: pool.views()[0].in_flight == 1)
        assert not await pool.wait_ready("b", 0.3)
        assert pool.is_coming("b")
        await busy
        assert await pool.wait_ready("b", 120.0)


async def test_a_victim_that_crashes_during_eviction_does_not_block_the_load(tmp_path: Path) -> None:
    """Its restart waits for memory that the load reserves; the load must not wait for the restart's slot."""
    models = [fake(n, need_bytes=40) for n in ("v1", "v2")] + [fake("y", need_bytes=90)]
    async with running(tmp_path, *models) as (pool, _):
        await pool.orders.load("v1")
        await pool.orders.load("v2")
        pid = pool.inventory.status()[1]["pid"]
        loading = asyncio.create_task(pool.orders.load("y"))
        while pool.inventory.status()[0]["state"] == "ready":
            await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)  # type: ignore[arg-type]
        async with asyncio.timeout(120):
            with contextlib.suppress(Refused):
                await loading
            await until(lambda: all(s["state"] != "starting" for s in pool.inventory.status()))
        assert await pool.wait_ready("v1", 120.0) or await pool.wait_ready("y", 120.0)


async def test_an_order_completes_when_its_caller_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a", fake_step_s=0.02), fake("b", fake_step_s=0.02)) as (pool, events):
        await pool.orders.load("a")
        busy = asyncio.create_task(answer(pool, "a", tokens=30))
        await until(lambda: pool.views()[0].in_flight == 1)
        order: asyncio.Task[Any] = asyncio.create_task(pool.orders.unload("a"))
        await until(lambda: pool.inventory.status()[0]["state"] == "draining")
        order.cancel()
        await busy
        await until(lambda: pool.inventory.status()[0]["state"] == "cold")
        assert len(of(events, ModelEvicted)) == 1
        order = asyncio.create_task(pool.orders.load("a"))
        await asyncio.sleep(0)
        order.cancel()
        await until(lambda: pool.inventory.status()[0]["state"] == "ready")
        order = asyncio.create_task(pool.orders.swap("a", "b"))
        await until(lambda: len(pool.orders.swaps()) == 1)
        order.cancel()
        await until(lambda: len(of(events, SwapFinished)) == 1)
        assert of(events, SwapFinished)[0].outcome == "flipped"
        assert await answer(pool, "b")


async def test_stopping_at_any_time_leaves_no_process(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a", fake_load_s=0.5), fake("b", fake_load_s=0.5)) as (pool, _):
        await pool.orders.load("a")
        pid = pool.inventory.status()[0]["pid"]
        loading, swapping = asyncio.create_task(pool.orders.load("b")), asyncio.create_task(pool.orders.swap("a", "b"))
        await asyncio.sleep(0.2)
        await pool.stop(0.0)
        await asyncio.gather(loading, swapping, return_exceptions=True)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)  # type: ignore[arg-type]
        assert not [s for s in pool.inventory.status() if s["pid"]]


async def test_a_stop_during_a_hot_swap_ends_the_active_loader_too(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a"), fake("b", fake_load_s=30.0)) as (pool, _):
        await pool.orders.load("a")
        pid: Any = pool.inventory.status()[0]["pid"]
        swapping = asyncio.create_task(pool.orders.swap("a", "b"))
        await until(lambda: bool(pool.orders.swaps()))
        stopping = asyncio.create_task(pool.stop(0.0))
        await pool.maintain()  # goes on until the daemon's jobs are cancelled
        await stopping
        await asyncio.gather(swapping, return_exceptions=True)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_slot_whose_name_a_swap_took_is_not_restarted(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a"), fake("b")) as (pool, events):
        await pool.orders.load("a")
        await pool.orders.load("b")
        orphan = pool._slots.named("b")
        orphan.life = msgspec.structs.replace(orphan.life, crashes=(time.monotonic(),) * 3)  # a long back-off
        os.kill(pool.inventory.status()[1]["pid"], signal.SIGKILL)  # type: ignore[arg-type]
        await until(lambda: orphan.life.phase == "backing_off")
        assert (await pool.orders.swap("a", "b")).outcome == "flipped"
        assert orphan not in pool._slots
        loaded = len(of(events, ModelLoaded))
        assert not pool._lifecycles.feed(orphan, "due")
        assert len(of(events, ModelLoaded)) == loaded


async def test_an_eviction_that_fails_ends_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, fake("a")) as (pool, _):
        await pool.orders.load("a")
        retire = pool._loaders.retire

        async def breaks(*given: Any) -> int:
            await retire(*given)
            raise OSError("out of file descriptors")

        monkeypatch.setattr(pool._loaders, "retire", breaks)
        await pool.orders.unload("a")
        monkeypatch.undo()
        await pool.orders.load("a")
        assert await answer(pool, "a")


async def test_an_order_after_the_stop_is_refused_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a"), fake("b")) as (pool, _):
        await pool.orders.load("a")
        await pool.stop(0.0)
        for order in (
            pool.orders.load("a"),
            pool.orders.load("b"),
            pool.orders.swap("a", "b"),
            pool.orders.unload("a"),
        ):
            async with asyncio.timeout(60):
                with pytest.raises(RackError):
                    await order
        assert not [s for s in pool.inventory.status() if s["pid"]]


async def test_a_model_that_is_loading_cannot_be_swapped_in(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a"), fake("b", fake_load_s=0.5)) as (pool, _):
        await pool.orders.load("a")
        loading = asyncio.create_task(pool.orders.load("b"))
        await until(lambda: pool.inventory.status()[1]["state"] == "starting")
        with pytest.raises(Refused, match="itself resident or loading"):
            await pool.orders.swap("a", "b")
        await loading
        assert await answer(pool, "a") != await answer(pool, "b")


async def test_a_swap_under_load_neither_loses_nor_mixes_answers(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a", fake_step_s=0.005), fake("b", fake_step_s=0.005)) as (pool, events):
        await pool.orders.load("a")
        old, old_text = await answer(pool, "a", tokens=40)
        over, seen = False, set()

        async def client() -> None:
            while not over:
                seen.add(await answer(pool, "a", tokens=40))

        clients = [asyncio.create_task(client()) for _ in range(8)]
        finished = await pool.orders.swap("a", "b")
        await asyncio.sleep(0.3)
        over = True
        await asyncio.gather(*clients)
        new, new_text = await answer(pool, "a", tokens=40)
        assert {(old, old_text), (new, new_text)} == seen, "every answer is all of one version"
        assert ("flipped", old, new, 30) == (
            finished.outcome,
            finished.from_version,
            finished.to_version,
            finished.probes,
        )
        assert new == (await answer(pool, "b"))[0], "the new name answers too"
        assert [finished] == of(events, SwapFinished)
        assert len([s for s in pool.inventory.status() if s["pid"]]) == 1


async def test_a_failed_standby_leaves_the_active_version_serving(tmp_path: Path) -> None:
    missing = {"name": "b", "path": str(tmp_path / "none"), "need_bytes": 10, "preload": False}
    async with running(tmp_path, fake("a"), fake("slow", fake_step_s=1.0, probe_p99_s=0.2), missing) as (pool, events):
        await pool.orders.load("a")
        before = await answer(pool, "a")
        finished = await pool.orders.swap("a", "slow")
        assert finished.outcome == "failed"
        assert "took over 0.2 s" in finished.reason
        with pytest.raises(Refused, match="no such folder"):
            await pool.orders.swap("a", "b")
        assert before == await answer(pool, "a")
        assert [e.outcome for e in of(events, SwapFinished)] == ["failed"]


async def test_a_swap_without_memory_is_cold_if_a_peer_serves_and_rejected_otherwise(tmp_path: Path) -> None:
    models = (fake("a", need_bytes=60), fake("b", need_bytes=60))
    async with running(tmp_path, *models) as (pool, _):
        await pool.orders.load("a")
        with pytest.raises(Refused, match="no peer serves a meanwhile"):
            await pool.orders.swap("a", "b")
        assert await answer(pool, "a")
    async with running(tmp_path, *models, carried=True) as (pool, _):
        await pool.orders.load("a")
        old, _ = await answer(pool, "a")
        finished = await pool.orders.swap("a", "b")
        assert finished.outcome == "flipped"
        assert old != (await answer(pool, "a"))[0]


@pytest.mark.parametrize(
    ("old", "new", "why"), [("a", "x", "not configured"), ("x", "a", "not configured"), ("a", "a", "active version")]
)
async def test_an_invalid_swap_is_rejected(tmp_path: Path, old: str, new: str, why: str) -> None:
    async with running(tmp_path, fake("a"), fake("b")) as (pool, _):
        await pool.orders.load("a")
        with pytest.raises(Refused, match=why):
            await pool.orders.swap(old, new)


async def test_a_killed_loader_is_restarted_and_reported_while_others_answer(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a", fake_step_s=0.05), fake("b")) as (pool, events):
        await pool.orders.load("a")
        await pool.orders.load("b")
        stream = asyncio.create_task(answer(pool, "a", tokens=1000))
        await until(lambda: pool.views()[0].in_flight == 1)
        os.kill(pool.inventory.status()[0]["pid"], signal.SIGKILL)  # type: ignore[arg-type]
        with pytest.raises(Retryable, match="signal 9"):
            await stream
        assert (await answer(pool, "b"))[1]
        assert await pool.wait_ready("a", 120.0)
        assert await answer(pool, "a")
        status = pool.inventory.status()[0]
        assert (status["restarts"], status["last_exit"], status["state"]) == (1, "signal 9 (SIGKILL)", "ready")
        assert len(of(events, LoaderExited)) == 1


async def test_a_crash_looping_loader_is_not_restarted_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.models.lifecycle.CRASHES_BEFORE_GIVING_UP", 2)
    async with running(tmp_path, fake("a")) as (pool, events):
        await pool.orders.load("a")
        for number in (1, 2):
            await pool.wait_ready("a", 120.0)
            with contextlib.suppress(Retryable):
                await answer(pool, "a", text="!crash")
            await until(lambda number=number: len(of(events, LoaderExited)) == number)  # type: ignore[misc]
        await until(lambda: pool.inventory.status()[0]["state"] == "failed")
        assert "restarts stopped" in str(pool.inventory.status()[0]["reason"])
        assert not await pool.wait_ready("a", 1.0)


async def test_closing_a_stream_early_cancels_the_request(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a", fake_step_s=0.01)) as (pool, _):
        await pool.orders.load("a")
        with pool.lease("a") as lease:
            async with contextlib.aclosing(lease.generate(ask("a", tokens=8_000))) as answers:
                async for answer in answers:
                    if isinstance(answer, Tokens):
                        break
        assert pool.views()[0].in_flight == 0
        first = await pool.inventory.windows()
        await asyncio.sleep(0.1)
        second = await pool.inventory.windows()
        assert (second[0].decode_tok, second[0].steps) == (0, 0), "the engine is idle again"
        assert first[0].decode_tok >= 1


async def test_counts_of_a_stopped_loader_are_kept(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a")) as (pool, _):
        await pool.orders.load("a")
        await answer(pool, "a", tokens=7)
        await pool.orders.unload("a")
        await pool.inventory.refresh()
        for _ in range(2):
            (so_far,) = pool.inventory.windows_so_far()
            assert so_far.decode_tok == 7, "asked for again, it is still there"
        (window,) = await pool.inventory.windows()
        assert (window.model, window.decode_tok) == ("a", 7)
        assert pool.inventory.windows_so_far() == []


async def test_a_cold_model_is_loaded_on_demand(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a")) as (pool, _):
        assert await pool.wait_ready("a", 120.0)
        assert await answer(pool, "a")


async def test_a_late_loader_report_is_counted_with_the_next(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a")) as (pool, _):
        await pool.orders.load("a")
        await answer(pool, "a", tokens=7)
        loaded = pool._slots.named("a").loaded
        assert loaded is not None
        loaded.process._reports.append(Reported(decode_tok=100, queue_max=3, active_bytes=1))
        (window,) = await pool.inventory.windows()
        assert (window.decode_tok, window.queue_max) == (107, 3)
        (window,) = await pool.inventory.windows()
        assert window.decode_tok == 0


async def test_a_timed_out_report_is_left_to_the_next_reader(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a")) as (pool, _):
        await pool.orders.load("a")
        await answer(pool, "a", tokens=7)
        loaded = pool._slots.named("a").loaded
        assert loaded is not None
        loaded.process._reports.append(Reported(decode_tok=100))
        asked = asyncio.create_task(pool.inventory.refresh())
        await asyncio.sleep(0)  # it has begun to wait
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
        (window,) = await pool.inventory.windows()
        (later,) = await pool.inventory.windows()
        assert window.decode_tok + later.decode_tok == 107


async def test_the_last_report_of_an_ended_loader_is_counted(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a")) as (pool, _):
        await pool.orders.load("a")
        process = pool._slots.named("a").loaded.process  # type: ignore[union-attr]
        process._reports.append(Reported(decode_tok=50))
        await process.stop(1.0)
        told = await process.report()
        assert told is not None
        assert told.decode_tok == 50
        assert await process.report() is None


async def test_a_late_report_is_counted_despite_a_crash(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a")) as (pool, _):
        await pool.orders.load("a")
        loaded = pool._slots.named("a").loaded
        assert loaded is not None
        loaded.process._reports.append(Reported(decode_tok=7))
        os.kill(loaded.process.pid, signal.SIGKILL)
        async with asyncio.timeout(120):
            while not pool.inventory.windows_so_far():
                await asyncio.sleep(0.02)
        (window,) = await pool.inventory.windows()
        assert window.decode_tok == 7


async def test_done_carries_the_finish_reason(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a")) as (pool, _):
        await pool.orders.load("a")
        with pool.lease("a") as lease:
            answers = [a async for a in lease.generate(ask("a", tokens=3))]
        assert isinstance(answers[-1], Done)
        assert (answers[-1].finish, answers[-1].completion_tok) == ("length", 3)


# ---- eviction ----


async def test_the_model_that_is_cheapest_to_miss_is_evicted(tmp_path: Path) -> None:
    """Not the least recently used one: it is requested ten times as often."""
    models = [fake(n, need_bytes=40) for n in "abc"]
    async with running(tmp_path, *models) as (pool, events):
        await pool.orders.load("a")
        await pool.orders.load("b")
        for _ in range(10):
            await answer(pool, "a")
        await answer(pool, "b")
        await pool.orders.load("c")
        (evicted,) = of(events, ModelEvicted)
        assert (evicted.model, evicted.reason, evicted.for_model) == ("b", "memory", "c")
        assert evicted.idle_us is not None
        assert evicted.reload_us > 0


async def test_a_request_for_an_evicted_model_reports_the_time_since_eviction(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a"), fake("b")) as (pool, events):
        await pool.orders.load("a")
        await pool.orders.unload("a")
        await asyncio.sleep(0.2)
        assert await pool.wait_ready("a", 120.0)
        await pool.wait_ready("a", 1.0)
        (missed,) = of(events, ModelMissed)
        assert (missed.model, missed.reason) == ("a", "ordered")
        assert 200_000 <= missed.after_us < 5_000_000


async def test_a_pinned_model_stays_until_it_is_unpinned(tmp_path: Path) -> None:
    models = (fake("a", need_bytes=60), fake("b", need_bytes=60))
    async with running(tmp_path, *models) as (pool, _):
        await pool.orders.load("a")
        await pool.orders.pin("a", pinned=True)
        with pytest.raises(Refused, match="pinned or just loaded: a"):
            await pool.orders.load("b")
        await pool.orders.pin("a", pinned=False)
        await pool.orders.load("b")


async def test_a_just_loaded_model_is_protected_except_from_an_order(tmp_path: Path) -> None:
    models = (fake("a", need_bytes=60), fake("b", need_bytes=60))
    async with running(tmp_path, *models, memory={"min_residency_s": 1.0}) as (pool, _):
        assert await pool.wait_ready("a", 120.0)
        began = time.monotonic()
        assert await pool.wait_ready("b", 120.0)
        assert time.monotonic() - began >= 0.9
        await pool.orders.load("a")
        assert time.monotonic() - began < 15.0


async def test_an_idle_model_is_evicted_after_its_keep_alive(tmp_path: Path) -> None:
    models = [fake("stays"), fake("goes", keep_alive_s=0.3), fake("pinned", keep_alive_s=0.0, pinned=True)]
    async with running(tmp_path, *models, fake("at once", keep_alive_s=0.0)) as (pool, events):
        for name in ("stays", "goes", "pinned", "at once"):
            await pool.orders.load(name)
        await answer(pool, "goes")
        await pool.maintain()
        await until(lambda: len(of(events, ModelEvicted)) == 1)
        await asyncio.sleep(0.4)
        await pool.maintain()
        await until(lambda: len(of(events, ModelEvicted)) == 2)
        assert [(e.model, e.reason) for e in of(events, ModelEvicted)] == [("at once", "idle"), ("goes", "idle")]
        assert [m["state"] for m in pool.inventory.status()] == ["ready", "cold", "ready", "cold"]


async def test_a_busy_model_is_closed_for_one_that_waited_long_enough(tmp_path: Path) -> None:
    """Its requests finish, new ones are queued, and it is loaded again in its turn."""
    models = (fake("a", need_bytes=60, fake_step_s=0.01), fake("b", need_bytes=60, fake_step_s=0.01))
    async with running(tmp_path, *models, memory={"max_wait_s": 0.5}) as (pool, events):
        await pool.orders.load("a")
        over, served = False, {"a": 0, "b": 0}

        async def client(name: str) -> None:
            while not over:
                assert await pool.wait_ready(name, 120.0)
                with contextlib.suppress(Retryable):  # closed between the two lines
                    _, text = await answer(pool, name, tokens=10)
                    assert len(text.split()) == 10
                    served[name] += 1

        clients = [asyncio.create_task(client(name)) for name in "aaabbb"]
        await until(lambda: len(of(events, ModelEvicted)) >= 4)
        over = True
        await asyncio.gather(*clients)
        turns = [e.model for e in of(events, ModelEvicted)]
        assert turns[:4] == ["a", "b", "a", "b"]
        assert min(served.values()) > 10, "each turn serves many requests, not one"


def _children() -> set[int]:
    """The loaders of this process."""
    return {child.pid for child in psutil.Process().children()}


def _active(process: LoaderProcess) -> int:
    return process.working.active_bytes if process.working else 0


async def test_the_memory_guard_escalates_from_pressure_to_rejection(tmp_path: Path) -> None:
    """Fake engines report their memory; dropping caches frees nothing while they report the same."""
    models = [fake("a", fake_held_bytes=70, fake_step_s=0.02), fake("b", fake_held_bytes=70)]
    async with running(tmp_path, *models, budget=100) as (pool, events):
        await pool.orders.load("a")
        await pool.orders.load("b")
        busy = asyncio.create_task(answer(pool, "a", tokens=100))
        await until(lambda: pool.views()[0].in_flight == 1)
        for name in "ab":
            slot = pool._slots.named(name)
            assert slot.loaded is not None
            slot.loaded.process.working = Working(active_bytes=70)
        await pool.maintain()
        assert pool.pressure["level"] == "hard"
        assert not pool.refusing
        slot = pool._slots.named("a")
        assert slot.loaded is not None
        await until(lambda: slot.loaded is not None and _active(slot.loaded.process) == 1 << 20)
        os.kill(slot.loaded.process.pid, signal.SIGSTOP)  # it is busy until the end of this test
        slot.loaded.process.working = Working(active_bytes=170)
        await pool.maintain()
        await until(lambda: [e.model for e in of(events, ModelEvicted)] == ["b"])
        assert of(events, ModelEvicted)[0].reason == "pressure"
        slot.loaded.process.working = Working(active_bytes=170)
        await pool.maintain()
        assert pool.refusing
        assert not any(view.ready for view in pool.views())
        slot.loaded.process.working = Working(active_bytes=10)
        await pool.maintain()
        assert not pool.refusing
        assert [e.level for e in of(events, MemoryPressed)] == ["hard", "calm"]
        os.kill(slot.loaded.process.pid, signal.SIGCONT)
        assert len((await busy)[1].split()) == 100, "who was being answered was answered"


async def test_an_active_loader_that_crashes_during_standby_start_is_restarted(tmp_path: Path) -> None:
    models = (fake("a"), fake("b", fake_load_s=0.5))
    async with running(tmp_path, *models) as (pool, events):
        await pool.orders.load("a")
        version, _ = await answer(pool, "a")
        swapping = asyncio.create_task(pool.orders.swap("a", "b"))
        active = pool.inventory.status()[0]["pid"]
        await until(lambda: len(_children()) == 2)
        (standby,) = _children() - {active}
        os.kill(standby, signal.SIGSTOP)  # so it cannot be ready first
        os.kill(active, signal.SIGKILL)  # type: ignore[arg-type]
        await until(lambda: len(of(events, LoaderExited)) == 1)
        assert await pool.wait_ready("a", 120.0), "before the swap is through"
        assert not swapping.done()
        os.kill(standby, signal.SIGCONT)
        assert (await answer(pool, "a"))[0] == version
        assert (await swapping).outcome == "flipped"
        assert (await answer(pool, "a"))[0] != version
        assert len([s for s in pool.inventory.status() if s["pid"]]) == 1


async def test_many_swaps_do_not_leak_memory(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a"), fake("b")) as (pool, _):
        await pool.orders.load("a")
        for new in ("b", "a", "b"):
            assert (await pool.orders.swap("a", new)).outcome == "flipped"
        status = pool.inventory.status()
        assert [m["names"] for m in status] == [["a", "b"]]
        assert pool.orders._swaps.maxlen is not None
        assert not pool._loaders.retiring
        assert not +pool._loaders.missed


async def test_many_waiters_start_a_model_once_and_a_broken_one_is_not_retried(tmp_path: Path) -> None:
    missing = {"name": "gone", "path": str(tmp_path / "none"), "preload": False}
    async with running(tmp_path, fake("a"), missing) as (pool, events):
        starts = 0
        describe = pool._lifecycles.store.describe

        def counted(model: Any) -> Any:
            nonlocal starts
            starts += 1
            return describe(model)

        pool._lifecycles.store.describe = counted  # type: ignore[method-assign]
        found = await asyncio.gather(*(pool.wait_ready("gone", 5.0) for _ in range(20)))
        assert not any(found)
        assert starts == 1
        assert all(await asyncio.gather(*(pool.wait_ready("a", 120.0) for _ in range(20))))
        assert (starts, len(of(events, ModelLoaded))) == (2, 1)
        assert len(pool._lifecycles.tasks) < 5


async def test_a_model_that_can_never_fit_is_rejected_at_once(tmp_path: Path) -> None:
    models = (fake("a", need_bytes=60, pinned=True), fake("big", need_bytes=60))
    async with running(tmp_path, *models) as (pool, _):
        await pool.orders.load("a")
        began = time.monotonic()
        assert not await pool.wait_ready("big", 10.0)
        assert not pool.is_coming("big")
        assert time.monotonic() - began < 2.0
        pool.room.budget_bytes = 59
        with pytest.raises(Refused, match="so it can never fit; need_bytes"):
            await pool.orders.load("big")


async def test_a_loader_that_crashes_in_a_cold_swap_is_not_restarted_beside_the_new_one(tmp_path: Path) -> None:
    models = (fake("a", need_bytes=60, fake_step_s=0.05), fake("b", need_bytes=60))
    async with running(tmp_path, *models, carried=True) as (pool, _):
        await pool.orders.load("a")
        with contextlib.suppress(Retryable):
            busy = asyncio.create_task(answer(pool, "a", tokens=200))
            await until(lambda: pool.views()[0].in_flight == 1)
            swapping = asyncio.create_task(pool.orders.swap("a", "b"))
            await until(lambda: pool.inventory.status()[0]["state"] == "out of rotation")
            os.kill(pool.inventory.status()[0]["pid"], signal.SIGKILL)  # type: ignore[arg-type]
            assert (await swapping).outcome == "flipped"
            await busy
        assert pool.views()[0].ready
        assert not pool._loaders.retiring
        children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
        assert [child.pid for child in children if "agent.loader" in " ".join(child.cmdline())] == [
            pool.inventory.status()[0]["pid"]
        ]


async def test_a_name_taken_over_leaves_other_names_of_its_loader(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a"), fake("b"), fake("c")) as (pool, _):
        await pool.orders.load("a")
        assert (await pool.orders.swap("a", "b")).outcome == "flipped"
        await pool.orders.unload("a")
        await pool.orders.load("c")
        assert (await pool.orders.swap("c", "b")).outcome == "flipped"
        assert sorted(name for view in pool.views() for name in [view.name]) == ["a", "b", "c"]


async def test_keep_alive_counts_from_the_end_of_an_answer(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a", keep_alive_s=0.4, fake_step_s=0.02)) as (pool, events):
        await pool.orders.load("a")
        await answer(pool, "a", tokens=40)
        await pool.maintain()
        await asyncio.sleep(0.1)
        assert not of(events, ModelEvicted)
        await asyncio.sleep(0.5)
        await pool.maintain()
        await until(lambda: len(of(events, ModelEvicted)) == 1)


async def test_a_loader_killed_while_starting_is_restarted_for_waiting_requests(tmp_path: Path) -> None:
    async with running(tmp_path, fake("a", fake_load_s=0.6)) as (pool, events):
        waiting = asyncio.create_task(pool.wait_ready("a", 120.0))
        await asyncio.sleep(0.4)
        for child in psutil.Process().children():
            if "agent.loader" in " ".join(child.cmdline()):
                child.kill()
        assert await waiting
        assert len(of(events, ModelLoaded)) == 1
        assert (await answer(pool, "a"))[1]
