"""Admission by class: the rank of a request, the places it finds, and when a refused one may come again."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.admission import ADMITTED, Admit, DrainRate, Load, Places, Turn, admit, priority_of
from agent.gateway.call import Call
from agent.policy.classes import CLASSES, rank_of
from agent.policy.facts import ClassFrom
from agent.policy.rules import Admission
from agent.wire.frames import Embed, Generate
from agent.wire.namespaces import OPEN
from agent.wire.priority import NEUTRAL, Priority

RESERVED = Admission(reserved_orchestration=2, reserved_reasoning=1, starve_s=20.0)
ROUTINE, REASONING, ORCHESTRATION = (priority_of(name, "header", Admission()) for name in CLASSES)


@pytest.mark.parametrize("said_by", ["header", "body", "model", "key"])
def test_a_declared_class_ranks_and_a_guess_is_neutral(said_by: ClassFrom) -> None:
    assert [rank_of(name, said_by) for name in CLASSES] == [-1, 1, 2]
    assert {rank_of(name, "guess") for name in CLASSES} == {0}
    assert {priority_of(name, "guess", Admission()) for name in CLASSES} == {NEUTRAL}, "as without a policy"


@pytest.mark.parametrize(
    ("said_by", "leaves"), [("header", [3, 2, 0]), ("guess", [3, 3, 3])], ids=["declared", "guessed"]
)
def test_a_class_leaves_what_is_reserved_for_those_above_it(said_by: ClassFrom, leaves: list[int]) -> None:
    found = [priority_of(name, said_by, RESERVED) for name in CLASSES]
    assert [one.leaves_rows for one in found] == leaves
    assert {one.starve_ms for one in found} == {20_000}


def ask(places: Places, priority: Priority, *, limit: int = 4, parts: int = 1, now_s: float = 0.0) -> Admit | Turn:
    """One request, entered or refused as the gateway does it."""
    model = places.load("m", parts, priority, limit, now_s, leaves=priority.leaves_rows)
    found = admit(model=model, key=Load(0, 99), draining=False, drain_rate_per_s=lambda: 2.0)
    if found is ADMITTED:
        places.enter("m", parts, priority.rank)
    else:
        places.refused("m", priority.rank, now_s)
    return found


def fill(places: Places, priority: Priority, limit: int = 4) -> int:
    """How many are admitted until one is refused."""
    count = 0
    while ask(places, priority, limit=limit) is ADMITTED:
        count += 1
    return count


@pytest.mark.parametrize(
    ("before", "then", "expected"),
    [
        ((), ROUTINE, 4),
        ((ROUTINE,), ORCHESTRATION, 4),
        ((ROUTINE,), NEUTRAL, 4),
        ((ORCHESTRATION,), ROUTINE, 0),
        ((NEUTRAL,), NEUTRAL, 0),
        ((), priority_of("ROUTINE", "header", RESERVED), 1),
        ((), priority_of("REASONING", "header", RESERVED), 2),
        ((), priority_of("ORCHESTRATION", "header", RESERVED), 4),
    ],
)
def test_only_its_own_rank_and_those_above_count_against_the_limit(
    before: tuple[Priority, ...], then: Priority, expected: int
) -> None:
    places = Places()
    for one in before:
        fill(places, one)
    assert fill(places, then) == expected


def test_a_request_of_many_parts_gets_its_places_where_there_are_enough() -> None:
    places = Places()
    assert ask(places, priority_of("ROUTINE", "header", RESERVED), parts=4) is ADMITTED
    assert ask(places, priority_of("ROUTINE", "header", RESERVED)) == Turn(code="queue_full", retry_after_s=2)
    places.leave("m", 4, ROUTINE.rank)
    assert (places.total, places.of("m")) == (0, 0)


def test_a_rank_that_was_only_refused_for_its_bound_gets_a_place_and_then_waits_again() -> None:
    places, routine = Places(), Priority(rank=-1, starve_ms=20_000)
    fill(places, ORCHESTRATION)
    admitted = [now for now in range(0, 100, 5) if ask(places, routine, now_s=float(now)) is ADMITTED]
    assert admitted == [20, 45, 70, 95]
    assert places.of("m") == 8


def test_without_higher_ranks_in_flight_nobody_gets_beyond_the_limit() -> None:
    places = Places()
    fill(places, NEUTRAL)
    assert all(isinstance(ask(places, NEUTRAL, now_s=float(now)), Turn) for now in range(0, 300, 10))


events = st.lists(st.tuples(st.booleans(), st.integers(1, 3)), max_size=40)


@given(events, st.integers(3, 9))
def test_where_nothing_is_declared_the_limit_is_what_it_was(does: list[tuple[bool, int]], limit: int) -> None:
    places, held = Places(), list[int]()
    for now, (enters, parts) in enumerate(does):
        if enters:
            expected = Load(sum(held) + parts - 1, limit)
            assert places.load("m", parts, NEUTRAL, limit, now * 60.0).over == expected.over
            if not expected.over:
                places.enter("m", parts, NEUTRAL.rank)
                held.append(parts)
            else:
                places.refused("m", NEUTRAL.rank, now * 60.0)
        elif held:
            places.leave("m", held.pop(), NEUTRAL.rank)
        assert (places.total, places.of("m")) == (sum(held), sum(held))


ranks = st.sampled_from([ROUTINE, NEUTRAL, REASONING, ORCHESTRATION])


@given(st.lists(st.tuples(st.booleans(), ranks), max_size=60), st.integers(1, 6))
def test_no_lower_rank_ever_costs_a_higher_one_its_place(does: list[tuple[bool, Priority]], limit: int) -> None:
    places, held = Places(), list[Priority]()
    for enters, priority in does:
        if enters:
            above = sum(one.rank >= priority.rank for one in held)
            admitted = ask(places, priority, limit=limit) is ADMITTED
            assert admitted == (above < limit)
            held += [priority] * admitted
        elif held:
            places.leave("m", 1, held.pop().rank)


def test_a_refused_one_may_come_again_when_its_own_rank_has_drained() -> None:
    slow, fast = DrainRate(), DrainRate()
    for now in range(10):
        fast.ended(float(now))
    slow.ended(0.0)
    hints = []
    for drain in (slow, fast):
        rate: Callable[[], float] = lambda drain=drain: drain.per_s(10.0)  # type: ignore[misc]  # noqa: E731
        found = admit(model=Load(8, 4), key=Load(0, 9), draining=False, drain_rate_per_s=rate)
        assert isinstance(found, Turn)
        hints.append(found.retry_after_s)
    assert hints == [50, 5]


@pytest.mark.parametrize("wanted", [Generate(id=0, model="m", max_tokens=1), Embed(id=0, model="m", inputs=("x",))])
def test_the_priority_travels_to_the_worker(wanted: Generate | Embed) -> None:
    call = Call(ask=wanted, request_id="r", cache=OPEN, priority=ORCHESTRATION)
    assert call.frame("gateway").priority == ORCHESTRATION
    assert Call(ask=wanted, request_id="r", cache=OPEN).frame("gateway").priority == NEUTRAL
    assert msgspec.structs.asdict(ORCHESTRATION) == {"rank": 2, "leaves_rows": 0, "starve_ms": 30_000}
