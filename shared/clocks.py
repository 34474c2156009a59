"""Whether this machine slept: the difference of two clocks, one of which stands still meanwhile. A timer that is late
says nothing about that, because a busy machine is late, too."""

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

SLEPT_S = 1.0
"""Less is not told from reading two clocks one after the other."""


class Reading(NamedTuple):
    """Seconds of the clock that counts sleep, and of the one that does not just before and just after it was read."""

    awake_before_s: float
    through_s: float
    awake_after_s: float


def read() -> Reading:
    """Both clocks now."""
    if sys.platform == "darwin":
        awake, through = time.CLOCK_UPTIME_RAW, time.CLOCK_MONOTONIC_RAW
    else:
        awake, through = time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME
    return Reading(time.clock_gettime(awake), time.clock_gettime(through), time.clock_gettime(awake))


def slept_s(before: Reading, now: Reading) -> float:
    """For how long the machine slept between two readings, at least; 0.0 below ``SLEPT_S``. A process that is held up
    while it reads makes this less, never more. Pure."""
    least_now, most_before = now.through_s - now.awake_after_s, before.through_s - before.awake_before_s
    return least_now - most_before if least_now - most_before >= SLEPT_S else 0.0


class SleepWatch:
    """Tells of each sleep once."""

    def __init__(self, read: Callable[[], Reading] = read) -> None:
        self._read, self._before = read, read()

    def look(self) -> float:
        """For how long the machine slept since the last call, in seconds."""
        before, self._before = self._before, self._read()
        return slept_s(before, self._before)
