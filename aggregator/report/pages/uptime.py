"""The page of availability and incidents. Pure."""

from collections.abc import Sequence

from aggregator.calendar import local
from aggregator.phrases import counted
from aggregator.report.page import Page, Section, page_of, table
from aggregator.report.wording import share as percent
from aggregator.report.wording import span
from aggregator.uptime import LEAST_KNOWN, NodeUptime, Progress, Uptime, cut, in_words


def page(report: Uptime, period: str, zone: str, rack: str, remarks: tuple[str, ...] = ()) -> Page:
    """When the rack and its nodes answered, and what went wrong. ``remarks`` are about telemetry that is missing."""
    nodes = [_row("the rack", report.rack), *(_row(n.node, n) for n in report.nodes)] if report.nodes else []
    columns = "Node | Serving | Without a model | Down | Excused | Unknown | Up"
    return page_of(
        f"Uptime, rack {rack}, {period}",
        _lead(report),
        [
            Section(
                title="Nodes",
                text=(*_counted(report), *_retired(report), *remarks),
                table=table(columns, nodes, (1, 2, 3, 4, 5, 6)),
            ),
            _desired(report.desired or (), zone),
            _incidents(report, zone),
        ],
        "Up is the time a node reported by the time it is known to have reported or to have been down, from its first "
        "report on until it is retired; where less than "
        f"{percent(LEAST_KNOWN, 0)} of that time is known, no percentage is given. A gap that nothing explains is "
        "unknown and counts neither way, and is an incident from half an hour on; nor does time count that an operator "
        "excused. Causes are guessed by rule until somebody confirms them in annotations/v1/incidents.toml. Times are "
        f"in {zone}.",
    )


def _lead(report: Uptime) -> str:
    rack, said = report.rack, ["No node reported anything"]
    if rack.share is not None:
        up = f"The rack was up {in_words(rack)} of the time that is known"
        said = [up + (f" (with a model ready {percent(rack.up_s / rack.known_s, 3)})" if _idled(rack) else "")]
    elif rack.known_share is not None:
        said = [f"How long the rack was up is {in_words(rack)}"]
    elif rack.excused_s:
        said = ["All of the rack's time is excused"]
    if report.request_share is not None:
        asked = report.requests_ok + report.requests_bad
        of = f"{asked:,} requests were" if asked != 1 else "1 request was"
        said.append(f"{cut(report.request_share)} of {of} answered")
    if rack.unknown_s >= 1:
        said.append(f"{span(rack.unknown_s)} are unknown")
    return "; ".join(said) + "."


def _idled(rack: NodeUptime) -> bool:
    return rack.idle_s > 0.001 * rack.known_s


def _row(name: str, n: NodeUptime) -> tuple[str, ...]:
    return (name, *map(span, (n.up_s, n.idle_s, n.down_s, n.excused_s, n.unknown_s)), in_words(n))


def _counted(report: Uptime) -> list[str]:
    """What counts against the rack, and what was refused and does not."""
    against = (
        (report.requests_failed, "failed"),
        (report.refused_capacity, "refused for want of capacity"),
        (report.refused_unsaid, "refused without a reason (by agents that give none)"),
    )
    neither = ((report.refused_limit, "refused for the limit of their key"), (report.refused_request, "at fault"))
    found = []
    for counts, parts in (("Not answered", against), ("Refused, and counted neither way", neither)):
        if said := [f"{count:,} {what}" for count, what in parts if count]:
            found.append(f"{counts}: {', '.join(said)}.")
    return found


def _retired(report: Uptime) -> list[str]:
    """What is to be known of nodes that were to be taken out of the rack."""
    back = "{} reported after the date on which its [[nodes]] table retires it, and counts until its last report."
    gone = "{} was retired in this period, and counts until then."
    return [(back if n.came_back else gone).format(n.node) for n in report.nodes if n.came_back or n.retired]


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
