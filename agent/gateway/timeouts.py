"""Adaptive timeouts: when a silent worker counts as stalled, learned from its usual times. Pure.

Between tokens: ten times the usual p99 gap, or the expected one, at least ``GAP_FLOOR_S``. Before the first: ten times
the expected time of queue and prefill, at least ``FIRST_FLOOR_S``. Neither exceeds the configured limits. Both limit
silence, not duration: while a worker reports that a request waits or that its prompt is being computed, a first token
may take any time. A node that is gone altogether is detected by missed heartbeats long before; this is for those that
answer heartbeats and nothing else.
"""

from shared.sketch import Sketch

GAP_FLOOR_S = 5.0
FIRST_FLOOR_S = 15.0
TIMES = 10.0
_LOOK = 64
_TURN = 2_048
"""TokenGaps after which the older half of the history is dropped."""


class TokenGaps:
    """TokenGaps between the pieces of one node's answers, the last few thousand."""

    def __init__(self) -> None:
        self._older, self._newer, self._count = Sketch(), Sketch(), 0
        self._worst_s = 0.0

    def add(self, gap_s: float) -> None:
        """Record a gap."""
        self._newer.add(int(gap_s * 1e6))
        self._count += 1
        if self._count >= _TURN:
            self._older, self._newer, self._count = self._newer, Sketch(), 0
        if self._count % _LOOK == 1:  # a quantile costs more than recording a gap
            self._worst_s = max(self._p99_s(self._older), self._p99_s(self._newer))

    def limit_s(self, most_s: float, expected_s: float = 0.0) -> float:
        """The longest gap allowed, in seconds, where ``expected_s`` is what a step was expected to take."""
        return min(most_s, max(GAP_FLOOR_S, TIMES * max(self._worst_s, expected_s)))

    @staticmethod
    def _p99_s(sketch: Sketch) -> float:
        value = sketch.quantile(0.99)
        return 0.0 if value is None else value / 1e6


def first_limit_s(expected_s: float, most_s: float) -> float:
    """The timeout of a first token that was expected after ``expected_s``, in seconds."""
    return min(most_s, max(FIRST_FLOOR_S, TIMES * expected_s))


class AttemptTimeouts:
    """Timeouts of one attempt: of the silence before its first token, of the gaps after it, and of the request, which
    ends at ``until_s``. The time in which its worker says that it waits or that its prompt is computed does not count,
    and a ``fresh`` answer has ``request_s`` from its first token on. ``learned`` (adaptive) timeouts apply where
    another node could take over; ``step_s`` is the expected gap."""

    def __init__(
        self,
        gaps: TokenGaps,
        *,
        first_s: float,
        gap_s: float,
        until_s: float,
        learned: bool,
        request_s: float,
        fresh: bool = True,
        step_s: float = 0.0,
    ) -> None:
        self._gaps, self._first_s, self._gap_s, self.until_s = gaps, first_s, gap_s, until_s
        self._learned, self._request_s, self._fresh = learned, request_s, fresh
        self._step_s = step_s
        self._asked_s = self._heard_s = self.waited_s = 0.0
        self.is_over = False
        """Whether the limit is the request's deadline, not the next piece's timeout."""

    def limit_s(self, now_s: float) -> float:
        """The timeout of the next piece, from now."""
        self._asked_s = now_s
        if not self._heard_s:
            limit_s = self._first_s
        else:
            limit_s = self._gaps.limit_s(self._gap_s, self._step_s) if self._learned else self._gap_s
        over_s = self.until_s - now_s
        self.waited_s, self.is_over = limit_s, over_s <= limit_s
        return max(0.0, min(limit_s, over_s))

    def token(self, now_s: float) -> None:
        """A piece of the answer arrived."""
        if self._heard_s:
            # the time that the client took to read is not the worker's gap
            self._gaps.add(now_s - max(self._asked_s, self._heard_s))
        elif self._fresh:
            self.until_s = now_s + self._request_s
        self._heard_s = now_s

    def waits(self, now_s: float) -> None:
        """The request is queued, its prompt is being computed, or it was set aside for lack of memory: its silence
        means nothing, and before its first token its time stands still."""
        if self._heard_s:
            self._heard_s = now_s
        else:
            self.until_s += now_s - self._asked_s
