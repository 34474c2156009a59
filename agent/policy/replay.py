"""Plays recorded decisions under another policy: what changes in places, cost and refusals. Pure.

What would have happened is inferred from what did: a request that the rack served would be served there again, unless
its places begin elsewhere now; one that overflowed would overflow to the first place that is now allowed, or else would
have waited for the rack. Nothing is known of how much longer others would have waited for it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import NamedTuple

import msgspec

from agent.policy.deciding import Allow, Category, Decision, Place, Redact, Refuse, decide
from agent.policy.facts import Facts
from agent.policy.rules import Provider, Rules, dollars

MOST_EXAMPLES = 3
PER_MTOK = Decimal(1_000_000)
DOLLAR_PARTS = Decimal("0.000001")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a request: ``category`` and ``provider`` that answered it ("" where none did), the ``model``
    there, ``refused`` its error code, if it had one. ``usd`` is what the answer cost, "" if nobody knows."""

    request_id: str = ""
    category: Category | None = None
    provider: str = ""
    model: str = ""
    refused: str = ""
    prompt_tok: int = 0
    completion_tok: int = 0
    usd: str = ""


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """Requests at one place and what they cost in US dollars; ``unpriced`` are those that nobody knows the price of."""

    place: str
    requests: int
    usd: str
    unpriced: int


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one key and class that would go elsewhere, or be refused: the most frequent first."""

    key_id: str
    task_class: str
    before: str
    after: str
    requests: int
    examples: tuple[str, ...]


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What another policy changes. Places are like "rack" or "outside openai", or "refused: CODE". ``may_leave`` counts
    requests that the policy lets leave, whether they did or not; ``newly`` are the keys and classes that it lets."""

    requests: int
    before: tuple[Spent, ...]
    after: tuple[Spent, ...]
    may_leave_before: int
    may_leave_after: int
    newly: tuple[Move, ...]
    moves: tuple[Move, ...]


class _Went(NamedTuple):
    """Where a request goes, and what it costs there; None where nobody knows."""

    where: str
    usd: Decimal | None


Price = Callable[[Place, Provider | None, int, int], Decimal | None]
"""US dollars for prompt and answer tokens at a place, with its provider, if it is one's; None where nobody knows."""


def stated_price(place: Place, target: Provider | None, prompt_tok: int, completion_tok: int) -> Decimal | None:
    """What the policy file itself says; the rack costs nothing more for one request."""
    if target is None:
        return Decimal(0)
    per_in, per_out = dollars(target.usd_per_mtok_in), dollars(target.usd_per_mtok_out)
    if per_in is None or per_out is None:
        return Decimal(0) if place.category == "premises" else None
    return (per_in * prompt_tok + per_out * completion_tok) / PER_MTOK


def replay(recorded: Iterable[tuple[Facts, Outcome]], old: Rules, new: Rules, price: Price = stated_price) -> Changes:
    """What ``new`` would have changed of what happened under ``old``."""
    before, after, moves, newly = _Tally(), _Tally(), _Groups(), _Groups()
    requests = may_leave_before = may_leave_after = 0
    for facts, outcome in recorded:
        first, then = decide(facts, old), decide(facts, new)
        was, would = _was(outcome, first), _would(outcome, then, new, price)
        before.add(was)
        after.add(would)
        requests += 1
        may_leave_before += isinstance(first, Redact)
        may_leave_after += isinstance(then, Redact)
        if isinstance(then, Redact) and not isinstance(first, Redact):
            newly.add(facts, _kind(first), _kind(then), outcome)
        if was.where != would.where:
            moves.add(facts, was.where, would.where, outcome)
    return Changes(
        requests=requests,
        before=before.listed(),
        after=after.listed(),
        may_leave_before=may_leave_before,
        may_leave_after=may_leave_after,
        newly=newly.listed(),
        moves=moves.listed(),
    )


def _was(outcome: Outcome, decided: Decision) -> _Went:
    """Where it was answered; of one that was not, why the policy refused it."""
    if outcome.category is None:
        code = decided.code if isinstance(decided, Refuse) else outcome.refused
        return _Went(f"refused: {code or 'unknown'}", Decimal(0))
    return _Went(_named(outcome.category, outcome.provider), _recorded(outcome))


def _would(outcome: Outcome, decided: Decision, rules: Rules, price: Price) -> _Went:
    """Where it would be answered. One that failed for another reason than the policy would fail again."""
    if isinstance(decided, Refuse):
        return _Went(f"refused: {decided.code}", Decimal(0))
    if outcome.category is None and outcome.refused not in POLICY_CODES:
        return _Went(f"refused: {outcome.refused or 'unknown'}", Decimal(0))
    place = _place(outcome, decided)
    where = _named(place.category, place.provider)
    if where == _named(outcome.category or "rack", outcome.provider) and outcome.category is not None:
        return _Went(where, _recorded(outcome))
    target = rules.by_provider.get(place.provider)
    return _Went(where, price(place, target, outcome.prompt_tok, outcome.completion_tok))


POLICY_CODES = frozenset({"key_expired", "class_not_allowed", "model_not_allowed", "no_route"})
"""Codes of ``decide``'s refusals."""


def _place(outcome: Outcome, decided: Allow | Redact) -> Place:
    """The place that it would come to: one that is asked at once, or, if it overflowed, the first after the rack."""
    first = decided.places[0]
    overflowed = outcome.category not in (None, "rack")
    if first.category == "rack" and overflowed:
        return next((one for one in decided.places if one.category != "rack"), first)
    return first


def _recorded(outcome: Outcome) -> Decimal | None:
    if outcome.usd:
        return Decimal(outcome.usd)
    return None if outcome.category == "outside" else Decimal(0)


def _named(category: str, provider: str) -> str:
    return f"{category} {provider}".rstrip()


def _kind(decided: Decision) -> str:
    if isinstance(decided, Refuse):
        return f"refused: {decided.code}"
    return "may leave" if isinstance(decided, Redact) else "stays on the premises"


class _Tally:
    """Requests, dollars and requests without a price, by place."""

    def __init__(self) -> None:
        self._by_place: defaultdict[str, tuple[int, Decimal, int]] = defaultdict(lambda: (0, Decimal(0), 0))

    def add(self, went: _Went) -> None:
        requests, usd, unpriced = self._by_place[went.where]
        self._by_place[went.where] = (requests + 1, usd + (went.usd or 0), unpriced + (went.usd is None))

    def listed(self) -> tuple[Spent, ...]:
        return tuple(
            Spent(place=where, requests=requests, usd=f"{usd.quantize(DOLLAR_PARTS).normalize():f}", unpriced=unpriced)
            for where, (requests, usd, unpriced) in sorted(self._by_place.items())
        )


class _Groups:
    """Requests that change, by key, class, before and after, with some ids of each."""

    def __init__(self) -> None:
        self._groups: defaultdict[tuple[str, str, str, str], tuple[int, tuple[str, ...]]]
        self._groups = defaultdict(lambda: (0, ()))

    def add(self, facts: Facts, before: str, after: str, outcome: Outcome) -> None:
        group = (facts.key_id, facts.task_class, before, after)
        count, examples = self._groups[group]
        more = (outcome.request_id,) if outcome.request_id and len(examples) < MOST_EXAMPLES else ()
        self._groups[group] = (count + 1, examples + more)

    def listed(self) -> tuple[Move, ...]:
        ordered = sorted(self._groups.items(), key=lambda one: (-one[1][0], one[0]))
        return tuple(
            Move(key_id=key, task_class=task_class, before=before, after=after, requests=count, examples=examples)
            for (key, task_class, before, after), (count, examples) in ordered
        )
