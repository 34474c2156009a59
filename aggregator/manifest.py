"""The aggregator's commit log: read cursors of each node, and the contents of each day's tables. Pure."""

from typing import Any

import msgspec

from shared.errors import Refused

SCHEMA = 2
"""Of the manifest and the tables that it describes. 1 had no number."""
MIN_READER = 1
"""The oldest schema whose version may write after this one. To be raised with any change after which an older version
would lose or miscount something, be it of a table."""


class Quarantined(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object in quarantine, and why."""

    key: str
    reason: str


class Unread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why an object cannot be read, and since when. Its node's later objects wait for it."""

    reason: str
    since_ms: int


class Day(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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

    ``quarantined`` lists the objects that this commit quarantined; earlier commits list theirs. ``unread`` are the
    objects that nodes wait for. ``aside`` counts objects in quarantine by the UTC day that they are of, "" where they
    do not tell, ``foreign`` those of them that are another rack's. ``strangers`` are nodes all of whose new objects are
    another rack's, with its name: they are neither counted nor set aside. ``unknown`` are fields of a newer version,
    which are written back as they were.
    """

    schema: int = SCHEMA
    min_reader: int = MIN_READER
    number: int = 0
    cursors: dict[str, str] = {}
    days: dict[str, Day] = {}
    segments: int = 0
    unknown_records: int = 0
    too_late: int = 0
    quarantined: tuple[Quarantined, ...] = ()
    quarantined_total: int = 0
    aside: dict[str, int] = {}
    foreign: dict[str, int] = {}
    strangers: dict[str, str] = {}
    unread: dict[str, Unread] = {}
    unknown: dict[str, Any] = {}

    @property
    def batches(self) -> int:
        """Batches in all tables."""
        return sum(day.batches for day in self.days.values())


_KNOWN = {field for field in Manifest.__struct_fields__ if field != "unknown"}


def parse(raw: bytes, key: str) -> Manifest:
    """A manifest as stored. Raises Refused if it cannot be parsed, or only by a newer version."""
    try:
        tree = msgspec.json.decode(raw, type=dict[str, Any])
        min_reader = msgspec.convert(tree.get("min_reader", 1), int)
        if min_reader > SCHEMA:
            why = f"a newer version wrote it, for readers of schema {min_reader} and later; this one reads {SCHEMA}"
            raise Refused(f"manifest {key}: {why}: upgrade mlxrack on this machine", code="newer_schema")
        known = {name: value for name, value in tree.items() if name in _KNOWN}
        newer = {name: value for name, value in tree.items() if name not in _KNOWN}
        return msgspec.structs.replace(msgspec.convert(known, Manifest), unknown=newer)
    except (msgspec.DecodeError, RecursionError) as error:
        why = "delete it to roll up again from the one before, or upgrade if a newer version wrote it"
        raise Refused(f"manifest {key}: {error}; {why}") from None


def encode(manifest: Manifest) -> bytes:
    """The manifest as this version stores it, with what a newer one had added."""
    schema = max(SCHEMA, manifest.schema if manifest.unknown else 0)
    tree = msgspec.to_builtins(msgspec.structs.replace(manifest, schema=schema))
    del tree["unknown"]
    return msgspec.json.format(msgspec.json.encode({**manifest.unknown, **tree}, order="sorted"), indent=1)
