"""What each node, name and key cost in a period."""

from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

from . import lives as lives_of
from . import power, spans, work
from .lives import Life, Rack
from .money import divided, per_m, rounded
from .periods import HOUR_MS, Period
from .raw import Batch
from .work import ZERO, Pool, Tokens, Two


@dataclass
class NodeCost:
    """A priced node. ``rows`` is busy cost by name, "" that of unattributed work; ``loads`` the idle cost that models
    share."""

    node: str
    reported_ms: int
    busy_us: int
    watts: Fraction
    source: str
    owned_per_h: Fraction
    power_per_h: Fraction
    unheard_ms: int
    work: dict[str, Two] = field(default_factory=dict)
    rows: dict[str, Fraction] = field(default_factory=dict)
    loads: dict[str, Fraction] = field(default_factory=dict)
    idle: Fraction = ZERO

    @property
    def rate_per_h(self) -> Fraction:
        """While it reports."""
        return self.owned_per_h + self.power_per_h

    @property
    def busy_share(self) -> Fraction:
        """At most 1."""
        whole = self.reported_ms * 1000
        return min(Fraction(1), Fraction(self.busy_us, whole)) if whole else ZERO

    @property
    def reported_cost(self) -> Fraction:
        """Of the time in which it reported."""
        return rounded(self.exact)

    @property
    def exact(self) -> Fraction:
        """The same before it is rounded."""
        return self.rate_per_h * Fraction(self.reported_ms, HOUR_MS)

    @property
    def silent(self) -> Fraction:
        """Of the time in which it is owned and says nothing."""
        return rounded(self.owned_per_h * Fraction(self.unheard_ms, HOUR_MS))

    @property
    def cost(self) -> Fraction:
        """All of it."""
        return self.reported_cost + self.silent


@dataclass
class Costs:
    """All of a period. ``tokens`` are those at priced nodes, ``everywhere`` at all, by name, over all outcomes;
    ``work`` is busy time at all nodes, ``parts`` the prefill and decode part of the direct cost."""

    nodes: dict[str, NodeCost]
    unpriced: list[NodeCost]
    tokens: dict[str, Tokens]
    everywhere: dict[str, Tokens]
    pools: list[Pool]
    direct: dict[str, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    loaded: dict[str, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    work: dict[str, Two] = field(default_factory=lambda: defaultdict(lambda: (ZERO, ZERO)))
    parts: dict[str, Two] = field(default_factory=lambda: defaultdict(lambda: (ZERO, ZERO)))

    @property
    def total(self) -> Fraction:
        """Of all nodes."""
        return sum((one.cost for one in self.nodes.values()), ZERO)

    @property
    def idle(self) -> Fraction:
        """Of all nodes."""
        return sum((one.idle for one in self.nodes.values()), ZERO)

    @property
    def silent(self) -> Fraction:
        """Of all nodes."""
        return sum((one.silent for one in self.nodes.values()), ZERO)

    @property
    def unattributed(self) -> Fraction:
        """Of all nodes."""
        return sum((one.rows.get("", ZERO) for one in self.nodes.values()), ZERO)

    @property
    def paid(self) -> set[str]:
        """Names for which something worked at a priced node."""
        return {name for node in self.nodes.values() for name in node.work} - {""}

    def priced_work(self, name: str) -> Two:
        """Prefill and decode time of a name at priced nodes."""
        both = [node.work.get(name, (ZERO, ZERO)) for node in self.nodes.values()]
        return sum((one for one, _ in both), ZERO), sum((other for _, other in both), ZERO)

    @property
    def unshared(self) -> Fraction:
        """Idle time that no model bears."""
        return self.total - self.silent - self.unattributed - sum(self.loaded.values(), ZERO)

    @property
    def whole_tok(self) -> int:
        """Of all names."""
        return sum(one.whole for one in self.tokens.values())

    @property
    def average_per_m(self) -> Fraction | None:
        """Total by all tokens."""
        return per_m(self.total, self.whole_tok)


def costs(rack: Rack, period: Period) -> Costs:
    """Work out a period."""
    counted = rack.ended_in(period.start_ms, period.end_ms)
    there = lives_of.lives(rack, period)
    busy = work.busy_us(counted)
    priced = {n: rack.configured[n] for n in there if rack.configured.get(n, {}).get("price") is not None}
    nodes = {n: _node(rack, there[n], counted, busy.get(n, 0)) for n in priced}
    others = [_node(rack, there[n], counted, busy.get(n, 0)) for n in sorted(set(there) - set(priced))]
    pools = work.pools(counted)
    for node in nodes.values():
        _divide(node, [pool for pool in pools if pool.node == node.node], counted)
    tokens: dict[str, Tokens] = defaultdict(Tokens)
    everywhere: dict[str, Tokens] = defaultdict(Tokens)
    for (worker, name, _), one in sorted(work.served_tokens(counted).items()):
        everywhere[name].add(one)
        if worker in nodes:
            tokens[name].add(one)
    return _summed(Costs(nodes, others, tokens, everywhere, pools))


def _node(rack: Rack, life: Life, counted: list[Batch], busy_us: int) -> NodeCost:
    table, cost = rack.configured.get(life.node, {}), rack.settings.get("cost", {})
    reported = spans.length(life.reported)
    share = min(Fraction(1), Fraction(busy_us, reported * 1000)) if reported else ZERO
    drawn, source = power.watts(life.node, table, counted, share)
    return NodeCost(
        life.node,
        reported,
        busy_us,
        drawn,
        source,
        power.owned_per_h(table) if table.get("price") is not None else ZERO,
        power.power_per_h(drawn, cost),
        spans.length(life.unheard),
    )


def _divide(node: NodeCost, mine: list[Pool], counted: list[Batch]) -> None:
    """Busy cost by name, the rest idle; idle cost by the loaders of the node, and each one's by name."""
    for pool in mine:
        for name, (prefill, decode) in pool.parts().items():
            had = node.work.get(name, (ZERO, ZERO))
            node.work[name] = (had[0] + prefill, had[1] + decode)
    node.work = {name: both for name, both in sorted(node.work.items()) if sum(both)}
    busy_cost = rounded(node.reported_cost * node.busy_share)
    node.idle = node.reported_cost - busy_cost
    node.rows = divided(busy_cost, [(name, sum(both, ZERO)) for name, both in node.work.items()])
    node.loads = defaultdict(Fraction)
    whole = idle_shares(mine, counted)
    places = [(place, share) for place, (_, share) in enumerate(whole)]
    for place, part in divided(node.idle, places).items():
        names = [(name, sum(both, ZERO)) for name, both in sorted(whole[place][0].parts().items())]
        for name, money in divided(part, [one for one in names if one[1]]).items():
            node.loads[name] += money


def idle_shares(mine: list[Pool], counted: list[Batch]) -> list[tuple[Pool, Fraction]]:
    """Pinned loaders by memory over time against that of all, the others share the rest by busy time."""
    held = {id(pool): _held(pool, counted) for pool in mine}
    memory = sum(held_for for held_for, _ in held.values()) or 1
    pinned = {key: Fraction(held_for, memory) for key, (held_for, is_pinned) in held.items() if is_pinned}
    whole = sum(pool.busy_us for pool in mine if id(pool) not in pinned)
    if not whole:  # pinned ones alone share all of it
        pinned = {key: share / (sum(pinned.values()) or 1) for key, share in pinned.items()}
    left = 1 - sum(pinned.values())
    shares = [(p, pinned[id(p)] if id(p) in pinned else left * Fraction(p.busy_us, whole or 1)) for p in mine]
    return [(pool, share) for pool, share in shares if share]


def _held(pool: Pool, counted: list[Batch]) -> tuple[int, bool]:
    """Bytes over time, and whether it is pinned there."""
    held, pinned = 0, False
    for batch in (one for one in counted if one.node == pool.node):
        for one in batch.of("resident"):
            if (one["model"], one["version"], one["state"]) == (pool.loader, pool.version, "ready"):
                held += one["need_bytes"] * batch.length_ms
                pinned = pinned or one.get("pinned", False)
    return held, pinned


def _summed(one: Costs) -> Costs:
    for pool in one.pools:
        for name, (prefill, decode) in pool.parts().items():
            one.work[name] = (one.work[name][0] + prefill, one.work[name][1] + decode)
    for node in one.nodes.values():
        for name in sorted(node.work.keys() - {""}):
            prefill, decode = node.work[name]
            cost = node.rows.get(name, ZERO)
            one.direct[name] += cost
            one.loaded[name] += cost + node.loads.get(name, ZERO)
            fill = rounded(cost * prefill / (prefill + decode))
            one.parts[name] = (one.parts[name][0] + fill, one.parts[name][1] + cost - fill)
    return one


def floor_share(name: str, costs_of: Costs, counted: list[Batch]) -> Fraction:
    """min(1, p / b): how well used it is, against its best slots."""
    loaders = {(pool.node, pool.loader, pool.version) for pool in costs_of.pools if name in pool.names}
    slots = sorted(_slots(counted, loaders))
    busy = sum(costs_of.work.get(name, (ZERO, ZERO)), ZERO)
    if not slots or not busy:
        return Fraction(1)
    best = slots[min(len(slots) - 1, len(slots) * 95 // 100)]
    return min(Fraction(1), costs_of.everywhere[name].whole / busy / best) if best else Fraction(1)


def _slots(counted: list[Batch], loaders: set[tuple[str, str, str]]) -> list[Fraction]:
    """Tokens by busy microsecond in each five minutes in which they were busy for 30 s or more."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for batch in counted:
        for one in batch.of("engine"):
            if (batch.node, one["model"], one["version"]) in loaders:
                both = sums[batch.end_ms // 300_000]
                both[0] += sum(one.get(f"{kind}_tok", 0) for kind in ("prefill", "cached", "decode"))
                both[1] += one.get("busy_prefill_us", 0) + one.get("busy_decode_us", 0)
    return [Fraction(tokens, busy) for tokens, busy in sums.values() if busy >= 30_000_000]
