"""When nodes were up, down or unknown, and how far that keeps what was promised. Pure. All rules of uptime are here;
what explains silence is in aggregator.incidents.

A node is *up* while it reported with a model ready, *idle* while it reported without one (nothing was assigned, or
everything was evicted), *down* where a restart, its peers or an operator explain missing telemetry, *excused* where an
operator takes it out of the account, *unknown* otherwise: silence never counts as up. Its time is its tenure's. The
rack is up while any node is, and excused where every node that is not up is. Whoever is down records no failure, so
requests and time are judged side by side, and what counts is the worse.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from aggregator.annotations import Annotation
from aggregator.config import Scorecard
from aggregator.fleet import JOIN_MS, Tenure
from aggregator.incidents import Incident, explained, listed, time_of
from aggregator.window import Intervals, RequestSum, Window, at_least_one, both, seconds, union, without

LEAST_KNOWN = 0.8
"""Share of the time that is not excused which must be known for a percentage."""


class NodeUptime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one node, or of the rack, that add up to its time. ``known_share`` is (up + idle + down) / (all but
    excused), None where there is no such time; ``share`` is (up + idle) / (up + idle + down), None where less than
    LEAST_KNOWN is known. ``retired`` is whether the node was taken out of the rack within the span, ``came_back``
    whether it reported after the day on which it was to be taken out."""

    node: str
    up_s: float
    idle_s: float
    down_s: float
    unknown_s: float
    share: float | None
    excused_s: float = 0.0
    known_share: float | None = None
    retired: bool = False
    came_back: bool = False

    @property
    def known_s(self) -> float:
        """Seconds of which is known whether it was up, but for those that are excused."""
        return self.up_s + self.idle_s + self.down_s

    @property
    def least_share(self) -> float:
        """``share``, had it been down in all of the unknown time."""
        return (self.share or 0.0) * (self.known_share or 0.0)


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
    """Availability of the rack by requests and by time, and of each node by time. ``requests_bad`` are those that
    count against the rack: ``requests_failed``, and refused ones for want of capacity (``refused_capacity``) or
    without a reason (``refused_unsaid``). Those refused for their key's limit or for their own fault, and cancelled
    ones, count neither way. ``desired`` is absent where no node follows a desired state."""

    requests_ok: int
    requests_bad: int
    request_share: float | None
    rack: NodeUptime
    nodes: tuple[NodeUptime, ...]
    incidents: tuple[Incident, ...]
    requests_failed: int = 0
    refused_capacity: int = 0
    refused_unsaid: int = 0
    refused_limit: int = 0
    refused_request: int = 0
    lost_batches: int = 0
    desired: tuple[Progress, ...] | msgspec.UnsetType = msgspec.UNSET

    @property
    def worse(self) -> float | None:
        """The lower one of what is known of availability by requests and by time."""
        return min((one for one in (self.request_share, self.rack.share) if one is not None), default=None)

    def kept(self, targets: Scorecard) -> bool | None:
        """Whether the promised uptime was kept, by requests and by time; None where one of them is unknown and the
        other one does not decide, or where the unknown time, had the rack been down, would have broken it."""
        shares = (self.request_share, self.rack.share)
        if any(one is not None and one < targets.uptime for one in shares):
            return False
        return None if None in shares or self.rack.least_share < targets.uptime else True


def uptime(window: Window, tenures: Sequence[Tenure], notes: Sequence[Annotation] = ()) -> Uptime:
    """Availability in a span; ``tenures`` are its nodes (aggregator.fleet), ``notes`` what operators say."""
    known = {tenure.node: explained(window, tenure) for tenure in tenures}
    tracks = [_track(window, tenure, known[tenure.node], notes) for tenure in tenures]
    outcomes = _outcomes(window.requests)
    ok, bad = outcomes["requests_ok"], sum(outcomes[name] for name in _AGAINST)
    return Uptime(
        **outcomes,
        requests_bad=bad,
        request_share=ok / (ok + bad) if ok + bad else None,
        rack=_rack(tracks),
        nodes=tuple(_sums(track) for track in tracks),
        incidents=listed(window, tenures, known, notes),
        desired=_desired(window) or msgspec.UNSET,
        lost_batches=sum(max(run.missing, run.dropped_batches - run.dropped_before) for run in window.runs),
    )


_AGAINST = ("requests_failed", "refused_capacity", "refused_unsaid")
_COUNTED = {"ok": "requests_ok", "failed": "requests_failed"}
_REFUSED = {"capacity": "refused_capacity", "limit": "refused_limit", "request": "refused_request"}


def _outcomes(served: Iterable[RequestSum]) -> dict[str, int]:
    """Requests by how they count; a reason for a refusal that is not known here is none."""
    found = dict.fromkeys((*_COUNTED.values(), *_REFUSED.values(), "refused_unsaid"), 0)
    for one in served:
        if one.outcome == "refused":
            found[_REFUSED.get(one.finish, "refused_unsaid")] += one.requests
        elif one.outcome in _COUNTED:
            found[_COUNTED[one.outcome]] += one.requests
    return found


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
    """Share of all nodes' time that is known, or excused."""
    known = sum(n.up_s + n.idle_s + n.down_s + n.excused_s for n in up.nodes)
    total = known + sum(n.unknown_s for n in up.nodes)
    return known / total if total else None


def cut(share: float, digits: int = 3) -> str:
    """A share in percent, cut off in every place: what does not reach a promise does not look as if it did."""
    # a hair more than its double, or 0.58 would be 57.99 %
    return f"{math.floor(share * 100 * 10**digits + 1e-6) / 10**digits:.{digits}f} %"


def in_words(n: NodeUptime) -> str:
    """A node's percentage, or why there is none."""
    if n.share is not None:
        return cut(n.share)
    if n.known_share is None:
        return "no data"
    # never rounded up to what would have been enough
    known = f"{int(n.known_share * 100)} %" if n.known_share >= 0.01 or not n.known_share else "less than 1 %"
    return f"unknown ({known} of the time is known)"


class _Track(NamedTuple):
    """A node's time, or the rack's: its whole and its parts. ``down`` and ``excused`` are silence, and apart."""

    node: str
    whole: Intervals
    reported: Intervals
    up: Intervals
    down: Intervals
    excused: Intervals
    retired: bool = False
    came_back: bool = False


def _track(window: Window, tenure: Tenure, known: Sequence[Incident], notes: Sequence[Annotation]) -> _Track:
    up = both(tenure.reported, union(window.ready(tenure.node), JOIN_MS))
    down, excused = _as_noted(tenure.silent, time_of(known, tenure), tenure.node, notes)
    whole = union([(tenure.known_ms, tenure.until_ms)])
    return _Track(tenure.node, whole, tenure.reported, up, down, excused, tenure.retired, tenure.came_back)


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
    """The rack: where a node is not there, it is none of those that would answer."""
    whole, reported = at_least_one(t.whole for t in mine), at_least_one(t.reported for t in mine)
    away = excused = whole
    for track in mine:
        absent = without(whole, track.whole)
        away = both(away, union((*absent, *track.down, *track.excused)))
        excused = both(excused, union((*absent, *track.excused)))
    up = at_least_one(t.up for t in mine)
    return _sums(_Track("", whole, reported, up, without(away, excused), excused))


def _sums(track: _Track) -> NodeUptime:
    reported_s, up_s, down_s, excused_s = map(seconds, (track.reported, track.up, track.down, track.excused))
    known_s, counted_s = reported_s + down_s, seconds(track.whole) - excused_s
    known = known_s / counted_s if counted_s > 0 else None
    return NodeUptime(
        node=track.node,
        up_s=round(up_s, 3),
        idle_s=round(reported_s - up_s, 3),
        down_s=round(down_s, 3),
        unknown_s=round(max(0.0, counted_s - known_s), 3),
        share=reported_s / known_s if known is not None and known_s and known >= LEAST_KNOWN else None,
        excused_s=round(excused_s, 3),
        known_share=known,
        retired=track.retired,
        came_back=track.came_back,
    )
