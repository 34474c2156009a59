"""The aggregator's commit log: read cursors of each node, and the contents of each day's tables. Pure."""

import msgspec


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """An object in quarantine, and why."""

    key: str
    reason: str


class Day(msgspec.Struct, frozen=True, kw_only=True):
    """A UTC day's tables: number of batches, number of files per level, and the SHA-256 over the minute files' hashes.

    Once raw segments are deleted, the minute files are the record, and the hash verifies them. A ``pruned`` day has no
    minute files and accepts no rows.
    """

    batches: int
    minute_files: int
    hour_files: int
    day_files: int
    sha256: str
    pruned: bool = False


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One commit. ``cursors`` hold the last key read of each folder under raw/.

    ``quarantined`` lists the objects that this commit quarantined; earlier commits list theirs.
    """

    number: int = 0
    cursors: dict[str, str] = {}
    days: dict[str, Day] = {}
    segments: int = 0
    unknown_records: int = 0
    too_late: int = 0
    quarantined: tuple[Quarantined, ...] = ()
    quarantined_total: int = 0

    @property
    def batches(self) -> int:
        """Batches in all tables."""
        return sum(day.batches for day in self.days.values())
