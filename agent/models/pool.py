"""The models in this node's memory: the only performer of loads and evictions, and the giver of leases.

Decisions are made elsewhere (eviction.py, turns.py, guard.py, swap.py), and two of them are performed elsewhere too
(line.py, memory_watch.py). What is served under a name is one attribute, ``Slot.loaded``; a flip is one assignment to
it, and a request keeps the loader it was leased, so no answer mixes two models.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from agent.config import AgentConfig, Model
from agent.files.modelstore import ModelSpec, ModelStore
from agent.files.probes import Probe
from agent.models import eviction
from agent.models.load_queue import Line
from agent.models.loaders import Loaders
from agent.models.memory_watch import MemoryWatch
from agent.models.slot import Gone, Lease, Loaded, Slot
from agent.models.swap_run import MARGIN_S, SwapRun
from agent.models.warmup import hear
from agent.process.footprint import footprint_bytes
from agent.process.prefixes import PrefixTable
from agent.views import Actual, ModelView
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger
from shared.records import (
    EngineWindow,
    Event,
    LoaderExited,
    ModelEvicted,
    ModelMissed,
    Resident,
    SwapFinished,
)

CRASHES_BEFORE_GIVING_UP = 5
CRASH_WINDOW_S = 120.0
KEPT_SWAPS = 20
AGAIN_S = 1.0
"""A load in turn that found no room after all is tried again after so long."""

log = get_logger("agent.models.pool")
T = TypeVar("T")


class Pool:
    """All slots of this node. ``emit`` takes events for the next batch."""

    def __init__(
        self,
        config: AgentConfig,
        store: ModelStore,
        loaders: Loaders,
        *,
        budget_bytes: int,
        emit: Callable[[Event], None],
        carried_by_peer: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._config = config
        self._store = store
        self._loaders = loaders
        self.budget_bytes = budget_bytes
        self._emit = emit
        self._carried_by_peer = carried_by_peer
        self._clock = clock
        self._wall_ms = wall_ms
        self._models = {m.name: m for m in config.models}
        self._slots = [Slot(m) for m in config.models]
        self._swaps: deque[SwapRun] = deque(maxlen=KEPT_SWAPS)
        self._watch = MemoryWatch(
            config.memory,
            loaded=self._all_loaded,
            leave=self._leave_cheapest,
            emit=emit,
            wall_ms=wall_ms,
        )
        self._line = Line(
            config.memory,
            slots=lambda: self._slots,
            occupants=self._occupants,
            load=lambda slot: self._spawn(self._load_in_turn(slot)),
            clock=clock,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._room = asyncio.Lock()

    # ---- what others ask ----

    @property
    def refusing(self) -> bool:
        """Whether memory is so short that new requests are turned away."""
        return self._watch.refusing

    def views(self) -> tuple[ModelView, ...]:
        """Every served name of this node, as routing sees it."""
        now = self._clock()
        return tuple(
            slot.view(name, now, refusing=self.refusing, versions=self._versions(slot))
            for slot in self._slots
            for name in slot.names
        )

    def has(self, name: str) -> bool:
        """Whether this node serves a name, whatever its state."""
        return any(name in slot.names for slot in self._slots)

    def prefixes(self) -> dict[str, PrefixTable]:
        """What each served name's loader was given lately."""
        return {name: slot.loaded.process.prefixes for slot in self._slots if slot.loaded for name in slot.names}

    @property
    def memory_level(self) -> str:
        """The memory guard's word: calm, soft or hard."""
        return self._watch.level

    def _versions(self, slot: Slot) -> tuple[str, ...]:
        """What can go on with an answer that it began, now or as soon as it is back."""
        found = {one.spec.version for one in self._loaders.retiring if one.name in slot.names}
        if slot.spec is not None and slot.state in ("starting", "ready"):
            found.add(slot.spec.version)
        return tuple(sorted(found))

    def _living(self, slot: Slot) -> list[Loaded]:
        retiring = [one for one in self._loaders.retiring if one.name in slot.names]
        return [one for one in (slot.loaded, *retiring) if one is not None and one.process.usable]

    def residents(self) -> list[Resident]:
        """What is in memory, for the batch."""
        return [
            Resident(
                model=slot.names[0],
                version=slot.spec.version if slot.spec else "",
                state=slot.state,
                pinned=slot.pinned,
                need_bytes=slot.spec.need_bytes if slot.spec else 0,
                footprint_bytes=footprint_bytes(slot.loaded.process.pid) if slot.loaded else None,
                restarts=slot.restarts,
            )
            for slot in self._slots
            if slot.state != "cold"
        ]

    def status(self) -> list[dict[str, object]]:
        """Every configured model, for a person."""
        now = self._clock()
        return [slot.status(now, fused=self._store.fused) for slot in self._slots]

    def actual(self) -> list[Actual]:
        """Every model of this node, as reconcile sees it."""
        return [
            Actual(
                model=slot.names[0],
                names=tuple(slot.names),
                version=slot.loaded.spec.version if slot.loaded else "",
                offers=slot.spec.version if slot.spec and slot.gone and slot.gone.reason != "ordered" else "",
                pinned=slot.pinned,
                changing=slot.changing.locked() or slot.state in ("starting", "draining"),
            )
            for slot in self._slots
        ]

    def path_of(self, name: str) -> str:
        """The files behind a name that is in memory; "" for one that is not."""
        slot = self._slot(name)
        return slot.model.path if slot.loaded else ""

    def swaps(self) -> list[dict[str, str]]:
        """The last swaps of this run, the newest last."""
        return [run.view for run in self._swaps]

    def pressure(self) -> dict[str, object]:
        """The memory guard's view."""
        return self._watch.view

    @contextlib.asynccontextmanager
    async def lease(self, name: str, version: str = "") -> AsyncIterator[Lease]:
        """Use of the loader behind a name, from now on the same one; with ``version`` to go on with an answer that it
        began. Raises Retryable when none is ready."""
        slot = self._slot(name)
        loaded = slot.loaded if slot.ready else None
        if version:
            loaded = next((one for one in self._living(slot) if one.spec.version == version), None)
        if loaded is None:
            raise Retryable(f"model {name} is not ready on this node ({slot.state})", code="not_ready")
        slot.demand.asked(self._clock())
        # counted before the first await: eviction and drain see it at once
        loaded.process.in_flight += 1
        try:
            yield Lease(loaded)
        finally:
            loaded.process.in_flight -= 1
            slot.demand.ended(self._clock())
            if not loaded.process.in_flight:
                self._advance()

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Somebody waits for a name; while so, its turn to come into memory draws nearer."""
        slot, since = self._slot(name), self._clock()
        slot.waiting.append(since)
        self._note_missed(slot)
        try:
            yield
        finally:
            slot.waiting.remove(since)
            self._advance()

    async def wanted(self, name: str, timeout_s: float) -> bool:
        """Wait until a name is ready here, loading it when it is cold; False when that took too long or failed."""
        deadline = self._clock() + timeout_s
        with self.waiting(name):
            while not (slot := self._slot(name)).ready:
                if not self.is_coming(name) or slot.state == "failed" or self._clock() >= deadline:
                    return False
                self._advance()
                changed = slot.changed
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(1.0, max(0.0, deadline - self._clock()))):
                        await changed.wait()
            return True

    async def wanted_back(self, name: str, version: str, timeout_s: float) -> bool:
        """Wait until exactly this version can go on with an answer; False when that took too long or cannot be."""
        slot, deadline = self._slot(name), self._clock() + timeout_s
        self._loaders.missed[version] += 1
        try:
            while all(one.spec.version != version for one in self._living(slot)):
                if self._clock() >= deadline or not self.comes_back(name, version):
                    return False
                await asyncio.sleep(0.02)
            return True
        finally:
            self._loaders.missed[version] -= 1

    def comes_back(self, name: str, version: str) -> bool:
        """Whether this version is served here, is being started again, or finishes what it has."""
        return not self._stopping and version in self._versions(self._slot(name))

    def is_coming(self, name: str) -> bool:
        """Whether waiting for a name may help: it is loading, swapping or restarting, or can be loaded."""
        slot = self._slot(name)
        if slot.state == "cold" and not self._can_come(slot):
            return False
        return not self._stopping and (slot.state != "failed" or slot.changing.locked())

    def _can_come(self, slot: Slot) -> bool:
        """Whether a model that is not in memory would have room if nobody used the others."""
        pinned = sum(s.occupied_bytes for s in self._slots if s is not slot and s.pinned and s.loaded is not None)
        return slot.planned_bytes + pinned <= self.budget_bytes

    async def windows(self) -> list[EngineWindow]:
        """What every loader did since the last call, those that ended meanwhile included."""
        await self.refresh()
        return self._loaders.windows()

    def windows_so_far(self) -> list[EngineWindow]:
        """What was asked for since the last call, which the next window will hold again."""
        return self._loaders.so_far()

    async def refresh(self) -> None:
        """Ask every loader what it did since it was last asked."""
        for loaded in [*(slot.loaded for slot in self._slots), *self._loaders.retiring]:
            if loaded is not None:
                await self._loaders.take_window(loaded)

    def reported_peak(self, name: str, peak_bytes: int) -> None:
        """MLX's highest since a loader was last asked."""
        for slot in self._slots:
            if name in slot.names:
                slot.peak_bytes = max(slot.peak_bytes, peak_bytes)

    def stalled(self, limit_s: float) -> list[str]:
        """Models whose loader has work and has said nothing for so long."""
        return [s.names[0] for s in self._slots if s.loaded is not None and s.loaded.process.silent_s > limit_s]

    async def answers(self, name: str) -> tuple[Probe, ...]:
        """A model's probes with the answers that it gives now, to be recorded. Raises RackError."""
        async with self.lease(name) as lease:
            asked = lease.spec.probes
            heard = [await hear(lease.process, probe.prompt, probe.max_tokens) for probe in asked]
        return tuple(
            Probe(prompt=probe.prompt, answer=one.text, max_tokens=probe.max_tokens)
            for probe, one in zip(asked, heard, strict=True)
        )

    # ---- what an operator orders ----

    def start(self) -> None:
        """Begin to load the models that are configured to be there from the start."""
        for slot in self._slots:
            if slot.model.preload:
                self._spawn(self._load_quietly(slot))

    async def load(self, name: str, *, ordered: bool = True) -> ModelSpec:
        """Bring a configured model into memory, evicting idle ones if need be. Raises Refused with the reason.

        What is ``ordered`` does not wait for models that have just come.
        An order that was begun is finished, here as in unload and swap, whether who gave it still listens or not.
        """
        return await self._finished(self._ordered_load(name, ordered=ordered))

    async def unload(self, name: str) -> None:
        """Drain and stop a model's loader."""
        await self._finished(self._ordered_unload(name))

    async def swap(self, old: str, new: str) -> SwapFinished:
        """Replace the files behind ``old`` by those of the configured model ``new`` without losing a request."""
        model = self._models.get(new)
        if model is None:
            known = ", ".join(self._models)
            raise Refused(f"swap {old} {new}: {new} is not configured; known: {known}", code="model_not_found")
        return await self.swap_to(old, model)

    async def swap_to(self, old: str, model: Model) -> SwapFinished:
        """Replace the files behind ``old`` by those of ``model``, configured or not."""
        return await self._finished(self._ordered_swap(old, model))

    def pin(self, name: str, *, pinned: bool) -> None:
        """A pinned model leaves memory by order alone."""
        self._slot(name).pinned = pinned

    async def pin_ordered(self, name: str, pinned: bool) -> None:
        """The same as an order."""
        self.pin(name, pinned=pinned)

    def adopt(self, model: Model) -> None:
        """Serve a name that is not configured, or another model under a configured one that is not in memory."""
        found = next((s for s in self._slots if model.name in s.names), None)
        self._models[model.name] = model
        if found is None:
            self._slots.append(Slot(model))
        elif found.loaded is None and not found.changing.locked():
            found.model, found.spec, found.pinned = model, None, model.pinned
            if found.state == "failed":
                found.become("cold")

    async def _finished(self, order: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(order)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # nobody will ask for the outcome; it stands in the status and the log
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def _ordered_load(self, name: str, *, ordered: bool) -> ModelSpec:
        slot = self._slot(name)
        async with slot.changing:
            slot = self._slot(name)
            if slot.loaded is None:
                await self._load(slot, ordered=ordered)
            assert slot.loaded is not None
            return slot.loaded.spec

    async def _ordered_unload(self, name: str) -> None:
        slot = self._slot(name)
        async with slot.changing:
            if slot.loaded is None:
                raise Refused(f"unload {name}: it is not in memory ({slot.state})", code="conflict")
            await self._evict(slot, reason="ordered")

    async def _ordered_swap(self, old: str, model: Model) -> SwapFinished:
        slot, new = self._slot(old), model.name
        if slot.changing.locked():
            raise Refused(f"swap {old}: it is loading or swapping already; see status", code="conflict")
        other = next((s for s in self._slots if s is not slot and new in s.names), None)
        if other is not None and (other.loaded is not None or other.changing.locked()):
            raise Refused(f"swap {old}: {new} is in memory itself, or on its way; unload it first", code="conflict")
        async with slot.changing, other.changing if other is not None else contextlib.nullcontext():
            return await self._swap(slot, model)

    async def stop(self, drain_s: float) -> None:
        """End every loader, after at most ``drain_s`` for requests in flight."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        loaded = [*(slot.loaded for slot in self._slots if slot.loaded), *self._loaders.retiring]
        await asyncio.gather(*(self._loaders.retire(one, drain_s) for one in loaded))
        for slot in self._slots:
            slot.loaded = None
            slot.become("cold")

    # ---- what is done by itself ----

    async def tend(self) -> None:
        """Once a second: models that nobody used for long leave, turns end, the memory guard reads."""
        now = self._clock()
        for slot in self._slots:
            if slot.idle_beyond_keep_alive(now) and not slot.changing.locked():
                self._spawn(self._leave(slot, "idle"))
        self._advance()
        await self._watch.read(self.budget_bytes)

    async def _leave(self, slot: Slot, reason: str) -> None:
        async with slot.changing:
            if slot.loaded is not None and not slot.leases and not slot.waiting and not self._stopping:
                await self._evict(slot, reason=reason)

    def _advance(self) -> None:
        """The next turn, when there is one."""
        if not self._stopping:
            self._line.advance(self.budget_bytes)

    def _leave_cheapest(self) -> None:
        idle = [o for o in self._occupants() if not o.pinned and not o.leases]
        if idle:
            self._spawn(self._leave(self._slot(min(idle, key=eviction.by_cost).name), "pressure"))

    def _all_loaded(self) -> list[Loaded]:
        return [*(slot.loaded for slot in self._slots if slot.loaded is not None), *self._loaders.retiring]

    # ---- loading ----

    async def _load_in_turn(self, slot: Slot) -> None:
        """A load whose turn it is. What fails for want of room is tried again, but not at once."""
        try:
            if slot.state == "cold":
                await self._load_quietly(slot)
        finally:
            slot.coming = False
            slot.not_before_s = 0.0 if slot.loaded is not None else self._clock() + AGAIN_S

    async def _load_quietly(self, slot: Slot) -> None:
        """A load nobody waits for: its failure is a state and a log line."""
        async with slot.changing:
            if slot.loaded is not None or self._stopping or slot not in self._slots:
                return
            try:
                await self._load(slot)
            except RackError as error:
                if not slot.died_starting:
                    return
                # killed while it started: a crash like any other, and whoever waits goes on waiting
                slot.crashes.append(self._clock())
                slot.become("starting", error.message)
                self._spawn(self._restart(slot))

    async def _load(self, slot: Slot, *, ordered: bool = False) -> None:
        slot.become("starting")
        began = self._clock()
        try:
            spec = await asyncio.to_thread(self._store.describe, slot.model)
            slot.spec = spec
            async with self._room:
                await self._make_room(spec, for_name=slot.names[0], but=slot, ordered=ordered)
            for other in [s for s in self._slots if s.closed_for in slot.names]:
                self._line.close(other, "", self._clock())  # there is room without it
            process = await self._loaders.start(spec)
        except RackError as error:
            # room may come back by itself; anything else needs somebody
            slot.become("cold" if error.code in ("no_memory", "no_process") else "failed", error.message)
            slot.died_starting = error.code == "loader_died"
            log.warning("model_load_failed", model=slot.names[0], code=error.code, reason=error.message)
            raise
        except Exception as error:
            reason = f"load {slot.names[0]}: {type(error).__name__}; the log has more"
            slot.become("failed", reason)
            log.error("model_load_failed", model=slot.names[0], exc_info=True)
            raise Refused(reason, code="bad_model") from None
        except BaseException:
            slot.become("cold")
            raise
        now = self._clock()
        self.take_over(slot, Loaded(slot.names[0], spec, process, now, now - began))

    def take_over(self, slot: Slot, loaded: Loaded) -> None:
        """Serve a slot's names by this loader from now on. The one assignment, and bookkeeping without an await."""
        if slot.spec is None or slot.spec.version != loaded.spec.version:
            slot.crashes.clear()  # other files, another story
        slot.loaded = loaded
        slot.spec, slot.model = loaded.spec, loaded.spec.model
        new = loaded.spec.model.name
        for other in [s for s in self._slots if s is not slot and new in s.names]:
            other.names.remove(new)
            if not other.names:
                self._slots.remove(other)
        if new not in slot.names:
            slot.names.append(new)
        slot.in_rotation, slot.closed_for, slot.peak_bytes, slot.gone = True, "", 0, None
        slot.keep_alive_s = loaded.spec.model.keep_alive_s
        slot.become("ready")
        self._spawn(self._watched(slot, loaded))
        if (told := self._watch.greet(loaded)) is not None:
            self._spawn(told)
        self._emit(slot.loaded_event(self._wall_ms(), fused=self._store.fused))
        log.info("model_loaded", model=loaded.name, version=loaded.spec.version, seconds=round(loaded.load_s, 2))

    def withdraw(self, slot: Slot) -> None:
        """Serve a slot's names here no longer."""
        slot.loaded = None

    async def _make_room(
        self, spec: ModelSpec, *, for_name: str, but: Slot | None = None, ordered: bool = False
    ) -> None:
        """Evict what eviction.make_room names. Raises Refused with the missing bytes."""
        while not isinstance(decision := self._room_for(spec, but, ordered=ordered), eviction.Fits):
            if isinstance(decision, eviction.Evict):
                # decided and locked without an await in between, one at a time: a slot that is being changed is never
                # waited for, and one that came into use meanwhile is not taken
                victim = self._slot(decision.victims[0])
                async with victim.changing:
                    await self._evict(victim, reason="memory", for_model=for_name)
                continue
            raise Refused(
                f"load {for_name}: {decision.missing_bytes / 1e6:.0f} MB short of {self.budget_bytes / 1e6:.0f} MB; "
                f"in use, pinned or just loaded: {', '.join(decision.kept) or 'nothing'}",
                code="no_memory",
            )

    def _room_for(
        self, spec: ModelSpec, but: Slot | None, *, ordered: bool
    ) -> eviction.Fits | eviction.Evict | eviction.NoRoom:
        now = float("inf") if ordered else self._clock()
        return eviction.make_room(spec.need_bytes, self._occupants(but=but), self.budget_bytes, now_s=now)

    def _occupants(self, but: Slot | None = None) -> list[eviction.Occupant]:
        now = self._clock()
        return [
            slot.occupant(now, self._config.memory.min_residency_s)
            for slot in self._slots
            if slot.occupied_bytes and slot is not but
        ]

    async def _evict(self, slot: Slot, *, reason: str, for_model: str = "") -> None:
        """Take a model out of memory when its requests have ended; each has a deadline of its own."""
        loaded = slot.loaded
        assert loaded is not None
        slot.loaded = None
        slot.become("draining")
        await self._loaders.retire(loaded, self._config.limits.request_s + MARGIN_S)
        slot.closed_for = ""
        slot.become("cold")
        now = self._clock()
        slot.gone = Gone(now, self._wall_ms(), loaded.spec.version, reason)
        event = ModelEvicted(
            t_ms=slot.gone.t_ms,
            model=slot.names[0],
            version=loaded.spec.version,
            reason=reason,
            for_model=for_model,
            bytes=loaded.spec.need_bytes,
            age_us=int((now - loaded.since_s) * 1e6),
            requests_last_hour=slot.demand.last_hour(now),
            idle_us=None if slot.demand.last_s is None else int((now - slot.demand.last_s) * 1e6),
            reload_us=int(loaded.load_s * 1e6),
        )
        self._emit(event)
        log.info("model_evicted", model=event.model, version=event.version, reason=reason, for_model=for_model)

    def _note_missed(self, slot: Slot) -> None:
        gone, slot.gone = slot.gone, None
        if gone is None:
            return
        event = ModelMissed(
            t_ms=self._wall_ms(),
            model=slot.names[0],
            version=gone.version,
            reason=gone.reason,
            after_us=int((self._clock() - gone.at_s) * 1e6),
        )
        self._emit(event)
        log.info("model_missed", model=event.model, reason=event.reason, after_s=round(event.after_us / 1e6, 1))

    # ---- a loader that ends by itself ----

    async def _watched(self, slot: Slot, loaded: Loaded) -> None:
        await loaded.process.ended.wait()
        if loaded.process.stopping or slot.loaded is not loaded or self._stopping:
            return
        slot.loaded = None
        slot.restarts += 1
        slot.last_exit = loaded.process.cause
        now = self._clock()
        slot.crashes.append(now)
        while slot.crashes and slot.crashes[0] < now - CRASH_WINDOW_S:
            slot.crashes.popleft()
        slot.become("starting", f"the loader ended ({slot.last_exit}); starting again")
        event = LoaderExited(
            t_ms=self._wall_ms(),
            model=slot.names[0],
            version=loaded.spec.version,
            cause=slot.last_exit,
            restarts=slot.restarts,
        )
        self._emit(event)
        log.error("loader_exited", model=event.model, cause=event.cause, restarts=event.restarts)
        await self._loaders.take_window(loaded)  # what it said late, and nobody has heard yet
        await self._restart(slot)

    async def _restart(self, slot: Slot) -> None:
        if len(slot.crashes) >= CRASHES_BEFORE_GIVING_UP:
            reason = (
                f"the loader ended {len(slot.crashes)} times in {CRASH_WINDOW_S:.0f} s ({slot.last_exit}); given up"
            )
            slot.become("failed", reason)
            log.error("loader_given_up", model=slot.names[0], reason=reason)
            return
        await asyncio.sleep(min(8.0, 0.5 * (2.0 ** (len(slot.crashes) - 1)) - 0.5))
        if slot.swapping:
            if slot.in_rotation:  # a cold swap stops it anyway
                await self._revive(slot)
            return
        await self._load_quietly(slot)

    async def _revive(self, slot: Slot) -> None:
        """Start the active loader again while a swap is under way, which holds the slot; the standby may be first."""
        assert slot.spec is not None
        spec, began = slot.spec, self._clock()
        slot.reviving = True
        try:
            process = await self._loaders.start(spec)
        except RackError as error:
            log.warning("model_load_failed", model=slot.names[0], code=error.code, reason=error.message)
            slot.crashes.append(self._clock())
            slot.reviving = False
            await self._restart(slot)
            return
        finally:
            slot.reviving = False
        if slot.loaded is None and slot in self._slots and not self._stopping:
            now = self._clock()
            self.take_over(slot, Loaded(slot.names[0], spec, process, now, now - began))
        else:
            process.kill()

    # ---- swapping ----

    async def _swap(self, slot: Slot, model: Model) -> SwapFinished:
        old = slot.loaded
        if old is None:
            raise Refused(f"swap {slot.names[0]}: it is not in memory ({slot.state}); load it first", code="conflict")
        spec = await asyncio.to_thread(self._store.describe, model)
        if spec.version == old.spec.version and slot.loaded is not None:
            raise Refused(f"swap {slot.names[0]}: {model.name} is the version that serves already", code="conflict")
        cold = self._must_be_cold(slot, spec)
        try:
            if not cold:
                async with self._room:
                    await self._make_room(spec, for_name=model.name, ordered=True)
                    slot.standby_bytes = spec.need_bytes
            else:
                slot.standby_bytes = max(0, spec.need_bytes - old.spec.need_bytes)
            finished = await self._performed(slot, old, spec, cold=cold)
        finally:
            slot.standby_bytes, slot.swapping, slot.in_rotation = 0, False, True
            if slot.loaded is None and not slot.reviving and not self._stopping:
                # the active loader ended meanwhile, and nothing took its place
                slot.become("starting", slot.reason)
                self._spawn(self._load_quietly(slot))
        self._emit(finished)
        return finished

    async def _performed(self, slot: Slot, old: Loaded, spec: ModelSpec, *, cold: bool) -> SwapFinished:
        if slot.loaded is not old:
            raise Refused(f"swap {slot.names[0]}: its loader has just ended; try again", code="conflict")
        run = SwapRun(
            self,
            self._loaders,
            slot,
            spec,
            request_s=self._config.limits.request_s,
            wall_ms=self._wall_ms,
            clock=self._clock,
        )
        self._swaps.append(run)
        slot.swapping = True
        return await run.run(cold=cold)

    def _must_be_cold(self, slot: Slot, spec: ModelSpec) -> bool:
        """Hot when both fit, cold when only one does and a peer carries the model. Raises Refused otherwise."""
        occupants, budget = self._occupants(), self.budget_bytes
        beside = eviction.make_room(spec.need_bytes, occupants, budget)
        if not isinstance(beside, eviction.NoRoom):
            return False
        name = slot.names[0]
        instead = eviction.make_room(spec.need_bytes, self._occupants(but=slot), budget, may_evict=False)
        short = f"{beside.missing_bytes / 1e6:.0f} MB short of holding both"
        if isinstance(instead, eviction.NoRoom):
            missing = instead.missing_bytes / 1e6
            raise Refused(f"swap {name}: {short}, and {missing:.0f} MB short without the old one", code="no_memory")
        if not self._carried_by_peer(name):
            raise Refused(f"swap {name}: {short}, and no peer serves {name} meanwhile", code="no_memory")
        return True

    def _slot(self, name: str) -> Slot:
        for slot in self._slots:
            if name in slot.names:
                return slot
        known = ", ".join(sorted(n for slot in self._slots for n in slot.names)) or "none"
        raise Refused(f"model {name}: not configured on this node; known: {known}", code="model_not_found")

    def _spawn(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
