"""The models in this node's memory: the only performer of loads, swaps and evictions, and the giver of leases.

Decisions are made elsewhere (eviction.py, swap.py). What is served under a name is one attribute, ``Slot.loaded``;
a flip is one assignment to it, and a request keeps the loader it was leased, so no answer mixes two models.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from agent import eviction, swap
from agent.config import AgentConfig, Model
from agent.frames import Done, Failed, Generate, Message, Reported
from agent.loader_process import LoaderProcess, LoaderSpec, total_of
from agent.modelstore import ModelSpec, ModelStore
from agent.routing import ModelView
from agent.slot import Lease, Loaded, Slot, footprint_bytes, window_of
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger
from shared.records import (
    EngineWindow,
    Event,
    LoaderExited,
    ModelEvicted,
    ModelLoaded,
    Resident,
    SwapFinished,
)
from shared.secrets import resolve

PROBES = 5
"""Requests a standby must answer before it takes over."""
STOP_GRACE_S = 10.0
CRASHES_BEFORE_GIVING_UP = 5
CRASH_WINDOW_S = 120.0
_HOUR_S = 3600.0

log = get_logger("agent.pool")
T = TypeVar("T")


class Pool:
    """All slots of this node. ``emit`` takes events for the next batch."""

    def __init__(
        self,
        config: AgentConfig,
        store: ModelStore,
        environ: Mapping[str, str],
        *,
        prompts: Path,
        budget_bytes: int,
        threads: int,
        emit: Callable[[Event], None],
        carried_by_peer: Callable[[str], bool],
        on_report: Callable[[str, Reported], None] = lambda model, reported: None,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._config = config
        self._store = store
        self._environ = environ
        self._prompts = prompts
        self.budget_bytes = budget_bytes
        self._threads = threads
        self._emit = emit
        self._carried_by_peer = carried_by_peer
        self._on_report = on_report
        self._clock = clock
        self._wall_ms = wall_ms
        self._models = {m.name: m for m in config.models}
        self._slots = [Slot(m) for m in config.models]
        self._reports: dict[tuple[str, str], Reported] = {}
        self._swaps: dict[str, swap.SwapState] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._retiring: list[Loaded] = []
        self._room = asyncio.Lock()

    # ---- what others ask ----

    def views(self) -> tuple[ModelView, ...]:
        """Every served name of this node, as routing sees it."""
        return tuple(
            ModelView(
                name=name,
                version=slot.loaded.spec.version if slot.loaded else "",
                ready=slot.ready,
                coming=slot.state == "starting" or (slot.loaded is not None and not slot.ready),
                in_flight=slot.leases,
            )
            for slot in self._slots
            for name in slot.names
        )

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
        return [
            {
                "model": slot.names[0],
                "names": slot.names,
                "state": slot.state if slot.in_rotation else "out of rotation",
                "reason": slot.reason,
                "version": slot.loaded.spec.version if slot.loaded else "",
                "pid": slot.loaded.process.pid if slot.loaded else None,
                "in_flight": slot.leases,
                "pinned": slot.pinned,
                "need_bytes": slot.spec.need_bytes if slot.spec else None,
                "footprint_bytes": footprint_bytes(slot.loaded.process.pid) if slot.loaded else None,
                "restarts": slot.restarts,
                "last_exit": slot.last_exit,
                "silent_s": round(slot.loaded.process.silent_s, 1) if slot.loaded else 0.0,
                "blas": slot.loaded.process.ready.blas if slot.loaded and slot.loaded.process.ready else "",
            }
            for slot in self._slots
        ]

    def swaps(self) -> list[swap.SwapState]:
        """Swaps of this run, the newest last."""
        return list(self._swaps.values())

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Lease]:
        """Use of the loader behind a name, from now on the same one. Raises Retryable when none is ready."""
        slot = self._slot(name)
        loaded = slot.loaded
        if loaded is None or not slot.ready:
            raise Retryable(f"model {name} is not ready on this node ({slot.state})", code="worker_lost")
        now = self._clock()
        slot.last_used_s = now
        slot.requests.append(now)
        while slot.requests and slot.requests[0] < now - _HOUR_S:
            slot.requests.popleft()
        # counted before the first await: eviction and drain see it at once
        loaded.process.in_flight += 1
        try:
            yield Lease(loaded)
        finally:
            loaded.process.in_flight -= 1

    async def wanted(self, name: str, timeout_s: float) -> bool:
        """Wait until a name is ready here, loading it when it is cold; False when that took too long or failed."""
        slot = self._slot(name)
        deadline = self._clock() + timeout_s
        if slot.state == "cold" and not slot.changing.locked():
            self._spawn(self._load_quietly(slot))
        while not (slot := self._slot(name)).ready:
            if slot.state == "failed" or self._clock() >= deadline or self._stopping:
                return False
            changed = slot.changed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, max(0.0, deadline - self._clock()))):
                    await changed.wait()
        return True

    def is_coming(self, name: str) -> bool:
        """Whether waiting for a name may help: it is loading, swapping or restarting, or can be loaded."""
        slot = self._slot(name)
        return not self._stopping and (slot.state != "failed" or slot.changing.locked())

    async def windows(self) -> list[EngineWindow]:
        """What every loader did since the last call, those that ended meanwhile included."""
        await self.refresh()
        taken, self._reports = self._reports, {}
        return [window_of(model, version, reported) for (model, version), reported in taken.items()]

    async def refresh(self) -> None:
        """Ask every loader what it did since it was last asked."""
        for slot in self._slots:
            if slot.loaded is not None:
                await self._take_window(slot.loaded)

    def stalled(self, limit_s: float) -> list[str]:
        """Models whose loader has work and has said nothing for so long."""
        return [s.names[0] for s in self._slots if s.loaded is not None and s.loaded.process.silent_s > limit_s]

    # ---- what an operator orders ----

    def start(self) -> None:
        """Begin to load the models that are configured to be there from the start."""
        for slot in self._slots:
            if slot.model.preload:
                self._spawn(self._load_quietly(slot))

    async def load(self, name: str) -> ModelSpec:
        """Bring a configured model into memory, evicting idle ones if need be. Raises Refused with the reason.

        An order that was begun is finished, here as in unload and swap, whether who gave it still listens or not.
        """
        return await self._finished(self._ordered_load(name))

    async def unload(self, name: str) -> None:
        """Drain and stop a model's loader."""
        await self._finished(self._ordered_unload(name))

    async def swap(self, old: str, new: str) -> SwapFinished:
        """Replace the files behind ``old`` by those of the configured model ``new`` without losing a request."""
        return await self._finished(self._ordered_swap(old, new))

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

    async def _ordered_load(self, name: str) -> ModelSpec:
        slot = self._slot(name)
        async with slot.changing:
            slot = self._slot(name)
            if slot.loaded is None:
                await self._load(slot)
            assert slot.loaded is not None
            return slot.loaded.spec

    async def _ordered_unload(self, name: str) -> None:
        slot = self._slot(name)
        async with slot.changing:
            if slot.loaded is None:
                raise Refused(f"unload {name}: it is not in memory ({slot.state})", code="conflict")
            await self._evict(slot, reason="ordered", for_model="")

    async def _ordered_swap(self, old: str, new: str) -> SwapFinished:
        slot = self._slot(old)
        model = self._models.get(new)
        if model is None:
            raise Refused(
                f"swap {old} {new}: {new} is not configured; known: {', '.join(self._models)}", code="model_not_found"
            )
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
        loaded = [*(slot.loaded for slot in self._slots if slot.loaded), *self._retiring]
        await asyncio.gather(*(self._retire(one, drain_s) for one in loaded))
        for slot in self._slots:
            slot.loaded = None
            slot.become("cold")

    # ---- loading ----

    async def _load_quietly(self, slot: Slot) -> None:
        """A load nobody waits for: its failure is a state and a log line."""
        async with slot.changing:
            if slot.loaded is not None or self._stopping or slot not in self._slots:
                return
            with contextlib.suppress(RackError):
                await self._load(slot)

    async def _load(self, slot: Slot) -> None:
        slot.become("starting")
        began = self._clock()
        try:
            spec = await asyncio.to_thread(self._store.describe, slot.model)
            slot.spec = spec
            async with self._room:
                await self._make_room(spec, for_name=slot.names[0], but=slot)
            process = await self._start_process(spec)
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
        self._install(slot, spec, process, began)

    def _install(self, slot: Slot, spec: ModelSpec, process: LoaderProcess, began: float) -> None:
        slot.spec = spec
        slot.loaded = Loaded(slot.names[0], spec, process, self._clock())
        slot.in_rotation = True
        slot.become("ready")
        self._watch(slot, slot.loaded)
        self._emit(
            ModelLoaded(
                t_ms=self._wall_ms(),
                model=slot.names[0],
                version=spec.version,
                load_us=int((self._clock() - began) * 1e6),
                need_bytes=spec.need_bytes,
                footprint_bytes=footprint_bytes(process.pid),
            )
        )
        log.info("model_loaded", model=slot.names[0], version=spec.version, seconds=round(self._clock() - began, 2))

    async def _start_process(self, spec: ModelSpec) -> LoaderProcess:
        model = spec.model
        arguments = (
            *("--engine", model.engine, "--path", spec.path, "--rows", str(model.rows)),
            *("--prefill-chunk", str(model.prefill_chunk_tok), "--cache-bytes", str(model.cache_bytes)),
            *("--kv-tok", str(model.rows * model.plan_context_tok)),
            *("--stall-s", str(model.stall_s)),
            *("--disk-cache", str(self._prompts / model.name), "--fingerprint", spec.version),
            *("--disk-cache-bytes", str(model.disk_cache_bytes)),
            *("--max-tokens", str(model.max_tokens)),
            *("--fake-step-s", str(model.fake_step_s), "--fake-load-s", str(model.fake_load_s)),
        )
        stuck_s = self._config.limits.stuck_s
        secret = resolve(self._config.disk_cache.secret, self._environ) if model.disk_cache_bytes else ""
        start = LoaderSpec(arguments=arguments, threads=self._threads, stuck_s=stuck_s, secret=secret)
        return await LoaderProcess.start(start, self._environ)

    async def _make_room(self, spec: ModelSpec, *, for_name: str, but: Slot | None = None) -> None:
        """Evict what eviction.make_room names. Raises Refused with the missing bytes."""
        while not isinstance(decision := self._room_for(spec, but), eviction.Fits):
            if isinstance(decision, eviction.Evict):
                # decided and locked without an await in between, one at a time: a slot that is being changed is never
                # waited for, and one that came into use meanwhile is not taken
                victim = self._slot(decision.victims[0])
                async with victim.changing:
                    await self._evict(victim, reason="memory", for_model=for_name)
                continue
            raise Refused(
                f"load {for_name}: {decision.missing_bytes / 1e6:.0f} MB short of {self.budget_bytes / 1e6:.0f} MB; "
                f"in use or pinned: {', '.join(decision.kept) or 'nothing'}",
                code="no_memory",
            )

    def _room_for(self, spec: ModelSpec, but: Slot | None) -> eviction.Fits | eviction.Evict | eviction.NoRoom:
        return eviction.make_room(spec.need_bytes, self._occupants(but=but), self.budget_bytes)

    def _occupants(self, but: Slot | None = None) -> list[eviction.Occupant]:
        return [
            eviction.Occupant(
                name=slot.names[0],
                need_bytes=slot.occupied_bytes,
                leases=slot.leases,
                # a slot that is being changed is in use, whatever its leases
                pinned=slot.pinned or slot.changing.locked() or slot.loaded is None,
                last_used_s=slot.last_used_s,
            )
            for slot in self._slots
            if slot.occupied_bytes and slot is not but
        ]

    async def _evict(self, slot: Slot, *, reason: str, for_model: str) -> None:
        loaded = slot.loaded
        assert loaded is not None
        slot.loaded = None
        slot.become("draining")
        await self._retire(loaded, self._config.limits.drain_s)
        slot.become("cold")
        now = self._clock()
        event = ModelEvicted(
            t_ms=self._wall_ms(),
            model=slot.names[0],
            version=loaded.spec.version,
            reason=reason,
            for_model=for_model,
            bytes=loaded.spec.need_bytes,
            age_us=int((now - loaded.since_s) * 1e6),
            requests_last_hour=sum(t > now - _HOUR_S for t in slot.requests),
        )
        self._emit(event)
        log.info("model_evicted", model=event.model, version=event.version, reason=reason, for_model=for_model)

    async def _retire(self, loaded: Loaded, drain_s: float) -> None:
        """Wait for the last request, take the last counts, end the process. Cut short, `stop` ends it."""
        if loaded not in self._retiring:
            self._retiring.append(loaded)
        deadline = self._clock() + drain_s
        while loaded.process.in_flight and not loaded.process.ended.is_set() and self._clock() < deadline:
            await asyncio.sleep(0.02)
        loaded.process.stopping = True
        await self._take_window(loaded)
        await loaded.process.stop(STOP_GRACE_S)
        if loaded in self._retiring:
            self._retiring.remove(loaded)

    async def _take_window(self, loaded: Loaded) -> None:
        reported = await loaded.process.report()
        if reported is None:
            return
        self._on_report(loaded.name, reported)
        key = (loaded.name, loaded.spec.version)
        known = [self._reports[key]] if key in self._reports else []
        self._reports[key] = total_of([*known, reported])

    # ---- a loader that ends by itself ----

    def _watch(self, slot: Slot, loaded: Loaded) -> None:
        self._spawn(self._watched(slot, loaded))

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
        await self._load_quietly(slot)
        if slot.state == "failed" and slot.died_starting:
            # killed while it started again: a crash like any other
            slot.crashes.append(self._clock())
            await self._restart(slot)

    # ---- swapping ----

    async def _swap(self, slot: Slot, model: Model) -> SwapFinished:
        old = slot.loaded
        if old is None:
            raise Refused(f"swap {slot.names[0]}: it is not in memory ({slot.state}); load it first", code="conflict")
        spec = await asyncio.to_thread(self._store.describe, model)
        if spec.version == old.spec.version:
            raise Refused(f"swap {slot.names[0]}: {model.name} is the version that serves already", code="conflict")
        cold = self._must_be_cold(slot, spec)
        if not cold:
            async with self._room:
                await self._make_room(spec, for_name=model.name)
                slot.standby_bytes = spec.need_bytes
        else:
            slot.standby_bytes = max(0, spec.need_bytes - old.spec.need_bytes)
        try:
            return await _SwapRun(self, slot, old, spec).run(cold=cold)
        finally:
            slot.standby_bytes = 0

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


class _SwapRun:
    """One swap being performed: effects of the state machine become calls, and what happened becomes events."""

    def __init__(self, pool: Pool, slot: Slot, old: Loaded, spec: ModelSpec) -> None:
        self._pool, self._slot, self._old, self._spec = pool, slot, old, spec
        self._id = f"{pool._wall_ms():x}-{slot.names[0]}"
        self._began = pool._clock()
        self._standby: LoaderProcess | None = None
        self._probes_us: list[int] = []
        self._finished: SwapFinished | None = None

    async def run(self, *, cold: bool) -> SwapFinished:
        state, effects = swap.begin(self._id, cold=cold)
        self._pool._swaps[self._id] = state
        todo = deque(effects)
        try:
            while todo:
                event = await self._perform(todo.popleft(), state)
                if event is not None:
                    state, more = swap.step(state, event)
                    self._pool._swaps[self._id] = state
                    todo.extend(more)
        finally:
            if self._standby is not None and (
                self._slot.loaded is None or self._slot.loaded.process is not self._standby
            ):
                self._standby.kill()
        assert self._finished is not None, "every swap ends with the effect finish"
        return self._finished

    async def _perform(self, effect: swap.Effect, state: swap.SwapState) -> swap.Event | None:
        slot, pool = self._slot, self._pool
        match effect:
            case "leave_rotation":
                slot.in_rotation = False
                slot.become("draining", "leaves rotation for a cold swap")
            case "drain_active" | "drain_old":
                await self._drain()
                return swap.Drained(swap_id=self._id)
            case "start_standby":
                return await self._start()
            case "warm_standby":
                return await self._warm()
            case "flip":
                self._flip()
            case "stop_old" | "stop_active":
                if effect == "stop_active":
                    slot.loaded = None
                await pool._retire(self._old, 0)
            case "stop_standby":
                if self._standby is not None:
                    await self._standby.stop(STOP_GRACE_S)
            case "restore_active":
                return await self._restore()
            case "finish":
                self._finish(state)
        return None

    async def _drain(self) -> None:
        deadline = self._pool._clock() + self._pool._config.limits.drain_s
        while self._old.process.in_flight and self._pool._clock() < deadline:
            await asyncio.sleep(0.02)

    async def _start(self) -> swap.Event:
        try:
            self._standby = await self._pool._start_process(self._spec)
        except RackError as error:
            return swap.StandbyFailed(swap_id=self._id, reason=error.message)
        return swap.StandbyReady(swap_id=self._id)

    async def _warm(self) -> swap.Event:
        """Short requests that must be answered, each within the model's budget (p99 of so few is their maximum)."""
        assert self._standby is not None
        budget_s = self._spec.model.probe_p99_s
        for number in range(PROBES):
            began = self._pool._clock()
            try:
                async with asyncio.timeout(budget_s):
                    reason = await _probe(self._standby, number)
            except TimeoutError:
                reason = f"probe {number + 1} of {PROBES} took over {budget_s:g} s"
            except RackError as error:
                reason = f"probe {number + 1} of {PROBES}: {error.message}"
            if reason:
                return swap.StandbyFailed(swap_id=self._id, reason=reason)
            self._probes_us.append(int((self._pool._clock() - began) * 1e6))
        return swap.ProbesPassed(swap_id=self._id)

    def _flip(self) -> None:
        """The one assignment; everything else here is bookkeeping without an await."""
        slot, spec = self._slot, self._spec
        assert self._standby is not None
        slot.loaded = Loaded(slot.names[0], spec, self._standby, self._pool._clock())
        slot.spec, slot.model = spec, spec.model
        for other in [s for s in self._pool._slots if s is not slot and spec.model.name in s.names]:
            self._pool._slots.remove(other)
        if spec.model.name not in slot.names:
            slot.names.append(spec.model.name)
        slot.in_rotation = True
        slot.become("ready")
        self._pool._watch(slot, slot.loaded)

    async def _restore(self) -> swap.Event:
        slot = self._slot
        try:
            process = await self._pool._start_process(self._old.spec)
        except RackError as error:
            slot.become("failed", error.message)
            return swap.Restored(swap_id=self._id, reason=f"and the old model did not start again: {error.message}")
        self._pool._install(slot, self._old.spec, process, self._pool._clock())
        return swap.Restored(swap_id=self._id)

    def _finish(self, state: swap.SwapState) -> None:
        event = SwapFinished(
            t_ms=self._pool._wall_ms(),
            swap_id=self._id,
            model=self._slot.names[0],
            from_version=self._old.spec.version,
            to_version=self._spec.version,
            outcome=state.outcome,
            reason=state.reason,
            window_us=int((self._pool._clock() - self._began) * 1e6),
            probes=len(self._probes_us),
            probe_p99_us=max(self._probes_us, default=None),
        )
        self._finished = event
        self._pool._emit(event)
        log.info("swap_finished", swap=self._id, outcome=event.outcome, reason=event.reason, window_us=event.window_us)


_PROBE_TEXTS: Sequence[str] = ("Say hello.", "What is two plus two?", "Name a colour.", "Finish: one, two,", "Why?")


async def _probe(loader: LoaderProcess, number: int) -> str:
    """Ask one probe; "" when the answer is whole, else what is wrong."""
    text = _PROBE_TEXTS[number % len(_PROBE_TEXTS)]
    request = Generate(
        id=0,
        model="",
        messages=(Message(role="user", content=text),),
        max_tokens=8,
        temperature=0.0,
        request_id="probe",
    )
    async for answer in loader.generate(request):
        if isinstance(answer, Failed):
            return f"probe {number + 1} of {PROBES}: {answer.message}"
        if isinstance(answer, Done):
            return "" if answer.completion_tok > 0 else f"probe {number + 1} of {PROBES}: the answer is empty"
    return f"probe {number + 1} of {PROBES}: no answer"
