"""The aggregator's commit log: how far each node was read, and what each day's tables hold. Pure."""

import msgspec


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """An object that was set aside, and why."""

    key: str
    reason: str


class Day(msgspec.Struct, frozen=True, kw_only=True):
    """A UTC day's tables: how many batches, how many files at each level, and the SHA-256 over the minute files' own.

    When raw segments are gone, the minute files are the record, and the hash says whether they are still that. A day
    that was ``pruned`` has no minute files any more and takes no rows.
    """

    batches: int
    minute_files: int
    hour_files: int
    day_files: int
    sha256: str
    pruned: bool = False


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One commit. ``cursors`` hold, for each folder under raw/, the last key that was read.

    ``quarantined`` names what this commit set aside; earlier commits name theirs.
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
