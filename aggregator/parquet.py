"""Records as Parquet tables and back: one table per kind of record, columns from the record's own fields.

Every row carries the identity of its batch and its place in it, on which rows are made unique; a sketch becomes six
columns. DuckDB reads and writes; it runs without extensions and never touches the network.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import duckdb
import msgspec

from aggregator.window import Fact, Meta
from shared.records import RECORD_TYPES
from shared.sketch import SketchWire

BATCH_TABLE = "batch"
TABLES = (*RECORD_TYPES, BATCH_TABLE)
"""The batch table comes last: a day that has a batch there has all of its records."""
_META = {
    "node": "VARCHAR",
    "incarnation": "BIGINT",
    "epoch": "BIGINT",
    "seq": "BIGINT",
    "t_start_ms": "BIGINT",
    "t_end_ms": "BIGINT",
    "agent_version": "VARCHAR",
    "dropped_batches": "BIGINT",
}
_SKETCH = {
    "count": "BIGINT",
    "zero": "BIGINT",
    "sum": "BIGINT",
    "min": "BIGINT",
    "max": "BIGINT",
    "idx": "INTEGER[]",
    "cnt": "BIGINT[]",
}
_SCALARS = {int: "BIGINT", str: "VARCHAR", bool: "BOOLEAN", float: "DOUBLE"}


def columns(kind: type[msgspec.Struct]) -> dict[str, str]:
    """DuckDB types of a record's columns, a sketch ``x`` as ``x_count`` and so on."""
    found: dict[str, str] = {}
    for field in msgspec.structs.fields(kind):
        inner = _without_none(field.type)
        if inner is SketchWire:
            found.update({f"{field.name}_{part}": sql for part, sql in _SKETCH.items()})
        elif inner in _SCALARS:
            found[field.name] = _SCALARS[inner]
        elif get_origin(inner) is tuple:
            found[field.name] = f"{_SCALARS[get_args(inner)[0]]}[]"
        else:
            found[field.name] = "VARCHAR"  # a map, as JSON text
    return found


def write(table: str, facts: Iterable[Fact], batches: Iterable[Meta], old: bytes | None) -> bytes:
    """The table's file with these rows added to ``old``; rows already there are not added again.

    Equal sets of rows give equal bytes, in whatever order and however often they come.
    """
    shape = {**_META, "ordinal": "INTEGER", **(columns(RECORD_TYPES[table]) if table != BATCH_TABLE else {})}
    rows = [_batch_row(m) for m in batches] if table == BATCH_TABLE else [_row(f) for f in facts]
    with tempfile.TemporaryDirectory() as folder, _connect() as db:
        fresh, made = Path(folder, "fresh.ndjson"), Path(folder, "made.parquet")
        fresh.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
        spec = "{" + ", ".join(f"{_quoted(c)}: {_quoted(t)}" for c, t in shape.items()) + "}"
        source = f"SELECT * FROM read_json({_quoted(fresh)}, format='newline_delimited', columns={spec})"
        if old is not None:
            Path(folder, "old.parquet").write_bytes(old)
            source = f"SELECT * FROM read_parquet({_quoted(Path(folder, 'old.parquet'))}) UNION ALL BY NAME {source}"
        identity = "node, incarnation, epoch, seq, ordinal"
        names = ", ".join(f'"{c}"' for c in shape)
        query = f"SELECT DISTINCT ON ({identity}) {names} FROM ({source}) ORDER BY {identity}"
        db.execute(f"COPY ({query}) TO {_quoted(made)} (FORMAT parquet, COMPRESSION zstd)")
        return made.read_bytes()


def write_rows(rows: Sequence[msgspec.Struct], kind: type[msgspec.Struct]) -> bytes:
    """A derived table as a file."""
    shape = columns(kind)
    with tempfile.TemporaryDirectory() as folder, _connect() as db:
        fresh, made = Path(folder, "fresh.ndjson"), Path(folder, "made.parquet")
        fresh.write_bytes(b"\n".join(msgspec.json.encode(_flat(row)) for row in rows))
        spec = "{" + ", ".join(f"{_quoted(c)}: {_quoted(t)}" for c, t in shape.items()) + "}"
        source = f"SELECT * FROM read_json({_quoted(fresh)}, format='newline_delimited', columns={spec})"
        db.execute(f"COPY ({source}) TO {_quoted(made)} (FORMAT parquet, COMPRESSION zstd)")
        return made.read_bytes()


def read(table: str, body: bytes) -> list[Fact]:
    """A table's rows as facts. Columns this version does not know are left out, missing ones take their defaults."""
    kind = RECORD_TYPES[table]
    return [Fact(_meta(row), row["ordinal"], _record(kind, row)) for row in _rows(body)]


def read_batches(body: bytes) -> list[Meta]:
    """The batch table's rows."""
    return [_meta(row) for row in _rows(body)]


def _rows(body: bytes) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, _connect() as db:
        path = Path(folder, "table.parquet")
        path.write_bytes(body)
        result = db.execute(f"SELECT * FROM read_parquet({_quoted(path)})")
        names = [d[0] for d in result.description]
        return [dict(zip(names, values, strict=True)) for values in result.fetchall()]


def _connect() -> Any:
    settings: dict[str, str | bool | int | float | list[str]] = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "threads": "1",
    }
    return duckdb.connect(":memory:", config=settings)


def _batch_row(meta: Meta) -> dict[str, Any]:
    return {**meta._asdict(), "ordinal": 0}


def _row(fact: Fact) -> dict[str, Any]:
    return {**fact.meta._asdict(), "ordinal": fact.ordinal, **_flat(fact.record)}


def _flat(record: msgspec.Struct) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if isinstance(value, SketchWire):
            row.update({f"{name}_{part}": getattr(value, part) for part in _SKETCH})
        else:
            row[name] = json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
    return row


def _meta(row: dict[str, Any]) -> Meta:
    empty = {"VARCHAR": "", "BIGINT": 0}
    return Meta(**{name: row.get(name, empty[_META[name]]) for name in Meta._fields})


def _record(kind: type[msgspec.Struct], row: dict[str, Any]) -> msgspec.Struct:
    tree: dict[str, Any] = {"kind": kind.__struct_config__.tag}
    for field in msgspec.structs.fields(kind):
        inner = _without_none(field.type)
        if inner is SketchWire:
            # rows older than the column have none
            if row.get(f"{field.name}_count") is not None:
                tree[field.name] = {part: row[f"{field.name}_{part}"] for part in _SKETCH}
        elif field.name in row and row[field.name] is not None:
            is_map = get_origin(inner) is dict
            tree[field.name] = json.loads(row[field.name]) if is_map else row[field.name]
    return msgspec.convert(tree, kind)


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        inner = [a for a in get_args(kind) if a is not NoneType]
        return inner[0] if len(inner) == 1 else kind
    return kind


def _quoted(text: object) -> str:
    return "'" + str(text).replace("'", "''") + "'"
