"""Whether to buy, as a verdict with its reasons; beside it the nodes' work, like for like, the rules of thumb. Pure."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

import msgspec

from aggregator.config import decimal
from aggregator.economics import curve
from aggregator.economics.curve import Hinge, Month, cents, paid, running
from aggregator.economics.inputs import MILLION, Figures, Settled
from aggregator.packing import CAP

RULES = ((5_000, 2, 12), (15_000, 4, 6), (50_000, 8, 1))
"""The rules of thumb: API spend in USD per month, nodes (the last: or more), months to break-even (1: at once)."""
Verdict = Literal["buy", "marginal", "do_not_buy"]
Reason = Literal[
    "does_not_fit",
    "nothing_to_save",
    "never_pays_back",
    "lost_again",
    "hosts_below_running",
    "hosts_below_total",
    "fragile",
    "pays_back",
]
MARGINAL: tuple[Reason, ...] = ("hosts_below_total", "fragile")
HOSTS: tuple[Reason, ...] = ("hosts_below_running", "hosts_below_total")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes' work in the first month, in tokens: to move, what they can carry, carried; ``nodes_needed`` for all of
    it. ``busy`` is their mean busy share, ``most_busy`` the most that is realistic, ``break_even_busy`` the constant
    share at which they have paid for themselves at the end of the horizon: above 1 where none can, None where nothing
    is saved. ``need_bytes`` is the memory that the model needs of a node's ``budget_bytes``."""

    wanted_tok: float
    capacity_tok: float
    moved_tok: float
    nodes_needed: int | None
    busy: float
    most_busy: float
    break_even_busy: float | None
    need_bytes: int
    budget_bytes: int


class Alike(msgspec.Struct, frozen=True, kw_only=True):
    """Like for like: the tokens that move, over the horizon, as the same open model at the median API host (``hosts``);
    the rack's running cost, and its cost with what is paid at the start. ``below_busy`` is the constant busy share from
    which the rack costs less than the hosts, as ``break_even_busy``."""

    per_m: float
    hosts: Decimal
    running: Decimal
    total: Decimal
    below_busy: float | None


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule of thumb at the price, model, mix, node and share to move of this purchase. ``wanted_tok`` is what it
    moves in a month, ``capacity_tok`` what its nodes can carry, ``nodes_needed`` how many nodes it would take.
    ``people_per_month`` is the cost of staff that makes its month come out (``month``) if the nodes carried everything;
    ``people_within_capacity`` that with what they can carry. None where it does not come out even without staff."""

    api_spend: float
    nodes: int
    months: int
    wanted_tok: float
    capacity_tok: float
    nodes_needed: int | None
    people_per_month: Decimal | None
    month: int | None
    people_within_capacity: Decimal | None


class Economics(Settled, frozen=True, kw_only=True):
    """The result. ``verdict`` follows from the first of ``reasons``, ``sentence`` from all. ``break_even`` is the month
    (1 is the first) in which buying has paid for itself; ``nearest_rule`` the index in ``rules``."""

    verdict: Verdict
    reasons: tuple[Reason, ...]
    load: Load
    alike: Alike | None
    paid: Decimal
    running: Decimal
    break_even: int | None
    months: tuple[Month, ...]
    total_saving: Decimal
    worth_at_end: Decimal
    hinges: tuple[Hinge, ...]
    rules: tuple[Rule, ...]
    nearest_rule: int | None
    sentence: str = ""
    rule_of_thumb: str = ""


def concluded(settled: Settled) -> Economics:
    """Everything but the sentences. Raises Refused where amounts overflow."""
    figures = settled.figures
    months = curve.months(figures)
    even = curve.break_even(months)
    hinges, alike = curve.hinges(figures, even), _alike(figures, months)
    holds = reasons(figures, months, hinges, alike)
    rules = _rules(figures, settled.usd_rate)
    return Economics(
        **{name: getattr(settled, name) for name in Settled.__struct_fields__},
        verdict="buy" if holds[0] == "pays_back" else "marginal" if holds[0] in MARGINAL else "do_not_buy",
        reasons=holds,
        load=_load(settled, months[0]),
        alike=alike,
        paid=cents(paid(figures)),
        running=cents(running(figures)),
        break_even=even,
        months=tuple(months),
        total_saving=months[-1].balance,
        worth_at_end=cents(decimal(figures.node_price) * figures.nodes * decimal(figures.residual)),
        hinges=tuple(hinges),
        rules=rules,
        nearest_rule=_nearest(rules, figures.api_spend),
    )


def reasons(
    figures: Figures, months: Sequence[Month], hinges: Sequence[Hinge], alike: Alike | None
) -> tuple[Reason, ...]:
    """Every reason that holds, the one that decides first."""
    even = curve.break_even(months)
    if not figures.node_tok_s:
        return ("does_not_fit",)
    if all(one.moved_tok == 0 for one in months) or not figures.price_per_m:
        return ("nothing_to_save",)
    holds: dict[Reason, bool] = {
        "never_pays_back": even is None,
        "lost_again": even is not None and months[-1].balance < 0,
        "hosts_below_running": alike is not None and alike.hosts < alike.running,
        "hosts_below_total": alike is not None and alike.running <= alike.hosts < alike.total,
        "fragile": even is not None and any(None in (one.lower, one.higher) for one in hinges),
    }
    return tuple(name for name, true in holds.items() if true) or ("pays_back",)


def _load(settled: Settled, first: Month) -> Load:
    figures = settled.figures
    return Load(
        wanted_tok=first.wanted_tok,
        capacity_tok=float(round(figures.capacity_tok)),
        moved_tok=first.moved_tok,
        nodes_needed=_nodes_for(first.wanted_tok, figures),
        busy=first.moved_tok / figures.full_tok if figures.full_tok else 0.0,
        most_busy=CAP * figures.duty,
        break_even_busy=_busy(figures, figures.price_per_m),
        need_bytes=settled.model.need_bytes,
        budget_bytes=settled.node.budget_bytes,
    )


def _alike(figures: Figures, months: Sequence[Month]) -> Alike | None:
    if figures.hosts_per_m is None:
        return None
    moved = sum((decimal(one.moved_tok) for one in months), Decimal(0))
    monthly = running(figures) * figures.months
    return Alike(
        per_m=figures.hosts_per_m,
        hosts=cents(moved * decimal(figures.hosts_per_m) / decimal(MILLION)),
        running=cents(monthly),
        total=cents(monthly + paid(figures)),
        below_busy=_busy(figures, figures.hosts_per_m),
    )


def _busy(figures: Figures, per_m: float) -> float | None:
    """The constant busy share at which the rack's work costs the same elsewhere at this price for a million tokens."""
    if not per_m or not figures.full_tok:
        return None
    monthly = float(paid(figures)) / figures.months + float(running(figures))
    return monthly * MILLION / per_m / figures.full_tok


def _nodes_for(tokens: float, figures: Figures) -> int | None:
    """How many nodes carry so many tokens per month; None where one carries nothing."""
    one = figures.capacity_tok / figures.nodes
    return math.ceil(tokens / one - 1e-9) if one else None


def _rules(figures: Figures, rate: float | None) -> tuple[Rule, ...]:
    """Every rule; none without a price, or a rate of the currency."""
    if not rate or not figures.price_per_m:
        return ()
    return tuple(_rule(figures, float(decimal(spend) * decimal(rate)), nodes, month) for spend, nodes, month in RULES)


def _rule(figures: Figures, spend: float, nodes: int, month: int) -> Rule:
    tokens = spend / figures.price_per_m * MILLION
    ruled = msgspec.structs.replace(figures, api_spend=spend, tokens=tokens, nodes=nodes)
    free, within = (curve.staff(ruled, month, capped=capped) for capped in (False, True))
    return Rule(
        api_spend=spend,
        nodes=nodes,
        months=month,
        wanted_tok=float(round(tokens * ruled.kept)),
        capacity_tok=float(round(ruled.capacity_tok)),
        nodes_needed=_nodes_for(tokens * ruled.kept, ruled),
        people_per_month=free[0] if free else None,
        month=free[1] if free else None,
        people_within_capacity=within[0] if within else None,
    )


def _nearest(rules: Sequence[Rule], api_spend: float) -> int | None:
    """The index of the rule whose spend is nearest in proportion; None for no spend."""
    if not api_spend or not rules:
        return None
    return min(range(len(rules)), key=lambda n: abs(math.log(rules[n].api_spend / api_spend)))
