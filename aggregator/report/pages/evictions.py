"""The page of evictions. Pure."""

from aggregator.calendar import counted, verb
from aggregator.eviction import EvictionReport
from aggregator.report.page import Page, Section, page_of, table
from aggregator.report.wording import count, gb, span


def page(report: EvictionReport, rack: str) -> Page:
    """Which models had to leave memory, and whether that was right."""
    wrong = sum(r.verdicts.get("placement", 0) for r in report.rows)
    lead = "No model had to leave memory."
    if report.total:
        are = verb(wrong, "is", "are")
        lead = f"{counted(report.total, 'eviction')}; {wrong:,} of those below {are} a matter of placement."
    rows = [
        (
            *(r.node, r.model, str(r.evictions), ", ".join(f"{n} {verdict}" for verdict, n in r.verdicts.items())),
            *(gb(r.bytes), count(r.requests_last_hour), ", ".join(r.made_room_for) or "-"),
            *("-" if r.wanted_again_s is None else span(r.wanted_again_s), r.verdict, r.hint),
        )
        for r in report.rows
    ]
    more = (
        (f"{counted(report.left_out, 'more model')} {verb(report.left_out, 'was', 'were')} evicted less often.",)
        if report.left_out
        else ()
    )
    columns = (
        "Node | Model | Evictions | Of them | Memory | Requests in the hours before | Made room for | "
        "Wanted again after | Verdict | Evidence"
    )
    section = Section(title="The most evicted", text=more, table=table(columns, rows, (2, 4, 5, 7)))
    return page_of(f"Evictions, rack {rack}, {report.period}", lead, [section])
