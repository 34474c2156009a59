"""Human-readable view of the agent's log: filter by time, level and request, follow new lines."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from shared.errors import Refused

LEVELS = ("debug", "info", "warning", "error", "critical")
_SPAN = re.compile(r"(\d+)([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FIRST = ("timestamp", "level", "logger", "event")
_POLL_S = 0.3


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines to show; None matches all."""

    since: datetime | None = None
    level: str = "debug"
    request: str | None = None


def parse_since(text: str, now: datetime) -> datetime:
    """``90s``, ``15m``, ``1h``, ``2d``, or an ISO time. Raises Refused."""
    if match := _SPAN.fullmatch(text):
        return now - timedelta(seconds=int(match[1]) * _UNIT_S[match[2]])
    try:
        given = datetime.fromisoformat(text)
    except ValueError:
        raise Refused(f"--since {text}: expected a span like 90s, 15m, 1h, 2d, or a time: 2026-11-20T08:00") from None
    return given if given.tzinfo else given.astimezone()


def wanted(entry: dict[str, Any], which: Filter) -> bool:
    """Whether a log entry matches the filter."""
    if LEVELS.index(_level(entry)) < LEVELS.index(which.level):
        return False
    if which.request and which.request not in (entry.get("request"), entry.get("client_request")):
        return False
    if which.since is not None:
        try:
            return datetime.fromisoformat(str(entry.get("timestamp"))) >= which.since
        except (ValueError, TypeError):
            return False
    return True


def render(entry: dict[str, Any]) -> str:
    """One entry as a human-readable line: local time, level, event, then its fields."""
    try:
        moment = datetime.fromisoformat(str(entry.get("timestamp"))).astimezone().strftime("%m-%d %H:%M:%S")
    except ValueError:
        moment = "?"
    rest = " ".join(f"{k}={_value(v)}" for k, v in entry.items() if k not in _FIRST and v not in ("", None))
    return f"{moment} {_level(entry).upper():<8}{entry.get('event', '')!s:<20} {rest}".rstrip()


def lines(path: Path, which: Filter, *, follow: bool, until: Callable[[], bool] = lambda: False) -> Iterator[str]:
    """Rendered lines of the log, rotated files first. With ``follow`` it continues until ``until`` returns true."""
    if not path.exists() and not follow:
        raise Refused(f"log {path} does not exist; has this agent been started with this configuration?")
    # the live file is opened first: a rotation meanwhile renames it and loses nothing
    live = path.open(encoding="utf-8", errors="replace") if path.exists() else None
    for old in sorted(path.parent.glob(path.name + ".*"), key=lambda p: -_age(p)):
        with old.open(encoding="utf-8", errors="replace") as file:
            yield from _rendered(file, which)
    while True:
        if live is not None:
            yield from _rendered(live, which)
        if not follow or until():
            break
        time.sleep(_POLL_S)
        fresh = _reopened(path, live)
        if live is not None and fresh is not live:
            yield from _rendered(live, which)  # lines written between the last read and the rotation
            live.close()
        live = fresh
    if live is not None:
        live.close()


def _reopened(path: Path, live: Any) -> Any:
    """The same file, or the new one after a rotation."""
    try:
        if live is not None and path.stat().st_ino == os.fstat(live.fileno()).st_ino:
            return live
        return path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return live


def _age(path: Path) -> int:
    suffix = path.name.rsplit(".", 1)[-1]
    return int(suffix) if suffix.isdigit() else 0


def _rendered(file: Any, which: Filter) -> Iterator[str]:
    for line in file:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a partial line at the end of a file that is being written
        if isinstance(entry, dict) and wanted(entry, which):
            yield render(entry)


def _level(entry: dict[str, Any]) -> str:
    level = str(entry.get("level", "info"))
    return level if level in LEVELS else "info"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f'"{text}"' if " " in text else text
