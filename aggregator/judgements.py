"""One place judges: everything that reports show about a span is decided here, once. Pure.

The weekly reports, the monthly report and every later page read a `Judged`; they lay out figures and sentences and
decide nothing. Every figure comes from what nodes reported. What was not reported is None and reads "no data"; nothing
is estimated.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import msgspec

from aggregator import advice, api_prices, cost, eviction, heat, phrases, placement, scorecard, uptime
from aggregator import volume as volumes
from aggregator.annotations import Annotation, Notes
from aggregator.calendar import local, spoken, utc_days
from aggregator.config import AggregatorConfig
from aggregator.demand import Known
from aggregator.fleet import fleet, judged_until
from aggregator.manifest import Manifest
from aggregator.window import Window
from shared.desired import Moment


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """An object that the store does not give out, since when, and why; its node's later ones wait for it."""

    key: str
    since_ms: int
    reason: str


class Telemetry(msgspec.Struct, frozen=True, kw_only=True):
    """What of a span's telemetry is missing or doubtful, beside how much of the nodes' time it covers.

    ``until_ms`` is how far the span was judged. ``quarantined`` counts the objects in quarantine that are of its UTC
    days, ``foreign`` those of them that are another rack's, ``undated`` those of any time that do not tell theirs;
    ``strangers`` are nodes that write another rack's name alone, with that. ``clock_skew_ms`` are clocks that had to be
    corrected. ``gone`` reported in the span before, and are in no figure of this one; ``unknown_nodes`` are named by an
    operator's notes and reported nothing; ``refused_notes`` says which notes are not used."""

    until_ms: int
    lost_batches: int = 0
    quarantined: int = 0
    foreign: int = 0
    undated: int = 0
    strangers: dict[str, str] = {}
    waiting: tuple[Waiting, ...] = ()
    unknown_records: int = 0
    too_late: int = 0
    clock_skew_ms: dict[str, int] = {}
    gone: tuple[str, ...] = ()
    unknown_nodes: tuple[str, ...] = ()
    refused_notes: tuple[str, ...] = ()


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers at the top of a report, of one span, to be compared with those of another; None where nothing was
    reported. Answered, failed and refused requests and the tokens of the answered ones; ``total`` in the rack's
    currency and ``average_per_m`` per million tokens of all kinds and outcomes; ``saving_share`` against the same
    models at API hosts; ``rack_up`` of its time and ``request_share`` of its requests; ``throttled`` of the time in
    which models worked; ``peak_mc``, the highest of any sensor, in thousandths of a degree; ``busy_share`` of the time
    nodes reported; ``covered`` of node time by telemetry; ``blank_days`` of its ``days`` are without telemetry."""

    requests: int
    failed: int
    refused: int
    prompt_tok: int
    completion_tok: int
    total: Decimal | None
    average_per_m: Decimal | None
    saving_share: float | None
    rack_up: float | None
    request_share: float | None
    itl_p95_us: float | None
    throttled: float | None
    peak_mc: int | None
    evictions: int
    busy_share: float | None
    covered: float | None
    days: int
    blank_days: int


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A span. ``covered`` is the share of node time, since each node's first report, that telemetry covers. ``before``
    are the figures of the span before, ``before_period`` its name; None and "" if it has no telemetry.
    ``so_far_until_ms`` is there while the span is not over: how far it was judged."""

    rack: str
    period: str
    timezone: str
    empty: bool
    headline: str
    figures: Figures
    before: Figures | None
    before_period: str
    covered: float | None
    batches: int
    telemetry: Telemetry
    volume: volumes.Volume
    thermal: heat.Thermal
    evictions: eviction.EvictionReport
    distribution: placement.PlacementReport
    cost: cost.CostReport
    apis: api_prices.Comparisons
    uptime: uptime.Uptime
    swaps: scorecard.Swaps
    scorecard: tuple[scorecard.Line, ...]
    recommendations: tuple[advice.Recommendation, ...]
    so_far_until_ms: Moment | msgspec.UnsetType = msgspec.UNSET

    @property
    def so_far(self) -> str:
        """ "" for a span that is over; otherwise how far, in words."""
        return so_far(self.so_far_until_ms, self.timezone)


def so_far(until_ms: int | msgspec.UnsetType | None, zone: str) -> str:
    """How far a span that is not over was judged, in words; "" if it is over."""
    return f"so far until {local(until_ms, zone):%Y-%m-%d %H:%M} ({zone})" if until_ms else ""


class _Evaluated(NamedTuple):
    """What is compared with the span before."""

    volume: volumes.Volume
    thermal: heat.Thermal
    money: cost.CostReport
    apis: api_prices.Comparisons
    up: uptime.Uptime
    evictions: int
    card: tuple[scorecard.Line, ...]


def judge(
    window: Window,
    last: Window | None,
    config: AggregatorConfig,
    now_ms: int,
    notes: Notes | Sequence[Annotation] = (),
    manifest: Manifest | None = None,
) -> Judged:
    """The judgement of a span up to ``now_ms``. Figures and costs are compared with those of ``last``, if it has any
    telemetry; ``notes`` are an operator's, about incidents; ``manifest`` tells what could not be counted."""
    noted = notes if isinstance(notes, Notes) else Notes(tuple(notes))
    before = _evaluated(last, None, config, now_ms, noted.entries) if last is not None and last.batches else None
    now = _evaluated(window, before.money if before is not None else None, config, now_ms, noted.entries)
    judged_ms = judged_until(window, now_ms)
    map_ = placement.propose(window, config.placement, config.bandwidths, _known(now, config))
    evicted = eviction.report(window, conclusions=map_.conclusions)
    return Judged(
        rack=config.rack,
        period=window.span.name,
        timezone=window.span.timezone,
        empty=not window.batches,
        headline=_headline(window, now, over=judged_ms >= window.span.until_ms),
        figures=_figures(now),
        before=_figures(before) if before is not None else None,
        before_period=last.span.name if last is not None and before is not None else "",
        covered=uptime.covered(now.up),
        batches=window.batches,
        telemetry=telemetry(window, last, now.up, noted, manifest or Manifest(), judged_ms),
        volume=now.volume,
        thermal=now.thermal,
        evictions=evicted,
        distribution=map_,
        cost=now.money,
        apis=now.apis,
        uptime=now.up,
        swaps=scorecard.swaps(window),
        scorecard=now.card,
        so_far_until_ms=judged_ms if judged_ms < window.span.until_ms else msgspec.UNSET,
        recommendations=tuple(
            advice.recommendations(window, now.thermal, map_, now.money, now.up, evicted, config.scorecard, now.apis)
        ),
    )


def _known(now: _Evaluated, config: AggregatorConfig) -> Known:
    """What a placement has to know of the other judgements, so that they do not contradict each other."""
    return Known(
        away=advice.away(now.up).keys(),
        retired={node.node for node in now.up.nodes if node.retired},
        hot=set(advice.slow(now.thermal, config.scorecard)),
        dearer=now.apis.share is not None and now.apis.share < 0,
    )


def _evaluated(
    window: Window, before: cost.CostReport | None, config: AggregatorConfig, now_ms: int, notes: Sequence[Annotation]
) -> _Evaluated:
    money = cost.compute(window, config, before, now_ms)
    # prices of the last moment of the span, or of today while it is not over: a later run gives the same figures
    apis = api_prices.compare(window, money, config, local(min(now_ms, window.span.until_ms - 1), "UTC"))
    up = uptime.uptime(window, fleet(window, config.nodes, now_ms), notes)
    return _Evaluated(
        volume=volumes.volume(window, judged_until(window, now_ms)),
        thermal=heat.thermal(window, config.scorecard.throttled),
        money=money,
        apis=apis,
        up=up,
        evictions=len(eviction.judge(window)),
        card=scorecard.lines(window, up, apis, config.scorecard),
    )


def _figures(of: _Evaluated) -> Figures:
    peaks = [n.peak_mc for n in of.thermal.nodes if n.peak_mc is not None]
    return Figures(
        requests=of.volume.requests,
        failed=of.volume.failed,
        refused=of.volume.refused,
        prompt_tok=of.volume.prompt_tok,
        completion_tok=of.volume.completion_tok,
        total=of.money.total,
        average_per_m=of.money.average_per_m,
        saving_share=of.apis.share,
        rack_up=of.up.rack.share,
        request_share=of.up.request_share,
        itl_p95_us=of.volume.itl_p95_us,
        throttled=next((line.value for line in of.card if line.kind == "heat"), None),
        peak_mc=max(peaks, default=None),
        evictions=of.evictions,
        busy_share=of.money.busy_share,
        covered=uptime.covered(of.up),
        days=len(of.volume.days),
        blank_days=sum(not day.reported for day in of.volume.days),
    )


def _headline(window: Window, of: _Evaluated, *, over: bool) -> str:
    """The verdict in one sentence: what it cost, against what, and whether it was up."""
    if not window.batches:
        return f"No node reported anything in {window.span.name}."
    name = spoken(window.span.name)
    return f"{name if over else f'{name} so far'} {_spent(of.money, of.volume, of.apis)}; {_up(of.up)}."


def _spent(money: cost.CostReport, volume: volumes.Volume, apis: api_prices.Comparisons) -> str:
    if money.total is None:
        tokens = volume.prompt_tok + volume.completion_tok
        return f"had {phrases.tokens(tokens)}, and what they cost is not known: no node has a price"
    paid = f"cost {cost.amount(money.total, money.currency)}"
    if money.average_per_m is None:
        return f"{paid}, and no token was computed for it"
    text = f"{paid} for {phrases.tokens(money.tokens)}, {cost.amount(money.average_per_m)} per million"
    if apis.share is None:
        return text
    part = f" (of the {apis.covered:.0%} that can be compared)" if apis.covered and apis.covered < 0.995 else ""
    return f"{text}: {api_prices.against(apis.share, 'the same open models at API hosts')}{part.replace('%', ' %')}"


def _up(up: uptime.Uptime) -> str:
    time, asked = up.rack.share, up.request_share
    answered = f"answered {_cut(asked)} of the requests that it should have" if asked is not None else ""
    if time is None:
        return f"{f'the rack {answered}' if answered else 'nothing was asked of it'}; how long it was up is not known"
    return (
        f"the rack was up {_cut(time)} {f'and {answered}' if answered else 'of the time, and nothing was asked of it'}"
    )


def _cut(share: float) -> str:
    """A share in percent, cut off: what is not all is not 100 %."""
    return "100 %" if share >= 1 else uptime.cut(share, 2 if share >= 0.99 else 1)


def telemetry(
    window: Window, last: Window | None, up: uptime.Uptime, notes: Notes, manifest: Manifest, judged_ms: int
) -> Telemetry:
    """What of a span's telemetry is missing or doubtful."""
    since, until = window.span.since_ms, window.span.until_ms
    days = set(utc_days(window.span))
    noted = {n.node for n in notes.entries if n.node and n.start_ms < until and n.end_ms > since}
    judged = {*window.nodes, *(n.node for n in up.nodes)}
    skewed = [run for run in window.runs if run.skewed_batches and run.skew_max_ms]
    return Telemetry(
        until_ms=judged_ms,
        lost_batches=up.lost_batches,
        quarantined=sum(n for day, n in manifest.aside.items() if day in days),
        foreign=sum(n for day, n in manifest.foreign.items() if day in days),
        undated=manifest.quarantined_total - sum(n for day, n in manifest.aside.items() if day),
        strangers={folder.rpartition("node=")[2]: rack for folder, rack in sorted(manifest.strangers.items())},
        waiting=tuple(
            Waiting(key=key, since_ms=one.since_ms, reason=one.reason) for key, one in sorted(manifest.unread.items())
        ),
        unknown_records=manifest.unknown_records,
        too_late=manifest.too_late,
        clock_skew_ms={
            node: max(run.skew_max_ms or 0 for run in skewed if run.node == node)
            for node in sorted({run.node for run in skewed})
        },
        gone=tuple(sorted(set(last.nodes if last is not None else ()) - judged)),
        unknown_nodes=tuple(sorted(noted - judged)),
        refused_notes=notes.refused,
    )
