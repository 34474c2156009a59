"""The executive PDF: headline, key figures, promises, evidence. Vector shapes and an embedded typeface; equal reports
give equal bytes."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

from reportlab.graphics.shapes import Drawing, Line, Rect
from reportlab.lib.pagesizes import A4
from reportlab.lib.units import mm
from reportlab.platypus import KeepTogether, SimpleDocTemplate, Spacer, Table

from aggregator import advice
from aggregator.calendar import local
from aggregator.eviction import WORDS
from aggregator.heat import needs
from aggregator.incidents import Incident
from aggregator.judgements import Figures, Judged
from aggregator.phrases import counted, millions, tokens, verb
from aggregator.report import wording
from aggregator.report.layout import (
    BAD,
    BLUE,
    BODY,
    CAPTION,
    CELL,
    HEAD,
    HEAD_RIGHT,
    HEADLINE,
    LINE,
    MARGIN,
    NUMBER,
    REGULAR,
    SMALL,
    SOFT,
    TITLE,
    WIDTH,
    Card,
    Sheet,
    colour,
    hatched,
    label,
    meter,
    styled,
)
from aggregator.uptime import in_words
from aggregator.volume import Day

MOST_INCIDENTS = 40
MOST_ADVICE = 30


def render(report: Judged, fallback_font: str = "") -> bytes:
    """The PDF's bytes. Raises Refused if the fallback font cannot be used."""
    sheet, buffer = Sheet(fallback_font), io.BytesIO()
    document = SimpleDocTemplate(
        buffer,
        pagesize=A4,
        # the frame adds 6 points of its own on each side
        leftMargin=MARGIN - 6,
        rightMargin=MARGIN - 6,
        topMargin=15 * mm,
        bottomMargin=17 * mm,
        title=f"Rack {report.rack}, {_period(report)}",
        author="mlxrack",
        subject="Monthly report",
        lang="en",
        invariant=1,
    )
    parts = (_front, _volume, _thermal, _evictions, _distribution, _cost, _uptime, _recommendations, _method)
    story = [flowable for part in parts for flowable in part(sheet, report)]
    # dated by what it tells of: when a run happened to make it does not belong to a report
    made = f"D:{local(report.telemetry.until_ms, 'UTC'):%Y%m%d%H%M%S}+00'00'"

    def page(canvas: Any, document: Any) -> None:
        canvas.setDateFormatter(lambda *_: made)
        _footer(sheet, report, canvas, document.page)

    document.build(story, onFirstPage=page, onLaterPages=page)
    return buffer.getvalue()


def _period(report: Judged) -> str:
    return f"{report.period}, {report.so_far}" if report.so_far else report.period


# the first page


def _front(sheet: Sheet, report: Judged) -> list[Any]:
    remarks = wording.remarks(report.telemetry, report.timezone, report.before_period or "the month before")
    return [
        sheet.p(f"Rack {report.rack} · {_period(report)} · times in {report.timezone}", TITLE),
        Spacer(1, 4),
        sheet.p(report.headline, HEADLINE),
        sheet.p(wording.coverage(report), SMALL),
        Spacer(1, 6),
        sheet.cards(_key_figures(report)),
        *(sheet.section("What was not counted", *(sheet.p(one, BODY) for one in remarks)) if remarks else ()),
        *sheet.section("Promises", _promises(sheet, report)),
    ]


def _key_figures(report: Judged) -> list[Card]:
    """The figures that matter most. Uptime and availability have one verdict: that of the worse one."""
    now, money = report.figures, report.cost.currency
    kept = {str(line.kind): line.kept for line in report.scorecard}
    target = {str(line.kind): line.target for line in report.scorecard}
    uptime, heat = f"target {wording.share(target['uptime'], 2)}", f"target {wording.share(target['heat'])}"
    total = wording.money(now.total, money)
    busy = f"busy {wording.share(now.busy_share)} of their time" if now.busy_share is not None else ""
    cards: list[tuple[str, str, str, str, bool | None]] = [
        ("Uptime of the rack", wording.reached(now.rack_up), uptime, "rack_up", kept["uptime"]),
        ("Requests answered", wording.reached(now.request_share), uptime, "request_share", kept["uptime"]),
        ("Inter-token latency, p95", wording.ms(now.itl_p95_us), f"target {target['latency']:g} ms", "itl_p95_us",
         kept["latency"]),
        ("Slowed by heat", wording.share(now.throttled), f"{heat}; peak {wording.celsius(now.peak_mc)}",
         "throttled", kept["heat"]),
        ("Cost of the nodes", total, busy, "total", None),
        ("Per million tokens", wording.money(now.average_per_m, money), "prompt and answer, idle included",
         "average_per_m", None),
        ("Saved against APIs", wording.saved(now.saving_share), _comparable(report), "saving_share",
         None if now.saving_share is None else now.saving_share >= 0),
        ("Answered requests", wording.count(now.requests) if not report.empty else wording.NO_DATA,
         f"{tokens(now.prompt_tok + now.completion_tok)} of theirs, {millions(now.completion_tok)} in answers",
         "requests", None),
    ]  # fmt: skip
    return [(name, value, note, _change(report, field), good) for name, value, note, field, good in cards]


def _change(report: Judged, field: str) -> str:
    """What a figure did against the span before."""
    if report.before is None:
        return "no month before to compare with"
    now, before = getattr(report.figures, field), getattr(report.before, field)
    return wording.changed(
        now,
        before,
        _before(report.before, report.before_period),
        points=field in ("rack_up", "request_share", "saving_share", "throttled"),
    )


def _before(figures: Figures, period: str) -> str:
    """The span before, and how much of it there is: a sum of three days is not that of a month."""
    there = figures.days - figures.blank_days
    return f"{period} ({there} of {figures.days} days)" if figures.blank_days else period


def _comparable(report: Judged) -> str:
    """What the saving speaks of, and the frontier model beside it."""
    apis = report.apis
    ours, theirs = (
        sum((getattr(one, name) for one in apis.models if one.times_cheaper is not None), Decimal(0))
        for name in ("ours", "frontier_cost")
    )
    if apis.covered is None:
        return "no model is compared with an API"
    said = f"the same models at hosts, {wording.share(apis.covered, 0)} of tokens"
    return f"{said}; frontier: {wording.times(float(theirs / ours))} our cost" if ours > 0 else said


def _promises(sheet: Sheet, report: Judged) -> Table:
    rows = [(one.name, one.text, wording.target(one), wording.VERDICTS[one.kept]) for one in report.scorecard]
    head = ("Promise", "As it was", "Target", "Verdict")
    return sheet.table(head, rows, text=range(4), tints=[colour(one.kept) for one in report.scorecard])


# the seven sections


def _volume(sheet: Sheet, report: Judged) -> list[Any]:
    v, title = report.volume, "1. Inference volume"
    other = f"{v.failed:,} failed, {v.refused:,} refused, {v.cancelled:,} cancelled by clients"
    other += f", {v.elsewhere:,} answered by other places" if v.elsewhere else ""
    text = f"{counted(v.requests, 'request')} answered ({_change(report, 'requests')}), {other}."
    if not v.models:
        asked = v.failed + v.refused + v.cancelled
        nothing = f"No request was answered: {other}." if asked else "Nothing was asked of the rack."
        none = "No data: no node reported." if report.empty else nothing
        return sheet.section(title, sheet.p(none, BODY))
    rows = [
        (
            *(m.model, wording.count(m.requests), wording.count(m.prompt_tok)),
            wording.share(m.cached_tok / m.prompt_tok if m.prompt_tok else None),
            *(wording.count(m.completion_tok), *map(wording.ms, (m.ttft_p50_us, m.ttft_p95_us, m.itl_p95_us))),
        )
        for m in v.models
    ]
    head = ("Model", "Requests", "Prompt tokens", "Cached", "Answer tokens", "TTFT p50", "TTFT p95", "ITL p95")
    sums = (f"{sum(getattr(m, field) for m in v.models):,}" for field in ("prompt_tok", "completion_tok"))
    prompt, answer = sums
    rows.append(("Total", wording.count(v.requests), prompt, "", answer, "", "", wording.ms(v.itl_p95_us)))
    chart = [Spacer(1, 6), *_days(sheet, v.days)]
    return sheet.section(title, sheet.p(text, BODY), Spacer(1, 3), sheet.table(head, rows, total=True), *chart)


def _days(sheet: Sheet, days: Sequence[Day]) -> list[Any]:
    """A bar for each day, with its axis; days without telemetry are hatched."""
    height, base, left = 74.0, 12.0, 34.0
    most = max((d.tokens for d in days), default=0)
    unit, size = wording.unit(most)
    step, top = wording.ticks(most)
    drawing, wide = Drawing(WIDTH, height + base + 6), (WIDTH - left) / max(1, len(days))
    for n in range(round(top / step) + 1):
        y = base + height * n * step / top
        drawing.add(Line(left, y, WIDTH, y, strokeColor=LINE, strokeWidth=0.5))
        drawing.add(label(left - 4, y - 2.5, f"{n * step / size:g}", "end"))
    for n, day in enumerate(days):
        x = left + n * wide
        if day.reported:
            drawing.add(Rect(x + 1, base, wide - 2, height * day.tokens / top, fillColor=BLUE, strokeColor=None))
        else:
            hatched(drawing, x + 1, base, wide - 2, height)
        if n % 5 == 0:
            at = date.fromisoformat(day.date)
            drawing.add(label(x + wide / 2, 2, f"{at.day} {at:%b}", "middle" if n else "start"))
    silent = sum(not day.reported for day in days)
    blank = f"; hatched: {counted(silent, 'day')} without telemetry" if silent else ""
    return [sheet.p(f"Tokens per day{unit}, prompts and answers{blank}", CAPTION), drawing]


def _thermal(sheet: Sheet, report: Judged) -> list[Any]:
    t = report.thermal
    rows = [
        (
            *(n.node, wording.celsius(n.peak_mc), wording.celsius(n.peak_pcore_mc)),
            *(wording.count(n.throttle_events), n.throttled, needs(n) or "-"),
        )
        for n in t.nodes
    ]
    if not rows:
        return sheet.section("2. Thermal", sheet.p("No data.", BODY))
    head = ("Node", "Peak", "Peak P-core", "Throttle events", "Throttled, of its time", "Needs")
    said = [sheet.p(text, BODY) for text in (t.advice, t.because) if text]
    return sheet.section("2. Thermal", *said, Spacer(1, 3), sheet.table(head, rows, text=(0, 5)))


def _evictions(sheet: Sheet, report: Judged) -> list[Any]:
    e, title = report.evictions, "3. Evictions"
    if not e.rows:
        return sheet.section(title, sheet.p("No data." if report.empty else "No model was evicted.", BODY))
    rows = [
        (r.node, r.model, wording.count(r.evictions), wording.count(r.requests_last_hour), WORDS[r.verdict], r.hint)
        for r in e.rows
    ]
    if e.left_out:
        rows.append((counted(e.left_out, "more row"), "", wording.count(e.left_out_evictions), "", "", ""))
    rows.append(("Total", "", wording.count(e.total), "", "", ""))
    head = ("Node", "Model", "Count", "Requests in the hour before, median", "Verdict", "Evidence")
    avoidable = f"{e.verdicts.get('placement', 0):,} avoidable"
    said = f"{counted(e.total, 'eviction')} ({_change(report, 'evictions')}), {avoidable}."
    shown = sheet.table(head, rows, text=(0, 1, 4, 5), total=True)
    models = [(m.model, wording.count(m.evictions), wording.count(m.nodes)) for m in e.models]
    return [
        *sheet.section(title, sheet.p(said, BODY), Spacer(1, 3), shown),
        *([Spacer(1, 6), sheet.table(("All of a model", "Count", "Nodes"), models)] if len(models) > 1 else []),
    ]


def _distribution(sheet: Sheet, report: Judged) -> list[Any]:
    d = report.distribution
    if not d.nodes:
        return sheet.section("4. Placement", sheet.p("No data.", BODY))
    verdict = "Rebalancing proposed, see recommendations." if d.rebalance else "No rebalancing needed."
    return sheet.section("4. Placement", sheet.p(verdict, BODY), Spacer(1, 3), _map(sheet, report))


def _map(sheet: Sheet, report: Judged) -> Table:
    """One row per node with its models and a bar of its memory use."""
    d = report.distribution
    rows = []
    for node in d.nodes:
        names = [f"{p.model} ({wording.gb(p.need_bytes)})" for p in d.placed if p.node == node.node] or ["nothing"]
        held = f"{wording.gb(node.held_bytes)} of {wording.gb(node.budget_bytes)}"
        busy = sheet.p(wording.share(node.busy_share), NUMBER)
        # a cell cannot break across pages, rows can
        first, *more = [sheet.p(", ".join(names[n : n + 5]), CELL) for n in range(0, len(names), 5)]
        rows.append(
            [
                sheet.p(node.node, CELL),
                first,
                meter(node.held_share, BAD if node.crowded else BLUE),
                sheet.p(held, CELL),
                busy,
            ]
        )
        rows += [["", cell, "", "", ""] for cell in more]
    head = [sheet.p(h, HEAD) for h in ("Node", "Models in memory", "Memory", "")] + [sheet.p("Busy", HEAD_RIGHT)]
    return styled(Table([head, *rows], colWidths=[WIDTH * w for w in (0.16, 0.36, 0.2, 0.18, 0.1)], repeatRows=1))


def _cost(sheet: Sheet, report: Judged) -> list[Any]:
    c, title = report.cost, "5. Cost"
    if not c.priced:
        none = "No cost data: no node of this period has a price in the configuration." if c.nodes else "No data."
        return sheet.section(title, sheet.p(none, BODY))
    text = (
        f"Total cost of the nodes: {wording.money(c.total, c.currency)} ({_change(report, 'total')}), of which "
        f"{wording.money(c.idle, c.currency)} idle. {_average(report)} Direct counts busy time only, loaded "
        "includes idle time. API costs are those of the same open model at the median host"
        f"{_known(report)} ({report.apis.source}, as of {report.apis.at}). A negative saving means that the API "
        "would have been cheaper."
    )
    return sheet.section(title, sheet.p(text, BODY), Spacer(1, 3), _prices(sheet, report))


def _prices(sheet: Sheet, report: Judged) -> Table:
    """A row per model, what is in none of them, and the total."""
    c = report.cost
    rows = [
        (
            *(m.model, *(wording.number(value) for value in (m.loaded, m.direct_per_m, m.loaded_per_m))),
            *(a.same_as or wording.NO_DATA, wording.number(a.median), wording.number(a.saving)),
        )
        for m, a in zip(c.models, report.apis.models, strict=True)
    ]
    total = c.total or Decimal(0)
    others = (("silent nodes", c.silent), ("idle, of no model", c.unshared), ("answered nobody", c.unattributed))
    rows += [(name, wording.number(cost), "", "", "", "", "") for name, cost in others if cost]
    rows.append(("Total", wording.number(total), "", wording.number(c.average_per_m), "", "",
                 wording.number(report.apis.saving)))  # fmt: skip
    head = (
        "Model",
        f"Cost, {c.currency}",
        "Direct per M",
        "Loaded per M",
        "Same model at APIs",
        "Median cost",
        "Saving",
    )
    return sheet.table(head, rows, text=(0, 4), total=True)


def _average(report: Judged) -> str:
    if (price := report.cost.average_per_m) is None:
        return "No token was answered by a node with a price."
    said = f"Weighted average: {wording.money(price, report.cost.currency)} per million tokens (M)"
    return f"{said}, {_change(report, 'average_per_m')}."


def _known(report: Judged) -> str:
    covered = report.apis.covered
    return "" if covered is None else f"; a price is known for {wording.share(covered)} of the tokens"


def _uptime(sheet: Sheet, report: Judged) -> list[Any]:
    u, title = report.uptime, "6. Uptime"
    if not u.nodes:
        return sheet.section(title, sheet.p("No data.", BODY))
    asked = u.requests_ok + u.requests_bad
    answered = (
        f"{wording.reached(u.request_share)} of {counted(asked, 'request')} {verb(asked, 'was', 'were')} answered"
    )
    text = f"{answered if asked else 'No request was answered or failed'}. {_swaps(report)}"
    everyone = [u.rack, *u.nodes]
    columns = [
        [getattr(n, field) for n in everyone] for field in ("up_s", "idle_s", "down_s", "excused_s", "unknown_s")
    ]
    said = [wording.spans(column) for column in columns]
    rows = [(n.node or "the rack", in_words(n), *(values[at] for values, _ in said)) for at, n in enumerate(everyone)]
    names = ("Serving", "No model ready", "Down", "Excused", "Unknown")
    head = ("Node", "Uptime", *(f"{name}, {unit}" for name, (_, unit) in zip(names, said, strict=True)))
    return [
        *sheet.section(title, sheet.p(text, BODY), Spacer(1, 3), sheet.table(head, rows)),
        *sheet.section("Incidents", *_incidents(sheet, report)),
    ]


def _swaps(report: Judged) -> str:
    swaps = report.swaps
    if not swaps.flipped + swaps.failed:
        return "No model was swapped."
    longest = "" if swaps.longest_s is None else f"; the longest took {wording.span(swaps.longest_s)}"
    return f"{counted(swaps.flipped, 'model swap')} succeeded, {swaps.failed} failed{longest}."


def _incidents(sheet: Sheet, report: Judged) -> list[Any]:
    """The open ones and the longest, in order of time; what is left out is counted by cause."""
    by_length = sorted(report.uptime.incidents, key=_length, reverse=True)
    shown = sorted(by_length[:MOST_INCIDENTS], key=lambda i: (i.start_ms, i.node, i.scope))
    if not shown:
        return [sheet.p("No incidents.", BODY)]
    lengths, unit = wording.spans([_length(i) if i.end_ms is not None else None for i in shown])
    rows = [
        (
            *(wording.moment(i.start_ms, report.timezone), "ongoing" if i.end_ms is None else length, i.node, i.scope),
            *(f"{i.times:,}", i.text, i.fix, "confirmed" if i.confirmed else "unconfirmed"),
        )
        for i, length in zip(shown, lengths, strict=True)
    ]
    head = ("Start", f"For, {unit}", "Node", "Scope", "Times", "Cause", "Fix", "Cause is")
    table = sheet.table(head, rows, text=(0, 2, 3, 5, 6, 7))
    return [table, *_left_out(sheet, "shorter", (i.cause for i in by_length[MOST_INCIDENTS:]))]


def _length(one: Incident) -> float:
    return float("inf") if one.end_ms is None else (one.end_ms - one.start_ms) / 1000


def _left_out(sheet: Sheet, which: str, kinds: Iterable[str]) -> list[Any]:
    if not (counts := Counter(kinds)):
        return []
    number = counts.total()
    named = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in counts.most_common())
    text = (
        f"{number:,} {which} {verb(number, 'one is', 'ones are')} not listed here ({named}); the JSON report has all."
    )
    return [sheet.p(text, SMALL)]


def _recommendations(sheet: Sheet, report: Judged) -> list[Any]:
    title = "7. Recommendations"
    if not report.recommendations:
        return sheet.section(title, sheet.p("No data." if report.empty else "No changes recommended.", BODY))
    shown = advice.shown(report.recommendations, MOST_ADVICE)
    rows = [(r.kind, r.text, r.because, r.effect) for r in shown.rows]
    table = sheet.table(("Kind", "Recommendation", "Reason", "What comes of it"), rows, text=range(4))
    return sheet.section(title, table, *_left_out(sheet, "more", Counter(shown.left).elements()))


def _method(sheet: Sheet, report: Judged) -> list[Any]:
    text = (
        f"Source: {counted(report.batches, 'telemetry batch', 'telemetry batches')}. "
        "Percentiles are within 1.1 % of the exact values. Tokens and requests "
        "are counted once, at the gateway. A gap in telemetry counts as unknown, never as up. Each node's cost is "
        "allocated to its models by their busy seconds; the remainder is idle. Causes of incidents are unconfirmed "
        "until an operator confirms them."
    )
    return [Spacer(1, 10), KeepTogether([sheet.p("Method", HEAD), sheet.p(text, SMALL)])]


def _footer(sheet: Sheet, report: Judged, canvas: Any, page: int) -> None:
    canvas.saveState()
    canvas.setFont(REGULAR, 7.5)
    canvas.setFillColor(SOFT)
    canvas.drawString(MARGIN, 10 * mm, sheet.plain(f"mlxrack · rack {report.rack} · {_period(report)}"))
    canvas.drawRightString(A4[0] - MARGIN, 10 * mm, f"page {page}")
    canvas.restoreState()
