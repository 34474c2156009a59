"""Availability of nodes, rack and requests."""

from collections.abc import Iterable
from typing import Any

from . import spans
from .lives import KNOWN_SHARE, Life
from .raw import Batch, Record

_FIELDS = ("up", "idle", "down", "unknown", "excused")


def of_node(life: Life) -> dict[str, Any]:
    """Seconds of each state, and the percentage."""
    parts = (life.ready, life.idle, life.down, life.unknown, life.excused)
    return _states(life.node, dict(zip(_FIELDS, map(spans.length, parts), strict=True)))


def of_rack(lives: Iterable[Life]) -> dict[str, Any]:
    """The same of the rack as a whole."""
    there = list(lives)
    sets = [s for one in there for s in (one.known, one.reported, one.ready, one.down, one.excused, one.unknown)]
    bounds = [at for one in there for span in one.known for at in span]
    found = dict.fromkeys(_FIELDS, 0)
    for start, end in spans.edges(sets, min(bounds), max(bounds)) if bounds else []:
        if state := _state([one for one in there if spans.holds(one.known, start)], start):
            found[state] += end - start
    return _states("", found)


def _state(there: list[Life], at: int) -> str:
    """What the rack is at a moment; "" where no node is there."""
    if any(spans.holds(one.reported, at) for one in there):
        return "up" if any(spans.holds(one.ready, at) for one in there) else "idle"
    excused = [spans.holds(one.excused, at) for one in there]
    down = [spans.holds(one.down, at) for one in there]
    if there and all(excused):
        return "excused"
    if there and all(x or d for x, d in zip(excused, down, strict=True)):
        return "down"
    return "unknown" if there else ""


def _states(node: str, ms: dict[str, int]) -> dict[str, Any]:
    known = sum(ms[name] for name in ("up", "idle", "down"))
    whole = known + ms["unknown"]
    found = {"node": node, "share": share(ms), "known_share": known / whole if whole else None}
    return found | {f"{name}_s": ms[name] / 1000 for name in _FIELDS}


def share(ms: dict[str, int]) -> float | None:
    """Up of up and down; None where too little is known."""
    up, down = ms["up"] + ms["idle"], ms["down"]
    known, whole = up + down, up + down + ms["unknown"]
    if known == 0 or known < KNOWN_SHARE * whole:
        return None
    return up / known


def requests(batches: Iterable[Batch]) -> dict[str, int]:
    """Requests by outcome; refused ones for want of capacity apart."""
    found = dict.fromkeys(("ok", "failed", "cancelled", "refused", "no_capacity"), 0)
    for one in (record for batch in batches for record in batch.of("served")):
        outcome = one.get("outcome", "ok")
        found[outcome] += one["requests"]
        found["no_capacity"] += one["requests"] if outcome == "refused" and _is_want(one) else 0
    return found


def _is_want(one: Record) -> bool:
    """Whether nothing could serve it. Older agents gave no reason: that counts against the rack."""
    return one.get("finish", "") not in ("limit", "request")


def of_requests(counts: dict[str, int]) -> dict[str, Any]:
    """Request availability."""
    bad = counts["failed"] + counts["no_capacity"]
    whole = counts["ok"] + bad
    return {
        "requests_ok": counts["ok"],
        "requests_bad": bad,
        "requests_failed": counts["failed"],
        "request_share": counts["ok"] / whole if whole else None,
    }


def refused(batches: Iterable[Batch]) -> dict[str, int]:
    """Refused requests by their reason."""
    found = {f"refused_{reason}": 0 for reason in ("capacity", "limit", "request", "unsaid")}
    for one in (record for batch in batches for record in batch.of("served")):
        if one.get("outcome", "ok") == "refused":
            found[f"refused_{one.get('finish') or 'unsaid'}"] += one["requests"]
    return found
