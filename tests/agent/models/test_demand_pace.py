"""Demand of a model, and the pace of its answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.models.demand import HALF_LIFE_S, Demand
from agent.process.pace import KEPT_S, SLICE_S, Pace


def test_the_rate_is_right_for_steady_traffic_and_halves_when_it_stops() -> None:
    demand = Demand()
    assert demand.per_s(5.0) == 0.0
    for tick in range(12_000):
        demand.asked(tick * 0.5)
    assert demand.per_s(6_000.0) == pytest.approx(2.0, rel=0.01)
    assert demand.per_s(6_000.0 + HALF_LIFE_S) == pytest.approx(1.0, rel=0.01)
    assert demand.last_s == 5_999.5


@given(st.lists(st.floats(0, 20_000), max_size=200))
def test_the_last_hour_is_counted_by_the_minute(times: list[float]) -> None:
    demand = Demand()
    for at in sorted(times):
        demand.asked(at)
    now = max(times, default=0.0)
    assert demand.last_hour(now) == sum(int(at // 60) > int(now // 60) - 60 for at in times)
    assert len(demand._minutes) <= 60


def test_a_raised_window_is_measured_from_first_to_last_slice() -> None:
    pace = Pace()
    for tick in range(100):
        pace.gap(tick * 0.1, 0.1)
    assert pace.raised(5.0, 10.0).window_s == 0.0
    for at, gap in ((10.6, 0.5), (11.1, 0.1), (11.6, 0.4), (12.1, 0.1)):
        pace.gap(at, gap)
    raised = pace.raised(10.0, 13.0)
    assert raised.before_us == pytest.approx(100_000, rel=0.02)
    assert raised.during_us == pytest.approx(500_000, rel=0.02)
    assert raised.window_s == pytest.approx(1.25), "from 10.5 to 11.75"


def test_no_latency_is_reported_without_gaps() -> None:
    assert Pace().raised(0.0, 9.0) == (None, None, 0.0)
    pace = Pace()
    pace.gap(5.0, 1.0)
    assert pace.raised(4.0, 9.0).before_us is None


def test_memory_is_bounded_by_time_not_by_traffic() -> None:
    pace = Pace()
    for tick in range(20_000):
        pace.gap(tick * 0.1, 0.01)
    assert len(pace._slices) == KEPT_S / SLICE_S
    for _ in range(10_000):
        pace.gap(3_000.0, 0.01)
    assert len(pace._slices) == KEPT_S / SLICE_S
