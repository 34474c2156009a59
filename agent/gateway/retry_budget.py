"""How many requests may be tried again: a share of the traffic, so that a rack in trouble is not given more of it.
Pure.

A bucket of tokens: each request adds ``SHARE`` of one, each retry takes one; ``FLOOR_PER_S`` come by themselves, so
that a quiet rack can still retry.
"""

SHARE = 0.2
FLOOR_PER_S = 2.0
MOST = 100.0
"""More than one node can take with it at once."""


class RetryBudget:
    """One door's."""

    def __init__(self, now_s: float) -> None:
        self._tokens = MOST
        self._at_s = now_s
        self.refused = 0

    def asked(self) -> None:
        """A request of a client came."""
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
        """Retries that are left, for people."""
        return round(self._tokens, 1)
