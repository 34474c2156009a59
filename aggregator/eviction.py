"""Which models were evicted, how often, and whether traffic justified it. Pure.

Each eviction gets its own verdict; a model's row has the most frequent one:

1. ordered: an operator or the desired state unloaded it.
2. idle: its keep-alive expired.
3. placement, if it was requested again within ten minutes of its eviction;
4. placement, if it and another model evict each other (each for the other within two hours);
5. placement, if the memory was not needed: no other model is named and memory was not short;
6. placement, if it was busy: at least one request every three minutes in the hour before;
7. memory, if models held more than planned;
8. traffic: nobody missed it, the memory was better used.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from aggregator.calendar import HOUR_MS, counted
from aggregator.window import Window
from shared.records import ModelEvicted, ModelLoaded, ModelMissed

TOP = 10
SOON_S = 600.0
PING_PONG_MS = 2 * HOUR_MS
BUSY_REQUESTS_H = 20

Kind = Literal["ordered", "idle", "idle_too_soon", "overrun", "wanted", "ping_pong", "unneeded", "busy", "unmissed"]
"""Which rule an eviction falls under."""
Verdict = Literal["placement", "memory", "idle", "traffic", "ordered"]
_UNLESS_PLACEMENT: dict[Kind, Verdict] = {
    "ordered": "ordered",
    "idle": "idle",
    "idle_too_soon": "idle",
    "overrun": "memory",
    "unmissed": "traffic",
}


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    """One eviction and which rule it falls under; ``why`` is the evidence as a sentence, ``wanted_again_s`` the time
    until the model's next request there."""

    node: str
    record: ModelEvicted
    kind: Kind
    why: str
    wanted_again_s: float | None

    @property
    def verdict(self) -> Verdict:
        """The rule's verdict."""
        return _UNLESS_PLACEMENT.get(self.kind, "placement")


class EvictionRow(msgspec.Struct, frozen=True, kw_only=True):
    """Evictions of one model on one node. ``wanted_again_s`` is the shortest time until its next request there (or, for
    agents that do not report that, until it was loaded again). ``verdict`` is the most frequent one; ``justified``
    counts those that traffic justified. ``reload_s`` is the total time of reloading it."""

    node: str
    model: str
    evictions: int
    justified: int
    bytes: int
    requests_last_hour: int
    made_room_for: tuple[str, ...]
    wanted_again_s: float | None
    reload_s: float
    verdict: Verdict
    hint: str
    verdicts: dict[Verdict, int] = {}


class EvictionReport(msgspec.Struct, frozen=True, kw_only=True):
    """The most evicted models first; ``left_out`` counts the rows beyond ``top``."""

    period: str
    total: int
    rows: tuple[EvictionRow, ...]
    left_out: int = 0


def report(window: Window, top: int | None = TOP) -> EvictionReport:
    """Evictions of a span in at most ``top`` rows; None for all."""
    groups: dict[tuple[str, str], list[Eviction]] = {}
    for one in judge(window):
        groups.setdefault((one.node, one.record.model), []).append(one)
    rows = [_row(node, model, found) for (node, model), found in groups.items()]
    rows.sort(key=lambda r: (-r.evictions, r.node, r.model))
    shown = tuple(rows[:top])
    total = sum(r.evictions for r in rows)
    return EvictionReport(period=window.span.name, total=total, rows=shown, left_out=len(rows) - len(shown))


def judge(window: Window) -> list[Eviction]:
    """Every eviction of a span with its verdict, in time order."""
    evictions = [(meta.node, record) for meta, record in window.of(ModelEvicted)]
    wanted = _wanted(window)
    pushed: dict[tuple[str, str, str], list[int]] = {}
    for node, one in evictions:
        if one.for_model:
            pushed.setdefault((node, one.model, one.for_model), []).append(one.t_ms)
    found = []
    for node, one in evictions:
        again_s = _after(wanted.get((node, one.model), []), one.t_ms)
        back = pushed.get((node, one.for_model, one.model), [])
        kind = _kind(one, again_s, any(abs(t - one.t_ms) <= PING_PONG_MS for t in back))
        found.append(Eviction(node=node, record=one, kind=kind, why=_why(kind, one, again_s), wanted_again_s=again_s))
    return sorted(found, key=lambda e: (e.record.t_ms, e.node, e.record.model))


def _wanted(window: Window) -> dict[tuple[str, str], list[int]]:
    """When each model was requested again on each node, or, for agents that do not report that, loaded again."""
    wanted: dict[tuple[str, str], list[int]] = {}
    for meta, missed in window.of(ModelMissed):
        wanted.setdefault((meta.node, missed.model), []).append(missed.t_ms)
    reported = set(wanted)
    for meta, loaded in window.of(ModelLoaded):
        if (meta.node, loaded.model) not in reported:
            wanted.setdefault((meta.node, loaded.model), []).append(loaded.t_ms)
    return {key: sorted(times) for key, times in wanted.items()}


def _after(times: Sequence[int], t_ms: int) -> float | None:
    place = bisect_left(times, t_ms)
    return (times[place] - t_ms) / 1000 if place < len(times) else None


def _kind(one: ModelEvicted, again_s: float | None, ping_pong: bool) -> Kind:
    soon = again_s is not None and again_s < SOON_S
    if one.reason == "ordered":
        return "ordered"
    if one.reason == "idle":
        return "idle_too_soon" if soon else "idle"
    if one.reason == "pressure":
        return "overrun"
    if soon:
        return "wanted"
    if ping_pong:
        return "ping_pong"
    if not one.for_model:
        return "unneeded"
    return "busy" if one.requests_last_hour >= BUSY_REQUESTS_H else "unmissed"


def _why(kind: Kind, one: ModelEvicted, again_s: float | None) -> str:
    return {
        "ordered": "an operator unloaded it; nothing to do",
        "idle": "its keep-alive time ended",
        "idle_too_soon": f"its keep-alive time ended, and it was wanted {again_s or 0:.0f} s later: raise it",
        "overrun": "models held more memory than was planned: compare their plan errors in the nodes' status",
        "wanted": f"wanted again after {again_s or 0:.0f} s: give it room on another node, or pin it here",
        "ping_pong": f"it and {one.for_model} push each other out of this node: part them",
        "unneeded": "evicted although nothing needed its room: look at this node's budget and settings",
        "busy": f"it had served {counted(one.requests_last_hour, 'request')} in the hour before: "
        "two busy models share its node",
        "unmissed": "nobody missed it: the room was better used",
    }[kind]


def _row(node: str, model: str, found: Sequence[Eviction]) -> EvictionRow:
    counts = Counter(e.verdict for e in found)
    # ties go to the verdict that calls for action
    order: tuple[Verdict, ...] = ("placement", "memory", "idle", "traffic", "ordered")
    verdict = max(order, key=lambda v: (counts[v], -order.index(v)))
    most = Counter(e.kind for e in found if e.verdict == verdict).most_common(1)[0][0]
    records = [e.record for e in found]
    return EvictionRow(
        node=node,
        model=model,
        evictions=len(found),
        justified=counts["traffic"],
        bytes=sum(r.bytes for r in records),
        requests_last_hour=sum(r.requests_last_hour for r in records),
        made_room_for=tuple(sorted({r.for_model for r in records if r.for_model})),
        wanted_again_s=min((e.wanted_again_s for e in found if e.wanted_again_s is not None), default=None),
        reload_s=round(sum(r.reload_us for r in records) / 1e6, 3),
        verdict=verdict,
        hint=next(e.why for e in found if e.kind == most),
        verdicts=dict(sorted(counts.items())),
    )
