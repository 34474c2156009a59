"""The page of costs: prices per million tokens, their changes, APIs, and where the money went. Pure."""

from collections.abc import Sequence

from aggregator.api_prices import Comparisons, against, utilisation
from aggregator.cost import CostReport
from aggregator.cost_change import Terms
from aggregator.phrases import counted
from aggregator.report.page import Page, Section, page_of, table
from aggregator.report.wording import NO_DATA, count, money, saved, share, span
from aggregator.scorecard import frontier


def page(report: CostReport, apis: Comparisons, rack: str, before: str) -> Page:
    """What a million tokens cost, and what they would have cost elsewhere."""
    flagged = [f"{m.model}: {m.change.text}" for m in report.models if m.change is not None and m.change.flagged]
    return page_of(
        f"Cost per million tokens, rack {rack}, {report.period}",
        _lead(report, apis, len(flagged)),
        [
            Section(title="Look at these first", points=tuple(flagged)) if flagged else None,
            _prices(report, before),
            _work(report),
            _changes(report, before),
            _apis(apis, report.currency),
            _rows(report),
            _nodes(report),
        ],
        "Direct counts the seconds in which a model's loader worked; loaded adds its nodes' idle time, not the time in "
        "which they were silent or worked for nobody; the floor "
        "is the price if nodes were never idle and always as full as in their best five minutes. A cached prompt "
        "token takes no time of its own. Tokens are counted once, by our tokenizers; APIs count with theirs.",
    )


def _lead(report: CostReport, apis: Comparisons, flagged: int) -> str:
    if not report.nodes:
        return "No node reported anything."
    if report.total is None:
        return "No node of this period has a price in the configuration: add `price` to [[nodes]] to see money here."
    text = f"{money(report.total, report.currency)} in all, and no token was computed by a node with a price"
    if report.average_per_m is not None:
        text = f"{money(report.average_per_m, report.currency)} per million tokens on average, all node time included"
    if apis.share is not None:
        text += f": {against(apis.share, 'the same open models at API hosts in the middle of the range')}"
        text += f" ({busy})" if (busy := utilisation(apis)) else ""
    if flagged:
        text += f"; {counted(flagged, 'model')} jumped"
    if report.unpriced_nodes:
        text += f". Without a price: {', '.join(report.unpriced_nodes)}"
    return f"{text}."


def _prices(report: CostReport, before: str) -> Section:
    rows = []
    for m in report.models:
        own = (m.loaded_per_m, m.direct_per_m, m.floor_per_m, m.uncached_per_m, m.cached_per_m, m.output_per_m)
        ratios = (m.change.ratio, m.change.direct_ratio) if m.change is not None else (None, None)
        rows.append(
            (
                m.model,
                *(money(price, report.currency) for price in (*own, m.last_loaded_per_m)),
                *(f"{ratio:.2f} x" if ratio is not None else NO_DATA for ratio in ratios),
            )
        )
    columns = f"Model | Loaded | Direct | Floor | Uncached | Cached | Answer | {before} | Change | Of direct"
    return Section(title="Per million tokens", table=table(columns, rows, range(1, 10)))


def _work(report: CostReport) -> Section:
    """Models, and what is in none of them, add up to the total."""
    models = [
        (
            *(m.model, count(m.requests), count(m.prompt_tok)),
            share(m.cached_tok / m.prompt_tok if m.prompt_tok else None),
            *(count(m.completion_tok), span(m.busy_s)),
            *(money(m.direct, report.currency), money(m.loaded, report.currency)),
        )
        for m in report.models
    ]
    rest = [
        (name, *[""] * 5, "", money(value, report.currency))
        for name, value in (
            ("idle time of no model", report.unshared),
            ("silent time", report.silent),
            ("work that answered nobody", report.unattributed),
        )
        if value
    ]
    prompt, cached, answer = (
        sum(getattr(m, f"{n}_tok") for m in report.models) for n in ("prompt", "cached", "completion")
    )
    total = (
        *(
            "Total",
            count(sum(m.requests for m in report.models)),
            count(prompt),
            share(cached / prompt if prompt else None),
        ),
        *(count(answer), span(sum(m.busy_s for m in report.models)), "", money(report.total, report.currency)),
    )
    columns = "Model | Requests | Prompt tokens | Cached | Answer tokens | Busy | Direct cost | Loaded cost"
    rows = [*models, *rest, total]
    return Section(title="Work and money", text=populations(report), table=table(columns, rows, range(1, 8)))


def populations(report: CostReport) -> tuple[str, ...]:
    """What counts where, if some nodes have a price and others none."""
    if not report.priced or not report.unpriced_nodes:
        return ()
    whole = sum(m.tokens for m in report.models)
    part = f", which computed {share(report.tokens / whole)} of the tokens" if whole else ""
    return (f"Work is that of all nodes; money and prices are those of the nodes with a price{part}.",)


def _changes(report: CostReport, before: str) -> Section | None:
    rows = []
    for model, change in ((m.model, m.change) for m in report.models):
        if change is not None:
            rows.append((f"{model}, loaded", *_signed(change.terms), change.text))
            rows.append((f"{model}, direct", *_signed(change.direct_terms), ""))
    columns = "Model | Rate | Idle time | Cache misses | Prefill time | Decode time | Mix | Together | Remark"
    text = f"In {report.currency} per million tokens; the parts add up to the change."
    title = f"What changed since {before}"
    return Section(title=title, text=(text,), table=table(columns, rows, range(1, 8))) if rows else None


def _signed(terms: Terms) -> Sequence[str]:
    parts = (terms.rate, terms.utilisation, terms.cache, terms.prefill, terms.decode, terms.mix, terms.total)
    return [f"{value:+.4f}" if abs(value) >= 0.00005 else "0" for value in parts]


def _apis(apis: Comparisons, currency: str) -> Section:
    rows = [
        (
            *(one.model, money(one.ours, currency), one.same_as or NO_DATA, money(one.median, currency)),
            f"{money(one.lowest, currency)} to {money(one.highest, currency)}" if one.hosts else one.why_not,
            *(str(len(one.hosts)), money(one.saving, currency), saved(one.share)),
            *(one.frontier, money(one.frontier_cost, currency) if one.frontier else ""),
            frontier(one.times_cheaper, None) if one.times_cheaper is not None else "",
        )
        for one in apis.models
    ]
    if apis.median is not None:
        totals = (money(apis.ours, currency), "", money(apis.median, currency), "", "")
        rows.append(("All compared", *totals, money(apis.saving, currency), saved(apis.share), "", "", ""))
    known = f"A comparable price is known for {share(apis.covered)} of the tokens; savings speak of those alone. "
    text = (
        f"{known if apis.covered is not None else ''}Prices: "
        f"{apis.source} (when it gathered them is not known), those of {apis.at}. Negative savings mean that an API "
        "would have been cheaper. A row counts the node time of its model; the last one, like the sentence at the top, "
        "counts its part, by tokens, of all node time. A frontier model is another model: its price says "
        "what replacing it saves, not what is equal."
    )
    columns = "Model | Here | Same model | Median | Range | Hosts | Saving | Share | Frontier | Its cost | Here"
    return Section(title="The same work at APIs", text=(text,), table=table(columns, rows, (1, 3, 5, 6, 7, 9, 10)))


def _rows(report: CostReport) -> Section | None:
    if report.total is None:
        return None
    names = {"idle": "idle", "silent": "silent", "unattributed": "work that answered nobody"}
    rows = [(r.node, names.get(r.kind, r.model), span(r.busy_s + r.quiet_s), f"{r.cost:,.6f}") for r in report.rows]
    return Section(
        title="Where the money went",
        text=(f"Rows add up to {money(report.total, report.currency)}.",),
        table=table("Node | For | Time | Cost", [*rows, ("Total", "", "", f"{report.total:,.6f}")], (2, 3)),
    )


def _nodes(report: CostReport) -> Section:
    rows = [
        (
            *(n.node, span(n.reported_s), span(n.busy_s), span(n.silent_s)),
            *(f"{n.watts:.1f}" if n.watts is not None else NO_DATA, n.power),
            *(money(value, report.currency) for value in (n.rate_per_h, n.cost, n.idle, n.silent)),
        )
        for n in report.nodes
    ]
    reported_s, busy_s, silent_s = (
        sum(getattr(n, name) for n in report.nodes) for name in ("reported_s", "busy_s", "silent_s")
    )
    total = (
        *("Total", span(reported_s), span(busy_s), span(silent_s), "", "", ""),
        *(money(value, report.currency) for value in (report.total, report.idle, report.silent)),
    )
    columns = "Node | Reported | Busy | Silent | Watts | Measured by | Per hour | Cost | Idle | Silent cost"
    return Section(title="Nodes", table=table(columns, [*rows, total], (1, 2, 3, 4, 6, 7, 8, 9)), points=report.hints)
