"""The memory budget: makes room for a model by evicting others, one at a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from agent.files.modelstore import ModelSpec
from agent.models import eviction
from agent.models.fitting import never_fits
from agent.models.slot import Slot, Slots
from shared.errors import Refused


class Room:
    """``evict`` drains a slot and ends its loader, for the named model. ``budget_bytes`` may change at any time, and
    ``fused`` is that of the ModelStore."""

    def __init__(
        self,
        slots: Slots,
        *,
        budget_bytes: int,
        min_residency_s: Callable[[], float],
        evict: Callable[[Slot, str], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots, self.budget_bytes, self._min_residency_s = slots, budget_bytes, min_residency_s
        self._evict, self._clock = evict, clock
        self._making = asyncio.Lock()
        self.fused: Callable[[], bool] = lambda: False

    def occupants(self, excluding: Slot | None = None) -> list[eviction.Occupant]:
        """Models that hold memory now."""
        return self._slots.occupants(self._clock(), self._min_residency_s(), excluding)

    async def make(self, spec: ModelSpec, name: str, *, excluding: Slot | None = None, ordered: bool = False) -> None:
        """Evict what eviction.make_room selects; if ``ordered``, models that were just loaded may be evicted. Raises
        Refused with the missing bytes."""
        async with self._making:
            now = float("inf") if ordered else self._clock()
            while True:
                found = eviction.make_room(spec.need_bytes, self.occupants(excluding), self.budget_bytes, now_s=now)
                if isinstance(found, eviction.Fits):
                    return
                if isinstance(found, eviction.NoRoom):
                    raise self._refused(name, found, spec)
                # decided and claimed without an await in between, one at a time: a model in use by then is spared
                await self._evict(self._slots.named(found.victims[0]), name)

    def _refused(self, name: str, found: eviction.NoRoom, spec: ModelSpec) -> Refused:
        if spec.need_bytes > self.budget_bytes:
            return Refused(f"load {name}: {never_fits(spec, self.budget_bytes, fused=self.fused())}", code="no_memory")
        return Refused(
            f"load {name}: {found.missing_bytes / 1e6:.0f} MB over the memory budget of "
            f"{self.budget_bytes / 1e6:.0f} MB; in use, pinned or just loaded: {', '.join(found.kept) or 'nothing'}",
            code="no_memory",
        )

    def can_hold(self, slot: Slot) -> bool:
        """Whether a model that is not resident would fit beside the pinned models alone."""
        pinned = sum(s.occupied_bytes for s in self._slots if s is not slot and s.pinned and s.loaded is not None)
        return slot.planned_bytes + pinned <= self.budget_bytes

    def for_swap(self, slot: Slot, spec: ModelSpec) -> tuple[Literal["hot", "cold"], str]:
        """Hot when both versions fit, else cold and the shortfall. Raises Refused if even the new one does not fit."""
        beside = eviction.make_room(spec.need_bytes, self.occupants(), self.budget_bytes)
        if not isinstance(beside, eviction.NoRoom):
            return "hot", ""
        short = f"{beside.missing_bytes / 1e6:.0f} MB over the memory budget with both versions"
        alone = self.alone(slot, spec)
        if isinstance(alone, eviction.NoRoom):
            missing = alone.missing_bytes / 1e6
            raise Refused(
                f"swap {slot.name}: {short}, and {missing:.0f} MB over it without the old one", code="no_memory"
            )
        return "cold", short

    def alone(self, slot: Slot, spec: ModelSpec) -> eviction.Fits | eviction.Evict | eviction.NoRoom:
        """Whether a version fits in the place of the one that a slot has now."""
        return eviction.make_room(spec.need_bytes, self.occupants(excluding=slot), self.budget_bytes, may_evict=False)
