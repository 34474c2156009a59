"""The swap machine: an active loader always lives until another has proved itself, whatever happens in between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import swap
from agent.swap import (
    Drained,
    Effect,
    Event,
    ProbesPassed,
    Restored,
    StandbyFailed,
    StandbyReady,
    SwapState,
    begin,
    step,
)


def play(cold: bool, *events: Event) -> tuple[SwapState, list[Effect]]:
    state, first = begin("s", cold=cold)
    effects = list(first)
    for event in events:
        state, more = step(state, event)
        effects += more
    return state, effects


READY, PASSED, DRAINED = StandbyReady(swap_id="s"), ProbesPassed(swap_id="s"), Drained(swap_id="s")
FAILED, RESTORED = StandbyFailed(swap_id="s", reason="why"), Restored(swap_id="s")


@pytest.mark.parametrize(
    ("cold", "events", "effects", "outcome"),
    [
        (
            False,
            (READY, PASSED, DRAINED),
            ["start_standby", "warm_standby", "flip", "drain_old", "stop_old", "finish"],
            "flipped",
        ),
        (False, (FAILED,), ["start_standby", "stop_standby", "finish"], "failed"),
        (False, (READY, FAILED), ["start_standby", "warm_standby", "stop_standby", "finish"], "failed"),
        (
            True,
            (DRAINED, READY, PASSED),
            ["leave_rotation", "drain_active", "stop_active", "start_standby", "warm_standby", "flip", "finish"],
            "flipped",
        ),
        (
            True,
            (DRAINED, FAILED, RESTORED),
            [
                "leave_rotation",
                "drain_active",
                "stop_active",
                "start_standby",
                "stop_standby",
                "restore_active",
                "finish",
            ],
            "failed",
        ),
    ],
)
def test_each_way_through(cold: bool, events: tuple[Event, ...], effects: list[Effect], outcome: str) -> None:
    state, seen = play(cold, *events)
    assert (effects, outcome, "finished") == (seen, state.outcome, state.phase)


def test_an_event_of_another_swap_changes_nothing() -> None:
    state, _ = begin("s", cold=False)
    assert (state, ()) == step(state, StandbyReady(swap_id="other"))


events = st.sampled_from((READY, PASSED, DRAINED, FAILED, RESTORED))


@given(st.booleans(), st.lists(events, max_size=12))
def test_no_order_of_events_leaves_the_model_unserved(cold: bool, order: list[Event]) -> None:
    state, effects = begin("s", cold=cold)
    seen = list(effects)
    serving = True
    for event in order:
        state, more = swap.step(state, event)
        for effect in more:
            seen.append(effect)
            if effect == "stop_active":
                serving = False
            elif effect in ("flip", "restore_active"):
                serving = True
            elif effect == "stop_old":
                assert "flip" in seen
    assert seen.count("finish") <= 1
    assert seen.count("flip") <= 1
    assert seen.count("start_standby") <= 1
    if state.phase == "finished":
        assert serving
    if not cold:
        assert serving


@given(st.booleans(), st.lists(events, max_size=12))
def test_a_finished_swap_does_nothing_more(cold: bool, order: list[Event]) -> None:
    state, _ = play(cold, *order)
    if state.phase == "finished":
        for event in (READY, PASSED, DRAINED, FAILED, RESTORED):
            assert (state, ()) == step(state, event)
