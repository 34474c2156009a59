"""Which model should stand on which node, why, and the moves to get there. Pure; simple rules that a person can check.

1. A node throttled for more than 3 % of its known time gives its least busy model away.
2. A model that keeps a node busy for more than 70 % gets that node to itself, or another copy where it fits.
3. Long prompts with few prompt-cache hits want a larger prompt cache.
4. A model that was evicted and wanted again goes where there is room.
A move loads at its target before it unloads at its source, so that the model is served all the while.
"""

import msgspec

from aggregator import eviction
from aggregator.window import Window, seconds
from shared.records import EngineWindow, HostSample, Resident, Served

THROTTLED = 0.03
BUSY = 0.70
LONG_PROMPT_TOK = 2_000
LOW_HIT_SHARE = 0.30


class NodeLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A node as it was: its memory, how busy and how hot."""

    node: str
    budget_bytes: int | None
    held_bytes: int
    busy_share: float | None
    throttled_share: float | None


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """A model on a node, and what is proposed for it there: keep, move or copy."""

    model: str
    node: str
    version: str
    need_bytes: int
    busy_share: float | None
    requests: int
    advice: str
    reason: str


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One step that can be carried out by `load` or `unload` on a node."""

    step: int
    action: str
    model: str
    node: str
    reason: str


class PlacementReport(msgspec.Struct, frozen=True, kw_only=True):
    """The map and the diff. ``rebalance`` is whether there is anything to move."""

    period: str
    rebalance: bool
    nodes: tuple[NodeLoad, ...]
    placed: tuple[Placed, ...]
    moves: tuple[Move, ...]
    notes: tuple[str, ...]


def propose(window: Window) -> PlacementReport:
    """Judge one span."""
    nodes = {name: _node(window, name) for name in window.nodes}
    current = _current(window)
    moves: list[tuple[str, str, str, str]] = []
    advice: dict[tuple[str, str], tuple[str, str]] = {}
    room = {n: (load.budget_bytes or 0) - load.held_bytes for n, load in nodes.items()}
    for name, load in nodes.items():
        here = sorted((p for p in current if p.node == name), key=lambda p: (p.busy_share or 0, p.model))
        wanted = _relief(load, here)
        if wanted is None:
            continue
        placed, action, reason = wanted
        target = _target(placed, room, current, nodes)
        if target is None:
            advice[placed.model, name] = (
                "keep",
                f"{reason}; but no other node has {placed.need_bytes / 1e9:.1f} GB free",
            )
            continue
        room[target] -= placed.need_bytes
        advice[placed.model, name] = (action, f"{reason}; {target} has room")
        moves.append(("load", placed.model, target, reason))
        if action == "move":
            moves.append(("unload", placed.model, name, f"served by {target} now"))
    moves += _returns(window, current, room)
    return PlacementReport(
        period=window.span.name,
        rebalance=bool(moves),
        nodes=tuple(nodes.values()),
        placed=tuple(_advised(p, advice) for p in current),
        moves=tuple(Move(step=n, action=a, model=m, node=d, reason=r) for n, (a, m, d, r) in enumerate(moves, 1)),
        notes=tuple(_cache_notes(window)),
    )


def _relief(load: NodeLoad, here: list[Placed]) -> tuple[Placed, str, str] | None:
    """The model to take off a hot or crowded node, how, and why; None when the node is fine."""
    if not here:
        return None
    if load.throttled_share is not None and load.throttled_share > THROTTLED:
        return here[0], "move", f"{load.node} was throttled {load.throttled_share:.1%} of the time"
    busiest = here[-1]
    if busiest.busy_share is not None and busiest.busy_share > BUSY:
        share = f"{busiest.model} keeps {load.node} busy {busiest.busy_share:.0%} of the time"
        return (here[0], "move", f"{share} and needs it to itself") if len(here) > 1 else (busiest, "copy", share)
    return None


def _target(placed: Placed, room: dict[str, int], current: list[Placed], nodes: dict[str, NodeLoad]) -> str | None:
    """The node with the most room that holds no copy yet and is not hot itself."""
    taken = {p.node for p in current if p.model == placed.model}
    fitting = [
        (-free, name)
        for name, free in room.items()
        if name not in taken and free >= placed.need_bytes and (nodes[name].throttled_share or 0) <= THROTTLED
    ]
    return min(fitting)[1] if fitting else None


def _returns(window: Window, current: list[Placed], room: dict[str, int]) -> list[tuple[str, str, str, str]]:
    """Models that were evicted, wanted again and stand nowhere now."""
    standing = {p.model for p in current}
    found: list[tuple[str, str, str, str]] = []
    for row in eviction.report(window).rows:
        fits = sorted((-free, node) for node, free in room.items() if free > 0)
        if row.verdict == "placement" and row.model not in standing and fits:
            found.append(("load", row.model, fits[0][1], f"evicted from {row.node}: {row.hint}"))
    return found


def _node(window: Window, name: str) -> NodeLoad:
    reported_us = seconds(window.reported(name)) * 1e6
    busy = sum(r.busy_prefill_us + r.busy_decode_us for m, r in window.of(EngineWindow) if m.node == name)
    hosts = [r for m, r in window.of(HostSample) if m.node == name]
    known = sum(h.thermal_known_us for h in hosts)
    budget = next((h.memory_budget_bytes for h in reversed(hosts) if h.memory_budget_bytes is not None), None)
    return NodeLoad(
        node=name,
        budget_bytes=budget,
        held_bytes=sum(r.need_bytes for r in _last_residents(window, name)),
        busy_share=busy / reported_us if reported_us else None,
        throttled_share=sum(h.throttled_us for h in hosts) / known if known else None,
    )


def _current(window: Window) -> list[Placed]:
    found = []
    for node in window.nodes:
        reported_us = seconds(window.reported(node)) * 1e6
        for resident in _last_residents(window, node):
            busy = sum(
                r.busy_prefill_us + r.busy_decode_us
                for m, r in window.of(EngineWindow)
                if m.node == node and r.version == resident.version
            )
            requests = sum(
                r.requests for _, r in window.of(Served) if r.worker == node and r.version == resident.version
            )
            found.append(
                Placed(
                    model=resident.model,
                    node=node,
                    version=resident.version,
                    need_bytes=resident.need_bytes,
                    busy_share=busy / reported_us if reported_us else None,
                    requests=requests,
                    advice="keep",
                    reason="fits, and its node is neither hot nor crowded",
                )
            )
    return found


def _last_residents(window: Window, node: str) -> list[Resident]:
    """What stood in the node's memory at the last moment it named anything.

    A node that was stopped in order ends with a batch that names nothing; what it held before is what it is for.
    """
    by_batch: dict[tuple[int, int, int], list[Resident]] = {}
    for meta, record in window.of(Resident):
        if meta.node == node and record.state == "ready":
            by_batch.setdefault((meta.incarnation, meta.epoch, meta.seq), []).append(record)
    return by_batch[max(by_batch)] if by_batch else []


def _advised(placed: Placed, advice: dict[tuple[str, str], tuple[str, str]]) -> Placed:
    found = advice.get((placed.model, placed.node))
    return msgspec.structs.replace(placed, advice=found[0], reason=found[1]) if found else placed


def _cache_notes(window: Window) -> list[str]:
    sums: dict[str, list[int]] = {}
    for _, record in window.of(Served):
        if record.outcome == "ok":
            total = sums.setdefault(record.model, [0, 0, 0])
            total[0] += record.requests
            total[1] += record.prompt_tok
            total[2] += record.cached_tok
    return [
        f"{model}: prompts of {prompt // requests} tokens on average and {cached / prompt:.0%} found in the prompt "
        "cache; raise its cache_bytes"
        for model, (requests, prompt, cached) in sorted(sums.items())
        if requests and prompt / requests > LONG_PROMPT_TOK and cached / prompt < LOW_HIT_SHARE
    ]
