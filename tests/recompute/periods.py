"""Weeks, months and days on the clocks of a rack's zone, and its configuration."""

import tomllib
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from .spans import Spans

HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Period:
    """[start, end) in milliseconds. ``now_ms`` is when it is judged, which matters where it is not over."""

    name: str
    zone: str
    first: date
    last: date
    now_ms: int

    @property
    def start_ms(self) -> int:
        """When it begins."""
        return midnight(self.first, self.zone)

    @property
    def end_ms(self) -> int:
        """When it is over."""
        return midnight(self.last, self.zone)

    @property
    def over(self) -> bool:
        """Whether it is."""
        return self.now_ms >= self.end_ms

    def days(self) -> list[tuple[date, int, int]]:
        """Its days, and when each begins and ends."""
        count = (self.last - self.first).days
        dates = [self.first + timedelta(days=n) for n in range(count)]
        return [(one, midnight(one, self.zone), midnight(one + timedelta(days=1), self.zone)) for one in dates]

    def before(self) -> "Period":
        """The week or month before this one."""
        if "W" in self.name:
            return week_from(self.first - timedelta(days=7), self.zone, self.now_ms)
        return month((self.first - timedelta(days=1)).strftime("%Y-%m"), self.zone, self.now_ms)


def midnight(day: date, zone: str) -> int:
    """Milliseconds at which a day begins on the clocks of a zone."""
    return int(datetime.combine(day, time(), ZoneInfo(zone)).timestamp() * 1000)


def week(name: str, zone: str, now_ms: int) -> Period:
    """An ISO week like 2026-W42."""
    year, number = name.split("-W")
    return week_from(date.fromisocalendar(int(year), int(number), 1), zone, now_ms)


def week_from(monday: date, zone: str, now_ms: int) -> Period:
    """The week that begins on a Monday."""
    year, number, _ = monday.isocalendar()
    return Period(f"{year}-W{number:02d}", zone, monday, monday + timedelta(days=7), now_ms)


def month(name: str, zone: str, now_ms: int) -> Period:
    """A month like 2026-10."""
    first = date.fromisoformat(f"{name}-01")
    after = (first + timedelta(days=31)).replace(day=1)
    return Period(name, zone, first, after, now_ms)


def settings(path: Path) -> dict[str, Any]:
    """aggregator.toml; fractions are exact."""
    return tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Fraction)


def notes(bucket: Path, zone: str) -> list[dict[str, Any]]:
    """The operator's incidents, with times in milliseconds."""
    path = bucket / "annotations/v1/incidents.toml"
    if not path.exists():
        return []
    found = tomllib.loads(path.read_text(encoding="utf-8")).get("incidents", [])
    return [one | {"spans": _spans(one)} for one in found if one["start"].tzinfo and one["end"] >= one["start"]]


def _spans(note: dict[str, Any]) -> Spans:
    return [(int(note["start"].timestamp() * 1000), int(note["end"].timestamp() * 1000))]
