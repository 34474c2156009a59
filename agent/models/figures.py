"""The figures of this node's models: times them while nothing else happens, and keeps what was measured on disk.

What agent/models/idleness.py decides is done here, once a second. A request anywhere on this node ends it at once.
"""

import asyncio
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.config import Live
from agent.models.idleness import Standing, to_time
from agent.models.slot import Loaded, Slot, Slots
from agent.models.slot_view import timed_event
from agent.process.loader_process import LoaderProcess
from agent.wire.step_times import Number, StepTimes
from shared.durable import write_whole
from shared.logs import get_logger
from shared.records import Event
from shared.regular_file import read_file

FORMAT = 1
MOST = 64
"""Figures kept, the newest."""
MOST_BYTES = 1 << 20
MOST_TRIES = 3
"""Loaders in which one model was begun to be timed and none finished, except those ended in order: each of the others
may have died of it."""

STEADY_PPM = 50_000
"""Figures whose samples lie farther apart were disturbed by something else on this machine: they are used, and measured
again; the steadier ones count."""

log = get_logger("agent.models.figures")


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """Figures, and what they were measured with."""

    model: str
    version: str
    runtime: str
    measured_ms: Number
    times: StepTimes


class _File(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    known: dict[str, Known] = {}


class Figures:
    """``path`` is the file of figures, None for none. ``emit`` takes an event for each model whose figures
    are put to use."""

    def __init__(
        self,
        path: Path | None,
        live: Live,
        slots: Slots,
        *,
        retiring: Callable[[], bool],
        calm: Callable[[], bool],
        emit: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int],
    ) -> None:
        self._path, self._live, self._slots = path, live, slots
        self._retiring, self._calm, self._emit, self._clock, self._wall_ms = retiring, calm, emit, clock, wall_ms
        self._known: dict[str, Known] | None = None
        self._tries, self._begun = Counter[str](), dict[int, tuple[str, LoaderProcess]]()
        self._running: LoaderProcess | None = None

    def halt(self) -> None:
        """Something begins on this node: end what is timed, after the step that runs."""
        if self._running is not None:
            self._running.calibrate(go=False)
            self._running = None

    async def tick(self) -> None:
        """Put to use what is known or was measured; time what is not, if this is the moment."""
        if self._known is None:
            self._known = await asyncio.to_thread(_read, self._path) if self._path is not None else {}
        self._forgive()
        for slot in self._slots:
            if slot.loaded is not None:
                await self._use(slot, slot.loaded, self._known)
        name = None
        if self._live.now.loader.calibrate:
            standing = [self._standing(slot) for slot in self._slots]
            name = to_time(standing, calm=self._calm(), retiring=self._retiring())
        chosen = self._slots.find(name) if name is not None else None
        loaded = chosen.loaded if chosen is not None else None
        if loaded is None or loaded.process is not self._running:
            self.halt()
        if loaded is not None:
            self._time(loaded)

    def _forgive(self) -> None:
        """A loader that was unloaded or swapped while it was timed did not die of it."""
        for pid, (key, process) in list(self._begun.items()):
            if process.dismissed:
                del self._begun[pid]
                self._tries[key] -= 1

    def _time(self, loaded: Loaded) -> None:
        process = self._running = loaded.process
        if process.pid not in self._begun:
            key = _key(loaded)
            self._begun[process.pid] = (key, process)
            self._tries[key] += 1
            log.info("calibration_started", model=loaded.name, version=loaded.spec.version)
        process.calibrate(go=True)  # again each second: a request ends it in the loader

    async def _use(self, slot: Slot, loaded: Loaded, known: dict[str, Known]) -> None:
        process, key = loaded.process, _key(loaded)
        said, process.calibrated = process.calibrated, None
        if said is not None:
            self._begun.pop(process.pid, None)  # timed again, that is another try
            if said.times is None:
                self._tries[key] = MOST_TRIES
                log.warning("calibration_failed", model=loaded.name, reason=said.problem)
            else:
                await self._learn(loaded, said.times, known)
        if (found := known.get(key)) is not None and found.times is not process.throughput.timed:
            process.throughput.use(found.times)
            self._emit(timed_event(slot, loaded, found.times, found.measured_ms, self._wall_ms()))

    async def _learn(self, loaded: Loaded, times: StepTimes, known: dict[str, Known]) -> None:
        """Keep new figures, unless those that are known were less disturbed."""
        key, ready, spread = _key(loaded), loaded.process.ready, round(times.spread_ppm / 1e6, 3)
        log.info("calibrated", model=loaded.name, took_s=round(times.took_us / 1e6, 1), spread=spread)
        old = known.get(key)
        if old is not None and old.times.by_length and old.times.spread_ppm <= times.spread_ppm:
            return
        known.pop(key, None)
        known[key] = Known(
            model=loaded.name,
            version=loaded.spec.version,
            runtime=ready.runtime if ready is not None else "",
            measured_ms=self._wall_ms(),
            times=times,
        )
        if self._path is not None:
            await asyncio.to_thread(_write, self._path, known)

    def _standing(self, slot: Slot) -> Standing:
        loaded, now = slot.loaded, self._clock()
        used_s = None if loaded is None else now - max(loaded.since_s, slot.demand.last_s or 0.0)
        due = loaded is not None and slot.ready and not _steady(loaded) and self._may_try(loaded)
        settled = not (slot.life.claim or slot.waiting or slot.life.state in ("starting", "draining"))
        return Standing(slot.name, settled, slot.leases, used_s, due)

    def _may_try(self, loaded: Loaded) -> bool:
        ready, begun = loaded.process.ready, loaded.process.pid in self._begun
        tries = self._tries[_key(loaded)]
        return ready is not None and bool(ready.runtime) and (tries < MOST_TRIES or (begun and tries == MOST_TRIES))


def _steady(loaded: Loaded) -> bool:
    """Whether its figures need not be timed again. Those of a former version knew only lines."""
    timed = loaded.process.throughput.timed
    return timed is not None and timed.by_length and timed.spread_ppm <= STEADY_PPM


def _key(loaded: Loaded) -> str:
    """What figures depend on: the model's version, device, system and libraries, and settings that change steps."""
    ready, model = loaded.process.ready, loaded.spec.model
    runtime = ready.runtime if ready is not None else ""
    threads = loaded.process.threads if "Linux" in runtime else 0
    parts = (loaded.spec.version, runtime, model.engine, model.rows, model.plan_context_tok, threads)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _read(path: Path) -> dict[str, Known]:
    """What was measured before; nothing where that is missing, damaged or of another format: it is measured again."""
    try:
        found = msgspec.json.decode(read_file(path, MOST_BYTES), type=_File)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.warning("figures_unreadable", path=str(path), reason=type(error).__name__)
        return {}
    return dict(found.known) if found.format == FORMAT else {}


def _write(path: Path, known: dict[str, Known]) -> None:
    newest = dict(list(known.items())[-MOST:])
    try:
        write_whole(path, msgspec.json.encode(_File(format=FORMAT, known=newest)))
    except OSError as error:
        log.warning("figures_not_kept", path=str(path), reason=os.strerror(error.errno or 0))
