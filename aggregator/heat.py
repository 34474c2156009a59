"""Heat of the nodes and what to do about their room. Pure."""

from typing import Literal

import msgspec

from aggregator.window import Window, at_least_one, seconds
from shared.records import ThrottleEvent

HOT_MC = 95_000
TARGET_SHARE = 0.01
"""Default target: a node that was throttled for more of its time needs more air."""
MOVE_SHARE = 0.03
"""A node that was throttled for more of its time gives up a model."""
MOVE_KNOWN_S = 120.0
"""A model is not moved for the heat of less time than this."""
KNOWN_SHARE = 0.8
"""A share is one of the known time where that is at least this part of the time that the node reported."""
REPORTED_SHARE = 0.1
"""A model is moved for the heat of no less than this part of the time that any node reported."""
ROSE_SHARE = 0.05
"""A rise against the week before that explains slower tokens."""
ALERT_SHARE = 0.05
"""Default of the alert, over minutes."""


class NodeHeat(msgspec.Struct, frozen=True, kw_only=True):
    """One node's heat; peaks in thousandths of a degree."""

    node: str
    peak_package_mc: int | None
    peak_pcore_mc: int | None
    throttle_events: int
    throttled_share: float | None


class Thermal(msgspec.Struct, frozen=True, kw_only=True):
    """Heat of the rack and what to do about the room; ``kind`` is what the advice rests on: nodes that were throttled
    too long, nodes that became hot, neither, or no reading."""

    nodes: tuple[NodeHeat, ...]
    advice: str
    kind: Literal["throttled", "hot", "cool", "unknown"]


def share(window: Window, *nodes: str) -> float | None:
    """Share of the time of nodes in which they were throttled; where too little of that is known, the rest counts as
    cool. None where nothing is."""
    hosts = [host for host in window.hosts if host.node in nodes]
    hot_us, known_us = sum(h.throttled_us for h in hosts), sum(h.thermal_known_us for h in hosts)
    reported_us = sum(seconds(window.reported(node)) for node in nodes) * 1e6
    if not known_us:
        return None
    return hot_us / (known_us if known_us >= KNOWN_SHARE * reported_us else reported_us)


def share_to_move(window: Window, node: str) -> float | None:
    """The same, None where it is not known for long enough to move a model for it."""
    host, rack_s = window.host(node), seconds(at_least_one(map(window.reported, window.nodes)))
    needed_s = max(MOVE_KNOWN_S, KNOWN_SHARE * seconds(window.reported(node)), REPORTED_SHARE * rack_s)
    return share(window, node) if host is not None and host.thermal_known_us >= needed_s * 1e6 else None


def thermal(window: Window, target: float = TARGET_SHARE) -> Thermal:
    """Peaks and throttling of every node, and one piece of advice; ``target`` is the highest tolerable share."""
    nodes = tuple(_heat(window, node) for node in window.nodes)
    hot = [n.node for n in nodes if max(n.peak_package_mc or 0, n.peak_pcore_mc or 0) >= HOT_MC]
    throttled = [n.node for n in nodes if (n.throttled_share or 0) > target]
    if throttled:
        long = f"heat slowed them for over {target * 100:g} % of the time"
        text = f"Give {', '.join(throttled)} more air or cooler intake: {long}."
        return Thermal(nodes=nodes, kind="throttled", advice=text)
    if hot:
        text = f"{', '.join(hot)} came to 95 °C or more without losing speed; leave no less air than there is."
        return Thermal(nodes=nodes, kind="hot", advice=text)
    if any(n.peak_package_mc is not None or n.throttled_share is not None for n in nodes):
        return Thermal(nodes=nodes, kind="cool", advice="Nothing to change: no node was slowed by heat.")
    return Thermal(nodes=nodes, kind="unknown", advice="No data: no node could read a temperature or a pressure level.")


def _heat(window: Window, node: str) -> NodeHeat:
    host = window.host(node)
    return NodeHeat(
        node=node,
        peak_package_mc=host.package_temp_mc if host is not None else None,
        peak_pcore_mc=host.pcore_temp_mc if host is not None else None,
        throttle_events=sum(m.node == node and not event.open_at_start for m, event in window.of(ThrottleEvent)),
        throttled_share=share(window, node),
    )
