"""The incidents of a rack: when, on which node, why by rule, and what its operators say of it. Pure.

A node's silence is *explained* where a restart, its peers or an operator tell why. What of it nobody explains is an
incident of its own, of cause ``silent``, once it is long; it is open while it lasts.
"""

from collections.abc import Mapping, Sequence

import msgspec

from aggregator.annotations import Annotation
from aggregator.fleet import JOIN_MS, Tenure
from aggregator.incidents.causes import GRACE_MS, cause_of, down_now, was_stopped
from aggregator.window import Intervals, Window, both, union, without
from shared.records import LoaderExited, SwapFinished, ThrottleEnded

MERGE_MS = 600_000
"""Incidents with the same cause, node and scope that follow within this time are merged."""
LONG_SILENCE_MS = 1_800_000
"""Unexplained silence that is as long as this is an incident."""

BEFORE = "; it began before this period"
SILENT = "silent"
"""The cause of silence that nothing explains; operators do not write it, since what they write explains it."""
_LASTS = "check the machine and its network; for one that was taken away set retired in its [[nodes]] table"
_LASTED = "look at the log of its agent, and write what it was into annotations/v1/incidents.toml"
_WORDS = {
    "planned": "planned work",
    "external": "not caused by the rack",
    "not_down": "not down, only without telemetry",
    "unknown": "nobody knows",
    "other": "not held against the rack",
}
_WORST = ("trapping", "sleeping", "critical")


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """An incident. ``end_ms`` is None while it is open. ``cause`` is a machine-readable identifier: one that operators
    may write (aggregator.annotations.COUNTS), or silent. ``text`` and ``fix`` are human-readable; ``confirmed`` is set
    if an operator annotated it. ``times`` counts merged incidents."""

    node: str
    scope: str
    start_ms: int
    end_ms: int | None
    cause: str
    text: str
    fix: str
    confirmed: bool = False
    times: int = 1


def explained(window: Window, tenure: Tenure) -> tuple[Incident, ...]:
    """What of a node's silence a restart or its peers explain, in order."""
    node = tenure.node
    found = []
    for start, end in tenure.silent:
        if end == tenure.until_ms:
            found += _lasting(window, tenure, start)
        elif end - start > JOIN_MS and (why := cause_of(window, node, start, end)) is not None:
            found.append(_incident(node, "node", (start, end), why))
    return tuple(found)


def time_of(incidents: Sequence[Incident], tenure: Tenure) -> Intervals:
    """When a node was silent for the reasons of these incidents."""
    mine = (i for i in incidents if (i.node, i.scope) == (tenure.node, "node"))
    times = union((i.start_ms, i.end_ms if i.end_ms is not None else tenure.until_ms) for i in mine)
    return both(times, tenure.silent)


def listed(
    window: Window, tenures: Sequence[Tenure], known: Mapping[str, Sequence[Incident]], notes: Sequence[Annotation]
) -> tuple[Incident, ...]:
    """Every incident of a span, in order, under the causes that operators give. ``known`` is what is explained of each
    node's silence."""
    silent = [one for tenure in tenures for one in _silences(window, tenure, known[tenure.node])]
    inferred = [*(one for found in known.values() for one in found), *silent]
    merged = _merged(sorted([*inferred, *_loaders(window), *_swaps(window), *_heat(window)], key=_place))
    return tuple(sorted(_annotated(merged, tenures, notes), key=_place))


def _place(one: Incident) -> tuple[int, str, str]:
    return one.start_ms, one.node, one.scope


def _lasting(window: Window, tenure: Tenure, start: int) -> list[Incident]:
    """The silence at the end of a node's time, if its peers lost it, too: they may have seen it for longer."""
    down_at = down_now(window, tenure.node)
    if down_at is None or max(start, down_at) >= tenure.until_ms:
        return []
    if tenure.reported and start > down_at + GRACE_MS:  # it was back
        return []
    why = ("unknown", "no answer to heartbeats of its peers", "check the machine")
    return [_incident(tenure.node, "node", (max(start, down_at), _end_of(tenure.until_ms, tenure)), why)]


def _silences(window: Window, tenure: Tenure, known: Sequence[Incident]) -> list[Incident]:
    """Long silence that nothing explains."""
    found = []
    for start, end in without(tenure.silent, time_of(known, tenure)):
        if end - start >= LONG_SILENCE_MS:
            stopped = was_stopped(window, tenure.node, start)
            text = "no telemetry, " + ("since an operator stopped its agent" if stopped else "and nothing tells why")
            text += BEFORE if start == window.span.since_ms else ""
            fix = _LASTED if end < tenure.until_ms else "taken out of the rack" if tenure.retired else _LASTS
            found.append(_incident(tenure.node, "node", (start, _end_of(end, tenure)), (SILENT, text, fix)))
    return found


def _end_of(end: int, tenure: Tenure) -> int | None:
    """None for what lasts where the judged time of a node ends, unless the node was taken out of the rack there."""
    return None if end == tenure.until_ms and not tenure.retired else end


def _incident(node: str, scope: str, times: tuple[int, int | None], why: tuple[str, str, str]) -> Incident:
    """``times`` are its start and end, ``why`` its cause, text and fix."""
    (start, end), (cause, text, fix) = times, why
    return Incident(node=node, scope=scope, start_ms=start, end_ms=end, cause=cause, text=text, fix=fix)


def _loaders(window: Window) -> list[Incident]:
    found = []
    for meta, record in window.of(LoaderExited):
        why = ("loader", f"the loader exited ({record.cause})", "restarted by the agent")
        found.append(_incident(meta.node, f"model {record.model}", (record.t_ms, record.t_ms), why))
    return found


def _swaps(window: Window) -> list[Incident]:
    found = []
    for meta, record in window.of(SwapFinished):
        if record.outcome == "failed":
            text = f"the swap to {record.to_version} failed: {record.reason or 'no reason reported'}"
            times = (record.t_ms - record.window_us // 1000, record.t_ms)
            why = ("deploy", text, "the old version continued to serve")
            found.append(_incident(meta.node, f"model {record.model}", times, why))
    return found


def _heat(window: Window) -> list[Incident]:
    """Throttling at the highest levels; lower ones are covered by the thermal figures."""
    found = []
    for meta, record in window.of(ThrottleEnded):
        if record.level in _WORST:
            why = ("heat", f"thermal pressure rose to {record.level}", "improve cooling or airflow")
            found.append(_incident(meta.node, "heat", (record.start_ms, record.t_ms), why))
    return found


def _merged(incidents: Sequence[Incident]) -> list[Incident]:
    """Merge incidents with the same cause, node and scope that follow each other closely."""
    found: list[Incident] = []
    last: dict[tuple[str, str, str], int] = {}
    for one in incidents:
        key = (one.node, one.scope, one.cause)
        place = last.get(key)
        before = found[place] if place is not None else None
        if before is not None and before.end_ms is not None and one.start_ms - before.end_ms < MERGE_MS:
            end = None if one.end_ms is None else max(one.end_ms, before.end_ms)
            found[place] = msgspec.structs.replace(before, end_ms=end, times=before.times + 1)  # type: ignore[index]
        else:
            last[key] = len(found)
            found.append(one)
    return found


def _annotated(incidents: Sequence[Incident], tenures: Sequence[Tenure], notes: Sequence[Annotation]) -> list[Incident]:
    """The incidents with operators' annotations over the inferred causes. Short silence that was unknown, and that an
    annotation says something about, is an incident, too; what annotations leave of a long one may be short."""
    if not notes:
        return list(incidents)
    until = max((tenure.until_ms for tenure in tenures), default=0)
    pieces = [piece for one in incidents for piece in _pieces(one, notes, until)]
    found = [one for one in pieces if one.confirmed or one.cause != SILENT or _is_long(one, until)]
    for tenure in tenures:
        silent = without(tenure.silent, time_of(incidents, tenure))
        for note in notes:
            if note.counts in ("down", "excused") and note.concerns(tenure.node):
                inside = both(silent, union([(note.start_ms, note.end_ms)]))
                silent = without(silent, inside)
                found += [_noted(_incident(tenure.node, "node", times, ("unknown", "", "")), note) for times in inside]
    return found


def _is_long(one: Incident, until: int) -> bool:
    return (one.end_ms if one.end_ms is not None else until) - one.start_ms >= LONG_SILENCE_MS


def _pieces(incident: Incident, notes: Sequence[Annotation], until: int) -> list[Incident]:
    """An incident cut where an annotation of its node begins or ends: an interval says nothing about what is outside.
    What concerns a single moment, or a model, is annotated as a whole."""
    end = incident.end_ms if incident.end_ms is not None else until
    mine = [n for n in notes if n.concerns(incident.node) and n.start_ms <= end and n.end_ms >= incident.start_ms]
    if mine and incident.scope != "node":
        return [_noted(incident, mine[0])]
    found = []
    left: Intervals = ((incident.start_ms, end),)
    for note in mine:
        inside = both(left, union([(note.start_ms, note.end_ms)]))
        left = without(left, inside)
        found += [_noted(_spanning(incident, times, end), note) for times in inside]
    return [*found, *(_spanning(incident, times, end) for times in left)]


def _spanning(incident: Incident, times: tuple[int, int], end: int) -> Incident:
    """A piece of an incident; the last one of an open incident is open."""
    return msgspec.structs.replace(incident, start_ms=times[0], end_ms=incident.end_ms if times[1] == end else times[1])


def _noted(incident: Incident, note: Annotation) -> Incident:
    return msgspec.structs.replace(
        incident,
        cause=note.cause or incident.cause,
        text=note.text or _WORDS.get(note.cause, "") or incident.text or note.cause,
        fix=note.fix or incident.fix,
        confirmed=True,
    )
