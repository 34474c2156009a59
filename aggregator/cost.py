"""Cost per million tokens: node cost allocated by busy seconds, idle time as its own row. Decimal; all rows add up.

node cost per hour = price x (1 - residual) / life in hours + watts / 1000 x price per kWh x PUE + other. A node's cost
over the time it reported is allocated to its models by the busy seconds of their loaders; the remainder is idle.
*Direct* counts busy seconds only. *Loaded* adds idle cost: to models pinned there by the memory they hold over time,
the rest by busy seconds. The *floor* is the price if nodes were never idle and always as well utilised as in their best
five minutes.
"""

from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal

import msgspec

from aggregator import cost_change, heat
from aggregator.config import AggregatorConfig, Node, decimal
from aggregator.cost_change import Change, Factors
from aggregator.demand import machines
from aggregator.window import Window, seconds
from shared.chips import Identity, desktop, find
from shared.chips import price as list_price

HOURS_PER_YEAR = Decimal(8766)
HOURS_PER_MONTH = HOURS_PER_YEAR / 12
MILLION = Decimal(1_000_000)
FULL_SLOT_US = 30_000_000
"""Five-minute slots with less busy time than this say nothing about a node's peak throughput."""
_CENT6 = Decimal("0.000001")


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
    """One node: its cost over the time it reported, and the idle part of it. ``power`` is the source of ``watts``:
    outlet, wall, system or configured."""

    node: str
    reported_s: float
    busy_s: float
    watts: Decimal | None
    power: str
    rate_per_h: Decimal | None
    cost: Decimal | None
    idle: Decimal | None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a node's cost: a model's work there, ``idle``, or ``unattributed`` (work that answered no request).
    The rows of a node add up to its cost."""

    node: str
    model: str
    kind: str
    busy_s: float
    cost: Decimal


class KeyCost(msgspec.Struct, frozen=True, kw_only=True):
    """Usage of one API key and its cost, idle time included."""

    key_id: str
    requests: int
    prompt_tok: int
    completion_tok: int
    cost: Decimal | None


class CostReport(msgspec.Struct, frozen=True, kw_only=True):
    """The cost report. ``priced`` is whether any node has a price; ``total`` is the sum over priced nodes."""

    period: str
    currency: str
    priced: bool
    total: Decimal | None
    idle: Decimal | None
    average_per_m: Decimal | None
    unattributed: Decimal | None
    models: tuple[ModelCost, ...]
    nodes: tuple[NodeCost, ...]
    rows: tuple[Row, ...] = ()
    keys: tuple[KeyCost, ...] = ()
    unpriced_nodes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    """List prices of nodes without a price, where they are known."""
    busy_share: float | None = None
    """Of the time that priced nodes reported (all nodes, where none is priced), the part in which their loaders worked;
    a node counts at most its whole time."""


ASSUMED_WATTS = Decimal(45)
"""Of a node that is neither metered nor configured, and whose chip has no public figures."""


def compute(window: Window, config: AggregatorConfig, previous: CostReport | None = None) -> CostReport:
    """The report of one span, compared with ``previous`` if given."""
    prices = {node.id: node for node in config.nodes}
    nodes = [_node(window, name, prices.get(name), config) for name in window.nodes]
    shares = _Shares(window, nodes)
    models = [_model(name, m, window, previous, config) for name, m in sorted(shares.sums.items())]
    priced = [n for n in nodes if n.cost is not None]
    total = sum((n.cost for n in priced if n.cost is not None), Decimal(0)) if priced else None
    idle = sum((n.idle for n in priced if n.idle is not None), Decimal(0)) if priced else None
    attributed = sum((m.direct for m in models if m.direct is not None), Decimal(0))
    priced_nodes = {n.node for n in priced}
    tokens = sum(s.prompt_tok + s.completion_tok for s in window.served if s.worker in priced_nodes)
    there = machines(window)
    return CostReport(
        period=window.span.name,
        currency=config.cost.currency,
        priced=bool(priced),
        total=total,
        idle=idle,
        average_per_m=_per_m(total, tokens),
        unattributed=total - idle - attributed if total is not None and idle is not None else None,
        models=tuple(models),
        nodes=tuple(nodes),
        rows=tuple(shares.rows()),
        keys=tuple(_keys(window, models)),
        unpriced_nodes=tuple(n.node for n in nodes if n.cost is None),
        hints=tuple(hint for n in nodes if n.cost is None for hint in _listed(n.node, there.get(n.node))),
        busy_share=_busy_share(priced or nodes),
    )


def _busy_share(nodes: Sequence[NodeCost]) -> float | None:
    reported_s = sum(n.reported_s for n in nodes)
    return sum(min(n.busy_s, n.reported_s) for n in nodes) / reported_s if reported_s else None


def _listed(node: str, machine: Identity | None) -> tuple[str, ...]:
    """The list price of a node that has none configured."""
    if machine is None or machine.mac is None or machine.mac.kind == "other":
        return ()
    return (f"{node}: {list_price(machine.mac, machine.memory_gb)[1]}",)


def rate_per_hour(node: Node, config: AggregatorConfig, watts: Decimal) -> Decimal | None:
    """A node's cost per hour at a mean power of ``watts``; None without a price."""
    if node.price is None:
        return None
    owned = decimal(node.price) * (1 - decimal(node.residual)) / (decimal(node.life_years) * HOURS_PER_YEAR)
    power = watts / 1000 * decimal(config.cost.electricity_per_kwh) * decimal(config.cost.pue)
    return owned + power + decimal(node.other_per_month) / HOURS_PER_MONTH


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


def _node(window: Window, name: str, priced: Node | None, config: AggregatorConfig) -> NodeCost:
    reported_s = seconds(window.reported(name))
    busy_us = window.busy_us(name)
    # busy time of concurrent loaders may exceed wall time; the share is capped at 1
    share = min(Decimal(1), Decimal(busy_us) / 1_000_000 / decimal(reported_s)) if reported_s else Decimal(0)
    watts, source = measured_watts(window, name)
    if watts is None and priced is not None:
        watts, source = expected_watts(priced, share)
    rate = rate_per_hour(priced, config, watts) if priced is not None and watts is not None else None
    cost = rounded(rate * decimal(reported_s) / 3600) if rate is not None else None
    idle = None if cost is None else cost - rounded(cost * share)
    return NodeCost(
        node=name,
        reported_s=round(reported_s, 3),
        busy_s=round(busy_us / 1e6, 3),
        watts=rounded(watts) if watts is not None else None,
        power=source,
        rate_per_h=rounded(rate) if rate is not None else None,
        cost=cost,
        idle=idle,
    )


class _Sum:
    """Running sums of one served name."""

    def __init__(self) -> None:
        self.requests = self.prompt_tok = self.cached_tok = self.completion_tok = self.cut = 0
        self.prefill_us = self.decode_us = self.prefill = self.idle = Decimal(0)
        self.direct: Decimal | None = None
        self.priced_prompt = self.priced_cached = self.priced_completion = 0

    @property
    def priced_tok(self) -> int:
        return self.priced_prompt + self.priced_completion


class _Shares:
    """Allocates cost and busy time of every (node, version) to the served names it answered, by tokens computed."""

    def __init__(self, window: Window, nodes: list[NodeCost]) -> None:
        self._window, self._nodes = window, {n.node: n for n in nodes}
        self.sums: dict[str, _Sum] = {}
        self._rows: dict[tuple[str, str], tuple[Decimal, Decimal]] = {}
        self._work: dict[tuple[str, str], dict[str, int]] = {}
        self._count()
        for node in nodes:
            self._share_out(node)

    def rows(self) -> list[Row]:
        """The parts of each node's cost."""
        found = []
        for node in self._nodes.values():
            if node.cost is None or node.idle is None:
                continue
            mine = {model: part for (n, model), part in self._rows.items() if n == node.node}
            for model, (us, money) in sorted(mine.items()):
                found.append(Row(node=node.node, model=model, kind="model", busy_s=_s(us), cost=money))
            left = node.cost - node.idle - sum((money for _, money in mine.values()), Decimal(0))
            lost_s = max(0.0, node.busy_s - sum(_s(us) for us, _ in mine.values()))
            if left:
                found.append(Row(node=node.node, model="", kind="unattributed", busy_s=round(lost_s, 3), cost=left))
            found.append(Row(node=node.node, model="", kind="idle", busy_s=0.0, cost=node.idle))
        return found

    def _count(self) -> None:
        for served in self._window.served:
            if not served.model:
                continue
            total = self.sums.setdefault(served.model, _Sum())
            if served.outcome == "ok":
                total.requests += served.requests
                total.cut += served.requests if served.finish == "length" else 0
            total.prompt_tok += served.prompt_tok
            total.cached_tok += served.cached_tok
            total.completion_tok += served.completion_tok
            tokens = served.prompt_tok - served.cached_tok + served.completion_tok
            names = self._work.setdefault((served.worker, served.version), {})
            names[served.model] = names.get(served.model, 0) + tokens
            node = self._nodes.get(served.worker)
            if node is not None and node.cost is not None:
                total.priced_prompt += served.prompt_tok
                total.priced_cached += served.cached_tok
                total.priced_completion += served.completion_tok

    def _share_out(self, node: NodeCost) -> None:
        busy: dict[str, tuple[int, int]] = {}
        for engine in self._window.engines:
            if engine.node == node.node:
                prefill, decode = busy.get(engine.version, (0, 0))
                busy[engine.version] = (prefill + engine.busy_prefill_us, decode + engine.busy_decode_us)
        busy_money = None if node.cost is None or node.idle is None else node.cost - node.idle
        money = _divided(busy_money, {version: sum(us) for version, us in busy.items()})
        idle = _divided(node.idle, self._idle_weights(node, busy))
        for version, us in sorted(busy.items()):
            names = self._work.get((node.node, version), {})
            self._to_names(node.node, names, us, money.get(version), idle.get(version))

    def _idle_weights(self, node: NodeCost, busy: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Integer weights for idle cost: pinned models by memory over time, the rest by busy time."""
        mine = [r for r in self._window.residents if r.node == node.node and r.state == "ready"]
        held = {v: sum((r.need_bytes or 0) * r.length_ms for r in mine if r.version == v) for v in busy}
        pinned = {v: h for v, h in held.items() if any(r.pinned for r in mine if r.version == v)}
        free = {v: sum(us) for v, us in busy.items() if v not in pinned}
        if not pinned or not sum(pinned.values()):
            return {v: sum(us) for v, us in busy.items()}
        if not sum(free.values()):
            return pinned
        whole = sum(held.values())
        part = Decimal(sum(pinned.values())) / whole
        scale = Decimal(10**12)
        weights = {v: int(scale * part * h / sum(pinned.values())) for v, h in pinned.items()}
        return weights | {v: int(scale * (1 - part) * us / sum(free.values())) for v, us in free.items()}

    def _to_names(
        self, node: str, names: Mapping[str, int], busy: tuple[int, int], money: Decimal | None, idle: Decimal | None
    ) -> None:
        """Allocate one loader's time (of prefill and decode) and cost to the served names it answered, by tokens."""
        if not (total := sum(names.values())):
            return
        prefill, decode = busy
        direct_of, idle_of = _divided(money, dict(names)), _divided(idle, dict(names))
        for name, tokens in names.items():
            model, us = self.sums[name], Decimal(prefill + decode) * tokens / total
            model.prefill_us += Decimal(prefill) * tokens / total
            model.decode_us += Decimal(decode) * tokens / total
            if money is None or idle is None:
                continue
            part = direct_of.get(name, Decimal(0))
            model.direct = (model.direct or Decimal(0)) + part
            model.prefill += part * prefill / (prefill + decode) if prefill + decode else Decimal(0)
            model.idle += idle_of.get(name, Decimal(0))
            row_us, row = self._rows.get((node, name), (Decimal(0), Decimal(0)))
            self._rows[node, name] = (row_us + us, row + part)


def _divided(money: Decimal | None, weights: Mapping[str, int]) -> dict[str, Decimal]:
    """Divide an amount by weights; the last part takes the rounding remainder, so that the parts add up."""
    wanted = sorted((name, weight) for name, weight in weights.items() if weight > 0)
    if money is None or not wanted:
        return {}
    left, total = money, sum(weight for _, weight in wanted)
    found: dict[str, Decimal] = {}
    for name, weight in wanted[:-1]:
        found[name] = rounded(money * weight / total)
        left -= found[name]
    found[wanted[-1][0]] = left
    return found


def _model(name: str, m: _Sum, window: Window, previous: CostReport | None, config: AggregatorConfig) -> ModelCost:
    loaded = m.direct + m.idle if m.direct is not None else None
    before = next((b for b in previous.models if b.model == name), None) if previous else None
    made = ModelCost(
        model=name,
        requests=m.requests,
        prompt_tok=m.prompt_tok,
        cached_tok=m.cached_tok,
        completion_tok=m.completion_tok,
        busy_s=_s(m.prefill_us + m.decode_us),
        direct=m.direct,
        loaded=loaded,
        direct_per_m=_per_m(m.direct, m.priced_tok),
        loaded_per_m=_per_m(loaded, m.priced_tok),
        floor_per_m=_floor(window, name, m),
        uncached_per_m=_per_m(m.prefill if m.direct is not None else None, m.priced_prompt - m.priced_cached),
        cached_per_m=Decimal(0) if m.direct is not None and m.priced_cached else None,
        output_per_m=_per_m(m.direct - m.prefill if m.direct is not None else None, m.priced_completion),
        last_loaded_per_m=before.loaded_per_m if before else None,
        factors=_factors(window, name, m, loaded),
    )
    change = cost_change.judge(made.factors, before.factors if before else None, config.cost)
    return msgspec.structs.replace(made, change=change)


def _factors(window: Window, name: str, m: _Sum, loaded: Decimal | None) -> Factors | None:
    """The factors of the loaded price, and further evidence; None without a price."""
    if loaded is None or m.direct is None or not m.priced_tok:
        return None
    mine = {e.node for e in window.engines if e.model == name and e.busy_us}
    return Factors(
        tokens=m.priced_tok,
        requests=m.requests,
        loaded=float(loaded),
        direct=float(m.direct),
        prefill_s=float(m.prefill_us / 1_000_000),
        decode_s=float(m.decode_us / 1_000_000),
        busy_s=float((m.prefill_us + m.decode_us) / 1_000_000),
        prompt_tok=m.priced_prompt,
        cached_tok=m.priced_cached,
        completion_tok=m.priced_completion,
        cut_share=m.cut / m.requests if m.requests else 0.0,
        throttled_share=heat.share(window, *mine) or 0.0,
    )


def _floor(window: Window, name: str, m: _Sum) -> Decimal | None:
    """The direct price at the throughput of the best five minutes: the 95th percentile of tokens per busy second."""
    if m.direct is None or not m.priced_tok:
        return None
    busy_us = m.prefill_us + m.decode_us
    paces = sorted(
        (d.prefill_tok + d.cached_tok + d.decode_tok) / (d.busy_prefill_us + d.busy_decode_us)
        for d in window.demand
        if d.model == name and d.busy_prefill_us + d.busy_decode_us >= FULL_SLOT_US
    )
    if not paces or not busy_us:
        return _per_m(m.direct, m.priced_tok)
    best = paces[min(len(paces) - 1, int(0.95 * len(paces)))]
    as_it_was = float(Decimal(m.prompt_tok + m.completion_tok) / busy_us)
    return rounded(m.direct / m.priced_tok * MILLION * decimal(min(1.0, as_it_was / best)))


def _keys(window: Window, models: list[ModelCost]) -> list[KeyCost]:
    """Usage of every API key, and its part of each model's loaded cost by the work it caused; parts add up."""
    work: dict[str, dict[str, int]] = {}
    sums: dict[str, list[int]] = {}
    for served in window.served:
        total = sums.setdefault(served.key_id, [0, 0, 0])
        total[0] += served.requests if served.outcome == "ok" else 0
        total[1] += served.prompt_tok
        total[2] += served.completion_tok
        names = work.setdefault(served.model, {})
        tokens = served.prompt_tok - served.cached_tok + served.completion_tok
        names[served.key_id] = names.get(served.key_id, 0) + tokens
    money: dict[str, Decimal] = {}
    for model in models:
        for key, part in _divided(model.loaded, work.get(model.model, {})).items():
            money[key] = money.get(key, Decimal(0)) + part
    return [
        KeyCost(key_id=key, requests=requests, prompt_tok=prompt, completion_tok=completion, cost=money.get(key))
        for key, (requests, prompt, completion) in sorted(sums.items())
    ]


def _per_m(money: Decimal | None, tokens: int) -> Decimal | None:
    return rounded(money / tokens * MILLION) if money is not None and tokens > 0 else None


def _s(us: Decimal) -> float:
    return float(round(us / 1_000_000, 3))


def rounded(value: Decimal) -> Decimal:
    """To millionths, the precision of all money in reports."""
    return value.quantize(_CENT6, rounding=ROUND_HALF_EVEN)
