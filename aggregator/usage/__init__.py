"""Usage per client key and task class: the rack's work for it, its part of the rack's time and cost, what was refused,
and what other places answered. Pure.

A key's part of a served name's time is its part of the prefill time, by uncached prompt tokens, and of the decode time,
by answer tokens (`aggregator.allocation`). What was answered elsewhere has no part of it: it is counted and paid for
apart, at the place that answered.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import TypeVar

import msgspec

from aggregator.allocation import Sum, Work, divided, in_s
from aggregator.window import ElsewhereSum, RequestSum, ServedSum, Window

R = TypeVar("R", bound=RequestSum)
User = tuple[str, str]
"""The id of a client's key and a task class; either may be ""."""
_REFUSED = ("capacity", "limit", "request")


class KeyUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of one API key and task class had. ``requests`` are those that the rack answered, tokens its
    own, of all outcomes; ``busy_share`` is of the time that all loaders worked, ``cost`` with idle time. Failed,
    cancelled and refused requests are counted wherever they were sent; a refusal without a known reason is ``unsaid``.
    ``premises_requests`` and ``outside_requests`` were sent to other places, with any outcome; ``provider_usd`` is what
    these charge."""

    key_id: str
    task_class: str = ""
    requests: int = 0
    prompt_tok: int = 0
    cached_tok: int = 0
    completion_tok: int = 0
    busy_s: float = 0.0
    busy_share: float | None = None
    cost: Decimal | None = None
    failed: int = 0
    cancelled: int = 0
    refused_capacity: int = 0
    refused_limit: int = 0
    refused_request: int = 0
    refused_unsaid: int = 0
    premises_requests: int = 0
    outside_requests: int = 0
    provider_usd: Decimal = Decimal(0)

    @property
    def refused(self) -> int:
        """For any reason."""
        return self.refused_capacity + self.refused_limit + self.refused_request + self.refused_unsaid


class PlaceUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What one place besides the rack had of one key and class: ``requests`` of all outcomes, ``answered`` of them, its
    own token counts, and what it charges in US dollars. ``category`` is premises or outside."""

    place: str
    category: str
    key_id: str
    task_class: str
    requests: int
    answered: int
    prompt_tok: int
    cached_tok: int
    completion_tok: int
    usd: Decimal


def of_keys(
    window: Window, loaded: Mapping[str, Decimal | None], sums: Mapping[str, Sum], priced: set[str]
) -> tuple[KeyUsage, ...]:
    """Every key and class; ``loaded`` and ``sums`` are cost and work by served name, ``priced`` the nodes with a price.
    Parts of money and of time add up."""
    busy, money = dict[User, Fraction](), dict[User, Decimal]()
    everywhere, paid = _work(window.served), _work(one for one in window.served if one.worker in priced)
    for name, total in sums.items():
        for user, us in _times(everywhere.get(name, {}), total.whole).items():
            busy[user] = busy.get(user, Fraction(0)) + us
        for user, part in divided(loaded.get(name), _times(paid.get(name, {}), total.priced)).items():
            money[user] = money.get(user, Decimal(0)) + part
    whole_us = sum(one.busy_us for one in window.engines)
    here, away = _by_user(window.served), _by_user(window.elsewhere)
    return tuple(
        msgspec.structs.replace(
            _counted(user, here.get(user, ()), away.get(user, ())),
            busy_s=in_s(busy.get(user, Fraction(0))),
            busy_share=float(busy.get(user, Fraction(0)) / whole_us) if whole_us else None,
            cost=money.get(user),
        )
        for user in sorted({*here, *away})
    )


def of_places(window: Window) -> tuple[PlaceUsage, ...]:
    """Every place besides the rack, by key and class."""
    found: dict[tuple[str, str, str, str], list[ElsewhereSum]] = {}
    for one in window.elsewhere:
        category = "outside" if one.outside else "premises"
        found.setdefault((one.place, category, one.key_id, one.task_class), []).append(one)
    return tuple(_place(at, mine) for at, mine in sorted(found.items()))


def _user(one: RequestSum) -> User:
    return one.key_id, one.task_class


def _by_user(rows: Iterable[R]) -> dict[User, list[R]]:
    found: dict[User, list[R]] = {}
    for one in rows:
        found.setdefault(_user(one), []).append(one)
    return found


def _place(at: tuple[str, str, str, str], mine: Sequence[ElsewhereSum]) -> PlaceUsage:
    place, category, key_id, task_class = at
    return PlaceUsage(
        place=place,
        category=category,
        key_id=key_id,
        task_class=task_class,
        requests=sum(one.requests for one in mine),
        answered=sum(one.requests for one in mine if one.outcome == "ok"),
        prompt_tok=sum(one.prompt_tok for one in mine),
        cached_tok=sum(one.cached_tok for one in mine),
        completion_tok=sum(one.completion_tok for one in mine),
        usd=_usd(mine),
    )


def _usd(mine: Iterable[ElsewhereSum]) -> Decimal:
    return Decimal(sum(one.usd_micro for one in mine)).scaleb(-6)


def _counted(user: User, here: Sequence[ServedSum], away: Sequence[ElsewhereSum]) -> KeyUsage:
    """What is counted of a key and class, without its part of time and money."""
    both = (*here, *away)
    refused = dict.fromkeys((*_REFUSED, "unsaid"), 0)
    for one in both:
        if one.outcome == "refused":
            refused[one.finish if one.finish in _REFUSED else "unsaid"] += one.requests
    return KeyUsage(
        key_id=user[0],
        task_class=user[1],
        requests=sum(one.requests for one in here if one.outcome == "ok"),
        prompt_tok=sum(one.prompt_tok for one in here),
        cached_tok=sum(one.cached_tok for one in here),
        completion_tok=sum(one.completion_tok for one in here),
        failed=sum(one.requests for one in both if one.outcome == "failed"),
        cancelled=sum(one.requests for one in both if one.outcome == "cancelled"),
        refused_capacity=refused["capacity"],
        refused_limit=refused["limit"],
        refused_request=refused["request"],
        refused_unsaid=refused["unsaid"],
        premises_requests=sum(one.requests for one in away if not one.outside),
        outside_requests=sum(one.requests for one in away if one.outside),
        provider_usd=_usd(away),
    )


def _work(served: Iterable[ServedSum]) -> dict[str, dict[User, list[int]]]:
    """Uncached prompt tokens and answer tokens of each served name, by key and class."""
    found: dict[str, dict[User, list[int]]] = {}
    for one in served:
        mine = found.setdefault(one.model, {}).setdefault(_user(one), [0, 0])
        mine[0] += max(0, one.prompt_tok - one.cached_tok)
        mine[1] += one.completion_tok
    return found


def _times(work: Mapping[User, Sequence[int]], of: Work) -> dict[User, Fraction]:
    """The microseconds that each one's tokens took of one served name."""
    uncached, answer = (sum(tokens[kind] for tokens in work.values()) for kind in (0, 1))
    prefill, decode = of.prefill_us / max(1, uncached), of.decode_us / max(1, answer)
    return {user: prefill * tokens[0] + decode * tokens[1] for user, tokens in work.items()}
