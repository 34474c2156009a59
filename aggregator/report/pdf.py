"""The executive PDF: headline, four key figures, evidence. Vector shapes only; equal reports give equal bytes."""

import io
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from reportlab.graphics.shapes import Drawing, Line, Rect, String
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.platypus import KeepTogether, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle

from aggregator.calendar import local
from aggregator.heat import needs
from aggregator.judgements import Judged
from aggregator.placement import NodeLoad
from aggregator.report import wording

INK, SOFT, FAINT, LINE = (colors.HexColor(c) for c in ("#1B2733", "#5B6B7A", "#F3F6F9", "#D5DDE5"))
BLUE, GOOD, BAD = (colors.HexColor(c) for c in ("#1F6FB2", "#1E8449", "#B03A2E"))
MARGIN = 18 * mm
WIDTH = A4[0] - 2 * MARGIN
REGULAR, BOLD = "Helvetica", "Helvetica-Bold"
ALL = ((0, 0), (-1, -1))
"""Every cell of a table."""
LONGEST_TEXT = 600
"""In characters: a table cell cannot be taller than a page."""


def _style(name: str, size: float, **more: Any) -> ParagraphStyle:
    values: dict[str, Any] = {"fontName": REGULAR, "fontSize": size, "leading": size * 1.35, "textColor": INK, **more}
    return ParagraphStyle(name, **values)


BODY = _style("body", 9.5)
SMALL = _style("small", 8, textColor=SOFT)
CELL = _style("cell", 8)
NUMBER = _style("number", 8, alignment=2)
HEAD = _style("head", 7.5, textColor=SOFT, fontName=BOLD)
HEAD_RIGHT = _style("headright", 7.5, textColor=SOFT, fontName=BOLD, alignment=2)
TITLE = _style("title", 10, textColor=SOFT)
HEADLINE = _style("headline", 17, fontName=BOLD, leading=22, spaceAfter=4)
SECTION = _style("section", 12.5, fontName=BOLD, spaceBefore=14, spaceAfter=5)


def render(report: Judged) -> bytes:
    """The PDF's bytes."""
    buffer = io.BytesIO()
    document = SimpleDocTemplate(
        buffer,
        pagesize=A4,
        # the frame adds 6 points of its own on each side
        leftMargin=MARGIN - 6,
        rightMargin=MARGIN - 6,
        topMargin=16 * mm,
        bottomMargin=18 * mm,
        title=f"Rack {report.rack}, {_period(report)}",
        author="mlxrack",
        subject="Monthly report",
        lang="en",
        invariant=1,
    )
    story = [*_front(report), *_volume(report), *_thermal(report), *_evictions(report), *_distribution(report)]
    story += [*_cost(report), *_uptime(report), *_recommendations(report), *_method(report)]
    footer = _footer(report)
    document.build(story, onFirstPage=footer, onLaterPages=footer)
    return buffer.getvalue()


def _front(report: Judged) -> list[Any]:
    return [
        _p(f"Rack {report.rack} · {_period(report)} · times in {report.timezone}", TITLE),
        Spacer(1, 4),
        _p(report.headline, HEADLINE),
        Spacer(1, 6),
        _cards(report),
        Spacer(1, 4),
    ]


def _period(report: Judged) -> str:
    return f"{report.period}, {report.so_far}" if report.so_far else report.period


def _cards(report: Judged) -> Table:
    up, itl = (next(line for line in report.scorecard if line.kind == kind) for kind in ("uptime", "latency"))
    speed = wording.ms(report.volume.itl_p95_us)
    price = report.cost.average_per_m
    cards = [
        ("Requests answered", wording.count(report.volume.requests) if not report.empty else wording.NO_DATA, "", None),
        ("Availability", wording.share(up.value, 2), f"target {wording.share(up.target, 2)}", up.kept),
        ("Inter-token latency (ITL), p95", speed, f"target {itl.target:g} ms", itl.kept),
        ("Cost per million tokens", wording.money(price, report.cost.currency), "including idle time", None),
    ]
    cells = [
        [
            _p(name, SMALL),
            _p(value, _style(f"kpi{n}", 15, fontName=BOLD, leading=20, textColor=_verdict(good))),
            _p(note or " ", SMALL),
        ]
        for n, (name, value, note, good) in enumerate(cards)
    ]
    table = Table([cells], colWidths=[WIDTH / 4] * 4)
    lines = [("BACKGROUND", *ALL, FAINT), ("LINEAFTER", (0, 0), (-2, -1), 4, colors.white)]
    table.setStyle(TableStyle([*lines, *_padding(left=8, top=7, bottom=8), ("VALIGN", *ALL, "TOP")]))
    return table


def _padding(**sizes: float) -> list[Any]:
    return [(f"{side.upper()}PADDING", *ALL, size) for side, size in sizes.items()]


def _verdict(good: bool | None) -> Any:
    return INK if good is None else (GOOD if good else BAD)


def _volume(report: Judged) -> list[Any]:
    v = report.volume
    if not v.models:
        return _section("1. Inference volume", [_p("No data: no requests were answered this month.", BODY)])
    rows = [
        (
            *(m.model, wording.count(m.requests), wording.count(m.prompt_tok)),
            wording.share(m.cached_tok / m.prompt_tok if m.prompt_tok else None),
            *(wording.count(m.completion_tok), *map(wording.ms, (m.ttft_p50_us, m.ttft_p95_us, m.itl_p95_us))),
        )
        for m in v.models
    ]
    head = ("Model", "Requests", "Prompt tokens", "Cached", "Answer tokens", "TTFT p50", "TTFT p95", "ITL p95")
    answered, failed, refused, cancelled = map(wording.count, (v.requests, v.failed, v.refused, v.cancelled))
    text = f"Answered: {answered}; failed: {failed}; refused: {refused}; cancelled by clients: {cancelled}."
    chart = [Spacer(1, 6), _bars(v.days), _p("Tokens per day", SMALL)]
    return _section("1. Inference volume", [_p(text, BODY), Spacer(1, 4), _table(head, rows), *chart])


def _bars(days: Sequence[Any]) -> Drawing:
    height, base = 62.0, 12.0
    drawing = Drawing(WIDTH, height + base)
    most = max((d.tokens for d in days), default=0)
    step = WIDTH / max(1, len(days))
    drawing.add(Line(0, base, WIDTH, base, strokeColor=LINE, strokeWidth=0.6))
    for n, day in enumerate(days):
        tall = (height - 12) * day.tokens / most if most else 0
        drawing.add(Rect(n * step + 1, base, step - 2, tall, fillColor=BLUE, strokeColor=None))
        if day.tokens == most and most:
            at = min(max(n * step + step / 2, 30), WIDTH - 30)
            drawing.add(_label(at, base + tall + 2, f"{most:,}"))
        if n % 5 == 0 or n == len(days) - 1:
            drawing.add(_label(n * step + step / 2, 2, day.date[8:]))
    return drawing


def _label(x: float, y: float, text: str) -> String:
    return String(x, y, text, fontName=REGULAR, fontSize=7, fillColor=SOFT, textAnchor="middle")


def _thermal(report: Judged) -> list[Any]:
    t = report.thermal
    rows = [
        (
            *(n.node, wording.celsius(n.peak_mc), wording.celsius(n.peak_pcore_mc)),
            *(wording.count(n.throttle_events), n.throttled, needs(n) or "-"),
        )
        for n in t.nodes
    ]
    head = ("Node", "Peak", "Peak P-core", "Throttle events", "Throttled, of its time", "Needs")
    body = [*(_p(text, BODY) for text in (t.advice, t.because) if text), Spacer(1, 4)]
    return _section(
        "2. Thermal",
        [*body, _table(head, rows, widths=(0.15, 0.13, 0.13, 0.12, 0.13, 0.34), text_from=5)]
        if rows
        else [_p("No data.", BODY)],
    )


def _evictions(report: Judged) -> list[Any]:
    e = report.evictions
    if not e.rows:
        text = "No data." if report.empty else "No model was evicted."
        return _section("3. Evictions", [_p(text, BODY)])
    rows = [
        (r.node, r.model, wording.count(r.evictions), wording.count(r.requests_last_hour), r.verdict, r.hint)
        for r in e.rows
    ]
    head = ("Node", "Model", "Count", "Requests, hour before", "Verdict", "Evidence")
    widths = (0.13, 0.19, 0.07, 0.12, 0.11, 0.38)
    return _section("3. Evictions", [_table(head, rows, widths=widths, left=2, text_from=4)])


def _distribution(report: Judged) -> list[Any]:
    d = report.distribution
    if not d.nodes:
        return _section("4. Placement", [_p("No data.", BODY)])
    verdict = "Rebalancing proposed, see recommendations." if d.rebalance else "No rebalancing needed."
    return _section("4. Placement", [_p(verdict, BODY), Spacer(1, 4), _map(report)])


def _map(report: Judged) -> Table:
    """One row per node with its models and a bar of its memory use."""
    d = report.distribution
    rows = []
    for node in d.nodes:
        names = [f"{p.model} ({wording.gb(p.need_bytes)})" for p in d.placed if p.node == node.node] or ["nothing"]
        held = f"{wording.gb(node.held_bytes)} of {wording.gb(node.budget_bytes)}"
        busy = _p(wording.share(node.busy_share), NUMBER)
        # a cell cannot break across pages, rows can
        first, *more = [_p(", ".join(names[n : n + 5]), CELL) for n in range(0, len(names), 5)]
        rows.append([_p(node.node, CELL), first, _meter(node), _p(held, CELL), busy])
        rows += [["", cell, "", "", ""] for cell in more]
    head = [_p(h, HEAD) for h in ("Node", "Models in memory", "Memory", "")] + [_p("Busy", HEAD_RIGHT)]
    return _styled(Table([head, *rows], colWidths=[WIDTH * w for w in (0.16, 0.36, 0.2, 0.18, 0.1)], repeatRows=1))


def _meter(node: NodeLoad) -> Drawing:
    drawing = Drawing(WIDTH * 0.18, 8)
    drawing.add(Rect(0, 1, WIDTH * 0.18, 6, fillColor=LINE, strokeColor=None))
    colour = BAD if node.crowded else BLUE
    drawing.add(Rect(0, 1, WIDTH * 0.18 * min(1.0, node.held_share), 6, fillColor=colour, strokeColor=None))
    return drawing


def _cost(report: Judged) -> list[Any]:
    c = report.cost
    if not c.models:
        return _section("5. Cost", [_p("No data.", BODY)])
    rows = [
        (
            *(m.model, *(wording.money(value, c.currency) for value in (m.loaded, m.direct_per_m, m.loaded_per_m))),
            *(a.same_as or wording.NO_DATA, wording.money(a.median, c.currency), wording.money(a.saving, c.currency)),
        )
        for m, a in zip(c.models, report.apis.models, strict=True)
    ]
    head = ("Model", "Cost", "Direct per M", "Loaded per M", "Same model at APIs", "Median cost", "Saving")
    if c.priced:
        text = (
            f"Total cost of the nodes over the time they reported: {wording.money(c.total, c.currency)}, of which "
            f"{wording.money(c.idle, c.currency)} idle. {_average(report)} Direct counts busy time only, loaded "
            "includes idle time. API costs are those of the same open model at the median host"
            f"{_known(report)} ({report.apis.source}, as of {report.apis.at}). A negative saving means that the API "
            "would have been cheaper."
        )
    else:
        text = "No cost data: no node has a price in the configuration."
    return _section("5. Cost", [_p(text, BODY), Spacer(1, 4), _table(head, rows)])


def _average(report: Judged) -> str:
    if (price := report.cost.average_per_m) is None:
        return "No token was answered by a node with a price."
    return f"Weighted average: {wording.money(price, report.cost.currency)} per million tokens (M)."


def _known(report: Judged) -> str:
    covered = report.apis.covered
    return "" if covered is None else f"; a price is known for {wording.share(covered)} of the tokens"


def _uptime(report: Judged) -> list[Any]:
    u = report.uptime
    if not u.nodes:
        return _section("6. Uptime", [_p("No data.", BODY)])
    asked = u.requests_ok + u.requests_bad
    answered = f"{wording.share(u.request_share, 3)} of {wording.count(asked)} requests were answered."
    text = f"{answered if asked else 'No request was answered or failed.'} {_swaps(report)}"
    rows = [
        (n.node, wording.share(n.share, 2), *map(wording.span, (n.up_s, n.idle_s, n.down_s, n.excused_s, n.unknown_s)))
        for n in u.nodes
    ]
    nodes = _table(("Node", "Uptime", "Serving", "No model ready", "Down", "Excused", "Unknown"), rows)
    return _section("6. Uptime", [_p(text, BODY), Spacer(1, 4), nodes, Spacer(1, 8), *_incidents(report)])


def _swaps(report: Judged) -> str:
    swaps = report.swaps
    if not swaps.flipped + swaps.failed:
        return "No model was swapped."
    longest = "" if swaps.longest_s is None else f"; the longest took {wording.span(swaps.longest_s)}"
    return f"Model swaps: {swaps.flipped} succeeded, {swaps.failed} failed{longest}."


def _incidents(report: Judged) -> list[Any]:
    incidents = report.uptime.incidents
    if not incidents:
        return [_p("No incidents.", BODY)]
    rows = [
        (
            f"{local(i.start_ms, report.timezone):%m-%d %H:%M:%S}",
            wording.span((i.end_ms - i.start_ms) / 1000) if i.end_ms is not None else "ongoing",
            *(i.node, i.scope, i.text, i.fix),
        )
        for i in incidents[:40]
    ]
    more = [_p(f"{len(incidents) - 40} more in the JSON report", SMALL)] if len(incidents) > 40 else []
    widths = (0.14, 0.08, 0.12, 0.16, 0.26, 0.24)
    return [_table(("Start", "Duration", "Node", "Scope", "Cause", "Fix"), rows, widths=widths, left=6), *more]


def _recommendations(report: Judged) -> list[Any]:
    if not report.recommendations:
        text = "No data." if report.empty else "No changes recommended."
        return _section("7. Recommendations", [_p(text, BODY)])
    rows = [(r.kind, r.text, r.because) for r in report.recommendations[:30]]
    table = _table(("Kind", "Recommendation", "Reason"), rows, widths=(0.14, 0.38, 0.48), left=3)
    return _section("7. Recommendations", [table])


def _method(report: Judged) -> list[Any]:
    covering = f", covering {wording.share(report.covered)} of the nodes' time since their first report"
    text = (
        f"Source: {wording.count(report.batches)} telemetry batches{covering if report.covered is not None else ''}. "
        "Percentiles are within 1.1 % of the exact values. Tokens and requests "
        "are counted once, at the gateway. A gap in telemetry counts as unknown, never as up. Each node's cost is "
        "allocated to its models by their busy seconds; the remainder is idle."
    )
    return [Spacer(1, 12), KeepTogether([_p("Method", HEAD), _p(text, SMALL)])]


def _section(title: str, body: list[Any]) -> list[Any]:
    return [KeepTogether([_p(title, SECTION), *body[:3]]), *body[3:]]


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    widths: Sequence[float] | None = None,
    left: int = 1,
    text_from: int | None = None,
) -> Table:
    """A plain table, its first column wide if no ``widths`` are given. The first ``left`` columns, and those from
    ``text_from`` on, are text; the others are numbers."""
    if widths is None:
        widths = [0.26, *((1 - 0.26) / (len(head) - 1) for _ in head[1:])]

    def is_text(n: int) -> bool:
        return n < left or (text_from is not None and n >= text_from)

    cells = [[_p(h, HEAD if is_text(n) else HEAD_RIGHT) for n, h in enumerate(head)]]
    cells += [[_p(value, CELL if is_text(n) else NUMBER) for n, value in enumerate(row)] for row in rows]
    return _styled(Table(cells, colWidths=[WIDTH * w for w in widths], repeatRows=1))


def _styled(table: Table) -> Table:
    lines = [("LINEBELOW", (0, 0), (-1, 0), 0.8, LINE), ("LINEBELOW", (0, 1), (-1, -1), 0.35, LINE)]
    table.setStyle(TableStyle([*lines, ("VALIGN", *ALL, "MIDDLE"), *_padding(top=3, bottom=3.5, left=3, right=3)]))
    return table


def _footer(report: Judged) -> Any:
    def draw(canvas: Any, document: Any) -> None:
        canvas.saveState()
        canvas.setFont(REGULAR, 7.5)
        canvas.setFillColor(SOFT)
        canvas.drawString(MARGIN, 10 * mm, f"mlxrack · rack {report.rack} · {_period(report)}")
        canvas.drawRightString(A4[0] - MARGIN, 10 * mm, f"page {document.page}")
        canvas.restoreState()

    return draw


def _p(text: str, style: ParagraphStyle) -> Paragraph:
    """A paragraph; long words may break anywhere, because model names contain no spaces."""
    cut = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
    return Paragraph(escape(cut), style.clone(f"{style.name}-w", splitLongWords=1))
