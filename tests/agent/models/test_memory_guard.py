"""The memory guard: three sources, levels with hysteresis, actions in order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.models.memory_guard import Action, GuardState, Held, step


def held(nbytes: int, source: str = "engine_bytes") -> list[Held]:
    return [Held(name="m", **{source: nbytes})]


def play(*held_bytes: int) -> list[tuple[Action, ...]]:
    state, seen = GuardState(), []
    for nbytes in held_bytes:
        state, actions = step(state, held(nbytes), 100, soft=0.8, hard=0.95)
        seen.append(actions)
    return seen


@pytest.mark.parametrize("source", ["engine_bytes", "footprint_bytes", "ledger_bytes"])
def test_each_source_drives_each_level(source: str) -> None:
    for nbytes, level in ((79, "calm"), (80, "soft"), (94, "soft"), (95, "hard"), (200, "hard")):
        state, _ = step(GuardState(), held(nbytes, source), 100, soft=0.8, hard=0.95)
        assert (level, nbytes) == (state.level, state.held_bytes)


def test_the_largest_source_of_each_loader_counts() -> None:
    loaders = [
        Held(name="a", engine_bytes=10, footprint_bytes=30, ledger_bytes=20),
        Held(name="b", engine_bytes=None, footprint_bytes=None, ledger_bytes=5),
    ]
    assert step(GuardState(), loaders, 100, soft=0.8, hard=0.95)[0].held_bytes == 35


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ((10, 20), [(), ()]),
        ((85, 85, 78, 74), [("press",), (), (), ("ease",)]),
        ((99, 85), [("press", "drop_caches"), ()]),
        (
            (99, 99, 99, 99, 60),
            [("press", "drop_caches"), ("evict_idle",), ("evict_idle", "refuse"), ("evict_idle",), ("ease", "accept")],
        ),
        (
            (99, 99, 99, 92, 85),
            [("press", "drop_caches"), ("evict_idle",), ("evict_idle", "refuse"), ("evict_idle",), ("accept",)],
        ),
    ],
)
def test_actions_are_taken_in_order(readings: tuple[int, ...], expected: list[tuple[Action, ...]]) -> None:
    assert expected == play(*readings)


@given(st.lists(st.integers(0, 150), max_size=60))
def test_each_level_change_is_reported_with_its_end(readings: list[int]) -> None:
    flat = [action for actions in play(*readings) for action in actions]
    presses = [a for a in flat if a in ("press", "ease")]
    refusals = [a for a in flat if a in ("refuse", "accept")]
    assert presses == (["press", "ease"] * len(presses))[: len(presses)]
    assert refusals == (["refuse", "accept"] * len(refusals))[: len(refusals)]
    if readings and readings[-1] < 70:
        assert flat.count("press") == flat.count("ease")
        assert flat.count("refuse") == flat.count("accept")
