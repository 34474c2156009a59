"""Telemetry as nodes would report it, through the real records and batches."""

from collections.abc import Sequence

from aggregator.window import Fact, Meta, Span, Window, facts_of, meta_of
from shared.batch import Batch
from shared.records import EngineWindow, HostSample, Record, Resident, Served
from shared.sketch import Sketch

T0 = 1_795_219_200_000
"""2026-11-21 00:00:00 UTC."""
MINUTE = 60_000
DAY = Span("2026-W47", T0, T0 + 86_400_000, "UTC")


def served(model: str = "m", *, worker: str = "n1", version: str = "v1", requests: int = 1, **more: object) -> Served:
    """A line of the door's account; every request took 100 ms, 20 ms to the first token."""
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
    """A model in memory."""
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


def window(*batches: Batch, span: Span = DAY) -> Window:
    """Batches as reports see them."""
    facts: list[Fact] = [f for b in batches for f in facts_of(b)]
    metas: list[Meta] = [meta_of(b) for b in batches]
    return Window(span, facts, metas)
