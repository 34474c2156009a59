"""The page of a purchase. Pure."""

from decimal import Decimal

from aggregator.economics import Economics, sentences
from aggregator.packing import CAP
from aggregator.phrases import counted, millions
from aggregator.report.page import Curve, Page, Section, page_of, table
from aggregator.report.wording import count, figure, gb, money, share

_MONEY = ("_spend", "_price", "_per_m", "_per_kwh", "_per_month", "setup")
_SHARES = ("kept", "cached", "duty", "residual", "growth")
_UNITS = {"memory": "GB", "watts": "W", "node_tok_s": "tokens/s", "kv_kib_per_tok": "KiB/token"}


def page(report: Economics) -> Page:
    """Whether to buy."""
    sections = [
        *(_carried(report), _alike(report), _curve(report), _hinges(report), _rules(report)),
        *(_assumed(report), _given(report), _months(report)),
    ]
    return page_of(f"Buying {counted(report.figures.nodes, 'node')}", report.sentence, sections)


def _carried(report: Economics) -> Section:
    load, figures = report.load, report.figures
    rows = [
        ("Tokens a month that are to move", millions(load.wanted_tok)),
        ("Tokens a month that the nodes can carry", millions(load.capacity_tok)),
        ("Tokens a month that move", millions(load.moved_tok)),
        ("Nodes that all of it needs", count(load.nodes_needed)),
        ("Mean busy share of the nodes", share(load.busy)),
        ("The most that is realistic", share(load.most_busy)),
        ("Busy share at which they have paid at the end of the horizon", _busy(load.break_even_busy)),
        (f"Memory that the model needs, of {gb(load.budget_bytes)}", gb(load.need_bytes)),
    ]
    text = (
        f"A node ({report.node.chip}, {report.node.memory_gb:g} GB) with a model of class {report.model.name} computes "
        f"{figure(figures.node_tok_s)} tokens a second of work, {share(report.work.prompt, 0)} of them of prompts. "
        f"In the busiest five minutes it may be busy for {share(CAP, 0)}; the mean is {share(figures.duty, 0)} of that."
    )
    return Section(title="What the nodes can carry", text=(text,), table=table("First month | Value", rows, (1,)))


def _busy(value: float | None) -> str:
    if value is None:
        return "none"
    return f"none ({share(value, 0)} would be needed)" if value > 1 else share(value)


def _alike(report: Economics) -> Section:
    title, found, currency = "Like for like", report.alike, report.currency
    if found is None:
        text = "Not compared with the same open model at API hosts; `--same-as` names it, as hosts do."
        return Section(title=title, text=(text,))
    text = (
        f"{report.same_as} at API hosts ({money(Decimal(str(found.per_m)), currency)} per million tokens at the host "
        "in the middle, at this mix), for the tokens that move, over the horizon."
    )
    rows = [
        ("At API hosts", money(found.hosts, currency)),
        ("Running the rack", money(found.running, currency)),
        ("The rack with what is paid at the start", money(found.total, currency)),
        ("Busy share from which the rack costs less", _busy(found.below_busy)),
    ]
    return Section(title=title, text=(text,), table=table("Cost | Value", rows, (1,)))


def _curve(report: Economics) -> Section:
    currency, even = report.currency, report.break_even
    balance = (-float(report.paid), *(float(m.balance) for m in report.months))
    text = (
        f"Paid at the start: {money(report.paid, currency)}; running cost of the rack: "
        f"{money(report.running, currency)} a month. {share(report.figures.kept)} of the API work is to move to it. "
        f"What the nodes are worth at the end ({money(report.worth_at_end, currency)}) is not counted."
    )
    curve = Curve(
        title="Saved less paid",
        labels=("the start", *(f"month {m.month}" for m in report.months)),
        lines=(("balance", balance),),
        unit=currency,
        mark=even,
        mark_text=f"break-even: month {even}" if even else "",
    )
    return Section(title="The curve", text=(text,), curve=curve)


def _hinges(report: Economics) -> Section:
    rows = [
        (
            *(sentences.named(h.name), _value(h.name, h.value, report.currency), _month(h.lower), _month(h.higher)),
            counted(h.swing, "month"),
        )
        for h in report.hinges
        if h.value
    ]
    return Section(
        title="What it hinges on",
        text=("The break-even month if one figure were a fifth lower or higher and the others as they are.",),
        table=table("Figure | Value | A fifth lower | A fifth higher | Moves it by", rows, (1, 2, 3, 4)),
    )


def _rules(report: Economics) -> Section | None:
    if not report.rules:
        return None
    currency = report.currency
    rows = [
        (
            f"{r.api_spend:,.0f} {currency}, {r.nodes} nodes, month {r.months}",
            *(_staff(r.people_per_month, currency), millions(r.wanted_tok), millions(r.capacity_tok)),
            *(count(r.nodes_needed), _staff(r.people_within_capacity, currency)),
        )
        for r in report.rules
    ]
    told = "; ".join(
        f"month {r.month} at {r.api_spend:,.0f} with {money(r.people_per_month, currency)} a month for staff"
        for r in report.rules
        if r.people_per_month is not None
    )
    short = [f"{r.api_spend:,.0f}" for r in report.rules if r.wanted_tok > r.capacity_tok]
    text = [report.rule_of_thumb] if report.rule_of_thumb else []
    text += [f"If the nodes carried everything, the rules of thumb come out with this staff: {told}."] if told else []
    if short:
        text.append(f"At this price, model and node they cannot carry what is to move at {', '.join(short)} a month.")
    columns = "Rule | Staff a month that makes it true | Tokens | Its nodes carry | It needs | Staff within that"
    return Section(title="Rules of thumb", text=tuple(text), table=table(columns, rows, (1, 2, 3, 4, 5)))


def _staff(value: Decimal | None, currency: str) -> str:
    return "not even with none" if value is None else money(value, currency)


def _assumed(report: Economics) -> Section:
    rows = [(_option(a.name), _value(a.name, a.value, report.currency), a.source) for a in report.assumptions]
    text = ("Nobody gave these; the option replaces them.",) if rows else ("Nothing: every figure was given.",)
    return Section(title="Assumed", text=text, table=table("Option | Assumed | Source", rows, (1,)) if rows else None)


def _given(report: Economics) -> Section:
    given = {name: getattr(report.inputs, name) for name in report.inputs.__struct_fields__}
    rows = [(_option(n), _value(n, v, report.currency)) for n, v in given.items() if v is not None]
    return Section(title="Given", table=table("Option | Value", rows, (1,)))


def _months(report: Economics) -> Section:
    rows = [
        (
            *(str(m.month), millions(m.moved_tok)),
            *(money(value, report.currency) for value in (m.api_only, m.with_rack, m.balance)),
        )
        for m in report.months
    ]
    columns = "Month | Tokens on the rack | APIs alone | With the rack | Balance"
    return Section(title="Month by month", table=table(columns, rows, (0, 1, 2, 3, 4)))


def _option(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"


def _value(name: str, value: float | str, currency: str) -> str:
    """A figure with its unit."""
    if isinstance(value, str):
        return value
    if name == "tokens":
        return millions(value)
    if name == "months":
        return counted(int(value), "month")
    if name.endswith(_MONEY):
        return money(Decimal(str(value)), currency)
    return share(value) if name in _SHARES else f"{figure(value)} {_UNITS.get(name, '')}".strip()


def _month(month: int | None) -> str:
    return "never" if month is None else f"month {month}"
