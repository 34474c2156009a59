"""The page of evictions. Pure."""

from aggregator.eviction import WORDS, EvictionReport, Remedy, Verdict
from aggregator.phrases import counted
from aggregator.report.page import Page, Section, page_of, table
from aggregator.report.wording import count, gb, span

REMEDIES: dict[Remedy, str] = {
    "capacity": "need memory that no node has",
    "restore": "need nodes that are away",
    "blocked": "are held back by limits",
    "move": "are resolved by the moves of the placement",
    "budget": "need a larger memory budget",
    "pin": "need a pin",
    "leave": "belong to other nodes",
    "fits": "are over: the models fit now",
    "none": "are of models that nobody misses now",
}


def page(report: EvictionReport, rack: str) -> Page:
    """Which models had to leave memory, whether that was right, and what to do."""
    rows = [
        (
            *(r.node, r.model, str(r.evictions), _each(r.verdicts)),
            *(gb(r.bytes), count(r.requests_last_hour), ", ".join(r.made_room_for) or "-"),
            *("-" if r.wanted_again_s is None else span(r.wanted_again_s), WORDS[r.verdict], r.hint),
        )
        for r in report.rows
    ]
    shown = sum(r.evictions for r in report.rows)
    rows += [("all of these", "", count(shown), "", "", "", "", "", "", "")] if len(report.rows) > 1 else []
    columns = (
        "Node | Model | Evictions | Of them | Memory, each | Requests in the hour before, median | Made room for | "
        "Wanted again after, at the least | Verdict | Evidence, and what to do"
    )
    most = Section(title="The most evicted", text=_more(report), table=table(columns, rows, (2, 4, 5, 7)))
    sections = [most, _models(report)] if rows else []
    return page_of(f"Evictions, rack {rack}, {report.period}", _lead(report), sections)


def _lead(report: EvictionReport) -> str:
    if not report.total:
        return "No model had to leave memory."
    avoidable = report.verdicts.get("placement", 0)
    lead = counted(report.total, "eviction")
    if not avoidable:
        return f"{lead}, none of them avoidable."
    if report.total == 1:
        return f"{lead}, avoidable: see what to do."
    what = "; ".join(f"{number:,} {REMEDIES[remedy]}" for remedy, number in report.remedies.items())
    return f"{lead}, {avoidable:,} of them avoidable{f': {what}' if what else ''}."


def _more(report: EvictionReport) -> tuple[str, ...]:
    if not report.left_out:
        return ()
    rows = counted(report.left_out, "more row")
    return (f"{rows} with {counted(report.left_out_evictions, 'eviction')}: see the totals by model.",)


def _models(report: EvictionReport) -> Section | None:
    if not report.models:
        return None
    rows = [(m.model, count(m.evictions), count(m.nodes), _each(m.verdicts)) for m in report.models]
    rows.append(("all", count(report.total), "", _each(report.verdicts)))
    return Section(title="By model", table=table("Model | Evictions | Nodes | Of them", rows, (1, 2)))


def _each(verdicts: dict[Verdict, int]) -> str:
    return ", ".join(f"{number:,} {WORDS[verdict]}" for verdict, number in verdicts.items())
