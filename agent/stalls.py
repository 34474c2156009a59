"""When a worker that says nothing counts as lost: limits that are learned from what it usually takes. Pure.

Between tokens: ten times the usual p99 gap, at least ``GAP_FLOOR_S``. Before the first: ten times what the queue and
the prompt should take, at least ``FIRST_FLOOR_S``. Both never more than the configured bounds. A node that is gone
altogether is noticed by its beats long before; this is for those that answer beats and nothing else.
"""

from shared.sketch import Sketch

GAP_FLOOR_S = 5.0
FIRST_FLOOR_S = 15.0
TIMES = 10.0
_LOOK = 64
_TURN = 2_048
"""Gaps after which the older half of what is known is forgotten."""


class Gaps:
    """Gaps between the pieces of answers that came from one node, the last few thousand."""

    def __init__(self) -> None:
        self._older, self._newer, self._count = Sketch(), Sketch(), 0
        self._worst_s = 0.0

    def add(self, gap_s: float) -> None:
        """Note one."""
        self._newer.add(int(gap_s * 1e6))
        self._count += 1
        if self._count >= _TURN:
            self._older, self._newer, self._count = self._newer, Sketch(), 0
        if self._count % _LOOK == 1:  # a quantile costs more than a gap
            self._worst_s = max(self._p99_s(self._older), self._p99_s(self._newer))

    def limit_s(self, most_s: float) -> float:
        """How long a gap may be, in seconds."""
        return min(most_s, max(GAP_FLOOR_S, TIMES * self._worst_s))

    @staticmethod
    def _p99_s(sketch: Sketch) -> float:
        value = sketch.quantile(0.99)
        return 0.0 if value is None else value / 1e6


def first_limit_s(expected_s: float, most_s: float) -> float:
    """How long the first token may take where ``expected_s`` were expected, in seconds."""
    return min(most_s, max(FIRST_FLOOR_S, TIMES * expected_s))
