"""Whose turn it is where requests wait for one another: the highest rank's, until one has waited long enough for turns
that went to higher ranks. Pure: the time is an argument.

Where all requests have the same rank nothing here changes any order.
"""

from collections import Counter
from collections.abc import Container

import msgspec

STARVED = 1 << 16
"""The rank of a request that has waited long enough: above every other."""


class Priority(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a request may claim. The higher its ``rank``, the sooner its turn. Of the rows that a model decodes together
    it leaves ``leaves_rows`` to requests that leave fewer. It waits at most ``starve_ms`` milliseconds for turns of
    higher ranks."""

    rank: int = 0
    leaves_rows: int = 0
    starve_ms: int = 30_000


NEUTRAL = Priority()
"""Of a request for which nothing was declared."""


class _Claim:
    __slots__ = ("behind_s", "priority", "since_s", "waits")

    def __init__(self, priority: Priority, now_s: float) -> None:
        self.priority, self.since_s, self.waits = priority, now_s, True
        self.behind_s = 0.0
        """How long it has waited for turns that went to higher ranks."""


class Turns:
    """Requests that compete for something that is given to one after another, and for how long each has waited for
    turns of higher ranks: the times between two turns of which the second went to one and could have been its own.
    Waiting behind its own rank does not count, or under a flood of low ranks all of them would soon be the highest.

    While higher ranks wait, at most every second turn goes to one that has waited long enough: a long queue of a low
    rank, all of which have, would else keep the higher ones waiting for all of it."""

    def __init__(self) -> None:
        self._claims: dict[int, _Claim] = {}
        self._waiting: Counter[int] = Counter()
        """How many of each rank wait."""
        self._turn_s = 0.0
        self._relieved = False
        """Whether the last turn went to one that had waited long enough."""

    @property
    def mixed(self) -> bool:
        """Whether requests of different ranks wait."""
        return len(self._waiting) > 1

    def arrive(self, number: int, priority: Priority, now_s: float) -> None:
        """A request begins to wait."""
        self._claims[number] = _Claim(priority, now_s)
        self._waiting[priority.rank] += 1

    def rank(self, number: int, now_s: float, *, could: bool = True) -> int:
        """A request's rank now: ``STARVED`` when it would have waited ``starve_ms`` for higher ones if one of those
        that wait with it had its turn, which ``could`` be this one's."""
        one = self._claims[number]
        rank = one.priority.rank
        waited_s = one.behind_s
        if one.waits and self.mixed and max(self._waiting) > rank:
            if self._relieved:
                return rank
            waited_s += self._since_turn_s(one, now_s) if could else 0.0
        return STARVED if waited_s and waited_s * 1000 >= one.priority.starve_ms else rank

    def take(self, number: int, now_s: float, could: Container[int] | None = None) -> None:
        """A request has its turn, which those who ``could`` have had instead: None for all."""
        rank, own = self.rank(number, now_s), self._claims[number].priority.rank
        self._rest(self._claims[number])
        if any(other < rank and other != own for other in self._waiting):
            for other, one in self._claims.items():
                lower = one.waits and one.priority.rank < rank and one.priority.rank != own
                if lower and (could is None or other in could):
                    one.behind_s += self._since_turn_s(one, now_s)
        self._turn_s, self._relieved = now_s, rank == STARVED

    def back(self, number: int, now_s: float) -> None:
        """One that had its turn waits again; what it has waited before still counts."""
        one = self._claims[number]
        if not one.waits:
            one.waits, one.since_s = True, now_s
            self._waiting[one.priority.rank] += 1

    def leave(self, number: int) -> None:
        """A request is over, or nobody wants it any more."""
        if (one := self._claims.pop(number, None)) is not None:
            self._rest(one)

    def _rest(self, one: _Claim) -> None:
        if one.waits:
            one.waits = False
            rank = one.priority.rank
            self._waiting[rank] -= 1
            if not self._waiting[rank]:
                del self._waiting[rank]

    def _since_turn_s(self, one: _Claim, now_s: float) -> float:
        return max(0.0, now_s - max(one.since_s, self._turn_s))
