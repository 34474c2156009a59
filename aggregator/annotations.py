"""Incident annotations by operators: a file in the bucket that overrides inferred causes. Pure.

[[incidents]]
node = "mini-3"              # omitted: any node
start = 2026-11-21T14:00:00+01:00
end = 2026-11-21T15:30:00+01:00
cause = "power"
text = "The rack's fuse blew."
fix = "Moved to another circuit."
"""

import tomllib
from datetime import datetime

import msgspec

from shared.errors import Refused

KEY = "annotations/v1/incidents.toml"
CAUSES = ("power", "crash", "stopped", "network", "out_of_memory", "heat", "loader", "deploy", "unknown", "other")


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's account of what happened on a node between two times."""

    start_ms: int
    end_ms: int
    node: str = ""
    cause: str = ""
    text: str = ""
    fix: str = ""


class _Incident(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    start: datetime
    end: datetime
    node: str = ""
    cause: str = ""
    text: str = ""
    fix: str = ""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    incidents: tuple[_Incident, ...] = ()


def parse(raw: bytes) -> tuple[Annotation, ...]:
    """Parse the file. Raises Refused with the reason."""
    try:
        file = msgspec.convert(tomllib.loads(raw.decode()), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError, RecursionError) as error:
        raise Refused(f"{KEY}: {error}") from None
    return tuple(_checked(n, one) for n, one in enumerate(file.incidents))


def _checked(number: int, one: _Incident) -> Annotation:
    where = f"{KEY}: incidents[{number}]"
    if one.start.tzinfo is None or one.end.tzinfo is None:
        raise Refused(f"{where}: start and end need a UTC offset, like 2026-11-21T14:00:00+01:00")
    if one.end < one.start:
        raise Refused(f"{where}: end is before start")
    if one.cause and one.cause not in CAUSES:
        raise Refused(f"{where}: unknown cause {one.cause[:40]!r}; use one of {', '.join(CAUSES)}")
    start, end = (int(moment.timestamp() * 1000) for moment in (one.start, one.end))
    return Annotation(start_ms=start, end_ms=end, node=one.node, cause=one.cause, text=one.text, fix=one.fix)
