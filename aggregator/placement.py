"""Which model should be on which node, why, and the moves to get there. Pure.

Demand is the 95th percentile of five-minute slots, not the mean: users wait during bursts. The load limit of a node is
80 % of its time, less where it is throttled. Three rules follow that can be checked by hand:

1. A node throttled for more than 3 % of its known time gets a limit below its load, and gives up a model.
2. A model that outgrows its node gets that node to itself, or another copy where it fits.
3. Long prompts with few prompt cache hits get a larger prompt cache where memory is free.

Moves are few by construction: each must be worth its gigabytes, and their number is capped.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec

from aggregator import eviction, moves, packing
from aggregator.calendar import local
from aggregator.config import AggregatorConfig
from aggregator.moves import Step
from aggregator.packing import CAP, Copyable, Packed, Placement, Room
from aggregator.tables import SLOT_MS
from aggregator.window import ResidentSum, Window, at_least_one, seconds
from shared.records import Hardware, ModelEvicted, ModelLoaded

THROTTLED = 0.03
ALONE = 0.95
"""Load limit of a node that a single model has to itself, before the model gets another copy."""
GONE_MS = 900_000
LEAST_LOAD = 0.01
"""Minimum load of a resident model, even without requests."""
LONG_PROMPT_TOK = 2_000
LOW_HIT_SHARE = 0.30
BANDWIDTH_GB_S = {"M4 Pro": 273.0, "M4 Max": 546.0, "M4": 120.0, "M3 Ultra": 819.0, "M2": 100.0, "M1": 68.0}
"""Memory bandwidth, which bounds decode, for nodes without a shared model to compare speeds by."""
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
    """The placement and the moves. ``short`` lists what does not fit, with remedies. ``gap`` bounds the distance from
    the optimal placement; ``score`` is the objective value of packing.py."""

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


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Input of a plan, from a week's telemetry or from an intake before there is any."""

    models: tuple[Copyable, ...]
    rooms: tuple[Room, ...]
    now: Placement
    least: Mapping[str, int]
    load_s: Mapping[str, float]
    why_limited: Mapping[str, str] = {}
    versions: Mapping[str, str] = {}
    silent: Mapping[str, int] = {}


def propose(window: Window, config: AggregatorConfig | None = None) -> PlacementReport:
    """The placement report of one span."""
    most = config.placement.max_moves if config is not None else 6
    facts = facts_of_window(window, config)
    packed = packed_with_slack(facts, most)
    ordered = moves.order(facts.models, facts.rooms, facts.now, packed.pairs)
    placed = _placed(window, ordered.reached, facts)
    made = described(facts, ordered.steps)
    settings = _cache_settings(window, facts, ordered.reached)
    stuck = _stuck(facts, ordered.reached)
    return PlacementReport(
        period=window.span.name,
        rebalance=bool(made),
        nodes=_node_loads(window, facts, ordered.reached),
        placed=placed,
        moves=made,
        notes=(*_silent(window, facts), *_blocked(ordered.blocked), *stuck, *(s.reason for s in settings)),
        short=explained(facts, packed),
        settings=settings,
        gap=packed.gap,
        score=round(packed.score, 6),
        least=dict(facts.least),
    )


def load_of(room: Room, models: Sequence[Copyable], at: Placement) -> float:
    """The load of a node under a placement: a model's work is shared equally by its copies."""
    total = 0.0
    for model in models:
        if (model.name, room.name) in at:
            total += model.load / sum(name == model.name for name, _ in at)
    return total / room.speed


def packed_with_slack(facts: Facts, most_moves: int) -> Packed:
    """The best placement with the current number of copies; if they do not all fit, with as many as demand needs."""
    packed = packing.pack(facts.models, facts.rooms, facts.now, most_moves)
    if not packed.short:
        return packed
    fewer = [msgspec.structs.replace(m, copies=min(m.copies, facts.least.get(m.name, 1))) for m in facts.models]
    again = packing.pack(fewer, facts.rooms, facts.now, most_moves)
    return again if sum(n for _, n in again.short) < sum(n for _, n in packed.short) else packed


def facts_of_window(window: Window, config: AggregatorConfig | None = None) -> Facts:
    """Nodes, models and demand as reported."""
    silent = _gone(window)
    everywhere = current(window)
    residents = {(r.model, r.node): r for r in everywhere if r.node not in silent}
    speeds = _speeds(window)
    load = _loads(window, speeds)
    wished = {w.model: w for w in config.placement.models} if config is not None else {}
    models, least = [], {}
    for name in sorted({r.model for r in everywhere}):
        here = [r for (m, _), r in residents.items() if m == name]
        stood = [r for r in everywhere if r.model == name]
        wish = wished.get(name)
        work = max(LEAST_LOAD, load.get(name, 0.0))
        # its own node first, another copy once it has that
        alone = all(m == name for m, n in residents if n in {r.node for r in here})
        needed = max(1, wish.min_copies if wish else 1, math.ceil(work / (CAP if alone else ALONE) / _typical(speeds)))
        only = tuple(wish.nodes) if wish else ()
        allowed = [n for n in window.nodes if n not in silent and (not only or n in only)]
        least[name] = min(needed, max(1, len(allowed)))
        copies = max(least[name], len(here))
        need = max(r.need_bytes or 0 for r in stood)
        pinned = tuple(r.node for r in here if r.pinned)
        models.append(Copyable(name=name, need_bytes=need, copies=copies, load=work, only=only, pinned=pinned))
    evicted, versions = _evicted(window, {m.name for m in models}, load, config)
    models += evicted
    least |= {m.name: m.copies for m in evicted}
    now: Placement = frozenset(residents)
    rooms, why = _rooms(window, speeds, models, now)
    return Facts(
        models=tuple(models),
        rooms=rooms,
        now=now,
        least=least,
        load_s=_load_times(window),
        why_limited=why,
        versions={r.model: r.version for r in everywhere} | versions,
        silent=silent,
    )


def current(window: Window) -> list[ResidentSum]:
    """The ready models of each node in the last batch that listed any.

    A node that was stopped cleanly ends with a batch that lists none; the models before that are its placement.
    """
    ready = [r for r in window.residents if r.state == "ready"]
    last = {node: max(r.last_ms for r in ready if r.node == node) for node in {r.node for r in ready}}
    newest: dict[tuple[str, str], ResidentSum] = {}
    for one in ready:
        if one.last_ms == last[one.node]:
            newest[one.model, one.node] = one
    return [newest[key] for key in sorted(newest)]


def described(facts: Facts, steps: Sequence[Step]) -> tuple[Move, ...]:
    """Steps with their reasons and figures, in order."""
    at, found = frozenset(facts.now), []
    by_room, by_model = {r.name: r for r in facts.rooms}, {m.name: m for m in facts.models}
    for number, step in enumerate(steps, 1):
        pair = frozenset([(step.model, step.node)])
        after = at | pair if step.action == "load" else at - pair
        room, model = by_room[step.node], by_model[step.model]
        bound, reason, declined = _why(facts, step)
        found.append(
            Move(
                step=number,
                action=step.action,
                model=step.model,
                node=step.node,
                source=step.source,
                gb=round(model.need_bytes / 1e9, 3) if step.action == "load" else 0.0,
                load_s=round(facts.load_s.get(step.model, model.need_bytes / 1e9 / LOAD_GB_S), 1)
                if step.action == "load"
                else None,
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
    missing: list[tuple[str, int]] = []
    held_back: list[tuple[str, int]] = []
    for name, count in packed.short:
        (held_back if _could_stand(sizes[name], facts, packed.pairs) else missing).append((name, count))
    if held_back:
        copies = ", ".join(f"{count} x {name}" for name, count in held_back)
        found.append(
            f"{copies} not placed yet, though there is memory: limited by the max_moves of one week, or by the nodes "
            "allowed in placement.models."
        )
    if missing:
        found.append(_too_little(missing, sizes, facts.rooms))
    hot = [(name, share) for name, share in packed.over if name in facts.why_limited]
    busy = [(name, share) for name, share in packed.over if name not in facts.why_limited]
    if busy:
        where = ", ".join(f"{name} by {share:.0%}" for name, share in busy)
        more = max(1, math.ceil(sum(share for _, share in busy) / CAP - 1e-9))
        found.append(
            f"Load at the 95th percentile exceeds the limit: {where}. Add {_nodes(more)} like the fastest, or move the "
            "busiest model elsewhere."
        )
    found += [f"{facts.why_limited[name]}, and its load fits on no other node: improve its cooling." for name, _ in hot]
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
    if room.name in facts.why_limited:
        return "heat", facts.why_limited[room.name], f"{room.name} stays throttled at {before:.0%} load"
    if before > room.limit:
        alone = max((m for m in facts.models if (m.name, room.name) in facts.now), key=lambda m: (m.share, m.name))
        itself = f"; {alone.name} needs the node to itself" if alone.share / room.speed > 0.5 * CAP else ""
        text = f"load of {room.name} is {before:.0%} at the 95th percentile, limit {room.limit:.0%}{itself}"
        return "load", text, f"{room.name} stays at {before:.0%} load"
    if packing.held(room, facts.models, facts.now) > room.budget_bytes:
        return "memory", f"{room.name} exceeds its memory budget", f"{room.name} keeps evicting"
    return "room", f"frees memory on {room.name} for another model", "that model cannot be placed"


def _rooms(
    window: Window, speeds: Mapping[str, float], models: Sequence[Copyable], now: Placement
) -> tuple[tuple[Room, ...], dict[str, str]]:
    rooms, why = [], {}
    silent = _gone(window)
    for name in [n for n in window.nodes if n not in silent]:
        host = window.host(name)
        held = sum(m.need_bytes for m in models if (m.name, name) in now)
        budget = host.memory_budget_bytes if host is not None and host.memory_budget_bytes is not None else held
        room = Room(name=name, budget_bytes=budget, speed=speeds[name])
        share = host.throttled_share if host is not None else None
        if share is not None and share > THROTTLED:
            here = [m.share / room.speed for m in models if (m.name, name) in now and name not in m.pinned]
            load = packing.load_of(room, models, now)
            room = msgspec.structs.replace(room, limit=max(0.0, min(CAP, load - min(here))) if here else min(CAP, load))
            why[name] = f"{name} was throttled {share:.1%} of the time"
        rooms.append(room)
    return tuple(rooms), why


def _speeds(window: Window) -> dict[str, float]:
    """Relative decode speed of each node: by models on several nodes, else by memory bandwidth."""
    paces: dict[str, dict[str, float]] = {}
    for one in window.engines:
        if one.decode_tok > 1000 and one.busy_decode_us:
            paces.setdefault(one.model, {})[one.node] = one.busy_decode_us / one.decode_tok
    chips = {meta.node: record.chip for meta, record in window.of(Hardware)}
    known = {node: found for node in window.nodes if (found := _bandwidth(chips.get(node, "")))}
    typical = _median(list(known.values())) if known else None
    speeds = {}
    for node in window.nodes:
        ratios = [_median(list(p.values())) / p[node] for p in paces.values() if len(p) > 1 and node in p]
        guessed = known[node] / typical if node in known and typical else 1.0
        speeds[node] = round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3) if ratios else round(guessed, 3)
    return speeds


def _bandwidth(chip: str) -> float | None:
    return next((gb for name, gb in BANDWIDTH_GB_S.items() if chip.endswith(name)), None)


def _median(values: list[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _typical(speeds: Mapping[str, float]) -> float:
    return _median(list(speeds.values())) if speeds else 1.0


def _loads(window: Window, speeds: Mapping[str, float]) -> dict[str, float]:
    """Each model's load at the 95th percentile of five-minute slots, in nodes of speed 1."""
    slots = max(1, round(seconds(at_least_one(window.reported(n) for n in window.nodes)) * 1000 / SLOT_MS))
    busy: dict[str, list[int]] = {}
    for one in window.demand:
        busy.setdefault(one.model, []).append(one.busy_prefill_us + one.busy_decode_us)
    found = {}
    for model, values in busy.items():
        mine = [(e.busy_us, speeds.get(e.node, 1.0)) for e in window.engines if e.model == model and e.busy_us]
        speed = sum(us * s for us, s in mine) / sum(us for us, _ in mine) if mine else 1.0
        # slots without requests count, too
        idle = max(0, slots - len(values))
        rank = math.ceil(0.95 * (idle + len(values))) - idle
        p95 = sorted(values)[rank - 1] if rank >= 1 else 0
        found[model] = round(p95 / (SLOT_MS * 1000) * speed, 6)
    return found


def _load_times(window: Window) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for _, record in window.of(ModelLoaded):
        times.setdefault(record.model, []).append(record.load_us / 1e6)
    return {model: _median(found) for model, found in times.items()}


def _node_loads(window: Window, facts: Facts, reached: Placement) -> tuple[NodeLoad, ...]:
    found = []
    for room in facts.rooms:
        host = window.host(room.name)
        reported_us = seconds(window.reported(room.name)) * 1e6
        busy = sum(e.busy_us for e in window.engines if e.node == room.name)
        found.append(
            NodeLoad(
                node=room.name,
                budget_bytes=host.memory_budget_bytes if host is not None else None,
                held_bytes=packing.held(room, facts.models, facts.now),
                busy_share=busy / reported_us if reported_us else None,
                throttled_share=host.throttled_share if host is not None else None,
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
    troubled = {r.name for r in facts.rooms if load_of(r, facts.models, facts.now) > r.limit} | set(facts.why_limited)
    for one in current(window):
        reported_us = seconds(window.reported(one.node)) * 1e6
        mine = [e for e in window.engines if e.node == one.node and e.version == one.version]
        busy = sum(e.busy_us for e in mine)
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
                busy_share=busy / reported_us if reported_us else None,
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
        if room.name in facts.why_limited and after >= before > 0:
            found.append(f"{facts.why_limited[room.name]}, and no other node has room for any of its models")
    return found


def _evicted(
    window: Window, standing: set[str], load: Mapping[str, float], config: AggregatorConfig | None
) -> tuple[list[Copyable], dict[str, str]]:
    """Models that were evicted, requested again and are now on no node; and their versions."""
    rows = [r for r in eviction.report(window, top=10_000).rows if r.verdict == "placement" and r.model not in standing]
    sizes = {r.model: r.bytes // r.evictions for r in sorted(rows, key=lambda r: r.node)}
    wished = {w.model: w for w in config.placement.models} if config is not None else {}
    found = [
        Copyable(
            name=name,
            need_bytes=size,
            copies=wished[name].min_copies if name in wished else 1,
            load=max(LEAST_LOAD, load.get(name, 0.0)),
            only=tuple(wished[name].nodes) if name in wished else (),
        )
        for name, size in sorted(sizes.items())
    ]
    return found, {record.model: record.version for _, record in window.of(ModelEvicted) if record.model in sizes}


def _gone(window: Window) -> dict[str, int]:
    """Nodes that stopped reporting while others continued, with the end of their last report."""
    last = {node: reported[-1][1] for node in window.nodes if (reported := window.reported(node))}
    latest = max(last.values(), default=0)
    return {node: t_ms for node, t_ms in last.items() if t_ms < latest - GONE_MS}


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
        if not requests or prompt / requests <= LONG_PROMPT_TOK or cached / prompt >= LOW_HIT_SHARE:
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
