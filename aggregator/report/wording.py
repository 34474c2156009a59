"""Human-readable figures; None is "no data"."""

import math
from collections.abc import Sequence
from decimal import Decimal

from aggregator import heat
from aggregator.annotations import KEY
from aggregator.calendar import duration, local
from aggregator.cost import amount
from aggregator.judgements import Judged, Telemetry
from aggregator.phrases import counted, verb
from aggregator.scorecard import Line
from aggregator.uptime import cut

NO_DATA = "no data"
Figure = int | float | Decimal | None


def count(value: int | None) -> str:
    """1,234"""
    return NO_DATA if value is None else f"{value:,}"


def figure(value: float) -> str:
    """A number on a chart: 1,422,110 from a thousand on, 12.34 below."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"


def share(value: float | None, digits: int = 1) -> str:
    """12.3 %"""
    return NO_DATA if value is None else f"{value * 100:.{digits}f} %"


def reached(value: float | None) -> str:
    """12.34 %, cut off: a promise that is not kept does not look as if it were."""
    return NO_DATA if value is None else cut(value, 2)


def saved(value: float | None) -> str:
    """A saving as a share, for a table: 12.3 %, or costs 188 x."""
    if value is None or value >= -1:
        return share(value)
    return f"costs {1 - value:,.{0 if value < -9 else 1}f} x"


VERDICTS = {True: "kept", False: "missed", None: NO_DATA}


def target(line: Line) -> str:
    """What a promise asks for."""
    if line.unit == "times":
        return f"at least {line.target:g} times cheaper"
    if line.unit == "share":
        return f"{'at least' if line.kind in ('uptime', 'saving') else 'at most'} {share(line.target)}"
    return f"at most {line.target:g} {line.unit}"


def changed(now: Figure, before: Figure, period: str, *, points: bool = False) -> str:
    """A figure against that of another period: +12.3 % on 2026-10; of shares in ``points``."""
    if before is None or now is None:
        return f"no data of {period}" if before is None else f"{period} had data"
    points_on = 100 * (float(now) - float(before))
    if now == before or (points and abs(points_on) < 0.005):
        return f"as in {period}"
    if points and min(now, before) < -1:  # many times as dear: its points say nothing
        return f"{saved(float(before))} in {period}"
    if points:
        return f"{points_on:+.2f} points on {period}"
    if not before:
        return f"none in {period}"
    ratio = float(now) / float(before)
    return f"{times(ratio)} that of {period}" if ratio >= 3 else f"{100 * (ratio - 1):+.1f} % on {period}"


def times(ratio: float) -> str:
    """0.4 times, 12 times"""
    return f"{ratio:,.{0 if ratio >= 10 else 1}f} times"


def unit(most: float) -> tuple[str, float]:
    """In what an axis up to ``most`` is labelled, in words, and its size."""
    return next((one for one in ((", in millions", 1e6), (", in thousands", 1e3)) if most >= one[1]), ("", 1.0))


def ticks(most: float) -> tuple[float, float]:
    """Step and end of an axis that holds ``most``: at most five steps of 1, 2 or 5 times a power of ten."""
    step = 1.0
    while step * 5 < most:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    return step, step * max(1, math.ceil(most / step))


def ms(value_us: float | None) -> str:
    """Microseconds as 12 ms or 1.25 s."""
    if value_us is None:
        return NO_DATA
    return f"{value_us / 1e6:.2f} s" if value_us >= 1e6 else f"{value_us / 1e3:.0f} ms"


def gb(value: int | None) -> str:
    """Bytes as 1.2 GB."""
    return NO_DATA if value is None else f"{value / 1e9:.1f} GB"


def celsius(value_mc: int | None) -> str:
    """Thousandths of a degree as 61.5 °C, with enough digits beside the limit."""
    return heat.celsius(value_mc)


def money(value: Decimal | None, currency: str) -> str:
    """12.34 USD, with four digits below a tenth and six below a thousandth."""
    return NO_DATA if value is None else amount(value, currency)


def number(value: Decimal | None) -> str:
    """The same without its currency, for a column."""
    return NO_DATA if value is None else money(value, "").rstrip()


def span(value_s: float | None) -> str:
    """Seconds as 12 s, 5.0 min or 2.5 h."""
    return NO_DATA if value_s is None else duration(value_s)


def spans(values_s: Sequence[float | None]) -> tuple[list[str], str]:
    """Seconds of one column in one unit, and the unit: that of the longest one."""
    longest = max((value for value in values_s if value is not None), default=0.0)
    unit, size = ("h", 3600) if longest >= 48 * 3600 else ("min", 60) if longest >= 120 else ("s", 1)
    digits = 0 if size == 1 else 1
    return [NO_DATA if value is None else f"{value / size:,.{digits}f}" for value in values_s], unit


def moment(t_ms: int, zone: str, *, year: bool = False) -> str:
    """A moment as 8 Nov 14:05, or 8 Nov 2026 14:05."""
    at = local(t_ms, zone)
    return f"{at.day} {at:%b %Y %H:%M}" if year else f"{at.day} {at:%b %H:%M}"


def coverage(report: Judged) -> str:
    """One line about what the figures rest on: how far the period was judged, how much of it is known, what is
    missing."""
    told = report.telemetry
    end = moment(told.until_ms, report.timezone, year=True)
    over = "the end of the period" if not report.so_far else "the period is not over"
    covers = f"telemetry covers {share(report.covered)} of the nodes' time since their first report"
    known = covers if report.covered is not None else "no telemetry"
    parts = (
        (report.figures.blank_days, "day", "without telemetry"),
        (told.lost_batches, "window", "lost"),
        (told.quarantined, "object", "in quarantine"),
        (len(told.waiting), "object", "unreadable"),
        (len(told.strangers), "node", "with another rack's name"),
        (len(told.gone), "node", "silent in all of it"),
        (len(told.clock_skew_ms), "node", "with a wrong clock"),
    )
    missing = ", ".join(f"{counted(number, noun)} {what}" for number, noun, what in parts if number)
    return f"Judged until {end} ({over}); {known}; {missing or 'nothing is known to be lost'}."


def remarks(told: Telemetry, zone: str, before: str = "the period before") -> tuple[str, ...]:
    """Sentences about telemetry that could not be counted, or is doubtful. ``before`` names the period before."""
    return (*told.refused_notes, *_counts(told), *_nodes(told, before), *_waiting(told, zone))


def _counts(told: Telemetry) -> list[str]:
    found = []
    if told.lost_batches:
        were = verb(told.lost_batches, "was lost or has", "were lost or have")
        found.append(f"{counted(told.lost_batches, 'window')} of telemetry {were} not arrived.")
    if told.quarantined:
        whose = f", {told.foreign:,} of another rack" if told.foreign else ""
        found.append(
            f"{counted(told.quarantined, 'object')} of these days {verb(told.quarantined, 'is', 'are')} in "
            f"quarantine/{whose}; the manifest of the run that put an object there gives the reason."
        )
    if told.undated:
        found.append(
            f"{counted(told.undated, 'object')} in quarantine/ {verb(told.undated, 'does', 'do')} not tell of which "
            "day; the manifest of the run that put an object there gives the reason."
        )
    if told.unknown_records:
        are = verb(told.unknown_records, "is of an unknown kind", "are of unknown kinds")
        found.append(f"{counted(told.unknown_records, 'record')} {are}: upgrade the aggregator.")
    if told.too_late:
        late = counted(told.too_late, "batch", "batches")
        whose, are = verb(told.too_late, "its", "their"), verb(told.too_late, "is", "are")
        found.append(f"{late} arrived after {whose} day was pruned and {are} not counted.")
    return found


def _nodes(told: Telemetry, before: str) -> list[str]:
    found = [
        f"{node} writes rack {rack!r} alone: what it reports is not counted; correct node.rack there, or [store]."
        for node, rack in told.strangers.items()
    ]
    if told.clock_skew_ms:
        named = ", ".join(f"{node} by up to {duration(ms / 1000)}" for node, ms in told.clock_skew_ms.items())
        found.append(f"Clock skew: {named}. Timestamps off by more than two minutes were corrected.")
    found += [f"{KEY} names {node}, which reported nothing in this period." for node in told.unknown_nodes]
    gone = (
        "reported in {} and nothing in this period: its time is in none of these figures, since it has no [[nodes]] "
        "table in aggregator.toml."
    )
    return [*found, *(f"{node} {gone.format(before)}" for node in told.gone)]


def _waiting(told: Telemetry, zone: str) -> list[str]:
    return [
        f"{one.key} cannot be read since {moment(one.since_ms, zone, year=True)} ({one.reason}): what its node sent "
        "later is not counted yet."
        for one in told.waiting
    ]
