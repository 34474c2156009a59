"""What to do about the rack, from everything that was judged. Pure."""

from typing import Literal

import msgspec

from aggregator.calendar import counted
from aggregator.config import Scorecard
from aggregator.cost import CostReport
from aggregator.eviction import EvictionReport
from aggregator.heat import Thermal
from aggregator.placement import PlacementReport
from aggregator.uptime import Uptime
from aggregator.window import Window, seconds

IDLE_NODE = 0.02
RETIRE_AFTER_S = 7 * 86_400


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, and why."""

    kind: Literal["placement", "capacity", "retirement", "operations"]
    text: str
    because: str


def recommendations(
    window: Window,
    heat: Thermal,
    map_: PlacementReport,
    money: CostReport,
    up: Uptime,
    evicted: EvictionReport,
    targets: Scorecard,
) -> list[Recommendation]:
    """Capacity and placement first, then nodes to retire, then what an operator should look into."""
    found = [Recommendation(kind="capacity", text="make room", because=text) for text in map_.short]
    found += [
        Recommendation(kind="placement", text=f"{m.action} {m.model} on {m.node}", because=m.reason) for m in map_.moves
    ]
    found += [Recommendation(kind="placement", text=note, because="placement") for note in map_.notes]
    found += [Recommendation(kind="placement", text=s.reason, because="prompt-cache hits") for s in map_.settings]
    found += [
        Recommendation(
            kind="capacity",
            text=f"add memory or a node for {row.model}",
            because=f"evicted {counted(row.evictions, 'time')} from {row.node}: {row.hint}",
        )
        for row in evicted.rows
        if row.verdict == "placement" and row.evictions > 1
    ]
    touched = {m.node for m in map_.moves} | {m.source for m in map_.moves}
    if len(map_.nodes) > 1 and not map_.short:
        found += [
            Recommendation(
                kind="retirement",
                text=f"{n.node} may be given another task",
                because=f"its models worked {n.busy_share:.1%} of the time it reported",
            )
            for n in map_.nodes
            if n.busy_share is not None
            and n.busy_share < IDLE_NODE
            and n.node not in touched
            and seconds(window.reported(n.node)) >= RETIRE_AFTER_S
        ]
    found += [
        Recommendation(kind="operations", text=f"look into {i.scope} on {i.node}", because=f"{i.text}; {i.fix}")
        for i in up.incidents
        if i.end_ms is None
    ]
    found += [
        Recommendation(kind="operations", text=f"find out why {n.node} is down so often", because=f"up {n.share:.2%}")
        for n in up.nodes
        if n.share is not None and n.share < targets.uptime and _failed(n.node, up)
    ]
    found += [
        Recommendation(kind="operations", text=f"cost of {m.model}", because=m.change.text)
        for m in money.models
        if m.change is not None and m.change.flagged
    ]
    if heat.kind == "throttled":
        found.append(Recommendation(kind="operations", text=heat.advice, because="thermal telemetry"))
    return found


def _failed(node: str, up: Uptime) -> bool:
    """Whether a node was ever down without its operator having stopped it."""
    return any((i.node, i.scope) == (node, "node") and i.cause != "stopped" for i in up.incidents)
