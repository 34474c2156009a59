"""The tables of agent/DESIGN.md match the simulators, and the policies meet their bounds."""

import random
from pathlib import Path

import pytest

from agent.models.eviction import by_age, by_cost
from scripts import simulate_routing
from scripts.simulate_eviction import TRACES, simulate, table


def test_the_design_table_matches_the_simulator() -> None:
    assert table() in Path("agent/DESIGN.md").read_text(), "run `make simulate` and put its table there"


@pytest.mark.parametrize("name", TRACES)
def test_cost_is_not_worse_than_least_recently_used_by_more_than_a_tenth(name: str) -> None:
    for seed in range(20, 25):
        trace = TRACES[name](random.Random(seed))
        assert simulate(trace, by_cost).waited_s <= 1.1 * simulate(trace, by_age).waited_s


def test_traces_are_deterministic() -> None:
    for make in TRACES.values():
        assert make(random.Random(1)) == make(random.Random(1))


@pytest.mark.timeout(900)
def test_routing_by_seconds_matches_the_design_guide() -> None:
    ours, load = (
        simulate_routing.measured(policy) for policy in (simulate_routing.by_seconds, simulate_routing.by_load)
    )
    guide = Path("agent/DESIGN.md").read_text()
    for name, one in (("by seconds", ours), ("least load", load)):
        assert simulate_routing.line(name, one) in guide
    assert ours.cached >= 0.9
    assert ours.p95_s <= load.p95_s
    assert ours.unevenness < 1.5
    for share, speed in zip(ours.shares, (1, 2, 4), strict=True):
        assert share == pytest.approx(speed / 7, rel=0.1)
    assert ours.burst <= 2.0
