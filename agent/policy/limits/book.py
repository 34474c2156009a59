"""All limits at one node: what may start, what is given to peers, what is saved. Pure: times are arguments.

A node's limits are divided among the configured nodes. When the nodes or a limit change, each node divides what is left
of the limit by what it knows that all have used, so a change overspends by no more than what is used while nodes
disagree.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from agent.policy.limits.ledger import LEASE_S, LIVELY_S, Ledger, Loans
from agent.policy.limits.limit import Amounts, Limit, Name, Period, parts, period
from agent.policy.limits.share import Share, basis
from agent.policy.limits.use import Use, WindowUse

WAIT_S = 5.0
"""A node that has just started, or joined, waits that long to hear from every peer what is used already."""
ELSEWHERE_S = 2.0
"""What a peer has and does not need is here within about this time."""
MOST_SHARES, TURNS = 256, 16
"""Limits in a heartbeat: those with loans, then those in use, and of the others a few in turn."""
SLEPT_S = 1.0
"""A wall clock that has gone on by more than the monotonic one: this machine slept, or its clock was set."""
_KEPT_PERIODS = 2
"""A clock that is set back finds the period before."""


class Now(NamedTuple):
    """A moment: seconds of a monotonic clock, and seconds since 1970."""

    mono_s: float
    wall_s: float


class Short(NamedTuple):
    """Why a request may not start: the limit, and when to try again. ``moves``: the rack has some left, at nodes from
    which it is on its way, unless they are down."""

    limit: Limit
    retry_after_s: float
    moves: bool


class Taken(msgspec.Struct):
    """What a request holds of one limit."""

    ledger: Ledger
    slot: int
    amount: int


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """One ledger in the state file. ``ages`` are a window's amounts, with their ages in seconds."""

    name: Name
    period: int
    basis: str
    void: int = 0
    open: bool = False
    total: int = 0
    largest: int = 0
    ages: list[tuple[float, int]] = []
    loans: Loans
    used_by: dict[str, int] = {}


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The state file. ``wall_s`` is when it was made."""

    wall_s: float
    ledgers: list[Saved] = []


Rows = Callable[[str], Callable[[int], None]]
"""Opens the row in which the total of a name is noted with every request."""


def _no_rows(_: str) -> Callable[[int], None]:
    return lambda _: None


class Book:
    """The limits of node ``me``. ``lost``: what another run has saved cannot be read, so all of this node's parts count
    as used."""

    def __init__(
        self,
        me: str,
        began: Now,
        *,
        window_s: float = 60.0,
        lease_s: float = LEASE_S,
        rows: Rows = _no_rows,
        lost: bool = False,
    ) -> None:
        self._me, self._began_s, self._window_s, self._rows, self._lost = me, began.mono_s, window_s, rows, lost
        self._lease_s = lease_s
        self._limits: dict[Name, Limit] = {}
        self._nodes: tuple[str, ...] = (me,)
        self._heard: set[str] = set()
        self._now: dict[Name, Ledger] = {}
        self._past: dict[Name, list[Ledger]] = {}
        self._saved: dict[tuple[Name, int], Saved] = {}
        self._elapsed_s = 0.0
        self._noted: Callable[[str], int] = lambda _: 0
        self._bases: dict[int, str] = {}
        self._ticked, self._turn = began, 0

    # ---- what holds ----

    def become(self, limits: Iterable[Limit], nodes: Iterable[str], now: Now) -> None:
        """Put other limits and nodes in force. A node that is not listed holds nothing any more."""
        self._limits = {limit.name: limit for limit in limits}
        self._nodes, self._bases = tuple(sorted({self._me, *nodes})), {}
        for name in [name for name in self._now if name not in self._limits]:
            self._keep(self._now.pop(name))
        for limit in self._limits.values():
            self.ledger(limit, now)

    def restore(self, state: State, noted: Callable[[str], int], now: Now) -> None:
        """Take over what another run of this agent has saved, before ``become``; ``noted`` is the total in the row of a
        name, 0 without one."""
        self._saved = {(one.name, one.period): one for one in state.ledgers}
        self._elapsed_s, self._noted = max(0.0, now.wall_s - state.wall_s), noted

    def ledger(self, limit: Limit, now: Now) -> Ledger:
        """The account of a limit in the current period."""
        found = self._now.get(limit.name)
        if found is None or not self._current(found, now) or found.basis != self._basis(limit):
            found = self._begin(limit, now)
        if not found.open:
            self._open(found, now)
        return found

    # ---- requests ----

    def reserve(self, wanted: Sequence[tuple[Limit, int]], now: Now) -> list[Taken] | Short:
        """Count what a request may use of every limit, or of none."""
        ledgers = [(self.ledger(limit, now), amount) for limit, amount in wanted if amount]
        refused = [(ledger, amount) for ledger, amount in ledgers if not ledger.admits(amount, now.mono_s)]
        if refused:
            for ledger, amount in refused:
                ledger.asked(amount, now.mono_s, short=True)
            return max((self._short(ledger, amount, now) for ledger, amount in refused), key=lambda s: s.retry_after_s)
        taken = []
        for ledger, amount in ledgers:
            ledger.asked(amount, now.mono_s, short=False)
            taken.append(Taken(ledger, ledger.use.add(amount, now.mono_s), amount))
        return taken

    def correct(self, taken: Iterable[Taken], amounts: Amounts, now: Now, *, last: bool) -> None:
        """Replace what a request may use by what is known better; ``last``: that is what it has used."""
        for one in taken:
            amount = amounts.of(one.ledger.name.unit)
            one.ledger.use.adjust(one.slot, amount - one.amount, now.mono_s)
            one.amount = amount
            if last:
                one.ledger.use.ended(amount)

    def give_back(self, taken: Iterable[Taken], now: Now) -> None:
        """Undo a reservation as if it had not been."""
        for one in taken:
            one.ledger.use.adjust(one.slot, -one.amount, now.mono_s)
            one.amount = 0

    # ---- heartbeats ----

    def tick(self, now: Now) -> None:
        """Work out what is wanted, and give away what is not needed; then ``state`` must be saved before ``shares`` are
        told."""
        elapsed_s = now.mono_s - self._ticked.mono_s
        slept = now.wall_s - self._ticked.wall_s > elapsed_s + SLEPT_S
        self._ticked = now
        for limit in self._limits.values():
            ledger = self.ledger(limit, now)
            if slept:
                ledger.lapse()
            ledger.measure(elapsed_s, now.mono_s)
            ledger.give(len(self._nodes), now.mono_s)

    def heard(self, node: str, shares: Iterable[Share], now: Now) -> None:
        """A peer's heartbeat."""
        if node not in self._nodes:
            return
        self._heard.add(node)
        for share in shares:
            if (limit := self._limits.get(share.name)) is None:
                continue
            ledger = self.ledger(limit, now)
            if share.period != ledger.period.start_s:
                continue  # its clock, or ours, is in another one
            ledger.used_by[node] = (share.used, now.mono_s)
            if share.basis == ledger.basis:
                ledger.heard(node, share, self._me, now.mono_s)

    def shares(self, now: Now) -> tuple[Share, ...]:
        """What a heartbeat tells: limits in use, the latest first, and a few of the others in turn."""
        known = sorted(self._now.values(), key=lambda one: (not (one.lent or one.borrowing), -one.lively_s))
        lively = [
            one for one in known[:MOST_SHARES] if one.lent or one.borrowing or now.mono_s - one.lively_s <= LIVELY_S
        ]
        others = [one for one in known[len(lively) :] if one.use.total or one.loans.given or one.loans.got]
        self._turn = (self._turn + TURNS) % max(1, len(others))
        return tuple(one.share(now.mono_s) for one in (*lively, *others[self._turn :][:TURNS]))

    # ---- what is saved, what is shown ----

    def state(self, now: Now) -> State:
        """What another run of this agent needs to know."""
        every = [*self._now.values(), *(ledger for past in self._past.values() for ledger in past)]
        return State(wall_s=now.wall_s, ledgers=[_saved(one, now) for one in every])

    def known(self, owner: str, now: Now) -> Iterator[Ledger]:
        """The limits of an owner that are in force."""
        for limit in self._limits.values():
            if limit.name.owner == owner:
                yield self.ledger(limit, now)

    @property
    def limits(self) -> Iterable[Limit]:
        """All limits in force."""
        return self._limits.values()

    # ---- inside ----

    def _current(self, ledger: Ledger, now: Now) -> bool:
        return not ledger.period.end_s or ledger.period.start_s <= now.wall_s < ledger.period.end_s

    def _basis(self, limit: Limit) -> str:
        if (found := self._bases.get(limit.most)) is None:
            found = self._bases[limit.most] = basis(limit.most, self._nodes)
        return found

    def _ledger(self, limit: Limit, span: Period, use: Use) -> Ledger:
        return Ledger(limit, span, self._basis(limit), self._mine(limit.most), use, lease_s=self._lease_s)

    def _mine(self, amount: int) -> int:
        """This node's share of an amount that is divided among all nodes."""
        return list(parts(amount, len(self._nodes)))[self._nodes.index(self._me)]

    def _begin(self, limit: Limit, now: Now) -> Ledger:
        """The account for another period, limit or set of nodes."""
        name, span = limit.name, period(limit.name.span, now.wall_s)
        self._limits.setdefault(name, limit)
        before = self._now.pop(name, None)
        if before is not None and before.period != span:
            self._keep(before)
        found = before if before is not None and before.period == span else self._again(name, span)
        if found is None:
            found = self._fresh(limit, span, now)
            found.open = found.open or (before is not None and before.basis == found.basis)
        elif found.basis != self._basis(limit):
            used, used_by = found.use, found.used_by
            found = self._ledger(limit, span, used)
            found.used_by = used_by
            self._take_over(found, now)
        self._now[name] = found
        return found

    def _again(self, name: Name, span: Period) -> Ledger | None:
        """The account of a period that was in force before: the clock was set back, or on again."""
        past = self._past.get(name, [])
        found = next((ledger for ledger in past if ledger.period == span), None)
        if found is not None:
            past.remove(found)
        return found

    def _keep(self, ledger: Ledger) -> None:
        self._past[ledger.name] = [*self._past.get(ledger.name, ()), ledger][-_KEPT_PERIODS:]

    def _fresh(self, limit: Limit, span: Period, now: Now) -> Ledger:
        """A new account, with what another run of this agent has saved of it."""
        label = f"{limit.name.owner} {limit.name.span} {limit.name.unit} {span.start_s}"
        if limit.name.span == "minute":
            use: Use = WindowUse(self._window_s)
        else:
            use = Use()
        ledger = self._ledger(limit, span, use)
        if (saved := self._saved.get((limit.name, span.start_s))) is not None:
            use.total, use.largest = saved.total, saved.largest
            if isinstance(use, WindowUse):
                use.put_back(((age_s + self._elapsed_s, amount) for age_s, amount in saved.ages), now.mono_s)
            ledger.used_by = {node: (used, now.mono_s) for node, used in saved.used_by.items()}
            self._take_over(ledger, now)
        use.add(max(0, self._noted(label) - use.total), now.mono_s)
        use.note = self._rows(label)
        if saved is None:  # nothing of a new period is used when it begins
            ledger.open = any(one.basis == ledger.basis and one.name == limit.name for one in self._saved.values())
        return ledger

    def _take_over(self, ledger: Ledger, now: Now) -> None:
        """What another run has lent and borrowed, once, and only when the same nodes and limit are in force: after a
        start they may be others until the desired state is read."""
        key = ledger.name, ledger.period.start_s
        if (saved := self._saved.get(key)) is not None and saved.basis == ledger.basis:
            del self._saved[key]
            ledger.loans, ledger.open = saved.loans, saved.open
            ledger.annul(saved.void, now.mono_s)

    def _open(self, ledger: Ledger, now: Now) -> None:
        """Divide what is left, once it is known what is used."""
        peers = set(self._nodes) - {self._me}
        if not peers <= self._heard and now.mono_s < self._began_s + WAIT_S:
            return
        ledger.open = True
        used = ledger.use.amount(now.mono_s)
        left = self._mine(max(0, ledger.limit.most - used - ledger.used_elsewhere(now.mono_s)))
        void = ledger.base if self._lost else max(0, ledger.base - used - left)
        ledger.annul(void, now.mono_s)

    def _short(self, ledger: Ledger, amount: int, now: Now) -> Short:
        floor, mono_s = ledger.floor(amount), now.mono_s
        moves = not ledger.open or (len(self._nodes) > 1 and ledger.limit.most - ledger.used(mono_s) >= floor)
        if ledger.is_window:
            free_s = ledger.use.free_in(floor - ledger.left(mono_s), mono_s)
            later_s = self._window_s if free_s is None else free_s
        else:
            later_s = ledger.period.end_s - now.wall_s
        return Short(ledger.limit, min(later_s, ELSEWHERE_S) if moves else later_s, moves)


def _saved(ledger: Ledger, now: Now) -> Saved:
    use = ledger.use
    return Saved(
        name=ledger.name,
        period=ledger.period.start_s,
        basis=ledger.basis,
        void=ledger.void,
        open=ledger.open,
        total=use.total,
        largest=use.largest,
        ages=use.ages(now.mono_s) if isinstance(use, WindowUse) else [],
        loans=ledger.loans,
        used_by={node: used for node, (used, _) in ledger.used_by.items() if used},
    )
