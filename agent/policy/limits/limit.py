"""What is limited: by whom, over which time, in which unit, and how much. Pure."""

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from typing import Literal, NamedTuple, get_args

from agent.policy.rates import Rate
from agent.policy.rules import KeyPolicy, Money, Provider, dollars

Span = Literal["minute", "day", "week", "month"]
"""A minute is any 60 seconds; the others are calendar periods in UTC, and a week begins on Monday."""
Unit = Literal["requests", "tokens", "prompt_tok", "completion_tok", "usd"]
PERIODS: tuple[Span, ...] = ("day", "week", "month")
_BUDGET_UNITS: tuple[Unit, ...] = ("requests", "prompt_tok", "completion_tok")
NANO = 10**9
"""Amounts of US dollars are counted in billionths, so that a single token has a whole price."""
_DAY_S = 86_400
_MONDAY = 3
"""Days from the Monday before 1970-01-01 to it."""


class Name(NamedTuple):
    """Which limit: ``owner`` is ``key:ID`` or ``provider:NAME``."""

    owner: str
    span: Span
    unit: Unit

    @property
    def short(self) -> str:
        """Like ``requests_per_minute`` or ``day.usd``, as the policy file names it."""
        return f"{self.unit}_per_minute" if self.span == "minute" else f"{self.span}.{self.unit}"


class Limit(NamedTuple):
    """A limit of the whole rack; ``most`` is a count, or billionths of a US dollar."""

    name: Name
    most: int


class Amounts(NamedTuple):
    """What a request uses, or may use at most; ``usd`` in billionths."""

    prompt_tok: int = 0
    completion_tok: int = 0
    usd: int = 0

    def of(self, unit: Unit) -> int:
        """The amount in a unit; a request is one request."""
        if unit == "requests":
            return 1
        if unit == "tokens":
            return self.prompt_tok + self.completion_tok
        return self.usd if unit == "usd" else self.prompt_tok if unit == "prompt_tok" else self.completion_tok


class Period(NamedTuple):
    """A calendar period in seconds since 1970; both 0 for a minute, which never ends."""

    start_s: int
    end_s: int


def key_owner(key_id: str) -> str:
    """The owner of a key's limits."""
    return f"key:{key_id}"


def provider_owner(name: str) -> str:
    """The owner of a provider's limits."""
    return f"provider:{name}"


def of_key(key: KeyPolicy, key_id: str) -> tuple[Limit, ...]:
    """A key's limits. Keys without an entry of their own have those of * each for itself."""
    owner = key_owner(key_id)
    minutes: dict[Unit, int] = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
    return (
        *(Limit(Name(owner, "minute", unit), most) for unit, most in minutes.items() if most),
        *(limit for span in PERIODS for limit in _of_period(owner, span, getattr(key, span))),
    )


def of_provider(provider: Provider) -> tuple[Limit, ...]:
    """What the rack may spend at a provider."""
    amounts: dict[Span, str] = {"day": provider.usd_per_day, "month": provider.usd_per_month}
    owner = provider_owner(provider.name)
    return tuple(
        Limit(Name(owner, span, "usd"), _most_usd(usd)) for span, text in amounts.items() if (usd := dollars(text))
    )


def nano(usd: Decimal) -> int:
    """An amount in billionths, rounded up."""
    return int((usd * NANO).to_integral_value(ROUND_CEILING))


def cost(rate: Rate | None, prompt_tok: int, completion_tok: int) -> int:
    """The price of these tokens in billionths of a US dollar, rounded up; 0 without a rate."""
    if rate is None:
        return 0
    per_million = rate.usd_per_mtok_in * prompt_tok + rate.usd_per_mtok_out * completion_tok
    return int((per_million * 1000).to_integral_value(ROUND_CEILING))


def period(span: Span, wall_s: float) -> Period:
    """The period that holds a moment."""
    if span == "minute":
        return Period(0, 0)
    if span == "month":
        now = datetime.fromtimestamp(wall_s, UTC)
        first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        later = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
        return Period(int(first.timestamp()), int(later.timestamp()))
    days = int(wall_s // _DAY_S)
    length = 1 if span == "day" else 7
    start = days if span == "day" else days - (days + _MONDAY) % 7
    return Period(start * _DAY_S, (start + length) * _DAY_S)


def parts(most: int, nodes: int) -> Iterator[int]:
    """What each of these nodes holds at first; the sum is ``most``."""
    return (most // nodes + (number < most % nodes) for number in range(nodes))


def _of_period(owner: str, span: Span, money: Money) -> Iterator[Limit]:
    for unit in _BUDGET_UNITS:
        if most := getattr(money, unit):
            yield Limit(Name(owner, span, unit), most)
    if usd := dollars(money.usd):
        yield Limit(Name(owner, span, "usd"), _most_usd(usd))


def _most_usd(usd: Decimal) -> int:
    # down: a limit is never exceeded by rounding
    return int(usd * NANO)


assert set(PERIODS) < set(get_args(Span))
