"""Whether to buy: current API cost against the cost of nodes, month by month. Pure.

Break-even is the month in which cumulative savings reach the initial payment. Money is Decimal; the running cost of a
node is power, other costs and, if given, staff. Hardware is paid at the start; its residual value is reported, not
counted.
"""

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation

import msgspec

from aggregator.calendar import counted
from aggregator.config import decimal
from shared import chips
from shared.errors import Refused

MONTH_H = Decimal("730.5")
RULES = ((5_000, 2, 12), (15_000, 4, 6), (50_000, 8, None))
"""The rule of thumb: API spend per month, nodes, months to break-even (None: immediately)."""
SENSITIVITY = Decimal("0.2")
_CENT = Decimal("0.01")


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """The customer's figures. ``kept`` is the share of the API work that the rack takes over; ``growth`` the monthly
    growth of the API spend without it."""

    api_spend: float
    nodes: int
    node_price: float = 2_000.0
    setup: float = 0.0
    watts: float = 60.0
    electricity_per_kwh: float = 0.15
    other_per_month: float = 0.0
    people_per_month: float = 0.0
    kept: float = 0.8
    growth: float = 0.0
    residual: float = 0.2
    months: int = 36


class Month(msgspec.Struct, frozen=True, kw_only=True):
    """One month: cost with APIs only, cost of the rack and the remaining API work, and cumulative savings minus the
    initial payment."""

    month: int
    api_only: Decimal
    with_rack: Decimal
    balance: Decimal


class Hinge(msgspec.Struct, frozen=True, kw_only=True):
    """Sensitivity of an input: break-even month at 20 % lower and higher; None is beyond the horizon."""

    name: str
    value: float
    lower: int | None
    higher: int | None
    swing: int


class Economics(msgspec.Struct, frozen=True, kw_only=True):
    """The result. ``break_even`` is the month (1 is the first) in which buying has paid for itself."""

    inputs: Inputs
    paid: Decimal
    running: Decimal
    break_even: int | None
    months: tuple[Month, ...]
    total_saving: Decimal
    worth_at_end: Decimal
    hinges: tuple[Hinge, ...]
    rule_of_thumb: str
    sentence: str
    basis: tuple[str, ...] = ()
    """Where price and watts come from, if from the chip table."""


def bought(name: str, memory_gb: float) -> tuple[float | None, float | None, tuple[str, ...]]:
    """List price and watts at full work of the mini or Studio with a chip and so much memory, each None without a
    public figure; and what is said of both. Raises Refused for a chip that the table does not know, or no such Mac."""
    chip = chips.find(name)
    if chip is None:
        raise Refused(f"economics: {chips.unknown(name)}; give node-price and watts instead of chip")
    mac = chips.desktop(chip)
    if mac is None:
        raise Refused(f"economics: no mini or Studio has {chip.name}; give node-price and watts instead of chip")
    if memory_gb not in mac.memory_gb:
        held = ", ".join(map(str, mac.memory_gb))
        raise Refused(f"economics: a {mac.name} with {chip.name} has {held} GB; give one of them as memory")
    price, told = chips.price(mac, memory_gb)
    return price, mac.busy_w, (told, chips.power(mac))


def check(inputs: Inputs) -> None:
    """Raises Refused for invalid figures."""
    if not all(math.isfinite(getattr(inputs, name)) for name in inputs.__struct_fields__):
        raise Refused("economics: every figure must be a finite number")
    problems = [
        (inputs.api_spend < 0, "api-spend: must not be below zero"),
        (inputs.nodes < 1, "nodes: must be at least 1"),
        (not 1 <= inputs.months <= 240, "months: must be from 1 to 240"),
        (not 0 <= inputs.kept <= 1, "kept: must be a share from 0 to 1"),
        (not -0.5 <= inputs.growth <= 1, "growth: must be a monthly rate from -0.5 to 1"),
        (not 0 <= inputs.residual <= 1, "residual: must be a share from 0 to 1"),
        (
            min(
                *(inputs.node_price, inputs.setup, inputs.watts, inputs.electricity_per_kwh),
                *(inputs.other_per_month, inputs.people_per_month),
            )
            < 0,
            "prices, costs and watts must not be below zero",
        ),
    ]
    if found := [text for wrong, text in problems if wrong]:
        raise Refused("economics: " + "; ".join(found))


def judge(inputs: Inputs, basis: tuple[str, ...] = ()) -> Economics:
    """Break-even, the cumulative curve and its sensitivity; ``basis`` says where the figures come from. Raises
    Refused."""
    check(inputs)
    try:
        months, paid, running = _curve(inputs)
    except InvalidOperation:
        raise Refused("economics: the amounts overflow; reduce growth or months") from None
    even = _break_even(months)
    hinges = sorted((_hinge(inputs, name, even) for name in _MOVABLE), key=lambda h: (-h.swing, h.name))
    return Economics(
        inputs=inputs,
        paid=paid,
        running=running,
        break_even=even,
        months=tuple(months),
        total_saving=months[-1].balance,
        worth_at_end=_cents(decimal(inputs.node_price) * inputs.nodes * decimal(inputs.residual)),
        hinges=tuple(hinges),
        rule_of_thumb=_rule(inputs, even),
        sentence=_sentence(inputs, even, months[-1].balance, hinges),
        basis=basis,
    )


_MOVABLE = (
    *("api_spend", "kept", "node_price", "nodes", "people_per_month", "other_per_month", "watts"),
    *("electricity_per_kwh", "setup"),
)


def _curve(inputs: Inputs) -> tuple[list[Month], Decimal, Decimal]:
    paid = decimal(inputs.node_price) * inputs.nodes + decimal(inputs.setup)
    power = decimal(inputs.watts) / 1000 * MONTH_H * decimal(inputs.electricity_per_kwh) * inputs.nodes
    running = power + decimal(inputs.other_per_month) * inputs.nodes + decimal(inputs.people_per_month)
    balance, spend, found = -paid, decimal(inputs.api_spend), []
    for number in range(1, inputs.months + 1):
        with_rack = spend * (1 - decimal(inputs.kept)) + running
        balance += spend - with_rack
        found.append(Month(month=number, api_only=_cents(spend), with_rack=_cents(with_rack), balance=_cents(balance)))
        spend *= 1 + decimal(inputs.growth)
    return found, _cents(paid), _cents(running)


def _break_even(months: Sequence[Month]) -> int | None:
    return next((one.month for one in months if one.balance >= 0), None)


def _hinge(inputs: Inputs, name: str, even: int | None) -> Hinge:
    value = getattr(inputs, name)
    found: list[int | None] = []
    for factor in (1 - SENSITIVITY, 1 + SENSITIVITY):
        other = float(decimal(value) * factor)
        if name == "nodes":
            other = max(1, round(other)) if round(other) != value else max(1, value + (1 if factor > 1 else -1))
        if name == "kept":
            other = min(1.0, other)
        changed = msgspec.structs.replace(inputs, **{name: other})
        found.append(_break_even(_curve(changed)[0]))
    beyond = inputs.months + 1
    swing = max(abs((m or beyond) - (even or beyond)) for m in found)
    return Hinge(name=name, value=float(value), lower=found[0], higher=found[1], swing=swing)


def _rule(inputs: Inputs, even: int | None) -> str:
    below = [rule for rule in RULES if rule[0] <= inputs.api_spend]
    above = [rule for rule in RULES if rule[0] >= inputs.api_spend]
    near = dict.fromkeys((*below[-1:], *above[:1]))
    said = "; ".join(
        f"at {spend:,} a month, {counted(nodes, 'node')} break even {_when(months)}" for spend, nodes, months in near
    )
    ours = f"in month {even}" if even else f"not within {inputs.months} months"
    return f"Rules of thumb: {said}. Yours, at {inputs.api_spend:,.0f} a month with {inputs.nodes} nodes: {ours}."


def _sentence(inputs: Inputs, even: int | None, balance: Decimal, hinges: Sequence[Hinge]) -> str:
    most = hinges[0]
    names = most.name.replace("_", " ")
    hinge = f" Most sensitive to {names}." if most.swing else " A change of any figure by 20 % does not move it."
    if even is None:
        return (
            f"{inputs.nodes} nodes do not pay for themselves within {inputs.months} months; balance after them: "
            f"{balance:,.0f}.{hinge}"
        )
    if balance < 0:
        return (
            f"{inputs.nodes} nodes break even in month {even}, but after {inputs.months} months the balance is "
            f"negative again: {balance:,.0f}.{hinge}"
        )
    return (
        f"{inputs.nodes} nodes break even in month {even}; cumulative savings after {inputs.months} months: "
        f"{balance:,.0f}.{hinge}"
    )


def _cents(value: Decimal) -> Decimal:
    return value.quantize(_CENT, rounding=ROUND_HALF_EVEN)


def _when(months: int | None) -> str:
    return f"within {counted(months, 'month')}" if months else "immediately"
