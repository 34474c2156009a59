"""Where models stand: memory, busy shares and requests. What the solver proposes is no figure."""

from typing import Any

from . import heat, spans, work
from .lives import Life, Rack
from .periods import Period
from .raw import Batch


def nodes(rack: Rack, there: dict[str, Life], period: Period) -> list[dict[str, Any]]:
    """Budget, memory held, busy and throttled share of each node."""
    counted = rack.ended_in(period.start_ms, period.end_ms)
    busy = work.busy_us(counted)
    found = []
    for node, life in there.items():
        mine = [one for one in counted if one.node == node]
        reported = spans.length(life.reported)
        if not mine:
            continue
        found.append(
            {
                "node": node,
                "budget_bytes": max((h.get("memory_budget_bytes") or 0 for b in mine for h in b.of("host")), default=0),
                "held_bytes": sum(one["need_bytes"] for one in last_residents(mine).values()),
                "busy_share": min(1.0, busy.get(node, 0) / (reported * 1000)) if reported else None,
                "throttled_share": heat.throttled_share(mine, reported),
            }
        )
    return found


def last_residents(mine: list[Batch]) -> dict[str, dict[str, Any]]:
    """Models in a node's memory at its last window."""
    last = max(mine, key=lambda b: b.end_ms)
    return {one["model"]: one | {"node": last.node} for one in last.of("resident")}


def rows(rack: Rack, there: dict[str, Life], period: Period) -> list[dict[str, Any]]:
    """Each model on each node: its newest version, and the work of all of its versions."""
    counted = rack.ended_in(period.start_ms, period.end_ms)
    found = []
    for node, life in there.items():
        mine = [one for one in counted if one.node == node]
        reported = spans.length(life.reported)
        for name, one in sorted(last_residents(mine).items()) if mine else ():
            busy = sum(
                r.get("busy_prefill_us", 0) + r.get("busy_decode_us", 0)
                for b in mine
                for r in b.of("engine")
                if r["model"] == name
            )
            found.append(
                {
                    "node": node,
                    "model": name,
                    "version": one["version"],
                    "need_bytes": one["need_bytes"],
                    "pinned": one.get("pinned", False),
                    "busy_share": busy / (reported * 1000) if reported else None,
                    "requests": _requests(counted, node, name),
                }
            )
    return found


def _requests(counted: list[Batch], node: str, name: str) -> int:
    """Answered by a model at a node."""
    return sum(
        one["requests"]
        for b in counted
        for one in b.served
        if (one.get("worker", ""), one["model"], one.get("outcome", "ok")) == (node, name, "ok")
    )
