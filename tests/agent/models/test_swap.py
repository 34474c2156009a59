"""The swap state machine: an active loader runs until its standby has passed its probes, whatever happens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.models import swap
from agent.models.swap import Effect, Event, SwapState, What, begin, step


def event(what: What, reason: str = "", swap_id: str = "s") -> Event:
    return Event(swap_id=swap_id, what=what, reason=reason)


def play(cold: bool, *events: Event) -> tuple[SwapState, list[Effect]]:
    state, first = begin("s", cold=cold)
    effects = list(first)
    for event in events:
        state, more = step(state, event)
        effects += more
    return state, effects


READY, PASSED, DRAINED = (event("standby_ready"), event("probes_passed"), event("drained"))
FLIPPED, STOPPED = event("flipped"), event("stopped")
FAILED, RESTORED = event("standby_failed", "why"), event("restored")
CANNOT_RESTORE = event("restored", "and it did not start again")


@pytest.mark.parametrize(
    ("cold", "events", "effects", "outcome"),
    [
        (
            False,
            (READY, PASSED, FLIPPED, DRAINED, STOPPED),
            ["start_standby", "warm_standby", "flip", "drain_old", "stop_old", "finish"],
            "flipped",
        ),
        (False, (FAILED,), ["start_standby", "stop_standby", "finish"], "failed"),
        (False, (READY, PASSED, FAILED), ["start_standby", "warm_standby", "flip", "stop_standby", "finish"], "failed"),
        (False, (READY, FAILED), ["start_standby", "warm_standby", "stop_standby", "finish"], "failed"),
        (
            True,
            (DRAINED, STOPPED, READY, PASSED, FLIPPED),
            ["leave_rotation", "drain_active", "stop_active", "start_standby", "warm_standby", "flip", "finish"],
            "flipped",
        ),
        (
            True,
            (DRAINED, STOPPED, FAILED, RESTORED),
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
def test_every_swap_path(cold: bool, events: tuple[Event, ...], effects: list[Effect], outcome: str) -> None:
    state, seen = play(cold, *events)
    assert (effects, outcome, "finished") == (seen, state.outcome, state.phase)


def test_an_event_of_another_swap_changes_nothing() -> None:
    state, _ = begin("s", cold=False)
    assert (state, ()) == step(state, event("standby_ready", swap_id="other"))


MINE = (READY, PASSED, FLIPPED, DRAINED, STOPPED, FAILED, RESTORED, CANNOT_RESTORE)
OTHERS = (
    event("standby_ready", swap_id="other"),
    event("drained", swap_id="other"),
    event("standby_failed", "x", "other"),
)
events = st.sampled_from(MINE + OTHERS)


class World:
    """The loaders that effects start and stop. ``old`` and ``new`` run, ``serving`` answers."""

    def __init__(self) -> None:
        self.old, self.new = True, False
        self.serving: str | None = "old"
        self.seen: list[Effect] = []

    def perform(self, effect: Effect) -> None:
        self.seen.append(effect)
        match effect:
            case "start_standby":
                assert not self.new, "one standby at a time"
                self.new = True
            case "stop_standby":
                assert self.serving != "new", "what serves is not stopped"
                self.new = False
            case "flip":
                assert self.new, "only a living loader takes over"
            case "stop_old":
                assert self.serving == "new"
                self.old = False
            case "stop_active":
                assert self.serving == "old"
                self.old, self.serving = False, None
            case "restore_active":
                assert not self.old
                self.old, self.serving = True, "old"
            case _:
                pass
        assert self.old + self.new <= 2


@given(st.booleans(), st.lists(events, max_size=25))
def test_no_event_order_leaves_the_model_unserved(cold: bool, order: list[Event]) -> None:
    """Events may be duplicated, late, early, or of another swap."""
    world = World()
    state, effects = begin("s", cold=cold)
    for effect in effects:
        world.perform(effect)
    for event in order:
        before = state
        state, effects = swap.step(state, event)
        if state.flipped and not before.flipped:
            assert world.new
            world.serving = "new"  # the flip reports success or failure
        if event.swap_id != "s":
            assert (state, effects) == (before, ())
        for effect in effects:
            world.perform(effect)
        if not cold:
            assert world.serving is not None, "hot, there is never a moment without an active loader"
    for effect in ("finish", "flip", "start_standby", "stop_old", "stop_active", "restore_active"):
        assert world.seen.count(effect) <= 1
    if state.phase == "finished":
        assert world.seen[-1] == "finish"
        assert world.serving is not None
        assert world.old + world.new == 1, "nothing is left over"
        assert (world.serving == "new") == (state.outcome == "flipped") == state.flipped
        assert bool(state.reason) == (state.outcome == "failed")


@given(st.booleans(), st.lists(st.sampled_from(MINE), max_size=12))
def test_a_finished_swap_ignores_events(cold: bool, order: list[Event]) -> None:
    state, _ = play(cold, *order)
    if state.phase == "finished":
        for event in MINE:
            assert (state, ()) == step(state, event)


@given(st.booleans(), st.lists(st.sampled_from(MINE), max_size=6))
def test_every_swap_can_finish(cold: bool, order: list[Event]) -> None:
    """From any state, answering each effect with a possible result ends the swap."""
    state, _ = play(cold, *order)
    answers: dict[str, Event] = {
        "starting": READY,
        "warming": PASSED,
        "flipping": FLIPPED,
        "draining": DRAINED,
        "stopping": STOPPED,
        "restoring": RESTORED,
    }
    for _ in range(10):
        if state.phase == "finished":
            break
        state, effects = step(state, answers[state.phase])
        assert effects
    assert state.phase == "finished"
