"""Circuit breaker: whether a node that failed gets more requests. Pure: the time is an argument.

Failures are what the node did to requests: it refused to connect, answered 5xx, stalled, or disconnected after a 200.
What a client did (a bad request, a disconnect) is not evidence against a node. After ``OPENS_AFTER`` failures in a row,
or when half of at least ``MANY`` answers of the last ``RECENT_S`` failed, the breaker opens; after a back-off that
grows with each failure it lets exactly one request through (half-open), and closes when that succeeds.
"""

from collections import deque
from typing import Literal

OPENS_AFTER = 3
MANY = 10
RECENT_S = 20.0
FIRST_PAUSE_S = 2.0
MAX_PAUSE_S = 30.0
SAME_S = 0.1
"""Failures within this time of each other count as one."""

State = Literal["closed", "open", "half_open", "probing"]


class CircuitBreaker:
    """The circuit breaker of one model on one node."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._ends: deque[tuple[float, bool]] = deque(maxlen=200)
        self._open_until_s: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._probing = self._early = False
        self._failed_s = float("-inf")
        self.reason = ""

    def state(self, now_s: float) -> State:
        """Closed; open until its back-off ends; half_open when one request may try; probing while that one runs."""
        if self._open_until_s is None:
            return "closed"
        return "probing" if self._probing else "open" if now_s < self._open_until_s else "half_open"

    def left_s(self, now_s: float) -> float:
        """Time until one request may try; 0 if it may now."""
        return max(0.0, (self._open_until_s or 0.0) - now_s)

    def begin(self, now_s: float) -> bool:
        """A request is sent; True if its outcome decides whether the breaker closes."""
        if self.state(now_s) in ("closed", "probing"):
            return False
        self._probing, self._early = True, self.left_s(now_s) > 0
        return True

    def ok(self, now_s: float, *, probe: bool = False) -> None:
        """A request succeeded. One that was sent before the breaker opened does not close it."""
        self._ends.append((now_s, True))
        self._in_a_row = 0
        if probe:
            self._probing, self._open_until_s, self._pause_s = False, None, FIRST_PAUSE_S
            self._ends.clear()

    def failed(self, now_s: float, reason: str, *, probe: bool = False) -> None:
        """The node failed a request. One that was sent before the breaker opened does not extend the back-off; several
        at the same time count as one failure: a lost connection fails all its requests at once."""
        one_event = now_s - self._failed_s < SAME_S and not probe
        if not one_event:
            self._ends.append((now_s, False))
            self._in_a_row += 1
            self._failed_s = now_s
        if self._open_until_s is None:
            if self._in_a_row >= OPENS_AFTER or self._half_failed(now_s):
                self._open(now_s, reason)
        elif probe and self._early:
            self._probing = False  # tried early, as no other node was left: the back-off stays as it was
        elif probe:
            self._pause_s = min(MAX_PAUSE_S, self._pause_s * 2)
            self._open(now_s, reason)

    def given_up(self, *, probe: bool) -> None:
        """A request ended without evidence about the node: a client's error, or the client disconnected."""
        if probe:
            self._probing = False

    def fresh(self, now_s: float) -> None:
        """The node came back or restarted: one request may try at once."""
        if self._open_until_s is not None:
            self._open_until_s, self._probing, self._pause_s = now_s, False, FIRST_PAUSE_S

    def _open(self, now_s: float, reason: str) -> None:
        self._open_until_s, self._probing, self.reason = now_s + self._pause_s, False, reason

    def _half_failed(self, now_s: float) -> bool:
        recent = [good for at, good in self._ends if at > now_s - RECENT_S]
        return len(recent) >= MANY and 2 * recent.count(False) >= len(recent)
