"""Circuit breaker of a provider: one that fails is not asked again for a while. Pure: the time is an argument.

Three failures in a row open it. After its pause one request may try (half-open) while others are refused; each failure
doubles the pause. A provider that says when to come back is not asked before, within ``MOST_TOLD_S``.
"""

OPENS_AFTER = 3
FIRST_PAUSE_S = 5.0
MOST_PAUSE_S = 300.0
MOST_TOLD_S = 120.0
"""A provider cannot keep itself from being asked for longer than this."""


class Breaker:
    """The circuit breaker of one provider, as it is configured now."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._pause_s = FIRST_PAUSE_S
        self._until_s = 0.0
        self._open = self._trying = False
        self.reason = ""

    def rest_s(self, now_s: float) -> float:
        """How long it is not to be asked; 0 if it may be asked now."""
        left_s = max(0.0, self._until_s - now_s)
        # the one that tries ends within its own time; until then another guess is as good as the first pause
        return left_s or (FIRST_PAUSE_S if self._open and self._trying else 0.0)

    def began(self) -> bool:
        """A request is sent; True if it is the one that tries, which has to be told to ``ended``."""
        if not self._open or self._trying:
            return False
        self._trying = True
        return True

    def ok(self) -> None:
        """It answered completely, or refused a request for what is in it."""
        self._in_a_row, self._open, self._pause_s, self._until_s, self.reason = 0, False, FIRST_PAUSE_S, 0.0, ""

    def failed(self, now_s: float, reason: str, told_s: float | None = None, *, tried: bool = False) -> None:
        """It failed; ``told_s`` is when it said to come back. Only one that ``tried`` lengthens the pause: the others
        were sent before it."""
        self._in_a_row += 1
        self.reason = reason
        if tried:
            self._pause_s = min(MOST_PAUSE_S, self._pause_s * 2)
        if self._in_a_row >= OPENS_AFTER or self._open:
            self._open = True
            self._until_s = max(self._until_s, now_s + self._pause_s)
        if told_s is not None:
            self._until_s = max(self._until_s, now_s + min(told_s, MOST_TOLD_S))

    def ended(self, *, tried: bool) -> None:
        """A request is over, whatever came of it; ``tried`` as ``began`` answered."""
        if tried:
            self._trying = False
