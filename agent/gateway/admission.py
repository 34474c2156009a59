"""Admission: whether a request may start now, and when to retry if not. Pure: the time is an argument."""

from collections import Counter, deque
from collections.abc import Callable

import msgspec

from agent.policy.classes import TaskClass, rank_of
from agent.policy.rules import Admission
from agent.wire.priority import Priority

_RECENT_S = 30.0
_UNKNOWN_WAIT_S = 5.0


class Admit(msgspec.Struct, frozen=True):
    """The request may start."""


ADMITTED = Admit()


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """Rejected; ``retry_after_s`` is when capacity is likely to be free."""

    code: str
    retry_after_s: int


class Admitted:
    """The place of an admitted request; ``leave`` gives it back at the end of the context. A class: each request enters
    two of them, and a generator's context costs three times as much."""

    __slots__ = ("_leave",)

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._leave()


class Load(msgspec.Struct, frozen=True):
    """Requests in flight and their limit."""

    in_flight: int
    limit: int

    @property
    def over(self) -> int:
        """How many must end before one more may start; 0 if it may start now."""
        return max(0, self.in_flight - self.limit + 1)


class DrainRate:
    """Requests completed per second over the last half minute."""

    def __init__(self) -> None:
        self._ended: deque[float] = deque()

    def ended(self, now_s: float) -> None:
        """Count a completed request."""
        self._ended.append(now_s)
        self._forget(now_s)

    def per_s(self, now_s: float) -> float:
        """The current rate; 0 when nothing completed recently."""
        self._forget(now_s)
        if not self._ended:
            return 0.0
        # over at least a second, so that a burst of two does not suggest a thousand
        return len(self._ended) / max(1.0, now_s - self._ended[0])

    def _forget(self, now_s: float) -> None:
        while self._ended and self._ended[0] < now_s - _RECENT_S:
            self._ended.popleft()


_NO_SHARE = Load(0, 1)


def priority_of(task_class: TaskClass, class_from: str, rules: Admission) -> Priority:
    """What a request of this class may claim, wherever it waits for others. Those below ORCHESTRATION leave it the rows
    that are reserved for it; those below REASONING, the ones whose class was guessed included, also that one's."""
    rank = rank_of(task_class, class_from)
    leaves = rules.reserved_orchestration if rank < rank_of("ORCHESTRATION", "header") else 0
    leaves += rules.reserved_reasoning if rank < rank_of("REASONING", "header") else 0
    return Priority(rank=rank, leaves_rows=leaves, starve_ms=int(rules.starve_s * 1000))


class _Held:
    """Of one model or key."""

    def __init__(self) -> None:
        self.by_rank: Counter[int] = Counter()
        self.refused_s: dict[int, float] = {}
        """Since when each rank was only refused."""


class Places:
    """Requests in flight by rank, of each model or of each API key.

    What stands before a request are those of its own rank and above, so only they count against its limit: a higher
    rank gets in while lower ones fill all places, and has to wait for none of them. Each rank so takes at most as many
    places as the limit says, and where all requests have one rank all of them together do. One that was only refused
    for as long as it may wait for higher ranks, while such are in flight, gets a place beyond the limit."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    @property
    def total(self) -> int:
        """Requests in flight."""
        return sum(one.by_rank.total() for one in self._held.values())

    def of(self, name: str) -> int:
        """Those of a model or key."""
        held = self._held.get(name)
        return held.by_rank.total() if held else 0

    def load(self, name: str, parts: int, priority: Priority, limit: int, now_s: float, leaves: int = 0) -> Load:
        """What counts for a request of so many parts, as if it were one; it ``leaves`` places of the limit."""
        # a request of many parts would else never find so many places
        limit = max(parts, limit - leaves)
        if (held := self._held.get(name)) is None:
            return Load(parts - 1, limit)
        if self._starves(held, priority, now_s):
            return Load(0, 1)
        before = sum(count for rank, count in held.by_rank.items() if rank >= priority.rank)
        return Load(before + parts - 1, limit)

    def enter(self, name: str, parts: int, rank: int) -> None:
        """A request was admitted."""
        held = self._held.setdefault(name, _Held())
        held.by_rank[rank] += parts
        held.refused_s.pop(rank, None)

    def refused(self, name: str, rank: int, now_s: float) -> None:
        """A request was refused, because all places are taken."""
        if (held := self._held.get(name)) is not None:
            held.refused_s.setdefault(rank, now_s)

    def leave(self, name: str, parts: int, rank: int) -> None:
        """An admitted request has ended."""
        held = self._held[name]
        held.by_rank[rank] -= parts
        if not held.by_rank[rank]:
            del held.by_rank[rank]
        if not held.by_rank:
            del self._held[name]

    @staticmethod
    def _starves(held: _Held, priority: Priority, now_s: float) -> bool:
        since_s = held.refused_s.get(priority.rank)
        waited = since_s is not None and (now_s - since_s) * 1000 >= priority.starve_ms
        return waited and max(held.by_rank) > priority.rank


def admit(
    *, model: Load, key: Load, draining: bool, drain_rate_per_s: Callable[[], float], share: Load = _NO_SHARE
) -> Admit | Turn:
    """Admission per model and API key: reject while the node drains, and beyond either's limit of requests in flight,
    or beyond the key's fair ``share`` of the model's (agent/policy/limits/fair.py).
    The hint is the time in which the measured completion rate works off the excess over the limit, 1 to 60 s."""
    if draining:
        return Turn(code="draining", retry_after_s=1)
    over = max(model.over, key.over, share.over)
    if not over:
        return ADMITTED
    rate = drain_rate_per_s()
    wait_s = over / rate if rate > 0 else _UNKNOWN_WAIT_S
    return Turn(code="queue_full" if model.over else "key_queue_full", retry_after_s=round(min(60.0, max(1.0, wait_s))))
