"""The page of usage: what each client key had of the rack, what it was refused, what other places answered. Pure."""

import csv
import io
from collections.abc import Iterable, Sequence
from decimal import Decimal

import msgspec

from aggregator.cost import CostReport
from aggregator.focus import SO_FAR, inert, iso
from aggregator.phrases import counted
from aggregator.report.page import Page, Section, page_of, table
from aggregator.report.pages.cost import populations
from aggregator.report.wording import count, money, share, span
from aggregator.usage import KeyUsage, PlaceUsage

NO_KEY, NO_CLASS = "(without a key)", "(none)"


def figures(report: CostReport) -> dict[str, object]:
    """The same figures as JSON."""
    return {"period": report.period, "currency": report.currency, "keys": report.keys, "places": report.places}


def page(report: CostReport, rack: str) -> Page:
    """Usage by key and task class."""
    return page_of(
        f"Usage by client key, rack {rack}, {report.period}",
        _lead(report),
        [_keys(report), _refusals(report.keys), _places(report.places)],
        "Requests and tokens are those that the rack answered; tokens are of all outcomes. A key's part of the time "
        "and of the cost of a model is by the uncached prompt tokens and answer tokens that were computed for it. What "
        "other places answered is in none of these; it is counted and paid for there.",
    )


def export(report: CostReport, until_ms: int | None = None) -> bytes:
    """One row per key and class as CSV, with the columns of the JSON; a span that is not over says how far it goes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    custom = {SO_FAR: iso(until_ms)} if until_ms else {}
    names = KeyUsage.__struct_fields__
    writer.writerow(("period", "currency", *names, *custom))
    for one in report.keys:
        cells = (report.period, report.currency, *(getattr(one, name) for name in names), *custom.values())
        writer.writerow(map(inert, cells))
    return out.getvalue().encode()


def _lead(report: CostReport) -> str:
    if not report.keys:
        return "No client asked for anything."
    users = {one.key_id for one in report.keys}
    text = f"{counted(len(users), 'key')} had {counted(_sum(report.keys, 'requests'), 'request')} answered by the rack"
    if left := _sum(report.keys, "outside_requests"):
        usd = sum((one.usd for one in report.places if one.category == "outside"), Decimal(0))
        return f"{text}; {counted(left, 'request')} left the premises, for {money(usd, 'USD')}."
    return f"{text}; none left the premises."


def _sum(rows: Iterable[msgspec.Struct], name: str) -> int:
    return sum(getattr(one, name) for one in rows)


def _who(one: KeyUsage | PlaceUsage) -> tuple[str, str]:
    return one.key_id or NO_KEY, one.task_class or NO_CLASS


def _keys(report: CostReport) -> Section:
    rows = [
        (
            *_who(one),
            *map(count, (one.requests, one.prompt_tok)),
            share(one.cached_tok / one.prompt_tok if one.prompt_tok else None),
            *(count(one.completion_tok), span(one.busy_s), share(one.busy_share), money(one.cost, report.currency)),
        )
        for one in report.keys
    ]
    prompt, cached, answer = (_sum(report.keys, f"{name}_tok") for name in ("prompt", "cached", "completion"))
    costs = [one.cost for one in report.keys if one.cost is not None]
    shares = [one.busy_share for one in report.keys if one.busy_share is not None]
    total = (
        *("Total of the models", "", count(_sum(report.keys, "requests")), count(prompt)),
        *(share(cached / prompt if prompt else None), count(answer), span(sum(one.busy_s for one in report.keys))),
        *(share(sum(shares) if shares else None), money(sum(costs, Decimal(0)) if costs else None, report.currency)),
    )
    columns = (
        "Key | Class | Requests | Prompt tokens | Cached | Answer tokens | Busy | Of busy time | Cost, idle included"
    )
    rows += [total] if rows else []
    return Section(title="Work of the rack", text=populations(report), table=table(columns, rows, range(2, 9)))


def _refusals(keys: Sequence[KeyUsage]) -> Section | None:
    names = ("failed", "cancelled", "refused_capacity", "refused_limit", "refused_request", "refused_unsaid")
    rows = [(*_who(one), *(count(getattr(one, name)) for name in names)) for one in keys if _any(one, names)]
    columns = "Key | Class | Failed | Cancelled | No capacity | Over its limit | Its own fault | No reason given"
    text = ("The last four were refused.",)
    return Section(title="Not answered", text=text, table=table(columns, rows, range(2, 8))) if rows else None


def _any(one: KeyUsage, names: Iterable[str]) -> bool:
    return any(getattr(one, name) for name in names)


def _places(places: Sequence[PlaceUsage]) -> Section | None:
    rows = [
        (
            *(one.place, one.category, *_who(one)),
            *map(count, (one.requests, one.answered, one.prompt_tok, one.completion_tok)),
            money(one.usd, "USD"),
        )
        for one in places
    ]
    columns = "Place | Where | Key | Class | Requests | Answered | Prompt tokens | Answer tokens | Charged"
    text = "Tokens and money by each place's own count; in no figure of the rack."
    return Section(title="Other places", text=(text,), table=table(columns, rows, range(4, 9))) if rows else None
