"""The month against its promises: each a figure, a target, and whether it was kept. Pure.

What was not measured is "no data" and counts as neither kept nor missed.
"""

from typing import Literal

import msgspec

from aggregator import heat
from aggregator.api_prices import Comparisons, against, utilisation
from aggregator.config import Scorecard
from aggregator.phrases import counted
from aggregator.uptime import Uptime, cut, in_words
from aggregator.volume import LEAST_GAPS, itl_p95_us
from aggregator.window import Window
from shared.records import SwapFinished

Kind = Literal["latency", "uptime", "heat", "swap", "saving", "price"]


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


class Swaps(msgspec.Struct, frozen=True, kw_only=True):
    """Hot swaps of a span; ``longest_s`` are the seconds of the longest one that succeeded."""

    flipped: int
    failed: int
    longest_s: float | None


def lines(window: Window, up: Uptime, apis: Comparisons | None, targets: Scorecard) -> tuple[Line, ...]:
    """The scorecard of a span."""
    return (
        _latency(window, targets),
        _uptime(up, targets),
        _heat(window, targets),
        _swaps(window, targets),
        _saving(apis, targets),
        *_prices(apis, targets),
    )


def _latency(window: Window, targets: Scorecard) -> Line:
    p95, count = itl_p95_us(window)
    value = p95 / 1000 if p95 is not None else None
    line = _at_most(
        "latency", "p95 between tokens", value, targets.itl_p95_ms, "ms", "of all answered requests, within 1.1 %"
    )
    return line if p95 is not None or not count else _few(line, f"of {count}, a p95 needs {LEAST_GAPS}")


def _uptime(up: Uptime, targets: Scorecard) -> Line:
    """The worse of availability by requests and by time: who is down records no failure."""
    said = []
    if up.request_share is not None:
        said.append(f"{cut(up.request_share)} of requests ({up.requests_ok + up.requests_bad:,}) were answered")
    if up.rack.share is not None:
        said.append(f"the rack was up {in_words(up.rack)} of the time that is known")
    elif up.rack.known_share is not None:
        said.append(f"how long the rack was up is {in_words(up.rack)}")
    return Line(
        kind="uptime",
        name="uptime",
        value=up.worse,
        target=targets.uptime,
        unit="share",
        kept=up.kept(targets),
        text="; ".join(said) or "no data",
    )


def _heat(window: Window, targets: Scorecard) -> Line:
    """Throttled time of nodes while their models worked: heat while idle slows nobody."""
    value, worked_s = heat.of_work(window)
    line = _at_most("heat", "throttled", value, targets.throttled, "share", "of the time in which models worked")
    if value is not None or not worked_s:
        return line
    return _few(line, f"models worked for {worked_s:.0f} s, a share needs {heat.LEAST_WORKED_S:.0f} s")


def swaps(window: Window) -> Swaps:
    """Hot swaps of a span."""
    found = [record for _, record in window.of(SwapFinished)]
    return Swaps(
        flipped=sum(s.outcome == "flipped" for s in found),
        failed=sum(s.outcome == "failed" for s in found),
        longest_s=max((s.window_us / 1e6 for s in found if s.outcome == "flipped"), default=None),
    )


def _swaps(window: Window, targets: Scorecard) -> Line:
    found = swaps(window)
    of = f"of {counted(found.flipped + found.failed, 'swap')}, {found.failed} failed"
    return _at_most("swap", "longest swap", found.longest_s, targets.swap_s, "s", of)


def _saving(apis: Comparisons | None, targets: Scorecard) -> Line:
    """Like for like: what all comparable models cost here, against the same models at API hosts."""
    value = apis.share if apis is not None else None
    kept = None if value is None else value >= targets.saving
    text = "no data: no model here has a comparable price and a cost"
    if apis is not None and value is not None:
        busy = utilisation(apis)
        text = against(value, "the same open models at API hosts") + (f"; {busy}" if busy else "")
    return Line(
        kind="saving",
        name="saving against API hosts",
        value=value,
        target=targets.saving,
        unit="share",
        kept=kept,
        text=text,
    )


def _prices(apis: Comparisons | None, targets: Scorecard) -> list[Line]:
    """The claim of 5 to 15 times cheaper than a frontier model, only against models that were named for it."""
    found = []
    for one in apis.models if apis is not None else ():
        if one.frontier and one.times_cheaper is not None:
            name, times, target = f"{one.model} against {one.frontier}", one.times_cheaper, targets.times_cheaper
            text = f"{frontier(times, one.frontier_share)}; another model, so not the same answers"
            kept = times >= target
            found.append(Line(kind="price", name=name, value=times, target=target, unit="times", kept=kept, text=text))
    return found


def frontier(times: float, saved: float | None) -> str:
    """How the price here compares with that of a frontier model which is ``times`` as high: 5.2 times cheaper (80.8 %
    less), or 2.9 times as expensive."""
    if times < 1:
        return f"{1 / times:,.1f} times as expensive" if times < 0.952 else "slightly dearer"
    less = f" ({saved * 100:.1f} % less)" if saved is not None else ""
    return f"{times:,.1f} times cheaper{less}"


def _at_most(kind: Kind, name: str, value: float | None, target: float, unit: str, of: str) -> Line:
    if value is None:
        return Line(kind=kind, name=name, value=None, target=target, unit=unit, kept=None, text="no data")
    digits = heat.digits_beside(value, target, 4 if unit == "share" else 1)
    said = f"{value:.{digits - 2}%}" if unit == "share" else f"{value:,.{digits}f} {unit}"
    kept, text = value <= target, f"{said} {of}"
    return Line(kind=kind, name=name, value=value, target=target, unit=unit, kept=kept, text=text)


def _few(line: Line, why: str) -> Line:
    """A line without a figure, because there was too little to take one of."""
    return msgspec.structs.replace(line, text=f"no data: {why}")
