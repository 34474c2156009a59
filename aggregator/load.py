"""Read from the bucket: new segments under raw/, and spans of time from rolled-up tables."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from aggregator import parquet, rollup
from aggregator.calendar import DAY_MS, HOUR_MS, Span, utc_day_ms, utc_days
from aggregator.manifest import Manifest, parse
from aggregator.raw import ingest, progress
from aggregator.raw.progress import Pending
from aggregator.tables import EVENT_TABLE, FOLDS, HOUR_TABLES, Fold, folded_columns, minute_columns
from aggregator.window import (
    LONGEST_WINDOW_MS,
    Asked,
    Cover,
    Demand,
    DesiredSum,
    ElsewhereSum,
    EngineSum,
    Fact,
    HostSum,
    Latency,
    Meta,
    OutletSum,
    ResidentSum,
    Run,
    ServedSum,
    Serving,
    Window,
    within,
)
from shared import keys
from shared.batch import Batch
from shared.errors import Halt, Refused, Retryable
from shared.records import RECORD_TYPES
from shared.store import ObjectStore, Stored, each, find

CONNECTIONS = 8
MOST_FRESH_RECORDS = 200_000
"""Records that a run of `alert` holds: an hour of a thousand nodes. The next run goes on from there."""

S = TypeVar("S", bound=msgspec.Struct)
C = TypeVar("C", bound=Cover)
SPANS = tuple(name for name, fold in FOLDS.items() if fold.spans)
_HERE = "(coalesce(place, '') = '')"
"""SQL for what the rack answered, or nobody; tables of older versions have no place."""
_ELSEWHERE = ("place", "place_category", "model", "key_id", "task_class", "outcome", "finish")
_TIMED = ("model", "worker", "outcome", "place")


class Backlog(NamedTuple):
    """Segments that no commit has counted, and why folders could not be listed, by folder."""

    segments: list[Pending]
    unlisted: dict[str, str]


class Fresh(msgspec.Struct, frozen=True, kw_only=True):
    """Batches after given cursors, and the advanced cursors. ``unread`` are objects that could not be read, with their
    reasons: their nodes' cursors stay before them. ``racks`` is the other rack of each node, by its folder,
    where nothing at all was of this rack."""

    batches: tuple[Batch, ...]
    cursors: dict[str, str]
    unread: dict[str, str] = {}
    racks: dict[str, str] = {}


def newest_manifest(store: ObjectStore) -> Manifest:
    """The latest commit; an empty one in a new bucket. Raises Refused if it cannot be parsed, or is a newer
    version's."""
    newest = ""
    for listed in each(store, keys.MANIFEST_PREFIX):
        newest = listed.key
    return parse(store.get(newest, keys.MOST_MANIFEST_BYTES).body, newest) if newest else Manifest()


def pending(store: ObjectStore, cursors: Mapping[str, str], prefix: str = keys.RAW_PREFIX) -> Backlog:
    """Every segment after its folder's cursor, oldest first, interleaved over the folders, so that a slice of the list
    is a slice of time.

    A folder is one incarnation of one node: within it keys only increase, between folders they need not. One that
    cannot be listed does not keep the others from being read.
    """
    columns: list[list[Pending]] = []
    unlisted: dict[str, str] = {}
    foreign = prefix == keys.RAW_PREFIX
    for folder in _folders(store, prefix, unlisted):
        try:
            columns.append(
                [
                    Pending(one.key, None if foreign and not ingest.is_ours(one.key) else folder, one.size)
                    for one in each(store, folder, cursors.get(folder, ""))
                    if not keys.is_claim(one.key)
                ]
            )
        except (Retryable, Refused) as error:
            unlisted[folder] = error.message
            store.list_after(prefix, limit=1)  # raises if it is not this folder's fault
    return Backlog([one for row in zip_longest(*columns) for one in row if one is not None], unlisted)


def fresh(
    store: ObjectStore,
    rack: str,
    cursors: Mapping[str, str],
    prefix: str = keys.RAW_PREFIX,
    passed: Callable[[str], bool] = lambda key: False,
) -> Fresh:
    """Valid batches after the cursors, for immediate use: all, or as many as MOST_FRESH_RECORDS allow. Bad objects are
    left for `rollup` to quarantine. ``prefix`` may be that of the urgent copies; ``passed`` says whether an unreadable
    object is no longer waited for."""
    batches: list[Batch] = []
    read: list[Pending] = []
    backlog, records, unread = pending(store, cursors, prefix), 0, dict[str, str]()
    waiting: set[str] = set()
    in_a_row: set[str] = set()
    strangers: dict[str, str] = {}
    ours: set[str] = set()
    for at, one in enumerate(backlog.segments):
        if (node := progress.node_of(one.key)) in waiting or records > MOST_FRESH_RECORDS:
            continue
        if len(in_a_row) >= ingest.OUTAGE_NODES:
            good, untried = [found.key for found in read], [later.key for later in backlog.segments[at:]]
            if not ingest.gives_out_any(store, rack, progress.witnesses(good, cursors, untried)):
                break  # the store is down, and would take its time over each node
            in_a_row = set()
        try:
            found, _, other, _ = ingest.segment(store, one.key, rack)
            in_a_row = set()
            if other:
                strangers[node] = other
                continue
            ours.add(node)
        except (Retryable, Halt) as error:
            in_a_row.add(node)
            if not passed(one.key):
                unread[one.key] = error.message
                waiting.add(node)
                continue
            found = []
        read.append(one)
        batches += found
        records += sum(len(batch.records) for batch in found)
    kept = {folder: key for folder, key in cursors.items() if folder.startswith(prefix)}
    cursors = {**kept, **progress.advanced(read)}
    unread = {**backlog.unlisted, **unread}
    return Fresh(batches=tuple(batches), cursors=cursors, unread=unread, racks={} if ours else strangers)


def beginnings(store: ObjectStore) -> dict[str, str]:
    """Initial cursors for a reader that starts now: after everything rolled up and after the urgent copies present."""
    return {**newest_manifest(store).cursors, **progress.advanced(pending(store, {}, keys.URGENT_PREFIX).segments)}


def missing(store: ObjectStore, manifest: Manifest) -> tuple[set[str], set[str]]:
    """Days with missing minute tables, and days with only hour or day tables missing."""
    found: dict[tuple[str, str], int] = {}
    for prefix in keys.TABLE_PREFIXES:
        for listed in each(store, prefix):
            try:
                level, _, day = keys.parse_table_key(listed.key)
            except Refused:
                continue  # a foreign object does not count
            found[level, day] = found.get((level, day), 0) + 1
    lost = {day for day, made in manifest.days.items() if found.get(("minute", day), 0) < made.minute_files}
    torn = {
        day
        for day, made in manifest.days.items()
        if not made.pruned
        and (found.get(("hour", day), 0) < made.hour_files or found.get(("day", day), 0) < made.day_files)
    }
    return lost, torn - lost


def window(store: ObjectStore, span: Span, nodes: Iterable[str] = ()) -> Window:
    """Everything rolled up that ended in the span. Whole UTC days are read from day tables, partial days from hour
    tables, or from minute tables where the rack's UTC offset is not a whole number of hours. Of ``nodes`` it is told
    whether they had reported before the span, also where they are silent in it."""
    with parquet.Database() as db, ThreadPoolExecutor(CONNECTIONS) as pool:
        sources = _Sources(store, db, pool, span)
        # a batch that ends after the span may have begun in it
        beyond = _Sources(store, db, pool, Span("", span.until_ms, span.until_ms + LONGEST_WINDOW_MS, "UTC"), SPANS)
        found = Window(
            span=span,
            served=_structs(db, sources.folded("served", None), ServedSum, _HERE),
            elsewhere=_structs(db, sources.folded("served", None, _ELSEWHERE), ElsewhereSum, f"NOT {_HERE}"),
            latencies=_structs(db, sources.folded("served", None, _TIMED), Latency, _HERE),
            engines=_structs(db, sources.folded("engine", None), EngineSum),
            hosts=_structs(db, sources.folded("host", None), HostSum),
            residents=_structs(db, sources.folded("resident", None), ResidentSum),
            desired=_structs(db, sources.folded("desired", None), DesiredSum),
            outlets=_structs(db, sources.folded("outlet", None), OutletSum),
            runs=_structs(db, sources.folded("run", None), Run),
            covers=_covered(db, (sources, beyond), "cover", Cover, span),
            serving=_covered(db, (sources, beyond), "serving", Serving, span),
            demand=_structs(db, sources.slots("demand"), Demand),
            asked=_structs(db, sources.slots("asked"), Asked, _HERE),
            events=_events(db, sources.events()),
        )
        late = {node for node in (*found.nodes, *nodes) if not found.reported_at_the_start(node)}
        return msgspec.structs.replace(found, reported_before=_reported_before(store, db, pool, span, late))


def _covered(
    db: parquet.Database, sources: Iterable["_Sources"], name: str, kind: type[C], span: Span
) -> tuple[C, ...]:
    """Intervals of a span, from its own tables and from those after it."""
    pieces: dict[tuple[str, ...], list[C]] = {}
    for source in sources:
        for one in _structs(db, source.folded(name, None), kind):
            pieces.setdefault(tuple(getattr(one, label) for label in FOLDS[name].labels), []).append(one)
    whole = (
        msgspec.structs.replace(
            found[0], starts=sum((f.starts for f in found), ()), ends=sum((f.ends for f in found), ())
        )
        for _, found in sorted(pieces.items())
    )
    return within(whole, span)


def _reported_before(
    store: ObjectStore, db: parquet.Database, pool: ThreadPoolExecutor, span: Span, nodes: set[str]
) -> frozenset[str]:
    """Which of these nodes had reported before the span: from its last days back, until all are found. An
    object there that is not a table tells nothing, and must not keep a report of other days from being made."""
    days = sorted(_covered_before(store, span), reverse=True) if nodes else []
    found: set[str] = set()
    for at in range(0, len(days), CONNECTIONS):
        wanted = [keys.table_key("day", "cover", day) for day in days[at : at + CONNECTIONS]]
        stored = pool.map(lambda key: find(store, key, keys.MOST_TABLE_BYTES), wanted)
        bodies = [one.body for one in stored if one is not None and parquet.is_one(one.body)]
        files = [db.file(f"before-{at + n}.parquet", body) for n, body in enumerate(bodies)]
        covers = _structs(db, parquet.reading(files, folded_columns(FOLDS["cover"])) if files else "", Cover)
        found |= {one.node for one in covers if any(start < span.since_ms for start in one.starts)}
        if found >= nodes:
            break
    return frozenset(found & nodes)


def _covered_before(store: ObjectStore, span: Span) -> Iterator[str]:
    for listed in each(store, keys.table_prefix("day", "cover")):
        with contextlib.suppress(Refused, ValueError):
            day = keys.parse_table_key(listed.key)[2]
            if utc_day_ms(day) < span.since_ms:
                yield day


class _Sources:
    """SQL over the files of a span, which are fetched on construction."""

    def __init__(
        self,
        store: ObjectStore,
        db: parquet.Database,
        pool: ThreadPoolExecutor,
        span: Span,
        tables: Sequence[str] = HOUR_TABLES,
    ) -> None:
        self._db, self._span = db, span
        days = utc_days(span)
        hourly = span.since_ms % HOUR_MS == 0 and span.until_ms % HOUR_MS == 0
        whole = [day for day in days if span.since_ms <= utc_day_ms(day) and utc_day_ms(day) + DAY_MS <= span.until_ms]
        self._levels = {name: _levels(name, days, whole, hourly) for name in tables}
        wanted = list(dict.fromkeys(key for files in self._levels.values() for _, key in files))
        found = pool.map(lambda key: find(store, key, keys.MOST_TABLE_BYTES), wanted)
        self._files = {
            key: db.file(f"{span.since_ms}-{number}.parquet", stored.body)
            for number, (key, stored) in enumerate(zip(wanted, found, strict=True))
            if stored is not None
        }

    def folded(self, name: str, slot_ms: int | None, labels: Sequence[str] | None = None) -> str:
        """A table aggregated over the whole span; "" if it has no files."""
        source = self._source(name)
        return rollup.folded(FOLDS[name], source, slot_ms, labels) if source else ""

    def slots(self, name: str) -> str:
        """A table in its short slots, in order."""
        return self.folded(name, FOLDS[name].slot_ms)

    def events(self) -> str:
        """The events of the span."""
        found = [self._files[key] for _, key in self._levels[EVENT_TABLE] if key in self._files]
        if not found:
            return ""
        return f"{parquet.reading(found)} WHERE {self._inside('t_end_ms')} ORDER BY t_end_ms, node, seq, ordinal"

    def _source(self, name: str) -> str:
        fold, pieces = FOLDS[name], []
        for level in ("day", "hour", "minute"):
            files = [self._files[key] for at, key in self._levels[name] if at == level and key in self._files]
            if files and level == "minute":
                pieces.append(f"({self._lifted(fold, files)})")
            elif files:
                inside = "" if level == "day" else f" WHERE {self._inside('slot_ms')}"
                pieces.append(f"(SELECT * FROM ({parquet.reading(files, folded_columns(fold))}){inside})")
        return " UNION ALL BY NAME ".join(pieces)

    def _lifted(self, fold: Fold, files: Sequence[Path]) -> str:
        columns = {name: sql for table in fold.source for name, sql in minute_columns(table).items()}
        rows = f"SELECT * FROM ({parquet.reading(files, columns)}) WHERE {self._inside('t_end_ms')}"
        return rollup.lifted(fold, rows)

    def _inside(self, column: str) -> str:
        return f"{column} >= {self._span.since_ms} AND {column} < {self._span.until_ms}"


def _levels(name: str, days: Sequence[str], whole: Sequence[str], hourly: bool) -> list[tuple[str, str]]:
    """The files of a table for each day of a span, as (level, key)."""
    if name == EVENT_TABLE:
        return [("hour", keys.table_key("hour", name, day)) for day in days]
    found = []
    for day in days:
        level = "day" if day in whole and FOLDS[name].daily else "hour" if day in whole or hourly else "minute"
        tables = FOLDS[name].source if level == "minute" else (name,)
        found += [(level, keys.table_key(level, table, day)) for table in tables]
    return found


def _structs(db: parquet.Database, query: str, kind: type[S], where: str = "true") -> tuple[S, ...]:
    if not query:
        return ()
    fields = [f'"{name}"' for name in kind.__struct_fields__]
    rows = db.rows(f"SELECT {', '.join(fields)} FROM ({query}) WHERE {where}")
    # columns that older files lack take their defaults
    return tuple(msgspec.convert({k: v for k, v in row.items() if v is not None}, kind) for row in rows)


def _events(db: parquet.Database, query: str) -> tuple[Fact, ...]:
    if not query:
        return ()
    found = []
    for row in db.rows(query):
        if (kind := RECORD_TYPES.get(row["kind"])) is not None:
            record = msgspec.json.decode(row["record"], type=dict[str, Any])
            present = {name: value for name, value in record.items() if value is not None}
            meta = Meta(**{name: row[name] for name in Meta._fields})
            found.append(Fact(meta, row["ordinal"], msgspec.convert({**present, "kind": row["kind"]}, kind)))
    return tuple(found)


def newest_report(store: ObjectStore, cadence: str, period: str, name: str, extension: str) -> Stored | None:
    """The latest revision of a report, or None."""
    prefix = keys.report_key(cadence, period, name, 0, "").removesuffix("0.")
    revisions = []
    for listed in each(store, prefix):
        revision, _, found = listed.key.removeprefix(prefix).partition(".")
        if found == extension and revision.isdigit():
            revisions.append((int(revision), listed.key))
    return store.get(max(revisions)[1], keys.MOST_REPORT_BYTES) if revisions else None


def _folders(store: ObjectStore, prefix: str, unlisted: dict[str, str]) -> list[str]:
    """The incarnation folders of every node under a prefix; an object beside them is returned as itself. A node whose
    folders cannot be listed is noted in ``unlisted``."""
    found: list[str] = []
    for outer in _children(store, prefix):
        try:
            found += _children(store, outer) if outer.endswith("/") else [outer]
        except (Retryable, Refused) as error:
            unlisted[outer] = error.message
            store.list_after(prefix, limit=1)
    return found


def _children(store: ObjectStore, prefix: str) -> list[str]:
    """Folders and objects directly under a prefix, found by skipping from one to the next key."""
    found, after = dict[str, None](), ""
    while page := store.list_after(prefix, after, limit=1):
        name, slash, _ = page[0].key[len(prefix) :].partition("/")
        child = prefix + name + slash
        # "~" is after every name of ours in this folder; it, unlike what is after the folder by bytes, skips no other
        # folder in a store that lists folder by folder. A foreign name may be after "~".
        after = child + "~" if slash and child not in found else page[0].key
        found[child] = None
    return list(found)
