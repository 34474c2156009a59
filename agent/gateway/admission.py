"""Admission: whether a request may start now, and when to retry if not. Pure: the time is an argument."""

from collections import deque
from collections.abc import Callable

import msgspec

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
