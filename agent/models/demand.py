"""Demand for a model: a decaying request rate, and counts of the last hour. Pure: the time is an argument."""

import math
from collections import deque

HALF_LIFE_S = 120.0
"""A request counts half as much after this time; chosen with scripts/simulate_eviction.py."""
_DECAY_PER_S = math.log(2) / HALF_LIFE_S
_MINUTES = 60


class Demand:
    """Requests for one model, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self._weight = self._weighed_s = 0.0
        self._minutes: deque[tuple[int, int]] = deque()
        self.last_s: float | None = None

    def asked(self, now_s: float) -> None:
        """Count one request."""
        self._weight = self._weight_at(now_s) + 1.0
        self._weighed_s = now_s
        self.last_s = now_s
        minute = int(now_s // 60)
        count = self._minutes.pop()[1] if self._minutes and self._minutes[-1][0] == minute else 0
        self._minutes.append((minute, count + 1))
        self._forget(minute)

    def ended(self, now_s: float) -> None:
        """A request has ended; until then the model was in use."""
        self.last_s = now_s

    def per_s(self, now_s: float) -> float:
        """Requests per second, recent ones weighing more: the decayed count over the mean time that one counts."""
        return self._weight_at(now_s) * _DECAY_PER_S

    def last_hour(self, now_s: float) -> int:
        """Requests of the last sixty minutes, the running one included."""
        self._forget(int(now_s // 60))
        return sum(count for _, count in self._minutes)

    def _weight_at(self, now_s: float) -> float:
        return self._weight * math.exp(-_DECAY_PER_S * max(0.0, now_s - self._weighed_s))

    def _forget(self, minute: int) -> None:
        while self._minutes and self._minutes[0][0] <= minute - _MINUTES:
            self._minutes.popleft()
