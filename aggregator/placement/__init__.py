"""Which model should be on which node, why, and the moves to get there. Pure.

The load limit of a node is 80 % of its time, less where it is throttled. Three rules can be checked by hand:

1. A node throttled for more than 3 % of its known time gets a limit below its load, and gives up a model.
2. A model that outgrows its node gets that node to itself, or another copy where it fits.
3. Long prompts with few prompt cache hits get a larger prompt cache where memory is free.

Moves are few by construction: each must be worth its gigabytes, and their number is capped. What was evicted without
need, and what does not fit, is reconciled with them in ``conclusion``: one conclusion for each model.
"""

__all__ = ["explained"]

from collections import Counter
from collections.abc import Mapping, Sequence, Set

import msgspec

from aggregator import heat, moves, packing
from aggregator.calendar import local
from aggregator.config import Placement as Rules
from aggregator.demand import Facts, Known, current, facts_of, load_of
from aggregator.eviction import Conclusion, Remedy
from aggregator.moves import Step
from aggregator.packing import CAP, Packed, Placement, Room
from aggregator.phrases import listed
from aggregator.placement.conclusion import Shortage, conclude, explained, throttled
from aggregator.window import Window, seconds
from shared.desired import Moment

CROWDED = 0.90
LONG_PROMPT_TOK = 2_000
LOW_HIT_SHARE = 0.30
LEAST_REQUESTS = 20
"""A hit rate of fewer requests changes no setting: the first one of each prompt always misses."""
IDLE_NODE = 0.02
RETIRE_AFTER_S = 7 * 86_400
"""A node whose models worked less than this share of at least this time may not be needed."""
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
    """A model on a node and the advice for it there: keep, move, copy or remove. ``busy_share`` and ``requests`` (the
    answered ones) are those of this served name on this node with all its versions, ``version`` is the newest;
    ``names`` are others that its loader answers to, which take no memory of their own."""

    model: str
    node: str
    version: str
    need_bytes: int
    busy_share: float | None
    requests: int
    advice: str
    reason: str
    pinned: bool = False
    names: tuple[str, ...] = ()


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
    """The placement and the moves. ``short`` lists what does not fit, with remedies, in the words of ``shortages``;
    ``notes`` what stays as it is, and why. ``conclusions`` are what to do about each model, from which the evictions
    and all recommendations take it. ``silent`` are nodes that stopped reporting, with when, ``hot`` those that heat
    slows, ``spare`` those that could all be taken out without a loss, ``unsure`` those whose speed is a guess. ``gap``
    bounds the distance from the optimal placement; ``score`` is the objective value of packing.py.
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
    conclusions: tuple[Conclusion, ...] = ()
    shortages: tuple[Shortage, ...] = ()
    silent: dict[str, Moment] = {}
    hot: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()
    so_far_until_ms: Moment | msgspec.UnsetType = msgspec.UNSET

    def models_to(self, *kinds: Remedy) -> list[str]:
        """The models with a conclusion of these kinds."""
        return sorted({c.model for c in self.conclusions if c.kind in kinds})

    @property
    def lead(self) -> str:
        """The whole in one sentence."""
        if not self.nodes and self.silent:
            return f"No node reports any more; nothing is placed while {_are(tuple(self.silent))} away."
        if not self.nodes:
            return "No node reported anything."
        if self.short:
            return self.short[0]
        if self.moves:
            steps = "One step" if len(self.moves) == 1 else f"{len(self.moves)} steps"
            return f"{steps} would put the models where their work fits."
        asides = [
            *([f"{listed(pin)} should be pinned"] if (pin := self.models_to("pin")) else []),
            *([f"{listed(off)} should be left to other nodes"] if (off := self.models_to("leave")) else []),
            *([f"heat slows {listed(self.hot)}"] if self.hot else []),
            *([f"{listed(tuple(self.silent))} stopped reporting"] if self.silent else []),
        ]
        return f"No model has to move; {'; '.join(asides)}." if asides else "Every model stands well where it is."


def _are(names: Sequence[str]) -> str:
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"


def propose(
    window: Window,
    rules: Rules = Rules(),  # noqa: B008  # immutable
    bandwidths: Mapping[str, float] = {},
    known: Known = Known(),  # noqa: B008  # immutable
) -> PlacementReport:
    """The placement report of one span. ``bandwidths`` are those of ``AggregatorConfig.bandwidths``."""
    facts = facts_of(window, rules, bandwidths, known)
    silent = {node: t_ms for node, t_ms in sorted(facts.silent.items()) if node not in known.retired}
    if not facts.rooms:
        # no node is there to carry anything; that is not a lack of memory
        away = sorted({(crowd.model, crowd.node) for crowd in facts.crowds})
        return PlacementReport(
            period=window.span.name,
            rebalance=False,
            nodes=(),
            placed=_placed(window, frozenset(), facts),
            moves=(),
            notes=tuple(_silent(window, silent)),
            conclusions=tuple(Conclusion(model=m, kind="restore", node=n, nodes=(n,)) for m, n in away),
            silent=silent,
        )
    packed = packed_with_slack(facts, rules.max_moves)
    ordered = moves.order(facts.models, facts.rooms, facts.now, packed.pairs)
    made = described(facts, ordered.steps)
    concluded = conclude(facts, packed, ordered, known)
    guessed = facts.guessed if len(window.nodes) > 1 else ()
    return PlacementReport(
        period=window.span.name,
        rebalance=bool(made),
        nodes=_node_loads(window, facts, ordered.reached),
        placed=_placed(window, ordered.reached, facts),
        moves=made,
        notes=(
            *(*_silent(window, silent), *_blocked(ordered.blocked), *_stuck(facts, ordered.reached)),
            *(f"{node}: {why}" for node, why in guessed),
        ),
        short=tuple(one.text for one in concluded.shortages),
        settings=_cache_settings(window, facts, ordered.reached, concluded.conclusions),
        gap=packed.gap,
        score=round(packed.score, 6),
        least=dict(facts.least),
        conclusions=concluded.conclusions,
        shortages=concluded.shortages,
        silent=silent,
        hot=tuple(sorted(known.hot | set(facts.throttled))),
        spare=_spare(window, facts, ordered.reached, known.hot) if not (made or concluded.shortages) else (),
        unsure=tuple(sorted({node for node, _ in guessed})),
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
        bound, reason, declined = _why(facts, step, steps)
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


def _why(facts: Facts, step: Step, steps: Sequence[Step]) -> tuple[str, str, str]:
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
        return "heat", throttled(facts, room.name), f"{room.name} stays throttled at {before:.0%} load"
    if before > room.limit:
        alone = max((m for m in facts.models if (m.name, room.name) in facts.now), key=lambda m: (m.share, m.name))
        itself = f"; {alone.name} needs the node to itself" if alone.share / room.speed > 0.5 * CAP else ""
        text = f"load of {room.name} is {before:.0%} at the 95th percentile, limit {room.limit:.0%}{itself}"
        return "load", text, f"{room.name} stays at {before:.0%} load"
    if packing.held(room, facts.models, facts.now) > room.budget_bytes:
        return "memory", f"{room.name} exceeds its memory budget", f"{room.name} keeps evicting"
    if any(other.node == room.name and other.action == "load" for other in steps):
        return "room", f"frees memory on {room.name} for another model", "that model cannot be placed"
    return "load", f"{room.name} is at {before:.0%} load, {step.node} has less", f"{room.name} stays at it"


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
    troubled = {r.name for r in facts.rooms if load_of(r, facts.models, facts.now) > r.limit} | set(facts.throttled)
    busy_us: dict[tuple[str, str], int] = {}
    for engine in window.engines:
        busy_us[engine.model, engine.node] = busy_us.get((engine.model, engine.node), 0) + engine.busy_us
    requests: dict[tuple[str, str], int] = {}
    for served in window.served:
        if served.outcome == "ok":
            requests[served.model, served.worker] = requests.get((served.model, served.worker), 0) + served.requests
    found = []
    for one in current(window):
        key, reported_us = (one.model, one.node), seconds(window.reported(one.node)) * 1e6
        advice, reason = _advised(key, facts, reached, troubled)
        found.append(
            Placed(
                model=one.model,
                node=one.node,
                version=one.version,
                need_bytes=one.need_bytes or 0,
                busy_share=min(1.0, busy_us.get(key, 0) / reported_us) if reported_us else None,
                requests=requests.get(key, 0),
                advice=advice,
                reason=reason,
                pinned=bool(one.pinned),
                names=facts.names.get(key, ()),
            )
        )
    return tuple(sorted(found, key=lambda p: (p.node, p.model)))


def _advised(key: tuple[str, str], facts: Facts, reached: Placement, troubled: set[str]) -> tuple[str, str]:
    """What happens to a model on a node, and why."""
    model, node = key
    others = sorted(n for m, n in reached - facts.now if m == model)
    if node in facts.silent:
        return "gone", "its node stopped reporting"
    if key not in reached:
        return ("move", f"to {listed(others)}, see moves") if others else ("remove", "more copies than its load needs")
    if others:
        return "copy", f"also to {listed(others)}, see moves"
    if node in troubled:
        return "keep", "no better placement found"
    return "keep", "fits; its node is neither throttled nor over its load limit"


def _spare(window: Window, facts: Facts, reached: Placement, hot: Set[str]) -> tuple[str, ...]:
    """Nodes without work that could be taken out together: what stands on them stands elsewhere as well, in as many
    copies as its demand needs, and the others carry their load."""
    found: set[str] = set()
    for room in facts.rooms:
        reported_s = seconds(window.reported(room.name))
        worked = window.busy_us(room.name) / 1e6 >= IDLE_NODE * reported_s
        if reported_s < RETIRE_AFTER_S or worked or room.name in hot or room.name in facts.throttled:
            continue
        left = [r for r in facts.rooms if r.name not in found and r is not room]
        pairs = [(m, n) for m, n in reached if n not in found and n != room.name]
        copies = Counter(model for model, _ in pairs)
        kept = all(copies[m] >= max(1, facts.least.get(m, 1)) for m, n in reached if n == room.name)
        if left and kept and _carried(facts, left, pairs, copies):
            found.add(room.name)
    return tuple(sorted(found))


def _carried(facts: Facts, rooms: Sequence[Room], pairs: Sequence[tuple[str, str]], copies: Mapping[str, int]) -> bool:
    """Whether nodes carry the load of all models that stand on them."""
    each = {m.name: m.load / copies[m.name] for m in facts.models if copies[m.name]}
    loads = dict.fromkeys((room.name for room in rooms), 0.0)
    for model, node in pairs:
        loads[node] += each[model]
    return all(loads[room.name] / room.speed <= room.limit for room in rooms)


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
            found.append(f"{throttled(facts, room.name)}, and no other node has room for any of its models")
    return found


def _silent(window: Window, silent: Mapping[str, int]) -> list[str]:
    if not silent:
        return []
    since = [f"{node} has not reported since {_when(window, t_ms)}" for node, t_ms in silent.items()]
    if len(since) <= 2:
        return [f"{one}: nothing placed there" for one in since]
    first = _when(window, min(silent.values()))
    return [f"{listed(tuple(silent))} have not reported to the end, the first since {first}: nothing placed there"]


def _when(window: Window, t_ms: int) -> str:
    return f"{local(t_ms, window.span.timezone):%d %b %H:%M}"


def _cache_settings(
    window: Window, facts: Facts, reached: Placement, conclusions: Sequence[Conclusion]
) -> tuple[Setting, ...]:
    """A larger prompt cache for models with long prompts and a low hit rate, where memory is free: not where models
    were evicted without need, and not for models about which there is more to do."""
    wanted = {}
    for model in sorted({c.model for c in conclusions} - {c.model for c in conclusions if c.kind != "fits"}):
        mine = [s for s in window.served if s.model == model and s.outcome == "ok"]
        requests, prompt = sum(s.requests for s in mine), sum(s.prompt_tok for s in mine)
        cached = sum(s.cached_tok for s in mine)
        if requests >= LEAST_REQUESTS and prompt / requests > LONG_PROMPT_TOK and cached / prompt < LOW_HIT_SHARE:
            hits = f"prompt cache hit rate {cached / prompt:.0%}"
            wanted[model] = f"prompts of {prompt // requests} tokens on average, {hits}"
    found = []
    for room in facts.rooms:
        free = room.budget_bytes - max(packing.held(room, facts.models, at) for at in (reached, facts.now))
        here = [model for model in wanted if (model, room.name) in reached]
        if free <= 256 << 20 or any(c.node == room.name for c in facts.crowds):
            continue
        for model in here:
            now = max((e.cache_bytes for e in window.engines if e.model == model and e.node == room.name), default=0)
            value, left = now + free // 2 // len(here), f"{free / 1e9:.1f} GB are free there"
            why = f"{model} on {room.name}: {wanted[model]}; {left}, increase its cache_bytes to {value:,}"
            found.append(Setting(model=model, node=room.name, setting="cache_bytes", value=value, reason=why))
    return tuple(sorted(found, key=lambda s: (s.model, s.node)))
