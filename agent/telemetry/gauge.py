"""A value that is polled every few seconds and reported once a minute. Pure: the time is an argument."""

from typing import NamedTuple

HOLDS_S = 15.0
"""A value is assumed to hold until the next one, but at most for this long."""


class Seen(NamedTuple):
    """``mean`` is weighted by time; ``covered_s`` is the time for which a value was known."""

    mean: float
    most: float
    covered_s: float


class Gauge:
    """One value. A window ends with ``close`` and the next begins with the value that held then."""

    def __init__(self) -> None:
        self._last: tuple[float, float, float] | None = None
        self._sum = self._covered_s = 0.0
        self._most: float | None = None

    def add(self, now_s: float, value: float | None) -> None:
        """Record the current value; None when it cannot be read: the last one no longer holds."""
        self._advance(now_s)
        self._last = None if value is None else (now_s, now_s + HOLDS_S, value)
        if value is not None:
            self._most = value if self._most is None else max(self._most, value)

    def close(self, now_s: float) -> Seen | None:
        """Summary since the last call; None without a value."""
        self._advance(now_s)
        most, total, covered_s = self._most, self._sum, self._covered_s
        self._sum = self._covered_s = 0.0
        self._most = None
        if most is None:
            return None
        # a window with a single reading at its very end has no time to weight it by
        mean = total / covered_s if covered_s > 0 else self._last[2] if self._last else most
        return Seen(mean, most, covered_s)

    def _advance(self, now_s: float) -> None:
        if self._last is None:
            return
        since_s, until_s, value = self._last
        held_s = max(0.0, min(now_s, until_s) - since_s)
        if held_s > 0:
            self._sum += value * held_s
            self._covered_s += held_s
            self._most = value if self._most is None else max(self._most, value)
        self._last = (now_s, until_s, value) if now_s < until_s else None
