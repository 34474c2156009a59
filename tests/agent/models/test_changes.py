"""Changes of the configured models under requests, with real loader processes (fake engine)."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil
import pytest

from agent.config import Model
from agent.models.pool import Pool
from agent.reloading import needs_loader
from agent.wire.frames import Done, Tokens
from shared.errors import Retryable
from shared.records import ModelEvicted, SwapFinished
from tests.agent.models.test_pool import answer, ask, fake, running

LIMIT_S = 120.0


def settings(name: str, **more: Any) -> Model:
    return msgspec.convert(fake(name, **more), Model)


def begin(pool: Pool, name: str, wish: Model | None) -> None:
    pool.changes.begin(name, lambda served: wish, needs_loader)


async def until(done: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not done():
            await asyncio.sleep(0.01)


async def settled(pool: Pool) -> dict[str, str]:
    """What failed, when nothing is being changed any more."""
    await until(lambda: "changing" not in pool.changes.states.values())
    return dict(pool.changes.states)


def state(pool: Pool, name: str) -> str:
    rows: list[dict[str, Any]] = pool.inventory.status()
    found = [one["state"] for one in rows if name in one["names"]]
    return str(found[0]) if found else ""


async def test_one_that_is_new_is_served_and_loaded_if_it_is_to_be_preloaded(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m")) as (pool, _):
        begin(pool, "a", settings("a", preload=True))
        begin(pool, "b", settings("b"))
        assert await settled(pool) == {}
        assert (state(pool, "a"), state(pool, "b")) == ("ready", "cold")
        assert (await answer(pool, "a"))[1]


async def test_one_that_is_gone_ends_its_answers_and_its_name_is_free_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m", fake_step_s=0.02)) as (pool, events):
        await pool.orders.load("m")
        with pool.lease("m") as lease:
            answers = [one async for one in _first_then(lease.generate(ask("m", tokens=100)), pool)]
        assert isinstance(answers[-1], Done)
        assert sum(isinstance(one, Tokens) for one in answers) > 1
        assert await settled(pool) == {}
        assert [one.version for one in events if isinstance(one, ModelEvicted)]


async def _first_then(answers: Any, pool: Pool) -> Any:
    """The answers of a request whose model is removed after the first, and wanted again before it has drained."""
    first = True
    async for one in answers:
        yield one
        if first and isinstance(one, Tokens):
            first = False
            begin(pool, "m", None)
            await until(lambda: state(pool, "m") == "")
            assert pool.changes.states["m"] == "changing", "it drains"
            with pytest.raises(Retryable, match="any more"):  # another node may have it
                pool.lease("m")
            begin(pool, "m", settings("m", preload=True))
            await until(lambda: state(pool, "m") == "ready")
            assert (await answer(pool, "m"))[1]


async def test_who_waits_for_one_that_leaves_waits_no_longer(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m", fake_load_s=3600.0)) as (pool, _):
        waiting = asyncio.create_task(pool.wait_ready("m", 3000.0))
        slot = pool._slots.named("m")
        await until(lambda: slot.life.state == "starting" and slot.spec is not None)
        assert slot.spec is not None
        continuing = asyncio.create_task(pool.wait_for_version("m", slot.spec.version, 3000.0))
        await asyncio.sleep(0.05)
        pool._slots.leave(slot)
        async with asyncio.timeout(LIMIT_S):
            assert (await waiting, await continuing) == (False, False)


async def test_one_that_waits_for_a_restart_is_not_started_after_it_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m")) as (pool, _):
        await pool.orders.load("m")
        slot = pool._slots.named("m")
        for crashes in range(1, 4):  # the third is started again after 1.5 s
            await until(lambda: slot.life.phase == "ready")
            assert slot.loaded is not None
            os.kill(slot.loaded.process.pid, signal.SIGKILL)
            await until(lambda crashes=crashes: len(slot.life.crashes) == crashes)  # type: ignore[misc]
        assert slot.life.phase == "backing_off"
        begin(pool, "m", None)
        assert await settled(pool) == {}
        await asyncio.sleep(2.0)
        assert slot.loaded is None
        assert slot.life.stopped


async def test_other_settings_are_put_in_force_without_losing_a_request(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m")) as (pool, events):
        await pool.orders.load("m")
        lost, ended = list[BaseException](), asyncio.Event()

        async def client() -> None:
            while not ended.is_set():
                try:
                    await answer(pool, "m")
                except BaseException as error:
                    lost.append(error)
                    raise

        clients = [asyncio.create_task(client()) for _ in range(4)]
        begin(pool, "m", settings("m", rows=3, path="weights of another"))
        assert await settled(pool) == {}
        ended.set()
        await asyncio.gather(*clients, return_exceptions=True)
        assert lost == []
        (swapped,) = [one for one in events if isinstance(one, SwapFinished)]
        assert swapped.outcome == "flipped"
        assert swapped.from_version != swapped.to_version
        served = pool.changes.served("m")
        assert served is not None
        assert (served.rows, served.path) == (3, "weights of another")


async def test_settings_alone_are_replaced_too_though_the_files_are_the_same(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m")) as (pool, events):
        await pool.orders.load("m")
        before = pool._slots.named("m").loaded
        begin(pool, "m", settings("m", max_tokens=7))
        assert await settled(pool) == {}
        after = pool._slots.named("m").loaded
        assert after is not None
        assert after is not before
        assert after.spec.model.max_tokens == 7
        assert [one.outcome for one in events if isinstance(one, SwapFinished)] == ["flipped"]


async def test_what_the_loader_does_not_know_changes_without_another_one(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m")) as (pool, _):
        await pool.orders.load("m")
        slot = pool._slots.named("m")
        before = slot.loaded
        begin(pool, "m", settings("m", pinned=True, keep_alive_s=9.0))
        assert await settled(pool) == {}
        assert slot.loaded is before
        assert (slot.pinned, slot.keep_alive_s) == (True, 9.0)


async def test_where_both_do_not_fit_requests_wait_while_one_takes_the_place_of_the_other(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m", need_bytes=60)) as (pool, _):
        await pool.orders.load("m")
        begin(pool, "m", settings("m", need_bytes=70))
        waiting = asyncio.create_task(answer(pool, "m"))
        assert await settled(pool) == {}
        assert (await waiting)[1]
        assert pool._slots.named("m").model.need_bytes == 70


async def test_one_that_cannot_be_loaded_leaves_the_one_before_and_is_told(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m", need_bytes=60)) as (pool, _):
        await pool.orders.load("m")
        version = (await answer(pool, "m"))[0]
        begin(pool, "m", settings("m", need_bytes=600))
        failed = await settled(pool)
        assert "memory budget" in failed["m"]
        assert pool.changes.failed == ("m",)
        assert (await answer(pool, "m"))[0] == version
        assert pool._slots.named("m").model.need_bytes == 60
        begin(pool, "m", settings("m", need_bytes=60, rows=2))
        assert await settled(pool) == {}
        assert not pool.changes.failed


async def test_the_newest_wish_counts(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m")) as (pool, _):
        await pool.orders.load("m")
        for rows in range(2, 12):
            begin(pool, "m", settings("m", rows=rows))
            if rows % 3 == 0:
                begin(pool, "m", None)
                await asyncio.sleep(0)
        assert await settled(pool) == {}
        served = pool.changes.served("m")
        assert served is not None
        assert served.rows == 11


async def test_a_change_waits_for_an_order_that_is_being_carried_out(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m"), fake("n", fake_load_s=0.5)) as (pool, events):
        await pool.orders.load("m")
        swapping = asyncio.create_task(pool.orders.swap("m", "n"))
        await until(lambda: pool._slots.named("m").life.claim == "swap")
        begin(pool, "m", settings("m", rows=5))
        assert (await swapping).outcome == "flipped"
        assert await settled(pool) == {}
        assert (await answer(pool, "m"))[1]
        assert len([one for one in events if isinstance(one, SwapFinished)]) == 2


async def test_what_is_to_be_is_decided_when_an_order_that_was_being_carried_out_has_ended(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m"), fake("n", fake_load_s=0.5)) as (pool, _):
        await pool.orders.load("m")
        swapping = asyncio.create_task(pool.orders.swap("m", "n"))
        await until(lambda: pool._slots.named("m").life.claim == "swap")
        seen = list[str]()

        def decide(served: Model | None) -> Literal["stays"]:
            seen.append(served.name if served is not None else "")
            return "stays"

        pool.changes.begin("m", decide, needs_loader)
        assert (await swapping).outcome == "flipped"
        assert await settled(pool) == {}
        assert seen == ["n"]
        served = pool.changes.served("m")
        assert served is not None
        assert served.name == "n"


async def test_two_names_of_one_model_change_one_after_the_other(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m"), fake("n")) as (pool, _):
        await pool.orders.load("m")
        await pool.orders.swap("m", "n")
        begin(pool, "m", settings("n", rows=3))
        begin(pool, "n", settings("n", rows=4))
        assert await settled(pool) == {}
        assert (await answer(pool, "m"))[0] == (await answer(pool, "n"))[0]


async def test_an_operators_pin_outlasts_a_change_of_other_settings(tmp_path: Path) -> None:
    async with running(tmp_path, fake("m")) as (pool, _):
        await pool.orders.load("m")
        await pool.orders.pin("m", pinned=True)
        begin(pool, "m", settings("m", rows=3))
        assert await settled(pool) == {}
        assert pool._slots.named("m").pinned
        begin(pool, "m", settings("m", rows=3, pinned=True))
        await settled(pool)
        begin(pool, "m", settings("m", rows=3))
        await settled(pool)
        assert not pool._slots.named("m").pinned


async def test_a_stop_in_the_middle_leaves_no_process(tmp_path: Path) -> None:
    before = set(psutil.Process().children())  # a store that other tests use, too
    async with running(tmp_path, fake("m", fake_load_s=0.2)) as (pool, _):
        await pool.orders.load("m")
        begin(pool, "m", settings("m", rows=5))
        begin(pool, "n", settings("n", preload=True, fake_load_s=0.5))
        await until(lambda: pool._slots.named("m").life.claim == "swap")
    await until(lambda: set(psutil.Process().children()) <= before)
