"""Requests, tokens and latencies."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from .periods import Period
from .raw import Batch, Record


@dataclass
class Sketch:
    """Values by bucket, added up."""

    zero: int = 0
    low: int | None = None
    high: int | None = None
    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, wire: Record | None) -> None:
        """Another one's values as well."""
        if not wire or not wire.get("count"):
            return
        self.zero += wire.get("zero", 0)
        self.low = wire["min"] if self.low is None else min(self.low, wire["min"])
        self.high = wire["max"] if self.high is None else max(self.high, wire["max"])
        for index, count in zip(accumulate(wire.get("idx", ())), wire.get("cnt", ()), strict=True):
            self.buckets[index] += count

    def quantile(self, q: float) -> float | None:
        """The value of that rank."""
        count = self.zero + sum(self.buckets.values())
        if not count or self.low is None or self.high is None:
            return None
        rank, reached, value = max(1, math.ceil(q * count)), self.zero, 0.0
        for index in sorted(self.buckets):
            if reached >= rank:
                break
            reached += self.buckets[index]
            low, high = 2 ** (index / 32), 2 ** ((index + 1) / 32)
            value = 2 * low * high / (low + high)
        return min(max(value, self.low), self.high)


@dataclass
class Sums:
    """Tokens and latencies of some requests."""

    requests: int = 0
    prompt_tok: int = 0
    cached_tok: int = 0
    completion_tok: int = 0
    cut: int = 0
    ttft: Sketch = field(default_factory=Sketch)
    itl: Sketch = field(default_factory=Sketch)

    def add(self, one: Record) -> None:
        """A record's requests as well."""
        for name in ("requests", "prompt_tok", "cached_tok", "completion_tok"):
            setattr(self, name, getattr(self, name) + one.get(name, 0))
        self.cut += one["requests"] if one.get("finish") == "length" else 0
        self.ttft.add(one.get("ttft_us"))
        self.itl.add(one.get("itl_us"))

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens."""
        return self.prompt_tok + self.completion_tok


def answered(batches: Iterable[Batch]) -> list[Record]:
    """The records of answered requests."""
    return [one for batch in batches for one in batch.served if one.get("outcome", "ok") == "ok"]


def by_model(records: Iterable[Record]) -> dict[str, Sums]:
    """Sums of each served name."""
    found: dict[str, Sums] = defaultdict(Sums)
    for one in records:
        found[one["model"]].add(one)
    return dict(sorted(found.items()))


def total(records: Iterable[Record]) -> Sums:
    """Sums of all."""
    found = Sums()
    for one in records:
        found.add(one)
    return found


def of_model(name: str, sums: Sums) -> dict[str, Any]:
    """As the monthly report shows it."""
    return {
        "model": name,
        "requests": sums.requests,
        "prompt_tok": sums.prompt_tok,
        "cached_tok": sums.cached_tok,
        "completion_tok": sums.completion_tok,
        "ttft_p50_us": sums.ttft.quantile(0.5),
        "ttft_p95_us": sums.ttft.quantile(0.95),
        "itl_p95_us": sums.itl.quantile(0.95),
    }


def of_days(batches: list[Batch], period: Period) -> list[dict[str, Any]]:
    """Requests and tokens of each day on the rack's clocks."""
    found = []
    for day, start, end in period.days():
        sums = total(answered(one for one in batches if start <= one.end_ms < end))
        found.append({"date": day.isoformat(), "requests": sums.requests, "tokens": sums.tokens})
    return found


def of_month(batches: list[Batch], period: Period, counts: dict[str, int]) -> dict[str, Any]:
    """The section on volume."""
    records = answered(batches)
    sums = total(records)
    return {
        "requests": sums.requests,
        "elsewhere": sum(one["requests"] for b in batches for one in b.elsewhere if one.get("outcome", "ok") == "ok"),
        "failed": counts["failed"],
        "refused": counts["refused"],
        "cancelled": counts["cancelled"],
        "prompt_tok": sums.prompt_tok,
        "completion_tok": sums.completion_tok,
        "itl_p95_us": sums.itl.quantile(0.95),
        "models": [of_model(name, one) for name, one in by_model(records).items()],
        "days": of_days(batches, period),
    }
