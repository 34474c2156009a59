"""The time of a node: known, owned, reported, ready, and what its silence counts as."""

from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from typing import Any

from . import periods, spans
from .periods import HOUR_MS, Period
from .raw import Batch
from .spans import Spans

CLOSED_MS = 2_000
LONG_MS = 30 * 60_000
KNOWN_SHARE = 0.8
DOWN = ("power", "crash", "stopped", "network", "out_of_memory", "heat", "loader", "deploy")
EXCUSED = ("planned", "external", "other")
UNKNOWN = ("not_down", "unknown")


@dataclass
class Rack:
    """What is known of a rack: its batches by node, its configuration, the operator's notes."""

    batches: list[Batch]
    settings: dict[str, Any]
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def zone(self) -> str:
        """Its time zone."""
        return str(self.settings.get("timezone", "UTC"))

    @property
    def configured(self) -> dict[str, dict[str, Any]]:
        """The ``[[nodes]]`` tables by id."""
        return {str(one["id"]): one for one in self.settings.get("nodes", [])}

    def ended_in(self, start: int, end: int) -> list[Batch]:
        """Batches that count between two moments."""
        return [one for one in self.batches if start <= one.end_ms < end]

    def nodes(self) -> list[str]:
        """Every id that reported or is configured."""
        return sorted({one.node for one in self.batches} | set(self.configured))

    def of(self, node: str) -> list[Batch]:
        """A node's batches."""
        return [one for one in self.batches if one.node == node]


@dataclass
class Life:
    """A node within a period."""

    node: str
    known: Spans
    owned: Spans
    reported: Spans
    ready: Spans
    down: Spans
    excused: Spans
    unknown: Spans

    @property
    def idle(self) -> Spans:
        """Reported, without a model."""
        return spans.subtract(self.reported, self.ready)

    @property
    def unheard(self) -> Spans:
        """Owned and not reported."""
        return spans.subtract(self.owned, self.reported)


def until(rack: Rack, period: Period) -> int:
    """Until when a period is judged: its end, or how far it goes so far."""
    if period.over:
        return period.end_ms
    last = max((one.end_ms for one in rack.batches if one.end_ms < period.end_ms), default=0)
    return min(period.end_ms, max(period.now_ms // HOUR_MS * HOUR_MS, last))


def lives(rack: Rack, period: Period) -> dict[str, Life]:
    """Those nodes that are there in a period."""
    end = until(rack, period)
    found = (_life(rack, node, period.start_ms, end) for node in rack.nodes())
    return {one.node: one for one in found if one.known or one.owned}


def _life(rack: Rack, node: str, start: int, end: int) -> Life:
    mine = rack.of(node)
    reported = spans.clip(_covered(mine), start, end)
    ready_in = [one for one in mine if any(r["state"] == "ready" for r in one.of("resident"))]
    ready = spans.intersect(spans.clip(_covered(ready_in), start, end), reported)
    known = _known(rack, node, mine, reported, start, end)
    silent = spans.subtract(known, reported)
    explained = _explained(rack, node, mine, silent)
    parts = {kind: spans.intersect(silent, explained[kind]) for kind in ("down", "excused")}
    unknown = spans.subtract(spans.subtract(silent, parts["down"]), parts["excused"])
    owned = _owned(rack, node, known, reported, start, end)
    return Life(node, known, owned, reported, ready, parts["down"], parts["excused"], unknown)


def _covered(batches: list[Batch]) -> Spans:
    return spans.union(((one.start_ms, one.end_ms) for one in batches), CLOSED_MS)


def _known(rack: Rack, node: str, mine: list[Batch], reported: Spans, start: int, end: int) -> Spans:
    """From the period's beginning if it had reported before, else from its first report."""
    before = any(one.start_ms < start for one in mine)
    configured = node in rack.configured
    if not reported and not (before and configured):
        return []
    begin = start if before else reported[0][0]
    return spans.clip([(begin, _last(rack, node, reported, end))], start, end)


def _owned(rack: Rack, node: str, known: Spans, reported: Spans, start: int, end: int) -> Spans:
    since = rack.configured.get(node, {}).get("since")
    if since is None:
        return known
    begin = periods.midnight(_day(since), rack.zone)
    return spans.clip([(begin, _last(rack, node, reported, end))], start, end)


def _last(rack: Rack, node: str, reported: Spans, end: int) -> int:
    """The end of the period, earlier where it is retired before, but never before its last report."""
    retired = rack.configured.get(node, {}).get("retired")
    if retired is None:
        return end
    last = reported[-1][1] if reported else 0
    return min(end, max(periods.midnight(_day(retired), rack.zone), last))


def _day(value: Any) -> date:
    return value if isinstance(value, date) else date.fromisoformat(str(value))


def _explained(rack: Rack, node: str, mine: list[Batch], silent: Spans) -> dict[str, Spans]:
    """Where silence is down or excused. What an operator says comes before what is inferred."""
    down = [gap for gap in _gaps(mine) if _restarted(mine, gap)] + peers_say(rack, node)
    found = {"down": spans.union(down), "excused": [], "said": []}
    for note in rack.notes:
        if note.get("node") not in (None, node):
            continue
        free = spans.subtract(note["spans"], found["said"])
        found["said"] = spans.union([*found["said"], *free])
        found = {kind: spans.subtract(there, free) if kind != "said" else there for kind, there in found.items()}
        kind = _counts_as(note.get("cause"))
        if kind == "":
            found["down"] = spans.union([*found["down"], *spans.intersect(free, spans.union(down))])
        elif kind in found:
            found[kind] = spans.union([*found[kind], *free])
    return {kind: spans.intersect(there, silent) for kind, there in found.items()}


def _counts_as(cause: str | None) -> str:
    """What silence counts as under a note; "" where it says nothing of it."""
    if cause is None:
        return ""
    return "down" if cause in DOWN else "excused" if cause in EXCUSED else "unknown"


def _gaps(mine: list[Batch]) -> Spans:
    covered = _covered(mine)
    return [(one[1], other[0]) for one, other in pairwise(covered)]


def _restarted(mine: list[Batch], gap: tuple[int, int]) -> bool:
    """Whether another life of the agent follows."""
    before = [one for one in mine if one.end_ms <= gap[0]]
    after = [one for one in mine if one.start_ms >= gap[1]]
    return bool(before and after) and max(before, key=lambda b: b.end_ms).run != after[0].run


def peers_say(rack: Rack, node: str) -> Spans:
    """When others saw it down: from its last answer until it answered again, or until it reported again."""
    found = []
    for batch in rack.batches:
        for one in batch.of("peer_down", "peer_up"):
            if one["peer"] != node:
                continue
            if one["kind"] == "peer_up":
                found.append((one["t_ms"] - one["down_us"] // 1000, one["t_ms"]))
            else:
                found.append((one["last_seen_ms"], _answers(rack, node, batch.node, one["t_ms"])))
    return spans.union(found)


def _answers(rack: Rack, node: str, watcher: str, since: int) -> int:
    """When a node answered again that was declared down."""
    up = (one["t_ms"] for b in rack.of(watcher) for one in b.of("peer_up") if one["peer"] == node)
    seen = (one.start_ms for one in rack.of(node) if one.start_ms >= since)
    return min([at for at in (*up, *seen) if at >= since], default=since)
