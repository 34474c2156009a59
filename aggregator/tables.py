"""The tables in the bucket: their columns, which of them are labels, and how the others aggregate. Pure.

A minute table has one row per record that a node sent. Hour and day tables share their columns: rows with equal labels
are aggregated, and aggregating aggregates gives the same as aggregating everything at once. Late or duplicate rows
therefore only cost a rebuild of the table.
"""

from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import msgspec

from aggregator.calendar import HOUR_MS
from shared.records import RECORD_TYPES, EngineCounts, Event
from shared.sketch import SketchWire

BATCH_TABLE = "batch"
MINUTE_TABLES = (*RECORD_TYPES, BATCH_TABLE)
"""The batch table is last: once a batch is in it, all of its records are written."""
SLOT_MS = 300_000
EVENTS = tuple(str(kind.__struct_config__.tag) for kind in get_args(Event))
IDENTITY = ("node", "incarnation", "epoch", "seq", "ordinal")
META = {
    "node": "VARCHAR",
    **dict.fromkeys(("incarnation", "epoch", "seq", "t_start_ms", "t_end_ms"), "BIGINT"),
    **dict.fromkeys(("boot_id", "agent_version"), "VARCHAR"),
    **dict.fromkeys(("dropped_batches", "unknown_records", "clock_skew_ms"), "BIGINT"),
}
"""Columns of the batch envelope, in every row of a minute table."""
SKETCH = {**dict.fromkeys(("count", "zero", "sum", "min", "max"), "BIGINT"), "idx": "INTEGER[]", "cnt": "BIGINT[]"}
"""A sketch ``x`` is seven columns ``x_count`` and so on; ``idx`` are absolute bucket indices, not deltas."""
_SCALARS = {int: "BIGINT", str: "VARCHAR", bool: "BOOLEAN", float: "DOUBLE"}


class Fold(msgspec.Struct, frozen=True, kw_only=True):
    """How rows of one kind aggregate. ``lift`` gives minute rows the shape of folded ones: SQL for each column that is
    not in the minute table under its own name. ``lasts`` take the latest row's value (by ``last_ms``, then by place),
    ``spans`` are pairs of lists that hold intervals. Only rows of the first ``source`` are aggregated; ``beside`` gives
    ``lift`` SQL aggregates over all rows of their batch, by name, and ``own`` is a column that only the first has."""

    source: tuple[str, ...]
    labels: tuple[str, ...]
    sums: tuple[str, ...] = ()
    maxes: tuple[str, ...] = ()
    mins: tuple[str, ...] = ()
    lasts: tuple[str, ...] = ()
    sketches: tuple[str, ...] = ()
    spans: bool = False
    lift: dict[str, str] = {}
    beside: dict[str, str] = {}
    own: str = ""
    slot_ms: int = HOUR_MS
    daily: bool = True


def record_columns(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Column types of a record as stored."""
    found: dict[str, str] = {}
    for field in msgspec.structs.fields(kind):
        inner = _without_none(field.type)
        if inner is SketchWire:
            found.update({f"{field.name}_{part}": sql for part, sql in SKETCH.items()})
        else:
            # a map is read as JSON and stored as text
            found[field.name] = _sql_type(inner).replace("JSON", "VARCHAR")
    return found


def minute_columns(table: str) -> dict[str, str]:
    """All columns of a minute table, in order."""
    own = record_columns(RECORD_TYPES[table]) if table != BATCH_TABLE else {}
    return {**META, "ordinal": "INTEGER", **own}


def wire_columns(table: str) -> dict[str, str]:
    """Column types of the input: a record as sent, with sketches as structs."""
    if table == BATCH_TABLE:
        return {**META, "ordinal": "INTEGER"}
    sketch = "STRUCT(" + ", ".join(f'"{part}" {sql}' for part, sql in SKETCH.items()) + ")"
    own = {
        field.name: sketch if _without_none(field.type) is SketchWire else _sql_type(_without_none(field.type))
        for field in msgspec.structs.fields(RECORD_TYPES[table])
    }
    return {**META, "ordinal": "INTEGER", **own}


def flattened(table: str) -> str:
    """SQL that converts input columns to stored ones."""
    parts = [f'"{name}"' for name in (*META, "ordinal")]
    for name, sql in wire_columns(table).items():
        if sql.startswith("STRUCT"):
            parts += [_sketch_part(name, part) for part in SKETCH]
        elif name not in META and name != "ordinal":
            parts.append(f'"{name}"::VARCHAR AS "{name}"' if sql == "JSON" else f'"{name}"')
    return ", ".join(parts)


def folded_columns(fold: Fold) -> dict[str, str]:
    """The columns of an hour or day table. Older files may lack some of them."""
    minutes = {name: sql for table in fold.source for name, sql in minute_columns(table).items()}
    found = {"slot_ms": "BIGINT", "last_ms": "BIGINT", "last_place": "BIGINT"}
    found |= {name: minutes.get(name, "VARCHAR") for name in fold.labels}
    found |= dict.fromkeys((*fold.sums, *fold.maxes, *fold.mins), "BIGINT")
    found |= {name: minutes.get(name, "BIGINT") for name in fold.lasts}
    found |= {f"{name}_{part}": sql for name in fold.sketches for part, sql in SKETCH.items()}
    return found | (dict.fromkeys(("starts", "ends"), "BIGINT[]") if fold.spans else {})


def _sketch_part(name: str, part: str) -> str:
    value = f'"{name}"."{part}"'
    if part in ("min", "max"):
        return f'{value} AS "{name}_{part}"'
    if part == "cnt":
        return f'coalesce({value}, []::BIGINT[]) AS "{name}_cnt"'
    if part == "idx":
        absolute = f"list_transform({value}, lambda step, place: list_sum({value}[1:place]))"
        return f'coalesce({absolute}::INTEGER[], []::INTEGER[]) AS "{name}_idx"'
    return f'coalesce({value}, 0) AS "{name}_{part}"'


def _sql_type(inner: Any) -> str:
    if inner in _SCALARS:
        return _SCALARS[inner]
    if get_origin(inner) is tuple:
        return f"{_SCALARS[get_args(inner)[0]]}[]"
    return "JSON"


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        inner = [a for a in get_args(kind) if a is not NoneType]
        return inner[0] if len(inner) == 1 else kind
    return kind


_ENGINE = EngineCounts.__struct_fields__
_HIGHEST = tuple(name for name in _ENGINE if name.endswith(("_max", "_bytes")))
_LENGTH = "(t_end_ms - t_start_ms)"


def _weighted(name: str, column: str) -> dict[str, str]:
    """A time-weighted mean as two sums: value times duration, and duration."""
    return {
        f"{name}_ms": f"coalesce({column}::HUGEINT * {_LENGTH}, 0)",
        f"{name}_known_ms": f"CASE WHEN {column} IS NULL THEN 0 ELSE {_LENGTH} END",
    }


_POWERS = {
    **_weighted("wall_mw", "wall_power_mw"),
    **_weighted("system_mw", "system_power_mw"),
    **_weighted("soc_mw", "soc_power_mw"),
    **_weighted("package_mc", "package_temp_mean_mc"),
}

_PLACE = {name: f"coalesce({name}, '')" for name in ("place", "place_category")}
"""Rows of older agents have none: the rack answered."""
FOLDS: dict[str, Fold] = {
    "served": Fold(
        source=("served",),
        labels=(
            *("door", "worker", "model", "version", "key_id", "task_class", "outcome", "finish"),
            *("prompt_bucket_tok", *_PLACE),
        ),
        sums=("requests", "retries", "prompt_tok", "cached_tok", "completion_tok", "usd_micro"),
        sketches=("ttft_us", "itl_us", "total_us"),
        lift={"door": "node", **_PLACE},
    ),
    "engine": Fold(
        source=("engine",),
        labels=("node", "model", "version"),
        sums=tuple(name for name in _ENGINE if name not in _HIGHEST),
        maxes=_HIGHEST,
    ),
    "host": Fold(
        source=("host", "engine"),
        labels=("node",),
        sums=(
            *("windows", "thermal_known_us", "throttled_us", "swap_in_bytes", "swap_out_bytes", "memory_stall_us"),
            *("energy_mj", "pressed_windows", "worked_us", "throttled_worked_us"),
            *_POWERS,
        ),
        maxes=(
            *("package_temp_mc", "pcore_temp_mc", "gpu_temp_mc", "fan_max_rpm", "system_power_max_mw"),
            *("memory_total_bytes", "memory_used_max_bytes", "swap_used_bytes"),
        ),
        mins=("disk_free_bytes", "idle_package_mc"),
        lasts=("memory_budget_bytes",),
        lift={
            "windows": "1",
            "swap_in_bytes": "coalesce(swap_in_bytes, 0)",
            "swap_out_bytes": "coalesce(swap_out_bytes, 0)",
            "memory_stall_us": "coalesce(memory_stall_us, 0)",
            "energy_mj": "coalesce(energy_mj, 0)",
            "pressed_windows": "CASE WHEN coalesce(memory_pressure, 'normal') = 'normal' THEN 0 ELSE 1 END",
            "fan_max_rpm": "list_max(fan_rpm)",
            "memory_used_max_bytes": "greatest(memory_used_max_bytes, memory_used_bytes)",
            # models that work at the same time do not make the time longer
            "worked_us": "least(coalesce(busy_us, 0), thermal_known_us)",
            "throttled_worked_us": "least(coalesce(busy_us, 0), thermal_known_us, throttled_us)",
            # a request that takes a hundredth of the window does not warm the chip
            "idle_package_mc": f"CASE WHEN coalesce(busy_us, 0) <= 10 * {_LENGTH} THEN package_temp_mean_mc END",
            **_POWERS,
        },
        own="thermal_known_us",
        beside={"busy_us": "sum(busy_prefill_us + busy_decode_us)"},
    ),
    "resident": Fold(
        source=("resident",),
        labels=("node", "model", "version", "state"),
        sums=("windows", "length_ms"),
        maxes=("footprint_bytes", "restarts"),
        lasts=("need_bytes", "pinned"),
        lift={"windows": "1", "length_ms": _LENGTH},
    ),
    "desired": Fold(
        source=("desired_observed",),
        labels=("node", "generation", "state"),
        sums=("windows",),
        mins=("since_ms",),
        lasts=("reason",),
        lift={"windows": "1", "since_ms": "t_start_ms"},
    ),
    "outlet": Fold(
        source=("outlet",), labels=("meter", "nodes"), sums=("energy_mj", "covered_us"), maxes=("power_max_mw",)
    ),
    "run": Fold(
        source=("batch",),
        labels=("node", "incarnation", "epoch"),
        sums=("batches", "unknown_records", "skewed_batches"),
        maxes=("last_seq", "dropped_batches", "skew_max_ms"),
        mins=("first_seq", "since_ms", "dropped_before"),
        lasts=("agent_version", "boot_id"),
        lift={
            "batches": "1",
            "skewed_batches": "CASE WHEN abs(coalesce(clock_skew_ms, 0)) > 2000 THEN 1 ELSE 0 END",
            "skew_max_ms": "abs(clock_skew_ms)",
            "first_seq": "seq",
            "dropped_before": "dropped_batches",
            "last_seq": "seq",
            "since_ms": "t_start_ms",
        },
    ),
    "cover": Fold(
        source=("batch",), labels=("node",), spans=True, lift={"starts": "[t_start_ms]", "ends": "[t_end_ms]"}
    ),
    "serving": Fold(
        source=("resident",),
        labels=("node", "model"),
        spans=True,
        lift={
            "starts": "CASE WHEN state = 'ready' THEN [t_start_ms] ELSE []::BIGINT[] END",
            "ends": "CASE WHEN state = 'ready' THEN [t_end_ms] ELSE []::BIGINT[] END",
        },
    ),
    "demand": Fold(
        source=("engine",),
        labels=("model",),
        sums=("busy_prefill_us", "busy_decode_us", "prefill_tok", "cached_tok", "decode_tok", "queue_us"),
        slot_ms=SLOT_MS,
        daily=False,
    ),
    "asked": Fold(
        source=("served",),
        labels=("model", "outcome", "place"),
        sums=("requests", "prompt_tok", "cached_tok", "completion_tok"),
        slot_ms=SLOT_MS,
        daily=False,
        lift={"place": _PLACE["place"]},
    ),
}
"""Tables under hour/ (and, where ``daily``, under day/)."""
EVENT_TABLE = "event"
"""All events of a day in one table under hour/, with the record as JSON."""
EVENT_SOURCES = (*EVENTS, "hardware")
EVENT_COLUMNS = {**META, "ordinal": "INTEGER", "kind": "VARCHAR", "record": "VARCHAR"}
HOUR_TABLES = (*FOLDS, EVENT_TABLE)
DAY_TABLES = tuple(name for name, fold in FOLDS.items() if fold.daily)
