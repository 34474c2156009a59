"""The page of availability and incidents. Pure."""

from collections.abc import Sequence

from aggregator.calendar import counted, local
from aggregator.report.page import Page, Section, page_of, table
from aggregator.report.wording import NO_DATA, span
from aggregator.uptime import NodeUptime, Progress, Uptime


def page(report: Uptime, period: str, zone: str, rack: str, remarks: tuple[str, ...] = ()) -> Page:
    """When the rack and its nodes answered, and what went wrong. ``remarks`` are about telemetry that is missing."""
    nodes = [_row("the rack", report.rack), *(_row(n.node, n) for n in report.nodes)] if report.nodes else []
    columns = "Node | Serving | Without a model | Down | Excused | Unknown | Up"
    return page_of(
        f"Uptime, rack {rack}, {period}",
        _lead(report),
        [
            Section(title="Nodes", text=remarks, table=table(columns, nodes, (1, 2, 3, 4, 5, 6))),
            _desired(report.desired or (), zone),
            _incidents(report, zone),
        ],
        "Up is the time a node reported by the time it is known to have reported or to have been down, from its first "
        "report on. A gap that nothing explains is unknown and counts neither way; nor does time that an operator "
        "excused. Causes are guessed by rule until somebody confirms them in annotations/v1/incidents.toml. Times "
        f"are in {zone}.",
    )


def _lead(report: Uptime) -> str:
    rack = report.rack
    if rack.share is None:
        return "No node reported anything."
    known = rack.up_s + rack.idle_s + rack.down_s
    lead = f"The rack was up {rack.share:.3%} of the time that is known"
    if rack.idle_s > 0.001 * known:
        lead += f" (with a model ready {rack.up_s / known:.3%})"
    if report.request_share is not None:
        asked = counted(report.requests_ok + report.requests_bad, "request")
        lead += f" and answered {report.request_share:.3%} of {asked}"
    return lead + (f"; {span(rack.unknown_s)} are unknown." if rack.unknown_s >= 1 else ".")


def _row(name: str, n: NodeUptime) -> tuple[str, ...]:
    up = f"{n.share:.3%}" if n.share is not None else NO_DATA
    return (name, *map(span, (n.up_s, n.idle_s, n.down_s, n.excused_s, n.unknown_s)), up)


def _desired(nodes: Sequence[Progress], zone: str) -> Section | None:
    lines = []
    for n in nodes:
        line = (
            f"{n.node}: desired state: generation {n.generation}, {n.state} since {local(n.since_ms, zone):%d %b %H:%M}"
        )
        if n.not_converged:
            line += f"; not converged in {counted(n.not_converged, 'window')}"
        lines.append(f"{line}, last because: {n.reason}" if n.reason else line)
    return Section(title="Desired state", points=tuple(lines)) if lines else None


def _incidents(report: Uptime, zone: str) -> Section:
    rows = [
        (
            *(f"{local(i.start_ms, zone):%d %b %H:%M}", i.node, i.scope),
            "lasts" if i.end_ms is None else span((i.end_ms - i.start_ms) / 1000),
            *(str(i.times), i.text, i.fix, "yes" if i.confirmed else "no"),
        )
        for i in report.incidents
    ]
    columns = "Start | Node | What | For | Times | Cause | Fix | Confirmed"
    shown = table(columns, rows, (3, 4)) if rows else None
    return Section(title="Incidents", table=shown, text=() if rows else ("No incidents.",))
