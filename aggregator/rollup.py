"""Sums by hour, with merged sketches and the quantiles read from them; order of input changes nothing. Pure."""

from collections.abc import Iterable

import msgspec

from aggregator.window import Meta
from shared.records import Served
from shared.sketch import Sketch, SketchWire

HOUR_MS = 3_600_000


class ServedHour(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one hour, alike in their labels. Quantiles are within 1.1 %; None where nothing was measured."""

    hour_ms: int
    door: str
    model: str
    version: str
    worker: str
    outcome: str
    requests: int
    retries: int
    prompt_tok: int
    cached_tok: int
    completion_tok: int
    ttft_p50_us: float | None
    ttft_p95_us: float | None
    itl_p50_us: float | None
    itl_p95_us: float | None
    total_p50_us: float | None
    total_p95_us: float | None
    ttft_us: SketchWire
    itl_us: SketchWire
    total_us: SketchWire


class Sum:
    """Counts and sketches being added up."""

    def __init__(self) -> None:
        self.requests = self.retries = self.prompt_tok = self.cached_tok = self.completion_tok = 0
        self.ttft, self.itl, self.total = Sketch(), Sketch(), Sketch()

    def add(self, served: Served) -> None:
        """One record more."""
        self.requests += served.requests
        self.retries += served.retries
        self.prompt_tok += served.prompt_tok
        self.cached_tok += served.cached_tok
        self.completion_tok += served.completion_tok
        self.ttft.merge(Sketch.from_wire(served.ttft_us))
        self.itl.merge(Sketch.from_wire(served.itl_us))
        self.total.merge(Sketch.from_wire(served.total_us))


def hourly(served: Iterable[tuple[Meta, Served]]) -> list[ServedHour]:
    """One row for each hour (UTC, by the batch's end), door, model, version, worker and outcome."""
    sums: dict[tuple[int, str, str, str, str, str], Sum] = {}
    for meta, record in served:
        hour = meta.t_end_ms // HOUR_MS * HOUR_MS
        labels = (hour, meta.node, record.model, record.version, record.worker, record.outcome)
        sums.setdefault(labels, Sum()).add(record)
    return [_row(labels, total) for labels, total in sorted(sums.items())]


def by_model(served: Iterable[tuple[Meta, Served]]) -> dict[str, Sum]:
    """Answered requests of each served name."""
    sums: dict[str, Sum] = {}
    for _, record in served:
        if record.outcome == "ok":
            sums.setdefault(record.model, Sum()).add(record)
    return dict(sorted(sums.items()))


def _row(labels: tuple[int, str, str, str, str, str], total: Sum) -> ServedHour:
    hour, door, model, version, worker, outcome = labels
    return ServedHour(
        hour_ms=hour,
        door=door,
        model=model,
        version=version,
        worker=worker,
        outcome=outcome,
        requests=total.requests,
        retries=total.retries,
        prompt_tok=total.prompt_tok,
        cached_tok=total.cached_tok,
        completion_tok=total.completion_tok,
        ttft_p50_us=total.ttft.quantile(0.5),
        ttft_p95_us=total.ttft.quantile(0.95),
        itl_p50_us=total.itl.quantile(0.5),
        itl_p95_us=total.itl.quantile(0.95),
        total_p50_us=total.total.quantile(0.5),
        total_p95_us=total.total.quantile(0.95),
        ttft_us=total.ttft.to_wire(),
        itl_us=total.itl.to_wire(),
        total_us=total.total.to_wire(),
    )
