"""The aggregator's commit log: how far each node was read, and what has been counted so far. Pure."""

import msgspec


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """An object that was set aside, and why."""

    key: str
    reason: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One commit. ``cursors`` hold, for each folder under raw/, the last key that was read.

    ``quarantined`` names what this commit set aside; earlier commits name theirs.
    """

    number: int = 0
    cursors: dict[str, str] = {}
    batches: int = 0
    segments: int = 0
    unknown_records: int = 0
    quarantined: tuple[Quarantined, ...] = ()
    quarantined_total: int = 0
