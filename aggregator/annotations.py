"""Incident annotations by operators: a file in the bucket that overrides inferred causes. Pure.

What a cause makes of the time in its interval for which the node has no telemetry is a closed table, `COUNTS`; time
for which it has is what the node reported, whatever somebody writes.

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
from typing import Literal, NamedTuple

import msgspec

from shared.errors import Refused

KEY = "annotations/v1/incidents.toml"
Counts = Literal["down", "excused", "unknown"]
COUNTS: dict[str, Counts] = {
    **dict.fromkeys(("power", "crash", "stopped", "network", "out_of_memory", "heat", "loader", "deploy"), "down"),
    **dict.fromkeys(("planned", "external", "other"), "excused"),
    **dict.fromkeys(("not_down", "unknown"), "unknown"),
}
"""What silence in an annotated interval counts as, by cause. *down*: against the node, also where nothing else explains
the silence. *excused*: neither up nor down, and shown apart: announced work, what was not the rack's, what is not to be
held against it. *unknown*: neither, like any gap that nothing explains."""
CAUSES = tuple(COUNTS)


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's account of what happened on a node between two times."""

    start_ms: int
    end_ms: int
    node: str = ""
    cause: str = ""
    text: str = ""
    fix: str = ""

    @property
    def counts(self) -> Counts | None:
        """What silence in the interval counts as; None where only words are corrected."""
        return COUNTS.get(self.cause)

    def concerns(self, node: str) -> bool:
        """Whether it is about a node."""
        return self.node in ("", node)


class Notes(NamedTuple):
    """What a file holds: its valid entries, and a sentence for each of the others."""

    entries: tuple[Annotation, ...] = ()
    refused: tuple[str, ...] = ()


class _Incident(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    start: datetime
    end: datetime
    node: str = ""
    cause: str = ""
    text: str = ""
    fix: str = ""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    incidents: tuple[dict[str, object], ...] = ()


def parse(raw: bytes) -> tuple[Annotation, ...]:
    """Parse the file. Raises Refused with the first reason."""
    notes = read(raw)
    if notes.refused:
        raise Refused(notes.refused[0])
    return notes.entries


def read(raw: bytes) -> Notes:
    """What of the file can be used; one wrong entry costs no other."""
    try:
        file = msgspec.convert(tomllib.loads(raw.decode()), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError, RecursionError) as error:
        return Notes(refused=(f"{KEY}: {error}: none of its entries is used",))
    entries, refused = [], []
    for number, tree in enumerate(file.incidents, 1):
        try:
            entries.append(_checked(msgspec.convert(tree, _Incident)))
        except (Refused, ValueError, OverflowError) as error:
            why = error.message if isinstance(error, Refused) else str(error)
            refused.append(f"{KEY}: entry {number} is not used: {why}")
    return Notes(tuple(entries), tuple(refused))


def _checked(one: _Incident) -> Annotation:
    if one.start.tzinfo is None or one.end.tzinfo is None:
        raise Refused("start and end need a UTC offset, like 2026-11-21T14:00:00+01:00")
    if one.end < one.start:
        raise Refused("end is before start")
    if one.cause and one.cause not in COUNTS:
        raise Refused(f"unknown cause {one.cause[:40]!r}; use one of {', '.join(CAUSES)}")
    start, end = (int(moment.timestamp() * 1000) for moment in (one.start, one.end))
    return Annotation(start_ms=start, end_ms=end, node=one.node, cause=one.cause, text=one.text, fix=one.fix)
