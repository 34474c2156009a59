"""Whether a node that failed gets more work. Pure: the time is an argument.

Failures are what the node did to requests: it refused to connect, answered 5xx, stalled, or broke off after a 200.
What a client did (a bad request, hanging up) says nothing about a node. After ``OPENS_AFTER`` failures in a row, or
when half of at least ``MANY`` answers of the last ``WINDOW_S`` failed, the breaker opens; after a pause that grows it
lets exactly one request through, and closes when that succeeds.
"""

from collections import deque
from typing import Literal

OPENS_AFTER = 3
MANY = 10
WINDOW_S = 20.0
FIRST_PAUSE_S = 2.0
MAX_PAUSE_S = 30.0
SAME_S = 0.1
"""Failures that are not further apart are one event."""

State = Literal["closed", "open", "half_open", "probing"]


class Breaker:
    """One model on one node."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._ends: deque[tuple[float, bool]] = deque(maxlen=200)
        self._open_until_s: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._probing = self._early = False
        self._failed_s = float("-inf")
        self.reason = ""

    def state(self, now_s: float) -> State:
        """Closed; open until its pause is over; half_open when one request may try; probing while that one runs."""
        if self._open_until_s is None:
            return "closed"
        if self._probing:
            return "probing"
        return "open" if now_s < self._open_until_s else "half_open"

    def left_s(self, now_s: float) -> float:
        """Until one request may try; 0 when it may now."""
        return max(0.0, (self._open_until_s or 0.0) - now_s)

    def begin(self, now_s: float) -> bool:
        """A request is sent; True when its end decides whether the breaker closes."""
        if self.state(now_s) in ("closed", "probing"):
            return False
        self._probing, self._early = True, self.left_s(now_s) > 0
        return True

    def ok(self, now_s: float, *, probe: bool = False) -> None:
        """An answer came to its end. One that was sent before the breaker opened does not close it."""
        self._ends.append((now_s, True))
        self._in_a_row = 0
        if probe:
            self._probing, self._open_until_s, self._pause_s = False, None, FIRST_PAUSE_S
            self._ends.clear()

    def failed(self, now_s: float, reason: str, *, probe: bool = False) -> None:
        """The node failed a request. One that was sent before the breaker opened does not prolong the pause; several at
        the same time are one event: a connection that breaks takes all its requests with it."""
        one_event = now_s - self._failed_s < SAME_S and not probe
        if not one_event:
            self._ends.append((now_s, False))
            self._in_a_row += 1
            self._failed_s = now_s
        if self._open_until_s is None:
            if self._in_a_row >= OPENS_AFTER or self._half_failed(now_s):
                self._open(now_s, reason)
        elif probe and self._early:
            self._probing = False  # tried because nobody else was left: the pause is what it was
        elif probe:
            self._pause_s = min(MAX_PAUSE_S, self._pause_s * 2)
            self._open(now_s, reason)

    def given_up(self, *, probe: bool) -> None:
        """A request ended without saying anything about the node: a client's fault, or the client left."""
        if probe:
            self._probing = False

    def fresh(self, now_s: float) -> None:
        """The node was away and is back, or has started anew: one request may try at once."""
        if self._open_until_s is not None:
            self._open_until_s, self._probing, self._pause_s = now_s, False, FIRST_PAUSE_S

    def _open(self, now_s: float, reason: str) -> None:
        self._open_until_s, self._probing, self.reason = now_s + self._pause_s, False, reason

    def _half_failed(self, now_s: float) -> bool:
        recent = [good for at, good in self._ends if at > now_s - WINDOW_S]
        return len(recent) >= MANY and 2 * recent.count(False) >= len(recent)
