"""Uptime and its causes, annotations, the scorecard, and reports on incomplete data."""

import itertools
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from aggregator import alerts, annotations, cost, heat, load, packing, scorecard
from aggregator.alerts import AlertState
from aggregator.calendar import Span, as_long_before, between, days, full_hour, month, week
from aggregator.commands import monthly, prune, rollup, sync, weekly
from aggregator.commands.ended import NothingToPublish
from aggregator.config import AggregatorConfig, Scorecard
from aggregator.judgements import judge
from aggregator.report import html, markdown, pdf
from aggregator.report.page import Curve, Page, Section, table
from aggregator.report.pages import scorecard as scorecard_page
from aggregator.report.pages import uptime as uptime_page
from aggregator.window import facts_of, straightened, union
from shared import keys
from shared.batch import Batch, seal
from shared.errors import Refused
from shared.ids import NodeId
from shared.records import (
    AgentStarted,
    DesiredObserved,
    HostSample,
    MemoryPressed,
    ModelEvicted,
    Record,
    SwapFinished,
    ThrottleEvent,
)
from shared.sketch import RELATIVE_ERROR, Sketch
from shared.store import ObjectStore, list_all
from shared.store_dir import DirectoryStore
from tests.builders import MINUTE, T0, batch, engine, host, pdf_text, resident, served, uptime_of, window
from tests.made_rack import HOUR_MS, MadeModel, MadeRack, batches

DAYS = int(os.environ.get("MLXRACK_TOTALS", "1"))
"""Days, and racks, whose totals are compared; `make crash-aggregator` runs more."""
CONFIG = msgspec.convert(
    {"rack": "r", "store": {"path": "x"}, "nodes": [{"id": n, "price": 1999.0} for n in ("n1", "n2")]}, AggregatorConfig
)


def put(store: ObjectStore, *made: Batch) -> None:
    first, last = made[0], made[-1]
    key = keys.batch_key(keys.RawKey(NodeId(first.node), first.incarnation, first.epoch, first.seq, last.seq))
    store.put(key, seal(made))


# uptime


def restart(minute: int, previous: str = "unclean", boot: str = "b2") -> Batch:
    record = AgentStarted(t_ms=T0 + minute * MINUTE, version="0", previous=previous)
    made = batch([record, resident()], minute=minute, seq=1, epoch=2)
    return msgspec.structs.replace(made, boot_id=boot)


@pytest.mark.parametrize(
    ("last", "boot", "cause"),
    [
        ([], "b1", "crash"),
        ([], "b2", "power"),
        ([MemoryPressed(t_ms=T0 + MINUTE - 1, level="hard", held_bytes=9, budget_bytes=8)], "b1", "out_of_memory"),
        ([ThrottleEvent(t_ms=T0 + MINUTE - 1, level="sleeping")], "b1", "heat"),
        (
            [
                SwapFinished(
                    t_ms=T0 + MINUTE - 1, swap_id="s", model="m", from_version="a", to_version="b", outcome="flipped"
                )
            ],
            "b1",
            "deploy",
        ),
    ],
)
def test_causes_of_missing_telemetry(last: list[Record], boot: str, cause: str) -> None:
    before = msgspec.structs.replace(batch([resident(), *last]), boot_id="b1")
    report = uptime_of(window(before, restart(5, boot=boot)), T0 + 6 * MINUTE)
    found = [i for i in report.incidents if i.scope == "node"]
    assert [(i.cause, i.start_ms, i.end_ms) for i in found] == [(cause, T0 + MINUTE, T0 + 5 * MINUTE)]
    assert (report.nodes[0].up_s, report.nodes[0].down_s) == (120.0, 240.0)


def test_a_node_without_a_model_is_idle_and_the_rack_is_up_while_one_node_is() -> None:
    made = window(batch([resident()]), batch(minute=1), batch([resident()], node="n2", minute=1))
    report = uptime_of(made, T0 + 2 * MINUTE)
    first, second = report.nodes
    assert (first.up_s, first.idle_s) == (60.0, 60.0)
    assert (second.up_s, second.unknown_s) == (60.0, 0.0)
    assert (report.rack.up_s, report.rack.idle_s, report.rack.share) == (120.0, 0.0, 1.0)


def test_events_after_the_judgement_time_count() -> None:
    """The report of a period that is not over covers it up to the last full hour."""
    report = uptime_of(window(batch([resident()]), restart(5)), T0)
    assert (report.nodes[0].up_s, report.nodes[0].down_s, report.nodes[0].unknown_s) == (120.0, 240.0, 0.0)


def test_consecutive_incidents_are_merged() -> None:
    failed = [
        SwapFinished(
            t_ms=T0 + n * MINUTE, swap_id=str(n), model="m", from_version="a", to_version="b", outcome="failed"
        )
        for n in (1, 5, 30)
    ]
    report = uptime_of(window(batch(failed)), T0 + MINUTE)
    assert [i.times for i in report.incidents] == [2, 1]


def test_annotations_override_detected_causes() -> None:
    raw = b"""
[[incidents]]
node = "n1"
start = 2026-11-21T00:00:00Z
end = 2026-11-21T01:00:00+00:00
cause = "power"
text = "The fuse blew."
fix = "Another circuit."
"""
    notes = annotations.parse(raw)
    report = uptime_of(window(batch([resident()]), restart(5, boot="")), T0 + 6 * MINUTE, notes)
    (incident,) = report.incidents
    assert (incident.cause, incident.text, incident.confirmed) == ("power", "The fuse blew.", True)
    other = uptime_of(window(batch([resident()], node="n2")), T0 + MINUTE, notes)
    assert not other.incidents


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"[[incidents]]\nstart = 2026-11-21T00:00:00\nend = 2026-11-21T01:00:00\n", "need a UTC offset"),
        (b"[[incidents]]\nstart = 2026-11-21T02:00:00Z\nend = 2026-11-21T01:00:00Z\n", "end is before start"),
        (
            b'[[incidents]]\nstart = 2026-11-21T02:00:00Z\nend = 2026-11-21T03:00:00Z\ncause = "gremlins"\n',
            "use one of power",
        ),
        (b"[[incidents]]\nwhen = 1\n", "annotations/v1/incidents.toml"),
        (b"\xff", "annotations/v1/incidents.toml"),
    ],
)
def test_an_invalid_annotation_is_reported_with_its_reason(raw: bytes, why: str) -> None:
    with pytest.raises(Refused) as caught:
        annotations.parse(raw)
    assert why in caught.value.message


def test_invalid_annotations_do_not_stop_a_report(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put(annotations.KEY, b"[[incidents")
    put(store, batch([served(), resident(), engine()]))
    rollup.run(CONFIG, store)
    assert weekly.run(CONFIG, store, "2026-W47")


def test_the_page_shows_how_each_node_follows_the_desired_state() -> None:
    states = [
        (1, "converged", ""),
        (2, "acting", ""),
        (2, "failed", "no memory"),
        (2, "converged", ""),
        (2, "drifted", ""),
    ]
    made = [
        batch([DesiredObserved(generation=g, state=state, reason=reason)], minute=n)
        for n, (g, state, reason) in enumerate([*states, (2, "converged", "")])
    ]
    idle = batch([DesiredObserved(generation=0, state="none")], node="n2")
    report = uptime_of(window(*made, idle), T0 + 6 * MINUTE)
    (progress,) = report.desired or ()
    assert (progress.generation, progress.state, progress.since_ms) == (2, "converged", T0 + 5 * MINUTE)
    assert (progress.not_converged, progress.reason) == (3, "no memory")
    text = markdown.render(uptime_page.page(report, "2026-W47", "UTC", "r")).decode()
    line = "n1: desired state: generation 2, converged since 21 Nov 00:05; not converged in 3 windows"
    assert f"- {line}, last because: no memory" in text
    plain = uptime_of(window(idle), T0 + MINUTE)
    assert b"desired" not in msgspec.json.encode(plain)
    assert "Desired state" not in markdown.render(uptime_page.page(plain, "2026-W47", "UTC", "r")).decode()


# scorecard


def test_a_month_is_compared_with_its_targets() -> None:
    flipped = SwapFinished(
        t_ms=T0, swap_id="s", model="m", from_version="a", to_version="b", outcome="flipped", window_us=150_000_000
    )
    made = window(
        batch([served(requests=99), served(outcome="failed"), engine(), host(), resident(), flipped]),
        *(batch([engine(busy_s=60), host(throttled=0.02)], minute=n) for n in range(1, 6)),
    )
    up = uptime_of(made, T0 + MINUTE)
    found = {line.name: line for line in scorecard.lines(made, up, None, Scorecard())}
    assert {name: line.kept for name, line in found.items()} == {
        "p95 between tokens": True,
        "uptime": False,
        "throttled": False,
        "longest swap": False,
        "saving against API hosts": None,
    }
    nothing = scorecard.lines(window(), uptime_of(window(), T0), None, Scorecard())
    assert [line.kept for line in nothing] == [None] * 5


def hour_of(busy_s: float, throttled_s: float, known_s: float, *, hour: int, models: int = 1) -> Batch:
    sample = HostSample(thermal_known_us=round(known_s * 1e6), throttled_us=round(throttled_s * 1e6))
    engines = [engine(f"m{n}", busy_s=busy_s) for n in range(models)]
    made = batch([sample, *engines], minute=60 * hour, seq=hour + 1)
    return msgspec.structs.replace(made, t_end_ms=made.t_start_ms + HOUR_MS)


@pytest.mark.parametrize(
    ("hours", "share"),
    [
        # 720 h known, 36 h busy, 3.6 h throttled, all of it while working
        ([(3600.0, 360.0, 3600.0, 1)] * 36 + [(0.0, 0.0, 3600.0, 1)] * 684, 0.1),
        # the same ratios in tables
        ([(3600.0, 360.0, 3600.0, 1)] * 2 + [(0.0, 0.0, 3600.0, 1)] * 38, 0.1),
        # the same totals, all heat while idle
        ([(3600.0, 0.0, 3600.0, 1)] * 36 + [(0.0, 360.0, 3600.0, 1)] * 36 + [(0.0, 0.0, 3600.0, 1)] * 648, 0.0),
        ([(1800.0, 3600.0, 3600.0, 1)], 1.0),
        ([(3600.0, 1800.0, 3600.0, 2)], 0.5),  # two models at the same time
        ([(900.0, 900.0, 3600.0, 2)], 0.5),  # one after the other
        ([(3600.0, 0.0, 0.0, 1), (1800.0, 18.0, 3600.0, 1)], 0.01),  # unknown heat is no coolness
        ([(3600.0, 0.0, 0.0, 1)], None),
        ([(0.0, 360.0, 3600.0, 1)], None),  # no model worked
        ([(299.0, 299.0, 3600.0, 1)], None),  # too little
        ([(300.0, 6.0, 3600.0, 1)], 0.02),
        ([(3600.0, 36.1, 3600.0, 1)], 0.0100278),
    ],
)
def test_heat_counts_while_models_work(
    hours: list[tuple[float, float, float, int]], share: float | None, tmp_path: Path
) -> None:
    made = [hour_of(*figures, hour=n, models=models) for n, (*figures, models) in enumerate(hours)]
    november = month("2026-11", "UTC")
    made = [msgspec.structs.replace(b, t_start_ms=b.t_start_ms - 20 * 86_400_000) for b in made]
    made = [msgspec.structs.replace(b, t_end_ms=b.t_start_ms + HOUR_MS - 1) for b in made]
    windows = [window(*made, span=november)]
    if len(made) < 100:
        store = DirectoryStore(tmp_path)
        put(store, *made)
        rollup.run(CONFIG, store)
        windows.append(load.window(store, november))
    for one in windows:
        (line,) = (one for one in scorecard.lines(one, uptime_of(one, T0), None, Scorecard()) if one.kind == "heat")
        assert line.value == (None if share is None else pytest.approx(share, abs=1e-6))
        assert line.kept == (None if share is None else share <= 0.01)
        assert ("in which models worked" in line.text) == (share is not None)


@pytest.mark.parametrize(
    ("known_s", "hot_s", "count", "share", "kind"),
    [
        (60.0, 0.7, 10, 0.7 / 60, "throttled"),
        (48.0, 0.6, 10, 0.6 / 48, "throttled"),  # four fifths
        (6.0, 0.3, 10, 0.005, "cool"),  # 5 % of 60 s known, and 540 s are not
        (6.0, 6.0, 10, 0.1, "throttled"),  # too hot, however cool the rest was
        (0.0, 0.0, 10, None, "unknown"),
    ],
)
def test_time_that_is_not_known_counts_as_cool(
    known_s: float, hot_s: float, count: int, share: float | None, kind: str
) -> None:
    sample = HostSample(thermal_known_us=round(known_s * 1e6), throttled_us=round(hot_s * 1e6))
    found = heat.thermal(window(*(batch([sample], minute=n) for n in range(count))))
    assert found.nodes[0].throttled_share == (None if share is None else pytest.approx(share))
    assert found.kind == kind


@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(1, 3)), min_size=1, max_size=6
    )
)
@settings(max_examples=50, deadline=None)
def test_the_share_of_heat_lies_between_the_possible_overlaps(minutes: list[tuple[int, int, int, int]]) -> None:
    made = []
    for n, (busy_s, hot_s, more_s, models) in enumerate(minutes):
        known = min(60, hot_s + more_s)
        sample = HostSample(thermal_known_us=known * 10**6, throttled_us=hot_s * 10**6)
        made.append(batch([sample, *(engine(f"m{k}", busy_s=busy_s) for k in range(models))], minute=n))
    seen = window(*made)
    (line,) = (one for one in scorecard.lines(seen, uptime_of(seen, T0), None, Scorecard()) if one.kind == "heat")
    assert line.value is None or 0.0 <= line.value <= 1.0
    hot, known = sum(m[1] for m in minutes), sum(min(60, m[1] + m[2]) for m in minutes)
    if line.value is not None and all(busy_s == 60 for busy_s, *_ in minutes):
        assert line.value == pytest.approx(hot / known), "they always worked"


@pytest.mark.parametrize("share", [heat.TARGET_SHARE, heat.MOVE_SHARE, heat.ALERT_SHARE])
def test_page_pdf_and_alert_take_a_share_of_throttling_from_one_definition(share: float) -> None:
    """Each share is tolerated exactly, and not a thousandth more."""
    for more, above in ((0.0, False), (0.001, True)):
        throttled = share + more
        records: list[Record] = [resident(), engine(busy_s=60.0), served(), host(throttled=throttled)]
        made = [batch(records, minute=n) for n in range(5)]
        judged = judge(window(*made), None, CONFIG, T0 + 5 * MINUTE)
        target = throttled > heat.TARGET_SHARE
        page = scorecard_page.page(judged.scorecard, "", "")
        (line,) = (row for row in page.sections[0].table.rows if row[0] == "throttled")  # type: ignore[union-attr]
        assert line[3] == ("missed" if target else "kept")
        assert (judged.thermal.kind == "throttled") == target
        assert ("more air" in pdf_text(pdf.render(judged))) == target
        assert (judged.distribution.nodes[0].limit < packing.CAP) == (throttled > heat.MOVE_SHARE)
        state = alerts.observe(AlertState(), [f for b in made for f in facts_of(b)], T0 + 5 * MINUTE, CONFIG.alerts)
        firing = {one.code for one in alerts.evaluate(state, T0 + 5 * MINUTE, CONFIG.alerts)[0].firing}
        assert ("throttling" in firing) == (throttled > heat.ALERT_SHARE)
        assert above == (throttled > share)


def test_the_pdf_shows_the_configured_targets() -> None:
    made = window(
        *(batch([served(requests=4), engine(), resident(), host(throttled=0.03)], minute=n) for n in range(5))
    )
    plain = pdf_text(pdf.render(judge(made, None, CONFIG, T0 + MINUTE)))
    assert "target 99.90 %" in plain
    assert "target 100 ms" in plain
    assert "Throttled by heat for more than 1 % of the time: n1 3.0 %." in plain
    targets = Scorecard(uptime=0.95, itl_p95_ms=5.5, throttled=0.02)
    other = judge(made, None, msgspec.structs.replace(CONFIG, scorecard=targets), T0 + MINUTE)
    text = pdf_text(pdf.render(other))
    assert "target 95.00 %" in text
    assert "target 5.5 ms" in text
    assert "Throttled by heat for more than 2 % of the time: n1 3.0 %." in text
    assert {line.kind: line.kept for line in other.scorecard}["latency"] is False


# spans


def test_any_range_of_days_is_compared_with_as_many_days_before() -> None:
    span = between("2026-10-24", "2026-10-26", "Europe/Berlin")
    assert span.until_ms - span.since_ms == 3 * 86_400_000 + 3_600_000, "the clocks change on the 25th"
    before = as_long_before(span)
    assert (before.name, before.until_ms) == ("2026-10-21--2026-10-23", span.since_ms)
    assert [one.name for one in days(span)] == ["2026-10-24", "2026-10-25", "2026-10-26"]
    assert sum(one.until_ms - one.since_ms for one in days(span)) == span.until_ms - span.since_ms
    for since, until in (("2026-10-26", "2026-10-24"), ("x", "y"), ("1999-01-01", "1999-01-02")):
        with pytest.raises(Refused):
            between(since, until, "UTC")
    assert full_hour(3_600_001) == 3_600_000


def test_a_clock_off_by_minutes_is_corrected() -> None:
    wrong = batch([AgentStarted(t_ms=T0 + 600_000, version="0", previous="first")], minute=10)
    wrong = msgspec.structs.replace(wrong, clock_skew_ms=600_000)
    right = straightened(wrong)
    assert (right.t_start_ms, right.t_end_ms) == (T0, T0 + MINUTE)
    assert right.records[0].t_ms == T0  # type: ignore[union-attr]
    near = msgspec.structs.replace(wrong, clock_skew_ms=100_000)
    assert straightened(near) is near


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=9))
def test_a_union_covers_its_intervals(pieces: list[tuple[int, int]]) -> None:
    covered = {t for a, b in pieces for t in range(a, b)}
    found = union(pieces)
    assert covered == {t for a, b in found for t in range(a, b)}
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(found))


# sketches

DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "lognormal": lambda d: d.lognormvariate(10, 0.7),
    "wide lognormal": lambda d: d.lognormvariate(8, 2),
    "exponential": lambda d: d.expovariate(1e-5),
    "uniform": lambda d: d.uniform(1, 1e6),
    "constant": lambda d: 12_345,
    "two humps": lambda d: d.gauss(2e4, 1e3) if d.random() < 0.7 else d.gauss(9e5, 1e4),
    "pareto": lambda d: 1000 * d.paretovariate(1.5),
    "many zeros": lambda d: 0 if d.random() < 0.3 else d.uniform(100, 1e5),
    "small integers": lambda d: d.randint(0, 20),
    "huge": lambda d: d.uniform(1e12, 1e13),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_quantiles_of_ten_thousand_merged_sketches_are_within_their_bound(name: str) -> None:
    dice = random.Random(name)
    parts, values = [], []
    for _ in range(10_000):
        mine = [max(0, int(DISTRIBUTIONS[name](dice))) for _ in range(dice.randint(0, 6))]
        values += mine
        parts.append(Sketch(mine))
    whole = Sketch()
    for part in parts:
        whole.merge(part)
    dice.shuffle(parts)
    again = Sketch()
    for part in parts:
        again.merge(part)
    assert whole == again
    values.sort()
    for q in (0.5, 0.95, 0.99):
        exact = values[max(0, -(-int(q * 1000) * len(values) // 1000) - 1)]
        found = whole.quantile(q)
        assert found is not None
        assert abs(found - exact) <= RELATIVE_ERROR * exact + 1e-9


# the store


def test_sync_copies_a_bucket_once_and_then_only_changes(tmp_path: Path) -> None:
    here, there = DirectoryStore(tmp_path / "here"), DirectoryStore(tmp_path / "there")
    put(here, batch([served(), engine(), resident(), host()]))
    rollup.run(CONFIG, here)
    weekly.run(CONFIG, here, "2026-W47")
    first = sync.run(here, there)
    assert first.written > 20
    assert not first.clashes
    assert sync.run(here, there).written == 0, "nothing new"
    put(here, batch([served(requests=5)], minute=1))
    rollup.run(CONFIG, here)
    again = sync.run(here, there)
    assert 0 < again.written < first.written
    for prefix in (one for one in sync.RULES if one != "state/"):
        assert {o.key: o.etag for o in list_all(here, prefix)} == {o.key: o.etag for o in list_all(there, prefix)}
    assert rollup.run(CONFIG, there).number == load.newest_manifest(here).number, "the copy has nothing to do"


def test_an_interrupted_sync_resumes_and_conflicts_are_named(tmp_path: Path) -> None:
    here, there = DirectoryStore(tmp_path / "here"), DirectoryStore(tmp_path / "there")
    for minute in range(5):
        put(here, batch([served()], minute=minute))
    keys_here = [o.key for o in list_all(here, "raw/")]
    there.put(keys_here[0], here.get(keys_here[0], 1 << 30).body)
    there.put(keys_here[1], b"")
    there.put(keys_here[2], b"something else")
    done = sync.run(here, there)
    assert done.clashes == [keys_here[2]]
    assert there.get(keys_here[1], 1 << 30).body == here.get(keys_here[1], 1 << 30).body
    assert there.get(keys_here[2], 1 << 30).body == b"something else"


def test_prune_deletes_only_old_rolled_up_objects(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    store = DirectoryStore(tmp_path)
    for minute in (0, 1, 1440 * 40, 1440 * 40 + 1):
        put(store, batch([served()], minute=minute, seq=minute + 1))
    rollup.run(CONFIG, store)
    put(store, batch([served()], minute=1440 * 40 + 2, seq=1440 * 40 + 3))
    now = datetime.fromtimestamp((T0 + 41 * 86_400_000) / 1000, UTC)
    would = prune.run(CONFIG, store, now, dry_run=True)
    assert (would.raw, would.minute) == (2, 0)
    assert len(list_all(store, "raw/")) == 5
    assert prune.run(CONFIG, store, now).raw == 2
    assert len(list_all(store, "raw/")) == 3
    later = datetime.fromtimestamp((T0 + 420 * 86_400_000) / 1000, UTC)
    done = prune.run(CONFIG, store, later)
    assert done.days == ("2026-11-21",)
    before = load.window(store, month("2026-11", "UTC"))
    assert sum(s.requests for s in before.served) == 2, "hours and days are kept"
    put(store, batch([served(requests=50)], node="n9", minute=3))
    manifest = rollup.run(CONFIG, store)
    assert manifest.too_late == 1
    assert load.window(store, month("2026-11", "UTC")) == before, "a day whose minutes are gone takes no rows"


# conservation, end to end


@pytest.mark.timeout(900)
@settings(max_examples=DAYS, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.integers(0, 10**6), st.randoms())
def test_report_totals_equal_the_batches(seed: int, dice: random.Random) -> None:
    """Also with duplicates, late data, reordering between nodes and split runs."""
    since = week("2026-W45", "UTC").since_ms
    rack = MadeRack(
        seed=seed,
        models=(MadeModel(name="a", per_hour=90), MadeModel(name="b", per_hour=40)),
        since_ms=since,
        window_ms=HOUR_MS,
        faults=6.0,
        skewed=("n2",),
        metered=("n1",),
    )
    everything = {node: list(batches(rack, node, since + DAYS * 24 * HOUR_MS)) for node in rack.nodes}
    with tempfile.TemporaryDirectory() as folder:
        store = DirectoryStore(Path(folder))
        queues = {node: list(made) for node, made in everything.items()}
        while queues:
            node = dice.choice(sorted(queues))
            cut = dice.randint(1, 20)
            group = [b for b in queues[node][:cut] if b.epoch == queues[node][0].epoch]
            put(store, *group)
            keep = group[-1:] if dice.random() < 0.3 and len(group) > 1 else []
            queues[node] = [*keep, *queues[node][len(group) :]]
            if not queues[node]:
                del queues[node]
            if dice.random() < 0.06:
                rollup.run(CONFIG, store)
        rollup.run(CONFIG, store)
        span = Span("x", since - HOUR_MS, since + 5 * 24 * HOUR_MS, "UTC")
        report = cost.compute(load.window(store, span), CONFIG)
    records = [r for made in everything.values() for b in made for r in b.records]
    for name in ("prompt_tok", "cached_tok", "completion_tok"):
        sent = sum(getattr(r, name) for r in records if r.__struct_config__.tag == "served")
        assert sum(getattr(m, name) for m in report.models) == sent
    ok = sum(getattr(r, "requests", 0) for r in records if getattr(r, "outcome", "") == "ok")
    assert sum(m.requests for m in report.models) == ok
    busy = sum(getattr(r, "busy_prefill_us", 0) + getattr(r, "busy_decode_us", 0) for r in records)
    assert abs(sum(n.busy_s for n in report.nodes) - busy / 1e6) < 0.01
    spans = [
        union((straightened(b).t_start_ms, straightened(b).t_end_ms) for b in made) for made in everything.values()
    ]
    reported = sum((b - a) / 1000 for one in spans for a, b in one)
    assert abs(sum(n.reported_s for n in report.nodes) - reported) < 0.01
    assert report.total == sum(r.cost for r in report.rows)


# reports on incomplete data


def artifacts_of(*made: Batch, config: AggregatorConfig = CONFIG) -> dict[str, str]:
    span = week("2026-W47", "UTC")
    empty = window(span=Span("before", 0, 1, "UTC"))
    judged = judge(window(*made, span=span), empty, config, span.until_ms)
    found = weekly.artifacts(judged, empty.span.name)
    return {name: markdown.render(page).decode() + html.render(page).decode() for name, (_, page) in found.items()}


@pytest.mark.parametrize(
    ("made", "name", "said"),
    [
        ((), "cost", "No node reported anything."),
        ((), "uptime", "No node reported anything."),
        ((), "placement", "No node reported anything."),
        ((), "scorecard", "5 without data"),
        ((batch([served(requests=0, prompt_tok=0, completion_tok=0), engine()]),), "cost", "no data"),
        ((batch([served(), engine()], node="stranger"),), "cost", "No node of this period has a price"),
        ((batch([served(), engine()]), batch([served(worker="n3")], node="n3")), "cost", "Without a price: n3"),
        ((batch([served(), engine()]),), "cost", "no [[compare]] entry"),
    ],
    ids=["no data", "no data", "no data", "no data", "zero tokens", "no price", "one without a price", "no comparison"],
)
def test_a_report_states_missing_data(made: tuple[Batch, ...], name: str, said: str) -> None:
    assert said in artifacts_of(*made)[name]


def test_forty_models_with_eighty_characters_and_markup_in_their_names() -> None:
    names = [f"org|{'x' * 66}<b>{n:02d}" for n in range(40)]
    records = [served(n, version=str(k), requests=3) for k, n in enumerate(names)]
    rows = [resident(n, version=str(k)) for k, n in enumerate(names)]
    evicted = [ModelEvicted(t_ms=T0, model=n, version="v", reason="memory") for n in names]
    found = artifacts_of(batch([*records, *rows, *evicted, host()]))
    for name, text in found.items():
        assert "<b>" not in text, name
    assert all(f"{n:02d}" in found["cost"] for n in range(40))


def test_a_page_is_one_self_contained_file() -> None:
    curve = Curve(title="x", labels=("a", "b"), lines=(("y", (-1.0, 5.0)),))
    page = Page(
        title="t",
        lead="l",
        sections=(Section(title="s", text=("x",), points=("p",), steps=("q",), curve=curve, table=table("A | B", [])),),
    )
    text = html.render(page).decode()
    assert "<svg" in text
    assert "no data" in text
    for needs in ("http://", "https://", "<script", "@import", "src="):
        assert needs not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert markdown.bars((0.0, 1.0, 2.0, 4.0)) == "▁▂▄█"


def test_a_single_node_has_reports_and_an_empty_month_has_none(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    with pytest.raises(NothingToPublish):
        monthly.run(CONFIG, store, "2026-01")
    put(store, batch([served(), engine(), resident(), host()]))
    rollup.run(CONFIG, store)
    assert monthly.run(CONFIG, store, "2026-11")
