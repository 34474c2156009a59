"""One served model on this node: what stands behind its names now, and how it is doing. The pool changes it."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import NamedTuple

import msgspec

from agent.config import Model
from agent.files.modelstore import ModelSpec
from agent.models.demand import Demand
from agent.models.eviction import Occupant
from agent.models.memory_guard import Held
from agent.process.footprint import footprint_bytes
from agent.process.loader_process import LoaderProcess
from agent.process.prefixes import Text
from agent.views import ModelView
from agent.wire.frames import Answer, Ask, Working
from shared.records import ModelLoaded


class Loaded(NamedTuple):
    """What answers: the files and the process that holds them."""

    name: str
    spec: ModelSpec
    process: LoaderProcess
    since_s: float
    load_s: float = 0.0


class Gone(NamedTuple):
    """A model that left memory, until it is wanted again."""

    at_s: float
    t_ms: int
    version: str
    reason: str


class Slot:
    """One served model on this node, under one or more names."""

    def __init__(self, model: Model) -> None:
        self.names = [model.name]
        self.model = model
        self.loaded: Loaded | None = None
        self.spec: ModelSpec | None = None
        self.state = "cold"
        self.reason = ""
        self.in_rotation = True
        self.restarts = 0
        self.last_exit = ""
        self.crashes: deque[float] = deque()
        self.demand = Demand()
        self.waiting: list[float] = []
        self.closed_for = ""
        self.gone: Gone | None = None
        self.peak_bytes = 0
        self.keep_alive_s = model.keep_alive_s
        self.pinned = model.pinned
        self.standby_bytes = 0
        self.swapping = False
        self.coming = False
        self.reviving = False
        self.not_before_s = 0.0
        self.closed_since_s = 0.0
        self.open_until_s = 0.0
        self.died_starting = False
        self.changing = asyncio.Lock()
        self.changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a request may be leased now."""
        return self.loaded is not None and self.in_rotation and not self.closed_for and self.loaded.process.usable

    @property
    def leases(self) -> int:
        """Requests that use the loader."""
        return self.loaded.process.in_flight if self.loaded else 0

    def view(self, name: str, now_s: float, *, refusing: bool, versions: tuple[str, ...]) -> ModelView:
        """As routing sees it under one of its names."""
        loaded = self.loaded
        base = ModelView(
            name=name,
            version=loaded.spec.version if loaded else "",
            ready=self.ready and not refusing,
            coming=self.state == "starting" or (loaded is not None and not self.ready),
            in_flight=self.leases,
            versions=versions,
            rows=self.model.rows,
        )
        if loaded is None:
            return base
        process, plan = loaded.process, loaded.spec.plan
        speed = process.meter.speed(now_s)
        held = process.working.kv_bytes if process.working and plan.kv_bytes else 0
        return msgspec.structs.replace(
            base,
            context_tok=process.ready.context_tok if process.ready else 0,
            prefill_tok=process.meter.workload.prefill_tok,
            prefill_tps=speed.prefill_tps,
            gap_us=speed.gap_us,
            answer_tok=speed.answer_tok,
            kv_ppm=min(10**6, held * 10**6 // plan.kv_bytes) if held else 0,
        )

    @property
    def occupied_bytes(self) -> int:
        """Planned bytes of what is in memory or on its way there."""
        held = self.spec.need_bytes if self.spec and (self.loaded or self.state in ("starting", "draining")) else 0
        return held + self.standby_bytes

    @property
    def planned_bytes(self) -> int:
        """What it will need, as far as that is known before its files were looked at."""
        return self.spec.need_bytes if self.spec else self.model.need_bytes

    def occupant(self, now_s: float, min_residency_s: float) -> Occupant:
        """As eviction sees it. A slot that is being changed is in use, whatever its leases."""
        loaded = self.loaded
        return Occupant(
            name=self.names[0],
            need_bytes=self.occupied_bytes,
            leases=self.leases,
            pinned=self.pinned or self.changing.locked() or loaded is None,
            last_used_s=self.demand.last_s or 0.0,
            reload_s=loaded.load_s if loaded else 0.0,
            per_s=self.demand.per_s(now_s),
            stays_until_s=max(self.open_until_s, loaded.since_s + max(min_residency_s, loaded.load_s)) if loaded else 0,
        )

    def idle_beyond_keep_alive(self, now_s: float) -> bool:
        """Whether it has to leave because nobody used it for so long."""
        if self.loaded is None or self.keep_alive_s < 0 or self.pinned or self.leases or self.waiting:
            return False
        return now_s - max(self.loaded.since_s, self.demand.last_s or 0.0) >= self.keep_alive_s

    def loaded_event(self, t_ms: int, *, fused: bool) -> ModelLoaded:
        """The record of the load that has just ended."""
        loaded = self.loaded
        assert loaded is not None
        planned, peak = self._first_prompt(loaded, fused=fused)
        return ModelLoaded(
            t_ms=t_ms,
            model=self.names[0],
            version=loaded.spec.version,
            load_us=int(loaded.load_s * 1e6),
            need_bytes=loaded.spec.need_bytes,
            footprint_bytes=footprint_bytes(loaded.process.pid),
            planned_peak_bytes=planned,
            peak_bytes=peak,
        )

    def status(self, now_s: float, *, fused: bool) -> dict[str, object]:
        """For a person."""
        loaded, spec = self.loaded, self.spec
        planned, peak = self._first_prompt(loaded, fused=fused) if loaded else (None, None)
        return {
            "model": self.names[0],
            "names": self.names,
            "state": self._state(),
            "reason": f"makes room for {self.closed_for}" if self.closed_for else self.reason,
            "version": loaded.spec.version if loaded else "",
            "path": spec.path if spec else "",
            "pid": loaded.process.pid if loaded else None,
            "in_flight": self.leases,
            "waiting": len(self.waiting),
            "pinned": self.pinned,
            "keep_alive_s": self.keep_alive_s,
            "need_bytes": spec.need_bytes if spec else None,
            "footprint_bytes": footprint_bytes(loaded.process.pid) if loaded else None,
            "peak_bytes": self.peak_bytes or None,
            "first_prompt_planned_bytes": planned,
            "first_prompt_peak_bytes": peak,
            "plan_error_ppm": round((peak - planned) / planned * 1e6) if planned and peak else None,
            "load_s": round(loaded.load_s, 2) if loaded else None,
            "requests_last_hour": self.demand.last_hour(now_s),
            "restarts": self.restarts,
            "last_exit": self.last_exit,
            "silent_s": round(loaded.process.silent_s, 1) if loaded else 0.0,
            "blas": loaded.process.ready.blas if loaded and loaded.process.ready else "",
        }

    def _state(self) -> str:
        if not self.in_rotation:
            return "out of rotation"
        return "closed" if self.closed_for else self.state

    @staticmethod
    def _first_prompt(loaded: Loaded, *, fused: bool) -> tuple[int | None, int | None]:
        """MLX's peak at the loader's first prompt, as planned and as measured."""
        ready = loaded.process.ready
        if ready is None or not ready.peak_bytes:
            return None, None
        return loaded.spec.planned_warm_bytes(ready.warm_tok, fused=fused), ready.peak_bytes

    def become(self, state: str, reason: str = "") -> None:
        """Note the state for people and wake whoever waits for it."""
        self.state, self.reason = state, reason
        self.changed.set()
        self.changed = asyncio.Event()


def held_by(loaded: Loaded) -> Held:
    """What a loader holds, by source, as the memory guard sees it."""
    working, plan = loaded.process.working or Working(), loaded.spec.plan
    if loaded.spec.model.engine == "fake":  # its numbers are invented, and its process is no model's
        return Held(name=loaded.name, engine_bytes=working.active_bytes)
    overhead = plan.overhead_bytes
    return Held(
        name=loaded.name,
        engine_bytes=working.active_bytes + working.reuse_bytes + overhead,
        footprint_bytes=footprint_bytes(loaded.process.pid),
        ledger_bytes=plan.weights_bytes + working.kv_bytes + working.cache_bytes + overhead,
    )


class Lease:
    """The right to use one loader for one request."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.spec = loaded.spec
        self.process = loaded.process
        self.version = loaded.spec.version

    def generate(self, request: Ask, text: Text | None = None) -> AsyncGenerator[Answer, None]:
        """Answers to the request; see LoaderProcess.generate."""
        return self._loaded.process.generate(request, text)
