"""Nodes of a rack in one process, with a network and disks that a test governs; what was really used is recorded."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import msgspec

from agent.policy.limits.book import Book, Now, Short, State, Taken
from agent.policy.limits.ledger import LEASE_S
from agent.policy.limits.limit import Amounts, Limit, Unit
from agent.policy.limits.share import Share

NOON_S = 1_796_040_000.0
"""2026-11-30 12:00 UTC."""


class Used(NamedTuple):
    """A request that was let through: when, by whom, and what it really used."""

    at_s: float
    node: str
    amounts: Amounts


class Node:
    """One node: its book, what is on its disk, and the heartbeats that it has answered with."""

    def __init__(self, rack: "Rack", name: str, skew_s: float = 0.0) -> None:
        self.rack, self.name, self.skew_s, self.mono_s = rack, name, skew_s, 0.0
        self.rows: dict[str, int] = {}
        self.disk = b""
        self.told: list[tuple[Share, ...]] = [()]
        self.told_s = [rack.s]
        self.open: list[tuple[list[Taken], Amounts]] = []
        self.book = self._start()

    @property
    def now(self) -> Now:
        return Now(self.rack.s + self.mono_s, NOON_S + self.rack.s + self.skew_s)

    def _start(self) -> Book:
        book = Book(self.name, self.now, window_s=self.rack.window_s, rows=self._row)
        noted = dict(self.rows)
        saved = msgspec.msgpack.decode(self.disk, type=State) if self.disk else State(wall_s=self.now.wall_s)
        book.restore(saved, lambda label: noted.get(label, 0), self.now)
        book.become(self.rack.limits, self.rack.members, self.now)
        return book

    def _row(self, label: str) -> Callable[[int], None]:
        return partial(self.rows.__setitem__, label)

    def become(self) -> None:
        self.book.become(self.rack.limits, self.rack.members, self.now)

    def request(self, bound: Amounts, real: Amounts, *, settled: bool = True) -> bool:
        """Whether it was let through; what is not settled at once is so by ``settle``."""
        held = self.book.reserve([(one, bound.of(one.name.unit)) for one in self.rack.limits], self.now)
        if isinstance(held, Short):
            return False
        self.rack.used.append(Used(self.rack.s, self.name, real))
        self.open.append((held, real))
        if settled:
            self.settle()
        return True

    def settle(self) -> None:
        """End the oldest request that is not."""
        if self.open:
            held, real = self.open.pop(0)
            self.book.correct(held, real, self.now, last=True)

    def tick(self) -> None:
        """Grant, save, and only then tell."""
        self.book.tick(self.now)
        shares = self.book.shares(self.now)
        self.disk = msgspec.msgpack.encode(self.book.state(self.now))
        self.told.append(shares)
        self.told_s.append(self.rack.s)

    def killed(self) -> None:
        """SIGKILL and a new start: what was not saved is lost, but for the rows."""
        self.open.clear()
        self.book = self._start()


class Rack:
    """Nodes with the same limits; ``s`` is the time, which tests move."""

    def __init__(self, nodes: int, limits: Iterable[Limit], *, window_s: float = 60.0) -> None:
        self.s, self.limits, self.window_s = 0.0, tuple(limits), window_s
        self.members = [f"n{n}" for n in range(nodes)]
        self.used: list[Used] = []
        self.nodes = {name: Node(self, name) for name in self.members}

    def deliver(self, giver: str, to: str, back: int = 0) -> None:
        """A node reads a peer's last answer, or an older one; of leases one that was not under way for too long."""
        node = self.nodes[giver]
        at = max(0, len(node.told) - 1 - back)
        late_s = self.s - node.told_s[at + 1] if at + 1 < len(node.told) else 0.0
        if late_s <= LEASE_S or not any(limit.name.span == "minute" for limit in self.limits):
            self.nodes[to].book.heard(giver, node.told[at], self.nodes[to].now)

    def meet(self, groups: Iterable[Iterable[str]] | None = None) -> None:
        """Every node reads the last answer of every other that it reaches."""
        for group in groups or [self.members]:
            for to in (names := [name for name in group if name in self.nodes]):
                for giver in names:
                    if giver != to:
                        self.deliver(giver, to)

    def pass_s(
        self, seconds: float, drive: Callable[[Node], None], groups: Iterable[Iterable[str]] | None = None
    ) -> None:
        """Time passes in steps of a tenth: ``drive`` is called with every node in each, nodes tick twice a second and
        hear of each other once."""
        kept = [list(group) for group in groups] if groups else None
        for step in range(round(seconds * 10)):
            self.s += 0.1
            for node in self.nodes.values():
                drive(node)
                if step % 5 == 0:
                    node.tick()
            if step % 10 == 3:
                self.meet(kept)

    def most_in_a_window(self, unit: Unit) -> int:
        """The largest sum of what was really used in any window."""
        sums = defaultdict[float, int](int)
        found = sorted((one.at_s, one.amounts.of(unit)) for one in self.used)
        for at_s, _ in found:
            sums[at_s] = sum(amount for other_s, amount in found if at_s <= other_s < at_s + self.window_s)
        return max(sums.values(), default=0)

    def total(self, unit: Unit) -> int:
        """Everything that was really used."""
        return sum(one.amounts.of(unit) for one in self.used)
