"""The verdict in words. Pure; what it says follows from the reasons and figures alone."""

from decimal import Decimal

from aggregator.config import decimal
from aggregator.economics.inputs import MILLION
from aggregator.economics.verdict import HOSTS, Economics, Verdict
from aggregator.phrases import counted, millions

_SAID: dict[Verdict, str] = {"buy": "Buy", "marginal": "Marginal", "do_not_buy": "Do not buy"}
_NAMES = {
    "api_spend": "API work",
    "node_tok_s": "speed of a node",
    "price_per_m": "API price per million tokens",
    "kept": "share that moves",
    "duty": "mean load as a share of the busiest",
    "electricity_per_kwh": "price per kWh",
    "people_per_month": "staff",
    "other_per_month": "other costs per node",
}


def named(figure: str) -> str:
    """A figure's name in words."""
    return _NAMES.get(figure, figure.replace("_", " "))


def verdict(report: Economics) -> str:
    """The sentences at the top: the verdict and why, what the nodes carry, what it hinges on."""
    said = _SAID[report.verdict]
    if report.reasons[0] == "does_not_fit":
        return f"{said}. {_does_not_fit(report)}."
    if report.reasons[0] == "nothing_to_save":
        return f"{said}. No cost of an API would move to the nodes."
    why = [_payback(report), _hosts(report)]
    if report.reasons[0] in HOSTS:
        why.reverse()
    parts = [*(f"{part[:1].upper()}{part[1:]}." for part in why if part), _carried(report), _fragile(report)]
    return f"{said}. {' '.join(part for part in parts if part)}"


def rule(report: Economics) -> str:
    """The nearest rule of thumb beside this purchase; "" where none is near."""
    if report.nearest_rule is None:
        return ""
    near, figures = report.rules[report.nearest_rule], report.figures
    within = "or more break even at once" if near.months == 1 else f"break even within {near.months} months"
    ours = f"in month {report.break_even}" if report.break_even else f"not within {_horizon(report)}"
    return (
        f"The nearest rule of thumb: at {near.api_spend:,.0f} a month, {near.nodes} nodes {within}. Asked for: "
        f"{figures.api_spend:,.0f} a month and {counted(figures.nodes, 'node')}; break-even: {ours}."
    )


def _money(report: Economics, value: Decimal) -> str:
    """1,234 USD, with cents below a hundred."""
    return f"{value:,.{2 if abs(value) < 100 else 0}f} {report.currency}"


def _horizon(report: Economics) -> str:
    return counted(report.figures.months, "month")


def _does_not_fit(report: Economics) -> str:
    need, budget = report.load.need_bytes / 1e9, report.load.budget_bytes / 1e9
    return (
        f"The model ({report.model.name}, {report.model.bits:g} bits per weight) needs {need:.1f} GB, and a node with "
        f"{report.node.memory_gb:g} GB of memory has {budget:.1f} GB for models"
    )


def _payback(report: Economics) -> str:
    one, nodes = report.figures.nodes == 1, counted(report.figures.nodes, "node")
    balance, breaks = _money(report, report.total_saving), f"{nodes} {'breaks' if one else 'break'} even in month"
    if report.break_even is None:
        pays = "does not pay for itself" if one else "do not pay for themselves"
        return f"{nodes} {pays} within {_horizon(report)}; balance after them: {balance}"
    if report.total_saving < 0:
        return f"{breaks} {report.break_even}, but after {_horizon(report)} the balance is negative again: {balance}"
    return f"{breaks} {report.break_even}; saved after {_horizon(report)}: {balance}"


def _hosts(report: Economics) -> str:
    found = report.alike
    if found is None or not {*HOSTS} & {*report.reasons}:
        return ""
    running = "hosts_below_running" in report.reasons
    rack = f"running the rack {_money(report, found.running)}" if running else f"the rack {_money(report, found.total)}"
    return (
        f"the same tokens with {report.same_as} at API hosts cost {_money(report, found.hosts)} over "
        f"{_horizon(report)}, {rack}"
    ) + (": what is saved comes from using another model, not from the nodes" if report.total_saving > 0 else "")


def _carried(report: Economics) -> str:
    load, nodes = report.load, counted(report.figures.nodes, "node")
    if load.moved_tok < load.wanted_tok:
        worth = decimal(load.moved_tok) * decimal(report.figures.price_per_m) / decimal(MILLION)
        return (
            f"{nodes} can carry {millions(load.moved_tok)} of the {millions(load.wanted_tok)} tokens a month that are "
            f"to move (API cost: {_money(report, worth)}); the rest stays at the API, all of it would need "
            f"{load.nodes_needed or 0:,} nodes."
        )
    over = next((one.month for one in report.months if one.moved_tok < one.wanted_tok), None)
    if over is not None:
        return f"From month {over} on more is to move than {nodes} can carry; the rest stays at the API."
    if load.nodes_needed is not None and load.nodes_needed < report.figures.nodes:
        return f"{counted(load.nodes_needed, 'node')} would carry the work."
    return ""


def _fragile(report: Economics) -> str:
    most = report.hinges[0]
    if "fragile" in report.reasons:
        names = ", ".join(named(one.name) for one in report.hinges if None in (one.lower, one.higher))
        return f"It does not pay back within {_horizon(report)} if one of these is a fifth worse: {names}."
    if not most.swing:
        return "A change of any figure by a fifth does not move it."
    return f"Most sensitive to {named(most.name)}."
