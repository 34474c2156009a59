"""Read segments from the bucket into NDJSON files on disk, by day and table, ready to be merged: the slow part of a
rollup. Several processes share it; each has its own connection and writes its own files.

A bad object never stops the rest: it is copied to quarantine/ byte for byte, counted, and listed with its reason. One
that the store does not give out makes its node wait; several nodes' in a row end a share, since the store may be down.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from aggregator import parquet
from aggregator.calendar import utc_day
from aggregator.raw.cleaning import MOST_NAME, cleaned, text
from aggregator.raw.progress import Outcome, node_of
from aggregator.tables import BATCH_TABLE
from aggregator.window import meta_of, straightened
from shared import keys
from shared.batch import Batch, unseal
from shared.errors import Halt, NotFound, PreconditionFailed, Refused, Retryable
from shared.logs import get_logger
from shared.records import Unknown
from shared.store import ObjectStore

CONNECTIONS = 4
MAX_REASON = 200
OUTAGE_NODES = 3
"""Nodes in a row of which nothing could be read, before a share ends: each costs the store's time limits."""
SEGMENT_DAYS = 60
"""UTC days in one segment. Agents put at most 60 windows into one, so an honest one has no more even if its node slept
between any two of them or its clock jumped, and however late it comes."""
SPILL_DAYS = 60
"""UTC days before a share ends: each rebuilds its tables. More than the raw segments of the usual retention have."""


class Segment(NamedTuple):
    """Its valid batches, the reason to quarantine it, or "", the other rack that all of its batches name, or "", and
    the UTC day of the first batch that is not valid, or ""."""

    batches: list[Batch]
    reason: str
    rack: str = ""
    day: str = ""


T = TypeVar("T")
log = get_logger("aggregator.raw.ingest")


def spill(store: ObjectStore, rack: str, wanted: Sequence[str], folder: Path, most_bytes: int) -> list[Outcome]:
    """Read segments in order and write their rows to ``folder/<day>/<table>.ndjson``, until that has ``most_bytes``
    or SPILL_DAYS; at least one. Keys after an unreadable one of the same node are left out."""
    found: list[Outcome] = []
    waiting: set[str] = set()
    in_a_row: set[str] = set()
    lines = _Lines(folder)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        wanted_yet = (key for key in wanted if node_of(key) not in waiting)
        for key, got in _ahead(pool, lambda key: _got(store, key, rack), wanted_yet):
            if (node := node_of(key)) in waiting:
                continue
            (batches, reason, other, day), unread = got
            in_a_row = {*in_a_row, node} if unread else set()
            waiting |= in_a_row
            for batch in batches:
                lines.add(batch)
            kept = bool(reason) and (bool(other) or keep_copy(store, key) or is_ours(key))
            unknown = sum(batch.unknown_records for batch in batches)
            told = reason[:MAX_REASON] if kept else ""
            found.append(Outcome(key, len(batches), unknown, told, unread[:MAX_REASON], other, day))
            if lines.written >= most_bytes or len(lines.days) >= SPILL_DAYS or len(in_a_row) >= OUTAGE_NODES:
                break
    lines.close()
    return found


def gives_out_any(store: ObjectStore, rack: str, some: Sequence[str]) -> bool:
    """Whether the store gives out at least one of these objects, or says that it is not there."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return any(not unread for _, unread in pool.map(lambda key: _got(store, key, rack), some))


def _ahead(pool: ThreadPoolExecutor, call: Callable[[str], T], wanted: Iterable[str]) -> Iterator[tuple[str, T]]:
    """Results in order, of which only a few are in memory: they may be large. ``wanted`` is asked as late."""
    running: deque[tuple[str, Future[T]]] = deque()
    for key in wanted:
        running.append((key, pool.submit(call, key)))
        if len(running) > 2 * CONNECTIONS:
            first, future = running.popleft()
            yield first, future.result()
    for key, future in running:
        yield key, future.result()


def _got(store: ObjectStore, key: str, rack: str) -> tuple[Segment, str]:
    """A segment, and why the object could not be read, or ""."""
    try:
        return segment(store, key, rack), ""
    except (Retryable, Halt) as error:
        return Segment([], ""), error.message
    except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        return Segment([], f"{key}: cannot be taken apart ({type(error).__name__})"), ""


def spilled(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """All files written under a folder, by day and table."""
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.rglob("*.ndjson")):
        found.setdefault(path.parent.name, {}).setdefault(path.stem, []).append(path)
    return dict(sorted(found.items()))


def lines(tables: Mapping[str, Sequence[Path]]) -> int:
    """Number of batches in a day's files."""
    found = 0
    for path in tables.get(BATCH_TABLE, ()):
        with path.open("rb") as file:
            found += sum(1 for _ in file)
    return found


def read(store: ObjectStore, name: str, rack: str) -> tuple[list[Batch], str]:
    """A segment's valid batches, and the reason to quarantine it; "" if all of them are valid. Raises Retryable or Halt
    if the store does not give it out."""
    found = segment(store, name, rack)
    return found.batches, found.reason


def segment(store: ObjectStore, name: str, rack: str) -> Segment:
    """A segment taken apart. Raises like `read`."""
    try:
        key = keys.parse_batch_key(name) if name.startswith(keys.RAW_PREFIX) else None
        batches = unseal(store.get(name, keys.MOST_SEGMENT_BYTES).body)
    except NotFound:
        # prune deletes only counted segments
        log.warning("segment_vanished", key=name, reason="listed, and not there when it was read")
        return Segment([], "")
    except Refused as error:
        return Segment([], error.message)
    good: list[Batch] = []
    reasons: list[str] = []
    days: set[str] = set()
    bad_day = ""
    for batch in batches:
        try:
            days.add(_check(batch, key, rack, name))
            good.append(cleaned(batch))
        except Refused as error:
            reasons.append(error.message)
            bad_day = bad_day or _day(batch)
    if len(days) > SEGMENT_DAYS:
        why = f"batches of {len(days):,} days, from {min(days)} to {max(days)}; no agent writes such a segment"
        return Segment([], f"{name}: {why}")
    others = {batch.rack for batch in batches} - {rack}
    other = text(others.pop(), MOST_NAME) if len(others) == 1 and not good else ""
    other = other if all(b.rack != rack for b in batches) else ""
    return Segment(good, reasons[0] if reasons else "", other, bad_day)


def _day(batch: Batch) -> str:
    """The UTC day of a batch; "" if its time is none that a node can have lived."""
    try:
        return utc_day(straightened(batch).t_end_ms)
    except Refused:
        return ""


def is_ours(key: str) -> bool:
    """Whether an object under raw/ has a valid segment key."""
    try:
        keys.parse_batch_key(key)
    except Refused:
        return False
    return True


class _Lines:
    """Open files, one per day and table; only few are in use at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[tuple[str, str], BinaryIO] = {}
        self.written = 0
        self.days: set[str] = set()

    def add(self, batch: Batch) -> None:
        batch = straightened(batch)
        day, meta = utc_day(batch.t_end_ms), parquet.meta_json(meta_of(batch)._asdict())
        self.days.add(day)
        for ordinal, record in enumerate(batch.records):
            if not isinstance(record, Unknown):
                self._write(day, record.__struct_config__.tag, parquet.row_json(meta, ordinal, record))
        self._write(day, BATCH_TABLE, parquet.row_json(meta, 0, None))

    def close(self) -> None:
        for file in self._open.values():
            file.close()

    def _write(self, day: str, table: object, line: bytes) -> None:
        self.written += self._file(day, table).write(line)

    def _file(self, day: str, table: object) -> BinaryIO:
        key = (day, str(table))
        if key not in self._open:
            if len(self._open) > 400:  # a process may open 1,024 files, often only 256
                self.close()
                self._open.clear()
            path = self._folder / day / f"{table}.ndjson"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[key] = path.open("ab", buffering=1 << 16)
        return self._open[key]


def _check(batch: Batch, key: keys.RawKey | None, rack: str, name: str) -> str:
    """The UTC day of a batch that matches its key and has plausible times. Raises Refused."""
    if batch.rack != rack:
        raise Refused(f"{name}: belongs to rack {batch.rack[:63]!r}, expected {rack!r}")
    straight = straightened(batch)
    day = utc_day(straight.t_end_ms)
    for record in straight.records:
        for field in ("t_ms", "last_seen_ms", "start_ms"):
            if field in record.__struct_fields__:
                utc_day(getattr(record, field))
    if key is None:
        if not name.startswith(f"{keys.URGENT_PREFIX}node={keys.check_name(batch.node, 'node id')}/"):
            raise Refused(f"{name}: batch of another node ({batch.node[:63]!r})")
        return day
    if (batch.node, batch.incarnation, batch.epoch) != key[:3] or not key.first_seq <= batch.seq <= key.last_seq:
        raise Refused(f"{name}: batch does not match the key ({batch.node[:63]!r}, {batch.epoch}, {batch.seq})")
    return day


def keep_copy(store: ObjectStore, key: str) -> bool:
    """Copy a bad object to quarantine; False if it is there already or cannot be copied."""
    try:
        store.put_if_absent(keys.quarantine_key(key), store.get(key, keys.MOST_SEGMENT_BYTES).body)
    except (PreconditionFailed, NotFound, Refused, Retryable, Halt):
        return False
    return True


def chunks(wanted: Sequence[str], parts: int) -> Iterator[Sequence[str]]:
    """Split a list into about equal parts."""
    size = -(-len(wanted) // max(1, parts))
    for begin in range(0, len(wanted), max(1, size)):
        yield wanted[begin : begin + size]
