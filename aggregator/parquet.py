"""Read and write Parquet files with DuckDB, without extensions and without network access.

Equal sets of rows give equal bytes, in any order and with any repetition.
"""

import contextlib
import errno
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from aggregator import rollup
from aggregator.rollup import names, quoted
from aggregator.tables import EVENT_SOURCES, EVENT_TABLE, FOLDS, IDENTITY, META, flattened, minute_columns, wire_columns

_COPY = "(FORMAT parquet, COMPRESSION zstd)"


def is_full(error: OSError) -> bool:
    """Whether an error is that of a full disk."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def full_disk() -> str:
    """What to do about it, in a sentence."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    what = f"the disk of {tempfile.gettempdir()} is full ({free / 1e6:,.0f} MB are free)"
    return f"{what}; free some, or set TMPDIR to a folder with more room, and run again"


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """DuckDB's words for a full disk, as the error that everything else raises."""
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        if "space left" not in str(error).lower() and "failed to offload" not in str(error).lower():
            raise
        raise OSError(errno.ENOSPC, "No space left on device") from None


class Database:
    """An in-memory DuckDB with a temporary folder for the files it reads and writes."""

    def __init__(self, memory_mb: int = 350) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mlxrack-rollup-")
        self.folder = Path(self._folder.name)
        settings: dict[str, str | bool | int | float | list[str]] = {
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "threads": "1",
            "memory_limit": f"{memory_mb}MB",
            "temp_directory": str(self.folder / "spill"),
        }
        self._db = duckdb.connect(":memory:", config=settings)

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._folder.cleanup()

    def file(self, name: str, body: bytes) -> Path:
        """Write a file into the folder; returns its path."""
        path = self.folder / name
        path.write_bytes(body)
        return path

    def rows(self, query: str) -> list[dict[str, Any]]:
        """The rows of a query."""
        with _as_os_error():
            result = self._db.execute(query)
            columns = [d[0] for d in result.description]
            return [dict(zip(columns, values, strict=True)) for values in result.fetchall()]

    def parquet(self, query: str) -> bytes:
        """The rows of a query as a Parquet file."""
        made = self.folder / "made.parquet"
        with _as_os_error():
            self._db.execute(f"COPY ({query}) TO {quoted(made)} {_COPY}")
        body = made.read_bytes()
        made.unlink()
        return body


def is_one(body: bytes) -> bool:
    """Whether bytes are a Parquet file from its beginning to its end."""
    return len(body) > 12 and body.startswith(b"PAR1") and body.endswith(b"PAR1")


def reading(paths: Iterable[Path], columns: Mapping[str, str] | None = None) -> str:
    """SQL that reads Parquet files. Columns missing from older files are NULL."""
    listed = ", ".join(quoted(path) for path in paths)
    query = f"SELECT * FROM read_parquet([{listed}], union_by_name=true)"
    return f"{query} UNION ALL BY NAME {rollup.no_rows(columns)}" if columns else query


def merged(db: Database, table: str, fresh: Sequence[Path], old: bytes | None) -> bytes:
    """A minute table with the rows of NDJSON files merged into ``old``. Of duplicate rows the fresh one stays, which
    this version has cleaned; the old one if it has columns of a newer version, which are kept."""
    columns = list(minute_columns(table))
    sources = [f"SELECT {flattened(table)} FROM ({_json(table, fresh)})"] if fresh else []
    if old is not None:
        kept = reading([db.file("old.parquet", old)])
        newer = [row["column_name"] for row in db.rows(f"DESCRIBE {kept}") if row["column_name"] not in columns]
        columns += newer
        sources.insert(0 if newer else 1, kept)
    identity = names(IDENTITY)
    first, *second = sources
    others = "".join(f" UNION ALL BY NAME FROM ({one}) ANTI JOIN ({first}) USING ({identity})" for one in second)
    query = f"SELECT DISTINCT ON ({identity}) {names(columns)} FROM (FROM ({first}){others}) ORDER BY {identity}"
    return db.parquet(query)


def hours(db: Database, minutes: Mapping[str, Path]) -> dict[str, bytes]:
    """The hour tables of a day from its minute tables, by name. Tables without rows are omitted."""
    found: dict[str, bytes] = {}
    for name, fold in FOLDS.items():
        if source := _minutes(minutes, fold.source):
            found[name] = db.parquet(rollup.folded(fold, rollup.lifted(fold, source), fold.slot_ms))
    events = {kind: reading([minutes[kind]], minute_columns(kind)) for kind in EVENT_SOURCES if kind in minutes}
    if events:
        found[EVENT_TABLE] = db.parquet(rollup.events(events))
    return found


def days(db: Database, hourly: Mapping[str, bytes], day_ms: int) -> dict[str, bytes]:
    """The day tables from the hour tables."""
    return {
        name: db.parquet(rollup.folded(fold, reading([db.file(f"hour-{name}.parquet", hourly[name])]), day_ms))
        for name, fold in FOLDS.items()
        if fold.daily and name in hourly
    }


def row_json(meta: bytes, ordinal: int, record: msgspec.Struct | None) -> bytes:
    """One NDJSON line for `merged`: batch envelope, the record's position in it, the record."""
    head = meta[:-1] + b',"ordinal":%d' % ordinal
    return head + b"}\n" if record is None else head + b"," + msgspec.json.encode(record)[1:] + b"\n"


def meta_json(meta: Mapping[str, Any]) -> bytes:
    """A batch's envelope for `row_json`."""
    return json.dumps({name: meta[name] for name in META}).encode()


def _json(table: str, paths: Sequence[Path]) -> str:
    spec = "{" + ", ".join(f"{quoted(c)}: {quoted(t)}" for c, t in wire_columns(table).items()) + "}"
    listed = ", ".join(quoted(path) for path in paths)
    return f"SELECT * FROM read_json([{listed}], format='newline_delimited', columns={spec})"


def _minutes(minutes: Mapping[str, Path], tables: Sequence[str]) -> str:
    present = [table for table in tables if table in minutes]
    columns = {name: sql for table in tables for name, sql in minute_columns(table).items()}
    return reading([minutes[table] for table in present], columns) if tables[0] in minutes else ""
