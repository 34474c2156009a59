"""Retry budget: retries are limited to a share of the traffic, so that a rack in trouble does not get more load.
Pure.

A token bucket: each request adds ``SHARE`` of a token, each retry takes one; ``FLOOR_PER_S`` are added per second, so
that a quiet rack can still retry.
"""

SHARE = 0.2
FLOOR_PER_S = 2.0
MOST = 100.0
"""The bucket's capacity: more requests than one node can lose at once."""


class RetryBudget:
    """The retry budget of one gateway."""

    def __init__(self, now_s: float) -> None:
        self._tokens = MOST
        self._at_s = now_s
        self.refused = 0

    def asked(self) -> None:
        """A client's request arrived."""
        self._tokens = min(MOST, self._tokens + SHARE)

    def take(self, now_s: float) -> bool:
        """Whether one more retry is allowed now."""
        self._tokens = min(MOST, self._tokens + max(0.0, now_s - self._at_s) * FLOOR_PER_S)
        self._at_s = max(self._at_s, now_s)
        if self._tokens < 1.0:
            self.refused += 1
            return False
        self._tokens -= 1.0
        return True

    def left(self) -> float:
        """Remaining retries, for display."""
        return round(self._tokens, 1)
