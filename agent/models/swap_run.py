"""Performs one swap: effects of the state machine become calls, and their outcomes become events."""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from agent.files.modelstore import ModelSpec
from agent.models import lifecycle as life
from agent.models import swap
from agent.models.loaders import MARGIN_S, STOP_GRACE_S, Loaders
from agent.models.slot import Loaded, Slot
from agent.models.warmup import warm
from agent.process.loader_process import LoaderProcess
from shared.errors import RackError
from shared.logs import get_logger
from shared.records import SwapFinished

log = get_logger("agent.models.swap")


class Host(Protocol):
    """What a swap needs of Lifecycles."""

    loaders: Loaders

    def feed(self, slot: Slot, event: life.Event) -> bool:
        """Feed an event to the slot's state machine."""
        ...

    def take_over(self, slot: Slot, event: life.Started | life.Flipped, loaded: Loaded) -> None:
        """Serve a slot's names with this loader from now on; no await."""
        ...


class SwapRun:
    """``request_s`` bounds the drain: no request outlives it. ``flipped`` is called when the new version serves, long
    before the old loader has ended. ``detail`` is the progress, for display."""

    def __init__(
        self,
        host: Host,
        slot: Slot,
        spec: ModelSpec,
        old: Loaded,
        *,
        request_s: float,
        wall_ms: Callable[[], int],
        flipped: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flipped = flipped
        self._host, self._loaders, self._slot, self._spec, self._old = host, host.loaders, slot, spec, old
        self._pace = self._old.process.pace
        self._request_s, self._wall_ms, self._clock = request_s, wall_ms, clock
        self._began = clock()
        self._standby: LoaderProcess | None = None
        self._load_s = 0.0
        self._took_us: tuple[int, ...] = ()
        self._freed = 0
        self._finished: SwapFinished | None = None
        self.state = swap.SwapState(swap_id=f"{wall_ms():x}-{slot.names[0]}", cold=False, phase="starting")
        self.detail = ""

    @property
    def view(self) -> dict[str, str]:
        """For the status."""
        state = self.state
        return {
            "swap": state.swap_id,
            "model": self._slot.name,
            "from": self._old.spec.version,
            "to": self._spec.version,
            "phase": state.phase,
            "detail": self._detail(),
            "outcome": state.outcome,
            "reason": state.reason,
        }

    def _detail(self) -> str:
        left = self._old.process.in_flight
        return f"{left} requests in flight on the old loader" if self.state.phase == "draining" else self.detail

    async def run(self, *, cold: bool) -> SwapFinished:
        """Perform it to its end, whatever fails on the way."""
        self.state, effects = swap.begin(self.state.swap_id, cold=cold)
        todo = deque(effects)
        try:
            while todo:
                event = await self._perform(todo.popleft())
                self.detail = ""
                if event is not None:
                    self.state, more = swap.step(self.state, event)
                    log.info("swap_step", swap=event.swap_id, after=event.what, phase=self.state.phase)
                    todo.extend(more)
        finally:
            if self._standby is not None and not self._serves(self._standby):
                self._standby.kill()
        assert self._finished is not None, "every swap ends with the effect finish"
        return self._finished

    def _event(self, what: swap.What, reason: str = "") -> swap.Event:
        return swap.Event(swap_id=self.state.swap_id, what=what, reason=reason)

    def _serves(self, process: LoaderProcess) -> bool:
        return self._slot.loaded is not None and self._slot.loaded.process is process

    async def _perform(self, effect: swap.Effect) -> swap.Event | None:
        match effect:
            case "leave_rotation":
                self._loaders.retiring.append(self._old)
                self._host.feed(self._slot, "leave_rotation")
            case "drain_active" | "drain_old":
                return await self._drain()
            case "start_standby":
                return await self._start()
            case "warm_standby":
                return await self._warm()
            case "flip":
                return self._flip()
            case "stop_old" | "stop_active":
                return await self._stop_old()
            case "stop_standby":
                if self._standby is not None:
                    await self._standby.stop(STOP_GRACE_S)
            case "restore_active":
                return await self._restore()
            case "finish":
                self._finish()
        return None

    async def _start(self) -> swap.Event:
        began = self._clock()
        try:
            self._standby = await self._loaders.start(self._spec)
        except RackError as error:
            return self._event("standby_failed", error.message)
        self._load_s = self._clock() - began
        return self._event("standby_ready")

    async def _warm(self) -> swap.Event:
        assert self._standby is not None

        def progress(text: str) -> None:
            self.detail = text

        warmed = await warm(self._standby, self._spec.probes, self._spec.model.probe_p99_s, progress)
        self._took_us = warmed.took_us
        return self._event("standby_failed", warmed.reason) if warmed.reason else self._event("probes_passed")

    def _flip(self) -> swap.Event:
        """The flip, in take_over, without an await after the check: a loader found usable is still usable there."""
        assert self._standby is not None
        if not self._standby.usable:
            return self._event("standby_failed", f"the standby exited before the flip ({self._standby.cause})")
        if not self.state.cold:
            self._old = self._slot.loaded or self._old  # it may have exited and been restarted meanwhile
            self._loaders.retiring.append(self._old)
            self._host.feed(self._slot, life.Planned(standby_bytes=self._old.spec.need_bytes))
        loaded = Loaded(self._slot.name, self._spec, self._standby, self._clock(), self._load_s)
        self._host.take_over(self._slot, life.Flipped(version=self._spec.version), loaded)
        self._flipped()
        return self._event("flipped")

    async def _drain(self) -> swap.Event:
        """Wait until the old loader's requests have ended; each has its own deadline."""
        self._old = await self._loaders.drain(self._old, self._request_s + MARGIN_S)
        return self._event("drained")

    async def _stop_old(self) -> swap.Event:
        if self._slot.loaded is self._old:
            self._host.feed(self._slot, "withdraw")
        self._freed = await self._loaders.retire(self._old, 0.0)
        return self._event("stopped")

    async def _restore(self) -> swap.Event:
        began = self._clock()
        try:
            process = await self._loaders.start(self._old.spec)
        except RackError as error:
            # the release retries when the swap has ended
            return self._event("restored", f"and the old model failed to restart: {error.message}")
        now = self._clock()
        loaded = Loaded(self._old.name, self._old.spec, process, now, now - began)
        self._host.take_over(self._slot, life.Flipped(version=self._old.spec.version), loaded)
        return self._event("restored")

    def _finish(self) -> None:
        now = self._clock()
        raised = self._pace.raised(self._began, now)
        event = SwapFinished(
            t_ms=self._wall_ms(),
            swap_id=self.state.swap_id,
            model=self._slot.name,
            from_version=self._old.spec.version,
            to_version=self._spec.version,
            outcome=self.state.outcome,
            reason=self.state.reason,
            window_us=int((now - self._began) * 1e6),
            probes=len(self._took_us),
            probe_p99_us=max(self._took_us, default=None),
            itl_before_us=raised.before_us,
            itl_during_us=raised.during_us,
            raised_us=int(raised.window_s * 1e6),
            freed_bytes=self._freed,
        )
        self._finished = event
        log.info("swap_finished", **{k: v for k, v in msgspec.to_builtins(event).items() if k not in ("kind", "t_ms")})
