"""The memory budget: makes room for a model by evicting others, one at a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from agent.files.modelstore import ModelSpec
from agent.models import eviction
from agent.models.slot import Slot, Slots
from shared.errors import Refused


class Room:
    """``evict`` drains a slot and ends its loader for the model named. ``budget_bytes`` may change at any time."""

    def __init__(
        self,
        slots: Slots,
        *,
        budget_bytes: int,
        min_residency_s: float,
        evict: Callable[[Slot, str], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self.budget_bytes = budget_bytes
        self._min_residency_s = min_residency_s
        self._evict = evict
        self._clock = clock
        self._making = asyncio.Lock()

    def occupants(self, but: Slot | None = None) -> list[eviction.Occupant]:
        """What holds memory now."""
        return self._slots.occupants(self._clock(), self._min_residency_s, but)

    async def make(self, spec: ModelSpec, name: str, *, but: Slot | None = None, ordered: bool = False) -> None:
        """Evict what eviction.make_room names; an order does not spare models that have just been loaded.

        Raises Refused with the missing bytes.
        """
        async with self._making:
            now = float("inf") if ordered else self._clock()
            while True:
                found = eviction.make_room(spec.need_bytes, self.occupants(but), self.budget_bytes, now_s=now)
                if isinstance(found, eviction.Fits):
                    return
                if isinstance(found, eviction.NoRoom):
                    raise self._refused(name, found)
                # decided and claimed without an await in between, one at a time: what came into use meanwhile stays
                await self._evict(self._slots.named(found.victims[0]), name)

    def _refused(self, name: str, found: eviction.NoRoom) -> Refused:
        return Refused(
            f"load {name}: {found.missing_bytes / 1e6:.0f} MB short of {self.budget_bytes / 1e6:.0f} MB; "
            f"in use, pinned or just loaded: {', '.join(found.kept) or 'nothing'}",
            code="no_memory",
        )

    def can_hold(self, slot: Slot) -> bool:
        """Whether a model that is not in memory would have room if nobody used the others."""
        pinned = sum(s.occupied_bytes for s in self._slots if s is not slot and s.pinned and s.loaded is not None)
        return slot.planned_bytes + pinned <= self.budget_bytes

    def for_swap(self, slot: Slot, spec: ModelSpec) -> tuple[Literal["hot", "cold"], str]:
        """Hot when both versions fit, else cold, and why. Raises Refused when the new one does not fit at all."""
        beside = eviction.make_room(spec.need_bytes, self.occupants(), self.budget_bytes)
        if not isinstance(beside, eviction.NoRoom):
            return "hot", ""
        short = f"{beside.missing_bytes / 1e6:.0f} MB short of holding both"
        instead = eviction.make_room(spec.need_bytes, self.occupants(but=slot), self.budget_bytes, may_evict=False)
        if isinstance(instead, eviction.NoRoom):
            missing = instead.missing_bytes / 1e6
            raise Refused(
                f"swap {slot.name}: {short}, and {missing:.0f} MB short without the old one", code="no_memory"
            )
        return "cold", short
