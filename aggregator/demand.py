"""What models need and what nodes can carry, as reported: the input of a placement. Pure.

Demand is the 95th percentile of five-minute slots, not the mean: users wait during bursts.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from aggregator import eviction, heat, packing
from aggregator.config import PlacedModel
from aggregator.config import Placement as Rules
from aggregator.packing import CAP, Copyable, Placement, Room
from aggregator.tables import SLOT_MS
from aggregator.window import ResidentSum, Window, at_least_one, seconds
from shared.chips import Identity, identify
from shared.records import Hardware, ModelEvicted, ModelLoaded, ModelTimed

ALONE = 0.95
"""Load limit of a node that a single model has to itself, before the model gets another copy."""
GONE_MS = 900_000
LEAST_LOAD = 0.01
"""Minimum load of a resident model, even without requests."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Input of a plan, from a week's telemetry or from an intake before there is any."""

    models: tuple[Copyable, ...]
    rooms: tuple[Room, ...]
    now: Placement
    least: Mapping[str, int]
    load_s: Mapping[str, float]
    throttled: Mapping[str, float] = {}
    versions: Mapping[str, str] = {}
    silent: Mapping[str, int] = {}
    guessed: tuple[str, ...] = ()
    """Nodes whose speed is a guess, and why."""


def facts_of(window: Window, rules: Rules, bandwidths: Mapping[str, float]) -> Facts:
    """Nodes, models and demand as reported. ``bandwidths`` (GB/s) are configured, for chips that nobody knows."""
    silent = _gone(window)
    everywhere = current(window)
    residents = {(r.model, r.node): r for r in everywhere if r.node not in silent}
    speeds, guessed = _speeds(window, bandwidths)
    load = _loads(window, speeds)
    typical = statistics.median(speeds.values()) if speeds else 1.0
    wished = {w.model: w for w in rules.models}
    models, least = [], {}
    for name in sorted({r.model for r in everywhere}):
        here = [r for (m, _), r in residents.items() if m == name]
        stood = [r for r in everywhere if r.model == name]
        wish = wished.get(name, PlacedModel(model=name))
        work = max(LEAST_LOAD, load.get(name, 0.0))
        # its own node first, another copy once it has that
        alone = all(m == name for m, n in residents if n in {r.node for r in here})
        needed = max(wish.min_copies, math.ceil(work / (CAP if alone else ALONE) / typical))
        allowed = [n for n in window.nodes if n not in silent and (not wish.nodes or n in wish.nodes)]
        least[name] = min(needed, max(1, len(allowed)))
        copies = max(least[name], len(here))
        need = max(r.need_bytes or 0 for r in stood)
        pinned = tuple(r.node for r in here if r.pinned)
        models.append(Copyable(name=name, need_bytes=need, copies=copies, load=work, only=wish.nodes, pinned=pinned))
    evicted, versions = _evicted(window, {m.name for m in models}, load, wished)
    models += evicted
    least |= {m.name: m.copies for m in evicted}
    now: Placement = frozenset(residents)
    rooms, throttled = _rooms(window, speeds, models, now, silent)
    return Facts(
        models=tuple(models),
        rooms=rooms,
        now=now,
        least=least,
        load_s=_load_times(window),
        throttled=throttled,
        versions={r.model: r.version for r in everywhere} | versions,
        silent=silent,
        guessed=guessed,
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


def load_of(room: Room, models: Sequence[Copyable], at: Placement) -> float:
    """The load of a node under a placement: a model's work is shared equally by its copies."""
    total = 0.0
    for model in models:
        if (model.name, room.name) in at:
            total += model.load / sum(name == model.name for name, _ in at)
    return total / room.speed


def _rooms(
    window: Window, speeds: Mapping[str, float], models: Sequence[Copyable], now: Placement, silent: Mapping[str, int]
) -> tuple[tuple[Room, ...], dict[str, float]]:
    rooms, throttled = [], {}
    for name in [n for n in window.nodes if n not in silent]:
        host = window.host(name)
        held = sum(m.need_bytes for m in models if (m.name, name) in now)
        budget = host.memory_budget_bytes if host is not None and host.memory_budget_bytes is not None else held
        room = Room(name=name, budget_bytes=budget, speed=speeds[name])
        share = heat.share_to_move(window, name)
        if share is not None and share > heat.MOVE_SHARE:
            here = [m.share / room.speed for m in models if (m.name, name) in now and name not in m.pinned]
            load = packing.load_of(room, models, now)
            room = msgspec.structs.replace(room, limit=max(0.0, min(CAP, load - min(here))) if here else min(CAP, load))
            throttled[name] = share
        rooms.append(room)
    return tuple(rooms), throttled


def machines(window: Window) -> dict[str, Identity]:
    """What each node is by its own words, where it said so in this span."""
    said = {meta.node: record for meta, record in window.of(Hardware)}
    return {node: identify(record.model, record.chip, record.memory_bytes) for node, record in said.items()}


def _speeds(window: Window, bandwidths: Mapping[str, float]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Relative decode speed of each node: by the work of models on several nodes, else by what calibrations of the same
    version measured there, else by memory bandwidth; and what of it is a guess, in words."""
    paces: dict[str, dict[str, float]] = {}
    for one in window.engines:
        if one.decode_tok > 1000 and one.busy_decode_us:
            paces.setdefault(one.model, {})[one.node] = one.busy_decode_us / one.decode_tok
    timed: dict[str, dict[str, float]] = {}
    for meta, record in window.of(ModelTimed):
        if record.step_us and record.step_us[0] > 0:
            timed.setdefault(record.version, {})[meta.node] = record.step_us[0]
    there = machines(window)
    known = {n: one.chip.bandwidth(one.memory_gb) for n, one in there.items() if one.chip is not None}
    known |= {n: gb_s for n, gb_s in bandwidths.items() if n in window.nodes}
    typical = statistics.median(known.values()) if known else None
    speeds, unsure = {}, list[str]()
    for node in window.nodes:
        ratios = _ratios(paces, node) or _ratios(timed, node)
        guessed = known[node] / typical if node in known and typical else 1.0
        speeds[node] = round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3) if ratios else round(guessed, 3)
        if not ratios and node not in known and (known or node in there):
            unsure.append(f"{node}: {_why_unknown(there.get(node))}; {_AS_TYPICAL}")
        elif node not in bandwidths and node in there:
            unsure += [f"{node}: {remark}" for remark in there[node].remarks]
    return speeds, tuple(unsure)


_AS_TYPICAL = "taken to be as fast as the others until measured; `bandwidth_gb_s` in its [[nodes]] table tells better"


def _why_unknown(machine: Identity | None) -> str:
    return machine.remarks[0] if machine is not None else "it did not say what it is in this span"


def _ratios(paces: Mapping[str, Mapping[str, float]], node: str) -> list[float]:
    """By how much a node is faster than the median of those with the same model."""
    return [statistics.median(p.values()) / p[node] for p in paces.values() if len(p) > 1 and node in p]


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
    return {model: statistics.median(found) for model, found in times.items()}


def _evicted(
    window: Window, standing: set[str], load: Mapping[str, float], wished: Mapping[str, PlacedModel]
) -> tuple[list[Copyable], dict[str, str]]:
    """Models that were evicted, requested again and are now on no node; and their versions."""
    rows = [r for r in eviction.report(window, top=None).rows if r.verdict == "placement" and r.model not in standing]
    sizes = {r.model: r.bytes // r.evictions for r in sorted(rows, key=lambda r: r.node)}
    found = []
    for name, size in sorted(sizes.items()):
        wish = wished.get(name, PlacedModel(model=name))
        work = max(LEAST_LOAD, load.get(name, 0.0))
        found.append(Copyable(name=name, need_bytes=size, copies=wish.min_copies, load=work, only=wish.nodes))
    return found, {record.model: record.version for _, record in window.of(ModelEvicted) if record.model in sizes}


def _gone(window: Window) -> dict[str, int]:
    """Nodes that stopped reporting while others continued, with the end of their last report."""
    last = {node: reported[-1][1] for node in window.nodes if (reported := window.reported(node))}
    latest = max(last.values(), default=0)
    return {node: t_ms for node, t_ms in last.items() if t_ms < latest - GONE_MS}
