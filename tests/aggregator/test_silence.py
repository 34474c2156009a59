"""Silence is neither uptime nor nothing: which nodes are there, what is known of them, and what is promised."""

from collections.abc import Iterable
from datetime import date
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import incidents, load, scorecard
from aggregator.annotations import COUNTS
from aggregator.calendar import HOUR_MS, Span
from aggregator.commands import monthly, rollup, weekly
from aggregator.config import Node, Scorecard
from aggregator.fleet import fleet
from aggregator.report import markdown
from aggregator.report.pages import uptime as uptime_page
from aggregator.uptime import LEAST_KNOWN, NodeUptime, Uptime, uptime
from aggregator.window import Window, seconds, union
from shared.batch import Batch
from shared.records import AgentStarted, AgentStopped, PeerDown, PeerUp, Record
from shared.store_dir import DirectoryStore
from tests.aggregator.test_rollup import CONFIG, put
from tests.aggregator.test_uptime import LIVES, history, note, started
from tests.builders import MINUTE, T0, batch, resident, served, uptime_of, window

HOUR = 60
DAYS = Span("d", T0, T0 + 10 * 24 * HOUR_MS, "UTC")
"""Ten days from 2026-11-21 on."""
END = DAYS.until_ms


def at(hour: float, records: Iterable[Record] = (), *, node: str = "n1", hours: float = 0.0, seq: int = 0) -> Batch:
    """A window that begins at an hour of the span and lasts a minute, or some hours."""
    start = T0 + int(hour * HOUR_MS)
    made = batch([resident(), *records], node=node, seq=seq or int(hour * 100) + 200_000)
    return msgspec.structs.replace(made, t_start_ms=start, t_end_ms=start + int(hours * HOUR_MS or MINUTE))


def lives(node: str, *spans: tuple[float, float]) -> list[Batch]:
    """Windows of an hour from one hour to another, for each pair."""
    return [at(hour, node=node, hours=1) for since, until in spans for hour in range(int(since), int(until))]


def days(*batches: Batch, nodes: Iterable[str] = ()) -> Window:
    return window(*batches, span=DAYS, nodes=nodes)


def hours(one: NodeUptime) -> dict[str, float]:
    """The parts of a node's time that are there, in hours."""
    parts = {name: getattr(one, f"{name}_s") / 3600 for name in ("up", "idle", "down", "excused", "unknown")}
    return {name: value for name, value in parts.items() if value}


def told(report: Uptime) -> list[tuple[str, str, float, float | None]]:
    """(node, cause, begin, end) of each incident, in hours."""
    return [
        (i.node, i.cause, (i.start_ms - T0) / HOUR_MS, None if i.end_ms is None else (i.end_ms - T0) / HOUR_MS)
        for i in report.incidents
    ]


def down(hour: float, peer: str = "n1", seen: float | None = None) -> PeerDown:
    t_ms = T0 + int(hour * HOUR_MS)
    return PeerDown(t_ms=t_ms, peer=peer, last_seen_ms=t_ms - 4000 if seen is None else T0 + int(seen * HOUR_MS))


BEFORE = at(-5, hours=1)
"""n1 had reported before the span."""
NODE = Node(id="n1")


AT_25, LATER = (Node(id="n1", retired=day) for day in (date(2026, 11, 25), date(2027, 1, 1)))
Case = tuple[list[Batch], Node | None, dict[str, float], list[tuple[float, float | None]]]
CASES: dict[str, Case] = {
    "in the middle": (lives("n1", (0, 100), (150, 240)), NODE, {"up": 190, "unknown": 50}, [(100, 150)]),
    "at the end": (lives("n1", (0, 200)), NODE, {"up": 200, "unknown": 40}, [(200, None)]),
    "at the beginning": ([BEFORE, *lives("n1", (30, 240))], NODE, {"up": 210, "unknown": 30}, [(0, 30)]),
    "not yet there": (lives("n1", (30, 240)), NODE, {"up": 210}, []),
    "over the whole period": ([BEFORE], NODE, {"unknown": 240}, [(0, None)]),
    "retired in the middle of it": (lives("n1", (0, 50)), AT_25, {"up": 50, "unknown": 46}, [(50, 96)]),
    "retired when it ends": (lives("n1", (0, 96)), AT_25, {"up": 96}, []),
    "back after its retirement": (lives("n1", (0, 96), (160, 240)), AT_25, {"up": 176, "unknown": 64}, [(96, 160)]),
    "not retired yet": (lives("n1", (0, 200)), LATER, {"up": 200, "unknown": 40}, [(200, None)]),
    "short ones are none": ([at(0, hours=6), at(6.4, hours=6)], None, {"up": 12, "unknown": 228}, [(12.4, None)]),
}


@pytest.mark.parametrize("case", CASES)
def test_silence_of_one_node(case: str) -> None:
    batches, node, parts, expected = CASES[case]
    report = uptime_of(days(*batches, nodes=["n1"]), END, nodes=[node] if node is not None else [])
    (one,) = report.nodes
    assert hours(one) == pytest.approx(parts)
    assert told(report) == [("n1", "silent", since, until) for since, until in expected]
    known = parts.get("up", 0) / sum(parts.values())
    assert one.known_share == pytest.approx(known)
    assert one.share == (1.0 if known >= LEAST_KNOWN else None)
    assert (one.retired, one.came_back) == (case.startswith("retired"), case.startswith("back"))


@pytest.mark.parametrize(
    ("records", "until", "cause"),
    [
        ([started(60 * 15)], 15, "crash"),
        ([started(60 * 15, "clean")], 15, "stopped"),
        ([started(60 * 15, "first")], 15, "silent"),
        ([], 15, "silent"),
    ],
)
def test_what_explains_silence_makes_it_down(records: list[Record], until: int, cause: str) -> None:
    report = uptime_of(days(*lives("n1", (0, 10), (16, 240)), at(15, records, hours=1, seq=1)), END)
    assert told(report) == [("n1", cause, 10, until)]
    assert hours(report.nodes[0]) == {"up": 235, ("unknown" if cause == "silent" else "down"): 5}


def test_peers_words_explain_silence_from_when_they_lost_the_node() -> None:
    """Several peers, at different times; its telemetry had been missing for longer."""
    rest = [at(hour, node="n2", hours=1) for hour in range(240)]
    words = [at(105, [down(105, seen=103)], node="n3"), at(106, [down(106, seen=104)], node="n2", seq=1)]
    report = uptime_of(days(*lives("n1", (0, 100)), *rest, *words), END)
    first = next(n for n in report.nodes if n.node == "n1")
    assert hours(first) == {"up": 100, "down": 136, "unknown": 4}
    assert [one for one in told(report) if one[0] == "n1"] == [("n1", "silent", 100, 104), ("n1", "unknown", 104, None)]
    seen = at(107, [PeerUp(t_ms=T0 + 107 * HOUR_MS, peer="n1", down_us=1)], node="n2", seq=2)
    again = uptime_of(days(*lives("n1", (0, 100)), *rest, *words, seen), END)
    assert [one for one in told(again) if one[0] == "n1"] == [("n1", "silent", 100, None)]


def test_peers_words_before_a_nodes_first_report_and_over_a_whole_period() -> None:
    peer = [at(hour, node="n2", hours=1) for hour in range(1, 240)]
    gone = at(0, [down(0.5)], node="n2", hours=1)
    first = uptime_of(days(*lives("n1", (30, 240)), gone, *peer), END)
    assert told(first) == [], "it was not there yet"
    back = uptime_of(days(BEFORE, *lives("n1", (30, 240)), gone, *peer), END)
    assert told(back) == [("n1", "network", 0, 30)]
    dead = uptime_of(days(BEFORE, gone, *peer, nodes=["n1"]), END, nodes=[Node(id="n1")])
    assert [(n, c, e) for n, c, _, e in told(dead)] == [("n1", "unknown", None)]
    assert dead.nodes[0].share == 0.0


def test_a_node_that_was_stopped_and_stays_away_is_silent_and_says_so() -> None:
    stop = AgentStopped(t_ms=T0 + 100 * HOUR_MS, reason="x")
    (incident,) = uptime_of(days(*lives("n1", (0, 99)), at(99, [stop], hours=1)), END).incidents
    assert (incident.cause, incident.end_ms) == ("silent", None)
    assert "stopped" in incident.text


@pytest.mark.parametrize("cause", sorted(COUNTS))
def test_an_operator_explains_silence_and_leaves_no_short_rest_of_it(cause: str) -> None:
    made = days(*lives("n1", (0, 100), (140, 240)))
    report = uptime_of(made, END, [note(cause, 100 * HOUR + 20, 120 * HOUR)])
    assert [(c, b, e) for _, c, b, e in told(report)] == [
        (cause, pytest.approx(100 + 1 / 3), 120),
        ("silent", 120, 140),
    ]
    assert report.incidents[0].confirmed
    words = msgspec.structs.replace(note("", 100 * HOUR, 140 * HOUR), text="The fuse.")
    (incident,) = uptime_of(made, END, [words]).incidents
    assert (incident.cause, incident.text, incident.confirmed) == ("silent", "The fuse.", True)


def test_silences_that_follow_closely_are_one_incident() -> None:
    made = [at(hour, node="n1") for hour in (0, 1, 2, 3)]
    (incident,) = uptime_of(days(*made), T0 + 4 * HOUR_MS).incidents
    assert (incident.cause, incident.times, incident.end_ms) == ("silent", 4, None)


def rack_of(*spans: tuple[tuple[float, float], ...]) -> Uptime:
    """n1, n2 and so on, configured, each reporting in its spans, and before."""
    nodes = [Node(id=f"n{k}") for k in range(1, len(spans) + 1)]
    made = [one for node, mine in zip(nodes, spans, strict=True) for one in lives(node.id, *mine)]
    made += [at(-5, node=node.id, hours=1) for node in nodes]
    return uptime_of(days(*made, nodes=[n.id for n in nodes]), END, nodes=nodes)


ALL, HALF = ((0.0, 240.0),), ((0.0, 100.0), (136.0, 240.0))


@pytest.mark.parametrize(
    ("spans", "rack", "shares"),
    [
        ((ALL, ALL, HALF, HALF), {"up": 240}, [1.0] * 4),
        ((HALF,) * 4, {"up": 204, "unknown": 36}, [1.0] * 4),
        ((((0, 100),), ((0, 60),)), {"up": 100, "unknown": 140}, [None, None]),
        ((ALL, ()), {"up": 240}, [1.0, None]),
    ],
    ids=["half dark", "all dark", "dark to the end", "one never"],
)
def test_a_dark_rack(
    spans: tuple[tuple[tuple[float, float], ...], ...], rack: dict[str, float], shares: list[float | None]
) -> None:
    report = rack_of(*spans)
    assert hours(report.rack) == rack
    assert [n.share for n in report.nodes] == shares
    silent = {n for n, cause, _, _ in told(report) if cause == "silent"}
    assert silent == {n.node for n in report.nodes if n.unknown_s}


def test_a_rack_without_a_node_for_a_while_has_no_time_then() -> None:
    made = days(*lives("old", (0, 48)), *lives("new", (120, 240)))
    report = uptime_of(made, END, nodes=[Node(id="old", retired=date(2026, 11, 23))])
    assert hours(report.rack) == {"up": 168}
    assert not report.incidents


def test_a_span_that_is_not_over_and_a_clock_ahead() -> None:
    ahead = msgspec.structs.replace(at(23.9), t_end_ms=T0 + 24 * HOUR_MS + 90_000)
    made = days(*lives("n1", (0, 24)), ahead, *lives("n2", (0, 24)))
    report = uptime_of(made, T0 + 24 * HOUR_MS)
    assert [n.known_share for n in report.nodes] == [1.0, pytest.approx(1 - 90 / (24 * 3600 + 90))]
    assert not report.incidents, "a minute and a half is no silence"
    later = uptime_of(made, T0 + 25 * HOUR_MS)
    assert told(later) == [("n2", "silent", 24, None), ("n1", "silent", 24.025, None)]


# requests


@pytest.mark.parametrize(
    ("ok", "against", "share", "known", "kept"),
    [
        (999, 1, 1.0, 1.0, True),
        (998, 2, 1.0, 1.0, False),
        (999, 1, 0.9, 1.0, False),
        (999, 1, 1.0, 0.9995, True),
        (999, 1, 1.0, 0.95, None),
        (999, 1, None, 0.5, None),
        (990, 10, None, 0.5, False),
        (0, 0, 1.0, 1.0, None),
        (0, 0, 0.5, 1.0, False),
        (0, 0, None, None, None),
    ],
)
def test_a_promise_is_kept_by_requests_and_by_time(
    ok: int, against: int, share: float | None, known: float | None, kept: bool | None
) -> None:
    empty = uptime(window(), ())
    rack = msgspec.structs.replace(empty.rack, share=share, known_share=known)
    asked = ok + against
    request_share = ok / asked if asked else None
    report = msgspec.structs.replace(
        empty, rack=rack, requests_ok=ok, requests_bad=against, request_share=request_share
    )
    assert report.kept(Scorecard()) is kept
    (line,) = (one for one in scorecard.lines(window(), report, None, Scorecard()) if one.kind == "uptime")
    assert line.kept is kept
    assert line.value == min((x for x in (request_share, share) if x is not None), default=None)
    if kept is False:
        assert line.value is not None
        assert line.value < line.target
    assert ("unknown (50 % of the time is known)" in line.text) == (known == 0.5)


def test_a_rack_that_was_dark_did_not_keep_its_promise_however_few_requests_failed() -> None:
    """What the finding had: 36 hours, nobody who could record a failure; and as many refused as answered on a day."""
    back = AgentStarted(t_ms=T0 + 136 * HOUR_MS, version="0", previous="unclean")
    made = [*lives("n1", (0, 100), (137, 240)), at(136, [back], hours=1, seq=1)]
    made.append(at(10.5, [served(requests=100_000), served(requests=40, outcome="failed")], seq=2))
    dark = uptime_of(days(*made), END)
    assert dark.request_share == 100_000 / 100_040
    assert dark.rack.share == 204 / 240
    assert dark.kept(Scorecard()) is False
    assert dark.worse == 204 / 240
    full = at(11.5, [served(requests=6_469, outcome="refused", finish="capacity")], seq=3)
    up = uptime_of(days(*lives("n1", (0, 240)), made[-1], full), END)
    assert (up.rack.share, up.kept(Scorecard())) == (1.0, False)
    page = markdown.render(uptime_page.page(up, "w", "UTC", "r")).decode()
    assert "Not answered: 40 failed, 6,469 refused for want of capacity." in page


# the pages, and whole commands


def shown(report: Uptime) -> str:
    return markdown.render(uptime_page.page(report, "w", "UTC", "r")).decode()


def test_a_page_gives_no_percentage_of_what_is_not_known() -> None:
    text = shown(rack_of(((0, 40),), ((0, 20),)))
    assert "How long the rack was up is unknown (16 % of the time is known); 200.0 h are unknown." in text
    assert text.count("unknown (16 % of the time is known)") == 3
    assert "unknown (8 % of the time is known)" in text
    assert "100.000 %" not in text
    nearly = shown(rack_of(((0, 191),)))
    assert "unknown (79 % of the time is known)" in nearly, "never rounded to what would have been enough"
    assert "No node reported anything." in shown(uptime(window(), ()))
    excused = uptime_of(days(BEFORE, nodes=["n1"]), END, [note("planned", 0, 240 * HOUR)], [Node(id="n1")])
    assert "All of the rack's time is excused." in shown(excused)
    single = [at(0, [served(requests=1), served(requests=1, outcome="refused", finish="limit")])]
    assert "100.000 % of 1 request was answered" in shown(uptime_of(days(*single), T0 + MINUTE))


def test_a_silent_node_is_in_the_reports_of_a_week_and_of_a_month(tmp_path: Path) -> None:
    """It reported in the week before, and never again; another one is back after its retirement."""
    store = DirectoryStore(tmp_path)
    day = 24 * HOUR
    for n, (node, minute) in enumerate((("dead", -8 * day), ("n1", -8 * day), ("n1", 0), ("n1", 5), ("back", 1))):
        put(store, batch([resident()], node=node, minute=minute, seq=n + 1))
    nodes = (Node(id="dead"), Node(id="n1"), Node(id="back", retired=date(2026, 11, 18)), Node(id="new"))
    config = msgspec.structs.replace(CONFIG, nodes=nodes)
    rollup.run(config, store)
    weekly.run(config, store, "2026-W47")
    stored = load.newest_report(store, "weekly", "2026-W47", "uptime", "md")
    assert stored is not None
    page = stored.body.decode()
    (row,) = [line for line in page.splitlines() if line.startswith("| dead | 0 s")]
    assert "unknown (0 % of the time is known)" in row
    assert "| dead | node | lasts |" in page
    assert "back reported after the date on which its [[nodes]] table retires it, and counts until its" in page
    assert "none of these figures" not in page
    assert "| new |" not in page
    (key,) = (key for key in monthly.run(config, store, "2026-11") if key.endswith(".json"))
    found = msgspec.json.decode(store.get(key, 1 << 26).body)["uptime"]
    assert [n["node"] for n in found["nodes"]] == ["back", "dead", "n1"]
    weekly.run(CONFIG, store, "2026-W47")
    stored = load.newest_report(store, "weekly", "2026-W47", "uptime", "md")
    assert stored is not None
    assert b"dead reported in 2026-W46 and nothing in this period" in stored.body, "it is not configured"


# properties

RACKS = st.lists(st.tuples(LIVES, st.integers(0, 60), st.sampled_from(["unclean", "epoch", "none"])), max_size=3)
NOTES = st.lists(st.tuples(st.sampled_from(sorted(COUNTS)), st.integers(-10, 400), st.integers(0, 300)), max_size=3)
WORDS = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 400), st.booleans()), max_size=4)
RETIRED = st.sampled_from([None, date(2026, 11, 21), date(2026, 11, 22)])


def made_of(
    racks: list[tuple[list[tuple[int, int, bool, int]], int, str]], words: list[tuple[int, int, bool]]
) -> list[Batch]:
    made = [
        one
        for number, (mine, late, failing) in enumerate(racks, 1)
        for one in history(mine, failing=failing, node=f"n{number}", late=late)
    ]
    for minute, (peer, t, is_down) in enumerate(words):
        t_ms = T0 + t * MINUTE
        record = (
            PeerDown(t_ms=t_ms, peer=f"n{peer}", last_seen_ms=t_ms)
            if is_down
            else PeerUp(t_ms=t_ms, peer=f"n{peer}", down_us=1)
        )
        made.append(batch([record], node="watcher", minute=minute))
    return made


@settings(max_examples=150)
@given(RACKS, WORDS, NOTES, RETIRED, st.sets(st.integers(1, 3)))
def test_every_second_of_a_nodes_time_is_one_thing_and_silence_is_never_up(
    racks: list[tuple[list[tuple[int, int, bool, int]], int, str]],
    words: list[tuple[int, int, bool]],
    causes: list[tuple[str, int, int]],
    retired: date | None,
    before: set[int],
) -> None:
    made = made_of(racks, words)
    made += [batch(node=f"n{number}", minute=-600, seq=99_999) for number in before]
    nodes = [Node(id="n1", retired=retired), Node(id="n2"), Node(id="n3")]
    found = window(*made, nodes=[n.id for n in nodes])
    tenures = fleet(found, nodes, T0 + 500 * MINUTE)
    notes = [note(cause, start, start + length, "") for cause, start, length in causes]
    report = uptime(found, tenures, notes)
    for one, tenure in zip(report.nodes, tenures, strict=True):
        assert one.up_s + one.idle_s == seconds(tenure.reported)
        assert one.known_s + one.excused_s + one.unknown_s == pytest.approx((tenure.until_ms - tenure.known_ms) / 1000)
        assert (one.share is None) == (one.known_share is None or one.known_share < LEAST_KNOWN or not one.known_s)
    rack, each = report.rack, report.nodes
    parts = ("up_s", "idle_s", "down_s", "unknown_s", "excused_s")
    assert all(getattr(rack, name) >= 0 for name in parts)
    for name in ("up_s", "down_s", "unknown_s", "excused_s"):
        assert getattr(rack, name) <= sum(getattr(n, name) for n in each) + 1e-6
    assert rack.up_s >= max((n.up_s for n in each), default=0.0)
    assert rack.up_s + rack.idle_s >= max((n.up_s + n.idle_s for n in each), default=0.0)
    whole = union((t.known_ms, t.until_ms) for t in tenures)
    assert sum(getattr(rack, name) for name in parts) == pytest.approx(seconds(whole))
    for incident in report.incidents:
        mine = next(t for t in tenures if t.node == incident.node)
        assert incident.cause in {*COUNTS, incidents.SILENT}
        assert mine.known_ms <= incident.start_ms < (incident.end_ms or mine.until_ms) <= mine.until_ms
        assert incident.end_ms is not None or not mine.retired


@settings(max_examples=100)
@given(RACKS, st.lists(st.tuples(st.integers(1, 3), st.integers(0, 400)), max_size=6))
def test_more_reports_never_make_less_known(
    racks: list[tuple[list[tuple[int, int, bool, int]], int, str]], more: list[tuple[int, int]]
) -> None:
    """A report within silence that a restart explained shows that it was none; what is reported stays."""
    made = made_of(racks, [])
    plain = [msgspec.structs.replace(b, records=()) for b in made]
    added = [batch(node=f"n{node}", minute=minute, seq=90_000 + minute) for node, minute in more]
    for batches, is_plain in ((made, False), (plain, True)):
        before, after = (uptime_of(window(*batches, *extra), T0 + 500 * MINUTE) for extra in ([], added))
        later = {n.node: n for n in after.nodes}
        for one in before.nodes:
            assert later[one.node].up_s + later[one.node].idle_s >= one.up_s + one.idle_s
            assert not is_plain or later[one.node].known_s >= one.known_s
        assert after.rack.up_s + after.rack.idle_s >= before.rack.up_s + before.rack.idle_s


@given(*([st.none() | st.floats(0, 1, allow_nan=False)] * 2), st.floats(0, 1, allow_nan=False))
def test_a_promise_is_kept_only_if_both_keep_it(
    by_requests: float | None, by_time: float | None, target: float
) -> None:
    empty = uptime(window(), ())
    rack = msgspec.structs.replace(empty.rack, share=by_time, known_share=1.0)
    report = msgspec.structs.replace(empty, rack=rack, request_share=by_requests)
    kept = report.kept(Scorecard(uptime=target))
    both = [x is not None and x >= target for x in (by_requests, by_time)]
    assert (kept is True) == all(both)
    assert (kept is False) == any(x is not None and x < target for x in (by_requests, by_time))
