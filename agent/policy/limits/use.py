"""What this node has let through of one limit. Pure: the time is an argument, in seconds of a monotonic clock."""

from collections.abc import Callable, Iterable

SLOTS = 240
"""A window's use is kept in that many slots; one counts until its last moment has left the window."""
_FORGET = 16
"""Each request makes the largest recent one forget a sixteenth."""


def _unseen(_: int) -> None:
    pass


class Use:
    """The use of a calendar period. ``total`` is everything added so far, less what was given back; ``largest`` is
    what the largest of recent requests used in the end. ``note`` is called with each new total."""

    __slots__ = ("largest", "note", "total")

    def __init__(self, total: int = 0, note: Callable[[int], None] = _unseen) -> None:
        self.total, self.note, self.largest = total, note, 0

    def add(self, amount: int, now_s: float) -> int:
        """Count an amount; pass the result to ``adjust``."""
        self._count(amount)
        return 0

    def adjust(self, slot: int, by: int, now_s: float) -> None:
        """Correct what was counted."""
        self._count(by)

    def ended(self, amount: int) -> None:
        """Learn what a request used."""
        self.largest = max(amount, self.largest - self.largest // _FORGET)

    def amount(self, now_s: float) -> int:
        """What counts now."""
        return self.total

    def free_in(self, excess: int, now_s: float) -> float | None:
        """Seconds until that much of it no longer counts; None if it does not stop by itself."""
        return None

    def _count(self, by: int) -> None:
        self.total += by
        self.note(self.total)


class WindowUse(Use):
    """The use of any ``window_s`` seconds. An amount counts from the moment when it was added until a whole window
    later, and up to a slot longer."""

    __slots__ = ("_oldest", "_slot_s", "_slots", "_sum", "window_s")

    def __init__(self, window_s: float, total: int = 0, note: Callable[[int], None] = _unseen) -> None:
        super().__init__(total, note)
        self.window_s, self._slot_s = window_s, window_s / SLOTS
        self._slots: dict[int, int] = {}
        self._sum = self._oldest = 0

    def add(self, amount: int, now_s: float) -> int:
        """Count an amount now; pass the result to ``adjust``."""
        slot = int(now_s / self._slot_s)
        self._put(slot, amount)
        self._count(amount)
        return slot

    def adjust(self, slot: int, by: int, now_s: float) -> None:
        """Correct what was counted; what has left the window needs no correction, unless it was more than that."""
        current = int(now_s / self._slot_s)
        if current - slot <= SLOTS:
            self._put(slot, by)
        elif by > 0:
            self._put(current, by)
        self._count(by)

    def amount(self, now_s: float) -> int:
        """What counts now."""
        oldest = int(now_s / self._slot_s) - SLOTS
        if oldest > self._oldest:
            self._oldest = oldest
            for slot in [slot for slot in self._slots if slot < oldest]:
                self._sum -= self._slots.pop(slot)
        return self._sum

    def free_in(self, excess: int, now_s: float) -> float | None:
        """Seconds until that much of it no longer counts; None if it holds less."""
        freed = 0
        self.amount(now_s)
        for slot in sorted(self._slots):
            freed += self._slots[slot]
            if freed >= excess:
                return max(0.0, (slot + 1 + SLOTS) * self._slot_s - now_s)
        return None

    def ages(self, now_s: float) -> list[tuple[float, int]]:
        """What counts, with the seconds since the end of its slot, negative for one that has not ended."""
        self.amount(now_s)
        return [(now_s - (slot + 1) * self._slot_s, amount) for slot, amount in self._slots.items() if amount]

    def put_back(self, ages: Iterable[tuple[float, int]], now_s: float) -> None:
        """Count what another run of this agent has saved."""
        for age_s, amount in ages:
            if age_s <= self.window_s:
                # into the slot that ends after it
                self._put(int((now_s - max(age_s, 0.0)) / self._slot_s), amount)

    def _put(self, slot: int, amount: int) -> None:
        self._slots[slot] = self._slots.get(slot, 0) + amount
        self._sum += amount
