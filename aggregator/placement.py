"""Which model should be on which node, why, and the moves to get there. Pure.

The load limit of a node is 80 % of its time, less where it is throttled. Three rules can be checked by hand:

1. A node throttled for more than 3 % of its known time gets a limit below its load, and gives up a model.
2. A model that outgrows its node gets that node to itself, or another copy where it fits.
3. Long prompts with few prompt cache hits get a larger prompt cache where memory is free.

Moves are few by construction: each must be worth its gigabytes, and their number is capped.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec

from aggregator import heat, moves, packing
from aggregator.calendar import local
from aggregator.config import Placement as Rules
from aggregator.demand import Facts, current, facts_of, load_of
from aggregator.moves import Step
from aggregator.packing import CAP, Copyable, Packed, Placement, Room
from aggregator.window import Window, seconds
from shared.desired import Moment

CROWDED = 0.90
LONG_PROMPT_TOK = 2_000
LOW_HIT_SHARE = 0.30
LEAST_REQUESTS = 20
"""A hit rate of fewer requests changes no setting: the first one of each prompt always misses."""
LOAD_GB_S = 1.5
"""Assumed load rate from an internal disk until a load has been measured."""


class NodeLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A node now and after the moves: memory, and load at the 95th percentile."""

    node: str
    budget_bytes: int | None
    held_bytes: int
    busy_share: float | None
    throttled_share: float | None
    speed: float = 1.0
    limit: float = CAP
    load: float = 0.0
    load_after: float = 0.0
    held_after_bytes: int = 0

    @property
    def held_share(self) -> float:
        """Share of the memory budget in use; 0 where the budget is not known."""
        return self.held_bytes / self.budget_bytes if self.budget_bytes else 0.0

    @property
    def crowded(self) -> bool:
        """Whether little memory is left for another model."""
        return self.held_share > CROWDED


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """A model on a node and the advice for it there: keep, move, copy or remove."""

    model: str
    node: str
    version: str
    need_bytes: int
    busy_share: float | None
    requests: int
    advice: str
    reason: str
    pinned: bool = False


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One step, carried out by `load` or `unload` on a node. ``gb`` are read from disk or copied, ``load_s`` is the
    estimated time for it; load and free memory are those of ``node``. ``bound`` is the limit that calls for the move,
    ``declined`` the consequence of not doing it."""

    step: int
    action: str
    model: str
    node: str
    source: str
    gb: float
    load_s: float | None
    load_before: float
    load_after: float
    free_before_bytes: int
    free_after_bytes: int
    bound: str
    reason: str
    declined: str
    parked: bool = False
    version: str = ""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A proposed change of a model's setting on a node."""

    model: str
    node: str
    setting: str
    value: int
    reason: str


class PlacementReport(msgspec.Struct, frozen=True, kw_only=True):
    """The placement and the moves. ``short`` lists what does not fit, with remedies; ``notes`` what stays as it is, and
    why. ``gap`` bounds the distance from the optimal placement; ``score`` is the objective value of packing.py.
    ``so_far_until_ms`` is there in the published report of a span that is not over."""

    period: str
    rebalance: bool
    nodes: tuple[NodeLoad, ...]
    placed: tuple[Placed, ...]
    moves: tuple[Move, ...]
    notes: tuple[str, ...]
    short: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    gap: float | None = None
    score: float = 0.0
    least: dict[str, int] = {}
    so_far_until_ms: Moment | msgspec.UnsetType = msgspec.UNSET


def propose(
    window: Window,
    rules: Rules = Rules(),  # noqa: B008  # immutable
    bandwidths: Mapping[str, float] = {},
) -> PlacementReport:
    """The placement report of one span. ``bandwidths`` are those of ``AggregatorConfig.bandwidths``."""
    facts = facts_of(window, rules, bandwidths)
    packed = packed_with_slack(facts, rules.max_moves)
    ordered = moves.order(facts.models, facts.rooms, facts.now, packed.pairs)
    made = described(facts, ordered.steps)
    return PlacementReport(
        period=window.span.name,
        rebalance=bool(made),
        nodes=_node_loads(window, facts, ordered.reached),
        placed=_placed(window, ordered.reached, facts),
        moves=made,
        notes=(
            *(*_silent(window, facts), *_blocked(ordered.blocked), *_stuck(facts, ordered.reached)),
            *(facts.guessed if len(window.nodes) > 1 else ()),
        ),
        short=explained(facts, packed),
        settings=_cache_settings(window, facts, ordered.reached),
        gap=packed.gap,
        score=round(packed.score, 6),
        least=dict(facts.least),
    )


def packed_with_slack(facts: Facts, most_moves: int) -> Packed:
    """The best placement with the current number of copies; if they do not all fit, with as many as demand needs."""
    packed = packing.pack(facts.models, facts.rooms, facts.now, most_moves)
    if not packed.short:
        return packed
    fewer = [msgspec.structs.replace(m, copies=min(m.copies, facts.least.get(m.name, 1))) for m in facts.models]
    again = packing.pack(fewer, facts.rooms, facts.now, most_moves)
    return again if sum(n for _, n in again.short) < sum(n for _, n in packed.short) else packed


def described(facts: Facts, steps: Sequence[Step]) -> tuple[Move, ...]:
    """Steps with their reasons and figures, in order."""
    at, found = frozenset(facts.now), []
    by_room, by_model = {r.name: r for r in facts.rooms}, {m.name: m for m in facts.models}
    for number, step in enumerate(steps, 1):
        pair, loads = frozenset([(step.model, step.node)]), step.action == "load"
        after = at | pair if loads else at - pair
        room, gb = by_room[step.node], by_model[step.model].need_bytes / 1e9
        bound, reason, declined = _why(facts, step)
        found.append(
            Move(
                step=number,
                action=step.action,
                model=step.model,
                node=step.node,
                source=step.source,
                gb=round(gb, 3) if loads else 0.0,
                load_s=round(facts.load_s.get(step.model, gb / LOAD_GB_S), 1) if loads else None,
                load_before=round(load_of(room, facts.models, at), 4),
                load_after=round(load_of(room, facts.models, after), 4),
                free_before_bytes=room.budget_bytes - packing.held(room, facts.models, at),
                free_after_bytes=room.budget_bytes - packing.held(room, facts.models, after),
                bound=bound,
                reason=reason,
                declined=declined,
                parked=step.parked,
                version=facts.versions.get(step.model, ""),
            )
        )
        at = after
    return tuple(found)


def explained(facts: Facts, packed: Packed) -> tuple[str, ...]:
    """Why not everything fits, and the remedy; empty if it does."""
    found = []
    sizes = {m.name: m for m in facts.models}
    held_back = [one for one in packed.short if _could_stand(sizes[one[0]], facts, packed.pairs)]
    missing = [one for one in packed.short if one not in held_back]
    if held_back:
        copies = ", ".join(f"{count} x {name}" for name, count in held_back)
        found.append(
            f"{copies} not placed yet, though there is memory: limited by the max_moves of one week, or by the nodes "
            "allowed in placement.models."
        )
    if missing:
        found.append(_too_little(missing, sizes, facts.rooms))
    busy = [(name, share) for name, share in packed.over if name not in facts.throttled]
    if busy:
        where = ", ".join(f"{name} by {share:.0%}" for name, share in busy)
        more = max(1, math.ceil(sum(share for _, share in busy) / CAP - 1e-9))
        found.append(
            f"Load at the 95th percentile exceeds the limit: {where}. Add {_nodes(more)} like the fastest, or move the "
            "busiest model elsewhere."
        )
    found += [
        f"{_throttled(facts, name)}, and its load fits on no other node: improve its cooling."
        for name, _ in packed.over
        if name in facts.throttled
    ]
    return tuple(found)


def _could_stand(model: Copyable, facts: Facts, pairs: Placement) -> bool:
    """Whether any node has the memory for another copy, regardless of other constraints."""
    return any(
        (model.name, room.name) not in pairs
        and room.budget_bytes - packing.held(room, facts.models, pairs) >= model.need_bytes
        for room in facts.rooms
    )


def _too_little(missing: Sequence[tuple[str, int]], sizes: Mapping[str, Copyable], rooms: Sequence[Room]) -> str:
    whole = sum(sizes[name].need_bytes * count for name, count in missing)
    copies = ", ".join(f"{count} x {name}" for name, count in missing)
    largest = max(sizes[name].need_bytes for name, _ in missing)
    biggest = max((r.budget_bytes for r in rooms), default=0)
    node = (
        f"a node with at least {largest / 1e9:.1f} GB for models"
        if largest > biggest or not biggest
        else f"{_nodes(max(1, math.ceil(whole / biggest)))} of {biggest / 1e9:.1f} GB for models"
    )
    drop = max((name for name, _ in missing), key=lambda name: (sizes[name].need_bytes, name))
    return f"Not enough memory for {copies} ({whole / 1e9:.1f} GB): add {node}, or drop {drop}."


def _throttled(facts: Facts, node: str) -> str:
    return f"{node} was throttled {heat.percent_beside(facts.throttled[node], heat.MOVE_SHARE)} of the time"


def _nodes(count: int) -> str:
    return "one more node" if count == 1 else f"{count} more nodes"


def _why(facts: Facts, step: Step) -> tuple[str, str, str]:
    """The limit that calls for a step, its reason as a sentence, and the consequence of declining it."""
    by_room = {r.name: r for r in facts.rooms}
    model = next(m for m in facts.models if m.name == step.model)
    if step.action == "unload":
        return "follows", f"{step.model} is now served elsewhere", f"{model.need_bytes / 1e9:.1f} GB stay in use"
    if step.parked:
        return "memory", f"frees memory on {step.source} temporarily", "the following steps are impossible"
    if not step.source:
        standing = sum(name == step.model for name, _ in facts.now)
        if not standing:
            return "copies", f"{step.model} is on no node", "no node serves it"
        copies = "one copy" if standing == 1 else f"{standing} copies"
        needed = f"a load of {model.load:.2f} nodes at the 95th percentile and only {copies}"
        return "load", f"{step.model} has {needed}", f"its nodes stay at {model.load / standing:.0%} each"
    room = by_room[step.source]
    before = load_of(room, facts.models, facts.now)
    if room.name in facts.throttled:
        return "heat", _throttled(facts, room.name), f"{room.name} stays throttled at {before:.0%} load"
    if before > room.limit:
        alone = max((m for m in facts.models if (m.name, room.name) in facts.now), key=lambda m: (m.share, m.name))
        itself = f"; {alone.name} needs the node to itself" if alone.share / room.speed > 0.5 * CAP else ""
        text = f"load of {room.name} is {before:.0%} at the 95th percentile, limit {room.limit:.0%}{itself}"
        return "load", text, f"{room.name} stays at {before:.0%} load"
    if packing.held(room, facts.models, facts.now) > room.budget_bytes:
        return "memory", f"{room.name} exceeds its memory budget", f"{room.name} keeps evicting"
    return "room", f"frees memory on {room.name} for another model", "that model cannot be placed"


def _node_loads(window: Window, facts: Facts, reached: Placement) -> tuple[NodeLoad, ...]:
    found = []
    for room in facts.rooms:
        host = window.host(room.name)
        reported_us = seconds(window.reported(room.name)) * 1e6
        found.append(
            NodeLoad(
                node=room.name,
                budget_bytes=host.memory_budget_bytes if host is not None else None,
                held_bytes=packing.held(room, facts.models, facts.now),
                busy_share=min(1.0, window.busy_us(room.name) / reported_us) if reported_us else None,
                throttled_share=heat.share(window, room.name),
                speed=room.speed,
                limit=round(room.limit, 4),
                load=round(load_of(room, facts.models, facts.now), 4),
                load_after=round(load_of(room, facts.models, reached), 4),
                held_after_bytes=packing.held(room, facts.models, reached),
            )
        )
    return tuple(found)


def _placed(window: Window, reached: Placement, facts: Facts) -> tuple[Placed, ...]:
    found = []
    troubled = {r.name for r in facts.rooms if load_of(r, facts.models, facts.now) > r.limit} | set(facts.throttled)
    for one in current(window):
        reported_us = seconds(window.reported(one.node)) * 1e6
        busy = sum(e.busy_us for e in window.engines if e.node == one.node and e.version == one.version)
        requests = sum(s.requests for s in window.served if s.worker == one.node and s.version == one.version)
        stays = (one.model, one.node) in reached
        others = sorted(n for m, n in reached - facts.now if m == one.model)
        advice, reason = "keep", "fits; its node is neither throttled nor over its load limit"
        if one.node in facts.silent:
            advice, reason = "gone", "its node stopped reporting"
        elif one.node in troubled:
            reason = "no better placement found"
        if one.node not in facts.silent and not stays:
            advice = "move" if others else "remove"
            reason = f"to {others[0]}, see moves" if others else "more copies than its load needs"
        elif stays and others:
            advice, reason = "copy", f"also to {', '.join(others)}, see moves"
        found.append(
            Placed(
                model=one.model,
                node=one.node,
                version=one.version,
                need_bytes=one.need_bytes or 0,
                busy_share=min(1.0, busy / reported_us) if reported_us else None,
                requests=requests,
                advice=advice,
                reason=reason,
                pinned=bool(one.pinned),
            )
        )
    return tuple(sorted(found, key=lambda p: (p.node, p.model)))


def _blocked(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [
        f"{model} cannot move to {node} without an interruption: no node has memory to spare" for model, node in pairs
    ]


def _stuck(facts: Facts, reached: Placement) -> list[str]:
    """Notes on throttled nodes that could not give up a model."""
    found = []
    for room in facts.rooms:
        before, after = (load_of(room, facts.models, at) for at in (facts.now, reached))
        if room.name in facts.throttled and after >= before > 0:
            found.append(f"{_throttled(facts, room.name)}, and no other node has room for any of its models")
    return found


def _silent(window: Window, facts: Facts) -> list[str]:
    return [
        f"{node} has not reported since {local(t_ms, window.span.timezone):%d %b %H:%M}: nothing placed there"
        for node, t_ms in sorted(facts.silent.items())
    ]


def _cache_settings(window: Window, facts: Facts, reached: Placement) -> tuple[Setting, ...]:
    """A larger prompt cache for models with long prompts and a low hit rate, where memory is free."""
    found = []
    for model in sorted({s.model for s in window.served if s.outcome == "ok"}):
        mine = [s for s in window.served if s.model == model and s.outcome == "ok"]
        requests, prompt = sum(s.requests for s in mine), sum(s.prompt_tok for s in mine)
        cached = sum(s.cached_tok for s in mine)
        if requests < LEAST_REQUESTS or prompt / requests <= LONG_PROMPT_TOK or cached / prompt >= LOW_HIT_SHARE:
            continue
        for room in facts.rooms:
            if (model, room.name) not in reached:
                continue
            free = room.budget_bytes - packing.held(room, facts.models, reached)
            now = max((e.cache_bytes for e in window.engines if e.model == model and e.node == room.name), default=0)
            value = now + free // 2
            why = (
                f"{model} on {room.name}: prompts of {prompt // requests} tokens on average, prompt cache hit rate "
                f"{cached / prompt:.0%}; {free / 1e9:.1f} GB are free there, increase its cache_bytes to {value:,}"
            )
            if free > 256 << 20:
                found.append(Setting(model=model, node=room.name, setting="cache_bytes", value=value, reason=why))
    return tuple(found)
