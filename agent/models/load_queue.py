"""Models that requests wait for and that are not resident: carries out what load_order.py decides."""

import time
from collections.abc import Callable

from agent.config import Live
from agent.models import lifecycle as life
from agent.models import load_order
from agent.models.eviction import Occupant
from agent.models.slot import Slot, Slots

CLOSED_TURNS = 3
"""A model is closed for at most this multiple of ``max_wait_s``, then open for as long."""


class LoadQueue:
    """``occupants`` returns the resident models; ``feed`` sends an event to a slot's state machine."""

    def __init__(
        self,
        live: Live,
        *,
        slots: Slots,
        occupants: Callable[[], list[Occupant]],
        feed: Callable[[Slot, life.Event], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._slots, self._occupants, self._feed, self._clock = live, slots, occupants, feed, clock

    def advance(self, budget_bytes: int) -> None:
        """Load the model whose turn it is, and close or reopen those in use; see load_order.py."""
        if not any(slot.waiting or slot.life.closed_for for slot in self._slots):
            return
        now, max_wait_s = self._clock(), self._live.now.memory.max_wait_s
        queue = [
            load_order.Wanted(name=slot.name, need_bytes=slot.planned_bytes, since_s=min(slot.waiting))
            for slot in self._slots
            if slot.waiting and slot.life.phase == "cold" and not slot.life.claim and now >= slot.life.not_before_s
        ]
        turn = load_order.next_turn(queue, self._occupants(), budget_bytes, now, max_wait_s=max_wait_s)
        limit_s = CLOSED_TURNS * max(1.0, max_wait_s)
        for slot in self._slots:
            for_model = self._closed_for(slot, turn)
            self._feed(slot, life.Close(for_model=for_model, in_use=slot.leases > 0, limit_s=limit_s))
        if turn.load:
            self._feed(self._slots.named(turn.load), life.Load(retries=True))

    def _closed_for(self, slot: Slot, turn: load_order.Turn) -> str:
        if slot.name in turn.close:
            return turn.waiter
        if not (closed_for := slot.life.closed_for):
            return ""
        # it stays closed until the model it makes room for is loaded, or it would be in use again before that
        other = self._slots.find(closed_for)
        return closed_for if turn.load == closed_for or (other is not None and bool(other.life.claim)) else ""
