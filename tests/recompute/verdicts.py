"""Verdicts that follow from figures, by the table at the end of docs/figures.md."""

from fractions import Fraction
from typing import Any

Found = dict[str, Any]
DEFAULTS = {
    "itl_p95_ms": 100,
    "uptime": Fraction("0.999"),
    "throttled": Fraction("0.01"),
    "swap_s": 120,
    "times_cheaper": 5,
    "saving": 0,
}


def targets(settings: Found) -> dict[str, float]:
    """Those of the configuration."""
    return {name: float(value) for name, value in (DEFAULTS | settings.get("scorecard", {})).items()}


def uptime(share: float | None, rack: Found, target: float) -> tuple[float | None, bool | None]:
    """The worse of the two, and whether both reach the target. ``rack`` are its seconds by state."""
    known = [one for one in (share, rack["share"]) if one is not None]
    if any(one < target for one in known):
        return min(known), False
    up = rack["up_s"] + rack["idle_s"]
    whole = up + rack["down_s"] + rack["unknown_s"]
    # time that nobody knows of could have broken the promise
    doubtful = len(known) < 2 or up < target * whole
    return (min(known) if known else None), None if doubtful else True


def at_most(value: float | None, target: float) -> bool | None:
    """Latency, heat and swaps."""
    return None if value is None else value <= target


def scorecard(settings: Found, figures: Found) -> list[Found]:
    """Every line that has a figure. ``figures`` has itl_us, request_share, rack, throttled, swap_s, saving, apis."""
    aims = targets(settings)
    worse, kept = uptime(figures["request_share"], figures["rack"], aims["uptime"])
    itl = None if figures["itl_us"] is None else figures["itl_us"] / 1000
    rows = [
        {"kind": "latency", "value": itl, "target": aims["itl_p95_ms"], "kept": at_most(itl, aims["itl_p95_ms"])},
        {"kind": "uptime", "value": worse, "target": aims["uptime"], "kept": kept},
        _row("heat", figures["throttled"], aims["throttled"]),
        _row("swap", figures["swap_s"], aims["swap_s"]),
    ]
    if figures["saving"] is not None:
        saved = figures["saving"]
        rows.append({"kind": "saving", "value": saved, "target": aims["saving"], "kept": saved >= aims["saving"]})
    return [*rows, *(_frontier(one, aims["times_cheaper"]) for one in figures["apis"] if one.get("times_cheaper"))]


def _row(kind: str, value: float | None, target: float) -> Found:
    return {"kind": kind, "value": value, "target": target, "kept": at_most(value, target)}


def _frontier(one: Found, target: float) -> Found:
    times = one["times_cheaper"]
    kept = None if times is None else times >= target
    name = f"{one['model']} against {one['frontier']}"
    return {"kind": "price", "name": name, "value": times, "target": target, "kept": kept}


def flagged(now: Found, before: Found, cost: Found) -> bool:
    """Whether the price of a name jumped, with enough tokens in both periods."""
    ratio, least = float(cost.get("flag_ratio", 2)), int(cost.get("flag_min_tok", 200_000))
    enough = now["tokens"] >= least and before["tokens"] >= least
    pairs = [(now[name], before[name]) for name in ("loaded_per_m", "direct_per_m")]
    return enough and any(a is not None and b and a / b >= ratio for a, b in pairs)
