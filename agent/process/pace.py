"""Inter-token latency (ITL) of a loader's answers, and the effect of a swap on it. Pure: times are arguments."""

from collections import deque
from typing import NamedTuple

from shared.sketch import Sketch

SLICE_S = 0.25
KEPT_S = 600.0
RAISED = 2.0
"""A time slice counts as raised when its p95 is at least this many times the baseline."""


class Raised(NamedTuple):
    """The p95 of ITL before and during a span, in microseconds, None without data; and for how many seconds it was
    raised, to the precision of one slice."""

    before_us: int | None
    during_us: int | None
    window_s: float


class Pace:
    """ITL of the last ten minutes, as one sketch per quarter second."""

    def __init__(self) -> None:
        self._slices: deque[tuple[int, Sketch]] = deque(maxlen=int(KEPT_S / SLICE_S))

    def gap(self, now_s: float, gap_s: float) -> None:
        """Record one gap."""
        number = int(now_s / SLICE_S)
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append((number, Sketch()))
        self._slices[-1][1].add(int(gap_s * 1e6))

    def raised(self, since_s: float, until_s: float, lookback_s: float = 60.0) -> Raised:
        """Compare ITL between ``since_s`` and ``until_s`` with that of the preceding ``lookback_s``. The span of raised
        latency extends from the first raised slice to the end of the last."""
        begin, end = int(since_s / SLICE_S), int(until_s / SLICE_S)
        before = [one for at, one in self._slices if begin - lookback_s / SLICE_S <= at < begin]
        during = [(at, one) for at, one in self._slices if begin <= at <= end]
        usual, now = _p95(before), _p95([one for _, one in during])
        if usual is None:
            return Raised(None, now, 0.0)
        high = [at for at, one in during if (_p95([one]) or 0) >= RAISED * usual]
        return Raised(usual, now, (high[-1] - high[0] + 1) * SLICE_S if high else 0.0)


def _p95(sketches: list[Sketch]) -> int | None:
    total = Sketch()
    for one in sketches:
        total.merge(one)
    value = total.quantile(0.95)
    return None if value is None else int(value)
