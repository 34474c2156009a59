"""What leaves memory, and who may come in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.admission import Admit, Turn, admit
from agent.eviction import Evict, Fits, NoRoom, Occupant, make_room


def model(name: str, size: int, *, used: float = 0.0, leases: int = 0, pinned: bool = False) -> Occupant:
    return Occupant(name=name, need_bytes=size, leases=leases, pinned=pinned, last_used_s=used)


@pytest.mark.parametrize(
    ("need", "held", "budget", "expected"),
    [
        (5, [], 10, Fits()),
        (5, [model("a", 5)], 10, Fits()),
        (6, [model("a", 5)], 10, Evict(victims=("a",))),
        (6, [model("a", 5, used=2), model("b", 5, used=1)], 12, Evict(victims=("b",))),
        (6, [model("a", 5, leases=1)], 10, NoRoom(missing_bytes=1, kept=("a",))),
        (6, [model("a", 5, pinned=True)], 10, NoRoom(missing_bytes=1, kept=("a",))),
        (6, [model("a", 1, used=1), model("b", 6, used=2)], 10, Evict(victims=("b",))),
        (20, [model("a", 5)], 10, NoRoom(missing_bytes=10, kept=())),
    ],
)
def test_make_room(need: int, held: list[Occupant], budget: int, expected: object) -> None:
    assert expected == make_room(need, held, budget)


def test_without_leave_to_evict_nothing_leaves() -> None:
    assert NoRoom(missing_bytes=1, kept=("a",)) == make_room(6, [model("a", 5)], 10, may_evict=False)


occupants = st.lists(
    st.builds(
        lambda n, size, used, leases, pinned: model(str(n), size, used=used, leases=leases, pinned=pinned),
        st.integers(0, 99),
        st.integers(1, 20),
        st.floats(0, 9),
        st.integers(0, 1),
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda o: o.name,
)


@given(st.integers(1, 40), occupants, st.integers(1, 60))
def test_no_model_in_use_leaves_and_what_is_promised_fits(need: int, held: list[Occupant], budget: int) -> None:
    decision = make_room(need, held, budget)
    if isinstance(decision, Evict):
        gone = [o for o in held if o.name in decision.victims]
        assert all(not o.pinned and not o.leases for o in gone)
        left = sum(o.need_bytes for o in held) - sum(o.need_bytes for o in gone)
        assert left + need <= budget
        assert all(left + o.need_bytes + need > budget for o in gone), "every victim is needed"
    elif isinstance(decision, NoRoom):
        fixed = sum(o.need_bytes for o in held if o.pinned or o.leases)
        assert fixed + need > budget


def test_admission() -> None:
    assert isinstance(admit(in_flight=3, limit=4, draining=False, drain_rate_per_s=0), Admit)
    full = admit(in_flight=9, limit=4, draining=False, drain_rate_per_s=2)
    assert Turn(code="queue_full", retry_after_s=3) == full
    assert Turn(code="draining", retry_after_s=1) == admit(in_flight=0, limit=4, draining=True, drain_rate_per_s=0)


@given(st.integers(0, 500), st.integers(1, 50), st.floats(0, 1000))
def test_the_hint_is_a_sane_number_of_seconds(in_flight: int, limit: int, rate: float) -> None:
    decision = admit(in_flight=in_flight, limit=limit, draining=False, drain_rate_per_s=rate)
    assert isinstance(decision, Admit) == (in_flight < limit)
    if isinstance(decision, Turn):
        assert 1 <= decision.retry_after_s <= 60
