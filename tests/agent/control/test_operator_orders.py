"""An operator's orders on a real pool (fake engine): what is served after a restart, and what is never kept."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import AgentConfig, Live
from agent.control.follower import Follower
from agent.control.standing import Order
from agent.files.modelstore import ModelStore
from agent.models.loaders import Loaders
from agent.models.pool import Pool
from agent.wire.frames import Generate, Message, Tokens
from shared.desired import Assignment, DesiredState
from shared.errors import RackError, Refused, Retryable
from shared.store import ObjectStore


def fake(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "engine": "fake", "path": f"weights of {name}", "need_bytes": 10, **more}


ABC = (fake("a"), fake("b", preload=False), fake("c", preload=False))


def no_bucket() -> ObjectStore:
    raise Retryable("no bucket here")


class Node:
    """A pool and its follower."""

    def __init__(self, folder: Path, *models: dict[str, Any], budget: int = 100) -> None:
        limits = {"drain_s": 5.0}
        tree = {"node": {"id": "n1", "rack": "r"}, "store": {"path": "x"}, "models": list(models), "limits": limits}
        live = Live(msgspec.convert({**tree, "memory": {"min_residency_s": 0.0}}, AgentConfig))
        store = ModelStore(folder / "models.json", folder / "models")
        loaders = Loaders(live, os.environ, prompts=folder / "prompts", on_report=lambda model, _: None)
        self.pool = Pool(
            *(live, store, loaders), budget_bytes=budget, emit=lambda _: None, carried_by_peer=lambda _: False
        )
        self.follower = Follower(
            *(live, self.pool, store, no_bucket), folder / "desired.json", carried_by_peer=lambda _: False
        )
        self.orders = self.follower.orders

    @property
    def standing(self) -> dict[str, Order]:
        return dict(self.follower._adopted.orders)

    def now(self) -> list[tuple[str, str, bool, bool]]:
        """Names, files, whether in memory, whether pinned."""
        found = self.pool.inventory.status()
        return sorted(
            (" ".join(one["names"]), self.path(one["model"]), bool(one["version"]), bool(one["pinned"]))  # type: ignore[arg-type]
            for one in found
        )

    def path(self, name: Any) -> str:
        return self.pool.inventory.served(name).model.path.removeprefix("weights of ")

    async def settled(self) -> None:
        """Until nothing is being loaded: what is left watches a loader."""
        tasks, inventory = self.pool._lifecycles.tasks, self.pool.inventory
        await until(lambda: len(tasks) == sum(bool(one["version"]) for one in inventory.status()))


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not done():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def started(folder: Path, *models: dict[str, Any], budget: int = 100) -> AsyncIterator[Node]:
    node = await asyncio.to_thread(Node, folder, *models, budget=budget)
    try:
        await node.follower.prepare()
        node.pool.start(node.follower.in_force.loaded_first())
        await node.settled()
        yield node
    finally:
        await node.pool.stop(0.0)


async def given(node: Node, order: str) -> None:
    verb, *names = order.split()
    if verb in ("pin", "unpin"):
        await node.orders.pin(names[0], pinned=verb == "pin")
    elif verb == "swap":
        assert (await node.orders.swap(*names)).outcome == "flipped"
    else:
        await getattr(node.orders, verb)(names[0])


@pytest.mark.parametrize(
    "ordered",
    [
        "swap a b",
        "swap a b; pin a; swap a c",
        "swap a b; swap a a",
        "swap a b; swap b a",
        "swap a b; unload b",
        "unload a; load a; load b; swap b c; pin c",
        "swap a b; unload a; load c; swap c b",
        "load b; swap b c; unload b; swap a b; load c",
        "pin a; unload a; load b; pin b; unload b",
    ],
)
async def test_a_restart_serves_what_was_ordered(tmp_path: Path, ordered: str) -> None:
    async with started(tmp_path, *ABC) as node:
        for order in ordered.split("; "):
            await given(node, order)
        before = node.now()
    async with started(tmp_path, *ABC) as node:
        assert node.now() == before
    assert (ordered == "swap a b; swap a a") == (node.standing == {})


async def test_a_model_that_was_ordered_into_memory_is_loaded_before_those_that_it_displaced(tmp_path: Path) -> None:
    models = (fake("a", need_bytes=60), *(fake(name, need_bytes=60, preload=False) for name in "bc"))
    async with started(tmp_path, *models) as node:
        await given(node, "load b")
        await given(node, "load c")
        before = node.now()
        assert before[2] == ("c", "c", True, False)
    for _ in range(2):
        async with started(tmp_path, *models) as node:
            assert node.now() == before


async def test_clearing_serves_what_agent_toml_says_and_says_what_was_done(tmp_path: Path) -> None:
    async with started(tmp_path, *ABC) as node:
        before = node.now()
        for order in ("swap a b", "pin a", "load c"):
            await given(node, order)
        with pytest.raises(Refused, match="no order stands for it; orders stand for: a, c"):
            await node.orders.clear("x")
        (said,) = await node.orders.clear("b")
        assert said["model"] == "a", "by any of its names"
        assert said["ended"] == "swap to b, pin"
        assert "serves a again" in said["now"]
        assert "not pinned" in said["now"]
        (said,) = await node.orders.clear()
        assert said["now"] == "stays in memory until it is evicted"
        assert await node.orders.clear() == []
        await given(node, "unload c")
        assert (node.now(), node.standing) == (before, {})
        await given(node, "unload a")
        await node.orders.clear("a", later=True)
        assert not node.now()[0][2], "nothing has changed yet"
        await given(node, "load a")
        await given(node, "swap a b")
        (said,) = await node.orders.clear("a", later=True)
        assert said["now"] == "nothing changes now; for the next start agent.toml says a"
        for text in (node.follower.in_force.lasting("a"), node.follower.in_force.origins()["a"]["text"]):
            assert "serves b now, and a from the next start on" in text
    async with started(tmp_path, *ABC) as node:
        assert node.now() == before
        assert node.follower.in_force.origins()["a"] == {"by": "agent.toml", "text": "agent.toml"}


async def test_an_order_that_cannot_be_undone_stands_and_the_reason_is_said(tmp_path: Path) -> None:
    models = (fake("a", need_bytes=60), fake("b", need_bytes=10, preload=False))
    async with started(tmp_path, *models) as node:
        await given(node, "swap a b")
        node.pool.room.budget_bytes = 65
        (said,) = await node.orders.clear()
        assert "over the memory budget" in said["failed"]
        assert "orders clear a --later" in said["failed"]
        assert node.now()[0][:2] == ("a b", "b")
        assert "a" in node.standing
        await node.orders.clear(later=True)
        assert node.standing == {}


async def test_an_order_that_failed_is_not_kept(tmp_path: Path) -> None:
    models = (*ABC, fake("big", need_bytes=1000, preload=False), fake("ill", preload=False, probes="/no/such/file"))
    async with started(tmp_path, *models) as node:
        orders = node.orders
        for order in (
            lambda: orders.load("x"),
            lambda: orders.load("big"),
            lambda: orders.unload("b"),
            lambda: orders.swap("a", "a"),
            lambda: orders.swap("a", "x"),
            lambda: orders.swap("a", "ill"),
            lambda: orders.swap("b", "c"),
            lambda: orders.pin("x", pinned=True),
        ):
            with pytest.raises(RackError):
                await order()
        assert node.standing == {}
        assert not (tmp_path / "desired.json").exists()


async def test_a_swap_is_kept_when_it_flips_and_not_when_the_old_loader_has_drained(tmp_path: Path) -> None:
    """A long answer on the old loader: a crash meanwhile must not bring the old files back."""
    async with started(tmp_path, fake("a", fake_step_s=0.05), fake("b", preload=False)) as node:
        with node.pool.lease("a") as lease:
            words = (Message(role="user", content="hello"),)
            answer = lease.generate(Generate(id=0, model="a", messages=words, max_tokens=2000, temperature=0.0))
            async for one in answer:
                if isinstance(one, Tokens):
                    break
            swapping = asyncio.create_task(node.orders.swap("a", "b"))
            await until(lambda: (tmp_path / "desired.json").exists())
            assert not swapping.done()
            after = await asyncio.to_thread(Node, tmp_path, *ABC)
            assert after.standing["a"].swap is not None
            await answer.aclose()
        assert (await swapping).outcome == "flipped"


async def test_an_order_is_on_disk_when_its_answer_comes_whoever_waits(tmp_path: Path) -> None:
    async with started(tmp_path, *ABC) as node:
        leaving = asyncio.create_task(node.orders.load("b"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        await until(lambda: "b" in node.standing)
        await node.orders.pin("a", pinned=True)
        again = await asyncio.to_thread(Node, tmp_path, *ABC)
        assert set(again.standing) == {"a", "b"}


async def test_a_full_disk_is_said_and_the_order_is_kept_as_soon_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(tmp_path, *ABC) as node:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("agent.control.adopted.write_whole", full)
            await given(node, "swap a b")
            assert "NOT KEPT" in node.follower.in_force.lasting("a")
            assert any("No space left on device" in one for one in node.follower.in_force.warnings())
        await node.follower.tick()
        assert "lasts over restarts" in node.follower.in_force.lasting("a")
        assert node.follower.in_force.warnings() == []
    async with started(tmp_path, *ABC) as node:
        assert node.now()[0][:2] == ("a b", "b")


async def test_a_model_that_agent_toml_no_longer_has(tmp_path: Path) -> None:
    async with started(tmp_path, *ABC) as node:
        await given(node, "swap a b")
        await given(node, "load c")
    async with started(tmp_path, ABC[0]) as node:
        assert node.now() == [("a b", "b", True, False)], "its files are still there"
        (waits,) = [one for one in node.follower.in_force.listed() if one["model"] == "c"]
        assert "not configured any more" in waits["note"]
    async with started(tmp_path, *ABC[1:]) as node:
        assert node.now() == [("b", "b", False, False), ("c", "c", True, False)]
    async with started(tmp_path, *ABC) as node:
        assert node.now() == [("a b", "b", True, False), ("c", "c", True, False)]


async def test_what_governs_a_name(tmp_path: Path) -> None:
    async with started(tmp_path, *ABC) as node:
        governs = node.follower.governs
        assert [governs(name) for name in "abcx"] == ["", "", "", ""]
        await given(node, "swap a b")
        assert [governs(name) for name in "abcx"] == ["order", "order", "", ""]
        one = Assignment(model="a", source="weights of a", version="1" * 16)
        await asyncio.to_thread(node.follower._adopted.adopt, DesiredState(generation=1, nodes={"n1": (one,)}))
        assert [governs(name) for name in "abcx"] == ["desired", "", "", ""]
        assert "generation 1 of the desired state" in node.follower.in_force.origins()["a"]["text"]


async def test_an_order_that_was_begun_before_a_newer_generation_does_not_outlast_it(tmp_path: Path) -> None:
    async with started(tmp_path, ABC[0], fake("b", preload=False, fake_load_s=0.5)) as node:
        loading = asyncio.create_task(node.orders.load("b"))
        await asyncio.sleep(0.05)
        one = Assignment(model="a", source="weights of a", version="1" * 16)
        await asyncio.to_thread(node.follower._adopted.adopt, DesiredState(generation=1, nodes={"n1": (one,)}))
        await loading
        assert node.standing == {}


@pytest.mark.parametrize(
    ("new", "remedy"),
    [
        (
            "store:b",
            'add [[models]] with path = "store:b" and a name of its own to agent.toml, then `mlxrack-agent reload`',
        ),
        ("/models/b", 'add [[models]] with path = "/models/b" and a name of its own'),
        ("d", 'add [[models]] with name = "d" to agent.toml, then `mlxrack-agent reload`'),
    ],
)
async def test_a_swap_to_what_is_not_configured_says_how_to_configure_it(tmp_path: Path, new: str, remedy: str) -> None:
    async with started(tmp_path, fake("a", preload=False)) as node:
        with pytest.raises(Refused, match="is not configured \\(known: a\\)") as found:
            await node.orders.swap("a", new)
        assert remedy in found.value.message
