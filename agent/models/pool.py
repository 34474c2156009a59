"""The models resident on this node: leases on them, and waiting for a model that is not ready.

Decisions about models are made in lifecycle.py, eviction.py, load_order.py, memory_guard.py and swap.py. A request
keeps the loader that it leased, so no answer mixes two versions.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from agent.config import Live
from agent.files.modelstore import ModelStore
from agent.models import eviction
from agent.models import lifecycle as life
from agent.models.changes import Changes
from agent.models.figures import Figures
from agent.models.inventory import Inventory
from agent.models.lifecycle_run import Lifecycles
from agent.models.load_queue import LoadQueue
from agent.models.loaders import Loaders
from agent.models.memory_watch import MemoryWatch
from agent.models.orders import Orders
from agent.models.slot import Lease, Loaded, Slot, Slots
from agent.models.slot_view import model_view
from agent.process.prefixes import PrefixTable
from agent.views import ModelView
from shared.errors import Retryable
from shared.records import Event


class Pool:
    """All slots of this node. ``emit`` takes events for the next batch; ``orders``, ``changes`` and ``inventory`` are
    public."""

    def __init__(
        self,
        live: Live,
        store: ModelStore,
        loaders: Loaders,
        *,
        budget_bytes: int,
        emit: Callable[[Event], None],
        carried_by_peer: Callable[[str], bool],
        figures: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._loaders, self._clock = loaders, clock
        self._stopping = False
        slots = self._slots = Slots(live.now.models)
        runs = self._lifecycles = Lifecycles(
            *(slots, store, loaders), live, budget_bytes=budget_bytes, emit=emit, clock=clock, wall_ms=wall_ms
        )
        self.room = runs.room
        runs.watch = MemoryWatch(
            live, loaded=self._all_loaded, evict_idle=self._evict_cheapest, emit=emit, wall_ms=wall_ms
        )
        self._watch = runs.watch
        self._queue = LoadQueue(live, slots=slots, occupants=self.room.occupants, feed=runs.feed, clock=clock)
        self.orders = Orders(slots, runs, live, carried_by_peer=carried_by_peer, emit=emit, wall_ms=wall_ms)
        self._figures = Figures(
            *(figures, live, slots),
            retiring=lambda: bool(loaders.retiring),
            calm=lambda: self.memory_level == "calm" and not self._stopping,
            emit=emit,
            clock=clock,
            wall_ms=wall_ms,
        )
        loaders.before_change = self._figures.halt
        self.changes = Changes(slots, runs, self.orders)
        self.inventory = Inventory(slots, loaders, fused=lambda: store.fused, clock=clock)

    @property
    def refusing(self) -> bool:
        """Whether memory pressure is so high that new requests are rejected."""
        return self._watch.refusing

    @property
    def memory_level(self) -> str:
        """The memory guard's level: calm, soft or hard."""
        return self._watch.level

    @property
    def pressure(self) -> dict[str, object]:
        """The memory guard's view."""
        return self._watch.view

    def views(self) -> tuple[ModelView, ...]:
        """Every served name of this node, as routing sees it."""
        now = self._clock()
        return tuple(
            model_view(slot, name, now, refusing=self.refusing, versions=self._versions(slot))
            for slot in self._slots
            for name in slot.names
        )

    def has(self, name: str) -> bool:
        """Whether this node serves a name, whatever its state."""
        return self._slots.find(name) is not None

    def prefixes(self) -> dict[str, PrefixTable]:
        """Hashes of the prompts that each served name's loader received recently."""
        return {name: slot.loaded.process.prefixes for slot in self._slots if slot.loaded for name in slot.names}

    # ---- leases and waiting ----

    def lease(self, name: str, version: str = "") -> Lease:
        """Lease the loader behind a name, which stays the same one; with ``version``, one that can continue an answer
        of that version. Raises Retryable when none is ready, or the name is not served here any more: a reload may have
        taken it away since this node was chosen."""
        if (slot := self._slots.find(name)) is None:
            raise Retryable(f"model {name} is not served on this node any more", code="not_ready")
        loaded = slot.loaded if slot.ready else None
        if version:
            loaded = next((one for one in self._living(slot) if one.spec.version == version), None)
        if loaded is None:
            raise Retryable(f"model {name} is not ready on this node ({slot.life.state})", code="not_ready")
        self._figures.halt()
        slot.demand.asked(self._clock())
        return Lease(loaded, partial(self._used, slot, loaded))

    def _used(self, slot: Slot, loaded: Loaded) -> None:
        """A lease has ended."""
        slot.demand.ended(self._clock())
        if not loaded.process.in_flight:
            self._advance()

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """A request waits for a name; meanwhile, the model has its place in the load queue."""
        self._figures.halt()
        slot, since = self._slots.named(name), self._clock()
        slot.waiting.append(since)
        self._lifecycles.feed(slot, "wanted")
        try:
            yield
        finally:
            slot.waiting.remove(since)
            self._advance()

    async def wait_ready(self, name: str, timeout_s: float) -> bool:
        """Wait until a name is ready here, loading it when it is cold; False on a timeout or failure, or when
        it is not served here any more."""
        deadline = self._clock() + timeout_s
        with self.waiting(name):
            while (slot := self._slots.find(name)) is None or not slot.ready:
                if slot is None or not self.is_coming(name) or slot.life.phase == "failed" or self._clock() >= deadline:
                    return False
                self._advance()
                changed = slot.changed
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(1.0, max(0.0, deadline - self._clock()))):
                        await changed.wait()
            return True

    async def wait_for_version(self, name: str, version: str, timeout_s: float) -> bool:
        """Wait until exactly this version can continue an answer; False on a timeout or when none will."""
        deadline = self._clock() + timeout_s
        self._loaders.missed[version] += 1
        try:
            while (slot := self._slots.find(name)) is not None:
                if any(one.spec.version == version for one in self._living(slot)):
                    return True
                if self._clock() >= deadline or not self.can_continue(name, version):
                    break
                await asyncio.sleep(0.02)
            return False
        finally:
            self._loaders.missed[version] -= 1

    def can_continue(self, name: str, version: str) -> bool:
        """Whether this version is active here, restarting, or draining, and can continue its answers."""
        slot = self._slots.find(name)
        return not self._stopping and slot is not None and version in self._versions(slot)

    def is_coming(self, name: str) -> bool:
        """Whether waiting for a name may help: it is loading, swapping or restarting, or can be loaded."""
        if (slot := self._slots.find(name)) is None or (slot.life.phase == "cold" and not self.room.can_hold(slot)):
            return False
        return not self._stopping and (slot.life.phase != "failed" or bool(slot.life.claim))

    def _versions(self, slot: Slot) -> tuple[str, ...]:
        """Versions that can continue an answer that they began, now or once their loader has restarted."""
        found = {one.spec.version for one in self._loaders.retiring if one.name in slot.names}
        if slot.spec is not None and slot.life.state in ("starting", "ready"):
            found.add(slot.spec.version)
        return tuple(sorted(found))

    def _living(self, slot: Slot) -> list[Loaded]:
        retiring = [one for one in self._loaders.retiring if one.name in slot.names]
        return [one for one in (slot.loaded, *retiring) if one is not None and one.process.usable]

    # ---- start, maintenance, stop ----

    def start(self, first: Sequence[str] = ()) -> None:
        """Begin to load the models with ``preload``. Those in ``first`` are loaded one after another, so that each
        finds the room that is left by those before it, and then all others together."""
        preloaded = [slot for slot in self._slots if slot.model.preload]
        ahead = [slot for name in first for slot in preloaded if slot.name == name]
        others = [slot for slot in preloaded if slot not in ahead]
        if ahead:
            self._lifecycles.tasks.spawn(self._start_in_turn(ahead, others))
        else:
            self._preload(others)

    async def _start_in_turn(self, ahead: Sequence[Slot], others: Sequence[Slot]) -> None:
        for slot in ahead:
            self._preload([slot])
            while slot.life.claim:
                await slot.changed.wait()
        self._preload(others)

    def _preload(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self._lifecycles.feed(slot, life.Load(retries=True))

    async def maintain(self) -> None:
        """Once a second: unused models are evicted, the load queue advances, the memory guard measures."""
        now = self._clock()
        for slot in self._slots:
            if (idle_s := slot.idle_s(now)) is not None:
                self._lifecycles.feed(slot, life.Idle(idle_s=idle_s, keep_alive_s=slot.keep_alive_s))
        self._advance()
        await self._watch.read(self.room.budget_bytes)
        await self._figures.tick()

    async def stop(self, drain_s: float) -> None:
        """End every loader, after at most ``drain_s`` for requests in flight."""
        self._stopping = True
        await self.changes.stop()
        await self._lifecycles.stop(drain_s)

    def _advance(self) -> None:
        if not self._stopping:
            self._queue.advance(self.room.budget_bytes)

    def _evict_cheapest(self) -> None:
        if idle := [o for o in self.room.occupants() if not o.pinned and not o.leases]:
            slot = self._slots.named(min(idle, key=eviction.by_cost).name)
            if not slot.waiting:
                self._lifecycles.feed(slot, life.Evict(reason="pressure"))

    def _all_loaded(self) -> list[Loaded]:
        return [*(slot.loaded for slot in self._slots if slot.loaded is not None), *self._loaders.retiring]
