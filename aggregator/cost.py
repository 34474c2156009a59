"""What a million tokens cost: node money split by busy seconds, idle as its own row. Decimal, and every row adds up.

node cost per hour = price x (1 - residual) / life in hours + watts / 1000 x price per kWh x PUE + other. A node's cost
over the time it reported is divided between its models by the seconds in which their loaders worked; what is left is
idle. *Direct* counts busy seconds alone, *loaded* adds idle in proportion to them.
"""

from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal

import msgspec

from aggregator.config import AggregatorConfig, Node, decimal
from aggregator.window import Window, seconds
from shared.records import EngineWindow, HostSample, Served

HOURS_PER_YEAR = Decimal(8766)
HOURS_PER_MONTH = HOURS_PER_YEAR / 12
MILLION = Decimal(1_000_000)
_CENT6 = Decimal("0.000001")


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """One served name. Money is None where a node's price is unknown; ``per_m`` is per million tokens."""

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
    last_loaded_per_m: Decimal | None = None
    change: float | None = None
    flag: str = ""
    api: str = ""
    api_cost: Decimal | None = None
    saving: Decimal | None = None


class NodeCost(msgspec.Struct, frozen=True, kw_only=True):
    """One node: its cost over the time it reported, and how much of that nobody used."""

    node: str
    reported_s: float
    busy_s: float
    rate_per_h: Decimal | None
    cost: Decimal | None
    idle: Decimal | None


class CostReport(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. ``priced`` says whether any node has a price; ``total`` is the sum over priced nodes."""

    period: str
    currency: str
    priced: bool
    total: Decimal | None
    idle: Decimal | None
    average_per_m: Decimal | None
    unattributed: Decimal | None
    models: tuple[ModelCost, ...]
    nodes: tuple[NodeCost, ...]


def compute(window: Window, config: AggregatorConfig, previous: CostReport | None = None) -> CostReport:
    """The report of one span, compared with ``previous`` where there is one."""
    prices = {node.id: node for node in config.nodes}
    busy = _busy(window)
    nodes = [_node(window, name, prices.get(name), busy, config) for name in window.nodes]
    direct = _split({n.node: n.cost - n.idle for n in nodes if n.cost is not None and n.idle is not None}, busy)
    idle_of = _split({n.node: n.idle for n in nodes if n.idle is not None}, busy)
    models = _models(window, direct, idle_of, busy, config, previous)
    priced = [n.cost for n in nodes if n.cost is not None]
    total = sum(priced, Decimal(0)) if priced else None
    idle = sum((n.idle for n in nodes if n.idle is not None), Decimal(0)) if priced else None
    attributed = sum((m.direct for m in models if m.direct is not None), Decimal(0))
    priced_nodes = {n.node for n in nodes if n.cost is not None}
    tokens = sum(r.prompt_tok + r.completion_tok for _, r in window.of(Served) if r.worker in priced_nodes)
    return CostReport(
        period=window.span.name,
        currency=config.cost.currency,
        priced=bool(priced),
        total=total,
        idle=idle,
        average_per_m=_rounded(total / tokens * MILLION) if total is not None and tokens else None,
        unattributed=total - idle - attributed if total is not None and idle is not None else None,
        models=tuple(models),
        nodes=tuple(nodes),
    )


def rate_per_hour(node: Node, config: AggregatorConfig, watts: Decimal | None = None) -> Decimal | None:
    """A node's cost per hour; None without a price. Measured ``watts`` stand in for the configured ones."""
    if node.price is None:
        return None
    owned = decimal(node.price) * (1 - decimal(node.residual)) / (decimal(node.life_years) * HOURS_PER_YEAR)
    drawn = (watts if watts is not None else decimal(node.watts)) / 1000
    power = drawn * decimal(config.cost.electricity_per_kwh) * decimal(config.cost.pue)
    return owned + power + decimal(node.other_per_month) / HOURS_PER_MONTH


Busy = Mapping[tuple[str, str], int]
"""Busy microseconds by (node, version)."""


def _busy(window: Window) -> Busy:
    sums: dict[tuple[str, str], int] = {}
    for meta, record in window.of(EngineWindow):
        key = (meta.node, record.version)
        sums[key] = sums.get(key, 0) + record.busy_prefill_us + record.busy_decode_us
    return sums


def _node(window: Window, name: str, priced: Node | None, busy: Busy, config: AggregatorConfig) -> NodeCost:
    reported_s = seconds(window.reported(name))
    busy_us = sum(us for (node, _), us in busy.items() if node == name)
    rate = rate_per_hour(priced, config, _measured_watts(window, name)) if priced else None
    cost = _rounded(rate * decimal(reported_s) / 3600) if rate is not None else None
    idle = None
    if cost is not None:
        # two loaders may work in one second; then all of it is busy
        share = min(Decimal(1), Decimal(busy_us) / 1_000_000 / decimal(reported_s)) if reported_s else Decimal(0)
        idle = cost - _rounded(cost * share)
    return NodeCost(
        node=name,
        reported_s=round(reported_s, 3),
        busy_s=round(busy_us / 1e6, 3),
        rate_per_h=_rounded(rate) if rate is not None else None,
        cost=cost,
        idle=idle,
    )


def _measured_watts(window: Window, node: str) -> Decimal | None:
    """Mean of the wall or system power that the node reported; None where it has no meter."""
    found = [
        power
        for meta, record in window.of(HostSample)
        if meta.node == node
        for power in [record.wall_power_mw if record.wall_power_mw is not None else record.system_power_mw]
        if power is not None
    ]
    return Decimal(sum(found)) / len(found) / 1000 if found else None


def _split(money: Mapping[str, Decimal], busy: Busy) -> dict[tuple[str, str], Decimal]:
    """Each node's money over what ran on it, by busy time; the last takes what rounding leaves, so that it adds up."""
    found: dict[tuple[str, str], Decimal] = {}
    for node, amount in money.items():
        mine = sorted((key, us) for key, us in busy.items() if key[0] == node and us > 0)
        if not mine:
            continue
        left, total_us = amount, sum(us for _, us in mine)
        for key, us in mine[:-1]:
            found[key] = _rounded(amount * us / total_us)
            left -= found[key]
        found[mine[-1][0]] = left
    return found


class _Model:
    def __init__(self) -> None:
        self.requests = self.prompt_tok = self.cached_tok = self.completion_tok = 0
        self.busy_us = Decimal(0)
        self.direct: Decimal | None = None
        self.idle = Decimal(0)
        self.priced_tok = 0


def _models(
    window: Window,
    direct: Mapping[tuple[str, str], Decimal],
    idle_of: Mapping[tuple[str, str], Decimal],
    busy: Busy,
    config: AggregatorConfig,
    previous: CostReport | None,
) -> list[ModelCost]:
    sums: dict[str, _Model] = {}
    work: dict[tuple[str, str], dict[str, int]] = {}
    for _, served in window.of(Served):
        if not served.model:
            continue
        model = sums.setdefault(served.model, _Model())
        if served.outcome == "ok":
            model.requests += served.requests
        model.prompt_tok += served.prompt_tok
        model.cached_tok += served.cached_tok
        model.completion_tok += served.completion_tok
        tokens = served.prompt_tok - served.cached_tok + served.completion_tok
        names = work.setdefault((served.worker, served.version), {})
        names[served.model] = names.get(served.model, 0) + tokens
        if (served.worker, served.version) in direct:
            model.priced_tok += served.prompt_tok + served.completion_tok
    for key, us in sorted(busy.items()):
        _share_out(us, direct.get(key), idle_of.get(key), work.get(key, {}), sums)
    before = {m.model: m for m in previous.models} if previous else {}
    return [_model(name, m, before.get(name), config) for name, m in sorted(sums.items())]


def _share_out(
    us: int, direct: Decimal | None, idle: Decimal | None, names: Mapping[str, int], sums: Mapping[str, _Model]
) -> None:
    """One loader's busy time and money to the served names it answered, by their tokens."""
    total = sum(names.values())
    if not total:
        return
    direct_left, idle_left = direct, idle
    for position, (name, tokens) in enumerate(sorted(names.items())):
        model, last = sums[name], position == len(names) - 1
        model.busy_us += Decimal(us) * tokens / total
        if direct is None or idle is None or direct_left is None or idle_left is None:
            continue
        part = direct_left if last else _rounded(direct * tokens / total)
        share = idle_left if last else _rounded(idle * tokens / total)
        model.direct = (model.direct or Decimal(0)) + part
        model.idle += share
        direct_left, idle_left = direct_left - part, idle_left - share


def _model(name: str, m: _Model, before: ModelCost | None, config: AggregatorConfig) -> ModelCost:
    tokens = m.priced_tok
    loaded = m.direct + m.idle if m.direct is not None else None
    per_m = _rounded(loaded / tokens * MILLION) if loaded is not None and tokens else None
    last = before.loaded_per_m if before else None
    change = float(per_m / last) if per_m is not None and last else None
    api, api_cost = _api(name, m, config)
    return ModelCost(
        model=name,
        requests=m.requests,
        prompt_tok=m.prompt_tok,
        cached_tok=m.cached_tok,
        completion_tok=m.completion_tok,
        busy_s=float(round(m.busy_us / 1_000_000, 3)),
        direct=m.direct,
        loaded=loaded,
        direct_per_m=_rounded(m.direct / tokens * MILLION) if m.direct is not None and tokens else None,
        loaded_per_m=per_m,
        last_loaded_per_m=last,
        change=change,
        flag=_flag(m, before, change, config),
        api=api,
        api_cost=api_cost,
        saving=api_cost - loaded if api_cost is not None and loaded is not None else None,
    )


def _api(name: str, m: _Model, config: AggregatorConfig) -> tuple[str, Decimal | None]:
    price = next((p for p in config.api_prices if p.model == name), None)
    if price is None:
        return "", None
    cost = decimal(price.input_per_m) * m.prompt_tok + decimal(price.output_per_m) * m.completion_tok
    return price.name, _rounded(cost / MILLION)


def _flag(m: _Model, before: ModelCost | None, change: float | None, config: AggregatorConfig) -> str:
    """Why a jump deserves a look; "" for no jump. Small volumes are never flagged: their ratio means nothing."""
    if before is None or change is None or change < config.cost.flag_ratio:
        return ""
    tokens, last = m.prompt_tok + m.completion_tok, before.prompt_tok + before.completion_tok
    if min(tokens, last) < config.cost.flag_min_tok:
        return ""
    jump = f"{change:.1f} x last week"
    if _share(m.cached_tok, m.prompt_tok) < _share(before.cached_tok, before.prompt_tok) - 0.2:
        return f"{jump}: fewer prompt-cache hits, likely a hot prefix that is missed"
    if m.requests and before.requests and m.completion_tok / m.requests > 1.5 * before.completion_tok / before.requests:
        return f"{jump}: answers grew longer at the same hit rate, suspect a poisoned prompt cache"
    if tokens < 0.7 * last:
        return f"{jump}: less traffic on the same nodes"
    return f"{jump}: cause not clear from the counts"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _rounded(value: Decimal) -> Decimal:
    return value.quantize(_CENT6, rounding=ROUND_HALF_EVEN)
