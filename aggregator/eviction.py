"""Which models were evicted, how often, whether traffic justified it, and what to do. Pure.

Each eviction gets its own verdict; a model's row has the most frequent one:

1. ordered: an operator or the desired state unloaded it.
2. idle: its keep-alive expired.
3. placement, if it was requested again within ten minutes of its eviction;
4. placement, if it and another model evict each other (each for the other within two hours);
5. placement, if the memory was not needed: no other model is named and memory was not short;
6. placement, if it was busy: at least one request every three minutes in the hour before;
7. memory, if models held more than planned;
8. traffic: it was not wanted again soon, the memory was better used.

"placement" means that traffic did not justify it. What to do about it is not said here: ``Conclusion`` is, once for
every report, and its sentence is that of a row.
"""

import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from aggregator.calendar import HOUR_MS, duration
from aggregator.phrases import listed
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
WORDS: dict[Verdict, str] = {
    "placement": "avoidable",
    "memory": "over plan",
    "idle": "keep-alive",
    "traffic": "justified",
    "ordered": "ordered",
}
"""Verdicts as tables show them."""
Remedy = Literal["capacity", "restore", "blocked", "move", "budget", "pin", "leave", "fits", "none"]
"""What to do about a model. *capacity*: no node has the memory for it. *restore*: only nodes that are away have.
*blocked*: a node has, but a limit forbids it. *move*: the steps of the placement. *budget*: raise the memory budget of
a node whose memory allows it. *pin*: the budget allows all that was wanted at the same time. *leave*: other nodes serve
it and carry its load; take it off the one that evicts it. *fits*: it stands well. *none*: nobody misses it."""


class Conclusion(msgspec.Struct, frozen=True, kw_only=True):
    """What to do about a model, decided once: placement, evictions and recommendations only show it. ``node`` is where
    it was evicted, "" where that does not matter; ``nodes`` are those that the remedy is about. ``room_bytes`` are free
    there with the model in place and all that was wanted at the same time; ``budgets`` are those to set, one for
    each of ``nodes``; ``need_bytes`` is what the model needs, or what is missing."""

    model: str
    kind: Remedy
    node: str = ""
    nodes: tuple[str, ...] = ()
    need_bytes: int = 0
    room_bytes: int = 0
    budgets: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """What to do, as a sentence without a subject."""
        where, need, room = listed(self.nodes), f"{self.need_bytes / 1e9:.1f} GB", f"{self.room_bytes / 1e9:.1f} GB"
        return {
            "capacity": f"no node has room for it; {need} are missing",
            "restore": f"{need if self.need_bytes else 'nodes'} are missing: look at {where} first",
            "blocked": f"{where} would have room; see what does not fit" if where else "see what does not fit",
            "move": f"load it on {where}, see the moves" if where else "see the moves",
            "budget": f"raise memory.budget_bytes of {self._raised()}; there is memory for it",
            "pin": f"pin it on {where}: {room} stay free there beside all that was wanted at the same time",
            "leave": f"take it off {self.node}: {where} {'serves' if len(self.nodes) == 1 else 'serve'} it already",
            "fits": f"it stands on {where} now, and fits" if where else "it fits",
            "none": "most of its evictions were justified, and nobody misses it now",
        }[self.kind]

    def _raised(self) -> str:
        return listed([f"{n} to {value / 1e9:.1f} GB" for n, value in zip(self.nodes, self.budgets, strict=False)])


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
    """Evictions of one model on one node. ``bytes`` and ``requests_last_hour`` are those of one eviction: the largest,
    and the (lower) median. ``wanted_again_s`` is the shortest time until its next request there (or, for agents that do
    not report that, until it was loaded again). ``verdict`` is the most frequent one; ``justified`` counts those that
    traffic justified. ``reload_s`` is the total time of reloading it. ``remedy`` is what to do about those that it did
    not justify; ``hint`` is evidence and remedy in words."""

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
    remedy: Remedy | None = None


class ModelEvictions(msgspec.Struct, frozen=True, kw_only=True):
    """All evictions of one model, on every node."""

    model: str
    evictions: int
    nodes: int
    verdicts: dict[Verdict, int]


class EvictionReport(msgspec.Struct, frozen=True, kw_only=True):
    """The most evicted models first; ``left_out`` counts the rows beyond ``top``, ``left_out_evictions`` what they
    count. ``total``, ``verdicts``, ``remedies`` (of the avoidable ones) and ``models`` are over everything."""

    period: str
    total: int
    rows: tuple[EvictionRow, ...]
    left_out: int = 0
    left_out_evictions: int = 0
    verdicts: dict[Verdict, int] = {}
    remedies: dict[Remedy, int] = {}
    models: tuple[ModelEvictions, ...] = ()


def report(window: Window, top: int | None = TOP, conclusions: Sequence[Conclusion] = ()) -> EvictionReport:
    """Evictions of a span in at most ``top`` rows; None for all. ``conclusions`` are those of the placement."""
    groups: dict[tuple[str, str], list[Eviction]] = {}
    for one in judge(window):
        groups.setdefault((one.node, one.record.model), []).append(one)
    concluded = {(c.model, c.node): c for c in conclusions}
    rows = [
        _row(node, model, found, concluded.get((model, node)) or concluded.get((model, "")))
        for (node, model), found in groups.items()
    ]
    rows.sort(key=lambda r: (-r.evictions, r.node, r.model))
    shown, hidden = rows[:top], rows[top:] if top is not None else []
    remedies: Counter[Remedy] = Counter()
    for row in rows:
        if row.remedy is not None:
            remedies[row.remedy] += row.verdicts.get("placement", 0)
    return EvictionReport(
        period=window.span.name,
        total=sum(r.evictions for r in rows),
        rows=tuple(shown),
        left_out=len(hidden),
        left_out_evictions=sum(r.evictions for r in hidden),
        verdicts=_added(rows),
        remedies=dict(sorted(remedies.items())),
        models=_by_model(rows),
    )


def _by_model(rows: Sequence[EvictionRow]) -> tuple[ModelEvictions, ...]:
    """The most evicted first."""
    found = []
    for model in {row.model for row in rows}:
        mine = [row for row in rows if row.model == model]
        count = sum(row.evictions for row in mine)
        found.append(ModelEvictions(model=model, evictions=count, nodes=len(mine), verdicts=_added(mine)))
    return tuple(sorted(found, key=lambda m: (-m.evictions, m.model)))


def _added(rows: Sequence[EvictionRow]) -> dict[Verdict, int]:
    counts: Counter[Verdict] = Counter()
    for row in rows:
        counts.update(row.verdicts)
    return dict(sorted(counts.items()))


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
        "wanted": f"wanted again after {again_s or 0:.0f} s",
        "ping_pong": f"it and {one.for_model} push each other out of this node",
        "unneeded": "evicted although nothing needed its room",
        "busy": f"it had served {one.requests_last_hour} requests in the hour before",
        "unmissed": f"not wanted again there within {duration(SOON_S)}: the memory was better used",
    }[kind]


def _row(node: str, model: str, found: Sequence[Eviction], concluded: Conclusion | None) -> EvictionRow:
    counts = Counter(e.verdict for e in found)
    # ties go to the verdict that calls for action
    order: tuple[Verdict, ...] = ("placement", "memory", "idle", "traffic", "ordered")
    verdict = max(order, key=lambda v: (counts[v], -order.index(v)))
    most = Counter(e.kind for e in found if e.verdict == verdict).most_common(1)[0][0]
    records = [e.record for e in found]
    why, remedy = next(e.why for e in found if e.kind == most), concluded if counts["placement"] else None
    return EvictionRow(
        node=node,
        model=model,
        evictions=len(found),
        justified=counts["traffic"],
        bytes=max(r.bytes for r in records),
        requests_last_hour=statistics.median_low(r.requests_last_hour for r in records),
        made_room_for=tuple(sorted({r.for_model for r in records if r.for_model})),
        wanted_again_s=min((e.wanted_again_s for e in found if e.wanted_again_s is not None), default=None),
        reload_s=round(sum(r.reload_us for r in records) / 1e6, 3),
        verdict=verdict,
        hint=f"{why}: {remedy.text}" if remedy is not None and verdict == "placement" else why,
        verdicts=dict(sorted(counts.items())),
        remedy=remedy.kind if remedy is not None else None,
    )
