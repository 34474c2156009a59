"""A span of time and everything that was reported in it; the one input of every report. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import msgspec

from shared.batch import Batch
from shared.errors import Refused
from shared.records import Unknown

R = TypeVar("R", bound=msgspec.Struct)

DAY_MS = 86_400_000
LONGEST_WINDOW_MS = 6 * 3_600_000


class Meta(NamedTuple):
    """The envelope of a batch without its records."""

    node: str
    incarnation: int
    epoch: int
    seq: int
    t_start_ms: int
    t_end_ms: int
    agent_version: str
    dropped_batches: int


class Fact(NamedTuple):
    """A record and the batch it came in; ``ordinal`` is its place in the batch."""

    meta: Meta
    ordinal: int
    record: msgspec.Struct


class Span(NamedTuple):
    """[since, until) in milliseconds, with the name under which its reports are filed and its zone."""

    name: str
    since_ms: int
    until_ms: int
    timezone: str


class Window:
    """Facts whose batch ended in ``span``, each once, in one order whatever order they were read in."""

    def __init__(self, span: Span, facts: Iterable[Fact], batches: Iterable[Meta]) -> None:
        self.span = span
        inside = [f for f in facts if span.since_ms <= f.meta.t_end_ms < span.until_ms]
        self.facts = tuple(sorted(inside, key=lambda f: (f.meta[:4], f.ordinal)))
        self.batches = tuple(sorted({m for m in batches if span.since_ms <= m.t_end_ms < span.until_ms}))

    def of(self, kind: type[R]) -> Iterator[tuple[Meta, R]]:
        """Records of one kind with their batches."""
        for fact in self.facts:
            if isinstance(fact.record, kind):
                yield fact.meta, fact.record

    @property
    def nodes(self) -> list[str]:
        """Every node that reported."""
        return sorted({m.node for m in self.batches})

    def reported(self, node: str) -> list[tuple[int, int]]:
        """Intervals [start, end) in ms that the node's batches cover, merged, cut to the span."""
        pieces = sorted((m.t_start_ms, m.t_end_ms) for m in self.batches if m.node == node)
        merged: list[tuple[int, int]] = []
        for start, end in pieces:
            start, end = max(start, self.span.since_ms), min(end, self.span.until_ms)
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            elif end > start:
                merged.append((start, end))
        return merged


def facts_of(batch: Batch) -> list[Fact]:
    """A batch taken apart; kinds that are not known here are left out and keep their places."""
    meta = meta_of(batch)
    return [Fact(meta, n, record) for n, record in enumerate(batch.records) if not isinstance(record, Unknown)]


def meta_of(batch: Batch) -> Meta:
    """A batch's envelope. A window that begins after its end, or days before it, is a clock that was set."""
    return Meta(
        batch.node,
        batch.incarnation,
        batch.epoch,
        batch.seq,
        min(max(batch.t_start_ms, batch.t_end_ms - LONGEST_WINDOW_MS), batch.t_end_ms),
        batch.t_end_ms,
        batch.agent_version,
        batch.dropped_batches,
    )


def seconds(intervals: Sequence[tuple[int, int]]) -> float:
    """Total length of intervals in seconds."""
    return sum(end - start for start, end in intervals) / 1000


def week(name: str, zone: str) -> Span:
    """The week ``2026-W47``, Monday 00:00 to Monday 00:00 in the rack's zone. Raises Refused."""
    try:
        year, number = name.split("-W")
        monday = date.fromisocalendar(int(year), int(number), 1)
    except ValueError:
        raise Refused(f"week {name!r}: give it as 2026-W47") from None
    return _span(f"{int(year)}-W{int(number):02d}", monday, monday + timedelta(days=7), zone)


def month(name: str, zone: str) -> Span:
    """The month ``2026-11`` in the rack's zone. Raises Refused."""
    try:
        first = datetime.strptime(name, "%Y-%m").date()  # noqa: DTZ007  # a date, the zone comes next
    except ValueError:
        raise Refused(f"month {name!r}: give it as 2026-11") from None
    after = (first + timedelta(days=32)).replace(day=1)
    return _span(first.strftime("%Y-%m"), first, after, zone)


def last_week(now: datetime, zone: str) -> str:
    """The name of the last week that is over."""
    year, number, _ = (now.astimezone(ZoneInfo(zone)) - timedelta(days=7)).isocalendar()
    return f"{year}-W{number:02d}"


def last_month(now: datetime, zone: str) -> str:
    """The name of the last month that is over."""
    first = now.astimezone(ZoneInfo(zone)).replace(day=1)
    return (first - timedelta(days=1)).strftime("%Y-%m")


def before(span: Span) -> Span:
    """The week before a week."""
    monday = datetime.fromtimestamp(span.since_ms / 1000, ZoneInfo(span.timezone)).date() - timedelta(days=7)
    year, number, _ = monday.isocalendar()
    return week(f"{year}-W{number:02d}", span.timezone)


def utc_days(span: Span) -> list[str]:
    """UTC days (YYYY-MM-DD) that a span touches."""
    first = datetime.fromtimestamp(span.since_ms / 1000, UTC).date()
    last = datetime.fromtimestamp((span.until_ms - 1) / 1000, UTC).date()
    return [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]


def utc_day(t_ms: int) -> str:
    """The UTC day of a moment. Moments that no node can have lived are Refused."""
    try:
        moment = datetime.fromtimestamp(t_ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        raise Refused(f"time {t_ms} is no date") from None
    if not 2020 <= moment.year < 2100:
        raise Refused(f"time {moment:%Y-%m-%d} is not plausible; check the node's clock")
    return moment.date().isoformat()


def _span(name: str, first: date, after: date, zone: str) -> Span:
    def midnight(day: date) -> int:
        return int(datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone)).timestamp() * 1000)

    return Span(name, midnight(first), midnight(after), zone)
