"""Eviction and admission."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.admission import Admit, DrainRate, Load, Turn, admit
from agent.models.eviction import Evict, Fits, NoRoom, Occupant, make_room


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
def test_eviction_makes_room(need: int, held: list[Occupant], budget: int, expected: object) -> None:
    assert expected == make_room(need, held, budget)


def test_nothing_is_evicted_without_permission() -> None:
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
def test_models_in_use_are_not_evicted_and_the_plan_fits(need: int, held: list[Occupant], budget: int) -> None:
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


FREE = Load(0, 4)


@pytest.mark.parametrize(
    ("model_load", "key_load", "draining", "rate", "expected"),
    [
        (Load(3, 4), FREE, False, 0.0, Admit()),
        (Load(9, 4), FREE, False, 2.0, Turn(code="queue_full", retry_after_s=3)),
        (Load(9, 4), FREE, False, 0.0, Turn(code="queue_full", retry_after_s=5)),
        (FREE, Load(5, 4), False, 1.0, Turn(code="key_queue_full", retry_after_s=2)),
        (Load(4, 4), Load(9, 4), False, 1.0, Turn(code="queue_full", retry_after_s=6)),
        (FREE, FREE, True, 0.0, Turn(code="draining", retry_after_s=1)),
    ],
)
def test_admission_decisions(model_load: Load, key_load: Load, draining: bool, rate: float, expected: object) -> None:
    assert expected == admit(model=model_load, key=key_load, draining=draining, drain_rate_per_s=lambda: rate)


@given(st.integers(0, 500), st.integers(1, 50), st.integers(0, 500), st.integers(1, 50), st.floats(0, 1000))
def test_retry_after_is_a_plausible_time(n: int, limit: int, of_key: int, key_limit: int, rate: float) -> None:
    decision = admit(model=Load(n, limit), key=Load(of_key, key_limit), draining=False, drain_rate_per_s=lambda: rate)
    assert isinstance(decision, Admit) == (n < limit and of_key < key_limit)
    if isinstance(decision, Turn):
        assert 1 <= decision.retry_after_s <= 60


def test_the_drain_rate_is_measured_over_half_a_minute() -> None:
    drain = DrainRate()
    assert drain.per_s(0.0) == 0.0
    for tick in range(100):
        drain.ended(tick * 0.5)
    assert drain.per_s(49.5) == pytest.approx(2.0, rel=0.05)
    assert drain.per_s(200.0) == 0.0
    for _ in range(5):
        drain.ended(300.0)
    assert drain.per_s(300.0) == 5.0, "ends at the same moment promise no more than there were"
