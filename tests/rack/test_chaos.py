"""The fault matrix: kinds of faults by phases of requests. No cell may cost a client anything but
time.

A gateway without models and three workers behind links that fail on command; each cell's row shows how many
requests there were, how many were retried or continued, and the added latency. ``make chaos`` runs each
cell several times.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from tests.rack.harness import Agent, model, rack, until
from tests.rack.links import Links
from tests.rack.load import Ask, Expected, Heard, Load, at_once, quantile

ROUNDS = int(os.environ.get("MLXRACK_CHAOS", "1"))
FAULT_S = 0.6
"""The fault occurs this long after the requests were sent."""
WORKER = model(rows=2, fake_step_s=0.02, fake_row_s=0.002, fake_prefill_tps=400)

PHASES: dict[str, list[Ask]] = {
    "mid_stream": [Ask(f"tell me {n}", 70) for n in range(6)],
    "first_byte": [Ask(f"long {n} " * 150, 10) for n in range(6)],
    "queued": [Ask(f"wait {n}", 40) for n in range(12)],
    "whole": [Ask(f"all at once {n}", 70, stream=False) for n in range(6)],
}


class Fault(NamedTuple):
    """How a node fails, how long the gateway may take to notice and to mark it down, and how long a request may take
    longer."""

    begin: Callable[["Shelf"], None]
    end: Callable[["Shelf"], None]
    seen_s: float
    dead_s: float
    longer_s: float


class Shelf:
    """A gateway, its workers, one of which is the victim, and the links between them."""

    def __init__(self, agents: list[Agent], links: Links) -> None:
        self.door, self.victim, *self.others = agents
        self.agents, self.links = agents, links
        self.expected = Expected()
        self.usual: dict[str, list[Heard]] = {}

    def state(self) -> str:
        """The victim's state on the gateway."""
        peers = self.door.status()["peers"]
        return str(next(p["state"] for p in peers if p["node"] == self.victim.node))

    def restarted(self) -> None:
        self.victim.start().ready()

    def stopped(self, number: signal.Signals) -> None:
        assert self.victim.process is not None
        os.kill(self.victim.process.pid, number)

    def link(self, mode: str) -> None:
        self.links.set(mode, source=self.door.node, sink=self.victim.node)  # type: ignore[arg-type]

    def learn(self, phase: str) -> list[Heard]:
        """The undisturbed answers of the phase's requests, and their latency."""
        if phase not in self.usual:
            heard = at_once(self.door.port, PHASES[phase])
            for one in heard:
                self.expected.learn(one)
            self.usual[phase] = heard
        return self.usual[phase]


LATE_S = 0.0 if ROUNDS > 1 else 0.5
"""Beside other tests deadlines are met a little later."""
FAULTS: dict[str, Fault] = {
    "sigkill": Fault(lambda s: s.victim.kill(), lambda s: s.restarted(), 1.5, 3.5, 3.0),
    "sigstop": Fault(
        lambda s: s.stopped(signal.SIGSTOP), lambda s: s.stopped(signal.SIGCONT), 1.5 + LATE_S, 3.5 + LATE_S, 7.0
    ),
    "reset": Fault(lambda s: s.link("reset"), lambda s: s.link("healthy"), 1.5, 3.5, 3.0),
    "half_open": Fault(lambda s: s.link("deaf"), lambda s: s.link("healthy"), 1.5 + LATE_S, 3.5 + LATE_S, 7.0),
    "one_way_drop": Fault(lambda s: s.link("mute"), lambda s: s.link("healthy"), 1.5 + LATE_S, 3.5 + LATE_S, 7.0),
}


FEW = [
    *(("sigkill", phase) for phase in PHASES),
    ("sigstop", "mid_stream"),
    ("reset", "first_byte"),
    ("half_open", "queued"),
    ("one_way_drop", "whole"),
]
"""What `make check` runs; `make chaos` runs all."""
CELLS = [(name, phase) for name in FAULTS for phase in PHASES] if ROUNDS > 1 else FEW


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    folder = tmp_path_factory.mktemp("chaos")
    with Links() as links, rack(folder, [], [WORKER], [WORKER], [WORKER], links=links) as agents:
        yield Shelf(agents, links)


def healed(shelf: Shelf) -> float:
    """Seconds until the gateway uses the victim again; returns once it has its share again."""
    began = time.monotonic()
    until(lambda: shelf.state() == "up", "the victim is back", 10.0)
    took = time.monotonic() - began
    until(lambda: not shelf.door.status()["in_flight"], "nothing is left over")
    workers: set[str] = set()
    while shelf.door.status()["breakers"] or shelf.victim.node not in workers:
        assert time.monotonic() - began < 30.0, "it is given no more work"
        workers = {one.worker for one in at_once(shelf.door.port, [Ask("try again", 5)] * 6)}
    return took


def steps(shelf: Shelf, heard: list[Heard]) -> list[str]:
    """The decisions for these requests, for display."""
    found = []
    for one in heard:
        parts = shelf.door.get(f"/debug/decision/{one.request_id}").json["parts"]
        found += [f"{step['what']} {step.get('node', '')}" for part in parts for step in part["steps"]]
    return found


def row(case: str, heard: list[Heard], usual: list[Heard], faults: list[str], moved: int, recovery_s: float) -> None:
    """One row of the matrix."""
    firsts = [one.first_s or one.total_s for one in heard]
    before = [one.first_s or one.total_s for one in usual]
    longest = max((one.longest_gap_s for one in heard), default=0.0)
    print(
        f"{case:<24} {len(heard):>4} requests {len(heard) - len(faults):>4} ok {len(faults):>3} failed {moved:>3} moved"
        f"  first token p50 {quantile(before, 0.5) * 1e3:>5.0f} -> {quantile(firsts, 0.5) * 1e3:>5.0f} ms"
        f"  p99 {quantile(before, 0.99) * 1e3:>5.0f} -> {quantile(firsts, 0.99) * 1e3:>5.0f} ms"
        f"  longest pause {longest:>4.1f} s  back after {recovery_s:>4.1f} s"
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "phase"), CELLS)
def test_a_fault_costs_only_time(shelf: Shelf, name: str, phase: str) -> None:
    fault, usual = FAULTS[name], shelf.learn(phase)
    for _ in range(ROUNDS):
        load = Load([(0.0, one) for one in PHASES[phase]], lambda _: shelf.door.port).start()
        time.sleep(FAULT_S)
        fault.begin(shelf)
        try:
            heard = load.join()
        finally:
            fault.end(shelf)
        recovery_s = healed(shelf)
        faults = [why for one in heard if (why := shelf.expected.fault(one))]
        lost = steps(shelf, heard).count(f"lost {shelf.victim.node}")
        row(f"{name} {phase}", heard, usual, faults, lost, recovery_s)
        assert not faults
        assert lost, "the victim had nothing to lose"
        slowest = max(one.total_s for one in usual)
        assert max(one.total_s for one in heard) < slowest * 1.6 + fault.longer_s, "it cost more time than it may"
        assert recovery_s < 3.0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAULTS if ROUNDS > 1 else ["sigkill", "sigstop"])
def test_a_failed_idle_node_gets_no_requests(shelf: Shelf, name: str) -> None:
    fault, usual = FAULTS[name], shelf.learn("mid_stream")
    for _ in range(ROUNDS):
        began = time.monotonic()
        fault.begin(shelf)
        try:
            until(lambda: shelf.state() != "up", "the door has noticed", 5.0)
            noticed_s = time.monotonic() - began
            load = Load([(0.0, one) for one in PHASES["mid_stream"]], lambda _: shelf.door.port).start()
            until(lambda: shelf.state() == "down", "it is declared dead", 5.0)
            dead_s = time.monotonic() - began
            heard = load.join()
        finally:
            fault.end(shelf)
        recovery_s = healed(shelf)
        faults = [why for one in heard if (why := shelf.expected.fault(one))]
        row(f"{name} idle", heard, usual, faults, 0, recovery_s)
        print(f"{'':<24} noticed after {noticed_s:.2f} s, dead after {dead_s:.2f} s")
        assert not faults
        assert shelf.victim.node not in {one.worker for one in heard}
        assert noticed_s < fault.seen_s
        assert dead_s < fault.dead_s
        assert recovery_s < 3.0
