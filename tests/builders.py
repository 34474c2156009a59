"""Telemetry as nodes report it, as real records and batches."""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, get_args

import msgspec
from pypdf import PdfReader

from aggregator.annotations import Annotation
from aggregator.calendar import Span
from aggregator.config import Node
from aggregator.fleet import fleet
from aggregator.tables import FOLDS, SLOT_MS
from aggregator.uptime import Uptime, uptime
from aggregator.window import (
    LONGEST_WINDOW_MS,
    Asked,
    Cover,
    Demand,
    DesiredSum,
    ElsewhereSum,
    EngineSum,
    Fact,
    HostSum,
    Intervals,
    Latency,
    Meta,
    OutletSum,
    ResidentSum,
    Run,
    ServedSum,
    Serving,
    Window,
    facts_of,
    meta_of,
    straightened,
    union,
    within,
)
from shared.batch import Batch
from shared.records import (
    DesiredObserved,
    EngineWindow,
    Event,
    Hardware,
    HostSample,
    OutletReading,
    Record,
    Resident,
    Served,
)
from shared.sketch import Sketch

S = TypeVar("S", bound=msgspec.Struct)

T0 = 1_795_219_200_000
"""2026-11-21 00:00:00 UTC."""
MINUTE = 60_000
DAY = Span("2026-W47", T0, T0 + 86_400_000, "UTC")


def served(model: str = "m", *, worker: str = "n1", version: str = "v1", requests: int = 1, **more: object) -> Served:
    """A gateway's record of requests; each took 100 ms, with a TTFT of 20 ms."""
    values: dict[str, object] = {
        "prompt_tok": 100 * requests,
        "completion_tok": 10 * requests,
        "ttft_us": Sketch([20_000] * requests).to_wire(),
        "itl_us": Sketch([9_000] * requests).to_wire(),
        "total_us": Sketch([100_000] * requests).to_wire(),
        "finish": "stop",
    }
    return Served(model=model, worker=worker, version=version, requests=requests, **{**values, **more})  # type: ignore[arg-type]


def engine(model: str = "m", *, version: str = "v1", busy_s: float = 10.0) -> EngineWindow:
    """A loader that worked ``busy_s`` of its window."""
    return EngineWindow(model=model, version=version, busy_decode_us=int(busy_s * 1e6), decode_tok=10)


def resident(model: str = "m", *, version: str = "v1", need: int = 10**9, state: str = "ready") -> Resident:
    """A resident model."""
    return Resident(model=model, version=version, state=state, need_bytes=need)


def host(*, throttled: float = 0.0, budget: int = 10 * 10**9) -> HostSample:
    """A machine that was throttled for a share of the minute."""
    return HostSample(
        memory_budget_bytes=budget,
        thermal_known_us=60_000_000,
        throttled_us=int(60_000_000 * throttled),
        thermal_level="heavy" if throttled else "nominal",
        package_temp_mc=61_500,
    )


def batch(
    records: Sequence[Record] = (),
    *,
    node: str = "n1",
    minute: int = 0,
    seq: int | None = None,
    epoch: int = 1,
    rack: str = "r",
) -> Batch:
    """The batch of a node's minute."""
    start = T0 + minute * MINUTE
    return Batch(
        rack=rack,
        node=node,
        incarnation=1,
        epoch=epoch,
        seq=seq if seq is not None else minute + 1,
        t_start_ms=start,
        t_end_ms=start + MINUTE,
        records=tuple(records),
    )


def window(*batches: Batch, span: Span = DAY, nodes: Iterable[str] = ()) -> Window:
    """Batches as reports see them, added up in plain Python: the reference for the tables' SQL."""
    once = {b.id: straightened(b) for b in sorted(batches, key=lambda b: b.id, reverse=True)}
    inside = (b for b in once.values() if span.since_ms <= b.t_end_ms < span.until_ms)
    mine = sorted(inside, key=lambda b: (b.t_end_ms, b.seq, b.id))
    near = [*mine, *(b for b in once.values() if 0 <= b.t_end_ms - span.until_ms < LONGEST_WINDOW_MS)]
    facts = [f for b in mine for f in facts_of(b)]
    made = Window(
        span=span,
        served=_summed((row for row in _served_rows(facts) if not row["place"]), ServedSum),
        elsewhere=_summed((row for row in _served_rows(facts) if row["place"]), ElsewhereSum),
        latencies=_latencies(facts),
        engines=_summed(_engine_rows(facts), EngineSum),
        hosts=_summed(_host_rows(facts), HostSum),
        residents=_summed(_resident_rows(facts), ResidentSum),
        desired=_summed(_desired_rows(facts), DesiredSum),
        outlets=_summed(
            (msgspec.structs.asdict(f.record) for f in facts if isinstance(f.record, OutletReading)), OutletSum
        ),
        runs=_summed((_run_row(b) for b in mine), Run),
        covers=within(
            (
                Cover(node=node, **_columns(union((meta_of(b).t_start_ms, b.t_end_ms) for b in near if b.node == node)))
                for node in sorted({b.node for b in near})
            ),
            span,
        ),
        serving=within(_serving([f for b in near for f in facts_of(b)]), span),
        demand=_summed(_engine_rows(facts, SLOT_MS), Demand),
        asked=_summed((row for row in _served_rows(facts, SLOT_MS) if not row["place"]), Asked),
        events=tuple(sorted((f for f in facts if isinstance(f.record, EVENT_TYPES)), key=_when)),
    )
    earlier = {b.node for b in once.values() if meta_of(b).t_start_ms < span.since_ms}
    asked = {*made.nodes, *nodes}
    before = frozenset(node for node in asked if node in earlier and not made.reported_at_the_start(node))
    return msgspec.structs.replace(made, reported_before=before)


def uptime_of(window: Window, now_ms: int, notes: Sequence[Annotation] = (), nodes: Sequence[Node] = ()) -> Uptime:
    """The uptime of a span up to a moment; ``nodes`` are the configured ones."""
    return uptime(window, fleet(window, nodes, now_ms), notes)


def pdf_text(body: bytes) -> str:
    """What a reader sees in a PDF."""
    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(body)).pages)


EVENT_TYPES = (*get_args(Event), Hardware)
_LABELS = {
    ServedSum: FOLDS["served"].labels,
    ElsewhereSum: ("place", "place_category", "model", "key_id", "task_class", "outcome", "finish"),
    EngineSum: FOLDS["engine"].labels,
    HostSum: ("node",),
    ResidentSum: FOLDS["resident"].labels,
    DesiredSum: FOLDS["desired"].labels,
    OutletSum: ("meter", "nodes"),
    Run: ("node", "incarnation", "epoch"),
    Demand: ("slot_ms", "model"),
    Asked: ("slot_ms", "model", "outcome"),
}
_LOWEST = ("disk_free_bytes", "idle_package_mc", "first_seq", "since_ms", "dropped_before")
_NEWEST = ("memory_budget_bytes", "need_bytes", "pinned", "agent_version", "boot_id", "reason")
_HIGHEST = (
    *(
        "last_ms",
        "last_seq",
        "dropped_batches",
        "skew_max_ms",
        "footprint_bytes",
        "restarts",
        "power_max_mw",
        "queue_max",
    ),
    *("package_temp_mc", "pcore_temp_mc", "gpu_temp_mc", "fan_max_rpm", "system_power_max_mw", "memory_total_bytes"),
    *("memory_used_max_bytes", "swap_used_bytes", "cache_bytes", "active_bytes", "peak_bytes", "kv_peak_bytes"),
    "disk_bytes",
)


def _when(fact: Fact) -> tuple[int, str, int, int]:
    return (fact.meta.t_end_ms, fact.meta.node, fact.meta.seq, fact.ordinal)


def _summed(rows: Iterable[dict[str, Any]], kind: type[S]) -> tuple[S, ...]:
    """Rows added up field by field, in the order of their batches' ends, so the last is the newest."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[label] for label in _LABELS[kind])
        total = sums.setdefault(key, {})
        for name in kind.__struct_fields__:
            value, old = row.get(name), total.get(name)
            if name in _LABELS[kind] or old is None or (name in _NEWEST and value is not None):
                total[name] = value if value is not None else old
            elif value is not None and name not in _NEWEST:
                total[name] = (
                    min(old, value) if name in _LOWEST else max(old, value) if name in _HIGHEST else old + value
                )
    return tuple(msgspec.convert({k: v for k, v in sums[key].items() if v is not None}, kind) for key in sorted(sums))


def _slot(meta: Meta, slot_ms: int) -> dict[str, Any]:
    return {"slot_ms": meta.t_end_ms - meta.t_end_ms % slot_ms} if slot_ms else {}


def _served_rows(facts: Iterable[Fact], slot_ms: int = 0) -> Iterator[dict[str, Any]]:
    for f in facts:
        if isinstance(f.record, Served):
            yield {**msgspec.structs.asdict(f.record), "door": f.meta.node, **_slot(f.meta, slot_ms)}


def _engine_rows(facts: Iterable[Fact], slot_ms: int = 0) -> Iterator[dict[str, Any]]:
    for f in facts:
        if isinstance(f.record, EngineWindow):
            yield {**msgspec.structs.asdict(f.record), "node": f.meta.node, **_slot(f.meta, slot_ms)}


def _host_rows(facts: Sequence[Fact]) -> Iterator[dict[str, Any]]:
    busy: dict[Meta, int] = {}
    for f in facts:
        if isinstance(f.record, EngineWindow):
            busy[f.meta] = busy.get(f.meta, 0) + f.record.busy_prefill_us + f.record.busy_decode_us
    for f in facts:
        if not isinstance(f.record, HostSample):
            continue
        h, length = f.record, f.meta.t_end_ms - f.meta.t_start_ms
        row = msgspec.structs.asdict(h)
        for name, value in (
            ("wall_mw", h.wall_power_mw),
            ("system_mw", h.system_power_mw),
            ("soc_mw", h.soc_power_mw),
            ("package_mc", h.package_temp_mean_mc),
        ):
            row[f"{name}_ms"] = (value or 0) * length
            row[f"{name}_known_ms"] = length if value is not None else 0
        used = [x for x in (h.memory_used_max_bytes, h.memory_used_bytes) if x is not None]
        worked_us = min(busy.get(f.meta, 0), h.thermal_known_us)
        yield {
            **row,
            "node": f.meta.node,
            "windows": 1,
            "worked_us": worked_us,
            "throttled_worked_us": min(worked_us, h.throttled_us),
            "idle_package_mc": h.package_temp_mean_mc if busy.get(f.meta, 0) <= 10 * length else None,
            "swap_in_bytes": h.swap_in_bytes or 0,
            "swap_out_bytes": h.swap_out_bytes or 0,
            "energy_mj": h.energy_mj or 0,
            "pressed_windows": int((h.memory_pressure or "normal") != "normal"),
            "fan_max_rpm": max(h.fan_rpm, default=None),
            "memory_used_max_bytes": max(used, default=None),
        }


def _resident_rows(facts: Iterable[Fact]) -> Iterator[dict[str, Any]]:
    for f in facts:
        if isinstance(f.record, Resident):
            length = f.meta.t_end_ms - f.meta.t_start_ms
            row = msgspec.structs.asdict(f.record)
            yield {**row, "node": f.meta.node, "windows": 1, "length_ms": length, "last_ms": f.meta.t_end_ms}


def _desired_rows(facts: Iterable[Fact]) -> Iterator[dict[str, Any]]:
    for f in facts:
        if isinstance(f.record, DesiredObserved):
            row, meta = msgspec.structs.asdict(f.record), f.meta
            yield {**row, "node": meta.node, "windows": 1, "since_ms": meta.t_start_ms, "last_ms": meta.t_end_ms}


def _run_row(batch: Batch) -> dict[str, Any]:
    meta, skew = meta_of(batch), batch.clock_skew_ms
    return {
        **meta._asdict(),
        "batches": 1,
        "first_seq": batch.seq,
        "dropped_before": batch.dropped_batches,
        "last_seq": batch.seq,
        "since_ms": meta.t_start_ms,
        "skewed_batches": int(abs(skew or 0) > 2000),
        "skew_max_ms": abs(skew) if skew is not None else None,
    }


def _latencies(facts: Iterable[Fact]) -> tuple[Latency, ...]:
    sums: dict[tuple[str, str, str], dict[str, Sketch]] = {}
    for f in facts:
        if isinstance(f.record, Served) and not f.record.place:
            r = f.record
            total = sums.setdefault((r.model, r.worker, r.outcome), {})
            for name in ("ttft_us", "itl_us", "total_us"):
                total.setdefault(name, Sketch()).merge(Sketch.from_wire(getattr(r, name)))
    found = []
    for (model, worker, outcome), sketches in sorted(sums.items()):
        fields: dict[str, Any] = {}
        for name, s in sketches.items():
            idx = tuple(sorted(s.buckets))
            parts: dict[str, Any] = {"count": s.count, "zero": s.zero, "sum": s.sum, "min": s.min, "max": s.max}
            parts |= {"idx": idx, "cnt": tuple(s.buckets[i] for i in idx)}
            fields |= {f"{name}_{part}": value for part, value in parts.items()}
        found.append(Latency(model=model, worker=worker, outcome=outcome, **fields))
    return tuple(found)


def _serving(facts: Iterable[Fact]) -> tuple[Serving, ...]:
    pieces: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for f in facts:
        if isinstance(f.record, Resident) and f.record.state == "ready":
            pieces.setdefault((f.meta.node, f.record.model), []).append((f.meta.t_start_ms, f.meta.t_end_ms))
    return tuple(
        Serving(node=node, model=model, **_columns(union(found))) for (node, model), found in sorted(pieces.items())
    )


def _columns(intervals: Intervals) -> dict[str, Any]:
    return {"starts": tuple(a for a, _ in intervals), "ends": tuple(b for _, b in intervals)}
