"""What each weekly artifact says, as a page. Pure."""

from aggregator.api_prices import Comparisons
from aggregator.calendar import local
from aggregator.cost import CostReport
from aggregator.economics import Economics
from aggregator.eviction import EvictionReport
from aggregator.packing import WHOLE
from aggregator.placement import PlacementReport
from aggregator.report.page import Curve, Page, Section, table
from aggregator.report.wording import NO_DATA, count, gb, money, share, span
from aggregator.scorecard import Line
from aggregator.uptime import NodeUptime, Uptime


def placement(report: PlacementReport, rack: str) -> Page:
    """Which model on which node; what does not fit comes first."""
    lead = "Every model stands well where it is." if report.placed or report.nodes else "No node reported anything."
    if report.moves:
        lead = f"{len(report.moves)} steps would put the models where their work fits."
    if report.short:
        lead = report.short[0]
    sections = [
        Section(title="What does not fit", points=report.short) if len(report.short) > 1 else None,
        _moves(report) if report.moves else None,
        Section(title="Settings and remarks", points=report.notes) if report.notes else None,
        Section(
            title="Nodes",
            text=(_proof(report),) if report.gap is not None else (),
            table=table(
                "Node | Model memory | Held | After | Speed | Load now | After | Limit | Busy | Throttled",
                [
                    (
                        n.node,
                        gb(n.budget_bytes),
                        gb(n.held_bytes),
                        gb(n.held_after_bytes),
                        f"{n.speed:.2f}",
                        share(n.load),
                        share(n.load_after),
                        share(n.limit),
                        share(n.busy_share),
                        share(n.throttled_share),
                    )
                    for n in report.nodes
                ],
                range(1, 10),
            ),
        ),
        Section(
            title="Models",
            table=table(
                "Model | Node | Version | Needs | Busy | Requests | Advice | Reason",
                [
                    (
                        p.model,
                        p.node,
                        p.version[:8],
                        gb(p.need_bytes),
                        share(p.busy_share),
                        count(p.requests),
                        p.advice,
                        p.reason,
                    )
                    for p in report.placed
                ],
                (3, 4, 5),
            ),
        ),
    ]
    foot = (
        "Load is the 95th percentile of five-minute windows, in the node's own time; busy is the mean. Moves are steps "
        "that can be carried out in this order: no node's memory is overdrawn and no model without a copy meanwhile."
    )
    return Page(title=f"Placement, rack {rack}, {report.period}", lead=lead, sections=_there(sections), foot=foot)


def _moves(report: PlacementReport) -> Section:
    rows = [
        (
            str(m.step),
            f"{m.action} {m.model} on {m.node}" + (" for a while" if m.parked else ""),
            m.source or "",
            f"{m.gb:.1f} GB" if m.gb else "",
            span(m.load_s) if m.load_s is not None else "",
            f"{m.load_before:.0%} → {m.load_after:.0%}",
            f"{gb(m.free_before_bytes)} → {gb(m.free_after_bytes)}",
            m.bound,
            m.reason,
            m.declined,
        )
        for m in report.moves
    ]
    return Section(
        title="Moves, in this order",
        text=("`mlxrack-aggregator apply` publishes them as the rack's desired state.",),
        table=table(
            "Step | Do | Instead of | Reads | About | Load of the node | Free there | Limit | Why | Declined",
            rows,
            (0, 3, 4),
        ),
    )


def _proof(report: PlacementReport) -> str:
    which = "No placement" if len(report.nodes) <= WHOLE else "None of the placements that were looked at"
    return f"{which} is better by more than {max(report.gap or 0.0, 0.005):.1%} of its score: this is proven."


def cost(report: CostReport, apis: Comparisons, rack: str, before: str) -> Page:
    """What a million tokens cost, and what they would have cost elsewhere."""
    flagged = [m for m in report.models if m.change is not None and m.change.flagged]
    return Page(
        title=f"Cost per million tokens, rack {rack}, {report.period}",
        lead=_cost_lead(report, apis, len(flagged)),
        sections=_there(
            [
                Section(
                    title="Look at these first",
                    points=tuple(f"{m.model}: {m.change.text}" for m in flagged if m.change is not None),
                )
                if flagged
                else None,
                *_models(report, before),
                _changes(report, before),
                _apis(apis, report.currency),
                _rows(report),
                _nodes(report),
                _keys(report),
            ]
        ),
        foot=(
            "Direct counts the seconds in which a model's loader worked; loaded adds its nodes' idle time; the floor "
            "is the price if nodes were never idle and always as full as in their best five minutes. A cached prompt "
            "token takes no time of its own. Tokens are counted once, by our tokenizers; APIs count with theirs."
        ),
    )


def _cost_lead(report: CostReport, apis: Comparisons, flagged: int) -> str:
    if not report.priced:
        return "No node of this period has a price in the configuration: add `price` to [[nodes]] to see money here."
    text = f"{money(report.average_per_m, report.currency)} per million tokens on average, all node time included"
    if apis.saving is not None and apis.share is not None:
        word = "less than" if apis.saving >= 0 else "more than"
        text += f": {share(abs(apis.share))} {word} the same open models at API hosts in the middle of the range"
    if flagged:
        text += f"; {flagged} model{'s' if flagged > 1 else ''} jumped"
    if report.unpriced_nodes:
        text += f". Without a price: {', '.join(report.unpriced_nodes)}"
    return f"{text}."


def _models(report: CostReport, before: str) -> list[Section]:
    c = report.currency
    work = [
        (
            m.model,
            count(m.requests),
            count(m.prompt_tok),
            share(m.cached_tok / m.prompt_tok) if m.prompt_tok else NO_DATA,
            count(m.completion_tok),
            span(m.busy_s),
            money(m.direct, c),
            money(m.loaded, c),
        )
        for m in report.models
    ]
    prices = [
        (
            m.model,
            money(m.loaded_per_m, c),
            money(m.direct_per_m, c),
            money(m.floor_per_m, c),
            money(m.uncached_per_m, c),
            money(m.cached_per_m, c),
            money(m.output_per_m, c),
            money(m.last_loaded_per_m, c),
            f"{m.change.ratio:.2f} x" if m.change is not None else NO_DATA,
            f"{m.change.direct_ratio:.2f} x" if m.change is not None else NO_DATA,
        )
        for m in report.models
    ]
    return [
        Section(
            title="Per million tokens",
            table=table(
                f"Model | Loaded | Direct | Floor | Uncached | Cached | Answer | {before} | Change | Of direct",
                prices,
                range(1, 10),
            ),
        ),
        Section(
            title="Work and money",
            table=table(
                "Model | Requests | Prompt tokens | Cached | Answer tokens | Busy | Direct cost | Loaded cost",
                work,
                range(1, 8),
            ),
        ),
    ]


def _changes(report: CostReport, before: str) -> Section | None:
    changed = [m for m in report.models if m.change is not None]
    if not changed:
        return None
    signed = []
    for m in changed:
        assert m.change is not None
        for name, terms in (("loaded", m.change.terms), ("direct", m.change.direct_terms)):
            parts = [_signed(getattr(terms, term)) for term in _TERMS]
            remark = m.change.text if name == "loaded" else ""
            signed.append((f"{m.model}, {name}", *parts, _signed(terms.total), remark))
    return Section(
        title=f"What changed since {before}",
        text=(f"In {report.currency} per million tokens; the parts add up to the change.",),
        table=table(
            "Model | Rate | Idle time | Cache misses | Prefill time | Decode time | Mix | Together | Remark",
            signed,
            range(1, 8),
        ),
    )


_TERMS = ("rate", "utilisation", "cache", "prefill", "decode", "mix")


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) >= 0.00005 else "0"


def _apis(apis: Comparisons, currency: str) -> Section:
    rows = []
    for one in apis.models:
        spread = f"{money(one.lowest, currency)} to {money(one.highest, currency)}" if one.hosts else one.why_not
        times = f"{one.times_cheaper:.1f} x" if one.times_cheaper is not None else ""
        rows.append(
            (
                one.model,
                money(one.ours, currency),
                one.same_as or NO_DATA,
                money(one.median, currency),
                spread,
                str(len(one.hosts)),
                money(one.saving, currency),
                share(one.share),
                one.frontier,
                money(one.frontier_cost, currency) if one.frontier else "",
                times,
            )
        )
    covered = f"A comparable price is known for {share(apis.covered)} of the tokens; savings speak of those alone."
    return Section(
        title="The same work at APIs",
        text=(
            (
                f"{covered} Prices: {apis.source}, as of {apis.at}. Negative savings mean that an API would have been "
                "cheaper. A frontier model is another model: its price says what replacing it saves, not what is equal."
            ),
        ),
        table=table(
            "Model | Here | Same model | Median | Range | Hosts | Saving | Share | Frontier | Its cost | Cheaper",
            rows,
            (1, 3, 5, 6, 7, 9, 10),
        ),
    )


def _rows(report: CostReport) -> Section | None:
    if not report.priced:
        return None
    names = {"idle": "idle", "unattributed": "work that answered nobody"}
    return Section(
        title="Where the money went",
        text=(f"Rows add up to {money(report.total, report.currency)}.",),
        table=table(
            "Node | For | Busy | Cost",
            [(r.node, names.get(r.kind, r.model), span(r.busy_s), f"{r.cost:,.6f}") for r in report.rows],
            (2, 3),
        ),
    )


def _nodes(report: CostReport) -> Section:
    return Section(
        title="Nodes",
        table=table(
            "Node | Reported | Busy | Watts | Measured by | Per hour | Cost | Idle",
            [
                (
                    n.node,
                    span(n.reported_s),
                    span(n.busy_s),
                    f"{n.watts:.1f}" if n.watts is not None else NO_DATA,
                    n.power,
                    money(n.rate_per_h, report.currency),
                    money(n.cost, report.currency),
                    money(n.idle, report.currency),
                )
                for n in report.nodes
            ],
            (1, 2, 3, 5, 6, 7),
        ),
    )


def _keys(report: CostReport) -> Section | None:
    if not any(k.key_id for k in report.keys):
        return None
    return Section(
        title="Client keys",
        table=table(
            "Key | Requests | Prompt tokens | Answer tokens | Cost, idle included",
            [
                (
                    k.key_id or "(without a key)",
                    count(k.requests),
                    count(k.prompt_tok),
                    count(k.completion_tok),
                    money(k.cost, report.currency),
                )
                for k in report.keys
            ],
            (1, 2, 3, 4),
        ),
    )


def evictions(report: EvictionReport, rack: str) -> Page:
    """Who had to leave memory, and whether that was right."""
    wrong = sum(r.verdicts.get("placement", 0) for r in report.rows)
    lead = "No model had to leave memory."
    if report.total:
        lead = f"{report.total:,} evictions; {wrong:,} of those below are a matter of placement, not of traffic."
    rows = [
        (
            r.node,
            r.model,
            str(r.evictions),
            ", ".join(f"{n} {verdict}" for verdict, n in r.verdicts.items()),
            gb(r.bytes),
            count(r.requests_last_hour),
            ", ".join(r.made_room_for) or "-",
            "-" if r.wanted_again_s is None else span(r.wanted_again_s),
            r.verdict,
            r.hint,
        )
        for r in report.rows
    ]
    more = (f"{report.left_out} more models were evicted less often.",) if report.left_out else ()
    columns = (
        "Node | Model | Evictions | Of them | Memory | Requests in the hours before | Made room for | "
        "Wanted again after | Verdict | Evidence"
    )
    section = Section(title="The most evicted", text=more, table=table(columns, rows, (2, 4, 5, 7)))
    return Page(title=f"Evictions, rack {rack}, {report.period}", lead=lead, sections=(section,))


def uptime(report: Uptime, period: str, zone: str, rack: str, remarks: tuple[str, ...] = ()) -> Page:
    """When the rack and its nodes answered, and what went wrong."""
    lead = "No node reported anything."
    if report.rack.share is not None:
        known = report.rack.up_s + report.rack.idle_s + report.rack.down_s
        lead = f"The rack was up {report.rack.share:.3%} of the time that is known"
        if report.rack.idle_s > 0.001 * known:
            lead += f" (with a model ready {report.rack.up_s / known:.3%})"
        if report.request_share is not None:
            asked = report.requests_ok + report.requests_bad
            lead += f" and answered {report.request_share:.3%} of {asked:,} requests"
        lead += f"; {span(report.rack.unknown_s)} are unknown." if report.rack.unknown_s >= 1 else "."
    lost = remarks
    if report.lost_batches:
        lost = (f"{report.lost_batches:,} windows of telemetry were lost or have not arrived.", *remarks)
    return Page(
        title=f"Uptime, rack {rack}, {period}",
        lead=lead,
        sections=(
            Section(
                title="Nodes",
                text=lost,
                table=table(
                    "Node | Serving | Without a model | Down | Unknown | Up",
                    [_uptime_row("the rack", report.rack), *(_uptime_row(n.node, n) for n in report.nodes)]
                    if report.nodes
                    else [],
                    (1, 2, 3, 4, 5),
                ),
            ),
            Section(
                title="Incidents",
                table=table(
                    "Start | Node | What | For | Times | Cause | Fix | Confirmed",
                    [
                        (
                            f"{local(i.start_ms, zone):%d %b %H:%M}",
                            i.node,
                            i.scope,
                            "lasts" if i.end_ms is None else span((i.end_ms - i.start_ms) / 1000),
                            str(i.times),
                            i.text,
                            i.fix,
                            "yes" if i.confirmed else "no",
                        )
                        for i in report.incidents
                    ],
                    (3, 4),
                )
                if report.incidents
                else None,
                text=() if report.incidents else ("None.",),
            ),
        ),
        foot=(
            "Up is the time a node reported by the time it is known to have reported or to have been down. A gap that "
            "nothing explains is unknown and counts neither way. Causes are guessed by rule until somebody confirms "
            f"them in annotations/v1/incidents.toml. Times are in {zone}."
        ),
    )


def _uptime_row(name: str, n: NodeUptime) -> tuple[str, ...]:
    up = f"{n.share:.3%}" if n.share is not None else NO_DATA
    return (name, span(n.up_s), span(n.idle_s), span(n.down_s), span(n.unknown_s), up)


def scorecard(lines: tuple[Line, ...], period: str, rack: str) -> Page:
    """The promises and whether they were kept."""
    kept, missed = sum(one.kept is True for one in lines), sum(one.kept is False for one in lines)
    unknown = len(lines) - kept - missed
    lead = f"{kept} kept, {missed} missed" + (f", {unknown} without data" if unknown else "") + "."
    rows = [
        (one.name, one.text, _target(one), {True: "kept", False: "missed", None: NO_DATA}[one.kept]) for one in lines
    ]
    section = Section(title="Promises", table=table("Promise | As it was | Target | Verdict", rows))
    return Page(title=f"Scorecard, rack {rack}, {period}", lead=lead, sections=(section,))


def _target(line: Line) -> str:
    if line.unit == "times":
        return f"at least {line.target:g} times cheaper"
    if line.unit == "share":
        return f"{'at least' if line.name == 'uptime' else 'at most'} {line.target:.1%}"
    return f"at most {line.target:g} {line.unit}"


def economics(report: Economics, currency: str) -> Page:
    """Whether to buy."""
    i = report.inputs
    labels = ("the start", *(f"month {m.month}" for m in report.months))
    curve = Curve(
        title="Saved less paid",
        labels=labels,
        lines=(("balance", (-float(report.paid), *(float(m.balance) for m in report.months))),),
        unit=currency,
    )
    hinge_rows = [
        (
            h.name.replace("_", " "),
            f"{h.value:,.6g}",
            _month(h.lower),
            _month(h.higher),
            f"{h.swing} month{'' if h.swing == 1 else 's'}",
        )
        for h in report.hinges
    ]
    return Page(
        title=f"Buying {i.nodes} nodes",
        lead=report.sentence,
        sections=(
            Section(
                title="The curve",
                text=(
                    (
                        f"Paid at the start: {money(report.paid, currency)}; running cost of the rack: "
                        f"{money(report.running, currency)} a month. {share(i.kept)} of the API work moves to it. "
                        f"What the nodes are worth at the end ({money(report.worth_at_end, currency)}) is not counted."
                    ),
                    report.rule_of_thumb,
                ),
                curve=curve,
            ),
            Section(
                title="What it hinges on",
                text=("The break-even month if one figure were a fifth lower or higher and the others as they are.",),
                table=table("Figure | Yours | A fifth lower | A fifth higher | Moves it by", hinge_rows, (1, 2, 3, 4)),
            ),
            Section(
                title="Month by month",
                table=table(
                    "Month | APIs alone | With the rack | Balance",
                    [
                        (
                            str(m.month),
                            money(m.api_only, currency),
                            money(m.with_rack, currency),
                            money(m.balance, currency),
                        )
                        for m in report.months
                    ],
                    (0, 1, 2, 3),
                ),
            ),
        ),
    )


def _month(month: int | None) -> str:
    return "never" if month is None else f"month {month}"


def _there(sections: list[Section | None]) -> tuple[Section, ...]:
    return tuple(section for section in sections if section is not None)
