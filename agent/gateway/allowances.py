"""Limits of keys and providers on this node: reservations of requests, the state on disk, the part in heartbeats.

agent/policy/limits decides; docs/limits.md says what it promises. Everything but ``save`` is synchronous and belongs to
the event loop.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from agent.gateway.noted_totals import NotedTotals
from agent.policy.limits import views
from agent.policy.limits.book import Book, Now, Short, State, Taken
from agent.policy.limits.ledger import LEASE_S
from agent.policy.limits.limit import Amounts, Limit, cost, key_owner, nano, of_key, of_provider
from agent.policy.limits.share import Share
from agent.policy.rates import Rate
from agent.policy.rules import ANY, KeyPolicy, Provider, Rules
from agent.policy.rules import of_key as policy_of_key
from shared.durable import write_whole
from shared.errors import Retryable
from shared.logs import get_logger

SAVE_S = 0.5
"""How often to call ``save``."""
STATE, NOTED = "limits.state", "limits.totals"

log = get_logger("agent.gateway")


class Reservation:
    """What one request holds of its limits, from ``Allowances.reserve``. End it exactly once, whatever happens: with
    ``settle`` when the rack began to work on it (finished, cancelled or failed), with ``release`` when the rack refused
    it. One that is left by an exception without either keeps what it reserved."""

    __slots__ = ("_amounts", "_book", "_now", "_open", "_rate", "_taken")

    def __init__(
        self, book: Book, now: Callable[[], Now], taken: Sequence[Taken], amounts: Amounts, rate: Rate | None
    ) -> None:
        self._book, self._now, self._taken, self._amounts, self._rate = book, now, taken, amounts, rate
        self._open = bool(taken)

    def counted(self, prompt_tok: int) -> None:
        """The worker has counted the prompt: reserve no more than that for it."""
        if self._open:
            self._become(prompt_tok, self._amounts.completion_tok, None, last=False)

    def settle(self, prompt_tok: int, completion_tok: int, usd: Decimal | None = None) -> None:
        """Replace the reservation by what was really used; ``usd`` is what a provider charges, without it the rate
        counts. It counts as a request, whatever became of it. Once is enough; more does nothing."""
        if self._open:
            self._open = False
            self._become(prompt_tok, completion_tok, usd, last=True)

    def release(self) -> None:
        """The rack refused the request before it began: nothing of it counts, not as a request either."""
        if self._open:
            self._open = False
            self._book.give_back(self._taken, self._now())

    def _become(self, prompt_tok: int, completion_tok: int, usd: Decimal | None, *, last: bool) -> None:
        if usd is not None:
            price = nano(usd)
        elif self._rate is not None:
            price = cost(self._rate, prompt_tok, completion_tok)
        else:
            price = self._amounts.usd
        self._amounts = Amounts(prompt_tok, completion_tok, price)
        self._book.correct(self._taken, self._amounts, self._now(), last=last)


class Allowances:
    """The limits of this node. ``nodes`` are all of the rack; ``rules`` is the policy in force, ``key_ids`` the ids of
    the configured keys. ``rate_of`` is what a model's tokens cost on this rack, None where that is not known and they
    cost nothing. ``beat_s`` is the time between heartbeats; ``window_s`` the length of a minute, for tests. Raises
    OSError when the state folder cannot be used."""

    def __init__(
        self,
        node: str,
        state: Path,
        *,
        nodes: Iterable[str],
        rules: Callable[[], Rules],
        key_ids: Callable[[], Sequence[str]] = tuple,
        rate_of: Callable[[str], Rate | None] = lambda _: None,
        window_s: float = 60.0,
        beat_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.node, self.rate_of = node, rate_of
        self._file, self._clock, self._wall = state / STATE, clock, wall
        self._rules_of, self._key_ids, self._nodes = rules, key_ids, list(nodes)
        noted = NotedTotals(state / NOTED)
        saved = self._load()
        lease_s, lost = LEASE_S * beat_s, saved is None
        self._book = Book(node, self._now(), window_s=window_s, lease_s=lease_s, rows=noted.row, lost=lost)
        self._book.restore(saved or State(wall_s=self._wall()), noted.noted, self._now())
        self._in_force: tuple[Rules, tuple[str, ...]] | None = None
        self._of_key: dict[str, tuple[KeyPolicy, tuple[Limit, ...]]] = {}
        self._unpriced: set[str] = set()
        self._nothing = Reservation(self._book, self._now, (), Amounts(), None)
        self._told: tuple[Share, ...] = ()
        self._written = b""
        self.problem = ""
        """Why the state could not be saved; "" when it could."""
        self._refresh()

    # ---- requests ----

    def reserve(
        self,
        key: KeyPolicy,
        prompt_bytes: int,
        answer_tok: int,
        rate: Rate | None,
        *,
        key_id: str | None = None,
        provider: Provider | None = None,
        most_usd: Decimal | None = None,
    ) -> Reservation:
        """Reserve what a request may use at most: ``answer_tok`` over all its answers, a token for each byte of its
        prompt, ``most_usd`` or what they cost by ``rate``. ``key_id`` is whose it is, where ``key`` is the entry of *.
        Raises Retryable: ``rate_limited`` for a limit per minute and for what is on its way from other nodes,
        ``budget_exhausted`` until the period ends."""
        limits = self._limits(key, key.id if key_id is None else key_id)
        if provider is not None:
            limits += of_provider(provider)
        if not limits:
            return self._nothing
        usd = nano(most_usd) if most_usd is not None else cost(rate, prompt_bytes, answer_tok)
        amounts = Amounts(prompt_bytes, answer_tok, usd)
        held = self._book.reserve([(limit, amounts.of(limit.name.unit)) for limit in limits], self._now())
        if isinstance(held, Short):
            raise _refused(held)
        if rate is None and most_usd is None:
            self._unpriced.add(key.id if key_id is None else key_id)
        return Reservation(self._book, self._now, held, amounts, rate)

    def headers(self, key_id: str) -> dict[str, str]:
        """The x-ratelimit headers of a key's limits per minute; {} where it has none."""
        now = self._now()
        return views.headers(self._book.known(key_owner(key_id), now), now)

    # ---- what is shown ----

    def usage(self, key_id: str) -> dict[str, Any]:
        """A key's limits and what is used of them, for GET /v1/usage."""
        now = self._now()
        shown = views.usage(self._book.known(key_owner(key_id), now), now)
        return {
            "object": "usage",
            "key": key_id,
            "node": self.node,
            "as_of": views.moment(now.wall_s),
            "local_tokens_priced": key_id not in self._unpriced,
            "limits": shown,
        }

    def view(self) -> dict[str, Any]:
        """All limits at this node, for its operator."""
        now = self._now()
        ledgers = [self._book.ledger(limit, now) for limit in list(self._book.limits)]
        return {
            "node": self.node,
            "nodes": sorted({self.node, *self._nodes}),
            "problem": self.problem,
            "limits": [views.operators(ledger, now) for ledger in ledgers],
        }

    # ---- heartbeats and state ----

    def members(self, nodes: Iterable[str]) -> None:
        """The configured nodes of the rack; each holds a part of every limit, whether it is up or not."""
        self._nodes, self._in_force = list(nodes), None
        self._refresh()

    def beat(self) -> tuple[Share, ...]:
        """What a heartbeat tells: nothing that is not on disk."""
        return self._told

    def heard(self, node: str, shares: Iterable[Share]) -> None:
        """A peer's heartbeat."""
        self._book.heard(node, shares, self._now())

    async def save(self) -> None:
        """Lend what peers want and this node does not need; save it; then heartbeats tell of it. Call it every SAVE_S
        seconds, and once more at the end."""
        self._refresh()
        now = self._now()
        self._book.tick(now)
        shares, state = self._book.shares(now), self._book.state(now)
        # ages pass by themselves, and what peers have used is theirs to keep
        lasting = [msgspec.structs.replace(one, ages=[], used_by={}) for one in state.ledgers]
        mark = msgspec.msgpack.encode(lasting)
        if mark != self._written:
            body = msgspec.msgpack.encode(state)
            try:
                await asyncio.to_thread(write_whole, self._file, body, synced=_moved(shares, self._told))
            except OSError as error:
                self._note(f"{self._file.name}: {error.strerror or error}; nothing is lent to peers")
                self._told = _without_moves(shares, self._told)
                return
            self._written = mark
        self._note("")
        self._told = shares

    # ---- inside ----

    def _load(self) -> State | None:
        """What was saved; None when it cannot be read, an empty one when nothing was."""
        try:
            return msgspec.msgpack.decode(self._file.read_bytes(), type=State)
        except FileNotFoundError:
            return State(wall_s=self._wall())
        except (OSError, msgspec.MsgspecError) as error:
            reason = f"{type(error).__name__}; this node's part of every limit counts as used until its period ends"
            log.error("limits_unreadable", file=self._file.name, reason=reason)
            return None

    def _now(self) -> Now:
        return Now(self._clock(), self._wall())

    def _note(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.error("limits_not_saved", reason=problem)
        self.problem = problem

    def _limits(self, key: KeyPolicy, key_id: str) -> tuple[Limit, ...]:
        known = self._of_key.get(key_id)
        if known is not None and (known[0] is key or known[0] == key):
            return known[1]
        self._refresh()
        limits = of_key(key, key_id)
        self._of_key[key_id] = key, limits
        return limits

    def _refresh(self) -> None:
        """Put the limits of the policy, of the configured keys and nodes in force."""
        rules, ids = self._rules_of(), tuple(self._key_ids())
        if self._in_force is not None and self._in_force[0] is rules and self._in_force[1] == ids:
            return
        self._in_force, self._of_key = (rules, ids), {}
        every = {*ids, *(key.id for key in rules.keys if key.id != ANY)} if ids else {""}
        limits = [limit for key_id in sorted(every) for limit in of_key(policy_of_key(rules, key_id), key_id)]
        limits += [limit for provider in rules.providers for limit in of_provider(provider)]
        self._book.become(limits, self._nodes, self._now())


def _moved(shares: Iterable[Share], before: Iterable[Share]) -> bool:
    """Whether anything was lent or returned, which a loss of power must not undo."""
    return any(share != told for share, told in zip(shares, _without_moves(shares, before), strict=True))


def _without_moves(shares: Iterable[Share], before: Iterable[Share]) -> tuple[Share, ...]:
    """The same without what has been lent or returned since what was told ``before``."""
    told = {(share.name, share.period, share.basis): (share.given, share.returned) for share in before}
    kept = [(share, told.get((share.name, share.period, share.basis), ({}, {}))) for share in shares]
    return tuple(msgspec.structs.replace(share, given=given, returned=back) for share, (given, back) in kept)


def _refused(short: Short) -> Retryable:
    if short.limit.name.span == "minute" or short.moves:
        return Retryable(views.sentence(short), code="rate_limited", retry_after_s=short.retry_after_s)
    return Retryable(views.sentence(short), code="budget_exhausted", retry_after_s=short.retry_after_s)
