"""Carries out what an operator orders on this node, and keeps it: an order lasts until a newer generation of the
desired state, another order, or ``clear``. ``agent.control.standing`` decides what an order means.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from agent.control import standing
from agent.control.adopted import Adopted
from agent.control.in_force import InForce
from agent.control.standing import Base, Change, Order, Swapped, Switch
from agent.files.modelstore import ModelSpec, ModelStore
from agent.models.pool import Pool
from agent.tasks import Tasks
from shared.errors import RackError, Refused
from shared.logs import get_logger
from shared.records import SwapFinished

log = get_logger("agent.control.orders")
T = TypeVar("T")


class OperatorOrders:
    """Whoever gave an order may leave: it is completed and kept. When its method returns it is on disk, or
    ``InForce.lasting`` says why not."""

    def __init__(
        self,
        pool: Pool,
        models: ModelStore,
        adopted: Adopted,
        in_force: InForce,
        *,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._pool, self._models, self._adopted, self._in_force = pool, models, adopted, in_force
        self._wall_ms = wall_ms
        self._tasks = Tasks()
        self._recording = asyncio.Lock()

    # ---- orders ----

    async def load(self, name: str) -> ModelSpec:
        """Load a model. Raises RackError."""
        return await self._tasks.finish(self._done(self._pool.orders.load(name), name, self._switch("resident", True)))

    async def unload(self, name: str) -> None:
        """Unload a model. Raises RackError."""
        await self._tasks.finish(self._done(self._pool.orders.unload(name), name, self._switch("resident", False)))

    async def pin(self, name: str, *, pinned: bool) -> None:
        """Pin or unpin a model. Raises RackError."""
        order = self._pool.orders.pin(name, pinned=pinned)
        await self._tasks.finish(self._done(order, name, self._switch("pinned", pinned)))

    async def swap(self, old: str, new: str) -> SwapFinished:
        """Replace the files behind a name. Raises RackError."""
        return await self._tasks.finish(self._swap(old, new))

    async def clear(self, name: str = "", *, later: bool = False) -> list[dict[str, str]]:
        """End the orders for a model, or all, and do what holds without them, without losing a request; ``later``
        leaves that to the next start. Each as ``model``, ``ended``, ``now``, and ``failed`` for one that stands because
        that is impossible. Raises Refused where there is no order for the model."""
        return await self._tasks.finish(self._clear(self._which(name) if name else list(self._adopted.orders), later))

    # ---- at a start ----

    async def prepare(self) -> None:
        """Serve what was ordered, where its files are still there. Before the first model is loaded."""
        for name, order in self._adopted.orders.items():
            if order.swap is not None:
                await self._examine(name, order.swap)
        for start in self._in_force.starts():
            if start.order != Order():
                log.info("order_in_force", model=start.names[0], reason=standing.origin(start))
                self._pool.orders.adopt_swapped(start.model, start.names)

    async def _examine(self, name: str, swap: Swapped) -> None:
        if (start := self._in_force.start(name)) is None:
            return
        try:
            found = await asyncio.to_thread(self._models.describe, start.model)
        except RackError as error:
            self._in_force.lost[name] = error.message
            log.error("order_not_in_force", model=name, reason=error.message)
            return
        if swap.version and found.version != swap.version:
            why = f"its files have changed since: {swap.version[:8]} is {found.version[:8]} now"
            self._in_force.changed[name] = why
            log.warning("ordered_files_changed", model=name, reason=why)

    # ---- doing ----

    async def _done(self, order: Coroutine[Any, Any, T], name: str, note: Callable[[str], Change]) -> T:
        before = self._adopted.desired
        found = await order
        key = self._in_force.own_name(name)
        await self._note(key, note(key), before)
        return found

    def _switch(self, what: standing.Said, on: bool) -> Callable[[str], Change]:
        def note(key: str) -> Change:
            switch, bases = Switch(on=on, at_ms=self._wall_ms()), self._in_force.bases()
            return lambda orders: standing.switched(orders, key, what, switch, bases)

        return note

    async def _swap(self, old: str, new: str) -> SwapFinished:
        before, noted = self._adopted.desired, list[asyncio.Future[None]]()

        def flipped() -> None:
            """At once: the old loader may drain for minutes, and a crash meanwhile must not bring its files back."""
            now = self._pool.inventory.served(old)
            table = msgspec.to_builtins(now.model)
            swap = Swapped(table=table, version=now.version, names=now.names, at_ms=self._wall_ms())
            key, bases = now.names[0], self._in_force.bases()
            self._in_force.lost.pop(key, None)
            self._in_force.changed.pop(key, None)
            change = functools.partial(standing.swapped, name=key, swap=swap, bases=bases)
            noted.append(self._tasks.spawn(self._note(key, change, before)))

        finished = await self._pool.orders.swap(old, new, flipped=flipped)
        for one in noted:
            await one
        return finished

    async def _note(self, key: str, change: Change, before: object) -> None:
        """In force at once, then on disk. An order that was begun before a newer generation came does not outlast
        it."""
        if self._adopted.desired is not before and self._adopted.follows:
            log.info("order_ended", model=key, reason="a newer generation of the desired state came meanwhile")
            return
        self._adopted.change(change)
        async with self._recording:
            await asyncio.to_thread(self._adopted.keep)

    async def keep(self) -> None:
        """Try again what the disk refused."""
        if self._adopted.unkept:
            async with self._recording:
                await asyncio.to_thread(self._adopted.keep)

    async def forget_unreadable(self) -> None:
        """Drop the file that could not be read at a start."""
        await asyncio.to_thread(self._adopted.forget_unreadable)

    # ---- ending ----

    def _which(self, name: str) -> list[str]:
        orders = self._adopted.orders
        key = name if name in orders else self._in_force.own_name(name)
        if key not in orders:
            known = ", ".join(orders) or "none"
            raise Refused(f"orders clear {name}: no order stands for it; orders stand for: {known}", code="not_found")
        return [key]

    async def _clear(self, names: Sequence[str], later: bool) -> list[dict[str, str]]:
        ended = []
        for name in names:
            order = self._adopted.orders.get(name, Order())
            said = {"model": name, "ended": standing.kinds(order)}
            try:
                now = await self._undone(name, order, later)
            except RackError as error:
                why = f"{error.message}; the order stands, `mlxrack-agent orders clear {name} --later` ends it without"
                ended.append({**said, "failed": f"{why} a swap, and the next start does what it does without orders"})
                continue
            await self._note(name, functools.partial(standing.ended, name=name, order=order), self._adopted.desired)
            self._in_force.lost.pop(name, None)
            self._in_force.changed.pop(name, None)
            ended.append({**said, "now": now})
        return ended

    async def _undone(self, name: str, order: Order, later: bool) -> str:
        """Do what holds without an order; what was done, in words. Raises RackError."""
        base, start = self._in_force.base(name), self._in_force.start(name)
        if later:
            return f"nothing changes now; for the next start {standing.instead(order, base)}" if base else "it waited"
        if base is None or start is None:
            return "it was not in force"
        if self._adopted.follows:
            return f"{base.says} is followed again within seconds to minutes (desired.follow_s)"
        found = [await self._files_again(name, base)] if order.swap is not None else []
        if order.pinned is not None:
            await self._pool.orders.pin(name, pinned=base.model.pinned)
            found.append("pinned" if base.model.pinned else "not pinned")
        if order.resident is not None:
            found.append(await self._resident_again(name, base))
        return ", ".join(one for one in found if one)

    async def _files_again(self, name: str, base: Base) -> str:
        now = self._pool.inventory.served(name)
        if now.names == (name,) and now.model.path == base.model.path:
            return f"serves {name} already"
        if not now.version:
            self._pool.orders.adopt_swapped(base.model, (name,))
            return f"serves {name} again, when it is loaded"
        finished = await self._swap(name, name)
        if finished.outcome != "flipped":
            raise Refused(f"orders clear {name}: {finished.reason}", code="conflict")
        return f"serves {name} again ({finished.to_version[:8]}, hot swap)"

    async def _resident_again(self, name: str, base: Base) -> str:
        loaded = bool(self._pool.inventory.served(name).version)
        if not base.model.preload:
            return "stays in memory until it is evicted" if loaded else "loaded on demand"
        if not loaded:
            await self._pool.orders.load(name)
        return "loaded"
