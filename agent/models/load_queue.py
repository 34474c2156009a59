"""The line of models that are wanted and not in memory: performs what turns.py decides about slots."""

from collections.abc import Callable, Sequence

from agent.config import Memory
from agent.models import load_order as turns
from agent.models.eviction import Occupant
from agent.models.slot import Slot
from shared.logs import get_logger

CLOSED_TURNS = 3
"""A model is closed for at most so many times the longest wait, then open for as long."""

log = get_logger("agent.models.load_queue")


class Line:
    """``slots`` gives every slot of the node, ``occupants`` what is in memory; ``load`` begins to bring one in."""

    def __init__(
        self,
        config: Memory,
        *,
        slots: Callable[[], Sequence[Slot]],
        occupants: Callable[[], list[Occupant]],
        load: Callable[[Slot], None],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._slots = slots
        self._occupants = occupants
        self._load = load
        self._clock = clock

    def advance(self, budget_bytes: int) -> None:
        """Bring in the model whose turn it is, and close or open those in use; see turns.py."""
        if not any(slot.waiting or slot.closed_for for slot in self._slots()):
            return
        now = self._clock()
        queue = [
            turns.Wanted(name=slot.names[0], need_bytes=slot.planned_bytes, since_s=min(slot.waiting))
            for slot in self._slots()
            if slot.waiting and slot.state == "cold" and not slot.changing.locked()
            if not slot.coming and now >= slot.not_before_s
        ]
        turn = turns.next_turn(queue, self._occupants(), budget_bytes, now, max_wait_s=self._config.max_wait_s)
        for slot in self._slots():
            self.close(slot, self._closed_for(slot, turn), now)
        if turn.load:
            slot = next(one for one in self._slots() if turn.load in one.names)
            slot.coming = True  # from here on, so that it is started once however many wait for it
            self._load(slot)

    def close(self, slot: Slot, for_model: str, now: float) -> None:
        """Let a model take no new requests, or some again. What makes others wait for too long is opened for a while,
        or one endless answer would keep all of them waiting."""
        limit_s = CLOSED_TURNS * max(1.0, self._config.max_wait_s)
        if slot.closed_for and for_model and slot.leases and now - slot.closed_since_s > limit_s:
            slot.open_until_s, for_model = now + limit_s, ""
        was, slot.closed_for = slot.closed_for, for_model
        if bool(was) != bool(for_model):
            slot.closed_since_s = now
            slot.become(slot.state, slot.reason)
            log.info("model_closed" if for_model else "model_opened", model=slot.names[0], for_model=for_model or was)

    def _closed_for(self, slot: Slot, turn: turns.Turn) -> str:
        if slot.names[0] in turn.close:
            return turn.waiter
        if not slot.closed_for:
            return ""
        # it stays closed until the one that it makes room for has come: else it would be in use again before that
        other = next((one for one in self._slots() if slot.closed_for in one.names), None)
        comes = turn.load == slot.closed_for or (other is not None and (other.coming or other.changing.locked()))
        return slot.closed_for if comes else ""
