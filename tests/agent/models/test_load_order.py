"""The load queue: A B C A B C becomes AA BB CC, and no request starves."""

import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.models.eviction import Occupant
from agent.models.load_order import Turn, Wanted, next_turn


def held(name: str, *, leases: int = 0, pinned: bool = False, stays: float = 0.0, per_s: float = 0.0) -> Occupant:
    return Occupant(name=name, need_bytes=10, leases=leases, pinned=pinned, stays_until_s=stays, per_s=per_s)


def want(name: str, since: float = 0.0, need: int = 10) -> Wanted:
    return Wanted(name=name, need_bytes=need, since_s=since)


@pytest.mark.parametrize(
    ("wanted", "occupants", "now", "expected"),
    [
        ([], [held("a")], 0.0, Turn()),
        ([want("b")], [], 0.0, Turn(load="b")),
        ([want("b")], [held("a")], 0.0, Turn(load="b")),
        ([want("c", 2.0), want("b", 1.0)], [held("a")], 3.0, Turn(load="b")),
        ([want("b")], [held("a", leases=3)], 19.9, Turn()),
        ([want("b")], [held("a", leases=3)], 20.0, Turn(close=frozenset({"a"}), waiter="b")),
        ([want("b")], [held("a", leases=3, pinned=True)], 99.0, Turn()),
        ([want("b")], [held("a", leases=3, stays=30.0)], 25.0, Turn()),
        ([want("b")], [held("a", stays=30.0)], 25.0, Turn()),
        ([want("b"), want("s", 1.0, need=0)], [held("a", leases=1)], 5.0, Turn(load="s")),
        (
            [want("b"), want("s", 1.0, need=0)],
            [held("a", leases=1)],
            25.0,
            Turn(load="s", close=frozenset({"a"}), waiter="b"),
        ),
        ([want("big", need=11)], [held("a", leases=1)], 99.0, Turn()),
    ],
)
def test_load_queue_decisions(wanted: list[Wanted], occupants: list[Occupant], now: float, expected: Turn) -> None:
    assert expected == next_turn(wanted, occupants, 10, now, max_wait_s=20.0)


def test_the_cheaper_of_two_models_in_use_is_closed() -> None:
    occupants = [held("dear", leases=1, per_s=2.0), held("cheap", leases=1, per_s=0.1)]
    assert next_turn([want("b")], occupants, 20, 30.0, max_wait_s=20.0).close == {"cheap"}


class Machine:
    """Memory for one model; loading takes ``load_s``, a request ``work_s``. Time advances by tenths of a second."""

    def __init__(self, *, load_s: float = 2.0, work_s: float = 1.0, max_wait_s: float = 20.0) -> None:
        self.load_s, self.work_s, self.max_wait_s = load_s, work_s, max_wait_s
        self.now = 0.0
        self.resident, self.since = "", 0.0
        self.loading, self.loaded_at = "", 0.0
        self.closed = False
        self.queues: dict[str, deque[float]] = {}
        self.running: list[float] = []
        self.loads: list[str] = []
        self.waits: list[float] = []

    def ask(self, name: str) -> None:
        self.queues.setdefault(name, deque()).append(self.now)

    def tick(self) -> None:
        self.now += 0.1
        self.running = [end for end in self.running if end > self.now]
        if self.loading and self.now >= self.loaded_at:
            self.resident, self.since, self.loading, self.closed = self.loading, self.now, "", False
        if self.resident and not self.closed:
            queue = self.queues.get(self.resident, deque())
            while queue:
                self.waits.append(self.now - queue.popleft())
                self.running.append(self.now + self.work_s)
        self._decide()

    def _decide(self) -> None:
        if self.loading:
            return
        stays = self.since + self.load_s
        occupants = [held(self.resident, leases=len(self.running), stays=stays)] if self.resident else []
        wanted = [want(name, queue[0]) for name, queue in self.queues.items() if queue and name != self.resident]
        turn = next_turn(wanted, occupants, 10, self.now, max_wait_s=self.max_wait_s)
        self.closed = self.resident in turn.close or (self.closed and turn.load != "")
        if turn.load:
            self.loads.append(turn.load)
            self.loading, self.loaded_at, self.resident = turn.load, self.now + self.load_s, ""


def test_interleaved_requests_for_three_models_need_three_loads() -> None:
    machine = Machine()
    for name in "abc" * 10:
        machine.ask(name)
    for _ in range(300):
        machine.tick()
    assert len(machine.waits) == 30
    assert len(machine.loads) == 3


def test_endless_interleaved_requests_are_grouped_and_waits_are_bounded() -> None:
    """Endless requests for three models in turn: without grouping each request would need a load."""
    machine, names = Machine(), itertools.cycle("abc")
    for tick in range(6_000):
        if tick % 3 == 0:
            machine.ask(next(names))
        machine.tick()
    # the bound: both others go first, each loaded and served for at most its turn
    bound = 3 * (machine.max_wait_s + machine.load_s + machine.work_s)
    assert max(machine.waits) <= bound
    assert len(machine.waits) > 1_900
    assert len(machine.loads) <= 3 * (600 / bound) * 3
    assert len(machine.loads) < len(machine.waits) / 20


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 60)), min_size=1, max_size=60))
def test_every_request_is_served_within_the_bound(asked: list[tuple[str, int]]) -> None:
    machine = Machine()
    by_tick: dict[int, list[str]] = {}
    for name, tick in asked:
        by_tick.setdefault(tick, []).append(name)
    for tick in range(1_500):
        for name in by_tick.get(tick, ()):
            machine.ask(name)
        machine.tick()
    assert len(machine.waits) == len(asked)
    assert max(machine.waits) <= 4 * (machine.max_wait_s + machine.load_s + machine.work_s)
    # no load is wasted, and a model is reloaded only for requests after its eviction
    assert len(machine.loads) <= len(asked)


def test_an_unloadable_model_does_not_block_others() -> None:
    wanted = [want("huge", 0.0, need=99), want("b", 1.0)]
    assert next_turn(wanted, [held("a")], 10, 5.0, max_wait_s=20.0) == Turn(load="b")
    assert next_turn(wanted, [held("a", pinned=True)], 10, 50.0, max_wait_s=20.0) == Turn()
