"""Turns by rank, and that none waits too long for higher ones: adversarial arrivals against the pure scheduler."""

from typing import NamedTuple

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.wire.frames import Embed, Generate, decode, encode
from agent.wire.priority import NEUTRAL, STARVED, Priority, Turns

ROUTINE, REASONING, ORCHESTRATION = (Priority(rank=rank, starve_ms=5_000) for rank in (-1, 1, 2))


def test_the_highest_rank_goes_first_until_one_has_waited_long_enough_for_it() -> None:
    turns = Turns()
    turns.arrive(1, ROUTINE, 0.0)
    assert turns.rank(1, 99.0) == -1, "alone it starves of nothing"
    turns.arrive(2, ORCHESTRATION, 4.0)
    assert (turns.rank(1, 4.9), turns.rank(2, 4.9)) == (-1, 2)
    turns.take(2, 4.9)
    turns.arrive(3, ORCHESTRATION, 4.95)
    assert (turns.rank(1, 4.99), turns.rank(1, 5.0)) == (-1, STARVED)
    turns.leave(3)
    assert turns.rank(1, 4.99) == -1, "it has waited 4.9 s for them, and there is none to wait for"


def test_waiting_behind_ones_own_rank_does_not_count() -> None:
    """Else a flood of a low rank would soon be above all others, and declaring a higher one would gain nothing."""
    turns = Turns()
    for number in range(100):
        turns.arrive(number, ROUTINE, 0.0)
    for number in range(60):
        turns.take(number, number + 1.0)
        turns.leave(number)
    turns.arrive(100, ORCHESTRATION, 60.5)
    assert turns.rank(99, 60.6) == -1
    turns.take(100, 60.6)
    turns.arrive(101, ORCHESTRATION, 61.0)
    assert turns.rank(99, 61.0) == -1, "0.6 s of the minute went to a higher rank"


def test_a_queue_that_has_waited_long_enough_takes_turns_with_higher_ranks() -> None:
    turns = Turns()
    for number in range(50):
        turns.arrive(number, ROUTINE, 0.0)
    for number in range(100, 107):
        turns.arrive(number, ORCHESTRATION, 0.0)
    turns.take(100, 4.99)
    waiting, taken = [*range(50), *range(101, 107)], list[int]()
    for turn in range(12):
        now = 5.0 + 0.1 * turn
        ranks = {number: turns.rank(number, now) for number in waiting}
        taken.append(max(waiting, key=lambda number, ranks=ranks: ranks[number]))  # type: ignore[misc]
        turns.take(taken[-1], now)
        turns.leave(taken[-1])
        waiting.remove(taken[-1])
    assert [number >= 100 for number in taken] == [False, True] * 6


def test_a_turn_that_could_not_have_been_its_own_does_not_count() -> None:
    """Of a reserved row, say: its own are taken by its equals."""
    turns = Turns()
    for number, priority in enumerate((ROUTINE, ROUTINE, ORCHESTRATION, ORCHESTRATION)):
        turns.arrive(number, priority, 0.0)
    turns.take(2, 9.0, {1, 2, 3})
    assert (turns.rank(0, 9.0), turns.rank(1, 9.0)) == (-1, STARVED)
    assert (turns.rank(0, 99.0), turns.rank(0, 99.0, could=False)) == (STARVED, -1)


def test_what_was_waited_before_a_preemption_still_counts() -> None:
    turns = Turns()
    turns.arrive(1, ROUTINE, 0.0)
    turns.arrive(2, ORCHESTRATION, 0.0)
    turns.take(2, 4.0)
    turns.take(1, 4.5)
    turns.arrive(3, ORCHESTRATION, 4.5)
    turns.take(3, 4.6)
    turns.back(1, 4.6)
    turns.arrive(4, ORCHESTRATION, 4.6)
    assert (turns.rank(1, 5.5), turns.rank(1, 5.6)) == (-1, STARVED)


class Arrival(NamedTuple):
    after_s: float
    rank: int
    takes_s: float


arrivals = st.lists(
    st.builds(
        Arrival,
        st.sampled_from([0.0, 0.0, 0.001, 0.5, 3.0]),
        st.sampled_from([-1, 0, 1, 2, 2, 2]),
        st.sampled_from([0.001, 0.3, 1.0, 2.5]),
    ),
    max_size=60,
)


@given(arrivals, st.sampled_from([0, 1, 2_000, 5_000]), st.integers(0, 2**32))
def test_nobody_waits_longer_than_its_bound_for_turns_of_higher_ranks(
    flood: list[Arrival], starve_ms: int, dice: int
) -> None:
    """One turn after another, always to one of the highest rank, which one of them chosen at random. However arrivals
    are timed: for each that waits, the times between turns of which the second went to a higher rank stay below its
    bound. From then on every second turn at least goes to one that has waited that long."""
    turns, now, due = Turns(), 0.0, 0.0
    waiting: dict[int, int] = {}
    since: dict[int, float] = {}
    behind: dict[int, float] = {}
    left, last, relieved = list(enumerate(flood)), 0.0, False
    while left or waiting:
        while left and (due + left[0][1].after_s <= now or not waiting):
            number, one = left.pop(0)
            due += one.after_s
            now = max(now, due)
            turns.arrive(number, Priority(rank=one.rank, starve_ms=starve_ms), due)
            waiting[number], since[number], behind[number] = one.rank, due, 0.0
        ranks = {number: turns.rank(number, now) for number in waiting}
        best = [number for number, rank in ranks.items() if rank == max(ranks.values())]
        number = best[dice % len(best)]
        turns.take(number, now)
        rank = waiting.pop(number)
        for other, its in waiting.items():
            if its < rank and ranks[number] != STARVED:
                behind[other] += now - max(since[other], last)
                assert relieved or behind[other] * 1000 < starve_ms + 1e-6, "a higher rank took this turn from it"
        turns.leave(number)
        last, relieved = now, ranks[number] == STARVED
        now += flood[number].takes_s


@given(arrivals, st.sampled_from([1_000, 5_000]))
def test_a_flood_of_higher_ranks_delays_one_below_by_its_bound_and_a_turn(flood: list[Arrival], starve_ms: int) -> None:
    turns, now, longest_s = Turns(), 0.0, 0.0
    turns.arrive(-1, Priority(rank=-1, starve_ms=starve_ms), 0.0)
    for number, one in enumerate(flood):
        turns.arrive(number, ORCHESTRATION, now)  # as soon as the one before has its turn, so that one always waits
        if turns.rank(-1, now) == STARVED:
            break
        turns.take(number, now)
        turns.leave(number)
        longest_s = max(longest_s, one.takes_s)
        now += one.takes_s
    assert now * 1000 < starve_ms + longest_s * 1000 + 1e-6


@given(st.lists(st.tuples(st.sampled_from(["arrive", "take", "back", "leave"]), st.integers(0, 5)), max_size=40))
def test_where_all_are_equal_nothing_is_ever_raised(does: list[tuple[str, int]]) -> None:
    turns, there = Turns(), dict[int, bool]()
    for now, (what, number) in enumerate(does):
        if what == "arrive" and number not in there:
            turns.arrive(number, NEUTRAL, now * 100.0)
            there[number] = True
        elif what == "take" and there.get(number):
            turns.take(number, now * 100.0)
            there[number] = False
        elif what == "back" and number in there:
            turns.back(number, now * 100.0)
            there[number] = True
        elif what == "leave":
            turns.leave(number)
            there.pop(number, None)
        assert not turns.mixed
        assert all(turns.rank(one, 1e9) == 0 for one in there)


def test_a_frame_carries_it_and_one_without_it_is_neutral() -> None:
    """Peers and loaders of the version before send none."""
    priority = Priority(rank=-1, leaves_rows=2, starve_ms=1500)
    for ask in (
        Generate(id=1, model="m", max_tokens=1, priority=priority),
        Embed(id=1, model="m", inputs=(), priority=priority),
    ):
        assert decode(encode(ask)) == ask
        plain = msgspec.msgpack.decode(encode(ask))
        del plain["priority"]
        found = decode(msgspec.msgpack.encode(plain))
        assert isinstance(found, Generate | Embed)
        assert found.priority == NEUTRAL
