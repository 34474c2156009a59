"""The page of the scorecard. Pure."""

from aggregator.report.page import Page, Section, page_of, table
from aggregator.report.wording import VERDICTS, target
from aggregator.scorecard import Line


def page(lines: tuple[Line, ...], period: str, rack: str) -> Page:
    """The promises and whether they were kept."""
    kept, missed = sum(one.kept is True for one in lines), sum(one.kept is False for one in lines)
    unknown = len(lines) - kept - missed
    which = f" ({', '.join(one.name for one in lines if one.kept is False)})" if missed else ""
    lead = f"{kept} kept, {missed} missed{which}" + (f", {unknown} without data" if unknown else "") + "."
    rows = [(one.name, one.text, target(one), VERDICTS[one.kept]) for one in lines]
    section = Section(title="Promises", table=table("Promise | As it was | Target | Verdict", rows))
    return page_of(f"Scorecard, rack {rack}, {period}", lead, [section])
