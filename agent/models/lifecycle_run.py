"""Performs the effects of lifecycle.py on this node's slots, and feeds back what happened."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from agent.config import Live, Model
from agent.files.modelstore import ModelSpec, ModelStore
from agent.models import lifecycle as life
from agent.models.loaders import MARGIN_S, Loaders
from agent.models.memory_watch import MemoryWatch
from agent.models.room import Room
from agent.models.slot import Loaded, Slot, Slots
from agent.models.slot_view import loaded_event
from agent.tasks import Tasks
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger
from shared.records import Event, LoaderExited, ModelEvicted, ModelMissed

NO_ROOM = ("no_memory", "no_process")
"""Error codes of a load that may succeed later by itself; any other needs an operator."""

log = get_logger("agent.models")


class Lifecycles:
    """The only writer of ``Slot.life`` and ``Slot.loaded``."""

    def __init__(
        self,
        slots: Slots,
        store: ModelStore,
        loaders: Loaders,
        live: Live,
        *,
        budget_bytes: int,
        emit: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int],
    ) -> None:
        self._slots, self.store, self.loaders = slots, store, loaders
        self._live = live
        self._emit, self._clock, self._wall_ms = emit, clock, wall_ms
        self.tasks = Tasks()
        self.watch: MemoryWatch | None = None
        self.room = Room(
            slots,
            budget_bytes=budget_bytes,
            min_residency_s=lambda: live.now.memory.min_residency_s,
            evict=self._evict_for,
            clock=clock,
        )
        self.room.fused = lambda: store.fused

    def feed(self, slot: Slot, event: life.Event) -> bool:
        """Feed one event to a slot's state machine and begin its effects; False when it changed nothing."""
        if event == "due" and slot not in self._slots:
            return False  # a swap has taken its last name meanwhile
        before = slot.life
        slot.life, effects = life.step(before, event, self._clock())
        for effect in effects:
            self._perform(slot, effect, before)
        if not slot.life.loader and not slot.life.stopped:  # stop still has to end it
            slot.loaded = None
        if slot.life != before:
            slot.notify()
        return slot.life != before

    def take_over(self, slot: Slot, event: life.Started | life.Flipped, loaded: Loaded) -> None:
        """Let a warmed-up loader serve a slot if it is still needed, else kill it. No await: the flip is atomic."""
        slot.life, effects = life.step(slot.life, event, self._clock())
        if "serve" in effects:
            self._serve(slot, loaded)
        if "kill" in effects:
            loaded.process.kill()
        slot.notify()

    async def describe(self, model: Model) -> ModelSpec:
        """What a model needs. Raises Refused."""
        return await asyncio.to_thread(self.store.describe, model)

    async def load(self, slot: Slot, *, ordered: bool) -> None:
        """Load it and wait for the outcome. Raises RackError. If ``ordered``, models just loaded may be evicted."""
        if not self.feed(slot, life.Load()):
            raise Retryable(f"load {slot.name}: the agent is shutting down", code="stopping")
        await self._start(slot, slot.life.attempt, ordered=ordered)

    async def evict(self, slot: Slot, reason: str, for_model: str = "") -> None:
        """Evict it and wait until its memory is free. Raises Retryable when it is not ready or claimed."""
        before = slot.life.loader
        if not self.feed(slot, life.Evict(reason=reason, for_model=for_model)):
            raise Retryable(f"evict {slot.name}: it is being changed; try again", code="no_memory")
        while slot.life.leaving == before:
            await slot.changed.wait()

    async def _evict_for(self, slot: Slot, for_model: str) -> None:
        await self.evict(slot, "memory", for_model)

    # ---- effects ----

    def _perform(self, slot: Slot, effect: life.Effect, before: life.Life) -> None:
        now = slot.life
        match effect:
            case "start":
                if now.claim != "load" or now.retries:  # else load() awaits it itself
                    self.tasks.spawn(self._start_quietly(slot, now.attempt))
            case "retire" | "crashed":
                loaded = slot.loaded
                assert loaded is not None
                if effect == "crashed":
                    self._crashed(slot, loaded)
                    return
                self.loaders.retiring.append(loaded)  # now, or a stop before the task runs would miss it
                self.tasks.spawn(self._retire(slot, loaded, now))
            case "wake":
                delay_s = max(0.0, now.not_before_s - self._clock())
                asyncio.get_running_loop().call_later(delay_s, self.feed, slot, "due")
            case "gave_up":
                log.error("loader_restarts_stopped", model=slot.name, reason=now.reason)
            case "missed":
                self._missed(slot, before.departed)
            case "toggled":
                event = "model_closed" if now.closed_for else "model_reopened"
                log.info(event, model=slot.name, for_model=now.closed_for or before.closed_for)
            case "serve" | "kill":
                raise AssertionError("needs a loader: see take_over")

    async def _start_quietly(self, slot: Slot, attempt: int) -> None:
        """A start that no caller waits for: its failure shows in the state and the log."""
        with contextlib.suppress(RackError):
            await self._start(slot, attempt, ordered=False)

    async def _start(self, slot: Slot, attempt: int, *, ordered: bool) -> None:
        """Read the files, make room, start the loader. Raises RackError after updating the slot's state."""
        fault: life.Fault | None = "cancelled"
        reason = "cancelled"
        try:
            loaded = await self._started(slot, ordered=ordered)
            fault = None
        except RackError as error:
            fault, reason = _fault_of(error), error.message
            log.warning("model_load_failed", model=slot.name, code=error.code, reason=reason)
            raise
        except Exception as error:
            fault, reason = "unusable", f"load {slot.name}: unexpected {type(error).__name__}; see the log"
            log.error("model_load_failed", model=slot.name, exc_info=True)
            raise Refused(reason, code="bad_model") from None
        finally:
            if fault:
                self.feed(slot, life.StartFailed(attempt=attempt, fault=fault, reason=reason))
        self.take_over(slot, life.Started(attempt=attempt, version=loaded.spec.version), loaded)

    async def _started(self, slot: Slot, *, ordered: bool) -> Loaded:
        began = self._clock()
        if slot.life.claim == "swap":  # the swap has planned memory for both
            assert slot.spec is not None
            spec = slot.spec
        else:
            spec = slot.spec = await self.describe(slot.model)
            await self.room.make(spec, slot.name, excluding=slot, ordered=ordered)
            for other in self._slots:
                if other.life.closed_for in slot.names:  # it fits without evicting this one
                    self.feed(other, life.Close(for_model="", in_use=False, limit_s=0.0))
        process = await self.loaders.start(spec)
        now = self._clock()
        return Loaded(slot.name, spec, process, now, now - began)

    def _serve(self, slot: Slot, loaded: Loaded) -> None:
        slot.loaded = loaded
        slot.spec, slot.model = loaded.spec, loaded.spec.model
        slot.peak_bytes, slot.keep_alive_s = 0, loaded.spec.model.keep_alive_s
        self._slots.rename(slot, loaded.spec.model.name)
        self.tasks.spawn(self._watched(slot, loaded, slot.life.loader))
        if self.watch is not None and (relief := self.watch.on_loaded(loaded)) is not None:
            self.tasks.spawn(relief)
        self._emit(loaded_event(slot, loaded, self._wall_ms(), fused=self.store.fused))
        log.info("model_loaded", model=loaded.name, version=loaded.spec.version, seconds=round(loaded.load_s, 2))

    async def _watched(self, slot: Slot, loaded: Loaded, number: int) -> None:
        await loaded.process.ended.wait()
        if not loaded.process.stopping:
            self.feed(slot, life.Exited(loader=number, cause=loaded.process.cause))

    def _crashed(self, slot: Slot, loaded: Loaded) -> None:
        event = LoaderExited(
            t_ms=self._wall_ms(),
            model=slot.name,
            version=loaded.spec.version,
            cause=slot.life.last_exit,
            restarts=slot.life.restarts,
        )
        self._emit(event)
        log.error("loader_exited", model=event.model, cause=event.cause, restarts=event.restarts)
        self.tasks.spawn(self.loaders.take_window(loaded))  # its last report, not counted yet

    async def _retire(self, slot: Slot, loaded: Loaded, evicted: life.Life) -> None:
        """End a loader when its requests have ended; each has its own deadline. Whatever fails, the claim ends."""
        try:
            await self.loaders.retire(loaded, self._live.now.limits.request_s + MARGIN_S)
            self._evicted(slot, loaded, evicted)
        except Exception:
            log.error("model_eviction_failed", model=slot.name, exc_info=True)
        finally:
            self.feed(slot, life.Retired(loader=evicted.leaving))

    def _evicted(self, slot: Slot, loaded: Loaded, evicted: life.Life) -> None:
        now, demand = self._clock(), slot.demand
        event = ModelEvicted(
            t_ms=self._wall_ms(),
            model=slot.name,
            version=loaded.spec.version,
            reason=evicted.reason,
            for_model=evicted.evicted_for,
            bytes=loaded.spec.need_bytes,
            age_us=int((now - loaded.since_s) * 1e6),
            requests_last_hour=demand.last_hour(now),
            idle_us=None if demand.last_s is None else int((now - demand.last_s) * 1e6),
            reload_us=int(loaded.load_s * 1e6),
        )
        self._emit(event)
        log.info("model_evicted", model=event.model, reason=event.reason, for_model=event.for_model)

    def _missed(self, slot: Slot, departed: life.Departure | None) -> None:
        assert departed is not None
        event = ModelMissed(
            t_ms=self._wall_ms(),
            model=slot.name,
            version=departed.version,
            reason=departed.reason,
            after_us=int((self._clock() - departed.at_s) * 1e6),
        )
        self._emit(event)
        log.info("model_missed", model=event.model, reason=event.reason, after_s=round(event.after_us / 1e6, 1))

    async def stop(self, drain_s: float) -> None:
        """End every loader, after at most ``drain_s`` for requests in flight."""
        for slot in self._slots:
            slot.life, _ = life.step(slot.life, "stop", self._clock())
        await self.tasks.cancel()
        loaded = [*(slot.loaded for slot in self._slots if slot.loaded), *self.loaders.retiring]
        await asyncio.gather(*(self.loaders.retire(one, drain_s) for one in loaded))
        for slot in self._slots:
            slot.loaded = None
            slot.notify()


def _fault_of(error: RackError) -> life.Fault:
    return "no_room" if error.code in NO_ROOM else "died" if error.code == "loader_died" else "unusable"
