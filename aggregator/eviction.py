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

import msgspec

from aggregator.calendar import HOUR_MS
from aggregator.window import Window
from shared.records import ModelEvicted, ModelLoaded, ModelMissed

TOP = 10
SOON_S = 600.0
PING_PONG_MS = 2 * HOUR_MS
BUSY_REQUESTS_H = 20


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """One eviction with its verdict and the evidence as a sentence."""

    node: str
    model: str
    t_ms: int
    verdict: str
    why: str
    wanted_again_s: float | None
    bytes: int


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
    verdict: str
    hint: str
    verdicts: dict[str, int] = {}


class EvictionReport(msgspec.Struct, frozen=True, kw_only=True):
    """The most evicted models first; ``left_out`` counts the rows beyond ``top``."""

    period: str
    total: int
    rows: tuple[EvictionRow, ...]
    left_out: int = 0


def report(window: Window, top: int = TOP) -> EvictionReport:
    """Evictions of a span in at most ``top`` rows."""
    groups: dict[tuple[str, str], list[ModelEvicted]] = {}
    for meta, record in window.of(ModelEvicted):
        groups.setdefault((meta.node, record.model), []).append(record)
    judged = judge(window)
    rows = [_row(found, [j for j in judged if (j.node, j.model) == key], key) for key, found in sorted(groups.items())]
    rows.sort(key=lambda r: (-r.evictions, r.node, r.model))
    return EvictionReport(
        period=window.span.name,
        total=sum(r.evictions for r in rows),
        rows=tuple(rows[:top]),
        left_out=max(0, len(rows) - top),
    )


def judge(window: Window) -> list[Judged]:
    """Every eviction of a span with its verdict, in time order."""
    evictions = [(meta.node, record) for meta, record in window.of(ModelEvicted)]
    wanted: dict[tuple[str, str], list[int]] = {}
    for meta, missed in window.of(ModelMissed):
        wanted.setdefault((meta.node, missed.model), []).append(missed.t_ms)
    reported = set(wanted)
    for meta, loaded in window.of(ModelLoaded):
        if (meta.node, loaded.model) not in reported:
            wanted.setdefault((meta.node, loaded.model), []).append(loaded.t_ms)
    for times in wanted.values():
        times.sort()
    pushed: dict[tuple[str, str, str], list[int]] = {}
    for node, one in evictions:
        if one.for_model:
            pushed.setdefault((node, one.model, one.for_model), []).append(one.t_ms)
    found = []
    for node, one in evictions:
        again_s = _after(wanted.get((node, one.model), []), one.t_ms)
        back = pushed.get((node, one.for_model, one.model), [])
        ping_pong = any(abs(t - one.t_ms) <= PING_PONG_MS for t in back)
        verdict, why = _verdict(one, again_s, ping_pong)
        found.append(
            Judged(
                node=node,
                model=one.model,
                t_ms=one.t_ms,
                verdict=verdict,
                why=why,
                wanted_again_s=again_s,
                bytes=one.bytes,
            )
        )
    return sorted(found, key=lambda j: (j.t_ms, j.node, j.model))


def _after(times: Sequence[int], t_ms: int) -> float | None:
    place = bisect_left(times, t_ms)
    return (times[place] - t_ms) / 1000 if place < len(times) else None


def _verdict(one: ModelEvicted, again_s: float | None, ping_pong: bool) -> tuple[str, str]:
    if one.reason == "ordered":
        return "ordered", "an operator unloaded it; nothing to do"
    soon = again_s is not None and again_s < SOON_S
    if one.reason == "idle":
        late = f", and it was wanted {again_s:.0f} s later: raise it" if soon else ""
        return "idle", f"its keep-alive time ended{late}"
    if one.reason == "pressure":
        return "memory", "models held more memory than was planned: compare their plan errors in the nodes' status"
    if soon:
        return "placement", f"wanted again after {again_s:.0f} s: give it room on another node, or pin it here"
    if ping_pong:
        return "placement", f"it and {one.for_model} push each other out of this node: part them"
    if not one.for_model:
        return "placement", "evicted although nothing needed its room: look at this node's budget and settings"
    if one.requests_last_hour >= BUSY_REQUESTS_H:
        return "placement", (
            f"it had served {one.requests_last_hour} requests in the hour before: two busy models share its node"
        )
    return "traffic", "nobody missed it: the room was better used"


def _row(found: list[ModelEvicted], judged: list[Judged], key: tuple[str, str]) -> EvictionRow:
    node, model = key
    counts = Counter(j.verdict for j in judged)
    # ties go to the verdict that calls for action
    order = ("placement", "memory", "idle", "traffic", "ordered")
    verdict = max(order, key=lambda v: (counts[v], -order.index(v)))
    known = [j.wanted_again_s for j in judged if j.wanted_again_s is not None]
    reasons = Counter(j.why.split(":")[0] for j in judged if j.verdict == verdict)
    most = reasons.most_common(1)[0][0]
    hint = next(j.why for j in judged if j.verdict == verdict and j.why.split(":")[0] == most)
    return EvictionRow(
        node=node,
        model=model,
        evictions=len(found),
        justified=counts["traffic"],
        bytes=sum(e.bytes for e in found),
        requests_last_hour=sum(e.requests_last_hour for e in found),
        made_room_for=tuple(sorted({e.for_model for e in found if e.for_model})),
        wanted_again_s=min(known, default=None),
        reload_s=round(sum(e.reload_us for e in found) / 1e6, 3),
        verdict=verdict,
        hint=hint,
        verdicts=dict(sorted(counts.items())),
    )
