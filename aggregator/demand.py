"""What models need and what nodes can carry, as reported: the input of a placement. Pure.

Demand is the 95th percentile of five-minute slots, not the mean: users wait during bursts.
"""

import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set

import msgspec

from aggregator import eviction, heat, packing
from aggregator.config import PlacedModel
from aggregator.config import Placement as Rules
from aggregator.eviction import Eviction
from aggregator.packing import CAP, Copyable, Placement, Room
from aggregator.tables import SLOT_MS
from aggregator.window import ResidentSum, Serving, Window, at_least_one, seconds
from shared.chips import Identity, identify
from shared.memory_plan import default_budget_bytes
from shared.records import Hardware, ModelEvicted, ModelLoaded, ModelTimed

ALONE = 0.95
"""Load limit of a node that a single model has to itself, before the model gets another copy."""
GONE_MS = 900_000
LEAST_LOAD = 0.01
"""Minimum load of a resident model, even without requests."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What other judgements say and a placement must not contradict: nodes that are ``away`` (an incident of theirs is
    open), ``retired`` or ``hot`` (heat slows them for longer than is tolerated), and whether the rack is ``dearer``
    than API hosts, so that a further node is not advised."""

    away: Set[str] = frozenset()
    retired: Set[str] = frozenset()
    hot: Set[str] = frozenset()
    dearer: bool = False


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """An eviction of ``model`` from ``node`` that traffic did not justify: bytes of each model ``wanted`` there at the
    same time. These are the evicted one, the one that it made room for, and what of the models that stood there then
    still stands there or was evicted without need, too."""

    node: str
    model: str
    made_room_for: str
    wanted: Mapping[str, int]


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
    guessed: tuple[tuple[str, str], ...] = ()
    """Nodes whose speed is a guess, and why."""
    ceilings: Mapping[str, int] = {}
    """Bytes to which a node's memory allows its budget to be raised, where that is known."""
    crowds: tuple[Crowd, ...] = ()
    names: Mapping[tuple[str, str], tuple[str, ...]] = {}
    """Further names that the loader of a (model, node) answers to."""

    @property
    def needs(self) -> dict[str, int]:
        """Bytes of one copy of each model."""
        return {m.name: m.need_bytes for m in self.models}

    def ceiling(self, room: Room) -> int:
        """The largest budget that a node can have."""
        return max(room.budget_bytes, self.ceilings.get(room.name, 0))


def facts_of(window: Window, rules: Rules, bandwidths: Mapping[str, float], known: Known = Known()) -> Facts:  # noqa: B008
    """Nodes, models and demand as reported. ``bandwidths`` (GB/s) are configured, for chips that nobody knows."""
    silent = _gone(window, known.away | known.retired)
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
    found = [one for one in eviction.judge(window) if one.verdict == "placement"]
    crowds = _crowds(window, found, everywhere)
    ceilings = {h.node: default_budget_bytes(h.memory_total_bytes) for h in window.hosts if h.memory_total_bytes}
    evicted, versions = _evicted(window, {m.name for m in models}, load, wished, _unfit(window, crowds, ceilings))
    models += evicted
    least |= {m.name: m.copies for m in evicted}
    now: Placement = frozenset(residents)
    rooms, throttled = _rooms(window, speeds, models, now, silent)
    cool = {r.name for r in rooms} - known.hot - set(throttled)
    return Facts(
        models=tuple(_kept_cool(m, cool, now, {r.name for r in rooms}) for m in models),
        rooms=rooms,
        now=now,
        least=least,
        load_s=_load_times(window),
        throttled=throttled,
        versions={r.model: r.version for r in everywhere} | versions,
        silent=silent,
        guessed=guessed,
        ceilings=ceilings,
        crowds=crowds,
        names=_names(window, everywhere),
    )


def _kept_cool(model: Copyable, cool: Set[str], now: Placement, nodes: Set[str]) -> Copyable:
    """A model that gets no further copy on a node that is too warm, unless all that are allowed are."""
    allowed = set(model.only or nodes)
    wanted = (allowed & cool) | {n for n in allowed if (model.name, n) in now}
    if not allowed & cool or wanted == allowed:
        return model
    return msgspec.structs.replace(model, only=tuple(sorted(wanted)))


def current(window: Window) -> list[ResidentSum]:
    """The ready models of each node in the last batch that listed any; names of one loader are one model.

    A node that was stopped cleanly ends with a batch that lists none; the models before that are its placement.
    """
    ready = [r for r in window.residents if r.state == "ready"]
    last = {node: max(r.last_ms for r in ready if r.node == node) for node in {r.node for r in ready}}
    newest: dict[tuple[str, str], ResidentSum] = {}
    for one in ready:
        if one.last_ms == last[one.node]:
            newest[one.model, one.node] = one
    loaders = _loaders(window)
    return [newest[key] for key in sorted(newest) if _is_loader(newest[key], loaders)]


def _loaders(window: Window) -> dict[tuple[str, str], set[str]]:
    """The names of the loaders of each (node, version). Every loader reports its work, also when it had none."""
    found: dict[tuple[str, str], set[str]] = {}
    for engine in window.engines:
        found.setdefault((engine.node, engine.version), set()).add(engine.model)
    return found


def _is_loader(one: ResidentSum, loaders: Mapping[tuple[str, str], Set[str]]) -> bool:
    """Whether a name has a loader of its own: one that reports no work beside others of its version there shares
    theirs."""
    mine = loaders.get((one.node, one.version), set())
    return not mine or one.model in mine


def _names(window: Window, standing: Sequence[ResidentSum]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Names without a loader of their own, at the first loader of their node and version."""
    loaders = _loaders(window)
    asked = {(r.node, r.version, r.model) for r in window.residents if r.state == "ready"}
    asked |= {(s.worker, s.version, s.model) for s in window.served if s.outcome == "ok"}
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for one in standing:
        mine = loaders.get((one.node, one.version), {one.model})
        others = {m for node, version, m in asked if (node, version) == (one.node, one.version)} - mine
        if others and one.model == min(mine):
            found[one.model, one.node] = tuple(sorted(others - {one.model}))
    return {key: names for key, names in found.items() if names}


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


def _speeds(window: Window, bandwidths: Mapping[str, float]) -> tuple[dict[str, float], tuple[tuple[str, str], ...]]:
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
    speeds, unsure = {}, list[tuple[str, str]]()
    for node in window.nodes:
        ratios = _ratios(paces, node) or _ratios(timed, node)
        guessed = known[node] / typical if node in known and typical else 1.0
        speeds[node] = round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3) if ratios else round(guessed, 3)
        if not ratios and node not in known and (known or node in there):
            unsure.append((node, f"{_why_unknown(there.get(node))}; {_AS_TYPICAL}"))
        elif node not in bandwidths and node in there:
            unsure += [(node, remark) for remark in there[node].remarks]
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
    window: Window,
    standing: set[str],
    load: Mapping[str, float],
    wished: Mapping[str, PlacedModel],
    intruders: Mapping[str, int],
) -> tuple[list[Copyable], dict[str, str]]:
    """Models that were evicted, requested again and are now on no node, and those (``intruders``) that pushed them out
    of a node which cannot hold both; and their versions."""
    rows = [r for r in eviction.report(window, top=None).rows if r.verdict == "placement" and r.model not in standing]
    sizes = {name: size for name, size in intruders.items() if name not in standing}
    sizes |= {r.model: r.bytes for r in sorted(rows, key=lambda r: r.bytes)}
    found = []
    for name, size in sorted(sizes.items()):
        wish = wished.get(name, PlacedModel(model=name))
        work = max(LEAST_LOAD, load.get(name, 0.0))
        found.append(Copyable(name=name, need_bytes=size, copies=wish.min_copies, load=work, only=wish.nodes))
    last = sorted((r for r in window.residents if r.model in sizes), key=lambda r: r.last_ms)
    versions = {r.model: r.version for r in last} | {
        record.model: record.version for _, record in window.of(ModelEvicted) if record.model in sizes
    }
    return found, versions


def _crowds(window: Window, found: Sequence[Eviction], standing: Sequence[ResidentSum]) -> tuple[Crowd, ...]:
    """What was wanted at the same time as each model that traffic did not evict; alike ones once."""
    needs = _sizes(window)
    kept = {(r.node, r.model) for r in standing} | {(e.node, e.record.model) for e in found}
    tracks: dict[str, list[Serving]] = {}
    for track in window.serving:
        if (track.node, track.model) in kept:
            tracks.setdefault(track.node, []).append(track)
    crowds: dict[tuple[str, str, frozenset[str]], Crowd] = {}
    for one in found:
        node, record = one.node, one.record
        there = {t.model for t in tracks.get(node, ()) if _covers(t, record.t_ms)} | {record.model, record.for_model}
        wanted = {name: _need(needs, window, node, name) for name in sorted(there - {""})}
        key = (node, record.model, frozenset(wanted))
        crowds[key] = Crowd(node=node, model=record.model, made_room_for=record.for_model, wanted=wanted)
    return tuple(crowds[key] for key in sorted(crowds, key=lambda k: (k[0], k[1], sorted(k[2]))))


def _sizes(window: Window) -> dict[tuple[str, str], int]:
    """What each model needs on each node, by what nodes planned for it."""
    found: dict[tuple[str, str], int] = {}
    planned = [((r.node, r.model), r.need_bytes or 0) for r in window.residents]
    planned += [((meta.node, record.model), record.bytes) for meta, record in window.of(ModelEvicted)]
    for key, need in planned:
        found[key] = max(need, found.get(key, 0))
    return found


def _need(needs: Mapping[tuple[str, str], int], window: Window, node: str, model: str) -> int:
    """Bytes of a model on a node, else on any; one that never stood anywhere is taken to need all of the budget."""
    if (node, model) in needs:
        return needs[node, model]
    elsewhere = max((need for (_, name), need in needs.items() if name == model), default=None)
    return elsewhere if elsewhere is not None else _budget(window, node)


def _budget(window: Window, node: str) -> int:
    host = window.host(node)
    return (host.memory_budget_bytes or 0) if host is not None else 0


def _covers(track: Serving, t_ms: int) -> bool:
    place = bisect_right(track.starts, t_ms) - 1
    return place >= 0 and t_ms < track.ends[place]


def _unfit(window: Window, crowds: Sequence[Crowd], ceilings: Mapping[str, int]) -> dict[str, int]:
    """Models that others had to make room for on a node that cannot hold them together, with what they need."""
    sized = {model for _, model in _sizes(window)}
    found: dict[str, int] = {}
    for crowd in crowds:
        most, name = max(_budget(window, crowd.node), ceilings.get(crowd.node, 0)), crowd.made_room_for
        if name in sized and sum(crowd.wanted.values()) > most:
            found[name] = max(found.get(name, 0), crowd.wanted[name])
    return found


def _gone(window: Window, away: Set[str]) -> dict[str, int]:
    """Nodes that stopped reporting while others continued, or that are away, with the end of their last report."""
    last = {node: reported[-1][1] for node in window.nodes if (reported := window.reported(node))}
    latest = max(last.values(), default=0)
    return {node: t_ms for node, t_ms in last.items() if t_ms < latest - GONE_MS or node in away}
