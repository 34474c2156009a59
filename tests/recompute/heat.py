"""How hot nodes were, and for how long heat slowed them."""

import math
from typing import Any

from .lives import Life, Rack
from .periods import Period
from .raw import Batch

LEAST_US = 300 * 1_000_000
LIMIT_MC = 95_000
KNOWN = 0.8
_TEMPS = ("package_temp_mc", "pcore_temp_mc", "gpu_temp_mc")


def of_node(node: str, mine: list[Batch], reported_ms: int) -> dict[str, Any]:
    """Peaks, events and throttled share."""
    peaks = {name: _peak(mine, name) for name in _TEMPS}
    share = throttled_share(mine, reported_ms)
    events = [one for b in mine for one in b.of("throttle") if not one.get("open_at_start")]
    highest = max((peak for peak in peaks.values() if peak is not None), default=None)
    return {
        "node": node,
        "peak_package_mc": peaks["package_temp_mc"],
        "peak_pcore_mc": peaks["pcore_temp_mc"],
        "throttle_events": len(events),
        "throttled_share": share,
        "peak_mc": highest,
        "intake_mc": intake_bound(mine),
        "cooler_c": cooler(highest),
    }


def _peak(mine: list[Batch], name: str) -> int | None:
    return max((one[name] for b in mine for one in b.of("host") if one.get(name) is not None), default=None)


def throttled_share(mine: list[Batch], reported_ms: int) -> float | None:
    """Of the time for which the level is known; of the reported time where that is not nearly all of it."""
    throttled = sum(one.get("throttled_us", 0) for b in mine for one in b.of("host"))
    known = sum(one.get("thermal_known_us", 0) for b in mine for one in b.of("host"))
    whole = known if known >= KNOWN * reported_ms * 1000 else reported_ms * 1000
    return throttled / whole if known >= LEAST_US and whole else None


def intake_bound(mine: list[Batch]) -> int | None:
    """The lowest mean of the package in windows in which models hardly worked."""
    quiet = [b for b in mine if busy_us(b) * 100 <= b.length_ms * 1000]
    means = [one["package_temp_mean_mc"] for b in quiet for one in b.of("host") if one.get("package_temp_mean_mc")]
    return min(means, default=None)


def cooler(peak_mc: int | None) -> int | None:
    """Degrees of intake air that a node at its limit lacks."""
    if peak_mc is None or peak_mc < LIMIT_MC:
        return None
    return max(1, math.ceil((peak_mc - LIMIT_MC) / 1000))


def busy_us(batch: Batch) -> int:
    """Of all loaders of a window."""
    return sum(one.get("busy_prefill_us", 0) + one.get("busy_decode_us", 0) for one in batch.of("engine"))


def promise(batches: list[Batch]) -> float | None:
    """The throttled share of inference time."""
    hot = worked = 0
    for batch in batches:
        known = sum(one.get("thermal_known_us", 0) for one in batch.of("host"))
        busy = min(busy_us(batch), known)
        worked += busy
        hot += min(busy, sum(one.get("throttled_us", 0) for one in batch.of("host")))
    return hot / worked if worked >= LEAST_US else None


def of_nodes(rack: Rack, there: dict[str, Life], period: Period) -> list[dict[str, Any]]:
    """Each node that reported."""
    counted = rack.ended_in(period.start_ms, period.end_ms)
    found = []
    for node, life in there.items():
        mine = [one for one in counted if one.node == node]
        if mine:
            found.append(of_node(node, mine, sum(end - start for start, end in life.reported)))
    return found
