"""The monthly report as figures and sentences; how it looks is decided elsewhere. Pure.

Every figure comes from what nodes reported. What was not reported is None and reads "no data"; nothing is estimated.
"""

from collections.abc import Sequence

import msgspec

from aggregator import api_prices, cost, eviction, placement, scorecard, uptime
from aggregator.annotations import Annotation
from aggregator.calendar import days, local
from aggregator.config import AggregatorConfig
from aggregator.window import Latency, ServedSum, Window, seconds
from shared.records import SwapFinished, ThrottleEvent
from shared.sketch import Sketch

HOT_MC = 95_000
THROTTLED_TARGET = 0.01
UPTIME_TARGET = 0.999
ITL_TARGET_US = 100_000
IDLE_NODE = 0.02


class ModelVolume(msgspec.Struct, frozen=True, kw_only=True):
    """One served name. Latencies in microseconds, within 1.1 %."""

    model: str
    requests: int
    prompt_tok: int
    cached_tok: int
    completion_tok: int
    ttft_p50_us: float | None
    ttft_p95_us: float | None
    itl_p95_us: float | None


class Day(msgspec.Struct, frozen=True, kw_only=True):
    """Answered requests and tokens of one day in the rack's zone."""

    date: str
    requests: int
    tokens: int


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of the rack."""

    requests: int
    failed: int
    refused: int
    cancelled: int
    prompt_tok: int
    completion_tok: int
    models: tuple[ModelVolume, ...]
    days: tuple[Day, ...]
    itl_p95_us: float | None


class NodeHeat(msgspec.Struct, frozen=True, kw_only=True):
    """One node's heat; peaks in thousandths of a degree."""

    node: str
    peak_package_mc: int | None
    peak_pcore_mc: int | None
    throttle_events: int
    throttled_share: float | None


class Thermal(msgspec.Struct, frozen=True, kw_only=True):
    """Heat of the rack and what to do about the room."""

    nodes: tuple[NodeHeat, ...]
    advice: str


class Swaps(msgspec.Struct, frozen=True, kw_only=True):
    """Hot swaps of the month."""

    flipped: int
    failed: int
    longest_s: float | None


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """``kind`` is placement, capacity, retirement or operations."""

    kind: str
    text: str
    because: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The month. ``covered`` is the share of node time, since each node's first report, that telemetry covers."""

    rack: str
    period: str
    timezone: str
    empty: bool
    headline: str
    covered: float | None
    batches: int
    volume: Volume
    thermal: Thermal
    evictions: eviction.EvictionReport
    distribution: placement.PlacementReport
    cost: cost.CostReport
    apis: api_prices.Comparisons
    uptime: uptime.Uptime
    swaps: Swaps
    scorecard: tuple[scorecard.Line, ...]
    recommendations: tuple[Recommendation, ...]


def compose(window: Window, config: AggregatorConfig, now_ms: int, annotations: Sequence[Annotation] = ()) -> Report:
    """The report of one month up to ``now_ms``."""
    volume = _volume(window)
    heat = _thermal(window)
    money = cost.compute(window, config)
    until = local(window.span.until_ms, "UTC")
    apis = api_prices.compare(window, money, config, until)
    map_ = placement.propose(window, config.placement)
    up = uptime.uptime(window, now_ms, annotations)
    evicted = eviction.report(window)
    known = sum(n.up_s + n.idle_s + n.down_s for n in up.nodes)
    total = known + sum(n.unknown_s for n in up.nodes)
    return Report(
        rack=config.rack,
        period=window.span.name,
        timezone=window.span.timezone,
        empty=not window.batches,
        headline=_headline(window, volume, up, money),
        covered=known / total if total else None,
        batches=window.batches,
        volume=volume,
        thermal=heat,
        evictions=evicted,
        distribution=map_,
        cost=money,
        apis=apis,
        uptime=up,
        swaps=_swaps(window),
        scorecard=scorecard.lines(window, up, apis, config.scorecard),
        recommendations=tuple(_recommendations(window, heat, map_, money, up, evicted)),
    )


def _headline(window: Window, volume: Volume, up: uptime.Uptime, money: cost.CostReport) -> str:
    if not window.batches:
        return f"No node reported anything in {window.span.name}."
    answered = f"The rack answered {volume.requests:,} requests with {volume.completion_tok:,} tokens"
    share = up.request_share
    kept = f", {share:.2%} of those it should have" if share is not None else ""
    price = f", at {money.average_per_m:,.2f} {money.currency} per million tokens" if money.average_per_m else ""
    return f"{answered}{kept}{price}."


def _volume(window: Window) -> Volume:
    ok = [s for s in window.served if s.outcome == "ok"]
    outcomes = {o: sum(s.requests for s in window.served if s.outcome == o) for o in ("failed", "refused", "cancelled")}
    times = [one for one in window.latencies if one.outcome == "ok"]
    return Volume(
        requests=sum(s.requests for s in ok),
        failed=outcomes["failed"],
        refused=outcomes["refused"],
        cancelled=outcomes["cancelled"],
        prompt_tok=sum(s.prompt_tok for s in ok),
        completion_tok=sum(s.completion_tok for s in ok),
        models=tuple(_model(name, ok, times) for name in sorted({s.model for s in ok})),
        days=tuple(_days(window)),
        itl_p95_us=_merged(times, "itl_us").quantile(0.95),
    )


def _model(name: str, ok: Sequence[ServedSum], times: Sequence[Latency]) -> ModelVolume:
    mine = [s for s in ok if s.model == name]
    slow = [one for one in times if one.model == name]
    ttft = _merged(slow, "ttft_us")
    return ModelVolume(
        model=name,
        requests=sum(s.requests for s in mine),
        prompt_tok=sum(s.prompt_tok for s in mine),
        cached_tok=sum(s.cached_tok for s in mine),
        completion_tok=sum(s.completion_tok for s in mine),
        ttft_p50_us=ttft.quantile(0.5),
        ttft_p95_us=ttft.quantile(0.95),
        itl_p95_us=_merged(slow, "itl_us").quantile(0.95),
    )


def _merged(times: Sequence[Latency], name: str) -> Sketch:
    whole = Sketch()
    for one in times:
        whole.merge(one.sketch(name))
    return whole


def _days(window: Window) -> list[Day]:
    sums = {day.name: [0, 0] for day in days(window.span)}
    for asked in window.asked:
        day = local(asked.slot_ms, window.span.timezone).date().isoformat()
        if asked.outcome == "ok" and day in sums:
            sums[day][0] += asked.requests
            sums[day][1] += asked.prompt_tok + asked.completion_tok
    return [Day(date=day, requests=requests, tokens=tokens) for day, (requests, tokens) in sums.items()]


def _thermal(window: Window) -> Thermal:
    nodes = tuple(_heat(window, node) for node in window.nodes)
    return Thermal(nodes=nodes, advice=_ambient(nodes))


def _heat(window: Window, node: str) -> NodeHeat:
    host = window.host(node)
    return NodeHeat(
        node=node,
        peak_package_mc=host.package_temp_mc if host is not None else None,
        peak_pcore_mc=host.pcore_temp_mc if host is not None else None,
        throttle_events=sum(m.node == node and not event.open_at_start for m, event in window.of(ThrottleEvent)),
        throttled_share=window.throttled_share(node),
    )


def _ambient(nodes: Sequence[NodeHeat]) -> str:
    hot = [n.node for n in nodes if max(n.peak_package_mc or 0, n.peak_pcore_mc or 0) >= HOT_MC]
    throttled = [n.node for n in nodes if (n.throttled_share or 0) > THROTTLED_TARGET]
    if throttled:
        return f"Give {', '.join(throttled)} more air or cooler intake: heat slowed them for over 1 % of the time."
    if hot:
        return f"{', '.join(hot)} came to 95 °C or more without losing speed; leave no less air than there is."
    if any(n.peak_package_mc is not None or n.throttled_share is not None for n in nodes):
        return "Nothing to change: no node was slowed by heat."
    return "No data: no node could read a temperature or a pressure level."


def _swaps(window: Window) -> Swaps:
    swaps = [r for _, r in window.of(SwapFinished)]
    return Swaps(
        flipped=sum(s.outcome == "flipped" for s in swaps),
        failed=sum(s.outcome == "failed" for s in swaps),
        longest_s=max((s.window_us / 1e6 for s in swaps), default=None),
    )


def _recommendations(
    window: Window,
    heat: Thermal,
    map_: placement.PlacementReport,
    money: cost.CostReport,
    up: uptime.Uptime,
    evicted: eviction.EvictionReport,
) -> list[Recommendation]:
    found = [Recommendation(kind="capacity", text="make room", because=text) for text in map_.short]
    found += [
        Recommendation(kind="placement", text=f"{m.action} {m.model} on {m.node}", because=m.reason) for m in map_.moves
    ]
    cache = {setting.reason for setting in map_.settings}
    found += [
        Recommendation(kind="placement", text=note, because="prompt-cache hits" if note in cache else "placement")
        for note in map_.notes
    ]
    found += [
        Recommendation(
            kind="capacity",
            text=f"add memory or a node for {row.model}",
            because=f"evicted {row.evictions} times from {row.node}: {row.hint}",
        )
        for row in evicted.rows
        if row.verdict == "placement" and row.evictions > 1
    ]
    touched = {m.node for m in map_.moves} | {m.source for m in map_.moves}
    if len(map_.nodes) > 1 and not map_.short:
        found += [
            Recommendation(
                kind="retirement",
                text=f"{n.node} may be given another task",
                because=f"its models worked {n.busy_share:.1%} of the time it reported",
            )
            for n in map_.nodes
            if n.busy_share is not None
            and n.busy_share < IDLE_NODE
            and n.node not in touched
            and _reported_days(window, n.node) >= 7
        ]
    found += [
        Recommendation(kind="operations", text=f"look into {i.scope} on {i.node}", because=f"{i.text}; {i.fix}")
        for i in up.incidents
        if i.end_ms is None
    ]
    found += [
        Recommendation(kind="operations", text=f"find out why {n.node} is down so often", because=f"up {n.share:.2%}")
        for n in up.nodes
        if n.share is not None and n.share < UPTIME_TARGET
    ]
    found += [
        Recommendation(kind="operations", text=f"cost of {m.model}", because=m.change.text)
        for m in money.models
        if m.change is not None and m.change.flagged
    ]
    if heat.advice.startswith("Give"):
        found.append(Recommendation(kind="operations", text=heat.advice, because="thermal telemetry"))
    return found


def _reported_days(window: Window, node: str) -> float:
    return seconds(window.reported(node)) / 86_400
