"""A value that is looked at every few seconds and reported once a minute. Pure: the time is an argument."""

from typing import NamedTuple

HOLDS_S = 15.0
"""A value is taken to hold until the next is seen, at most for so long."""


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

    def add(self, now_s: float, value: float) -> None:
        """It is ``value`` now."""
        self._advance(now_s)
        self._last = (now_s, now_s + HOLDS_S, value)
        self._most = value if self._most is None else max(self._most, value)

    def gone(self, now_s: float) -> None:
        """It cannot be read any more: what it was no longer holds."""
        self._advance(now_s)
        self._last = None

    def close(self, now_s: float) -> Seen | None:
        """What was seen since the last call; None when nothing was."""
        self._advance(now_s)
        most, total, covered_s = self._most, self._sum, self._covered_s
        self._sum = self._covered_s = 0.0
        self._most = None
        if most is None:
            return None
        # a window with a single look at its very end has no time to weigh it by
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
