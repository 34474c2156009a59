"""The initial placement, before any telemetry, from expected workloads and an inventory. Pure.

Memory is exact where a model's files are given (shared/memory_plan.py, as the agent computes it before a load). Speed
is estimated from the chip (shared/chips.py): prefill is bound by compute, decode by memory bandwidth. The first week
of telemetry replaces it.
"""

import math
import tomllib
from collections.abc import Mapping
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from aggregator import moves, packing
from aggregator.demand import Facts
from aggregator.packing import CAP, Copyable, Room
from aggregator.placement import NodeLoad, Placed, PlacementReport, described, explained, packed_with_slack
from shared.chips import BITS_PER_WEIGHT, UNCONFIRMED, Chip, decode_tok_s, find, prefill_tok_s, sizes
from shared.errors import Refused
from shared.keys import check_name
from shared.memory_plan import PROCESS_OVERHEAD_BYTES, default_budget_bytes, plan
from shared.model_shape import ModelShape

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
CHUNK_TOK = 512
BATCHED = 3.0
"""Rows that share one read of the weights on a node at its load limit."""


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model: ``path`` to its folder (exact), or its figures. ``active_gb`` are the weights read per token: all of
    them unless the model is a mixture of experts."""

    name: str
    path: str = ""
    weights_gb: Positive | None = None
    kv_kib_per_tok: Positive | None = None
    active_gb: Positive | None = None
    rows: Count = 8
    row_tok: Count = 4096
    cache_gb: Annotated[float, Meta(ge=0)] = 0.25


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Expected workload of a model: ``qps`` in the busiest five minutes of most days, tokens of a typical request,
    ``cached`` the share of prompt tokens that repeats, ``first_token_s`` the acceptable TTFT."""

    model: str
    qps: Annotated[float, Meta(ge=0)]
    prompt_tok: Annotated[float, Meta(ge=0)]
    answer_tok: Annotated[float, Meta(ge=0)]
    cached: Share = 0.0
    first_token_s: Positive | None = None
    min_copies: Count = 1
    nodes: tuple[str, ...] = ()


class Intake(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """intake.toml."""

    models: tuple[Model, ...]
    workloads: tuple[Workload, ...]


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node of the inventory. ``kind`` is mini, studio or other; ``budget_gb`` overrides the default memory budget
    for models."""

    id: str
    chip: str
    memory_gb: Positive
    kind: str = "mini"
    budget_gb: Positive | None = None
    bandwidth_gb_s: Positive | None = None
    tflops: Positive | None = None


class Inventory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """inventory.toml."""

    nodes: tuple[Machine, ...]


T = TypeVar("T", Intake, Inventory)
Measured = tuple[ModelShape, int]
"""Shape and weight bytes, from a model's folder."""


def parse(raw: bytes, kind: type[T], name: str) -> T:
    """Parse a file. Raises Refused listing all problems."""
    try:
        read = msgspec.convert(tomllib.loads(raw.decode()), kind)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError, RecursionError) as error:
        raise Refused(f"{name}: {error}") from None
    problems = _intake(read) if isinstance(read, Intake) else _inventory(read)
    if problems:
        raise Refused(f"{name}: " + "; ".join(problems))
    return read


def propose(intake: Intake, inventory: Inventory, measured: Mapping[str, Measured]) -> PlacementReport:
    """The initial placement. ``measured`` holds the models that have a path."""
    chips = {m.id: chip_of(m) for m in inventory.nodes}
    reference = max(chips.values(), key=lambda c: c.bandwidth_gb_s)
    needs = {m.name: need_bytes(m, measured.get(m.name)) for m in intake.models}
    active = {m.name: _active_bytes(m, measured.get(m.name)) for m in intake.models}
    models, least, notes = [], {}, []
    for load in intake.workloads:
        name = load.model
        work = load.qps * request_s(load, active[name], reference)
        least[name] = copies = min(len(inventory.nodes), max(load.min_copies, math.ceil(work / CAP)))
        models.append(Copyable(name=name, need_bytes=needs[name], copies=copies, load=work, only=load.nodes))
        notes += _latency(load, active[name], chips)
    speeds = {node: round(chip.bandwidth_gb_s / reference.bandwidth_gb_s, 3) for node, chip in chips.items()}
    rooms = tuple(Room(name=m.id, budget_bytes=budget_bytes(m), speed=speeds[m.id]) for m in inventory.nodes)
    facts = Facts(models=tuple(models), rooms=rooms, now=frozenset(), least=least, load_s={})
    packed = packed_with_slack(facts, len(models) * len(rooms))
    while packed.over and (more := _with_another_copy(facts, packed.pairs)) is not None:
        better = packed_with_slack(more, len(models) * len(rooms))
        if better.score >= packed.score:
            break
        facts, packed = more, better
    ordered = moves.order(facts.models, facts.rooms, facts.now, packed.pairs)
    return PlacementReport(
        period="before any telemetry",
        rebalance=bool(ordered.steps),
        nodes=tuple(_node(room, facts, ordered.reached) for room in rooms),
        placed=tuple(_placed(pair, needs) for pair in sorted(ordered.reached, key=lambda p: (p[1], p[0]))),
        moves=described(facts, ordered.steps),
        notes=(*notes, *_unsure(inventory)),
        short=explained(facts, packed),
        gap=packed.gap,
        score=round(packed.score, 6),
    )


def _unsure(inventory: Inventory) -> list[str]:
    """What of the estimates nobody has published, by chip."""
    nodes: dict[str, list[str]] = {}
    for machine in inventory.nodes:
        chip = find(machine.chip)
        if chip is not None and "tflops" in chip.unconfirmed and machine.tflops is None:
            nodes.setdefault(chip.name, []).append(machine.id)
    return [
        f"{', '.join(ids)}: the prefill rate of {name} is {UNCONFIRMED}, TTFT and load are estimates; `tflops` in the "
        "inventory replaces it"
        for name, ids in nodes.items()
    ]


def _with_another_copy(facts: Facts, pairs: packing.Placement) -> Facts | None:
    """Add a copy of the model with the highest load on an overloaded node; None if no such model can get one."""
    over = {r.name for r in facts.rooms if packing.load_of(r, facts.models, pairs) > r.limit + 1e-9}
    wanted = [
        m
        for m in facts.models
        if any((m.name, n) in pairs for n in over) and m.copies < len(m.only or tuple(r.name for r in facts.rooms))
    ]
    if not wanted:
        return None
    most = max(wanted, key=lambda m: (m.share, m.name))
    grown = msgspec.structs.replace(most, copies=most.copies + 1)
    models = tuple(grown if m.name == most.name else m for m in facts.models)
    return msgspec.structs.replace(facts, models=models, least={**facts.least, most.name: most.copies + 1})


def need_bytes(model: Model, measured: Measured | None) -> int:
    """Peak memory of one loader."""
    cache = int(model.cache_gb * 1e9)
    if measured is not None:
        return plan(
            *measured, rows=model.rows, row_tok=model.row_tok, chunk_tok=CHUNK_TOK, cache_bytes=cache, fused=True
        ).need_bytes
    kv = model.rows * model.row_tok * int((model.kv_kib_per_tok or 0) * 1024)
    return int((model.weights_gb or 0) * 1e9) + kv + cache + PROCESS_OVERHEAD_BYTES


def budget_bytes(machine: Machine) -> int:
    """Memory budget of a machine."""
    if machine.budget_gb is not None:
        return int(machine.budget_gb * 1e9)
    return default_budget_bytes(int(machine.memory_gb * (1 << 30)))


def chip_of(machine: Machine) -> Chip:
    """A machine's chip, with overrides from the inventory."""
    known = find(machine.chip) or Chip(name=machine.chip, bandwidth_gb_s=0, tflops=0)
    gb_s = machine.bandwidth_gb_s or known.bandwidth(machine.memory_gb)
    tflops = machine.tflops or known.gpu_tflops(machine.memory_gb)
    return msgspec.structs.replace(known, bandwidth_gb_s=gb_s, tflops=tflops, binned=())


def _intake(intake: Intake) -> list[str]:
    names = [m.name for m in intake.models]
    found = [f"duplicate model {n!r}" for n in sorted({n for n in names if names.count(n) > 1})]
    asked = [w.model for w in intake.workloads]
    found += [f"two workloads for {n!r}: merge them" for n in sorted({n for n in asked if asked.count(n) > 1})]
    found += [f"workload for {n!r}: no such model in this file" for n in asked if n not in names]
    found += [f"model {n!r} has no workload" for n in names if n not in asked]
    for model in intake.models:
        found += _named(model.name, "model")
        if not model.path and (model.weights_gb is None or model.kv_kib_per_tok is None):
            found.append(f"model {model.name!r}: needs path, or weights_gb and kv_kib_per_tok")
    return found


def _inventory(inventory: Inventory) -> list[str]:
    if not inventory.nodes:
        return ["no nodes defined"]
    ids = [m.id for m in inventory.nodes]
    found = [f"duplicate node {n!r}" for n in sorted({n for n in ids if ids.count(n) > 1})]
    for machine in inventory.nodes:
        found += _named(machine.id, "node")
        if problem := _machine(machine):
            found.append(f"node {machine.id}: {problem}")
    return found


_SOLD = {"mini": "Mac mini", "studio": "Mac Studio"}


def _machine(machine: Machine) -> str:
    """What is wrong with a machine, by the table of chips; "" if nothing is."""
    chip = find(machine.chip)
    if machine.kind not in (*_SOLD, "other"):
        return f"kind {machine.kind!r}; use mini, studio or other"
    if chip is None:
        known = machine.bandwidth_gb_s and machine.tflops
        return "" if known else f"unknown chip {machine.chip!r}; add bandwidth_gb_s and tflops"
    if machine.kind == "other":
        return ""
    sold, name = sizes(chip, machine.kind), _SOLD[machine.kind]
    if not sold:
        other = next((kind for kind in _SOLD if sizes(chip, kind)), "other")
        return f'no {name} has {machine.chip}; for a {_SOLD.get(other, "Mac of another kind")} set kind = "{other}"'
    if machine.memory_gb not in sold:
        return f"a {name} with {machine.chip} has {', '.join(map(str, sold))} GB, not {machine.memory_gb:g}"
    return ""


def _named(name: str, what: str) -> list[str]:
    try:
        check_name(name, what)
    except Refused as error:
        return [error.message]
    return []


def _active_bytes(model: Model, measured: Measured | None) -> float:
    if model.active_gb is not None:
        return model.active_gb * 1e9
    return float(measured[1]) if measured is not None else (model.weights_gb or 0) * 1e9


def _prefill_s(active_bytes: float, chip: Chip, bits: float = BITS_PER_WEIGHT) -> float:
    """Prefill seconds per prompt token: two operations per active weight."""
    return 1 / prefill_tok_s(chip.tflops, active_bytes * 8 / bits)


def _decode_s(active_bytes: float, chip: Chip) -> float:
    """Decode seconds per token for a single row: every active weight is read once."""
    return 1 / decode_tok_s(chip.bandwidth_gb_s, active_bytes)


def request_s(load: Workload, active_bytes: float, chip: Chip, bits: float = BITS_PER_WEIGHT) -> float:
    """Busy seconds of one request in a batch, of a model with ``bits`` per weight."""
    prefill = load.prompt_tok * (1 - load.cached) * _prefill_s(active_bytes, chip, bits)
    return prefill + load.answer_tok * _decode_s(active_bytes, chip) / BATCHED


def _latency(load: Workload, active_bytes: float, chips: Mapping[str, Chip]) -> list[str]:
    if load.first_token_s is None:
        return []
    fresh_tok = load.prompt_tok * (1 - load.cached)
    waits = {node: fresh_tok * _prefill_s(active_bytes, chip) for node, chip in sorted(chips.items())}
    slow = [f"{node} about {wait:.1f} s" for node, wait in waits.items() if wait > load.first_token_s]
    if not slow:
        return []
    return [f"{load.model}: TTFT target of {load.first_token_s:g} s cannot be met on {', '.join(slow)}"]


def _node(room: Room, facts: Facts, reached: packing.Placement) -> NodeLoad:
    return NodeLoad(
        node=room.name,
        budget_bytes=room.budget_bytes,
        held_bytes=0,
        busy_share=None,
        throttled_share=None,
        speed=room.speed,
        limit=room.limit,
        load_after=round(packing.load_of(room, facts.models, reached), 4),
        held_after_bytes=packing.held(room, facts.models, reached),
    )


def _placed(pair: tuple[str, str], needs: Mapping[str, int]) -> Placed:
    model, node = pair
    return Placed(
        model=model,
        node=node,
        version="",
        need_bytes=needs[model],
        busy_share=None,
        requests=0,
        advice="load",
        reason="placed by its expected load",
    )
