"""One place judges: everything that reports show about a span is decided here, once. Pure.

The weekly reports, the monthly report and every later page read a `Judged`; they lay out figures and sentences and
decide nothing. Every figure comes from what nodes reported. What was not reported is None and reads "no data"; nothing
is estimated.
"""

from collections.abc import Sequence

import msgspec

from aggregator import advice, api_prices, cost, eviction, heat, placement, scorecard, uptime
from aggregator import volume as volumes
from aggregator.annotations import Annotation
from aggregator.calendar import local
from aggregator.config import AggregatorConfig
from aggregator.demand import Known
from aggregator.fleet import fleet
from aggregator.window import Window
from shared.desired import Moment
from shared.records import SwapFinished


class Swaps(msgspec.Struct, frozen=True, kw_only=True):
    """Hot swaps of the month."""

    flipped: int
    failed: int
    longest_s: float | None


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A span. ``covered`` is the share of node time, since each node's first report, that telemetry covers.
    ``so_far_until_ms`` is there while the span is not over: how far it was judged."""

    rack: str
    period: str
    timezone: str
    empty: bool
    headline: str
    covered: float | None
    batches: int
    volume: volumes.Volume
    thermal: heat.Thermal
    evictions: eviction.EvictionReport
    distribution: placement.PlacementReport
    cost: cost.CostReport
    apis: api_prices.Comparisons
    uptime: uptime.Uptime
    swaps: Swaps
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


def judge(
    window: Window, last: Window | None, config: AggregatorConfig, now_ms: int, notes: Sequence[Annotation] = ()
) -> Judged:
    """The judgement of a span up to ``now_ms``. Costs are compared with those of ``last``, if it has any telemetry;
    ``notes`` are an operator's, about incidents."""
    volume, thermal = volumes.volume(window), heat.thermal(window, config.scorecard.throttled)
    before = cost.compute(last, config) if last is not None and last.batches else None
    money = cost.compute(window, config, before)
    # telemetry from after ``now_ms`` counts, too
    judged_ms = max([now_ms, *(end for node in window.nodes for _, end in window.reported(node))])
    # prices as of the end of the span, or of what there is of it: a later run gives the same figures
    apis = api_prices.compare(window, money, config, local(min(judged_ms, window.span.until_ms), "UTC"))
    tenures = fleet(window, config.nodes, now_ms)
    up = uptime.uptime(window, tenures, notes)
    known = Known(
        away=advice.away(up).keys(),
        retired={tenure.node for tenure in tenures if tenure.retired},
        hot=set(advice.slow(thermal, config.scorecard)),
        dearer=apis.share is not None and apis.share < 0,
    )
    map_ = placement.propose(window, config.placement, config.bandwidths, known)
    evicted = eviction.report(window, conclusions=map_.conclusions)
    return Judged(
        rack=config.rack,
        period=window.span.name,
        timezone=window.span.timezone,
        empty=not window.batches,
        headline=_headline(window, volume, up, money),
        covered=uptime.covered(up),
        batches=window.batches,
        volume=volume,
        thermal=thermal,
        evictions=evicted,
        distribution=map_,
        cost=money,
        apis=apis,
        uptime=up,
        swaps=_swaps(window),
        scorecard=scorecard.lines(window, up, apis, config.scorecard),
        so_far_until_ms=judged_ms if judged_ms < window.span.until_ms else msgspec.UNSET,
        recommendations=tuple(
            advice.recommendations(window, thermal, map_, money, up, evicted, config.scorecard, apis)
        ),
    )


def _headline(window: Window, volume: volumes.Volume, up: uptime.Uptime, money: cost.CostReport) -> str:
    if not window.batches:
        return f"No node reported anything in {window.span.name}."
    answered = f"The rack answered {volume.requests:,} requests with {volume.completion_tok:,} tokens"
    share = up.request_share
    kept = f", {share:.2%} of those it should have" if share is not None else ""
    price = f", at {money.average_per_m:,.2f} {money.currency} per million tokens" if money.average_per_m else ""
    return f"{answered}{kept}{price}."


def _swaps(window: Window) -> Swaps:
    swaps = [r for _, r in window.of(SwapFinished)]
    return Swaps(
        flipped=sum(s.outcome == "flipped" for s in swaps),
        failed=sum(s.outcome == "failed" for s in swaps),
        longest_s=max((s.window_us / 1e6 for s in swaps), default=None),
    )
