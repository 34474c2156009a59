"""The batch, which carries records, and the segment, in which batches are stored.

A batch covers one window of one node. A segment is zstd over concatenated MessagePack batches, immutable once stored.
Input is untrusted: sizes are bounded, types are checked, an unknown schema version is refused, and an unknown kind of
record (from a newer agent) is counted and skipped.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from operator import attrgetter
from typing import Any

import msgpack
import msgspec
import zstandard

from shared.errors import Refused
from shared.ids import BatchId, NodeId
from shared.records import RECORD_TYPES, Record, Unknown
from shared.sketch import SketchWire, bucket_index

SCHEMA_VERSION = 1
MAX_SEGMENT_BYTES = 16 << 20
"""Limit of the unpacked size; real segments are kilobytes."""
MAX_COUNT = 1 << 46
"""Above any valid count, time in ms or us, or size in bytes of one window (2,200 years, 2 years, 70 TB); the sum of
a hundred thousand such values still fits in 64 bits."""
MAX_ITEMS = 256
MAX_RECORDS = 5_000
"""Of one batch. A node has dozens; each label of its requests makes one more, and a minute has fewer requests."""
MAX_RATIO, SMALL_BYTES = 100, 1 << 20
"""Agents fill a segment up to a quarter of SMALL_BYTES; beyond it, one that shrinks to a hundredth says nothing."""
MAX_TEXT = 2_000
_UNKNOWN = {"kind": "unknown"}
MAX_BUCKET = bucket_index(MAX_COUNT)


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One window of one node. Times are the node's wall clock in milliseconds since 1970 UTC."""

    v: int = SCHEMA_VERSION
    rack: str
    node: str
    incarnation: int = 0
    epoch: int
    seq: int
    t_start_ms: int
    t_end_ms: int
    mono_ms: int = 0
    boot_id: str = ""
    agent_version: str = ""
    dropped_batches: int = 0
    clock_skew_ms: int | None = None
    records: tuple[Record, ...] = ()
    unknown_records: int = 0

    @property
    def id(self) -> BatchId:
        """The key on which batches are de-duplicated."""
        return (NodeId(self.node), self.incarnation, self.epoch, self.seq)


_DECODER = msgspec.msgpack.Decoder(Batch)


def encode(batch: Batch) -> bytes:
    """One batch as MessagePack."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(batch), use_bin_type=True)
    return packed


def decode(raw: bytes) -> Batch:
    """Read one MessagePack batch. Raises Refused with the reason."""
    batches = list(_unpack(raw))
    if len(batches) != 1:
        raise Refused(f"decode batch: expected one batch, found {len(batches)} batches", code="bad_batch")
    return batches[0]


def seal(batches: Iterable[Batch]) -> bytes:
    """Several batches as one segment; equal batches give equal bytes."""
    return zstandard.ZstdCompressor(level=3).compress(b"".join(encode(batch) for batch in batches))


def unseal(segment: bytes) -> list[Batch]:
    """Read a segment. Raises Refused unless it is complete and all of its batches are valid."""
    try:
        # max_window_size keeps a hostile frame from allocating gigabytes before the first byte is read
        reader = zstandard.ZstdDecompressor(max_window_size=8 << 20).stream_reader(segment, read_across_frames=True)
        raw = reader.read(MAX_SEGMENT_BYTES + 1)
    except zstandard.ZstdError as error:
        raise Refused(f"unseal segment: not a zstd frame ({error})", code="bad_segment") from None
    if len(raw) > MAX_SEGMENT_BYTES:
        raise Refused(f"unseal segment: unpacked size exceeds {MAX_SEGMENT_BYTES} bytes", code="bad_segment")
    if len(raw) > max(SMALL_BYTES, MAX_RATIO * len(segment)):
        raise Refused(
            f"unseal segment: {len(segment):,} bytes unpack to {len(raw):,}, more than {MAX_RATIO} times as many",
            code="bad_segment",
        )
    if not (batches := list(_unpack(raw))):
        raise Refused("unseal segment: contains no batch", code="bad_segment")
    return batches


def digest(body: bytes) -> str:
    """SHA-256 of stored bytes, in hex."""
    return hashlib.sha256(body).hexdigest()


def _unpack(raw: bytes) -> Iterable[Batch]:
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=True, max_buffer_size=MAX_SEGMENT_BYTES)
    unpacker.feed(raw)
    consumed = 0
    try:
        while consumed < len(raw):
            unpacker.skip()
            one, consumed = raw[consumed : unpacker.tell()], unpacker.tell()
            yield _typed(one) or _batch(one)
    except msgpack.OutOfData:
        raise Refused("decode batch: truncated", code="bad_batch") from None
    except (msgpack.UnpackException, ValueError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"decode batch: not MessagePack ({type(error).__name__})", code="bad_batch") from None


def _typed(raw: bytes) -> Batch | None:
    """Fast path, sixteen times as fast: a batch that contains only known records. None for any other, which is then
    decoded record by record."""
    try:
        batch = _DECODER.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return None
    if batch.v != SCHEMA_VERSION or batch.unknown_records or any(type(r) is Unknown for r in batch.records):
        return None
    _check_plausible(batch)
    return batch


def _batch(raw: bytes) -> Batch:
    limits = {"max_array_len": 2 * MAX_RECORDS, "max_map_len": 4 * MAX_ITEMS}
    mapping = msgpack.unpackb(raw, raw=False, strict_map_key=True, **limits)
    if not isinstance(mapping, dict):
        raise Refused(f"decode batch: expected a map, found a {type(mapping).__name__}", code="bad_batch")
    if (version := mapping.get("v")) != SCHEMA_VERSION:
        raise Refused(f"decode batch: unsupported schema version {str(version)[:20]}; upgrade", code="unknown_schema")
    if not isinstance(records := mapping.get("records", ()), list | tuple):
        raise Refused("decode batch: records: expected a list", code="bad_batch")
    known = [r if _is_known(r) else _UNKNOWN for r in records]
    try:
        envelope = {**mapping, "records": known, "unknown_records": sum(r is _UNKNOWN for r in known)}
        batch = msgspec.convert(envelope, Batch)
    except msgspec.ValidationError as error:
        raise Refused(f"decode batch: {error}", code="bad_batch") from None
    _check_plausible(batch)
    return batch


def _is_known(record: Any) -> bool:
    """False for the kind of a newer agent; a value without a kind is left to the type check."""
    kind = record.get("kind") if isinstance(record, dict) else None
    return not isinstance(kind, str) or kind in RECORD_TYPES


def _check_plausible(batch: Batch) -> None:
    """Check the range of every number: a damaged batch may pass the type check and overflow tables and sums."""
    if len(batch.records) > MAX_RECORDS:
        raise Refused(f"decode batch: {len(batch.records)} records, the limit is {MAX_RECORDS}", code="bad_batch")
    for where, item in (("batch", batch), *((f"record {n}", record) for n, record in enumerate(batch.records))):
        if _is_plausible(item):
            continue
        for name in item.__struct_fields__:
            problem = _implausible(getattr(item, name))
            if problem and name not in ("records", "clock_skew_ms"):
                raise Refused(f"decode batch: {where}: {name}: {problem}", code="bad_batch")


@lru_cache
def _numbers(kind: type[msgspec.Struct]) -> tuple[Callable[[Any], Any], Callable[[Any], Any] | None]:
    """Getters for the plain values of a record, and for its sketches."""
    names = [f.name for f in msgspec.structs.fields(kind) if f.name not in ("records", "clock_skew_ms")]
    sketches = [f.name for f in msgspec.structs.fields(kind) if f.type is SketchWire]
    return _getter([n for n in names if n not in sketches]), _getter(sketches) if sketches else None


def _getter(names: list[str]) -> Callable[[Any], Any]:
    """A getter for fields that returns a tuple, also for fewer than two of them."""
    return attrgetter(*names) if len(names) > 1 else lambda item: tuple(getattr(item, name) for name in names)


def _is_plausible(item: msgspec.Struct) -> bool:
    """Fast check that nearly all records pass; any other gets the detailed one."""
    values, sketches = _numbers(type(item))
    for value in values(item):
        if value is None or value is True or value is False:
            continue
        if type(value) is int:
            if not 0 <= value <= MAX_COUNT:
                return False
        elif type(value) is str:
            if len(value) > MAX_TEXT:
                return False
        elif value and _implausible(value):
            return False
    return sketches is None or not any(map(_bad_sketch, sketches(item)))


def _implausible(value: object) -> str:
    """What is wrong with a field's value, or ""."""
    if isinstance(value, SketchWire):
        return _bad_sketch(value)
    if isinstance(value, int) and not 0 <= value <= MAX_COUNT:
        return f"{value} is out of range"
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"text of {len(value)} characters, the limit is {MAX_TEXT}"
    if isinstance(value, tuple | dict) and len(value) > MAX_ITEMS and not _are_records(value):
        return f"{len(value)} items, the limit is {MAX_ITEMS}"
    inner = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return next((p for p in map(_implausible, inner) if p), "")


def _are_records(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and hasattr(value[0], "__struct_fields__")


def _bad_sketch(wire: SketchWire) -> str:
    numbers = (wire.count, wire.zero, wire.sum, wire.min or 0, wire.max or 0, *wire.cnt)
    if min(numbers) < 0 or max(numbers) > MAX_COUNT:
        return "sketch: count out of range"
    if (wire.count > 0) != (wire.min is not None and wire.max is not None):
        return "sketch: minimum and maximum do not fit the count"
    if len(wire.idx) != len(wire.cnt) or wire.zero + sum(wire.cnt) != wire.count or (wire.cnt and min(wire.cnt) <= 0):
        return "sketch: bucket counts do not add up to the total"
    if len(wire.idx) > 1 and min(wire.idx[1:]) <= 0:
        return "sketch: buckets out of order"
    if wire.idx and not (wire.idx[0] >= -1 and sum(wire.idx) <= MAX_BUCKET):
        return "sketch: bucket out of range"
    return ""
