"""A span of time and everything that was reported in it; the one input of every report. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from aggregator.calendar import HOUR_MS, Span
from shared.batch import Batch
from shared.records import EngineCounts, Unknown
from shared.sketch import Sketch

R = TypeVar("R", bound=msgspec.Struct)

LONGEST_WINDOW_MS = 6 * HOUR_MS
STRAIGHTEN_MS = 120_000
"""A clock that is off by more than this puts events into the wrong hour often enough to matter."""
_TIMES = ("t_ms", "last_seen_ms", "start_ms")


class Meta(NamedTuple):
    """The envelope of a batch without its records."""

    node: str
    incarnation: int
    epoch: int
    seq: int
    t_start_ms: int
    t_end_ms: int
    boot_id: str = ""
    agent_version: str = ""
    dropped_batches: int = 0
    unknown_records: int = 0
    clock_skew_ms: int | None = None


class Fact(NamedTuple):
    """A record and the batch it came in; ``ordinal`` is its place in the batch."""

    meta: Meta
    ordinal: int
    record: msgspec.Struct


Intervals = tuple[tuple[int, int], ...]
"""[start, end) in milliseconds, in order, none touching the next."""


class RequestSum(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of clients that are alike, wherever they were answered (see shared/records.py: Served)."""

    model: str
    key_id: str = ""
    task_class: str = ""
    outcome: str = "ok"
    finish: str = ""
    requests: int
    prompt_tok: int = 0
    cached_tok: int = 0
    completion_tok: int = 0


class ServedSum(RequestSum, frozen=True, kw_only=True):
    """Work of the rack: requests of the span that it answered, or nobody, and that are alike in all labels."""

    door: str
    worker: str = ""
    version: str = ""
    prompt_bucket_tok: int = 0
    retries: int = 0


class ElsewhereSum(RequestSum, frozen=True, kw_only=True):
    """Requests that a provider answered, or failed to, and what that cost, in millionths of a US dollar. ``outside``:
    they left the premises; a category that is not known counts as that."""

    place: str
    place_category: str = ""
    usd_micro: int = 0

    @property
    def outside(self) -> bool:
        """Whether they left the premises."""
        return self.place_category != "premises"


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Times of the requests that the rack answered, of one model at one worker, as sketches in columns."""

    model: str
    worker: str
    outcome: str
    ttft_us_count: int
    ttft_us_zero: int
    ttft_us_sum: int
    ttft_us_min: int | None = None
    ttft_us_max: int | None = None
    ttft_us_idx: tuple[int, ...]
    ttft_us_cnt: tuple[int, ...]
    itl_us_count: int
    itl_us_zero: int
    itl_us_sum: int
    itl_us_min: int | None = None
    itl_us_max: int | None = None
    itl_us_idx: tuple[int, ...]
    itl_us_cnt: tuple[int, ...]
    total_us_count: int
    total_us_zero: int
    total_us_sum: int
    total_us_min: int | None = None
    total_us_max: int | None = None
    total_us_idx: tuple[int, ...]
    total_us_cnt: tuple[int, ...]

    def sketch(self, name: str) -> Sketch:
        """``ttft_us``, ``itl_us`` or ``total_us``."""
        zero, total, low, high, idx, cnt = (
            getattr(self, f"{name}_{part}") for part in ("zero", "sum", "min", "max", "idx", "cnt")
        )
        sketch = Sketch()
        sketch.buckets = dict(zip(idx, cnt, strict=True))
        sketch.zero, sketch.sum, sketch.min, sketch.max = zero, total, low, high
        return sketch


class EngineSum(EngineCounts, frozen=True, kw_only=True):
    """What the loaders of one version on one node did."""

    node: str
    model: str
    version: str

    @property
    def busy_us(self) -> int:
        """Prefill and decode."""
        return self.busy_prefill_us + self.busy_decode_us


class HostSum(msgspec.Struct, frozen=True, kw_only=True):
    """One machine over the span. ``x_mw_ms`` is power by time, ``x_mw_known_ms`` the time it was known. ``worked_us``
    is how long its models worked while the thermal level was known, ``throttled_worked_us`` how long of that it was
    throttled: added up from each window's, since two totals do not tell what came together. ``idle_package_mc`` is the
    lowest mean package temperature of a window in which its models did not work."""

    node: str
    windows: int
    thermal_known_us: int
    throttled_us: int
    swap_in_bytes: int
    swap_out_bytes: int
    energy_mj: int
    pressed_windows: int
    worked_us: int = 0
    throttled_worked_us: int = 0
    wall_mw_ms: int = 0
    wall_mw_known_ms: int = 0
    system_mw_ms: int = 0
    system_mw_known_ms: int = 0
    soc_mw_ms: int = 0
    soc_mw_known_ms: int = 0
    package_mc_ms: int = 0
    package_mc_known_ms: int = 0
    package_temp_mc: int | None = None
    idle_package_mc: int | None = None
    pcore_temp_mc: int | None = None
    gpu_temp_mc: int | None = None
    fan_max_rpm: int | None = None
    system_power_max_mw: int | None = None
    memory_total_bytes: int | None = None
    memory_used_max_bytes: int | None = None
    swap_used_bytes: int | None = None
    disk_free_bytes: int | None = None
    memory_budget_bytes: int | None = None


class ResidentSum(msgspec.Struct, frozen=True, kw_only=True):
    """A version in a node's memory in one state: for how long, and when last (``last_ms`` is a batch's end)."""

    node: str
    model: str
    version: str
    state: str
    windows: int
    length_ms: int
    last_ms: int
    need_bytes: int | None = None
    pinned: bool | None = None
    footprint_bytes: int | None = None
    restarts: int | None = None


class DesiredSum(msgspec.Struct, frozen=True, kw_only=True):
    """A node at one generation of the desired state and in one state, from its first window there to its last."""

    node: str
    generation: int
    state: str
    windows: int
    since_ms: int
    last_ms: int
    reason: str = ""


class OutletSum(msgspec.Struct, frozen=True, kw_only=True):
    """A metered outlet: joules in thousandths over the time that is covered."""

    meter: str
    nodes: tuple[str, ...]
    energy_mj: int
    covered_us: int
    power_max_mw: int


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One life of one agent: which batches are there, which are not."""

    node: str
    incarnation: int
    epoch: int
    batches: int
    first_seq: int
    last_seq: int
    dropped_batches: int
    unknown_records: int = 0
    skewed_batches: int = 0
    skew_max_ms: int | None = None
    dropped_before: int = 0
    agent_version: str | None = None
    boot_id: str | None = None
    since_ms: int = 0

    @property
    def missing(self) -> int:
        """Batches of whose number there is one before and one after, and that are not there."""
        return self.last_seq - self.first_seq + 1 - self.batches


class Cover(msgspec.Struct, frozen=True, kw_only=True):
    """When a node reported."""

    node: str
    starts: tuple[int, ...]
    ends: tuple[int, ...]


class Serving(Cover, frozen=True, kw_only=True):
    """When a node had a model ready in memory."""

    model: str


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What all loaders of a model did in five minutes."""

    slot_ms: int
    model: str
    busy_prefill_us: int = 0
    busy_decode_us: int = 0
    prefill_tok: int = 0
    cached_tok: int = 0
    decode_tok: int = 0
    queue_us: int = 0


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What clients had of a model of the rack in five minutes."""

    slot_ms: int
    model: str
    outcome: str
    requests: int
    prompt_tok: int = 0
    cached_tok: int = 0
    completion_tok: int = 0


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was reported in a span, added up, each batch once; the one input of every report. A batch counts
    in the span in which it ends; the time that it covers is shared between the spans that it touches. ``served``,
    ``latencies`` and ``asked`` are the rack's own work; what was answered elsewhere is ``elsewhere`` alone, so that no
    figure of the rack can count it, and ``requests`` are both.
    ``reported_before`` are nodes that had not reported when the span began, and had reported at some time before: of
    those that reported in it, and of those that were asked for."""

    span: Span
    served: tuple[ServedSum, ...] = ()
    elsewhere: tuple[ElsewhereSum, ...] = ()
    latencies: tuple[Latency, ...] = ()
    engines: tuple[EngineSum, ...] = ()
    hosts: tuple[HostSum, ...] = ()
    residents: tuple[ResidentSum, ...] = ()
    desired: tuple[DesiredSum, ...] = ()
    outlets: tuple[OutletSum, ...] = ()
    runs: tuple[Run, ...] = ()
    covers: tuple[Cover, ...] = ()
    serving: tuple[Serving, ...] = ()
    demand: tuple[Demand, ...] = ()
    asked: tuple[Asked, ...] = ()
    events: tuple[Fact, ...] = ()
    reported_before: frozenset[str] = frozenset()

    def of(self, kind: type[R]) -> Iterator[tuple[Meta, R]]:
        """Events of one kind with their batches."""
        for fact in self.events:
            if isinstance(fact.record, kind):
                yield fact.meta, fact.record

    @property
    def requests(self) -> tuple[RequestSum, ...]:
        """Requests of clients, wherever they were answered."""
        return (*self.served, *self.elsewhere)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return sum(run.batches for run in self.runs)

    @property
    def nodes(self) -> list[str]:
        """Every node that reported."""
        return sorted({run.node for run in self.runs})

    def reported(self, node: str) -> Intervals:
        """When the node reported, within the span."""
        return self._cut(c for c in self.covers if c.node == node)

    def reported_at_the_start(self, node: str) -> bool:
        """Whether a node's telemetry covers the span's first moment."""
        return any(start == self.span.since_ms for start, _ in self.reported(node))

    def ready(self, node: str) -> Intervals:
        """When the node had any model ready, within the span."""
        return self._cut(c for c in self.serving if c.node == node)

    def host(self, node: str) -> HostSum | None:
        """The machine's sums."""
        return next((one for one in self.hosts if one.node == node), None)

    def busy_us(self, node: str) -> int:
        """Microseconds that a node's loaders worked."""
        return sum(e.busy_us for e in self.engines if e.node == node)

    def _cut(self, tracks: Iterable[Cover]) -> Intervals:
        since, until = self.span.since_ms, self.span.until_ms
        pieces = (pair for one in tracks for pair in zip(one.starts, one.ends, strict=True))
        return union((max(a, since), min(b, until)) for a, b in pieces)


COVER = TypeVar("COVER", bound=Cover)


def within(covers: Iterable[COVER], span: Span) -> tuple[COVER, ...]:
    """What of intervals lies in a span; those of which nothing does are left out."""
    found = []
    for one in covers:
        pairs = zip(one.starts, one.ends, strict=True)
        cut = union((max(start, span.since_ms), min(end, span.until_ms)) for start, end in pairs)
        if cut:
            starts, ends = zip(*cut, strict=True)
            found.append(msgspec.structs.replace(one, starts=starts, ends=ends))
    return tuple(found)


def union(pieces: Iterable[tuple[int, int]], gap_ms: int = 0) -> Intervals:
    """Intervals in order, those that overlap or are at most ``gap_ms`` apart made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(pieces):
        if merged and start <= merged[-1][1] + gap_ms:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return tuple(merged)


def both(one: Intervals, other: Intervals) -> Intervals:
    """Intersection of two sets of intervals, in order."""
    found = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if end > start:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def without(one: Intervals, other: Intervals) -> Intervals:
    """What of a set of intervals is not in another one."""
    found = []
    for start, end in one:
        for a, b in other:
            if b > start and a < end:
                if a > start:
                    found.append((start, a))
                start = max(start, b)
        if end > start:
            found.append((start, end))
    return tuple(found)


def facts_of(batch: Batch) -> list[Fact]:
    """A batch taken apart; kinds that are not known here are left out and keep their places."""
    meta = meta_of(batch)
    return [Fact(meta, n, record) for n, record in enumerate(batch.records) if not isinstance(record, Unknown)]


def meta_of(batch: Batch) -> Meta:
    """A batch's envelope. A window that begins after its end, or days before it, is a clock that was set."""
    start_ms = min(max(batch.t_start_ms, batch.t_end_ms - LONGEST_WINDOW_MS), batch.t_end_ms)
    agent = (batch.boot_id, batch.agent_version, batch.dropped_batches, batch.unknown_records)
    return Meta(*batch.id, start_ms, batch.t_end_ms, *agent, batch.clock_skew_ms)


def straightened(batch: Batch) -> Batch:
    """A batch of a node whose clock is minutes off, at the time the store's clock says. What was off is still told by
    its ``clock_skew_ms``."""
    skew_ms = batch.clock_skew_ms or 0
    if abs(skew_ms) <= STRAIGHTEN_MS:
        return batch
    records = tuple(shifted(record, skew_ms) for record in batch.records)
    return msgspec.structs.replace(
        batch, t_start_ms=max(0, batch.t_start_ms - skew_ms), t_end_ms=max(0, batch.t_end_ms - skew_ms), records=records
    )


def shifted(record: msgspec.Struct, skew_ms: int) -> msgspec.Struct:
    """A record with its times ``skew_ms`` earlier."""
    times = [name for name in _TIMES if name in record.__struct_fields__]
    changed = {name: max(0, getattr(record, name) - skew_ms) for name in times}
    return msgspec.structs.replace(record, **changed) if changed else record


def seconds(intervals: Sequence[tuple[int, int]]) -> float:
    """Total length of intervals in seconds."""
    return sum(end - start for start, end in intervals) / 1000


def at_least_one(tracks: Iterable[Intervals]) -> Intervals:
    """When any of several was."""
    return union(pair for track in tracks for pair in track)
