"""The models of this node, as batches, reconcile and the status report them."""

import time
from collections.abc import Callable
from typing import NamedTuple

from agent.config import Model
from agent.models import slot_view
from agent.models.loaders import Loaders
from agent.models.slot import Slots
from agent.views import Actual
from shared.records import EngineWindow, Resident


class Served(NamedTuple):
    """The names of one model, its own first; the files and settings behind them; their version if it is resident."""

    names: tuple[str, ...]
    model: Model
    version: str


class Inventory:
    """A read-only view of all slots."""

    def __init__(
        self, slots: Slots, loaders: Loaders, *, fused: Callable[[], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._slots, self._loaders = slots, loaders
        self._fused, self._clock = fused, clock

    def residents(self) -> list[Resident]:
        """Resident models, for the batch."""
        return [slot_view.resident(slot) for slot in self._slots if slot.life.phase != "cold"]

    def status(self) -> list[dict[str, object]]:
        """Every configured model, for display."""
        now = self._clock()
        return [slot_view.status(slot, now, fused=self._fused()) for slot in self._slots]

    def actual(self) -> list[Actual]:
        """Every model of this node, as reconcile sees it."""
        return [slot_view.actual(slot) for slot in self._slots]

    def served(self, name: str) -> Served:
        """What is behind a name. Raises Refused for one that this node does not serve."""
        slot = self._slots.named(name)
        version = slot.loaded.spec.version if slot.loaded else ""
        return Served(names=tuple(slot.names), model=slot.model, version=version)

    def stalled(self, limit_s: float) -> list[str]:
        """Models whose loader has work and has made no progress for over ``limit_s``."""
        return [s.name for s in self._slots if s.loaded is not None and s.loaded.process.silent_s > limit_s]

    def reported_peak(self, name: str, peak_bytes: int) -> None:
        """Take MLX's peak since a loader's last report."""
        if (slot := self._slots.find(name)) is not None:
            slot.peak_bytes = max(slot.peak_bytes, peak_bytes)

    async def windows(self) -> list[EngineWindow]:
        """What every loader did since the last call, including those that ended meanwhile."""
        await self.refresh()
        return self._loaders.windows()

    def windows_so_far(self) -> list[EngineWindow]:
        """Counts received since the last window, which the next one will include."""
        return self._loaders.so_far()

    async def refresh(self) -> None:
        """Ask every loader for its counts since its last report."""
        for loaded in [*(slot.loaded for slot in self._slots), *self._loaders.retiring]:
            if loaded is not None:
                await self._loaders.take_window(loaded)
