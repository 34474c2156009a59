"""Ranks in the engine by table and by property: who starts, what is kept free, who yields."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loader.ranking import (
    MAX_YIELDS,
    Begin,
    Standing,
    begin,
    could_start,
    least,
    paused,
    rows_for,
    seen,
    yielding,
)
from agent.loader.row_placement import Candidate, Limits, Placement
from agent.loader.scheduling import Turn
from agent.wire.priority import STARVED
from tests.agent.loader.test_row_placement import LIMITS, candidate, candidates, placement, placements, row

ROUTINE, NEUTRAL, ORCHESTRATION = Standing(-1), Standing(0), Standing(2)
FULL = placement([row(n, 50) for n in (6, 7, 8, 9)])


@given(placements, candidates.filter(bool), st.floats(0, 1000), st.sampled_from([-1, 0, 2]))
def test_where_all_ranks_are_equal_they_change_nothing(
    at: Placement, ready: list[Candidate], rate: float, rank: int
) -> None:
    standings = {one.turn.id: Standing(rank) for one in ready} | {one.id: Standing(rank) for one in at.rows}
    start = at.start(ready, [], rate)
    assert begin(at, ready, [], rate, standings) == Begin(start.preempts, start.begins)
    assert seen(at, Standing(rank), standings) is at


@pytest.mark.parametrize(
    ("at", "standings", "expected"),
    [
        (FULL, dict.fromkeys((6, 7, 8, 9), ROUTINE), Begin(None, 1, (9,))),
        (FULL, {6: ROUTINE, 7: NEUTRAL, 8: NEUTRAL, 9: NEUTRAL}, Begin(None, 1, (6,))),
        (placement([row(6, 50, made=0), *(row(n, 50) for n in (7, 8, 9))]), {}, Begin(None, 1, (6,))),
        (FULL, dict.fromkeys((6, 7, 8, 9), ORCHESTRATION), Begin()),
        (FULL, {n: Standing(-1, 0, MAX_YIELDS) for n in (6, 7, 8, 9)}, Begin()),
        (FULL, {n: Standing(STARVED, 2) for n in (6, 7, 8, 9)}, Begin()),
        (placement([row(8, 4000), row(9, 4000)]), {}, Begin(None, 1, (9,))),
        (placement([row(9, 50)]), {}, Begin(None, 1)),
        (placement([row(9, 50, made=0)]), {}, Begin(None, 1)),
        (placement([row(9, 50, made=0)]), {9: ORCHESTRATION}, Begin()),
        (replace(FULL, limits=LIMITS._replace(pressed=True)), {}, Begin()),
    ],
    ids=[
        "the youngest",
        "the lowest rank",
        "one whose answer has not begun",
        "not to its equal",
        "not more than twice",
        "not once it has waited long enough",
        "for memory",
        "not without need",
        "lower ranks' first tokens do not count",
        "its equals' do",
        "not under memory pressure",
    ],
)
def test_a_row_of_lower_rank_yields_to_a_higher_one(
    at: Placement, standings: dict[int, Standing], expected: Begin
) -> None:
    everybody = dict.fromkeys((6, 7, 8, 9), ROUTINE) | standings | {1: ORCHESTRATION}
    assert begin(at, [candidate(1, 100)], [], 100.0, everybody) == expected


@pytest.mark.parametrize(
    ("current", "expected"),
    [
        (ROUTINE, Begin(9, 1)),
        (ORCHESTRATION, Begin()),
        (Standing(-1, 0, MAX_YIELDS), Begin()),
        (Standing(STARVED), Begin()),
    ],
)
def test_a_prompt_in_prefill_yields_to_a_higher_rank_however_short_it_is(current: Standing, expected: Begin) -> None:
    at = placement([row(9, 150, prefilling=True)])
    found = begin(at, [candidate(1, 100)], [Turn(9, 150, 60.0)], 100.0, {1: ORCHESTRATION, 9: current})
    assert found == expected


def test_one_that_waits_does_not_interrupt_a_higher_rank() -> None:
    at = placement([row(9, 4000, prefilling=True)])
    assert begin(at, [candidate(1, 10)], [Turn(9, 4000, 0.0)], 100.0, {1: ROUTINE, 9: ORCHESTRATION}) == Begin()


@pytest.mark.parametrize(
    ("leaves", "others", "rows", "expected"),
    [
        (0, [Standing(-1, 2)] * 3, 4, 4),
        (1, [], 4, 3),
        (1, [Standing(2, 0)], 4, 4),
        (1, [Standing(2, 0)] * 4, 4, 4),
        (3, [Standing(1, 1), Standing(2, 0)], 8, 7),
        (3, [Standing(-1, 3)] * 5, 8, 5),
        (9, [], 4, 1),
        (9, [Standing(-1, 9)], 4, 1),
        (1, [Standing(STARVED, 1)], 4, 4),
        (1, [], 1, 1),
    ],
)
def test_reserved_rows_are_for_those_that_leave_fewer(
    leaves: int, others: list[Standing], rows: int, expected: int
) -> None:
    assert rows_for(leaves, others, rows) == expected


standing = st.builds(
    Standing, st.sampled_from([-1, 0, 1, 2, STARVED]), st.sampled_from([0, 1, 2, 9]), st.integers(0, 3)
)


@given(placements, candidates.filter(bool), st.floats(0, 1000), st.data())
def test_what_begins_has_a_row_and_only_lower_ranks_yielded_for_it(
    at: Placement, ready: list[Candidate], rate: float, data: st.DataObject
) -> None:
    standings = {one.id: data.draw(standing) for one in at.rows}
    mine = data.draw(standing)
    standings |= {one.turn.id: mine for one in ready}
    found = begin(at, ready, [], rate, standings)
    assert found.sets_aside is None
    assert all(standings[number].held_by < mine.rank for number in found.preempts)
    assert found.begins is not None or not found.preempts, "nobody yields in vain"
    if found.begins is not None:
        best = next(one for one in ready if one.turn.id == found.begins)
        for number in found.preempts:
            at = at.without(number)
        there = seen(at, mine, standings)
        assert there.room_for(best)
        assert there.seats([best])
        least_left = min(mine.leaves, at.limits.rows - 1)
        same = [one for one in at.rows if standings[one.id].leaves >= mine.leaves]
        assert not least_left or len(same) < at.limits.rows - least_left, "what it leaves to others is free"


@given(placements, st.data())
def test_of_those_that_lack_memory_the_lowest_rank_goes_first(at: Placement, data: st.DataObject) -> None:
    standings = {one.id: data.draw(standing) for one in at.rows}
    if at.outgrown() is not None:
        chosen = standings[least(at.rows, standings)].held_by
        assert chosen == min(one.held_by for one in standings.values())
        equal = dict.fromkeys(standings, NEUTRAL)
        youngest = at.outgrown()
        begun = {one.id: one.begun_s for one in at.rows}
        assert begun[least(at.rows, equal)] == begun[youngest or 0], "among equals the youngest, as ever"


def test_rows_yield_in_a_fixed_order() -> None:
    placed = [row(1, 9), row(2, 9, made=0), row(3, 9), row(4, 9, made=0), row(5, 9, prefilling=True)]
    standings = {1: NEUTRAL, 2: ROUTINE, 3: ROUTINE, 4: NEUTRAL, 5: ROUTINE}
    assert yielding(placed, standings, 2) == [2, 3, 4, 1]
    assert yielding(placed, standings, 0) == [2, 3]
    assert yielding(placed, standings, -1) == []


def test_limits_stay_what_they_are() -> None:
    assert seen(FULL, Standing(-1, 1), dict.fromkeys((6, 7, 8, 9), NEUTRAL)).limits == Limits(4, 8192, 1000.0)


def test_those_with_reserved_rows_are_decoded_apart() -> None:
    at = placement([row(8, 50), row(9, 50)])
    lower = {8: Standing(-1, 2), 9: Standing(-1, 2)}
    mine = candidate(1, 60)
    assert seen(at, ORCHESTRATION, lower | {1: ORCHESTRATION}).seats([mine]) == {1: [1]}
    assert seen(at, Standing(-1, 2), lower).seats([mine]) == {}, "2 of 4 are reserved"
    at = placement([row(8, 50)], [row(9, 50)])
    both = {8: Standing(-1, 2), 9: ORCHESTRATION}
    assert seen(at, Standing(-1, 2), both).seats([mine]) == {0: [1]}
    assert seen(at, ORCHESTRATION, both).seats([mine]) == {1: [1]}


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (placement([row(8, 50)], [row(9, 50, made=0)]), {0}),
        (placement([row(8, 50)], [row(9, 50, prefilling=True, made=0)]), {0}),
        (placement([row(8, 50)], [row(9, 50)]), set()),
        (placement([row(8, 50), row(9, 50, made=0)]), set()),
        (placement([row(8, 50, made=0)], [row(9, 50)]), set()),
        (placement([row(8, 50)], [row(7, 50)], [row(9, 50, made=0)]), {0}),
        (placement([], [row(9, 50, made=0)]), set()),
    ],
    ids=["a first token", "a prompt", "nothing", "never one's own batch", "not for lower", "equals do not", "empty"],
)
def test_batches_pause_for_the_first_token_of_one_they_leave_rows_to(at: Placement, expected: set[int]) -> None:
    assert paused(at, {7: Standing(-1), 8: Standing(-1, 2), 9: ORCHESTRATION}) == expected


@given(placements, st.data())
def test_where_nothing_is_reserved_nothing_pauses(at: Placement, data: st.DataObject) -> None:
    assert paused(at, {one.id: data.draw(standing)._replace(leaves_rows=0) for one in at.rows}) == set()


@pytest.mark.parametrize(
    ("placed", "expected"),
    [
        ([], {1, 2, 3}),
        ([Standing(-1, 3)], {2, 3}),
        ([Standing(-1, 3), ORCHESTRATION], {2, 3}),
        ([ORCHESTRATION] * 3, {1, 2, 3}),
        ([ORCHESTRATION] * 4, set()),
        ([Standing(-1, 3), *[ORCHESTRATION] * 3], set()),
    ],
)
def test_who_could_have_a_row(placed: list[Standing], expected: set[int]) -> None:
    waiting = {1: Standing(-1, 3), 2: ORCHESTRATION, 3: Standing(STARVED, 3)}
    assert could_start(waiting, dict(enumerate(placed, 10)), 4) == expected
