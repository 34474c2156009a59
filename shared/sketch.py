"""A mergeable latency sketch: a base-2 exponential histogram of scale 5.

Bucket ``i`` counts the values in ``(2**(i/32), 2**((i+1)/32)]``, as in an OpenTelemetry exponential histogram, so a
quantile read from it is within ``RELATIVE_ERROR`` of the exact one. All state is integers: merging is commutative,
associative and exact, in any order. Values are integers (usually microseconds).
"""

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import msgspec

SCALE = 5
_PER_OCTAVE = 1 << SCALE
RELATIVE_ERROR = (2 ** (1 / _PER_OCTAVE) - 1) / (2 ** (1 / _PER_OCTAVE) + 1)
"""Largest relative error of a quantile: 1.083 % for scale 5 (bucket midpoint 2lh/(l+h))."""


class SketchWire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sketch as it is stored: ``idx`` are delta-coded bucket indices, ``cnt`` their counts."""

    count: int = 0
    zero: int = 0
    sum: int = 0
    min: int | None = None
    max: int | None = None
    idx: tuple[int, ...] = ()
    cnt: tuple[int, ...] = ()


def bucket_index(value: int) -> int:
    """Index of the bucket that holds ``value`` (> 0)."""
    return math.ceil(math.log2(value) * _PER_OCTAVE) - 1


def bucket_midpoint(index: int) -> float:
    """The value that represents a bucket: the point of equal relative distance to both bounds."""
    low, high = 2 ** (index / _PER_OCTAVE), 2 ** ((index + 1) / _PER_OCTAVE)
    return 2 * low * high / (low + high)


class Sketch:
    """Counts of values by bucket; only ``add`` and ``merge`` change it."""

    __slots__ = ("buckets", "max", "min", "sum", "zero")

    def __init__(self, values: Iterable[int] = ()) -> None:
        self.buckets: dict[int, int] = {}
        self.zero = self.sum = 0
        self.min: int | None = None
        self.max: int | None = None
        for value in values:
            self.add(value)

    @property
    def count(self) -> int:
        """Number of values added."""
        return self.zero + sum(self.buckets.values())

    def add(self, value: int, times: int = 1) -> None:
        """Count a value (an integer >= 0) ``times`` times; negative values, from a clock that stepped back, count as
        zero."""
        if (value := max(0, value)) == 0:
            self.zero += times
        else:
            index = bucket_index(value)
            self.buckets[index] = self.buckets.get(index, 0) + times
        self.sum += value * times
        self.min = value if self.min is None else min(self.min, value)
        self.max = value if self.max is None else max(self.max, value)

    def merge(self, other: "Sketch") -> "Sketch":
        """Add the other sketch's counts to this one and return it."""
        for index, count in other.buckets.items():
            self.buckets[index] = self.buckets.get(index, 0) + count
        self.zero += other.zero
        self.sum += other.sum
        self.min = min((low for low in (self.min, other.min) if low is not None), default=None)
        self.max = max((high for high in (self.max, other.max) if high is not None), default=None)
        return self

    def quantile(self, q: float) -> float | None:
        """The value of rank ``ceil(q * count)``, within RELATIVE_ERROR; None when nothing was added."""
        total = self.count
        if total == 0 or self.min is None or self.max is None:
            return None
        rank = min(total, max(1, math.ceil(q * total)))
        seen = self.zero
        if rank <= seen:
            return 0.0
        for index in sorted(self.buckets):
            seen += self.buckets[index]
            if seen >= rank:
                return min(max(bucket_midpoint(index), float(self.min)), float(self.max))
        raise AssertionError("sketch: bucket counts do not add up to the total")

    def mean(self) -> float | None:
        """Exact mean of the values; None when nothing was added."""
        return self.sum / total if (total := self.count) else None

    def to_wire(self) -> SketchWire:
        """The stored form; equal sketches give equal bytes."""
        indices = sorted(self.buckets)
        deltas = [i if n == 0 else i - indices[n - 1] for n, i in enumerate(indices)]
        return SketchWire(
            count=self.count,
            zero=self.zero,
            sum=self.sum,
            min=self.min,
            max=self.max,
            idx=tuple(deltas),
            cnt=tuple(self.buckets[i] for i in indices),
        )

    @classmethod
    def from_wire(cls, wire: SketchWire) -> "Sketch":
        """Read the stored form. Raises ValueError when its counts contradict each other."""
        if len(wire.idx) != len(wire.cnt) or wire.zero + sum(wire.cnt) != wire.count or any(c <= 0 for c in wire.cnt):
            raise ValueError("sketch: bucket counts do not add up to the total")
        if any(step <= 0 for step in wire.idx[1:]):
            raise ValueError("sketch: buckets out of order")
        sketch = cls()
        sketch.buckets = dict(zip(accumulate(wire.idx), wire.cnt, strict=True))
        sketch.zero, sketch.sum, sketch.min, sketch.max = wire.zero, wire.sum, wire.min, wire.max
        return sketch

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sketch) and self.to_wire() == other.to_wire()

    __hash__ = None  # type: ignore[assignment]  # it changes


def merged(wires: Iterable[SketchWire]) -> Sketch:
    """Merge stored sketches into one."""
    total = Sketch()
    for wire in wires:
        total.merge(Sketch.from_wire(wire))
    return total
