"""The page of a placement: what does not fit, the moves, nodes and models. Pure."""

from aggregator.heat import MOVE_SHARE, shown
from aggregator.packing import WHOLE
from aggregator.placement import PlacementReport
from aggregator.report.page import Page, Section, page_of, table
from aggregator.report.wording import count, gb, share, span

APPLY = "`mlxrack-aggregator apply` publishes them as the rack's desired state."
BY_HAND = (
    "Nothing is published: enter each node's models as [[models]] of its agent.toml. Once there is telemetry, weekly "
    "reports propose placements, which `mlxrack-aggregator apply` publishes."
)


def page(report: PlacementReport, rack: str, *, planned: bool = False) -> Page:
    """Which model on which node; what does not fit comes first. ``planned``: from an intake, before there is a
    rack."""
    remarks = (*report.notes, *(setting.reason for setting in report.settings))
    return page_of(
        f"Placement, rack {rack}, {report.period}",
        report.lead,
        [
            Section(title="What does not fit", points=report.short) if len(report.short) > 1 else None,
            _rebalance(report, planned),
            _moves(report, BY_HAND if planned else APPLY) if report.moves else None,
            Section(title="Settings and remarks", points=remarks) if remarks else None,
            _nodes(report),
            _models(report),
        ],
        "Load is the 95th percentile of five-minute windows, in the node's own time; busy is the mean, throttled a "
        "share of the time for which a node's thermal level is known. Moves are steps "
        "that can be carried out in this order: no node's memory is overdrawn and no model without a copy meanwhile. "
        "Busy and requests of a model are those of its name on that node, with all its versions.",
    )


def _rebalance(report: PlacementReport, planned: bool) -> Section | None:
    """Yes or no, and what else is to be done about models, from their conclusions."""
    if planned or not report.nodes:
        return None
    points = [f"{c.model}: {c.text}" for c in report.conclusions if c.kind not in ("fits", "none", "move")]
    verdict = "yes, see the moves" if report.rebalance else "no"
    text = f"Rebalance: {verdict}{'; without a move:' if points else '.'}"
    return Section(title="What to do", text=(text,), points=tuple(points))


def _nodes(report: PlacementReport) -> Section:
    rows = [
        (
            n.node,
            *map(gb, (n.budget_bytes, n.held_bytes, n.held_after_bytes)),
            f"{n.speed:.2f}",
            *map(share, (n.load, n.load_after, n.limit, n.busy_share)),
            shown(n.throttled_share, MOVE_SHARE),
        )
        for n in report.nodes
    ]
    columns = "Node | Model memory | Held | After | Speed | Load now | After | Limit | Busy | Throttled"
    proof = (_proof(report),) if report.gap is not None else ()
    return Section(title="Nodes", text=proof, table=table(columns, rows, range(1, 10)))


def _models(report: PlacementReport) -> Section:
    rows = [
        (
            *(", ".join((p.model, *p.names)), p.node, p.version[:8], gb(p.need_bytes)),
            *(share(p.busy_share), count(p.requests)),
            *(p.advice, p.reason),
        )
        for p in report.placed
    ]
    columns = "Model | Node | Version | Needs | Busy | Requests | Advice | Reason"
    return Section(title="Models", table=table(columns, rows, (3, 4, 5)))


def _moves(report: PlacementReport, how: str) -> Section:
    rows = [
        (
            str(m.step),
            f"{m.action} {m.model} on {m.node}" + (" for a while" if m.parked else ""),
            m.source or "",
            f"{m.gb:.1f} GB" if m.gb else "",
            span(m.load_s) if m.load_s is not None else "",
            f"{m.load_before:.0%} → {m.load_after:.0%}",
            f"{gb(m.free_before_bytes)} → {gb(m.free_after_bytes)}",
            *(m.bound, m.reason, m.declined),
        )
        for m in report.moves
    ]
    columns = "Step | Do | Instead of | Reads | About | Load of the node | Free there | Limit | Why | Declined"
    return Section(title="Moves, in this order", text=(how,), table=table(columns, rows, (0, 3, 4)))


def _proof(report: PlacementReport) -> str:
    which = "No placement" if len(report.nodes) <= WHOLE else "None of the placements that were looked at"
    return f"{which} is better by more than {max(report.gap or 0.0, 0.005):.1%} of its score: this is proven."
