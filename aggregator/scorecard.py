"""The month against its promises: each a figure, a target, and whether it was kept. Pure.

What was not measured is "no data" and counts as neither kept nor missed.
"""

from typing import Literal

import msgspec

from aggregator import heat
from aggregator.api_prices import Comparisons
from aggregator.calendar import counted
from aggregator.config import Scorecard
from aggregator.uptime import Uptime
from aggregator.volume import answered, merged
from aggregator.window import Window
from shared.records import SwapFinished

Kind = Literal["latency", "uptime", "heat", "swap", "price"]


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """``value`` and ``target`` are numbers in ``unit``; ``kept`` is None without data; ``text`` says it in words.
    ``kind`` is the promise."""

    name: str
    value: float | None
    target: float
    unit: str
    kept: bool | None
    text: str
    kind: Kind


def lines(window: Window, up: Uptime, apis: Comparisons | None, targets: Scorecard) -> tuple[Line, ...]:
    """The scorecard of a span."""
    return (
        _latency(window, targets),
        _uptime(up, targets),
        _heat(window, targets),
        _swaps(window, targets),
        *_prices(apis, targets),
    )


def _latency(window: Window, targets: Scorecard) -> Line:
    p95 = merged(answered(window), "itl_us").quantile(0.95)
    value = p95 / 1000 if p95 is not None else None
    return _at_most(
        "latency", "p95 between tokens", value, targets.itl_p95_ms, "ms", "of all answered requests, within 1.1 %"
    )


def _uptime(up: Uptime, targets: Scorecard) -> Line:
    value, target = up.request_share, targets.uptime
    kept = None if value is None else value >= target
    text = (
        "no data"
        if value is None
        else f"{value:.3%} of {counted(up.requests_ok + up.requests_bad, 'request')} answered"
    )
    if up.rack.share is not None:
        text += f"; the rack was up {up.rack.share:.3%} of the time that is known"
    return Line(kind="uptime", name="uptime", value=value, target=target, unit="share", kept=kept, text=text)


def _heat(window: Window, targets: Scorecard) -> Line:
    """Throttled time of nodes while their models worked: heat while idle slows nobody."""
    worked_us = sum(one.worked_us for one in window.hosts)
    value, of = None, "of the time in which models worked"
    if worked_us:
        value = sum(one.throttled_worked_us for one in window.hosts) / worked_us
    elif not any(window.busy_us(node) for node in window.nodes):
        value = max((s for node in window.nodes if (s := heat.share(window, node)) is not None), default=None)
        of = "of the time of the hottest node; no model worked"
    return _at_most("heat", "throttled", value, targets.throttled, "share", of)


def _swaps(window: Window, targets: Scorecard) -> Line:
    swaps = [record for _, record in window.of(SwapFinished)]
    longest = max((s.window_us / 1e6 for s in swaps if s.outcome == "flipped"), default=None)
    failed = sum(s.outcome == "failed" for s in swaps)
    return _at_most(
        "swap", "longest swap", longest, targets.swap_s, "s", f"of {counted(len(swaps), 'swap')}, {failed} failed"
    )


def _prices(apis: Comparisons | None, targets: Scorecard) -> list[Line]:
    """The claim of 5 to 15 times cheaper than a frontier model, only against models that were named for it."""
    found = []
    for one in apis.models if apis is not None else ():
        if one.frontier and one.times_cheaper is not None:
            name, times, target = f"{one.model} against {one.frontier}", one.times_cheaper, targets.times_cheaper
            said = (
                f"{times:.1f} times cheaper" if times >= 1 or not times else f"{1 / times:.1f} times as much as there"
            )
            text = f"{said}; another model, so not the same answers"
            kept = times >= target
            found.append(Line(kind="price", name=name, value=times, target=target, unit="times", kept=kept, text=text))
    return found


def _at_most(kind: Kind, name: str, value: float | None, target: float, unit: str, of: str) -> Line:
    if value is None:
        return Line(kind=kind, name=name, value=None, target=target, unit=unit, kept=None, text="no data")
    said = f"{value:.2%}" if unit == "share" else f"{value:,.1f} {unit}"
    kept, text = value <= target, f"{said} {of}"
    return Line(kind=kind, name=name, value=value, target=target, unit=unit, kept=kept, text=text)
