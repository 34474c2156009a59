"""Swaps and incidents: what single events add up to."""

from collections import Counter, defaultdict
from typing import Any

from . import spans
from .lives import LONG_MS, Life, Rack
from .periods import Period
from .raw import SKEWED_MS, Batch, Record

KINDS = {
    *(
        "served",
        "engine",
        "resident",
        "desired_observed",
        "host",
        "hardware",
        "outlet",
        "agent_started",
        "agent_stopped",
    ),
    *("model_loaded", "model_timed", "model_evicted", "model_missed", "memory_pressed", "swap_finished"),
    *("loader_exited", "throttle", "throttle_ended", "peer_down", "peer_up", "certificate_expires", "node_id_clash"),
    *("audit_failing", "audit_recovered"),
    "taint_changed",
}
"""Every kind of record that there is."""


def events(batches: list[Batch], *kinds: str) -> list[tuple[str, Record]]:
    """Node and event, in the order of time."""
    found = [(batch.node, one) for batch in batches for one in batch.of(*kinds)]
    return sorted(found, key=lambda pair: (pair[1]["t_ms"], pair[0]))


def swaps(batches: list[Batch]) -> dict[str, Any]:
    """How many there were, and how long the longest took."""
    all_of = [one for _, one in events(batches, "swap_finished")]
    outcomes = Counter(one["outcome"] for one in all_of)
    longest = max((one["window_us"] for one in all_of if one["outcome"] == "flipped"), default=None)
    found = {"flipped": outcomes["flipped"], "failed": outcomes["failed"]}
    return found | {"longest_s": None if longest is None else longest / 10**6}


def incidents(rack: Rack, there: dict[str, Life], period: Period, until_ms: int) -> list[dict[str, Any]]:
    """Silences that are explained or long, and loaders that ended."""
    found = []
    for node, life in there.items():
        for start, end in _silences(life):
            unknown = spans.clip(life.unknown, start, end)
            if spans.length(unknown) == end - start and end - start < LONG_MS:
                continue
            still = end >= until_ms
            row = {"node": node, "scope": "node", "start_ms": start, "end_ms": None if still else end}
            found.append(row | {"times": 1})
    counted = rack.ended_in(period.start_ms, period.end_ms)
    for node, one in events(counted, "loader_exited"):
        scope = f"model {one['model']}"
        found.append({"node": node, "scope": scope, "start_ms": one["t_ms"], "end_ms": one["t_ms"], "times": 1})
    for node, one in events(counted, "swap_finished"):
        if one["outcome"] == "failed":
            began = one["t_ms"] - one.get("window_us", 0) // 1000
            row = {"node": node, "scope": f"model {one['model']}", "start_ms": began, "end_ms": one["t_ms"], "times": 1}
            found.append(row)
    return found


def _silences(life: Life) -> spans.Spans:
    return spans.subtract(life.known, life.reported)


def desired(batches: list[Batch]) -> list[dict[str, Any]]:
    """The generation that each node follows, and its state."""
    found: dict[str, dict[str, Any]] = {}
    for batch in sorted(batches, key=lambda b: b.end_ms):
        for one in batch.of("desired_observed"):
            had = found.get(batch.node, {})
            same = (had.get("generation"), had.get("state")) == (one["generation"], one["state"])
            since = had["since_ms"] if same else batch.start_ms
            lost = had.get("not_converged", 0) + (one["state"] in ("drifted", "failed", "acting"))
            found[batch.node] = {"node": batch.node, "generation": one["generation"], "state": one["state"]}
            found[batch.node] |= {"since_ms": since, "not_converged": lost}
    return [found[node] for node in sorted(found)]


def telemetry(rack: Rack, counted: list[Batch], until_ms: int) -> dict[str, Any]:
    """How far a period was judged, and what of it did not arrive or is not understood."""
    unknown = sum(one.get("kind") not in KINDS for batch in counted for one in batch.records)
    skewed: dict[str, int] = {}
    for batch in counted:
        if batch.skew_ms is not None and abs(batch.skew_ms) > max(SKEWED_MS, abs(skewed.get(batch.node, 0))):
            skewed[batch.node] = batch.skew_ms
    return {"until_ms": until_ms, "lost_batches": lost(counted), "unknown_records": unknown, "clock_skew_ms": skewed}


def lost(batches: list[Batch]) -> int:
    """Batches that a run had dropped when it was last heard, as far as they were in this period."""
    most: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for one in batches:
        most[(one.node, *one.run)].append(one.lost)
    return sum(max(mine) - min(mine) for mine in most.values())
