"""NodeEviction: which models left a node's memory, how often, and whether traffic or placement is to blame. Pure."""

import msgspec

from aggregator.window import Window
from shared.records import ModelEvicted, ModelLoaded, ModelMissed

TOP = 10
SOON_S = 600.0


class EvictionRow(msgspec.Struct, frozen=True, kw_only=True):
    """Evictions of one model on one node. ``wanted_again_s`` is the shortest time until somebody asked for it again
    there (or, from agents that do not report that, until it was loaded again)."""

    node: str
    model: str
    evictions: int
    bytes: int
    requests_last_hour: int
    made_room_for: tuple[str, ...]
    wanted_again_s: float | None
    verdict: str
    hint: str


class EvictionReport(msgspec.Struct, frozen=True, kw_only=True):
    """The most evicted first."""

    period: str
    total: int
    rows: tuple[EvictionRow, ...]


def report(window: Window) -> EvictionReport:
    """Evictions of a span, at most TOP rows."""
    groups: dict[tuple[str, str], list[ModelEvicted]] = {}
    for meta, record in window.of(ModelEvicted):
        groups.setdefault((meta.node, record.model), []).append(record)
    rows = [_row(node, model, found, window) for (node, model), found in sorted(groups.items())]
    rows.sort(key=lambda r: (-r.evictions, r.node, r.model))
    return EvictionReport(period=window.span.name, total=sum(r.evictions for r in rows), rows=tuple(rows[:TOP]))


def _row(node: str, model: str, found: list[ModelEvicted], window: Window) -> EvictionRow:
    missed = [r.after_us / 1e6 for m, r in window.of(ModelMissed) if m.node == node and r.model == model]
    loads = [r.t_ms for m, r in window.of(ModelLoaded) if m.node == node and r.model == model]
    waits = [min((t - e.t_ms for t in loads if t >= e.t_ms), default=None) for e in found]
    known = missed or [w / 1000 for w in waits if w is not None]
    again = min(known, default=None)
    busy = sum(e.requests_last_hour for e in found)
    verdict, hint = _verdict(found, busy, again)
    return EvictionRow(
        node=node,
        model=model,
        evictions=len(found),
        bytes=sum(e.bytes for e in found),
        requests_last_hour=busy,
        made_room_for=tuple(sorted({e.for_model for e in found if e.for_model})),
        wanted_again_s=again,
        verdict=verdict,
        hint=hint,
    )


def _verdict(found: list[ModelEvicted], busy: int, again: float | None) -> tuple[str, str]:
    if all(e.reason == "ordered" for e in found):
        return "ordered", "an operator unloaded it; nothing to do"
    if any(e.reason == "pressure" for e in found):
        return "memory", "models held more memory than was planned: compare their plan errors in the nodes' status"
    if all(e.reason == "idle" for e in found):
        short = again is not None and again < SOON_S
        return (
            "idle",
            f"its keep-alive time ended{f', and it was wanted {again:.0f} s later: raise it' if short else ''}",
        )
    if again is not None and again < SOON_S:
        return "placement", f"wanted again after {again:.0f} s: give it room on another node, or pin it here"
    if busy:
        return "placement", f"it had served {busy} requests in the hour before: two busy models share one node's memory"
    return "traffic", "nobody had asked for it in the hour before: the room was better used"
