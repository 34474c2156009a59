"""Weeks, months and days of a rack, their names, and time zones. Pure."""

from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from shared.errors import Refused

HOUR_MS, DAY_MS = 3_600_000, 86_400_000


class Span(NamedTuple):
    """[since, until) in milliseconds, with the name under which its reports are filed and its zone."""

    name: str
    since_ms: int
    until_ms: int
    timezone: str


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
    return week(last_week(local(span.since_ms, span.timezone), span.timezone), span.timezone)


def month_before(span: Span) -> Span:
    """The month before a month."""
    return month(last_month(local(span.since_ms, span.timezone), span.timezone), span.timezone)


def between(since: str, until: str, zone: str) -> Span:
    """Any days of the rack's zone, both inclusive, like 2026-11-01 and 2026-11-07. Raises Refused."""
    try:
        first, last = date.fromisoformat(since), date.fromisoformat(until)
    except ValueError:
        raise Refused(f"days {since!r} to {until!r}: give them as 2026-11-01") from None
    if not date(2020, 1, 1) <= first <= last < date(2100, 1, 1):
        raise Refused(f"days {since} to {until}: the second comes before the first, or they are no node's time")
    return _span(f"{first.isoformat()}--{last.isoformat()}", first, last + timedelta(days=1), zone)


def as_long_before(span: Span) -> Span:
    """The days before a span of days, as many of them."""
    first, after = (local(t_ms, span.timezone).date() for t_ms in (span.since_ms, span.until_ms))
    start = first - (after - first)
    return _span(f"{start.isoformat()}--{(first - timedelta(days=1)).isoformat()}", start, first, span.timezone)


def days(span: Span) -> list[Span]:
    """Each day of a span in its zone."""
    return [_span(day.isoformat(), day, day + timedelta(days=1), span.timezone) for day in _dates(span, span.timezone)]


def utc_days(span: Span) -> list[str]:
    """UTC days (YYYY-MM-DD) that a span touches."""
    return [day.isoformat() for day in _dates(span, "UTC")]


def local(t_ms: int, zone: str) -> datetime:
    """A moment as clocks in a zone show it."""
    return datetime.fromtimestamp(t_ms / 1000, ZoneInfo(zone))


def spoken(name: str) -> str:
    """A span's name in a sentence: November 2026, Week 2026-W47, 2026-11-01 to 2026-11-10."""
    if len(name) == 7 and name[5:].isdigit():
        return f"{date(int(name[:4]), int(name[5:]), 1):%B %Y}"
    return f"Week {name}" if is_week(name) else name.replace("--", " to ")


def is_week(name: str) -> bool:
    """Whether a period is one week of the calendar, and no range of dates or month."""
    return "W" in name


def duration(seconds: float) -> str:
    """Seconds as 12 s, 5.0 min or 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def full_hour(t_ms: int) -> int:
    """The last full hour: a report of a period that is not over is the same until the next."""
    return t_ms - t_ms % HOUR_MS


def utc_day_ms(day: str) -> int:
    """When a UTC day (YYYY-MM-DD) begins."""
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp() * 1000)


def utc_day(t_ms: int) -> str:
    """The UTC day of a moment. Moments that no node can have lived are Refused."""
    try:
        moment = datetime.fromtimestamp(t_ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        raise Refused(f"time {t_ms} is outside the representable range") from None
    if not 2020 <= moment.year < 2100:
        raise Refused(f"time {moment:%Y-%m-%d} is not plausible; check the node's clock")
    return moment.date().isoformat()


def _dates(span: Span, zone: str) -> list[date]:
    first, last = (local(t_ms, zone).date() for t_ms in (span.since_ms, span.until_ms - 1))
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


def _span(name: str, first: date, after: date, zone: str) -> Span:
    def midnight(day: date) -> int:
        return int(datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone)).timestamp() * 1000)

    return Span(name, midnight(first), midnight(after), zone)
