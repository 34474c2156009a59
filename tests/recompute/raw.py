"""Raw segments: zstd over concatenated MessagePack batches, de-duplicated, on the store's clock."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import zstandard

Record = dict[str, Any]
SKEWED_MS = 120_000
LONGEST_MS = 6 * 3_600_000
TIMES = ("t_ms", "last_seen_ms", "start_ms")
_KEY = re.compile(r"node=(?P<node>[^/]+)/i\d+/e\d+/\d+-\d+\.mpz$")


@dataclass
class Batch:
    """One window of a node, its times on the store's clock."""

    node: str
    incarnation: int
    epoch: int
    seq: int
    start_ms: int
    end_ms: int
    boot_id: str
    agent: str
    lost: int
    skew_ms: int | None
    records: list[Record] = field(default_factory=list)

    @property
    def length_ms(self) -> int:
        """Of its window."""
        return self.end_ms - self.start_ms

    @property
    def run(self) -> tuple[int, int]:
        """The life of the agent that it belongs to."""
        return (self.incarnation, self.epoch)

    def of(self, *kinds: str) -> list[Record]:
        """Its records of some kinds."""
        return [one for one in self.records if one.get("kind") in kinds]

    @property
    def served(self) -> list[Record]:
        """Requests that the rack answered, or nobody."""
        return [one for one in self.of("served") if not one.get("place")]

    @property
    def elsewhere(self) -> list[Record]:
        """Requests that another place answered, or failed to."""
        return [one for one in self.of("served") if one.get("place")]


def read(bucket: Path, rack: str) -> list[Batch]:
    """Every batch of the rack once, by node and time."""
    found: dict[tuple[Any, ...], Batch] = {}
    for path in sorted((bucket / "raw" / "v1").rglob("*.mpz")):
        if not _KEY.search(path.as_posix()):
            continue
        for raw in unpack(path.read_bytes()):
            if raw["rack"] == rack:
                found.setdefault(_identity(raw), _batch(raw))
    return sorted(found.values(), key=lambda b: (b.node, b.start_ms, b.end_ms))


def unpack(segment: bytes) -> list[Record]:
    """The batches of a segment as maps."""
    reader = zstandard.ZstdDecompressor().stream_reader(segment, read_across_frames=True)
    unpacker = msgpack.Unpacker(raw=False, max_buffer_size=1 << 28)
    unpacker.feed(reader.read())
    return list(unpacker)


def _identity(raw: Record) -> tuple[Any, ...]:
    return raw["node"], raw.get("incarnation", 0), raw["epoch"], raw["seq"]


def _batch(raw: Record) -> Batch:
    skew = raw.get("clock_skew_ms")
    shift = skew if skew is not None and abs(skew) > SKEWED_MS else 0
    end = raw["t_end_ms"] - shift
    start = min(end, max(raw["t_start_ms"] - shift, end - LONGEST_MS))
    return Batch(
        node=raw["node"],
        incarnation=raw.get("incarnation", 0),
        epoch=raw["epoch"],
        seq=raw["seq"],
        start_ms=start,
        end_ms=end,
        boot_id=raw.get("boot_id", ""),
        agent=raw.get("agent_version", ""),
        lost=raw.get("dropped_batches", 0),
        skew_ms=skew,
        records=[_shifted(one, shift) for one in raw.get("records", ())],
    )


def _shifted(record: Record, shift: int) -> Record:
    """An event's times on the store's clock. Nothing else has a time of its own that follows the node's clock."""
    if not shift or "t_ms" not in record:
        return record
    return record | {name: record[name] - shift for name in TIMES if record.get(name) is not None}
