"""Which nodes the rack has in a span, and from when until when each of them counts. Pure.

A node is known from its first report on: nothing is said of the time before. It is owned, and paid for, from ``since``
of its [[nodes]] table, else from its first report, until ``retired``, else until the end of what is judged. A node that
reported before the span and is silent in all of it is still there, until somebody says that it is retired.
"""

from collections.abc import Sequence
from datetime import date, datetime
from zoneinfo import ZoneInfo

import msgspec

from aggregator.config import Node
from aggregator.window import Intervals, Window, union, without

JOIN_MS = 2_000
"""Consecutive windows have small gaps between them; shorter ones are ignored."""


class Tenure(msgspec.Struct, frozen=True, kw_only=True):
    """A node's time within a span: known [known_ms, until_ms), owned [owned_ms, until_ms). ``reported`` is when it
    reported, ``silent`` the rest of its known time, ``unheard`` the rest of its owned time. ``retired`` is whether it
    was taken out of the rack within the span, ``came_back`` whether it reported after the day of its retirement began:
    then it counts until its last report."""

    node: str
    known_ms: int
    owned_ms: int
    until_ms: int
    reported: Intervals
    silent: Intervals
    unheard: Intervals
    retired: bool = False
    came_back: bool = False


def judged_until(window: Window, now_ms: int) -> int:
    """How far a span is judged: to its end, or to now; telemetry from after ``now_ms`` counts, too."""
    latest = max((end for node in window.nodes for _, end in window.reported(node)), default=0)
    return min(window.span.until_ms, max(now_ms, latest))


def fleet(window: Window, nodes: Sequence[Node], now_ms: int) -> tuple[Tenure, ...]:
    """Every node of a span, in order of their names. ``nodes`` are the configured ones."""
    until_ms, configured = judged_until(window, now_ms), {node.id: node for node in nodes}
    names = sorted({*window.nodes, *configured})
    found = (_tenure(window, configured.get(name, Node(id=name)), until_ms) for name in names)
    return tuple(one for one in found if one is not None)


def _tenure(window: Window, node: Node, until_ms: int) -> Tenure | None:
    """None for a node that is not there in the span."""
    begin_ms, zone = window.span.since_ms, window.span.timezone
    reported = union(window.reported(node.id), JOIN_MS)
    # one that reports is not retired, whatever somebody wrote
    heard_ms = reported[-1][1] if reported else begin_ms
    end_ms = max(heard_ms, min(until_ms, _midnight(node.retired, zone))) if node.retired is not None else until_ms
    first_ms = begin_ms if node.id in window.reported_before else (reported[0][0] if reported else end_ms)
    owned_ms = first_ms if node.since is None else max(begin_ms, _midnight(node.since, zone))
    if min(first_ms, owned_ms) >= end_ms:
        return None
    return Tenure(
        node=node.id,
        known_ms=min(first_ms, end_ms),
        owned_ms=min(owned_ms, end_ms),
        until_ms=end_ms,
        reported=reported,
        silent=without(union([(first_ms, end_ms)]), reported),
        unheard=without(union([(owned_ms, end_ms)]), reported),
        retired=node.retired is not None and end_ms < until_ms,
        came_back=bool(reported) and node.retired is not None and heard_ms > _midnight(node.retired, zone),
    )


def _midnight(day: date, zone: str) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone)).timestamp() * 1000)
