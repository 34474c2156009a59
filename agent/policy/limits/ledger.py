"""One limit at one node: the part that the node may use, what it has used, lent and borrowed. Pure.

``part = base - void - lent + borrowed``. The bases of all nodes sum to the limit; a node lends of its own base only.
Who gives (a lender, or a borrower that returns) lowers its own part before it tells; who gets raises its own only when
it has been told, so the parts never sum to more. All sums that nodes tell each other only rise.

What is borrowed of a limit per minute is leased: the borrower must hear from the lender every few seconds. A lender
that hears nothing of a borrower declares its loans ended, and has them back when the borrower has certainly stopped to
use them and what it used has left the window.
"""

from math import ceil
from typing import NamedTuple

import msgspec

from agent.policy.limits.limit import Limit, Name, Period
from agent.policy.limits.share import Share
from agent.policy.limits.use import SLOTS, Use, WindowUse

AHEAD_S = 5.0
"""A node wants what it is likely to need in this time."""
KEEP_S = 3.0
"""A node keeps what it is likely to need in this time."""
FRESH_S = 3.5
"""What a peer wants counts that long."""
LIVELY_S = 120.0
LEASE_S = 5.0
"""A borrower stops using a loan when it has not heard from the lender for this time, a lender declares it ended when
it has not heard from the borrower for as long; and as long an answer may be under way."""
_NEVER_S = float("-inf")
_CALM = 0.6
"""What is left of a rate after a second without requests."""


class Wanted(NamedTuple):
    """What a peer lacks, and the part that it has."""

    want: int
    part: int
    heard_s: float


class Loans(msgspec.Struct, kw_only=True):
    """Sums since the period began, by peer. Of what was ``given`` to it, it has sent ``back`` some, unused; ``ended``
    was taken from it without its doing, of which what has ``matured`` may be used here. Of what this node ``got`` from
    it some was ``returned``, and some is ``gone``, because the lender has ended it."""

    given: dict[str, int] = {}
    back: dict[str, int] = {}
    ended: dict[str, int] = {}
    matured: dict[str, int] = {}
    got: dict[str, int] = {}
    returned: dict[str, int] = {}
    gone: dict[str, int] = {}

    def lent(self, node: str) -> int:
        """What a peer has of this node's base, or may still have."""
        return self._left(node, self.given, self.back, self.matured)

    def out(self, node: str) -> int:
        """What it has as far as this node has not ended it."""
        return self._left(node, self.given, self.back, self.ended)

    def held(self, node: str) -> int:
        """What this node has of a peer's base."""
        return self._left(node, self.got, self.returned, self.gone)

    @staticmethod
    def _left(node: str, of: dict[str, int], *less: dict[str, int]) -> int:
        # what was returned while it was ended is counted twice
        return max(0, of.get(node, 0) - sum(sums.get(node, 0) for sums in less))


class Ledger:
    """The account of one limit. ``base`` is this node's part before loans; ``void`` of it may not be used, because
    others have used it before the limit was divided anew. Until it is ``open`` nothing may be used: it is not known yet
    what others have used."""

    def __init__(
        self, limit: Limit, period: Period, basis: str, base: int, use: Use, *, lease_s: float = LEASE_S
    ) -> None:
        self.limit, self.period, self.basis, self.base, self.use = limit, period, basis, base, use
        self.lease_s = lease_s
        self.void, self.hold, self.open = 0, 0, False
        self._void_until_s = float("inf")
        self.loans = Loans()
        self._heard_s: dict[str, float] = {}
        """When each peer last told of this limit."""
        self._mature_s: dict[str, float] = {}
        """When loans that were declared ended are here again."""
        self.used_by: dict[str, tuple[int, float]] = {}
        """What peers have used, and when that was heard."""
        self.wanted: dict[str, Wanted] = {}
        self.want = 0
        self.lively_s = _NEVER_S
        """When it was last used, wanted or lent."""
        self._asked, self._rate = 0, 0.0
        self._short, self._short_s = 0, _NEVER_S

    @property
    def name(self) -> Name:
        """The limit's name."""
        return self.limit.name

    @property
    def is_window(self) -> bool:
        """Whether it is a limit per minute."""
        return isinstance(self.use, WindowUse)

    @property
    def lent(self) -> int:
        """What peers have of this node's base."""
        return sum(self.loans.lent(node) for node in self.loans.given)

    @property
    def borrowing(self) -> bool:
        """Whether anything of a peer's is here."""
        return any(self.loans.held(node) for node in self.loans.got)

    def borrowed(self, node: str, now_s: float) -> int:
        """What this node may use of a peer's base."""
        if self.is_window and now_s - self._heard_s.get(node, _NEVER_S) > self.lease_s:
            return 0
        return self.loans.held(node)

    def part(self, now_s: float) -> int:
        """What this node may use, in all."""
        return self.base - self.void - self.lent + sum(self.borrowed(node, now_s) for node in self.loans.got)

    def spare(self, now_s: float) -> int:
        """What of the part is not used; negative after the last request used more than was left."""
        return self.part(now_s) - self.use.amount(now_s) if self.open else 0

    def left(self, now_s: float) -> int:
        """What requests may use now."""
        return self.spare(now_s) - self.hold

    def floor(self, amount: int) -> int:
        """The least that must be left for a request that may use ``amount``: anything of a budget; per minute what the
        largest of recent requests really used."""
        return min(amount, max(1, self.use.largest)) if self.is_window else 1

    def admits(self, amount: int, now_s: float) -> bool:
        """Whether a request may start. One whose amount is not left may start if ``floor`` is: the next one cannot
        before it is settled."""
        left = self.left(now_s)
        return left >= amount or left >= self.floor(amount)

    def asked(self, amount: int, now_s: float, *, short: bool) -> None:
        """Learn of a request; ``short``: it was refused for this limit."""
        likely = min(amount, self.use.largest) if self.use.largest else amount
        self._asked += likely
        self.lively_s = now_s
        if short:
            self._short, self._short_s = max(self._short, min(amount, self.limit.most)), now_s

    def used_elsewhere(self, now_s: float) -> int:
        """What peers have used, as far as known."""
        lasting = self.use.window_s if isinstance(self.use, WindowUse) else float("inf")
        return sum(used for used, heard_s in self.used_by.values() if now_s - heard_s <= lasting)

    def used(self, now_s: float) -> int:
        """What the rack has used, as far as known, without what is void here for a minute."""
        return self.use.amount(now_s) + self.used_elsewhere(now_s)

    def annul(self, amount: int, now_s: float) -> None:
        """Of the part, that much may not be used in this period, or for a minute: others have used it."""
        self.void = amount
        if isinstance(self.use, WindowUse):
            # a slot longer than what they have used can count
            self._void_until_s = now_s + self.use.window_s * (1 + 1 / SLOTS)

    # ---- moving parts ----

    def measure(self, elapsed_s: float, now_s: float) -> None:
        """Work out what is wanted, from the requests of the last ``elapsed_s``."""
        elapsed_s = max(elapsed_s, 0.1)
        if now_s >= self._void_until_s:
            self.void = 0
        self._rate += (self._asked / elapsed_s - self._rate) * (1 - _CALM**elapsed_s)
        if self._rate * AHEAD_S < 0.01:
            self._rate = 0.0
        if now_s - self._short_s > FRESH_S:
            self._short = 0
        need = max(min(ceil(self._rate * AHEAD_S), self.limit.most), self._short)
        self.want = max(0, min(need - self.left(now_s), self.limit.most)) if self.open else 0
        self._asked = 0

    def give(self, nodes: int, now_s: float) -> None:
        """Lend what is not needed here to peers that want it, or return it to its lender, who will. Of a limit per
        minute, a node that has more than an equal share of the nodes in need holds back what is due to those that have
        less."""
        self._end_loans(now_s)
        self.wanted = {node: one for node, one in self.wanted.items() if one.want and now_s - one.heard_s <= FRESH_S}
        self.hold = 0
        spare = max(0, self.spare(now_s))
        if not self.open or not self.wanted:
            self._return(spare - ceil(self._rate * 2 * AHEAD_S) - self._short, now_s)
            return
        free = max(0, spare - ceil(self._rate * KEEP_S) - self._short)
        total, givers = sum(one.want for one in self.wanted.values()), max(1, nodes - len(self.wanted))
        for node, one in list(self.wanted.items()):
            spare -= self._yield(node, min(free * one.want // total, -(-one.want // givers)), now_s)
        if self.is_window and self._rate:
            self._balance(spare, now_s)

    def heard(self, node: str, share: Share, me: str, now_s: float) -> None:
        """What a peer tells of the same limit, divided in the same way."""
        loans, under_way = self.loans, self.loans.given.get(node, 0) - share.got.get(me, 0)
        self._heard_s[node] = now_s
        for mine, theirs in (
            *((loans.got, share.given), (loans.gone, share.ended), (loans.back, share.returned)),
            # what this node has forgotten with its state folder
            *((loans.given, share.got), (loans.ended, share.gone), (loans.returned, share.back)),
        ):
            _raise(mine, node, theirs.get(me, 0))
        if share.want:
            self.lively_s = now_s
        under_way = max(0, under_way)
        self.wanted[node] = Wanted(max(0, share.want - under_way), share.part + under_way, now_s)

    def share(self, now_s: float) -> Share:
        """What peers are told."""
        loans = self.loans
        return Share(
            owner=self.name.owner,
            span=self.name.span,
            unit=self.name.unit,
            period=self.period.start_s,
            basis=self.basis,
            used=max(0, self.use.amount(now_s)),
            part=max(0, self.part(now_s)),
            want=self.want,
            given=dict(loans.given),
            back=dict(loans.back),
            ended=dict(loans.ended),
            got=dict(loans.got),
            returned=dict(loans.returned),
            gone=dict(loans.gone),
        )

    def lapse(self) -> None:
        """Nothing that was leased may be used before its lender is heard again: this node may have slept."""
        self._heard_s.clear()

    def _balance(self, spare: int, now_s: float) -> None:
        fair = self.limit.most // (len(self.wanted) + 1)
        owed = max(0, self.part(now_s) - fair)
        for node, one in list(self.wanted.items()):
            due = min(owed, max(0, min(one.want, fair - one.part)))
            paid = self._yield(node, min(due, spare), now_s)
            spare, owed = spare - paid, owed - due
            self.hold += due - paid

    def _yield(self, node: str, amount: int, now_s: float) -> int:
        """Lend an amount to a peer, or return it to lenders as far as this node's base does not hold it."""
        lent = max(0, min(amount, self.base - self.void - self.lent))
        if lent:
            self.loans.given[node] = self.loans.given.get(node, 0) + lent
            before = self.wanted[node]
            self.wanted[node] = before._replace(want=max(0, before.want - lent), part=before.part + lent)
            self.lively_s = now_s
        return lent + self._return(amount - lent, now_s)

    def _return(self, amount: int, now_s: float) -> int:
        left = amount
        for node in self.loans.got if left > 0 else ():
            if back := min(left, self.borrowed(node, now_s)):
                self.loans.returned[node] = self.loans.returned.get(node, 0) + back
                left, self.lively_s = left - back, now_s
        return amount - left if amount > 0 else 0

    def _end_loans(self, now_s: float) -> None:
        """Declare loans of a limit per minute ended whose borrower is silent, and take back those that have matured."""
        if not isinstance(self.use, WindowUse):
            return
        loans = self.loans
        for node in loans.given:
            out, ended = loans.out(node), loans.ended.get(node, 0)
            if out and now_s - self._heard_s.setdefault(node, now_s) > self.lease_s:
                loans.ended[node] = ended + out
                self._mature_s.pop(node, None)  # the time runs from when it is told
            elif ended > loans.matured.get(node, 0):
                # the lease, an answer under way, and the window of what was used last
                wait_s = 2 * self.lease_s + self.use.window_s * (1 + 1 / SLOTS)
                if now_s >= self._mature_s.setdefault(node, now_s + wait_s):
                    loans.matured[node] = ended
                    del self._mature_s[node]


def _raise(sums: dict[str, int], node: str, to: int) -> None:
    if to > sums.get(node, 0):
        sums[node] = to
