"""When nodes served, when they did not, and when nobody knows. A gap in telemetry is unknown, never up. Pure."""

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from aggregator.window import Window, seconds
from shared.records import AgentStarted, AgentStopped, LoaderExited, PeerDown, PeerUp, Served

JOIN_MS = 2_000
"""Windows follow one another with a breath between them; a shorter gap is none."""
GRACE_MS = 30_000
"""A node whose window ends this long after it was last seen by a peer was heard of again."""


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was not as it should be. ``end_ms`` is None while it lasts."""

    node: str
    scope: str
    start_ms: int
    end_ms: int | None
    cause: str
    fix: str


class NodeUptime(msgspec.Struct, frozen=True, kw_only=True):
    """One node: seconds reported up, known to be down, and unknown. ``share`` is up / (up + down)."""

    node: str
    up_s: float
    down_s: float
    unknown_s: float
    share: float | None


class Uptime(msgspec.Struct, frozen=True, kw_only=True):
    """The rack: answered requests out of those that should have been, and each node by time."""

    requests_ok: int
    requests_bad: int
    request_share: float | None
    nodes: tuple[NodeUptime, ...]
    incidents: tuple[Incident, ...]


def uptime(window: Window, now_ms: int) -> Uptime:
    """Judge the span up to ``now_ms``. Refused and cancelled requests count neither way."""
    ok = sum(r.requests for _, r in window.of(Served) if r.outcome == "ok")
    bad = sum(r.requests for _, r in window.of(Served) if r.outcome == "failed")
    until = min(window.span.until_ms, now_ms)
    incidents = [i for node in window.nodes for i in _node_incidents(window, node, until)]
    incidents += _loader_incidents(window)
    return Uptime(
        requests_ok=ok,
        requests_bad=bad,
        request_share=ok / (ok + bad) if ok + bad else None,
        nodes=tuple(_node(window, node, incidents, until) for node in window.nodes),
        incidents=tuple(sorted(incidents, key=lambda i: (i.start_ms, i.node, i.scope))),
    )


def _node(window: Window, node: str, incidents: Sequence[Incident], until: int) -> NodeUptime:
    reported = window.reported(node)
    up = seconds(reported)
    down = sum(
        ((i.end_ms if i.end_ms is not None else until) - i.start_ms) / 1000
        for i in incidents
        if i.node == node and i.scope == "node"
    )
    starts = [i.start_ms for i in incidents if i.node == node and i.scope == "node"]
    first = min([reported[0][0] if reported else until, *starts])
    unknown = max(0.0, (until - first) / 1000 - up - down)
    return NodeUptime(
        node=node,
        up_s=round(up, 3),
        down_s=round(down, 3),
        unknown_s=round(unknown, 3),
        share=up / (up + down) if up + down else None,
    )


def _node_incidents(window: Window, node: str, until: int) -> list[Incident]:
    """Gaps between what a node reported, where a restart or its peers explain them; other gaps stay unknown."""
    reported = window.reported(node)
    # a node that was down when the span began is told from a new one by what its first start says of the run before
    edges = [(window.span.since_ms, window.span.since_ms), *reported]
    gaps = [(end, start) for (_, end), (start, _) in pairwise(edges) if start - end > JOIN_MS]
    found = []
    for start, end in gaps:
        cause = _cause(window, node, start, end)
        if cause is not None:
            found.append(Incident(node=node, scope="node", start_ms=start, end_ms=end, cause=cause[0], fix=cause[1]))
    down_at = _down_now(window, node)
    heard_since = down_at is not None and reported and reported[-1][1] > down_at + GRACE_MS
    if down_at is not None and reported and not heard_since and reported[-1][1] < until:
        start = max(down_at, reported[-1][1])
        found.append(
            Incident(
                node=node,
                scope="node",
                start_ms=start,
                end_ms=None,
                cause="no answer to its peers",
                fix="look at the machine",
            )
        )
    return found


def _cause(window: Window, node: str, start: int, end: int) -> tuple[str, str] | None:
    for meta, record in window.of(AgentStarted):
        if meta.node == node and start <= record.t_ms <= end + JOIN_MS:
            if record.previous == "clean":
                return "the agent was stopped by its operator", "started again"
            if record.previous == "unclean":
                return "the agent was killed, or the machine lost power", "restarted by itself or by the operator"
    if any(record.peer == node and start <= record.t_ms <= end for _, record in window.of(PeerDown)):
        return "its peers could not reach it", "came back without a restart: look at the network"
    return None


def _down_now(window: Window, node: str) -> int | None:
    """When the peers declared the node down, if none has seen it since and it did not stop in order."""
    downs = [r.last_seen_ms for _, r in window.of(PeerDown) if r.peer == node]
    ups = [r.t_ms for _, r in window.of(PeerUp) if r.peer == node]
    stops = [r.t_ms for m, r in window.of(AgentStopped) if m.node == node]
    last = max(downs, default=None)
    if last is None or any(t > last for t in ups) or any(t >= last - JOIN_MS for t in stops):
        return None
    return last


def _loader_incidents(window: Window) -> list[Incident]:
    return [
        Incident(
            node=meta.node,
            scope=f"model {record.model}",
            start_ms=record.t_ms,
            end_ms=record.t_ms,
            cause=f"the loader ended ({record.cause})",
            fix="started again by the agent",
        )
        for meta, record in window.of(LoaderExited)
    ]
