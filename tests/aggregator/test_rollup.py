"""Tables equal the pushed batches, also with late, duplicated or reordered ones and split runs."""

import random
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from aggregator import load, parquet, rollup, tables
from aggregator.calendar import Span, month
from aggregator.commands.rollup import run
from aggregator.config import AggregatorConfig
from aggregator.raw.cleaning import cleaned
from aggregator.window import Window
from shared import keys
from shared.batch import Batch, seal
from shared.bucket import Store
from shared.ids import NodeId
from shared.records import (
    DesiredObserved,
    EngineWindow,
    Hardware,
    HostSample,
    ModelEvicted,
    OutletReading,
    PeerDown,
    Record,
    Resident,
    Served,
    SwapFinished,
)
from shared.sketch import RELATIVE_ERROR, Sketch
from shared.store import ObjectStore, list_all
from shared.store_dir import DirectoryStore
from tests.builders import MINUTE, T0, batch, window

CONFIG = AggregatorConfig(rack="r", store=Store(path="x"))
SLOW: Any = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow],
    "phases": (Phase.explicit, Phase.generate),
}
"""Files are written for each example; shrinking would take minutes."""
NOVEMBER = month("2026-11", "UTC")

models = st.sampled_from(("m", "k", "a model with ' and \" in it"))
sketches = st.lists(st.integers(0, 10**7), max_size=5).map(lambda values: Sketch(values).to_wire())
counts = st.integers(0, 10**6)
maybe = st.none() | counts
served = st.builds(
    Served,
    model=models,
    version=st.sampled_from(("v1", "v2")),
    worker=st.sampled_from(("n1", "n2", "")),
    outcome=st.sampled_from(("ok", "failed")),
    key_id=st.sampled_from(("", "k1")),
    task_class=st.sampled_from(("", "ROUTINE")),
    prompt_bucket_tok=st.sampled_from((0, 1000)),
    place=st.sampled_from(("", "", "hosted", "a ' place")),
    place_category=st.sampled_from(("", "premises", "outside")),
    requests=counts,
    prompt_tok=counts,
    cached_tok=counts,
    completion_tok=counts,
    usd_micro=counts,
    ttft_us=sketches,
    itl_us=sketches,
    total_us=sketches,
)
engines = st.builds(
    EngineWindow, model=models, version=st.just("v1"), busy_prefill_us=counts, decode_tok=counts, queue_max=counts
)
hosts = st.builds(
    HostSample,
    throttled_us=counts,
    thermal_known_us=counts,
    package_temp_mc=maybe,
    package_temp_mean_mc=maybe,
    wall_power_mw=maybe,
    system_power_mw=maybe,
    memory_budget_bytes=maybe,
    memory_used_bytes=maybe,
    memory_used_max_bytes=maybe,
    memory_pressure=st.sampled_from((None, "normal", "warn")),
    fan_rpm=st.lists(counts, max_size=2).map(tuple),
    swap_in_bytes=maybe,
    disk_free_bytes=maybe,
    sources_failed=st.sampled_from(({}, {"smc": "it's gone"})),
)
residents = st.builds(
    Resident,
    model=models,
    version=st.just("v1"),
    state=st.sampled_from(("ready", "starting")),
    need_bytes=counts,
    footprint_bytes=maybe,
    pinned=st.booleans(),
)
outlets = st.builds(
    OutletReading,
    meter=st.sampled_from(("a", "b")),
    nodes=st.sampled_from((("n1",), ("n1", "n2"))),
    power_mw=counts,
    power_max_mw=counts,
    energy_mj=counts,
    covered_us=counts,
)
desired = st.builds(
    DesiredObserved,
    generation=st.integers(0, 2),
    state=st.sampled_from(("none", "acting", "converged", "drifted")),
    reason=st.sampled_from(("", "no memory")),
    drift=st.sampled_from(((), ("m is missing",))),
)
moments = st.integers(0, 30 * 1440).map(lambda minute: T0 + minute * MINUTE)
events = st.one_of(
    st.builds(ModelEvicted, t_ms=moments, model=models, version=st.just("v1"), reason=st.just("memory"), idle_us=maybe),
    st.builds(PeerDown, t_ms=moments, peer=st.just("n2"), last_seen_ms=moments),
    st.builds(
        SwapFinished,
        t_ms=moments,
        swap_id=st.just("s"),
        model=models,
        from_version=st.just("v1"),
        to_version=st.just("v2"),
        outcome=st.just("flipped"),
    ),
    st.builds(Hardware, model=st.just("Mac16,10"), chip=st.just("M4"), memory_bytes=counts, cores=st.just((4, 6))),
)
records: st.SearchStrategy[Record] = st.one_of(served, engines, hosts, residents, desired, outlets, events)


@st.composite
def histories(draw: st.DrawFn) -> list[Batch]:
    """Some batches of two nodes over three days, clocks off here and there."""
    made = []
    for seq in range(1, draw(st.integers(1, 8)) + 1):
        node = draw(st.sampled_from(("n1", "n2")))
        minute = draw(st.integers(0, 3 * 1440))
        one = batch(draw(st.lists(records, max_size=4)), node=node, minute=minute, seq=seq)
        skew = draw(st.sampled_from((None, 0, 3_000, 10 * MINUTE)))
        made.append(msgspec.structs.replace(one, clock_skew_ms=skew, boot_id="b", agent_version="1"))
    return made


def put(store: ObjectStore, *batches: Batch) -> None:
    first, last = batches[0], batches[-1]
    key = keys.batch_key(keys.RawKey(NodeId(first.node), first.incarnation, first.epoch, first.seq, last.seq))
    store.put(key, seal(batches))


def send(store: ObjectStore, made: list[Batch], dice: random.Random) -> None:
    """Each node's batches in their order, as a node sends them, some of them again in a longer segment; the nodes in
    any order, with runs of the aggregator in between."""
    queues = {node: [b for b in made if b.node == node] for node in {b.node for b in made}}
    sent: dict[str, Batch] = {}
    while queues:
        node = dice.choice(sorted(queues))
        one = queues[node].pop(0)
        again = [sent[node]] if node in sent and dice.random() < 0.3 else []
        put(store, *again, one)
        sent[node] = one
        if not queues[node]:
            del queues[node]
        if dice.random() < 0.3:
            run(CONFIG, store)


def plain(found: Window) -> object:
    """A window without fields that depend on the order of ties."""
    made = msgspec.to_builtins(found)
    for table in ("served", "latencies", "engines", "hosts", "residents", "outlets", "runs", "covers", "serving"):
        made[table] = sorted(made[table], key=str)
    made["events"] = sorted(made["events"], key=str)
    return made


@settings(max_examples=10, **SLOW)
@given(histories(), st.randoms())
def test_a_month_of_tables_equals_the_pushed_batches(made: list[Batch], dice: random.Random) -> None:
    """Tables written by SQL against sums in plain Python."""
    with tempfile.TemporaryDirectory() as folder:
        store = DirectoryStore(Path(folder, "bucket"))
        send(store, made, dice)
        run(CONFIG, store)
        assert plain(load.window(store, NOVEMBER)) == plain(window(*map(cleaned, made), span=NOVEMBER))


@settings(max_examples=8, **SLOW)
@given(histories(), st.sampled_from((0, 3_600_000, 5_400_000, 60_000 * 7)), st.integers(1, 50))
def test_any_span_is_selected_exactly(made: list[Batch], offset_ms: int, hours: int) -> None:
    """Days, hours and minutes are read as needed, each exactly once."""
    span = Span("x", T0 + offset_ms, T0 + offset_ms + hours * 3_600_000, "Asia/Kolkata")
    with tempfile.TemporaryDirectory() as folder:
        store = DirectoryStore(Path(folder, "bucket"))
        for one in made:
            put(store, one)
        run(CONFIG, store)
        assert plain(load.window(store, span)) == plain(window(*map(cleaned, made), span=span))


@settings(max_examples=10, **SLOW)
@given(histories(), st.randoms())
def test_table_bytes_are_independent_of_run_history(made: list[Batch], dice: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, other = DirectoryStore(Path(folder, "one")), DirectoryStore(Path(folder, "other"))
        for item in made:
            put(one, item)
        run(CONFIG, one)
        send(other, made, dice)
        run(CONFIG, other)
        assert contents(one) == contents(other)


def contents(store: ObjectStore) -> dict[str, bytes]:
    return {o.key: store.get(o.key, 1 << 30).body for prefix in keys.TABLE_PREFIXES for o in list_all(store, prefix)}


@pytest.mark.parametrize("prefixes", [keys.TABLE_PREFIXES, ("hour/",), ("day/",), ("minute/v1/table=served",)])
def test_deleted_tables_are_rebuilt_with_the_same_bytes(tmp_path: Path, prefixes: tuple[str, ...]) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    for minute in range(0, 4000, 500):
        put(store, batch([Served(model="m", requests=minute, ttft_us=Sketch([minute]).to_wire())], minute=minute))
    run(CONFIG, store)
    before = contents(store)
    for prefix in prefixes:
        for listed in list_all(store, prefix):
            store.delete(listed.key)
    assert contents(store) != before
    run(CONFIG, store)
    assert contents(store) == before
    number = load.newest_manifest(store).number
    run(CONFIG, store)
    assert load.newest_manifest(store).number == number, "nothing new, no commit"


@given(st.lists(st.lists(st.integers(0, 10**8), max_size=30), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_sql_quantiles_equal_sketch_quantiles(minutes: list[list[int]]) -> None:
    fold = tables.FOLDS["served"]
    with parquet.Database() as db:
        lines = [
            parquet.row_json(
                parquet.meta_json(META), n, Served(model="m", requests=1, ttft_us=Sketch(values).to_wire())
            )
            for n, values in enumerate(minutes)
        ]
        body = parquet.merged(db, "served", [db.file("x.ndjson", b"".join(lines))], None)
        lifted = rollup.lifted(fold, parquet.reading([db.file("m.parquet", body)]))
        (row,) = db.rows(rollup.folded(fold, lifted, 3_600_000))
    whole = Sketch([value for values in minutes for value in values])
    for name, q in rollup.QUANTILES.items():
        known = whole.quantile(q)
        assert row[f"ttft_us_{name}"] == (None if known is None else pytest.approx(known, rel=1e-9))
    exact = sorted(value for values in minutes for value in values)
    if exact:
        middle = exact[-(-95 * len(exact) // 100) - 1]
        assert abs(row["ttft_us_p95"] - middle) <= RELATIVE_ERROR * middle + 1e-9


META = {
    "node": "n1",
    "incarnation": 1,
    "epoch": 1,
    "seq": 1,
    "t_start_ms": T0,
    "t_end_ms": T0 + MINUTE,
    "boot_id": "",
    "agent_version": "",
    "dropped_batches": 0,
    "unknown_records": 0,
    "clock_skew_ms": None,
}
