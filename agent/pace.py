"""How evenly a loader's answers flow: gaps between tokens, and what a swap did to them. Pure: times are arguments."""

from collections import deque
from typing import NamedTuple

KEPT = 4_096
RAISED = 2.0
"""A gap counts as raised from so many times the usual one on."""


class Raised(NamedTuple):
    """Gaps between tokens before and during something, and for how long they were raised; None where none was seen."""

    before_p95_s: float | None
    during_p95_s: float | None
    window_s: float


class Pace:
    """The latest gaps between two pieces of the same answer."""

    def __init__(self) -> None:
        self._gaps: deque[tuple[float, float]] = deque(maxlen=KEPT)

    def gap(self, now_s: float, gap_s: float) -> None:
        """Note one."""
        self._gaps.append((now_s, gap_s))

    def raised(self, since_s: float, until_s: float, lookback_s: float = 60.0) -> Raised:
        """Compare the gaps between ``since_s`` and ``until_s`` with those of the ``lookback_s`` before.

        The window of raised latency goes from the beginning of the first raised gap to the end of the last.
        """
        before = [gap for at, gap in self._gaps if since_s - lookback_s <= at < since_s]
        during = [(at, gap) for at, gap in self._gaps if since_s <= at <= until_s]
        usual = p95(before)
        if usual is None or not during:
            return Raised(usual, p95([gap for _, gap in during]), 0.0)
        high = [(at, gap) for at, gap in during if gap >= RAISED * usual]
        window = max(at for at, _ in high) - min(at - gap for at, gap in high) if high else 0.0
        return Raised(usual, p95([gap for _, gap in during]), window)


def p95(gaps: list[float]) -> float | None:
    """The 95th percentile by nearest rank."""
    return sorted(gaps)[max(0, -(-len(gaps) * 95 // 100) - 1)] if gaps else None
