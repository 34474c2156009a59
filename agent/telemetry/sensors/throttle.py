"""Duration and frequency of thermal throttling. Pure: the time is an argument, on a monotonic clock.

Levels are macOS thermal pressure: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping; None when unknown.
Throttled means level 2 and above, pressured level 1 and above. Everything is weighted by time, from one change of the
level to the next, never by the number of readings.
"""

from collections import deque

import msgspec

from shared.records import ThrottleEnded, ThrottleEvent

LEVELS = ("nominal", "moderate", "heavy", "trapping", "sleeping")
THROTTLED_FROM = 2
PRESSURED_FROM = 1
LOOK_BACK_S = 300.0
COVERAGE = 0.8
"""A share of the last five minutes is only reported when at least this much of them is known."""
DEBOUNCE_S = 10.0
"""Leaving the level for no longer than this does not end an event."""

Level = int | None


class Throttled(msgspec.Struct, frozen=True, kw_only=True):
    """A throttle event, with start and end on the caller's clock and ``peak``, the highest level. ``open_at_start``:
    already hot when monitoring began or resumed, which does not count as a crossing."""

    start_s: float
    end_s: float | None
    peak: int
    open_at_start: bool = False


def as_record(event: Throttled, now_s: float, now_ms: int) -> ThrottleEvent | ThrottleEnded:
    """The event as a batch record; ``now_s`` on the event's clock is ``now_ms`` on the wall clock."""
    start_ms = now_ms - round((now_s - event.start_s) * 1000)
    if event.end_s is None:
        return ThrottleEvent(t_ms=start_ms, level=LEVELS[event.peak], open_at_start=event.open_at_start)
    return ThrottleEnded(
        t_ms=now_ms - round((now_s - event.end_s) * 1000),
        start_ms=start_ms,
        level=LEVELS[event.peak],
        duration_us=round((event.end_s - event.start_s) * 1e6),
        open_at_start=event.open_at_start,
    )


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds at each level since the last window, as far as known; the highest level."""

    level_s: tuple[float, float, float, float, float]
    worst: Level

    @property
    def known_s(self) -> float:
        """Seconds with a known level."""
        return sum(self.level_s)

    def from_s(self, level: int) -> float:
        """Seconds at this level and above."""
        return sum(self.level_s[level:])


class Throttle:
    """Call ``see`` with each level as it is read, and at least about every ten seconds."""

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s
        self._level: Level = None
        self._past: deque[tuple[float, float, Level]] = deque()
        self._level_s = [0.0] * len(LEVELS)
        self._worst: Level = None
        self._open: Throttled | None = None
        self._left_s: float | None = None
        # never read before: heat at the first reading began earlier
        self._blind_s: float | None = float("-inf")

    @property
    def level(self) -> Level:
        """The last known level."""
        return self._level

    def see(self, now_s: float, level: Level) -> list[Throttled]:
        """Record the current level. Returns events that began (no end yet) or ended."""
        self._advance(now_s)
        found = self._ended()
        if level is None:
            self._lost_sight()
        else:
            found += self._moved(level)
            self._worst = level if self._worst is None else max(self._worst, level)
            self._blind_s = None
        self._level = level
        return found

    def window(self, now_s: float) -> Window:
        """Close the window: seconds since the last call."""
        self._advance(now_s)
        closed = Window(level_s=tuple(self._level_s), worst=self._worst)  # type: ignore[arg-type]
        self._level_s = [0.0] * len(LEVELS)
        self._worst = self._level
        return closed

    def share_5m(self, now_s: float, level: int = THROTTLED_FROM) -> tuple[float | None, float]:
        """The share of the last five minutes' known time at this level and above, and the coverage; the share is None
        when coverage is too low."""
        self._advance(now_s)
        begin_s = now_s - LOOK_BACK_S
        known_s = there_s = 0.0
        for from_s, to_s, at in self._past:
            if at is None:
                continue
            length_s = max(0.0, to_s - max(from_s, begin_s))
            known_s += length_s
            there_s += length_s if at >= level else 0.0
        coverage = known_s / LOOK_BACK_S
        # a tolerance of 1e-9, so that rounding in the sums does not fall below the threshold
        return (there_s / known_s if coverage >= COVERAGE - 1e-9 else None), coverage

    def _advance(self, now_s: float) -> None:
        if now_s <= self._now_s:
            return
        last = self._past[-1] if self._past else None
        if last is not None and last[2] == self._level and last[1] == self._now_s:
            self._past[-1] = (last[0], now_s, self._level)
        else:
            self._past.append((self._now_s, now_s, self._level))
        if self._level is not None:
            self._level_s[self._level] += now_s - self._now_s
        self._now_s = now_s
        while self._past and self._past[0][1] <= now_s - LOOK_BACK_S:
            self._past.popleft()

    def _lost_sight(self) -> None:
        """The level is unknown: an event lasts as long as it was seen."""
        if self._blind_s is None:
            self._blind_s = self._now_s
        if self._open is not None and self._left_s is None:
            self._left_s = self._now_s

    def _moved(self, level: int) -> list[Throttled]:
        hot = level >= THROTTLED_FROM
        if hot and self._open is None:
            unseen = self._blind_s is not None and self._now_s - self._blind_s > DEBOUNCE_S
            self._open = Throttled(start_s=self._now_s, end_s=None, peak=level, open_at_start=unseen)
            self._left_s = None
            return [self._open]
        if hot and self._open is not None:
            self._left_s = None
            self._open = msgspec.structs.replace(self._open, peak=max(self._open.peak, level))
        elif self._open is not None and self._left_s is None:
            self._left_s = self._now_s
        return []

    def _ended(self) -> list[Throttled]:
        """End an event whose level has been left for longer than the debounce time."""
        if self._open is None or self._left_s is None or self._now_s - self._left_s <= DEBOUNCE_S:
            return []
        over = msgspec.structs.replace(self._open, end_s=self._left_s)
        self._open = self._left_s = None
        return [over]
