"""Month by month: what the nodes take over of the API work, what is saved, when that has paid for them. Pure."""

from collections.abc import Sequence
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Decimal, InvalidOperation

import msgspec

from aggregator.config import decimal
from aggregator.economics.capacity import MONTH_H
from aggregator.economics.inputs import Figures
from shared.errors import Refused

SENSITIVITY = Decimal("0.2")
_CENT = Decimal("0.01")
_MOVABLE = (
    *("api_spend", "price_per_m", "kept", "duty", "node_tok_s", "nodes", "node_price", "people_per_month", "watts"),
    *("electricity_per_kwh", "other_per_month", "setup"),
)


class Month(msgspec.Struct, frozen=True, kw_only=True):
    """One month: cost with APIs only, cost of the rack and the remaining API work, and cumulative savings minus the
    initial payment; tokens that were to move, and those that the nodes carry."""

    month: int
    api_only: Decimal
    with_rack: Decimal
    balance: Decimal
    wanted_tok: float
    moved_tok: float


class Hinge(msgspec.Struct, frozen=True, kw_only=True):
    """Sensitivity of a figure: break-even month at 20 % lower and higher; None is beyond the horizon."""

    name: str
    value: float
    lower: int | None
    higher: int | None
    swing: int


def paid(figures: Figures) -> Decimal:
    """What is paid at the start."""
    return decimal(figures.node_price) * figures.nodes + decimal(figures.setup)


def running(figures: Figures) -> Decimal:
    """Cost of the rack per month: power, other costs, staff."""
    kwh = decimal(figures.watts) / 1000 * decimal(MONTH_H) * figures.nodes
    other = decimal(figures.other_per_month) * figures.nodes
    return kwh * decimal(figures.electricity_per_kwh) + other + decimal(figures.people_per_month)


def months(figures: Figures, *, capped: bool = True) -> list[Month]:
    """Every month of the horizon. What is to move beyond what the nodes can carry stays at the API, unless ``capped``
    is unset. Raises Refused where amounts overflow."""
    try:
        return _months(figures, capped)
    except (InvalidOperation, OverflowError):
        raise Refused("economics: the amounts overflow; reduce growth or months") from None


def _months(figures: Figures, capped: bool) -> list[Month]:
    monthly, balance, found = running(figures), -paid(figures), []
    spend, tokens, kept = decimal(figures.api_spend), decimal(figures.tokens), decimal(figures.kept)
    most = decimal(figures.capacity_tok)
    for number in range(1, figures.months + 1):
        share = min(kept, most / tokens) if capped and tokens else kept
        saved = spend * share - monthly
        balance += saved
        found.append(
            Month(
                month=number,
                api_only=cents(spend),
                with_rack=cents(spend - saved),
                balance=cents(balance),
                wanted_tok=float(round(tokens * kept)),
                moved_tok=float(round(tokens * share)),
            )
        )
        spend, tokens = spend * (1 + decimal(figures.growth)), tokens * (1 + decimal(figures.growth))
    return found


def break_even(found: Sequence[Month]) -> int | None:
    """The first month in which cumulative savings reach the initial payment."""
    return next((one.month for one in found if one.balance >= 0), None)


def hinges(figures: Figures, even: int | None) -> list[Hinge]:
    """Sensitivity of the break-even month ``even``, the most sensitive figure first."""
    return sorted((_hinge(figures, name, even) for name in _MOVABLE), key=lambda h: (-h.swing, h.name))


def _hinge(figures: Figures, name: str, even: int | None) -> Hinge:
    value = getattr(figures, name)
    found: list[int | None] = []
    for factor in (1 - SENSITIVITY, 1 + SENSITIVITY):
        other = float(decimal(value) * factor)
        if name == "nodes":
            other = max(1, round(other)) if round(other) != value else max(1, value + (1 if factor > 1 else -1))
        if name in ("kept", "duty"):
            other = min(1.0, other)
        found.append(break_even(months(_changed(figures, name, other, float(factor)))))
    beyond = figures.months + 1
    swing = max(abs((m or beyond) - (even or beyond)) for m in found)
    return Hinge(name=name, value=float(value), lower=found[0], higher=found[1], swing=swing)


def _changed(figures: Figures, name: str, value: float, factor: float) -> Figures:
    """With one figure changed. Another spend is other work at the same price, another price the same work."""
    also = {"api_spend": "tokens", "price_per_m": "api_spend"}.get(name)
    more = {also: getattr(figures, also) * factor} if also else {}
    return msgspec.structs.replace(figures, **{name: value}, **more)


def staff(figures: Figures, month: int, *, capped: bool) -> tuple[Decimal, int | None] | None:
    """The cost of staff per month at which the nodes break even in this month, and the month in which they then do;
    None if they do not even without staff."""
    alone = msgspec.structs.replace(figures, people_per_month=0.0, growth=0.0, months=month)
    left = months(alone, capped=capped)[-1].balance
    if left < 0:
        return None
    people = (left / month).quantize(_CENT, rounding=ROUND_FLOOR)
    with_staff = msgspec.structs.replace(alone, people_per_month=float(people))
    return people, break_even(months(with_staff, capped=capped))


def cents(value: Decimal) -> Decimal:
    """An amount as it is shown."""
    return value.quantize(_CENT, rounding=ROUND_HALF_EVEN)
