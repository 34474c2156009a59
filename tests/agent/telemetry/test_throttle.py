"""Throttle arithmetic against a model that evaluates every tenth of a second separately."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.telemetry.sensors.throttle import (
    COVERAGE,
    DEBOUNCE_S,
    LEVELS,
    LOOK_BACK_S,
    THROTTLED_FROM,
    Throttle,
    Throttled,
    as_record,
)
from shared.records import ThrottleEnded, ThrottleEvent

STEP = 0.5
"""Changes happen at multiples of this, so that a model of such steps is exact."""

Level = int | None
moves = st.lists(
    st.tuples(st.integers(1, 200).map(lambda n: n * STEP), st.sampled_from([None, 0, 1, 2, 3, 4])), max_size=40
)


def levels_by_step(happened: list[tuple[float, Level]]) -> list[Level]:
    """The level in each step, from the first poll at 0 on; unknown before any poll."""
    found: list[Level] = []
    level: Level = None
    for after_s, new in happened:
        found += [level] * round(after_s / STEP)
        level = new
    return found


def brute_share(steps: list[Level], at: int) -> tuple[float | None, float]:
    last = steps[-round(LOOK_BACK_S / STEP) :]
    known = [level for level in last if level is not None]
    coverage = len(known) * STEP / LOOK_BACK_S
    share = sum(level >= at for level in known) / len(known) if known else None
    return (share if coverage >= COVERAGE else None), coverage


def brute_events(steps: list[Level]) -> list[tuple[float, float | None, int, bool]]:
    """Start, end, peak and open_at_start of each event, step by step."""
    found: list[tuple[float, float | None, int, bool]] = []
    blind_s = math.inf
    start: float | None = None
    left: float | None = None
    peak, at_start = 0, False
    for n, level in enumerate(steps):
        now = n * STEP
        if start is not None and left is not None and now - left > DEBOUNCE_S:
            found.append((start, left, peak, at_start))
            start = left = None
        if level is not None and level >= THROTTLED_FROM:
            if start is None:
                start, peak, at_start = now, level, blind_s > DEBOUNCE_S
            peak, left = max(peak, level), None
        elif start is not None and left is None:
            left = now
        blind_s = blind_s + STEP if level is None else 0.0
    if start is not None:
        over = left is not None and len(steps) * STEP - left > DEBOUNCE_S
        found.append((start, left if over else None, peak, at_start))
    return found


@given(moves)
@settings(max_examples=400)
def test_shares_and_events_match_a_second_by_second_model(happened: list[tuple[float, Level]]) -> None:
    throttle, now = Throttle(0.0), 0.0
    events: list[Throttled] = []
    for after_s, level in happened:
        # additional polls must change nothing
        for looks in range(1, int(after_s // 7)):
            events += throttle.see(now + looks * 7, throttle.level)
        now += after_s
        events += throttle.see(now, level)
    tail_s = 30.0
    last = happened[-1][1] if happened else None
    for n in range(1, round(tail_s / STEP) + 1):
        events += throttle.see(now + n * STEP, last)
    now += tail_s
    steps = [*levels_by_step(happened), *([last] * round(tail_s / STEP))]

    for at in (1, 2):
        share, coverage = throttle.share_5m(now, at)
        expected_share, expected_coverage = brute_share(steps, at)
        assert coverage == pytest.approx(expected_coverage)
        assert share == (None if expected_share is None else pytest.approx(expected_share))
    window = throttle.window(now)
    assert window.level_s == pytest.approx([sum(s == n for s in steps) * STEP for n in range(5)])
    assert window.worst == max((s for s in steps if s is not None), default=None)

    begun = [e for e in events if e.end_s is None]
    ended = {e.start_s: e for e in events if e.end_s is not None}
    expected = brute_events(steps)
    assert [(e.start_s, e.open_at_start) for e in begun] == [(start, at_start) for start, _, _, at_start in expected]
    for start, end, peak, _ in expected:
        if end is not None:
            assert ended[start].peak == peak
            assert ended[start].end_s == end
        else:
            assert start not in ended


@given(moves)
def test_windows_add_up_to_the_total_time(happened: list[tuple[float, Level]]) -> None:
    throttle, whole, now, known = Throttle(0.0), Throttle(0.0), 0.0, 0.0
    for after_s, level in happened:
        now += after_s
        throttle.see(now, level)
        whole.see(now, level)
        known += throttle.window(now).known_s
    assert known == pytest.approx(whole.window(now).known_s)


def test_a_hot_first_sample_is_not_a_crossing() -> None:
    throttle = Throttle(100.0)
    (event,) = throttle.see(100.0, 3)
    assert event == Throttled(start_s=100.0, end_s=None, peak=3, open_at_start=True)
    assert throttle.see(101.0, 0) == []
    assert throttle.see(111.1, 0) == [Throttled(start_s=100.0, end_s=101.0, peak=3, open_at_start=True)]


def test_a_return_within_ten_seconds_is_one_episode() -> None:
    throttle = Throttle(0.0)
    throttle.see(0.0, 0)
    assert len(throttle.see(10.0, 2)) == 1
    throttle.see(20.0, 1)
    assert throttle.see(30.0, 4) == [], "ten seconds after it left: the same event"
    throttle.see(40.0, 0)
    assert throttle.see(50.5, 0) == [Throttled(start_s=10.0, end_s=40.0, peak=4)]
    assert throttle.see(60.0, 2) == [Throttled(start_s=60.0, end_s=None, peak=2)], "that is a new one"


def test_insufficient_coverage_gives_no_share() -> None:
    throttle = Throttle(0.0)
    throttle.see(0.0, 2)
    assert throttle.share_5m(200.0)[0] is None
    assert throttle.share_5m(240.0) == pytest.approx((1.0, 0.8))
    throttle.see(270.0, 0)
    assert throttle.share_5m(300.0) == pytest.approx((0.9, 1.0))


def test_events_have_wall_clock_times() -> None:
    begun = Throttled(start_s=90.0, end_s=None, peak=2)
    assert as_record(begun, 100.0, 1_000_000) == ThrottleEvent(t_ms=990_000, level=LEVELS[2])
    over = Throttled(start_s=90.0, end_s=95.0, peak=3, open_at_start=True)
    assert as_record(over, 100.0, 1_000_000) == ThrottleEnded(
        t_ms=995_000, start_ms=990_000, level="trapping", duration_us=5_000_000, open_at_start=True
    )
