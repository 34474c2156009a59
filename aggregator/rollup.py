"""SQL that aggregates tables: minute rows to hours, hours to days, any of them to a span. Pure: builds text only.

Sketches are merged by adding the counts of equal buckets, so the quantiles of an hour or a month are those of all its
requests, within ``RELATIVE_ERROR``, in any order of reading.
"""

from collections.abc import Mapping, Sequence

from aggregator.tables import EVENT_COLUMNS, EVENT_SOURCES, IDENTITY, META, SKETCH, Fold, minute_columns
from shared.sketch import SCALE

QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


def quoted(text: object) -> str:
    """A text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def names(columns: Sequence[str], prefix: str = "") -> str:
    """A comma-separated list of quoted column names."""
    return ", ".join(f'{prefix}"{c}"' for c in columns)


def lifted(fold: Fold, source: str) -> str:
    """Minute rows in the shape of folded ones. ``slot_ms`` and ``last_ms`` are the end of the row's batch."""
    wanted = [*fold.labels, *fold.sums, *fold.maxes, *fold.mins, *fold.lasts]
    wanted += [f"{name}_{part}" for name in fold.sketches for part in SKETCH]
    wanted += ["starts", "ends"] if fold.spans else []
    parts = [f'{fold.lift.get(name, chr(34) + name + chr(34))} AS "{name}"' for name in wanted]
    if fold.beside:
        batch = names([name for name in IDENTITY if name != "ordinal"])
        more = ", ".join(f'{sql} OVER (PARTITION BY {batch}) AS "{name}"' for name, sql in fold.beside.items())
        source = f"SELECT * FROM (SELECT *, {more} FROM ({source})) WHERE {fold.own} IS NOT NULL"
    ends = "t_end_ms AS slot_ms, t_end_ms AS last_ms, seq * 65536 + ordinal AS last_place"
    return f"SELECT {ends}, {', '.join(parts)} FROM ({source})"


def folded(fold: Fold, source: str, slot_ms: int | None, labels: Sequence[str] | None = None) -> str:
    """Rows of ``source`` (lifted or folded) aggregated by labels within slots of ``slot_ms``; None for no slots.
    ``labels`` other than the table's own aggregate further."""
    keys = tuple(fold.labels if labels is None else labels)
    slot = [] if slot_ms is None else ["slot_ms"]
    base = (
        f"({source})"
        if slot_ms is None
        else f"(SELECT * REPLACE (slot_ms - slot_ms % {slot_ms} AS slot_ms) FROM ({source}))"
    )
    by = [*slot, *keys]
    if fold.spans:
        return _spans(base, by)
    plain = _plain(fold, base, by)
    if not fold.sketches:
        return f"{plain} ORDER BY {names(by)}"
    merged = " ".join(_joined(name, by) for name in fold.sketches)
    order = f" ORDER BY {names(by)}" if by else ""
    parts = [f"plain.* EXCLUDE ({names([f'{n}_{p}' for n in fold.sketches for p in ('idx', 'cnt')])})"]
    parts += [_sketch_columns(name) for name in fold.sketches]
    buckets = ", ".join(f"{_buckets(name, base, by)}" for name in fold.sketches)
    return f"WITH plain AS ({plain}), {buckets} SELECT {', '.join(parts)} FROM plain {merged}{order}"


def events(sources: dict[str, str]) -> str:
    """One table of all events; ``sources`` are the minute tables by kind."""
    pieces = []
    for kind in (one for one in EVENT_SOURCES if one in sources):
        own = [name for name in minute_columns(kind) if name not in META and name != "ordinal"]
        packed = "to_json(struct_pack(" + ", ".join(f'"{name}" := "{name}"' for name in own) + "))::VARCHAR"
        meta = names([*META, "ordinal"])
        pieces.append(f"SELECT {meta}, {quoted(kind)} AS kind, {packed} AS record FROM ({sources[kind]})")
    union = " UNION ALL ".join(pieces) or no_rows(EVENT_COLUMNS)
    return f"SELECT * FROM ({union}) ORDER BY t_end_ms, node, incarnation, epoch, seq, ordinal"


def no_rows(columns: Mapping[str, str]) -> str:
    """An empty result with these columns."""
    return "SELECT " + ", ".join(f'NULL::{sql} AS "{name}"' for name, sql in columns.items()) + " WHERE false"


def _sum(name: str) -> str:
    """A sum that saturates at the BIGINT maximum, so that one absurd report cannot stop all others."""
    return f'least(coalesce(sum("{name}"), 0), {2**63 - 1})::BIGINT'


def _plain(fold: Fold, base: str, by: Sequence[str]) -> str:
    """Sums, maxima, minima and latest values of each group, and the scalar parts of sketches."""
    parts = [names(by)] if by else []
    parts.append("max(last_ms) AS last_ms, max(last_place) AS last_place")
    parts += [f'{_sum(name)} AS "{name}"' for name in fold.sums]
    parts += [f'max("{name}") AS "{name}"' for name in fold.maxes]
    parts += [f'min("{name}") AS "{name}"' for name in fold.mins]
    parts += [
        f'last("{name}" ORDER BY last_ms, last_place) FILTER ("{name}" IS NOT NULL) AS "{name}"' for name in fold.lasts
    ]
    for name in fold.sketches:
        parts += [f'{_sum(f"{name}_{part}")} AS "{name}_{part}"' for part in ("count", "zero", "sum")]
        parts += [f'{part}("{name}_{part}") AS "{name}_{part}"' for part in ("min", "max")]
        parts += [f'NULL AS "{name}_{part}"' for part in ("idx", "cnt")]
    group = f" GROUP BY {names(by)}" if by else " HAVING count(*) > 0"
    return f"SELECT {', '.join(parts)} FROM {base}{group}"


def _buckets(name: str, base: str, by: Sequence[str]) -> str:
    """A named query: a sketch's buckets merged and collected into lists with their cumulative counts."""
    keys = f"{names(by)}, " if by else ""
    flat = f'SELECT {keys}unnest("{name}_idx") AS idx, unnest("{name}_cnt") AS cnt FROM {base}'
    added = f"SELECT {keys}idx, {_sum('cnt')} AS cnt FROM ({flat}) GROUP BY {keys}idx"
    over = f"PARTITION BY {names(by)} ORDER BY idx" if by else "ORDER BY idx"
    ranked = f"SELECT *, sum(cnt) OVER ({over}) AS reached FROM ({added})"
    gathered = (
        f"SELECT {keys}list(idx ORDER BY idx)::INTEGER[] AS idx, list(cnt ORDER BY idx)::BIGINT[] AS cnt, "
        f"list(reached ORDER BY idx) AS reached FROM ({ranked})" + (f" GROUP BY {names(by)}" if by else "")
    )
    return f'"{name}_merged" AS ({gathered})'


def _joined(name: str, by: Sequence[str]) -> str:
    on = " AND ".join(f'plain."{key}" IS NOT DISTINCT FROM "{name}_merged"."{key}"' for key in by) or "true"
    return f'LEFT JOIN "{name}_merged" ON {on}'


def _sketch_columns(name: str) -> str:
    merged = f'"{name}_merged"'
    parts = [
        f'coalesce({merged}.idx, []::INTEGER[]) AS "{name}_idx"',
        f'coalesce({merged}.cnt, []::BIGINT[]) AS "{name}_cnt"',
        *(f'{_quantile(name, q)} AS "{name}_{label}"' for label, q in QUANTILES.items()),
    ]
    return ", ".join(parts)


def _quantile(name: str, q: float) -> str:
    """The value of rank ceil(q x count): the midpoint of its bucket, clamped to the observed minimum and maximum."""
    merged, count, zero = f'"{name}_merged"', f'plain."{name}_count"', f'plain."{name}_zero"'
    rank = f"greatest(1, ceil({q}::DOUBLE * {count}))"
    place = f"len(list_filter({merged}.reached, lambda r: r + {zero} < {rank})) + 1"
    low, high = (f"pow(2, ({merged}.idx[{place}]{step}) / {1 << SCALE}.0)" for step in ("", " + 1"))
    middle = f"2 * {low} * {high} / ({low} + {high})"
    clamped = f'least(greatest({middle}, plain."{name}_min"), plain."{name}_max")'
    return f"CASE WHEN {count} = 0 THEN NULL WHEN {rank} <= {zero} THEN 0 ELSE {clamped} END"


def _spans(base: str, by: Sequence[str]) -> str:
    """Intervals of each group, touching or overlapping ones merged."""
    keys = f"{names(by)}, " if by else ""
    within = f"PARTITION BY {names(by)} " if by else ""
    flat = f'SELECT {keys}last_ms, unnest("starts") AS a, unnest("ends") AS b FROM {base}'
    seen = (
        f"SELECT *, max(b) OVER ({within}ORDER BY a, b ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS reached "
        f"FROM ({flat}) WHERE b > a"
    )
    begins = "CASE WHEN reached IS NULL OR a > reached THEN 1 ELSE 0 END"
    begun = f"SELECT *, sum({begins}) OVER ({within}ORDER BY a, b ROWS UNBOUNDED PRECEDING) AS island FROM ({seen})"
    islands = f"SELECT {keys}max(last_ms) AS last_ms, min(a) AS a, max(b) AS b FROM ({begun}) GROUP BY {keys}island"
    group = f" GROUP BY {names(by)} ORDER BY {names(by)}" if by else ""
    return (
        f"SELECT {keys}max(last_ms) AS last_ms, 0 AS last_place, list(a ORDER BY a)::BIGINT[] AS starts, "
        f"list(b ORDER BY a)::BIGINT[] AS ends FROM ({islands}){group}"
    )
