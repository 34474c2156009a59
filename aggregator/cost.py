"""Cost per million tokens: node cost allocated by busy seconds, idle and silent time as rows of their own. Decimal; all
rows add up.

A node costs, per hour: price x (1 - residual) / life in hours + other, for all of its owned time, whether it reports or
not; and watts / 1000 x price per kWh x PUE while it reports. The reported part is allocated to its models by the busy
seconds of their loaders (`aggregator.allocation`); the remainder is idle.
*Direct* counts busy seconds only. *Loaded* adds idle cost: to models pinned there by the memory they hold over time,
the rest by busy seconds. The *floor* is the price if nodes were never idle and always as well utilised as in their best
five minutes.
"""

from collections.abc import Iterable, Sequence
from decimal import Decimal

import msgspec

from aggregator import allocation, cost_change, heat, usage
from aggregator.allocation import MILLION, Payable, Row, Sum, in_s, per_m, rounded
from aggregator.config import AggregatorConfig, Node, decimal
from aggregator.cost_change import Change, Factors
from aggregator.demand import machines
from aggregator.fleet import Tenure, fleet
from aggregator.usage import KeyUsage, PlaceUsage
from aggregator.window import Window, seconds
from shared.chips import Identity, desktop, find
from shared.chips import price as list_price

HOURS_PER_YEAR = Decimal(8766)
HOURS_PER_MONTH = HOURS_PER_YEAR / 12
_ZERO = Decimal(0)
FULL_SLOT_US = 30_000_000
"""Five-minute slots with less busy time than this say nothing about a node's peak throughput."""


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """One served name. Money is None where a node's price is unknown; ``per_m`` is per million tokens, of all kinds or
    of the named one."""

    model: str
    requests: int
    prompt_tok: int
    cached_tok: int
    completion_tok: int
    busy_s: float
    direct: Decimal | None
    loaded: Decimal | None
    direct_per_m: Decimal | None
    loaded_per_m: Decimal | None
    floor_per_m: Decimal | None = None
    uncached_per_m: Decimal | None = None
    cached_per_m: Decimal | None = None
    output_per_m: Decimal | None = None
    last_loaded_per_m: Decimal | None = None
    change: Change | None = None
    factors: Factors | None = None

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tok + self.completion_tok


class NodeCost(msgspec.Struct, frozen=True, kw_only=True):
    """One node: what it cost in all, and the idle and silent parts of that. ``rate_per_h`` is that of a reported hour,
    ``power`` the source of ``watts``: outlet, wall, system, configured, chip table or assumed. ``silent_s`` are the
    seconds of its owned time in which it did not report."""

    node: str
    reported_s: float
    busy_s: float
    watts: Decimal | None
    power: str
    rate_per_h: Decimal | None
    cost: Decimal | None
    idle: Decimal | None
    silent: Decimal | None = None
    silent_s: float = 0.0


class CostReport(msgspec.Struct, frozen=True, kw_only=True):
    """The cost report. ``priced`` is whether any node has a price; ``total`` is the sum over priced nodes, and that of
    the models' loaded cost, ``unshared`` (idle time of no model: of nodes or loaders that answered nobody), ``silent``
    and ``unattributed``. ``keys`` divide the loaded cost; what ``places`` charge is in none of the other figures."""

    period: str
    currency: str
    priced: bool
    total: Decimal | None
    idle: Decimal | None
    average_per_m: Decimal | None
    unattributed: Decimal | None
    unshared: Decimal | None
    silent: Decimal | None
    models: tuple[ModelCost, ...]
    nodes: tuple[NodeCost, ...]
    rows: tuple[Row, ...] = ()
    keys: tuple[KeyUsage, ...] = ()
    places: tuple[PlaceUsage, ...] = ()
    unpriced_nodes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    """List prices of nodes without a price, where they are known."""
    tokens: int = 0
    """Prompt and answer tokens at priced nodes, of all outcomes: what ``average_per_m`` divides by."""
    busy_share: float | None = None
    """Of the time that priced nodes reported (all nodes, where none is priced), the part in which their loaders worked;
    a node counts at most its whole time."""


ASSUMED_WATTS = Decimal(45)
"""Of a node that is neither metered nor configured, and whose chip has no public figures."""


def compute(
    window: Window, config: AggregatorConfig, previous: CostReport | None = None, now_ms: int = 0
) -> CostReport:
    """The report of one span up to ``now_ms`` (or the last report of a node, if that is later), compared with
    ``previous`` if given."""
    prices = {node.id: node for node in config.nodes}
    nodes = [_node(window, one, prices.get(one.node), config) for one in fleet(window, config.nodes, now_ms)]
    sums, rows = allocation.allocate(window, {n.node: _payable(n) for n in nodes})
    models = [_model(name, m, window, previous, config, nodes) for name, m in sorted(sums.items())]
    priced = [n for n in nodes if n.cost is not None]
    total, idle, silent = (_sum(getattr(n, name) for n in priced) for name in ("cost", "idle", "silent"))
    direct, loaded = (_sum(getattr(m, name) for m in models) or Decimal(0) for name in ("direct", "loaded"))
    names = {n.node for n in priced}
    tokens = sum(s.prompt_tok + s.completion_tok for s in window.served if s.worker in names)
    there = machines(window)
    return CostReport(
        period=window.span.name,
        currency=config.cost.currency,
        priced=bool(priced),
        total=total,
        idle=idle,
        average_per_m=per_m(total, tokens),
        unattributed=_sum(row.cost for row in rows if row.kind == "unattributed") or (None if total is None else _ZERO),
        unshared=idle - (loaded - direct) if idle is not None else None,
        silent=silent,
        models=tuple(models),
        nodes=tuple(nodes),
        rows=rows,
        keys=usage.of_keys(window, {m.model: m.loaded for m in models}, sums, names),
        places=usage.of_places(window),
        unpriced_nodes=tuple(n.node for n in nodes if n.cost is None),
        hints=tuple(hint for n in nodes if n.cost is None for hint in _listed(n.node, there.get(n.node))),
        tokens=tokens,
        busy_share=_busy_share(priced or nodes),
    )


def _sum(amounts: Iterable[Decimal | None]) -> Decimal | None:
    """Of those that are known; None where none is."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known, _ZERO) if known else None


def _payable(node: NodeCost) -> Payable | None:
    if node.cost is None or node.idle is None or node.silent is None:
        return None
    idle_s = max(0.0, node.reported_s - node.busy_s)
    return Payable(node.cost - node.idle - node.silent, node.idle, node.silent, idle_s, node.silent_s)


def _busy_share(nodes: Sequence[NodeCost]) -> float | None:
    reported_s = sum(n.reported_s for n in nodes)
    return sum(min(n.busy_s, n.reported_s) for n in nodes) / reported_s if reported_s else None


def _reported_share(nodes: Sequence[NodeCost]) -> float | None:
    owned_s = sum(n.reported_s + n.silent_s for n in nodes)
    return sum(n.reported_s for n in nodes) / owned_s if owned_s else None


def amount(value: Decimal, currency: str = "") -> str:
    """12.34 USD, with four digits below a tenth and six below a thousandth."""
    size = abs(value)
    digits = 2 if size >= Decimal("0.1") or size == 0 else (4 if size >= Decimal("0.001") else 6)
    return f"{value:,.{digits}f} {currency}".rstrip()


def _listed(node: str, machine: Identity | None) -> tuple[str, ...]:
    """The list price of a node that has none configured."""
    if machine is None or machine.mac is None or machine.mac.kind == "other":
        return ()
    return (f"{node}: {list_price(machine.mac, machine.memory_gb)[1]}",)


def rates_per_hour(node: Node, config: AggregatorConfig, watts: Decimal) -> tuple[Decimal, Decimal] | None:
    """What an hour of a node costs for owning it, and on top of that for power while it runs at a mean of ``watts``;
    None without a price."""
    if node.price is None:
        return None
    owned = decimal(node.price) * (1 - decimal(node.residual)) / (decimal(node.life_years) * HOURS_PER_YEAR)
    power = watts / 1000 * decimal(config.cost.electricity_per_kwh) * decimal(config.cost.pue)
    return owned + decimal(node.other_per_month) / HOURS_PER_MONTH, power


def expected_watts(node: Node, busy: Decimal) -> tuple[Decimal, str]:
    """Mean power of a node that nobody measures, and its source: configured, else that of the chip table for its chip,
    busy for this share of the time, else assumed."""
    if node.watts is not None:
        return decimal(node.watts), "configured"
    mac = desktop(chip) if (chip := find(node.chip)) is not None else None
    watts = mac.watts(float(busy)) if mac is not None else None
    return (ASSUMED_WATTS, "assumed") if watts is None else (rounded(decimal(watts)), "chip table")


def measured_watts(window: Window, node: str) -> tuple[Decimal | None, str]:
    """Mean power and its source: the node's outlet (split equally between its nodes), else the node's own reading of
    wall power, else of system power, else none (configured)."""
    meters: dict[str, tuple[Decimal, int]] = {}
    for one in window.outlets:
        if node in one.nodes and one.covered_us:
            energy, covered = meters.get(one.meter, (Decimal(0), 0))
            meters[one.meter] = (energy + Decimal(one.energy_mj) / len(one.nodes), covered + one.covered_us)
    if meters:
        # a node with two outlets draws from both
        return sum((energy * 1000 / covered for energy, covered in meters.values()), Decimal(0)), "outlet"
    host = window.host(node)
    if host is not None and host.wall_mw_known_ms:
        return Decimal(host.wall_mw_ms) / host.wall_mw_known_ms / 1000, "wall"
    if host is not None and host.system_mw_known_ms:
        return Decimal(host.system_mw_ms) / host.system_mw_known_ms / 1000, "system"
    return None, "configured"


def _node(window: Window, tenure: Tenure, priced: Node | None, config: AggregatorConfig) -> NodeCost:
    reported_s, silent_s = seconds(tenure.reported), seconds(tenure.unheard)
    busy_us = window.busy_us(tenure.node)
    # busy time of concurrent loaders may exceed wall time; the share is capped at 1
    share = min(Decimal(1), Decimal(busy_us) / 1_000_000 / decimal(reported_s)) if reported_s else _ZERO
    watts, source = measured_watts(window, tenure.node)
    if watts is None and priced is not None:
        watts, source = expected_watts(priced, share)
    made = NodeCost(
        node=tenure.node,
        reported_s=round(reported_s, 3),
        busy_s=round(busy_us / 1e6, 3),
        watts=rounded(watts) if watts is not None else None,
        power=source,
        rate_per_h=None,
        cost=None,
        idle=None,
        silent_s=round(silent_s, 3),
    )
    rates = rates_per_hour(priced, config, watts) if priced is not None and watts is not None else None
    if rates is None:
        return made
    owned, power = rates
    cost, silent = rounded((owned + power) * decimal(reported_s) / 3600), rounded(owned * decimal(silent_s) / 3600)
    return msgspec.structs.replace(
        made, rate_per_h=rounded(owned + power), cost=cost + silent, idle=cost - rounded(cost * share), silent=silent
    )


def _model(
    name: str, m: Sum, window: Window, previous: CostReport | None, config: AggregatorConfig, nodes: Sequence[NodeCost]
) -> ModelCost:
    loaded = m.direct + m.idle if m.direct is not None else None
    before = next((b for b in previous.models if b.model == name), None) if previous else None
    made = ModelCost(
        model=name,
        requests=m.whole.requests,
        prompt_tok=m.whole.prompt_tok,
        cached_tok=m.whole.cached_tok,
        completion_tok=m.whole.completion_tok,
        busy_s=in_s(m.whole.busy_us),
        direct=m.direct,
        loaded=loaded,
        direct_per_m=per_m(m.direct, m.priced.tokens),
        loaded_per_m=per_m(loaded, m.priced.tokens),
        floor_per_m=_floor(window, name, m),
        uncached_per_m=per_m(m.prefill if m.direct is not None else None, m.priced.prompt_tok - m.priced.cached_tok),
        cached_per_m=Decimal(0) if m.direct is not None and m.priced.cached_tok else None,
        output_per_m=per_m(m.direct - m.prefill if m.direct is not None else None, m.priced.completion_tok),
        last_loaded_per_m=before.loaded_per_m if before else None,
        factors=_factors(window, m, loaded, [n for n in nodes if n.node in m.nodes]),
    )
    change = cost_change.judge(
        made.factors, before.factors if before else None, config.cost, previous.period if previous else ""
    )
    return msgspec.structs.replace(made, change=change)


def _factors(window: Window, m: Sum, loaded: Decimal | None, nodes: Sequence[NodeCost]) -> Factors | None:
    """The factors of the loaded price, and further evidence, all of priced nodes; None without a price."""
    work = m.priced
    if loaded is None or m.direct is None or not work.tokens:
        return None
    return Factors(
        tokens=work.tokens,
        requests=work.requests,
        loaded=float(loaded),
        direct=float(m.direct),
        prefill_s=float(work.prefill_us / 1_000_000),
        decode_s=float(work.decode_us / 1_000_000),
        busy_s=float(work.busy_us / 1_000_000),
        prompt_tok=work.prompt_tok,
        cached_tok=work.cached_tok,
        completion_tok=work.completion_tok,
        cut_share=work.cut / work.requests if work.requests else 0.0,
        throttled_share=heat.share(window, *m.nodes),
        reported_share=_reported_share(nodes),
    )


def _floor(window: Window, name: str, m: Sum) -> Decimal | None:
    """The direct price at the throughput of the best five minutes: the 95th percentile of tokens per busy second."""
    if m.direct is None or not m.priced.tokens:
        return None
    plain = per_m(m.direct, m.priced.tokens)
    paces = sorted(
        (d.prefill_tok + d.cached_tok + d.decode_tok) / (d.busy_prefill_us + d.busy_decode_us)
        for d in window.demand
        if d.model == name and d.busy_prefill_us + d.busy_decode_us >= FULL_SLOT_US
    )
    if not paces or not m.whole.busy_us:
        return plain
    best = paces[min(len(paces) - 1, int(0.95 * len(paces)))]
    if not best:
        return plain
    # slots are of all nodes, as the pace that they are compared with
    as_it_was = float(m.whole.tokens / m.whole.busy_us)
    return rounded(m.direct / m.priced.tokens * MILLION * decimal(min(1.0, as_it_was / best)))
