"""Regressions found in review, each with its case."""

import json
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import msgspec

from aggregator import acceptance, alerts, api_prices, cost, load, placement
from aggregator.calendar import month
from aggregator.commands import alert, prune, rollup, sync
from aggregator.config import Alerts
from aggregator.notify import Discord
from aggregator.window import Window, facts_of, straightened
from shared import keys
from shared.desired import Assignment, DesiredState
from shared.records import AgentStarted, HostSample, OutletReading, Record
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.aggregator.test_judgements import CONFIG, put
from tests.aggregator.test_placement import proposal
from tests.builders import MINUTE, T0, batch, engine, host, resident, served, uptime_of, window

NOVEMBER = month("2026-11", "UTC")


def requests(found: Window) -> int:
    return sum(s.requests for s in found.served)


def test_an_absurd_number_stops_no_run(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    absurd = HostSample(wall_power_mw=2**46, throttled_us=2**46)
    for n in range(5):
        put(store, batch([absurd] * 50, minute=n))
    put(store, batch([served(requests=7)], node="n2"))
    assert rollup.run(CONFIG, store).batches == 6
    assert requests(load.window(store, NOVEMBER)) == 7


def test_files_older_than_a_column_are_read(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    put(store, batch([served(requests=3), engine(), host(), resident()]))
    rollup.run(CONFIG, store)
    whole = load.window(store, NOVEMBER)
    dropped = {"run": "dropped_before", "engine": "queue_us", "served": "retries", "host": "energy_mj"}
    for table, column in dropped.items():
        for key in (keys.table_key("hour", table, "2026-11-21"), keys.table_key("day", table, "2026-11-21")):
            path, made = tmp_path / "old.parquet", tmp_path / "new.parquet"
            path.write_bytes(store.get(key, 1 << 30).body)
            with duckdb.connect() as db:
                db.execute(f"COPY (SELECT * EXCLUDE ({column}) FROM '{path}') TO '{made}' (FORMAT parquet)")
            store.put(key, made.read_bytes())
    assert load.window(store, NOVEMBER).served == whole.served
    put(store, batch([served(requests=2), engine(), host()], minute=1))
    rollup.run(CONFIG, store)
    assert requests(load.window(store, NOVEMBER)) == 5


def test_hour_tables_outlive_minute_tables(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for n in range(3):
        put(store, batch([served(requests=100)], minute=n))
    rollup.run(CONFIG, store)
    before = load.window(store, NOVEMBER)
    for prefix in ("minute/", "raw/"):
        for listed in list_all(store, prefix):
            store.delete(listed.key)
    put(store, batch([served(requests=1)], node="late"))
    rollup.run(CONFIG, store)
    assert load.window(store, NOVEMBER) == before


def test_a_slow_clock_is_not_missing_telemetry(tmp_path: Path) -> None:
    """The batch reports that its clock is 200 s behind the store's."""
    late = msgspec.structs.replace(batch([host()], minute=0), clock_skew_ms=-200_000)
    now_ms = T0 + MINUTE + 200_000 + 5_000
    state = alerts.observe(alerts.AlertState(), facts_of(straightened(late)), now_ms, Alerts())
    assert not alerts.evaluate(state, now_ms, Alerts())[1]
    wrong = alerts.observe(alerts.AlertState(), facts_of(late), now_ms, Alerts())
    assert alerts.evaluate(wrong, now_ms, Alerts())[1], "without it there would be an alert"
    store = DirectoryStore(tmp_path)
    put(store, late)
    alert.run(CONFIG, store, Discord({}))


def test_alerts_enabled_later_start_from_now(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    put(store, batch([host()], minute=0))
    rollup.run(CONFIG, store)
    alert.run(CONFIG, store, Discord({}))
    state = json.loads(store.get(keys.ALERT_STATE, 1 << 30).body)
    assert state["nodes"] == {}, "what was rolled up long ago is no news"
    assert state["cursors"] == load.newest_manifest(store).cursors


def test_a_node_that_booted_in_1970_is_corrected(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    started = AgentStarted(t_ms=5_000, version="0", previous="first")
    lost = msgspec.structs.replace(
        batch([started, served(requests=4)]), t_start_ms=0, t_end_ms=60_000, clock_skew_ms=60_000 - T0
    )
    put(store, lost)
    manifest = rollup.run(CONFIG, store)
    assert not manifest.quarantined
    assert requests(load.window(store, NOVEMBER)) == 4


def test_objects_no_node_sends_are_not_fetched(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    put(store, batch([served()]))
    store.put("raw/v1/node=n1/i0001/e00000001/0000000002-0000000002.mpz", bytes(17 << 20))
    (bad,) = rollup.run(CONFIG, store).quarantined
    assert "the limit of a segment is" in bad.reason
    assert not list_all(store, "quarantine/")


def test_a_full_rebuild_reads_everything_again(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    put(store, batch([served(requests=3)]))
    first = rollup.run(CONFIG, store)
    again = rollup.run(CONFIG, store, again=True)
    assert (again.batches, again.cursors) == (first.batches, first.cursors)
    assert requests(load.window(store, NOVEMBER)) == 3


def test_a_copied_manifest_lists_only_copied_objects(tmp_path: Path) -> None:
    here, there = DirectoryStore(tmp_path / "here"), DirectoryStore(tmp_path / "there")
    put(here, batch([served(requests=3)]))
    rollup.run(CONFIG, here)

    class Busy(DirectoryStore):
        """A rack that keeps running while it is copied: a rollup between the tables and the manifest."""

        def list_after(self, prefix: str, after: str = "", limit: int = 1000) -> list:  # type: ignore[type-arg]
            if prefix == "day/" and not after:
                put(here, batch([served(requests=5)], minute=1))
                rollup.run(CONFIG, here)
            return super().list_after(prefix, after, limit)

    sync.run(Busy(tmp_path / "here"), there)
    assert load.newest_manifest(there).number == 1
    sync.run(here, there)
    assert requests(load.window(there, NOVEMBER)) == 8


def test_an_interrupted_prune_is_finished_by_the_next(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    put(store, batch([served()]))
    rollup.run(CONFIG, store)
    kept = {o.key: store.get(o.key, 1 << 30).body for o in list_all(store, "minute/")}
    later = datetime.fromtimestamp((T0 + 420 * 86_400_000) / 1000, UTC)
    prune.run(CONFIG, store, later)
    for key, body in kept.items():
        store.put(key, body)
    assert prune.run(CONFIG, store, later).minute == len(kept)
    assert not list_all(store, "minute/")


# judgements


def test_apply_changes_only_moved_models() -> None:
    """A version deployed since, a model that happened to be cold, a pin: all stay."""
    report = proposal()
    newer = Assignment(model="b", source="b", version="vb2", pinned=True, rows=3)
    cold = Assignment(model="cold", source="cold", version="vc")
    a = Assignment(model="a", source="a", version="va2", pinned=True)
    before = DesiredState(generation=3, nodes={"n1": (a, newer, cold), "n2": ()})
    state = acceptance.desired(report, acceptance.accepted(report, None), before, lambda *_: None, 1)
    assert state.nodes == {"n1": (newer, cold), "n2": (a,)}
    untouched = acceptance.desired(report, (), before, lambda *_: None, 1)
    assert untouched.nodes == before.nodes


def test_no_model_is_placed_on_a_node_that_is_gone() -> None:
    hot: list[Record] = [host(throttled=0.1), resident("a"), engine("a", busy_s=20)]
    alive = [batch(hot, minute=n) for n in range(60)]
    gone = [batch([host(), resident("c", version="vc")], node="n2", minute=n) for n in range(2)]
    report = placement.propose(window(*alive, *gone))
    assert all(move.node != "n2" for move in report.moves)
    assert "n2 has not reported since" in report.notes[0]
    assert [(p.advice, p.node) for p in report.placed if p.model == "c"] == [("gone", "n2")]
    assert any(move.model == "c" and move.action == "load" for move in report.moves)


def test_models_held_back_by_limits_are_not_reported_as_lack_of_memory() -> None:
    wish = {"placement": {"max_moves": 0, "models": [{"model": "a", "min_copies": 2}]}}
    config = msgspec.convert({**msgspec.to_builtins(CONFIG), **wish}, type(CONFIG))
    made = [batch([host(), resident("a"), engine("a")], minute=n) for n in range(3)]
    other = [batch([host()], node="n2", minute=n) for n in range(3)]
    report = placement.propose(window(*made, *other), config.placement)
    assert "though there is memory" in report.short[0]
    hot = placement.propose(
        window(*(batch([host(throttled=0.04), resident("a"), engine("a", busy_s=6)], minute=n) for n in range(5)))
    )
    assert hot.short == ("n1 was throttled 4.0% of the time, and its load fits on no other node: improve its cooling.",)
    assert placement.propose(window(batch([resident("a", need=0)]), batch([resident("a", need=0)], node="n2")))


def test_a_rack_was_down_while_its_only_node_was() -> None:
    """Another node that joined afterwards does not change that."""
    back = AgentStarted(t_ms=T0 + 300 * MINUTE, version="0", previous="unclean")
    first = [batch([resident()]), batch([back, resident()], minute=300, seq=1, epoch=2)]
    joined = batch([resident()], node="n2", minute=390)
    alone = uptime_of(window(*first), T0 + 301 * MINUTE).rack
    both = uptime_of(window(*first, joined), T0 + 391 * MINUTE).rack
    assert alone.down_s == both.down_s == 299 * 60.0


def test_one_meter_is_read_once_however_its_nodes_are_named() -> None:
    def outlet(nodes: tuple[str, ...], watts: int) -> OutletReading:
        return OutletReading(
            meter="pdu", nodes=nodes, power_mw=0, power_max_mw=0, energy_mj=watts * 60_000, covered_us=60_000_000
        )

    made = window(batch([outlet(("n1",), 40)]), batch([outlet(("n1", "n2"), 80)], minute=1))
    assert cost.measured_watts(made, "n1")[0] == 40


def test_idle_nodes_are_paid_for_in_the_comparison() -> None:
    prices = [{"model": "m", "name": "x", "input_per_m": 100.0, "output_per_m": 100.0}]
    config = msgspec.convert(
        {
            **msgspec.to_builtins(CONFIG),
            "nodes": [{"id": n, "price": 2000.0} for n in ("n1", "n2", "n3")],
            "api_prices": prices,
        },
        type(CONFIG),
    )
    made = window(batch([served(), engine()]), *(batch(node=n) for n in ("n2", "n3")))
    money = cost.compute(made, config)
    found = api_prices.compare(made, money, config, datetime(2026, 11, 1, tzinfo=UTC))
    assert found.ours == money.total


def test_pinned_models_stay() -> None:
    pinned = msgspec.structs.replace(resident("a"), pinned=True)
    hot: list[Record] = [host(throttled=0.2), pinned, engine("a", busy_s=2), resident("b", version="vb")]
    made = [batch([*hot, engine("b", version="vb", busy_s=20)], minute=n) for n in range(10)]
    cool = [batch([host()], node="n2", minute=n) for n in range(10)]
    report = placement.propose(window(*made, *cool))
    assert [(m.action, m.model, m.node) for m in report.moves] == [("load", "b", "n2"), ("unload", "b", "n1")]
    alone = placement.propose(
        window(*(batch([host(throttled=0.2), pinned, engine("a", busy_s=20)], minute=n) for n in range(10)), *cool)
    )
    assert not alone.moves
