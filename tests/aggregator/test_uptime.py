"""The rules of uptime: a node's time begins with its first report, an attempt to start is no life, and an operator's
account of an interval changes that interval and nothing else."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import annotations, load
from aggregator.annotations import COUNTS, Annotation
from aggregator.calendar import month
from aggregator.commands import rollup, weekly
from aggregator.report import markdown
from aggregator.report.pages import uptime as uptime_page
from aggregator.uptime import cut
from shared.batch import Batch
from shared.records import AgentStarted, AgentStopped, PeerDown, Record
from shared.store_dir import DirectoryStore
from tests.aggregator.test_rollup import CONFIG, put
from tests.builders import MINUTE, T0, batch, resident, uptime_of, window

HOUR = 60 * MINUTE


def started(minute: int, previous: str = "unclean") -> AgentStarted:
    return AgentStarted(t_ms=T0 + minute * MINUTE, version="0", previous=previous)


def note(cause: str, start: int, end: int, node: str = "n1") -> Annotation:
    return Annotation(start_ms=T0 + start * MINUTE, end_ms=T0 + end * MINUTE, node=node, cause=cause)


def life(node: str, first: int, minutes: int, *, epoch: int, previous: str, stops: bool) -> list[Batch]:
    """The batches of one life of an agent, a minute each."""
    made = []
    for at in range(minutes):
        records: list[Record] = [resident()]
        records += [started(first, previous)] if at == 0 else []
        records += (
            [AgentStopped(t_ms=T0 + (first + minutes) * MINUTE, reason="x")] if stops and at == minutes - 1 else []
        )
        made.append(batch(records, node=node, minute=first + at, seq=at + 1, epoch=epoch))
    return made


LIVES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=5
)
"""Minutes of silence before a life, its length, whether it was stopped, and starts that failed before it."""


def history(lives: list[tuple[int, int, bool, int]], *, failing: str, node: str = "n1", late: int = 0) -> list[Batch]:
    """Batches of some lives. Starts that failed raise the epoch; ``failing`` is what an agent makes of them for the
    ``previous`` of the next start: nothing, or (from the first versions) an unclean end."""
    made: list[Batch] = []
    at, epoch, previous = late, 0, "first"
    for silence, minutes, stops, failed in lives:
        at, epoch = at + silence, epoch + 1 + (failed if failing != "none" else 0)
        said = "unclean" if failing == "unclean" and failed else previous
        made += life(node, at, minutes, epoch=epoch, previous=said, stops=stops)
        at, previous = at + minutes, "clean" if stops else "unclean"
    return made


@settings(max_examples=150)
@given(LIVES, st.integers(0, 60), st.lists(st.sampled_from(sorted(COUNTS)), max_size=3))
def test_no_time_before_a_nodes_first_report_is_counted(
    lives: list[tuple[int, int, bool, int]], late: int, causes: list[str]
) -> None:
    made = history(lives, failing="unclean", late=late)
    # peers knew the node before its first report, and an operator's intervals begin before it
    gone = PeerDown(t_ms=T0 + MINUTE, peer="n1", last_seen_ms=T0)
    notes = [note(cause, -10, 400, node) for cause, node in zip(causes, ("n1", "", "n1"), strict=False)]
    report = uptime_of(window(*made, batch([gone], node="n2")), T0 + 500 * MINUTE, notes)
    node = next(n for n in report.nodes if n.node == "n1")
    first = min(b.t_start_ms for b in made)
    sums = node.up_s + node.idle_s + node.down_s + node.unknown_s + node.excused_s
    assert sums == pytest.approx((T0 + 500 * MINUTE - first) / 1000)
    assert all(i.start_ms >= first for i in report.incidents if (i.node, i.scope) == ("n1", "node"))
    assert all(value >= 0 for value in msgspec.structs.astuple(node)[1:5])


@settings(max_examples=150)
@given(LIVES)
def test_starts_that_failed_change_no_figure(lives: list[tuple[int, int, bool, int]]) -> None:
    """As the agent reports them, anywhere; as an older one did, wherever the facts tell otherwise."""
    now = T0 + 500 * MINUTE
    without = uptime_of(window(*history(lives, failing="none")), now)
    assert uptime_of(window(*history(lives, failing="epoch")), now) == without
    stopped = [(silence, minutes, True, failed) for silence, minutes, _, failed in lives]
    assert uptime_of(window(*history(stopped, failing="unclean")), now) == uptime_of(
        window(*history(stopped, failing="none")), now
    )


def test_a_stop_is_the_cause_whatever_was_tried_before_the_next_good_start() -> None:
    made = [
        *life("n1", 0, 3, epoch=1, previous="first", stops=True),
        *life("n1", 10, 3, epoch=3, previous="unclean", stops=False),
    ]
    (incident,) = uptime_of(window(*made), T0 + 13 * MINUTE).incidents
    assert (incident.cause, incident.text) == ("stopped", "agent stopped by an operator")


def test_a_slow_start_still_explains_the_gap_that_it_ended() -> None:
    """The window begins when the agent does, the event comes when it serves."""
    late = msgspec.structs.replace(started(5), t_ms=T0 + 5 * MINUTE + 40_000)
    made = [batch([resident()]), batch([late, resident()], minute=5, seq=1, epoch=2)]
    (incident,) = uptime_of(window(*made), T0 + 6 * MINUTE).incidents
    assert incident.cause == "crash"


def test_the_tables_tell_a_new_node_from_one_that_was_down_when_the_span_began(tmp_path: Path) -> None:
    """Both report first in the middle of the month, after a start that an older agent calls unclean."""
    store = DirectoryStore(tmp_path)
    october = -60 * 24 * 40
    put(store, *(batch([resident()], node="old", minute=october + n, seq=n + 1) for n in range(3)))
    for node in ("old", "new"):
        put(store, batch([started(0), resident()], node=node, minute=0, seq=1, epoch=9))
    rollup.run(CONFIG, store)
    found = load.window(store, month("2026-11", "UTC"))
    assert found.reported_before == {"old"}
    report = uptime_of(found, T0 + MINUTE)
    assert {n.node: (n.up_s, n.down_s) for n in report.nodes} == {"old": (60.0, 20 * 86_400.0), "new": (60.0, 0.0)}
    assert report.rack.down_s == 20 * 86_400.0, "the old one was all of the rack"
    assert load.window(store, month("2026-10", "UTC")).reported_before == frozenset()


def test_what_is_no_table_of_an_earlier_day_keeps_no_report_from_being_made(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    october = -60 * 24 * 40
    put(store, *(batch([resident()], node="old", minute=october + n, seq=n + 1) for n in range(3)))
    for node in ("old", "new"):
        put(store, batch([started(0), resident()], node=node, minute=0, seq=1, epoch=9))
    rollup.run(CONFIG, store)
    for name in ("x.tmp", "dt=2026-99-99/part.parquet", "dt=2026-10-20/part.parquet", "dt=2026-10-21/part.parquet"):
        store.put(f"day/v1/table=cover/{name}", b"PAR1 cut short" * len(name))
    assert load.window(store, month("2026-11", "UTC")).reported_before == {"old"}


def test_a_node_that_was_down_was_down_after_it_was_replaced_too() -> None:
    """Its peers saw it; the new state folder knows nothing of the old one."""
    down = PeerDown(t_ms=T0 + 2 * MINUTE, peer="n1", last_seen_ms=T0 + MINUTE)
    dead = [batch([resident()]), *(batch([down] if n == 1 else [], node="n2", minute=n) for n in range(60))]
    new = msgspec.structs.replace(batch([started(50, "first"), resident()], minute=50, seq=1), incarnation=2)
    before, after = (uptime_of(window(*dead, *more), T0 + 50 * MINUTE) for more in ([], [new]))
    assert [n.down_s for n in before.nodes] == [3540.0, 0.0]
    assert [(n.down_s, n.unknown_s) for n in after.nodes] == [(2940.0, 540.0), (0.0, 0.0)]
    assert [(i.cause, i.text) for i in after.incidents] == [(i.cause, i.text) for i in before.incidents]
    unseen = uptime_of(window(dead[0], new), T0 + 51 * MINUTE)
    assert (unseen.nodes[0].down_s, unseen.nodes[0].unknown_s) == (0.0, 2940.0), "nobody saw it"


def test_a_node_that_is_silent_for_the_whole_period_is_named(tmp_path: Path) -> None:
    """It is in no figure, and the others' would look like a whole rack's."""
    store = DirectoryStore(tmp_path)
    day = 24 * 60
    for n, (node, at) in enumerate((("dead", -8 * day), ("n1", -8 * day), ("n1", 0), ("n1", 3 * day))):
        put(store, batch([resident()], node=node, minute=at, seq=n + 1))
    rollup.run(CONFIG, store)
    for name, there in (("2026-W46", False), ("2026-W47", True), ("2026-W48", False)):
        (page,) = (key for key in weekly.run(CONFIG, store, name) if key.endswith("/uptime-r1.md"))
        said = "dead reported in 2026-W46 and nothing in this period" in store.get(page, 1 << 20).body.decode()
        assert said == there, name


# annotations


CRASHED = [
    *(batch([resident()], minute=n) for n in range(10)),
    batch([started(70), resident()], minute=70, seq=1, epoch=2),
]
"""Up for 10 minutes, an unclean restart after 60, up for a minute."""
SILENT = [*(batch([resident()], minute=n) for n in range(10)), batch([resident()], minute=70, seq=11)]
"""The same without anything that explains the hour."""


@pytest.mark.parametrize("cause", sorted(COUNTS))
@pytest.mark.parametrize("made", [CRASHED, SILENT], ids=["down", "unknown"])
def test_what_silence_counts_as_by_cause(cause: str, made: list[Batch]) -> None:
    """The closed table of docs/reports.md: the first half of the hour is annotated, the second is as it was."""
    before = uptime_of(window(*made), T0 + 71 * MINUTE).nodes[0]
    report = uptime_of(window(*made), T0 + 71 * MINUTE, [note(cause, 5, 40)])
    node, was = report.nodes[0], "down" if made is CRASHED else "unknown"
    expected = {"down": 0.0, "excused": 0.0, "unknown": 0.0}
    expected[COUNTS[cause]] += 1800.0
    expected[was] += 1800.0
    assert {"down": node.down_s, "excused": node.excused_s, "unknown": node.unknown_s} == expected
    assert node.up_s == before.up_s == 660.0, "what a node reported stands"
    rack = report.rack
    assert {"down": rack.down_s, "excused": rack.excused_s, "unknown": rack.unknown_s} == expected
    known = (660 + expected["down"]) / (4260 - expected["excused"])
    assert node.known_share == pytest.approx(known)
    assert node.share == (pytest.approx(660 / (660 + expected["down"])) if known >= 0.8 else None)
    confirmed = [(i.start_ms - T0, i.end_ms and i.end_ms - T0, i.cause) for i in report.incidents if i.confirmed]
    assert confirmed == [(10 * MINUTE, 40 * MINUTE, cause)]
    rest = [(i.start_ms - T0, i.cause) for i in report.incidents if not i.confirmed]
    assert rest == [(40 * MINUTE, "crash" if made is CRASHED else "silent")]


def test_words_alone_change_no_sum() -> None:
    words = [Annotation(start_ms=T0, end_ms=T0 + 80 * MINUTE, text="The fuse.")]
    plain, told = (uptime_of(window(*CRASHED), T0 + 71 * MINUTE, notes) for notes in ((), words))
    assert (plain.nodes, plain.rack) == (told.nodes, told.rack)
    assert [(i.cause, i.text, i.confirmed) for i in told.incidents] == [("crash", "The fuse.", True)]


def test_the_first_of_two_annotations_holds_and_others_nodes_are_left_alone() -> None:
    notes = [note("planned", 10, 40), note("power", 30, 70), note("other", 0, 80, node="n2")]
    node = uptime_of(window(*CRASHED), T0 + 71 * MINUTE, notes).nodes[0]
    assert (node.excused_s, node.down_s, node.unknown_s) == (1800.0, 1800.0, 0.0)


def test_an_open_incident_that_is_excused_stays_open() -> None:
    down = PeerDown(t_ms=T0 + 2 * MINUTE, peer="n1", last_seen_ms=T0 + MINUTE)
    made = [batch(), batch([down], node="n2"), *(batch(node="n2", minute=n) for n in range(1, 10))]
    report = uptime_of(window(*made), T0 + 10 * MINUTE, [note("planned", 0, 600)])
    (incident,) = report.incidents
    assert (incident.cause, incident.end_ms, incident.confirmed) == ("planned", None, True)
    (first, _) = report.nodes
    assert (first.down_s, first.excused_s) == (0.0, 540.0)


def test_the_rack_is_excused_only_where_no_node_is_down_for_another_reason() -> None:
    """n1 is at planned work for the hour; n2 crashes in its second half."""
    other = [
        *(batch([resident()], node="n2", minute=n) for n in range(40)),
        batch([started(70), resident()], node="n2", minute=70, seq=1, epoch=2),
    ]
    report = uptime_of(window(*CRASHED, *other), T0 + 71 * MINUTE, [note("planned", 10, 70)])
    assert (report.rack.up_s, report.rack.down_s, report.rack.excused_s) == (2460.0, 1800.0, 0.0)
    both = uptime_of(window(*CRASHED, *other), T0 + 71 * MINUTE, [note("planned", 10, 70, node="")])
    assert (both.rack.down_s, both.rack.excused_s) == (0.0, 1800.0)


FILE = b"""
[[incidents]]
node = "n1"
start = 2026-11-21T00:00:00Z
end = 2026-11-21T02:00:00Z
cause = "other"

[[incidents]]
start = 2026-11-21T00:00:00Z
end = 2026-11-21T02:00:00Z
cause = "gremlins"

[[incidents]]
start = 2026-11-21T00:00:00
end = 2026-11-21T02:00:00Z

[[incidents]]
start = "noon"
end = 3

[[incidents]]
start = 2026-11-21T00:00:00Z
end = 2026-11-21T02:00:00Z
casue = "power"

[[incidents]]
node = "n7"
start = 2026-11-21T00:00:00Z
end = 2026-11-21T02:00:00Z
cause = "power"
"""


def test_a_wrong_entry_is_told_on_the_page_and_the_rest_of_the_file_counts(tmp_path: Path) -> None:
    found = annotations.read(FILE)
    assert [one.node for one in found.entries] == ["n1", "n7"]
    assert [why.split(":")[1] for why in found.refused] == [f" entry {n} is not used" for n in (2, 3, 4, 5)]
    for cause in COUNTS:
        assert cause in found.refused[0]
    store = DirectoryStore(tmp_path)
    store.put(annotations.KEY, FILE)
    put(store, *(batch([resident()], minute=n) for n in range(10)))
    put(store, batch([started(70), resident()], minute=70, seq=1, epoch=2))
    rollup.run(CONFIG, store)
    weekly.run(CONFIG, store, "2026-W47")
    stored = load.newest_report(store, "weekly", "2026-W47", "uptime", "md")
    assert stored is not None
    page = stored.body.decode()
    assert "gremlins" in page
    assert "n7, which reported nothing" in page
    assert "not held against the rack" in page
    text = markdown.render(uptime_page.page(uptime_of(window(*CRASHED), T0), "w", "UTC", "r")).decode()
    assert "Excused" in text


def test_the_documentation_has_the_table_of_causes() -> None:
    text = Path("docs/reports.md").read_text(encoding="utf-8")
    table = text[text.index("| `cause`") :].split("\n\n")[0]
    for cause, counts in COUNTS.items():
        (row,) = [line for line in table.splitlines() if f"`{cause}`" in line.split("|")[1]]
        assert counts in row.split("|")[-2], row


@pytest.mark.parametrize(
    ("share", "digits", "shown"),
    [
        (0.99959325, 2, "99.95 %"),
        (0.99959325, 3, "99.959 %"),
        (0.99899999, 2, "99.89 %"),
        (0.999, 2, "99.90 %"),
        (0.9999999, 3, "99.999 %"),
        (1.0, 3, "100.000 %"),
        (0.58, 2, "58.00 %"),
        (0.0, 2, "0.00 %"),
    ],
)
def test_a_share_is_cut_off_so_that_nothing_looks_kept_that_is_not(share: float, digits: int, shown: str) -> None:
    assert cut(share, digits) == shown


@given(st.integers(0, 10**5))
def test_a_share_of_whole_digits_is_shown_as_it_is(thousandths: int) -> None:
    assert cut(thousandths / 10**5, 3) == f"{thousandths // 1000}.{thousandths % 1000:03d} %"
