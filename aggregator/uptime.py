"""When nodes were up, down or unknown, and the incidents. Pure. All rules of uptime are here.

A node is *up* while it reported with a model ready, *idle* while it reported without one (nothing was assigned, or
everything was evicted), *down* where a restart, its peers or an operator explain missing telemetry, *excused* where an
operator takes it out of the account, *unknown* otherwise: a gap in telemetry never counts as up. A node's time begins
with its first report: nothing is known of it before that. The rack is up while any node is, and excused where every
node that is not up is.
"""

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from aggregator.annotations import Annotation
from aggregator.calendar import HOUR_MS
from aggregator.fleet import JOIN_MS
from aggregator.window import Intervals, Window, at_least_one, both, seconds, union, without
from shared.records import (
    AgentStarted,
    AgentStopped,
    LoaderExited,
    MemoryPressed,
    PeerDown,
    PeerUp,
    SwapFinished,
    ThrottleEnded,
    ThrottleEvent,
)

GRACE_MS = 30_000
"""A node with a window that ends later than this after a peer last saw it has reported again."""
MERGE_MS = 600_000
"""Incidents with the same cause, node and scope that follow within this time are merged."""
NEAR_MS = 300_000
LONG_HEAT_MS = 6 * HOUR_MS
"""How long before an incident a throttle event may have begun to count as its cause."""


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """An incident. ``end_ms`` is None while it is open. ``cause`` is a machine-readable identifier (power, crash,
    stopped, network, out_of_memory, heat, loader, deploy, unknown), ``text`` and ``fix`` are human-readable;
    ``confirmed`` is set if an operator annotated it. ``times`` counts merged incidents."""

    node: str
    scope: str
    start_ms: int
    end_ms: int | None
    cause: str
    text: str
    fix: str
    confirmed: bool = False
    times: int = 1


class NodeUptime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one node, or of the rack, that add up to the time since its first report. ``share`` is
    (up + idle) / (up + idle + down)."""

    node: str
    up_s: float
    idle_s: float
    down_s: float
    unknown_s: float
    share: float | None
    excused_s: float = 0.0


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How a node follows the desired state: the newest generation it reported and its state there (acting, converged,
    drifted or failed) since when, the windows of the span that were not converged, and the last reason given."""

    node: str
    generation: int
    state: str
    since_ms: int
    not_converged: int
    reason: str


class Uptime(msgspec.Struct, frozen=True, kw_only=True):
    """Availability of the rack by requests and by time, and of each node by time. ``desired`` is absent where no
    node follows a desired state."""

    requests_ok: int
    requests_bad: int
    request_share: float | None
    rack: NodeUptime
    nodes: tuple[NodeUptime, ...]
    incidents: tuple[Incident, ...]
    lost_batches: int = 0
    desired: tuple[Progress, ...] | msgspec.UnsetType = msgspec.UNSET


def uptime(window: Window, now_ms: int, annotations: Sequence[Annotation] = ()) -> Uptime:
    """Availability in the span up to ``now_ms``. Refused and cancelled requests count neither way."""
    ok = sum(s.requests for s in window.served if s.outcome == "ok")
    bad = sum(s.requests for s in window.served if s.outcome == "failed")
    # telemetry from after ``now_ms`` counts, too
    latest = max((b for node in window.nodes for _, b in window.reported(node)), default=0)
    until = min(window.span.until_ms, max(now_ms, latest))
    known = {node: _gaps(window, node, until) for node in window.nodes}
    incidents = [one for found in known.values() for one in found] + _loaders(window) + _swaps(window) + _heat(window)
    merged = _merged(sorted(incidents, key=lambda i: (i.start_ms, i.node, i.scope)))
    tracks = {node: _Track(window, node, known[node], until, annotations) for node in window.nodes}
    return Uptime(
        requests_ok=ok,
        requests_bad=bad,
        request_share=ok / (ok + bad) if ok + bad else None,
        rack=_rack(list(tracks.values())),
        nodes=tuple(_sums(t.node, t.first, t.until, t.reported, t.up, t.down, t.excused) for t in tracks.values()),
        incidents=_confirmed(merged, list(tracks.values()), annotations),
        desired=_desired(window) or msgspec.UNSET,
        lost_batches=sum(max(run.missing, run.dropped_batches - run.dropped_before) for run in window.runs),
    )


def _desired(window: Window) -> tuple[Progress, ...]:
    found = []
    for node in sorted({d.node for d in window.desired}):
        *before, newest = sorted((d for d in window.desired if d.node == node), key=lambda d: (d.last_ms, d.generation))
        behind = [d for d in (*before, newest) if d.state not in ("none", "converged")]
        if newest.state == "none":
            continue
        found.append(
            Progress(
                node=node,
                generation=newest.generation,
                state=newest.state,
                # it may have been in the same state earlier, too
                since_ms=max([newest.since_ms, *(d.last_ms for d in before)]),
                not_converged=sum(d.windows for d in behind),
                reason=next((d.reason for d in reversed(behind) if d.reason), ""),
            )
        )
    return tuple(found)


def covered(up: Uptime) -> float | None:
    """Share of all nodes' time since their first reports that is known."""
    known = sum(n.up_s + n.idle_s + n.down_s + n.excused_s for n in up.nodes)
    total = known + sum(n.unknown_s for n in up.nodes)
    return known / total if total else None


class _Track:
    """One node's timeline, from its first report on. ``down`` and ``excused`` are silence, and apart."""

    def __init__(
        self, window: Window, node: str, incidents: Sequence[Incident], until: int, notes: Sequence[Annotation]
    ) -> None:
        self.node, self.until = node, until
        self.reported = union(window.reported(node), JOIN_MS)
        self.up = both(self.reported, union(window.ready(node), JOIN_MS))
        self.first = _known_since(window, node, until)
        self.silent = without(((self.first, until),), self.reported)
        inferred = union(
            (i.start_ms, i.end_ms if i.end_ms is not None else until) for i in incidents if i.scope == "node"
        )
        self.down, self.excused = _as_noted(self.silent, both(inferred, self.silent), node, notes)


def _known_since(window: Window, node: str, until: int) -> int:
    """From when on anything is known of a node: the span's beginning where it had reported before, else its first
    report. A start says nothing about the time before: an attempt that failed, or whose report never arrived, is no
    life."""
    if node in window.reported_before:
        return window.span.since_ms
    reported = window.reported(node)
    return reported[0][0] if reported else until


def _as_noted(
    silent: Intervals, down: Intervals, node: str, notes: Sequence[Annotation]
) -> tuple[Intervals, Intervals]:
    """What of a node's silence is down and what is excused, after what operators say; of two that overlap the first
    holds."""
    excused: Intervals = ()
    for note in notes:
        if note.counts is None or not note.concerns(node):
            continue
        piece = both(silent, union([(note.start_ms, note.end_ms)]))
        silent, down = without(silent, piece), without(down, piece)
        if note.counts == "down":
            down = union((*down, *piece))
        elif note.counts == "excused":
            excused = union((*excused, *piece))
    return down, excused


def _rack(mine: Sequence[_Track]) -> NodeUptime:
    if not mine:
        return NodeUptime(node="", up_s=0.0, idle_s=0.0, down_s=0.0, unknown_s=0.0, share=None)
    reported, up = at_least_one(t.reported for t in mine), at_least_one(t.up for t in mine)
    since = min(t.first for t in mine)
    away: Intervals = ((since, mine[0].until),)
    excused = away
    for track in mine:
        # before its first report a node is not there, and answers nothing
        before = union([(since, track.first)])
        away = both(away, union((*before, *track.down, *track.excused)))
        excused = both(excused, union((*before, *track.excused)))
    return _sums("", since, mine[0].until, reported, up, without(away, excused), excused)


def _sums(
    node: str, first: int, until: int, reported: Intervals, up: Intervals, down: Intervals, excused: Intervals
) -> NodeUptime:
    reported_s, up_s = seconds(reported), seconds(up)
    down_s, excused_s = seconds(without(down, reported)), seconds(without(excused, reported))
    known_s = reported_s + down_s
    return NodeUptime(
        node=node,
        up_s=round(up_s, 3),
        idle_s=round(reported_s - up_s, 3),
        down_s=round(down_s, 3),
        unknown_s=round(max(0.0, (until - first) / 1000 - known_s - excused_s), 3),
        share=reported_s / known_s if known_s else None,
        excused_s=round(excused_s, 3),
    )


def _gaps(window: Window, node: str, until: int) -> list[Incident]:
    """Gaps in a node's telemetry that a restart or its peers explain; other gaps stay unknown."""
    reported = union(window.reported(node), JOIN_MS)
    known_since = _known_since(window, node, until)
    edges = [(known_since, known_since), *reported]
    found = []
    for (_, start), (end, _) in pairwise(edges):
        if end - start <= JOIN_MS:
            continue
        if (cause := _cause(window, node, start, end)) is not None:
            found.append(_incident(node, "node", (start, end), cause))
    down_at = _down_now(window, node)
    if down_at is not None and reported and reported[-1][1] <= down_at + GRACE_MS and reported[-1][1] < until:
        why = ("unknown", "no answer to heartbeats of its peers", "check the machine")
        found.append(_incident(node, "node", (max(down_at, reported[-1][1]), None), why))
    return found


def _incident(node: str, scope: str, times: tuple[int, int | None], why: tuple[str, str, str]) -> Incident:
    """``times`` are its start and end, ``why`` its cause, text and fix."""
    (start, end), (cause, text, fix) = times, why
    return Incident(node=node, scope=scope, start_ms=start, end_ms=end, cause=cause, text=text, fix=fix)


def _cause(window: Window, node: str, start: int, end: int) -> tuple[str, str, str] | None:
    """Why a node did not report; the first rule that matches.

    1. clean stop, by what the next start or the last window says; 2. hard memory pressure just before; 3. throttled at
    the time; 4. a swap had just ended; 5. the machine rebooted; 6. only the agent restarted; 7. its peers could not
    reach it, and it came back without a restart, or with another state folder, which knows nothing of the time before.
    """
    begun = _begun(window, node, start, end)
    if begun is not None and (begun.previous == "clean" or _was_stopped(window, node, start)):
        return "stopped", "agent stopped by an operator", "restarted"
    fresh = begun is not None and begun.previous == "first"
    if begun is not None and not fresh:
        near = (start - NEAR_MS, start + JOIN_MS)
        if any(m.node == node and r.level == "hard" and _within(r.t_ms, near) for m, r in window.of(MemoryPressed)):
            return "out_of_memory", "memory pressure just before the agent ended", "move a model away, or lower rows"
        if _was_hot(window, node, start):
            return "heat", "the node was thermally throttled when it ended", "improve cooling or airflow"
        if any(m.node == node and _within(r.t_ms, near) for m, r in window.of(SwapFinished)):
            return "deploy", "a swap had just ended on the node", "compare the new version with the previous one"
        boots = {run.boot_id for run in window.runs if run.node == node}
        if len(boots - {None, ""}) > 1 and _rebooted(window, node, start, end):
            return (
                "power",
                ("the machine rebooted: power loss or kernel panic (look for a .panic file that mentions IOGPUMemory)"),
                "check the power supply; see the runbook on panics",
            )
        return "crash", "the agent ended unexpectedly", "restarted by launchd or an operator"
    if any(record.peer == node and start - GRACE_MS <= record.t_ms <= end for _, record in window.of(PeerDown)):
        if fresh:
            return "unknown", "no answer to heartbeats of its peers", "replaced, or its state folder was lost"
        return "network", "unreachable for its peers", "recovered without a restart: check the network"
    return None


def _begun(window: Window, node: str, start: int, end: int) -> AgentStarted | None:
    """The start that ended a gap: said in the first window after it, however long the start took."""
    for meta, record in window.of(AgentStarted):
        if meta.node == node and (start <= record.t_ms <= end + JOIN_MS or abs(meta.t_start_ms - end) <= JOIN_MS):
            return record
    return None


def _was_stopped(window: Window, node: str, t_ms: int) -> bool:
    """Whether a node's last window before a gap ends with its stop: what follows, a start that failed for one, does
    not change that."""
    return any(m.node == node and abs(m.t_end_ms - t_ms) <= JOIN_MS for m, _ in window.of(AgentStopped))


def _was_hot(window: Window, node: str, t_ms: int) -> bool:
    """Whether the node was throttled at that time: begun and not ended before."""
    begun = [r.t_ms for m, r in window.of(ThrottleEvent) if m.node == node and r.t_ms <= t_ms]
    ended = [r.t_ms for m, r in window.of(ThrottleEnded) if m.node == node and r.t_ms <= t_ms - NEAR_MS]
    return bool(begun) and max(begun) > max(ended, default=0) and t_ms - max(begun) < LONG_HEAT_MS


_WORDS = {
    "planned": "planned work",
    "external": "not caused by the rack",
    "not_down": "not down, only without telemetry",
    "unknown": "nobody knows",
    "other": "not held against the rack",
}
_WORST = ("trapping", "sleeping", "critical")


def _within(t_ms: int, near: tuple[int, int]) -> bool:
    return near[0] <= t_ms <= near[1]


def _rebooted(window: Window, node: str, start: int, end: int) -> bool:
    """Whether the machine rebooted between the runs before and after a gap."""
    runs = sorted((r for r in window.runs if r.node == node), key=lambda r: r.since_ms)
    before = [r.boot_id for r in runs if r.since_ms < start]
    after = [r.boot_id for r in runs if r.since_ms >= end - JOIN_MS]
    return bool(before and after and before[-1] and after[0] and before[-1] != after[0])


def _down_now(window: Window, node: str) -> int | None:
    """When the peers declared the node down, unless a peer has seen it since or it was stopped cleanly."""
    downs = [r.last_seen_ms for _, r in window.of(PeerDown) if r.peer == node]
    ups = [r.t_ms for _, r in window.of(PeerUp) if r.peer == node]
    stops = [r.t_ms for m, r in window.of(AgentStopped) if m.node == node]
    last = max(downs, default=None)
    if last is None or any(t > last for t in ups) or any(t >= last - JOIN_MS for t in stops):
        return None
    return last


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


def _confirmed(
    incidents: Sequence[Incident], tracks: Sequence[_Track], notes: Sequence[Annotation]
) -> tuple[Incident, ...]:
    """The incidents with operators' annotations over the inferred causes. Silence that was unknown, and that an
    annotation says something about, is an incident, too."""
    until = max((track.until for track in tracks), default=0)
    found = [piece for one in incidents for piece in _pieces(one, notes, until)] if notes else list(incidents)
    for track in tracks:
        told = union(
            (i.start_ms, i.end_ms or track.until) for i in incidents if (i.node, i.scope) == (track.node, "node")
        )
        silent = without(track.silent, told)
        for note in notes:
            if note.counts in ("down", "excused") and note.concerns(track.node):
                inside = both(silent, union([(note.start_ms, note.end_ms)]))
                silent = without(silent, inside)
                found += [_noted(_incident(track.node, "node", times, ("unknown", "", "")), note) for times in inside]
    return tuple(sorted(found, key=lambda i: (i.start_ms, i.node, i.scope)))


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
