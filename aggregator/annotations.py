"""What people know of incidents and the machines do not: a file in the bucket that overrides what was guessed. Pure.

[[incidents]]
node = "mini-3"              # left out: whichever node
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
    """A person's word on what happened at a node between two moments."""

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
    """Read the file. Raises Refused with what is wrong with it."""
    try:
        file = msgspec.convert(tomllib.loads(raw.decode()), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise Refused(f"{KEY}: {error}") from None
    return tuple(_checked(n, one) for n, one in enumerate(file.incidents))


def _checked(number: int, one: _Incident) -> Annotation:
    where = f"{KEY}: incidents[{number}]"
    if one.start.tzinfo is None or one.end.tzinfo is None:
        raise Refused(f"{where}: give start and end with their zone, like 2026-11-21T14:00:00+01:00")
    if one.end < one.start:
        raise Refused(f"{where}: it ends before it starts")
    if one.cause and one.cause not in CAUSES:
        raise Refused(f"{where}: cause {one.cause[:40]!r}; use one of {', '.join(CAUSES)}")
    start, end = (int(moment.timestamp() * 1000) for moment in (one.start, one.end))
    return Annotation(start_ms=start, end_ms=end, node=one.node, cause=one.cause, text=one.text, fix=one.fix)
