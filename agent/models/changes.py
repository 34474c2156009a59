"""Changes of the configured models while the agent runs: one that is new is served, one that is gone drains and leaves,
one with other files or settings is replaced without losing a request.

For each name the newest wish counts; what is being done is finished first. What failed stays a wish of which the status
tells, and is tried again with the next reload.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Literal

from agent.config import Model
from agent.models import eviction
from agent.models import lifecycle as life
from agent.models.lifecycle_run import Lifecycles
from agent.models.orders import Orders
from agent.models.slot import Slot, Slots
from agent.tasks import Tasks
from shared.errors import RackError, Refused
from shared.logs import get_logger

CONFLICTS, PAUSE_S = 20, 0.25
"""How often a change that met an order, or a loader that had just exited, is tried again."""
Decide = Callable[[Model | None], Model | Literal["stays"] | None]
"""Given how a name is served, how it is to be: None for not at all, or as it is. Called when nothing else
changes it."""
NeedsLoader = Callable[[Model, Model], bool]

log = get_logger("agent.models.changes")


class Changes:
    """``states`` tells what became of the last change of each model, for display: "" once it is done."""

    def __init__(self, slots: Slots, lifecycles: Lifecycles, orders: Orders) -> None:
        self._slots, self._lifecycles, self._orders = slots, lifecycles, orders
        self._wishes: dict[str, Decide] = {}
        self._at_work: set[str] = set()
        self._states: dict[str, str] = {}
        self._leaving: list[Slot] = []
        self._tasks = Tasks()

    @property
    def states(self) -> Mapping[str, str]:
        """By model: "changing", or why the last change failed; without those that succeeded."""
        return {slot.name: "changing" for slot in self._leaving} | self._states

    @property
    def failed(self) -> tuple[str, ...]:
        """Models whose last change failed."""
        return tuple(name for name in self._states if name not in self._at_work)

    def served(self, name: str) -> Model | None:
        """The settings with which a name is served now."""
        slot = self._slots.find(name)
        return slot.model if slot is not None else None

    def begin(self, name: str, decide: Decide, needs_loader: NeedsLoader) -> None:
        """Have a name served as is decided when its turn comes."""
        self._wishes[name], self._states[name] = decide, "changing"
        if name not in self._at_work:
            self._at_work.add(name)
            self._tasks.spawn(self._work(name, needs_loader))

    async def stop(self) -> None:
        """Begin nothing more."""
        await self._tasks.cancel()

    async def _work(self, name: str, needs_loader: NeedsLoader) -> None:
        try:
            while name in self._wishes:
                failed = await self._tried(name, self._wishes.pop(name), needs_loader)
                self._states[name] = failed
                if not failed:
                    del self._states[name]
        finally:
            self._at_work.discard(name)

    async def _tried(self, name: str, decide: Decide, needs_loader: NeedsLoader) -> str:
        """Why it failed; "" when it is done."""
        try:
            for left in reversed(range(CONFLICTS)):
                try:
                    await self._once(name, decide, needs_loader)
                    break
                except RackError as error:
                    if error.code != "conflict" or not left:
                        raise
                await asyncio.sleep(PAUSE_S)
        except RackError as error:
            log.warning("model_not_changed", model=name, reason=error.message)
            return error.message
        except Exception as error:
            log.error("model_not_changed", model=name, exc_info=True)
            return f"unexpected {type(error).__name__}; see the log"
        return ""

    async def _once(self, name: str, decide: Decide, needs_loader: NeedsLoader) -> None:
        slot = await self._unclaimed(name)
        wish = decide(slot.model if slot is not None else None)
        if wish == "stays":
            return
        if wish is None:
            self._remove(name, slot)
        elif slot is None:
            await self._add(wish)
        else:
            await self._change(name, slot, wish, others=needs_loader(slot.model, wish))
        log.info("model_changed", model=name, served=wish is not None)

    async def _unclaimed(self, name: str) -> Slot | None:
        """The slot behind a name, as soon as nothing else changes it; None if there is none."""
        while (slot := self._slots.find(name)) is not None and slot.life.claim:
            await slot.changed.wait()
        return slot

    async def _add(self, model: Model) -> None:
        self._orders.configured(model.name)
        self._slots.add(model)
        if model.preload:
            await self._loaded(self._slots.named(model.name), model.name)

    def _remove(self, name: str, slot: Slot | None) -> None:
        """Take the name away at once; the loader ends when its requests have ended, and nobody waits for that: the
        name may be wanted again before."""
        self._orders.configured(name)
        if slot is None:
            return
        if len(slot.names) > 1:
            slot.names.remove(name)  # others are served with these files
            return
        self._slots.leave(slot)
        self._leaving.append(slot)
        self._tasks.spawn(self._left(slot))

    async def _left(self, slot: Slot) -> None:
        try:
            if slot.loaded is not None and slot.life.phase == "ready":
                await self._lifecycles.evict(slot, "ordered")
        finally:
            self._lifecycles.feed(slot, "stop")  # it is not started again, whatever was planned
            self._slots.gone(slot)
            self._leaving.remove(slot)

    async def _change(self, name: str, slot: Slot, wish: Model, *, others: bool) -> None:
        self._orders.configured(name, wish)
        repinned = wish.pinned != slot.model.pinned  # else what an operator ordered stays
        if others and slot.loaded is not None:
            await self._replace(name, slot, wish)
        elif slot.loaded is None:
            slot.model, slot.spec = wish, None
            self._lifecycles.feed(slot, "adopt")
            if wish.preload:
                await self._loaded(slot, name)
        slot.model, slot.keep_alive_s = wish, wish.keep_alive_s
        if repinned:
            slot.pinned = wish.pinned

    async def _replace(self, name: str, slot: Slot, wish: Model) -> None:
        """Hot, or cold on a peer's account; else requests wait while one takes the place of the other."""
        try:
            finished = await self._orders.swap_to(name, wish, again=True)
        except Refused as error:
            if error.code != "no_memory":
                raise
            await self._in_its_place(name, slot, wish, error)
            return
        if finished.outcome != "flipped":
            raise Refused(f"{finished.reason}; it is served as before", code="swap_failed")

    async def _in_its_place(self, name: str, slot: Slot, wish: Model, refused: Refused) -> None:
        """Raises ``refused`` if it would not fit even alone; and what loading it raised, with the old one back."""
        before = slot.model
        spec = await self._lifecycles.describe(wish)
        if isinstance(self._lifecycles.room.alone(slot, spec), eviction.NoRoom):
            raise refused
        slot.model = wish  # whoever waits for it meanwhile has the new one loaded
        try:
            await self._lifecycles.evict(slot, "ordered")
            await self._loaded(slot, name)
        except RackError as error:
            slot.model = before
            self._lifecycles.feed(slot, "adopt")
            if slot.loaded is None:
                await self._loaded(slot, name)
            raise Refused(f"{error.message}; it is served as before", code="swap_failed") from None

    async def _loaded(self, slot: Slot, name: str) -> None:
        """Load it as at a start, and wait for the outcome. Raises Refused with the reason."""
        self._lifecycles.feed(slot, life.Load(retries=True))
        while slot.life.claim or slot.life.coming:
            await slot.changed.wait()
        if slot.loaded is None and (slot.life.reason or slot.life.phase == "failed"):
            raise Refused(slot.life.reason or f"load {name}: failed", code="bad_model")
