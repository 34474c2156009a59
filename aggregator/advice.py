"""What to do about the rack, from everything that was judged: each thing once, the weightiest first. Pure.

Nothing is recommended that another judgement contradicts: what concerns models is one conclusion for each
(aggregator.placement.conclusion), a node that is away gets nothing but a look, and a node is only given up where
nothing else is said about it. Equal advice for several nodes or models is one sentence, with its verb first and long
lists cut to a few names and a count; ``models`` and ``nodes`` have all of them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Literal

import msgspec

from aggregator.allocation import rounded
from aggregator.annotations import COUNTS
from aggregator.api_prices import Comparisons
from aggregator.calendar import duration, local
from aggregator.config import Scorecard
from aggregator.cost import HOURS_PER_MONTH, CostReport, amount
from aggregator.eviction import EvictionReport
from aggregator.heat import Thermal
from aggregator.incidents import Incident
from aggregator.phrases import listed, percent
from aggregator.placement import PlacementReport
from aggregator.placement.conclusion import Shortage
from aggregator.uptime import Uptime, cut
from aggregator.window import Window

Kind = Literal["money", "capacity", "placement", "retirement", "operations"]
Topic = Literal[
    "dearer", "silent", "memory", "load", "outages", "outage", "budget", "move", "leave", "pin", "blocked", "heat",
    "cache", "price", "spare", "speed",
]  # fmt: skip
"""What a recommendation is about, the weightiest first."""
KINDS: dict[Topic, Kind] = {
    "dearer": "money",
    "silent": "operations",
    "memory": "capacity",
    "load": "capacity",
    "outages": "operations",
    "outage": "operations",
    "budget": "placement",
    "move": "placement",
    "leave": "placement",
    "pin": "placement",
    "blocked": "placement",
    "heat": "operations",
    "cache": "placement",
    "price": "operations",
    "spare": "retirement",
    "speed": "operations",
}
"""In order of weight."""
_ALWAYS = ("money", "capacity", "operations")
_WEIGHTS = {topic: weight for weight, topic in enumerate(KINDS)}


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """What to do (``text``), on which evidence (``because``), and what comes of it: ``effect``, and ``per_month`` saved
    in the rack's currency where that is known. ``models`` and ``nodes`` are all that it concerns."""

    kind: Kind
    text: str
    because: str
    topic: Topic
    effect: str = ""
    per_month: Decimal | None = None
    models: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What fits a page, and how many of each kind do not."""

    rows: tuple[Recommendation, ...]
    left: dict[Kind, int] = {}


def shown(found: Sequence[Recommendation], most: int) -> Shown:
    """All about money, capacity and operations, one of every other kind, and as many more as fit, the weightiest first;
    of the others how many there are, by kind."""
    kinds = [one.kind for one in found]
    always = {n for n, kind in enumerate(kinds) if kind in _ALWAYS or kinds.index(kind) == n}
    others = [n for n in range(len(kinds)) if n not in always]
    kept = always.union(others[: max(0, most - len(always))])
    left = Counter(kind for n, kind in enumerate(kinds) if n not in kept)
    return Shown(rows=tuple(found[n] for n in sorted(kept)), left=dict(left))


def recommendations(
    window: Window,
    heat: Thermal,
    map_: PlacementReport,
    money: CostReport,
    up: Uptime,
    evicted: EvictionReport,
    targets: Scorecard,
    apis: Comparisons,
) -> list[Recommendation]:
    """All of them, the weightiest first."""
    found = [
        *_dearer(money, apis),
        *_away(window, map_, up),
        *_capacity(map_),
        *_outages(map_, up, targets),
        *_placement(map_, evicted),
        *_heat(heat, map_, targets),
        *_speeds(map_),
    ]
    found += _prices(money, found)
    touched = {node for one in found for node in one.nodes}
    found += _spare(map_, money, touched)
    return sorted(found, key=lambda one: _WEIGHTS[one.topic])


def away(up: Uptime) -> dict[str, Incident]:
    """Nodes of which an incident is open that is not excused."""
    return {
        one.node: one
        for one in up.incidents
        if one.scope == "node" and one.end_ms is None and COUNTS.get(one.cause) != "excused"
    }


def _made(topic: Topic, text: str, because: str, **more: object) -> Recommendation:
    return Recommendation(kind=KINDS[topic], topic=topic, text=text, because=because, **more)  # type: ignore[arg-type]


def _dearer(money: CostReport, apis: Comparisons) -> list[Recommendation]:
    """Where the rack costs more than API hosts: what would change that."""
    if apis.share is None or apis.share >= 0 or apis.ours is None or apis.median is None:
        return []
    ours, theirs = (amount(value, money.currency) for value in (apis.ours, apis.median))
    because = f"what can be compared cost {ours} here and {theirs} at the host in the middle"
    busy, needed = money.busy_share or 0.0, apis.break_even or 0.0
    if 0 < needed <= 1:
        text = f"raise utilisation above {percent(needed)} (it was {percent(busy)}), or move work to API hosts"
    else:
        text = "move work to API hosts: at its pace this rack cannot reach their price at any utilisation"
    effect = f"{amount(apis.ours - apis.median, money.currency)} less in {money.period}, at the prices of API hosts"
    return [_made("dearer", text, because, effect=effect)]


def _away(window: Window, map_: PlacementReport, up: Uptime) -> list[Recommendation]:
    """Nodes that are down or silent now: one sentence for each cause."""
    still = {node: (one.cause, one.text, one.start_ms) for node, one in away(up).items()}
    for node, t_ms in map_.silent.items():
        if not _excused_now(node, up, max(end for n in window.nodes for _, end in window.reported(n))):
            still.setdefault(node, ("silent", "no report, and nothing explains it", t_ms))
    found: list[Recommendation] = []
    for cause in sorted({cause for cause, _, _ in still.values()}):
        nodes = tuple(sorted(n for n, (c, _, _) in still.items() if c == cause))
        since = [f"{n} since {local(still[n][2], window.span.timezone):%d %b %H:%M}" for n in nodes]
        told = f", or give {_their(nodes)} retirement date in [[nodes]]" if cause == "silent" else ""
        lost = [s for s in map_.shortages if s.kind == "away" or (s.kind == "load" and not s.more_nodes)]
        because = (f"{still[nodes[0]][1]}: {listed(since)}", *(s.why for s in lost if not found))
        found.append(_made("silent", f"look at {listed(nodes)}{told}", "; ".join(because), nodes=nodes))
    return found


def _excused_now(node: str, up: Uptime, t_ms: int) -> bool:
    """Whether an operator takes what is going on at a node out of the account."""
    mine = [i for i in up.incidents if (i.node, i.scope) == (node, "node") and COUNTS.get(i.cause) == "excused"]
    return any(one.end_ms is None or one.end_ms >= t_ms for one in mine)


def _their(names: Sequence[str]) -> str:
    return "its" if len(names) == 1 else "their"


def _capacity(map_: PlacementReport) -> list[Recommendation]:
    """Memory and load that no node has, each once for all models."""
    return [
        _short("memory" if one.kind == "memory" else "load", one, map_)
        for one in map_.shortages
        if one.kind == "memory" or (one.kind == "load" and one.more_nodes)
    ]


def _short(topic: Topic, one: Shortage, map_: PlacementReport) -> Recommendation:
    """A shortage, and the moves of the same models meanwhile."""
    moves = [_move(map_, model).text for model in one.models if any(m.model == model for m in map_.moves)]
    because = "; meanwhile ".join((one.why, *([listed(moves)] if moves else [])))
    return _made(topic, one.remedy, because, models=one.models, nodes=one.nodes)


def _outages(map_: PlacementReport, up: Uptime, targets: Scorecard) -> list[Recommendation]:
    """Nodes that missed the promised uptime by outages that nobody announced. Those that are away are said already."""
    now, found = {*away(up), *map_.silent}, []
    missed = [n for n in up.nodes if n.share is not None and n.share < targets.uptime and n.node not in now]
    times = {n.node: _outage_times(n.node, up) for n in missed}
    shares = {n.node: f"{n.node} {cut(n.share, 2)}" for n in missed if n.share is not None}
    often = sorted((n for n in times if times[n][0] > 1), key=lambda n: (-times[n][0], n))
    once = sorted((n for n in times if times[n][0] == 1), key=lambda n: (-times[n][1], n))
    if often:
        text = f"find out why {listed([f'{n} ({times[n][0]} outages)' for n in often])} went down so often"
        found.append(_made("outages", text, f"up {listed([shares[n] for n in often])}", nodes=tuple(often)))
    if once:
        text = f"find out why {listed([f'{n} ({duration(times[n][1])})' for n in once])} went down once"
        found.append(_made("outage", text, f"up {listed([shares[n] for n in once])}", nodes=tuple(once)))
    return found


def _outage_times(node: str, up: Uptime) -> tuple[int, float]:
    """How often a node was down without its operator having stopped it, announced it or excused it, and for how many
    seconds."""
    mine = [
        one
        for one in up.incidents
        if (one.node, one.scope) == (node, "node")
        and one.cause not in ("stopped", "silent", *_NOT_HELD)
        and not (one.confirmed and one.cause == "unknown")
    ]
    seconds = sum((one.end_ms - one.start_ms) / 1000 for one in mine if one.end_ms is not None)
    return sum(one.times for one in mine), seconds


_NOT_HELD = tuple(cause for cause, counts in COUNTS.items() if counts == "excused" or cause == "not_down")


def _placement(map_: PlacementReport, evicted: EvictionReport) -> list[Recommendation]:
    """What to do about models and their memory, one sentence for each."""
    found = [_short("budget", one, map_) for one in map_.shortages if one.kind == "budget"]
    found += [_short("blocked", one, map_) for one in map_.shortages if one.kind == "held_back"]
    told = {model for one in map_.shortages for model in one.models}
    counts = {m.model: m.verdicts.get("placement", 0) for m in evicted.models}
    found += [_move(map_, model) for model in sorted({m.model for m in map_.moves} - told)]
    for model in map_.models_to("leave", "pin"):
        if model not in told:
            found.append(_setting(map_, model, counts.get(model, 0)))
    stuck = [m for m in map_.models_to("blocked") if m not in told]
    if stuck:
        text = f"free memory for {listed(stuck)} by hand, with an interruption"
        because = "no node has memory to spare for a move without one"
        found.append(_made("blocked", text, because, models=tuple(stuck)))
    for model in sorted({s.model for s in map_.settings} - told):
        mine = [s for s in map_.settings if s.model == model]
        text = f"raise cache_bytes of {model}: {listed([f'{s.value:,} on {s.node}' for s in mine])}"
        found.append(_made("cache", text, mine[0].reason, models=(model,), nodes=tuple(s.node for s in mine)))
    return found


def _move(map_: PlacementReport, model: str) -> Recommendation:
    """The steps of one model in a sentence."""
    steps = [m for m in map_.moves if m.model == model]
    parked = {m.node for m in steps if m.parked}
    mine = [m for m in steps if m.node not in parked] or steps
    loads, gone = [m for m in mine if m.action == "load"], [m.node for m in mine if m.action == "unload"]
    numbers = listed([str(m.step) for m in steps])
    if loads and gone:
        text = f"move {model} from {listed(gone)} to {listed([m.node for m in loads])}"
    elif loads:
        text = f"load {model} on {listed([m.node for m in loads])}"
    else:
        text = f"unload {model} on {listed(gone)}"
    first = (loads or mine)[0]
    return _made(
        "move",
        f"{text} ({'step' if numbers.isdigit() else 'steps'} {numbers})",
        first.reason,
        effect=f"otherwise {first.declined}",
        models=(model,),
        nodes=tuple(sorted({m.node for m in steps})),
    )


def _setting(map_: PlacementReport, model: str, evictions: int) -> Recommendation:
    """To pin a model, or to leave it to other nodes, wherever that is so."""
    mine = [c for c in map_.conclusions if c.model == model and c.kind in ("leave", "pin")]
    pins, off = [c for c in mine if c.kind == "pin"], [c for c in mine if c.kind == "leave"]
    room = listed([f"{c.room_bytes / 1e9:.1f} GB stay free on {c.node}" for c in pins])
    text = [
        *([f"pin {model} on {listed([c.node for c in pins])}"] if pins else []),
        *([f"take {model} off {listed([c.node for c in off])}"] if off else []),
    ]
    because = [
        *([f"evicted {_times(evictions)} without need"] if evictions else []),
        *([f"{room} beside all that was wanted there at the same time"] if pins else []),
        *([f"{listed(off[0].nodes)} {'serves' if len(off[0].nodes) == 1 else 'serve'} it already"] if off else []),
    ]
    topic: Topic = "pin" if pins else "leave"
    return _made(topic, " and ".join(text), "; ".join(because), models=(model,), nodes=tuple(c.node for c in mine))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _heat(heat: Thermal, map_: PlacementReport, targets: Scorecard) -> list[Recommendation]:
    """Air for nodes that heat slows; what moves away from them meanwhile is said with it."""
    slowed, because = slow(heat, targets), heat.because
    if heat.kind not in ("throttled", "hot"):
        return []
    leaving = sorted({f"{m.model} leaves {m.source}" for m in map_.moves if m.bound == "heat" and not m.parked})
    if leaving:
        because += f"; until that is done {listed(leaving)}, see the moves"
    return [_made("heat", heat.advice.rstrip("."), because, nodes=tuple(slowed))]


def slow(heat: Thermal, targets: Scorecard) -> list[str]:
    """Nodes that heat slowed for longer than is tolerated, the worst first."""
    mine = [n for n in heat.nodes if (n.throttled_share or 0.0) > targets.throttled]
    return [n.node for n in sorted(mine, key=lambda n: (-(n.throttled_share or 0.0), n.node))]


def _prices(money: CostReport, told: Iterable[Recommendation]) -> list[Recommendation]:
    """Prices that jumped. What else is recommended for such a model is named beside it."""
    found = []
    for one in money.models:
        if one.change is not None and one.change.flagged:
            also = [r.text for r in told if one.model in r.models]
            because = "; ".join([one.change.text, *(f"see also: {text}" for text in also)])
            found.append(_made("price", f"look into the price of {one.model}", because, models=(one.model,)))
    return found


def _spare(map_: PlacementReport, money: CostReport, touched: set[str]) -> list[Recommendation]:
    """Nodes without work about which nothing else is said."""
    nodes = [n for n in map_.spare if n not in touched]
    if not nodes or any(s.kind in ("memory", "load") for s in map_.shortages):
        return []
    busy = {n.node: n.busy_share or 0.0 for n in map_.nodes}
    rates = [n.rate_per_h for n in money.nodes if n.node in nodes and n.rate_per_h is not None]
    saved = rounded(sum(rates, Decimal(0)) * HOURS_PER_MONTH) if rates else None
    text = f"give {listed(nodes)} another task, or retire {'it' if len(nodes) == 1 else 'them'}"
    because = f"busy {listed([f'{n} {busy[n]:.1%}' for n in nodes])} of the time; other nodes carry their models"
    effect = f"saves {amount(saved, money.currency)} in a whole month" if saved is not None else ""
    return [_made("spare", text, because, effect=effect, per_month=saved, nodes=tuple(nodes))]


def _speeds(map_: PlacementReport) -> list[Recommendation]:
    """Nodes whose speed is a guess."""
    if not map_.unsure:
        return []
    text = f"set bandwidth_gb_s of {listed(map_.unsure)} in [[nodes]]"
    return [_made("speed", text, "what such a node can carry is a guess; see the placement's remarks")]
