"""Compares least-recently-used eviction with eviction by cost on synthetic days of traffic. Deterministic.

Prints the table of agent/DESIGN.md, which a test compares with what this computes. One node, sixteen hours; a request
for a model that is not resident evicts others by the policy and waits for its load.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from agent.models.demand import Demand
from agent.models.eviction import Evict, NoRoom, Occupant, Ranking, by_age, by_cost, make_room
from scripts.common import arrivals

HOURS = 16
BUDGET_GB = 40
READ_GB_PER_S = 2.0
START_S = 3.0
SEED = 11
"""For the printed table; the half-life of demand was chosen with other seeds."""


class Kind(NamedTuple):
    """A model of the trace: its size and its request rate."""

    name: str
    gb: float
    per_hour: float

    @property
    def load_s(self) -> float:
        """Starting a process and reading the weights."""
        return START_S + self.gb / READ_GB_PER_S


Trace = list[tuple[float, str]]
MODELS = (
    Kind("chat-8b", 5, 240),
    Kind("code-14b", 9, 90),
    Kind("embed", 1, 120),
    Kind("vision-11b", 8, 20),
    Kind("chat-32b", 19, 30),
    Kind("draft-3b", 2, 60),
    Kind("legal-14b", 9, 6),
    Kind("batch-24b", 14, 3),
)


class Outcome(NamedTuple):
    """The cost of a policy."""

    loads: int
    waited_s: float
    read_gb: float


def simulate(trace: Trace, ranking: Ranking, models: Sequence[Kind] = MODELS, budget_gb: float = BUDGET_GB) -> Outcome:
    """Replay a trace under a policy."""
    kinds = {kind.name: kind for kind in models}
    demands = {kind.name: Demand() for kind in models}
    resident: set[str] = set()
    loads, waited, read = 0, 0.0, 0.0
    for now, name in trace:
        demands[name].asked(now)
        if name in resident:
            continue
        held = [_occupant(kinds[one], demands[one], now) for one in sorted(resident)]
        room = make_room(_bytes(kinds[name].gb), held, _bytes(budget_gb), ranking=ranking)
        assert not isinstance(room, NoRoom), "every model of the traces fits alone"
        if isinstance(room, Evict):
            resident -= set(room.victims)
        resident.add(name)
        loads, waited, read = loads + 1, waited + kinds[name].load_s, read + kinds[name].gb
    return Outcome(loads, waited, read)


def _occupant(kind: Kind, demand: Demand, now: float) -> Occupant:
    return Occupant(
        name=kind.name,
        need_bytes=_bytes(kind.gb),
        last_used_s=demand.last_s or 0.0,
        reload_s=kind.load_s,
        per_s=demand.per_s(now),
    )


def _bytes(gb: float) -> int:
    return int(gb * 1e9)


def _poisson(rng: random.Random, kind: Kind, begin_s: float, end_s: float, factor: float = 1.0) -> Iterator[float]:
    return itertools.takewhile(lambda at: at < end_s, arrivals(rng, kind.per_hour * factor / 3600, begin_s))


def steady(rng: random.Random) -> Trace:
    """Every model at its own rate."""
    return sorted((at, kind.name) for kind in MODELS for at in _poisson(rng, kind, 0, HOURS * 3600))


def sweeps(rng: random.Random) -> Trace:
    """Steady traffic, and every half hour a job that sends one request to each model."""
    asked = [(half * 1800.0 + n * 5.0, kind.name) for half in range(2 * HOURS) for n, kind in enumerate(MODELS)]
    return sorted(steady(rng) + asked)


def shifts(rng: random.Random) -> Trace:
    """Every two hours the request rates move to other models."""
    found: Trace = []
    for shift in range(HOURS // 2):
        begin = shift * 7200.0
        for n, kind in enumerate(MODELS):
            borrowed = kind._replace(per_hour=MODELS[(n + 3 * shift) % len(MODELS)].per_hour)
            found += [(at, kind.name) for at in _poisson(rng, borrowed, begin, begin + 7200)]
    return sorted(found)


def bursts(rng: random.Random) -> Trace:
    """Little traffic, but for minutes with many requests for one rarely used large model."""
    found = [(at, kind.name) for kind in MODELS for at in _poisson(rng, kind, 0, HOURS * 3600, 0.3)]
    for begin in range(0, HOURS * 3600, 2400):
        large = MODELS[7] if begin % 4800 else MODELS[4]
        found += [(begin + n * 6.0, large.name) for n in range(40)]
    return sorted(found)


def in_turn(_: random.Random) -> Trace:
    """Five models in round-robin, and a sixth all the time: the worst case of least recently used."""
    circle = ["code-14b", "vision-11b", "chat-32b", "legal-14b", "batch-24b"]
    turns = [(n * 60.0, circle[n % 5]) for n in range(HOURS * 60)]
    return sorted(turns + [(n * 45.0, "chat-8b") for n in range(HOURS * 80)])


TRACES: dict[str, Callable[[random.Random], Trace]] = {
    "steady": steady,
    "with sweeps": sweeps,
    "changing shifts": shifts,
    "bursts of large models": bursts,
    "in turn": in_turn,
}


def table() -> str:
    """The comparison as Markdown."""
    lines = [
        "| Trace | Requests | Loads, LRU | Loads, cost | Waited for loads, LRU | Waited, cost | Ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, make in TRACES.items():
        trace = make(random.Random(SEED))
        lru, cost = simulate(trace, by_age), simulate(trace, by_cost)
        lines.append(
            f"| {name} | {len(trace)} | {lru.loads} | {cost.loads} | {lru.waited_s / 60:.1f} min | "
            f"{cost.waited_s / 60:.1f} min | {cost.waited_s / lru.waited_s:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
