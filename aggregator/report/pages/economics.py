"""The page of a purchase. Pure."""

from aggregator.calendar import counted
from aggregator.economics import Economics
from aggregator.report.page import Curve, Page, Section, page_of, table
from aggregator.report.wording import money, share


def page(report: Economics, currency: str) -> Page:
    """Whether to buy."""
    return page_of(
        f"Buying {counted(report.inputs.nodes, 'node')}",
        report.sentence,
        [_curve(report, currency), _hinges(report), _months(report, currency)],
    )


def _curve(report: Economics, currency: str) -> Section:
    balance = (-float(report.paid), *(float(m.balance) for m in report.months))
    text = (
        f"Paid at the start: {money(report.paid, currency)}; running cost of the rack: "
        f"{money(report.running, currency)} a month. {share(report.inputs.kept)} of the API work moves to it. "
        f"What the nodes are worth at the end ({money(report.worth_at_end, currency)}) is not counted."
    )
    curve = Curve(
        title="Saved less paid",
        labels=("the start", *(f"month {m.month}" for m in report.months)),
        lines=(("balance", balance),),
        unit=currency,
    )
    return Section(title="The curve", text=(text, report.rule_of_thumb, *report.basis), curve=curve)


def _hinges(report: Economics) -> Section:
    rows = [
        (*(h.name.replace("_", " "), f"{h.value:,.6g}", _month(h.lower), _month(h.higher)), counted(h.swing, "month"))
        for h in report.hinges
    ]
    return Section(
        title="What it hinges on",
        text=("The break-even month if one figure were a fifth lower or higher and the others as they are.",),
        table=table("Figure | Yours | A fifth lower | A fifth higher | Moves it by", rows, (1, 2, 3, 4)),
    )


def _months(report: Economics, currency: str) -> Section:
    rows = [
        (str(m.month), *(money(value, currency) for value in (m.api_only, m.with_rack, m.balance)))
        for m in report.months
    ]
    columns = "Month | APIs alone | With the rack | Balance"
    return Section(title="Month by month", table=table(columns, rows, (0, 1, 2, 3)))


def _month(month: int | None) -> str:
    return "never" if month is None else f"month {month}"
