"""Buckets that one node, or a store, has spoiled: the others' numbers stand, the report says what is missing."""

import errno
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import duckdb
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.files.model_pull import BucketSource
from agent.telemetry.pusher import SEGMENT_BATCHES
from aggregator import cli, load, parquet, publish
from aggregator.calendar import DAY_MS, month
from aggregator.commands import alert, prune, rollup, sync
from aggregator.judgements import judge
from aggregator.manifest import Manifest, Unread, encode, parse
from aggregator.notify import Discord
from aggregator.raw import ingest
from aggregator.raw.progress import SKIP_AFTER_MS, Outcome, Pending, Progress, node_of
from aggregator.report import wording
from aggregator.window import meta_of
from shared import desired, keys
from shared.batch import Batch, seal
from shared.errors import Refused, Retryable
from shared.ids import NodeId
from shared.records import Served
from shared.store import ObjectStore, Stored, each, list_all
from shared.store_dir import DirectoryStore
from tests.aggregator.test_bucket import CONFIG, directory, put, rows
from tests.builders import T0, batch, engine, host, resident, served, window

MOST = 1 << 30


def minute(n: int, node: str = "n1") -> Batch:
    return batch([served(requests=n + 1, worker=node), engine(), resident(), host()], node=node, minute=n)


def key_of(one: Batch) -> str:
    return keys.batch_key(keys.RawKey(NodeId(one.node), one.incarnation, one.epoch, one.seq, one.seq))


def requests_by_node(store: ObjectStore) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in load.window(store, month("2026-11", "UTC")).served:
        found[one.worker] = found.get(one.worker, 0) + one.requests
    return found


class Sick(DirectoryStore):
    """Gives out some objects, or some listings, never."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.lost: tuple[str, ...] = ()
        self.unlisted: tuple[str, ...] = ()
        self.gets_left, self.gets, self.lists = 1 << 30, 0, 0

    def get(self, key: str, most_bytes: int) -> Stored:
        self.gets += 1
        self.gets_left -= key.startswith("raw/")
        if (self.lost and key.startswith(self.lost)) or (self.gets_left < 0 and key.startswith("raw/")):
            raise Retryable(f"get {key}: store busy or unavailable (500 InternalError)")
        return super().get(key, most_bytes)

    def list_after(self, prefix: str, after: str = "", limit: int = 1000) -> list:  # type: ignore[type-arg]
        self.lists += 1
        if self.unlisted and prefix.startswith(self.unlisted):
            raise Retryable(f"list {prefix}: store busy or unavailable (500 InternalError)")
        return super().list_after(prefix, after, limit)


# what one node can send


def bombs(count: int) -> Iterator[Batch]:
    """616 bytes that become 8.6 MB, each."""
    for n in range(count):
        yield batch([Served(model="m", requests=1)] * 5_000, node="bomb", minute=n)


def test_bombs_of_one_node_cost_the_others_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    for one in bombs(24):
        # several in one segment: a batch alone stays under the limits
        put(store, *(msgspec.structs.replace(one, seq=one.seq * 100 + k) for k in range(12)))
    for node in ("n1", "n2"):
        put(store, minute(1, node))
    monkeypatch.setattr(rollup, "SPILL_BYTES", 4 << 20)
    assert cli.main(["rollup", "--json", "--config", str(directory(tmp_path))]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["batches"] == 2
    assert said["quarantined_total"] == 24
    assert requests_by_node(store) == {"n1": 2, "n2": 2}
    reasons = {one.reason for m in manifests(store) for one in m.quarantined}
    assert all("more than 100 times as many" in reason for reason in reasons)


def manifests(store: ObjectStore) -> list[Manifest]:
    return [parse(store.get(o.key, MOST).body, o.key) for o in list_all(store, keys.MANIFEST_PREFIX)]


def test_too_many_records_for_a_minute_are_quarantined(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    key = put(store, batch([Served(model=f"m{n}", requests=n) for n in range(6_000)], node="bomb"))
    put(store, minute(1))
    (bad,) = rollup.run(CONFIG, store).quarantined
    assert (bad.key, "6000 records, the limit is 5000" in bad.reason) == (key, True)
    assert requests_by_node(store) == {"n1": 2}


def daily(first: int, count: int, node: str = "n1", step_ms: int = -DAY_MS) -> list[Batch]:
    """Batches of consecutive numbers, each of another day."""
    made = [batch([served(worker=node)], node=node, minute=0, seq=first + n) for n in range(count)]
    shifted = [T0 + (first + n - 1) * step_ms for n in range(count)]
    return [
        msgspec.structs.replace(one, t_start_ms=t_ms, t_end_ms=t_ms + 60_000)
        for one, t_ms in zip(made, shifted, strict=True)
    ]


def skewed(count: int) -> list[Batch]:
    """Batches of one minute, whose clock is said to be off by other days each."""
    made = daily(1, count, step_ms=0)
    return [msgspec.structs.replace(one, clock_skew_ms=n * DAY_MS) for n, one in enumerate(made)]


@pytest.mark.parametrize("each_ms", [-DAY_MS, DAY_MS, 7 * DAY_MS, None])
def test_a_segment_of_more_days_than_windows_fit_is_quarantined(tmp_path: Path, each_ms: int | None) -> None:
    store = DirectoryStore(tmp_path)
    bad = put(store, *(daily(1, 1_500, step_ms=each_ms) if each_ms else skewed(1_500)))
    put(store, minute(0, "n2"))
    made = rollup.run(CONFIG, store)
    assert [one.key for one in made.quarantined] == [bad]
    assert "no agent writes such a segment" in made.quarantined[0].reason
    assert (made.batches, len(made.days)) == (1, 1)


@pytest.mark.parametrize("each_ms", [-DAY_MS, DAY_MS, -40 * DAY_MS])
def test_a_node_that_was_off_for_two_months_counts_whatever_it_slept(tmp_path: Path, each_ms: int) -> None:
    store = DirectoryStore(tmp_path)
    late = daily(1, SEGMENT_BATCHES, step_ms=each_ms)  # the longest gaps that the windows of one segment can have
    found, reason = ingest.read(store, put(store, *late), "r")
    assert (len(found), reason) == (SEGMENT_BATCHES, "")


def test_many_days_are_committed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path)
    monkeypatch.setattr(ingest, "SPILL_DAYS", 4)
    for first in range(1, 16, 3):
        put(store, *daily(first, 3))
    put(store, minute(0, "n2"))
    made = rollup.run(CONFIG, store)
    commits = manifests(store)
    assert (made.batches, len(made.days), made.segments) == (16, 15, 6)
    new = [len(after.days) - len(before.days) for before, after in pairwise(commits)]
    assert max([len(commits[0].days), *new]) <= 6
    assert commits[0].batches > 3, "the other node's are not kept waiting"
    assert rollup.run(CONFIG, store).number == made.number, "nothing is left"


def test_a_piece_that_unpacks_to_much_is_committed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = DirectoryStore(tmp_path / "whole"), DirectoryStore(tmp_path / "parts")
    for store in (whole, parts):
        for node in ("n1", "n2"):
            for n in range(12):
                put(store, minute(n, node))
    rollup.run(CONFIG, whole)
    monkeypatch.setattr(rollup, "SPILL_BYTES", 10_000)
    last = rollup.run(CONFIG, parts)
    assert last.number > 3
    assert (last.batches, last.segments) == (24, 24)
    assert [m.segments for m in manifests(parts)] == sorted(m.segments for m in manifests(parts))
    for prefix in keys.TABLE_PREFIXES:
        for one in list_all(whole, prefix):
            assert whole.get(one.key, MOST).body == parts.get(one.key, MOST).body, one.key


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_takes_smaller_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path)
    for n in range(12):
        put(store, minute(n))
    spill, seen = ingest.spill, list[int]()

    def small(store: ObjectStore, rack: str, wanted: Sequence[str], folder: Path, most_bytes: int) -> list[Outcome]:
        seen.append(len(wanted))
        return spill(store, rack, wanted, folder, most_bytes) if len(wanted) <= 3 else full()  # type: ignore[return-value,func-returns-value]

    monkeypatch.setattr(ingest, "spill", small)
    assert rollup.run(CONFIG, store).batches == 12
    assert seen[:3] == [12, 6, 3]


@pytest.mark.parametrize(
    "where", ["aggregator.raw.ingest.spill", "aggregator.publish.renew_day", "aggregator.parquet.merged"]
)
def test_a_disk_too_full_for_anything_is_a_sentence(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(DirectoryStore(tmp_path / "bucket"), minute(1))
    monkeypatch.setattr(where, full)
    assert cli.main(["rollup", "--config", str(directory(tmp_path))]) == 75
    error = capsys.readouterr().err
    assert "is full" in error
    assert "set TMPDIR" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("number", "status"), [(errno.ENOSPC, 75), (errno.EIO, 1), (errno.EROFS, 1), (errno.EMFILE, 1), (None, 1)]
)
def test_no_error_of_this_machine_is_a_traceback(
    number: int | None, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(number, "strange") if number else OSError("strange")

    monkeypatch.setattr("aggregator.load.window", broken)
    config = directory(tmp_path)
    for verb in ("weekly", "monthly"):
        assert cli.main([verb, "--config", str(config)]) == status
        assert "Traceback" not in capsys.readouterr().err


# what a store can withhold


def test_an_object_that_cannot_be_read_makes_only_its_node_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Sick(tmp_path / "bucket")
    for node in ("n1", "n2", "n3"):
        for n in range(4):
            put(store, minute(n, node))
    store.lost = (key_of(minute(1, "n2")),)
    monkeypatch.setattr(cli, "open_store", lambda *_: store)
    config = str(directory(tmp_path))
    assert cli.main(["rollup", "--config", config]) == 0
    assert store.lost[0] in capsys.readouterr().err
    assert requests_by_node(store) == {"n1": 10, "n2": 1, "n3": 10}
    first = load.newest_manifest(store)
    assert list(first.unread) == [store.lost[0]]
    put(store, minute(4, "n1"))
    again = rollup.run(CONFIG, store)
    assert again.unread == first.unread, "since the first time"
    said = " ".join(wording.remarks(judge(window(), None, CONFIG, T0, (), again).telemetry, "UTC"))
    assert store.lost[0] in said
    assert "500 InternalError" in said
    store.lost = ()
    healed = rollup.run(CONFIG, store)
    assert (healed.unread, healed.quarantined_total) == ({}, 0)
    assert requests_by_node(store) == {"n1": 15, "n2": 10, "n3": 10}


def test_an_object_that_stays_unreadable_is_passed_over_after_three_days(tmp_path: Path) -> None:
    store = Sick(tmp_path)
    for n in range(3):
        put(store, minute(n, "n2"))
    put(store, minute(0))
    store.lost = (key_of(minute(1, "n2")),)
    first = rollup.run(CONFIG, store)
    since = {key: Unread(reason=one.reason, since_ms=one.since_ms - SKIP_AFTER_MS) for key, one in first.unread.items()}
    publish.commit(store, msgspec.structs.replace(first, number=first.number + 1, unread=since))
    last = rollup.run(CONFIG, store)
    assert requests_by_node(store) == {"n1": 1, "n2": 4}
    assert last.unread == {}
    assert [(one.key, "passed over" in one.reason) for m in manifests(store) for one in m.quarantined] == [
        (store.lost[0], True)
    ]


def test_a_node_whose_folder_cannot_be_listed_stops_nobody(tmp_path: Path) -> None:
    store = Sick(tmp_path)
    for node in ("n1", "n2"):
        put(store, minute(1, node))
    store.unlisted = ("raw/v1/node=n1/",)
    rollup.run(CONFIG, store)
    assert requests_by_node(store) == {"n2": 2}
    store.unlisted = ()
    rollup.run(CONFIG, store)
    assert requests_by_node(store) == {"n1": 2, "n2": 2}


def test_a_store_that_gives_out_nothing_is_tried_again_later(tmp_path: Path) -> None:
    store = Sick(tmp_path)
    put(store, minute(1))
    store.lost = ("raw/",)
    with pytest.raises(Retryable, match="nothing new could be read"):
        rollup.run(CONFIG, store)
    store.lost = ()
    assert rollup.run(CONFIG, store).batches == 1


def filled(store: ObjectStore, nodes: int, minutes: int) -> None:
    for n in range(minutes):
        for node in range(nodes):
            put(store, minute(n, f"n{node}"))


def test_an_unreadable_prefix_is_asked_for_a_few_times(tmp_path: Path) -> None:
    store = Sick(tmp_path)
    filled(store, 2, 60)
    store.lost = ("raw/v1/node=n1/",)
    made = rollup.run(CONFIG, store)
    assert (made.batches, list(made.unread)) == (60, [key_of(minute(0, "n1"))])
    assert store.gets < 60 + 60, "a minute each, when the store takes its time"


@pytest.mark.parametrize("read_before", [0, 1, 20, 47])
def test_a_store_that_goes_down_ends_the_run(read_before: int, tmp_path: Path) -> None:
    store = Sick(tmp_path)
    filled(store, 16, 3)
    store.gets_left, store.gets = read_before, 0
    with pytest.raises(Retryable, match="nothing new could be read"):
        rollup.run(CONFIG, store)
    assert store.gets < read_before + 100
    before = load.newest_manifest(store)
    assert before.unread == {}, "it is no node's fault"
    assert before.batches <= read_before
    store.gets_left = 1 << 30
    assert rollup.run(CONFIG, store).batches == 48
    assert requests_by_node(store) == {f"n{node}": 6 for node in range(16)}


def test_a_store_that_has_lost_something_of_many_nodes_is_read_on(tmp_path: Path) -> None:
    store = Sick(tmp_path)
    filled(store, 12, 3)
    lost = [f"n{node}" for node in range(9)]
    store.lost = tuple(key_of(minute(0, node)) for node in lost)
    made = rollup.run(CONFIG, store)
    assert sorted(made.unread) == sorted(store.lost)
    assert requests_by_node(store) == {"n9": 6, "n10": 6, "n11": 6}
    put(store, minute(3, "n10"))
    again = rollup.run(CONFIG, store)
    assert again.unread == made.unread
    assert requests_by_node(store)["n10"] == 10
    found = load.fresh(store, "r", {})
    assert {one.node for one in found.batches} == {"n9", "n10", "n11"}
    assert sorted(found.unread) == sorted(store.lost)


def test_alert_does_not_wait_for_each_node_of_a_store_that_is_down(tmp_path: Path) -> None:
    store = Sick(tmp_path)
    filled(store, 40, 2)
    store.gets_left, store.gets = 50, 0
    assert len(load.fresh(store, "r", {}).batches) == 50
    assert store.gets < 50 + 20


def test_a_listing_that_goes_down_ends_the_run(tmp_path: Path) -> None:
    store = Sick(tmp_path)
    filled(store, 40, 1)
    store.unlisted, store.lists = ("raw/v1/node=n2",), 0
    assert rollup.run(CONFIG, store).batches == 29
    listed = DirectoryStore.list_after

    def down(self: DirectoryStore, prefix: str, after: str = "", limit: int = 1000) -> list:  # type: ignore[type-arg]
        store.lists += 1
        if store.lists > 60 and prefix.startswith("raw/"):
            raise Retryable(f"list {prefix}: store busy or unavailable (500 InternalError)")
        return listed(self, prefix, after, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sick, "list_after", down)
        store.lists = 0
        with pytest.raises(Retryable, match="500 InternalError"):
            load.pending(store, {})
    assert store.lists <= 62


def test_alerts_of_the_others_are_sent(tmp_path: Path) -> None:
    store = Sick(tmp_path)
    for node in ("n1", "n2"):
        put(store, minute(1, node))
    store.lost = (key_of(minute(1, "n1")),)
    found = load.fresh(store, "r", {})
    assert {one.node for one in found.batches} == {"n2"}
    assert list(found.unread) == list(store.lost)
    store.lost = ()
    later = load.fresh(store, "r", found.cursors)
    assert {one.node for one in later.batches} == {"n1"}
    store.lost = (key_of(minute(1, "n1")),)
    assert load.fresh(store, "r", {}, passed=lambda _: True).unread == {}
    alert.run(CONFIG, store, Discord({}))


def test_alert_reads_a_large_backlog_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path)
    for n in range(6):
        put(store, minute(n))
    monkeypatch.setattr(load, "MOST_FRESH_RECORDS", 7)
    cursors: dict[str, str] = {}
    seen: list[int] = []
    for _ in range(4):
        found = load.fresh(store, "r", cursors)
        seen += [one.seq for one in found.batches]
        assert len(found.batches) <= 2
        cursors = found.cursors
    assert seen == [1, 2, 3, 4, 5, 6]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_cursor_never_passes_what_was_not_read(data: st.DataObject) -> None:
    pending = [
        Pending(f"raw/v1/node={node}/i0001/{n:03}", f"raw/v1/node={node}/i0001/", 1)
        for n in range(data.draw(st.integers(1, 8)))
        for node in ("a", "b", "c")
    ]
    bad = set(data.draw(st.lists(st.sampled_from(pending), max_size=2)))
    progress, cursors, counted = Progress(pending, {}, 0), dict[str, str](), list[str]()
    rounds = 0
    while piece := progress.piece():
        stop, rounds = data.draw(st.integers(1, len(piece))), rounds + 1
        assert rounds <= 100
        outcomes, waiting = [], set[str]()
        shares = [piece[n::2] for n in range(2)]  # each share is read in order, and stops where it likes
        for share in shares:
            for one in share[:stop]:
                if node_of(one.key) not in waiting:
                    outcomes.append(Outcome(one.key, 1, 0, "", "500" if one in bad else ""))
                    if one in bad:
                        waiting.add(node_of(one.key))
        moved, settled = progress.read(piece, outcomes)
        cursors |= moved
        counted += [one.key for one in settled]
    assert len(counted) == len(set(counted))
    for one in pending:
        passed = one.key <= cursors.get(one.folder or "", "")
        earlier_bad = any(b.folder == one.folder and b.key <= one.key for b in bad)
        assert passed != earlier_bad, one
        assert passed == (one.key in counted)


# names and texts

STRANGE = "![x](http://evil.example/beacon.png) [go](javascript:alert(1))\n# |`<img src=x>`\x00\u202e" + "a" * 100


def test_a_strange_name_is_replaced_and_its_numbers_count(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    put(store, batch([served(STRANGE, requests=3), served("plain.Name-1_x", requests=2)], node="n1"))
    assert rollup.run(CONFIG, store).quarantined == ()
    found = load.window(store, month("2026-11", "UTC"))
    assert found.batches == 1
    by_model = {one.model: one.requests for one in found.served}
    (strange,) = set(by_model) - {"plain.Name-1_x"}
    assert keys.check_name(strange, "model") == strange
    assert (by_model[strange], by_model["plain.Name-1_x"]) == (3, 2)


def tables(store: ObjectStore) -> dict[str, bytes]:
    return {one.key: store.get(one.key, MOST).body for prefix in keys.TABLE_PREFIXES for one in list_all(store, prefix)}


def test_what_an_older_version_wrote_uncleaned_is_cleaned_by_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = DirectoryStore(tmp_path / "old"), DirectoryStore(tmp_path / "new")
    for store in (old, new):
        for n in range(30):
            put(store, batch([served(f"{STRANGE} {n}"), served(f"m {n}"), host()], node="n1", minute=n))
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "cleaned", lambda batch: batch)
        rollup.run(CONFIG, old)
    rollup.run(CONFIG, new)
    assert tables(old) != tables(new)
    rollup.run(CONFIG, old, again=True)
    assert tables(old) == tables(new)


@pytest.mark.parametrize("future", [False, True])
def test_which_of_two_rows_stays_is_defined(future: bool, tmp_path: Path) -> None:
    """The fresh one; but never one that lacks what a newer version wrote."""

    def lines(version: int, minutes: Sequence[int]) -> list[bytes]:
        metas = [parquet.meta_json(meta_of(batch(minute=n))._asdict()) for n in minutes]
        return [parquet.row_json(meta, 0, Served(model=f"v{version}", requests=1)) for meta in metas]

    with parquet.Database() as db:
        old = parquet.merged(db, "served", [db.file("a.ndjson", b"".join(lines(1, range(3000))))], None)
        if future:
            kept = db.file("kept.parquet", old)
            old = db.parquet(f"SELECT *, 7 AS future FROM '{kept}'")
        fresh = [db.file(f"{n}.ndjson", b"".join(lines(2, range(1000 + n, 4000, 2)))) for n in range(2)]
        made = db.file("made.parquet", parquet.merged(db, "served", fresh, old))
        found = [(row["seq"], row["model"]) for row in db.rows(f"SELECT seq, model FROM '{made}'")]
    last_old = 3000 if future else 1000
    assert found == [(n + 1, "v1" if n < last_old else "v2") for n in range(4000)]


def test_a_batch_that_claims_another_node_is_no_urgent_copy(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("urgent/v1/node=n1/i0001/x.mpz", seal([batch(node="n1/i0001")]))
    assert ingest.read(store, "urgent/v1/node=n1/i0001/x.mpz", "r")[0] == []


# manifests of other versions


def test_a_manifest_of_a_newer_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    put(store, minute(1))
    made = rollup.run(CONFIG, store)
    newer = {**json.loads(encode(made)), "number": 2, "schema": 99, "min_reader": 99}
    store.put(keys.manifest_key(2), json.dumps(newer).encode())
    put(store, minute(2))
    config = str(directory(tmp_path))
    for verb in ("rollup", "weekly", "monthly", "prune"):
        assert cli.main([verb, "--config", config]) == 1
        assert "for readers of schema 99 and later" in capsys.readouterr().err
    assert [m.key for m in list_all(store, keys.MANIFEST_PREFIX)] == [keys.manifest_key(1), keys.manifest_key(2)]


def test_fields_of_a_readable_newer_version_are_kept(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    put(store, minute(1))
    made = rollup.run(CONFIG, store)
    newer = {**json.loads(encode(made)), "number": 2, "schema": 3, "future_field": {"a": [1, None]}}
    store.put(keys.manifest_key(2), json.dumps(newer).encode())
    put(store, minute(2))
    rollup.run(CONFIG, store)
    found = json.loads(store.get(keys.manifest_key(3), MOST).body)
    assert (found["future_field"], found["schema"], "unknown" in found) == ({"a": [1, None]}, 3, False)


def test_unknown_fields_inside_are_refused_not_dropped(tmp_path: Path) -> None:
    tree = json.loads(encode(Manifest()))
    tree["days"]["2026-11-21"] = {
        "batches": 1,
        "minute_files": 1,
        "hour_files": 1,
        "day_files": 1,
        "sha256": "",
        "new": 1,
    }
    with pytest.raises(Refused, match="new"):
        parse(json.dumps(tree).encode(), "k")


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"[" * 100_000, b'{"min_reader": "x"}', b'{"number": -1e99}', b"\xff", b'{"schema": {}}']
)
def test_a_manifest_that_is_none_is_a_sentence(raw: bytes) -> None:
    with pytest.raises(Refused, match="manifest k"):
        parse(raw, "k")


def test_a_manifest_without_numbers_is_read() -> None:
    tree = json.loads(encode(Manifest(number=7, cursors={"a": "b"})))
    for name in ("schema", "min_reader", "unread"):
        del tree[name]
    assert parse(json.dumps(tree).encode(), "k").cursors == {"a": "b"}


def test_columns_of_a_newer_version_stay_in_minute_tables(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    put(store, minute(1))
    rollup.run(CONFIG, store)
    key = keys.table_key("minute", "served", "2026-11-21")
    old, new = tmp_path / "old.parquet", tmp_path / "new.parquet"
    old.write_bytes(store.get(key, MOST).body)
    with duckdb.connect() as db:
        db.execute(f"COPY (SELECT *, 7 AS future FROM '{old}') TO '{new}' (FORMAT parquet)")
    store.put(key, new.read_bytes())
    put(store, minute(2))
    rollup.run(CONFIG, store)
    new.write_bytes(store.get(key, MOST).body)
    with duckdb.connect() as db:
        assert sorted(db.execute(f"SELECT future FROM '{new}'").fetchall(), key=str) == [(7,), (None,)]
    assert rows(store)[1] == 2


def test_unknown_fields_of_state_that_is_written_back_are_refused(tmp_path: Path) -> None:
    raw = b'{"schema": 1, "generation": 2, "nodes": {"n1": [{"model": "a", "source": "a", "version": "v", "new": 1}]}}'
    assert desired.parse(raw).generation == 2
    with pytest.raises(Refused, match=r"nodes\.n1\[0\]\.new is not known to this version"):
        desired.parse(raw, whole=True)
    store = DirectoryStore(tmp_path)
    store.put(keys.ALERT_STATE, b'{"cursors": {}, "nodes": {"n1": {"last_seen_ms": 1, "new": 2}}}')
    with pytest.raises(Refused, match=r"nodes\.n1\.new is not known"):
        alert.run(CONFIG, store, Discord({}))


# deletion


def test_urgent_copies_go_with_their_segments(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for n, epoch in ((0, 1), (1, 1), (3 * 1440, 2), (60 * 1440, 3)):
        put(store, batch([served()], minute=n, epoch=epoch))
    kept = [(2, 3 * 1440 + 2), (3, 60 * 1440 + 1)]
    for epoch, seq in ((1, 1), (1, 2), (1, 9), (2, 3 * 1440 + 1), *kept):
        raw = keys.RawKey(NodeId("n1"), 1, epoch, seq, seq)
        store.put(keys.urgent_key(raw, 1), b"x")
    store.put("urgent/v1/node=n1/hello", b"foreign")
    rollup.run(CONFIG, store)
    now = datetime.fromtimestamp(T0 / 1000, UTC) + timedelta(days=61)
    assert prune.run(CONFIG, store, now, dry_run=True).urgent == 4
    assert prune.run(CONFIG, store, now).urgent == 4
    left = [one.key for one in list_all(store, "urgent/")]
    assert [keys.parse_urgent_key(key)[2:4] for key in left if "hello" not in key] == kept
    assert len(left) == 3
    assert prune.run(CONFIG, store, now).urgent == 0


def test_a_rollup_again_tells_which_days_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    for n in (0, 1440, 60 * 1440):
        put(store, minute(n))
    rollup.run(CONFIG, store)
    assert prune.run(CONFIG, store, datetime.fromtimestamp(T0 / 1000, UTC) + timedelta(days=61)).raw == 2
    before = load.newest_manifest(store).batches
    assert cli.main(["rollup", "--again", "--config", str(directory(tmp_path))]) == 0
    said = capsys.readouterr().err
    assert "days_not_read_again" in said
    assert "2026-11-21" in said
    assert "2026-11-22" in said
    assert load.newest_manifest(store).batches == before == 3


def test_a_segment_that_vanishes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = DirectoryStore(tmp_path)
    key = put(store, minute(1))
    store.delete(key)
    assert ingest.read(store, key, "r") == ([], "")
    assert "segment_vanished" in "".join(capsys.readouterr())


# listings


def test_a_copy_compares_two_listings_in_order(tmp_path: Path) -> None:
    here, there = DirectoryStore(tmp_path / "here"), DirectoryStore(tmp_path / "there")
    for n in range(30):
        here.put(f"raw/v1/{n:03}", b"%d" % n)
        if n % 3 == 0:
            there.put(f"raw/v1/{n:03}", b"%d" % n)
    for key in ("raw/v1/0005", "raw/v1/zzz"):
        there.put(key, b"only there")
    done = sync.run(here, there)
    assert (done.written, done.present, done.clashes) == (20, 12, [])
    assert sync.run(here, there).written == 0
    assert len(list(each(there, "raw/v1/"))) == 32


DEEP = b'{"x": ' + b"[" * 100_000


@pytest.mark.parametrize("raw", [DEEP, b"", b"{}", b"[]", b'{"files": 7}', b"\xff"])
def test_a_file_that_is_none_is_a_sentence(raw: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    config = str(directory(tmp_path))
    put(store, minute(1))
    placement = keys.report_key("weekly", "2026-W47", "placement", 1, "json")
    for key in (
        placement,
        keys.DESIRED,
        keys.ALERT_STATE,
        "annotations/v1/incidents.toml",
        "state/v1/lease-rollup.json",
    ):
        store.put(key, raw)
    for verb in (["apply", "--week", "2026-W47"], ["alert"], ["rollup"], ["weekly", "--week", "2026-W47"]):
        status = cli.main([*verb, "--config", config])
        assert status in (0, 1), verb
        assert "Traceback" not in capsys.readouterr().err
    store.put(keys.model_manifest_key("m", "v1"), raw)
    with pytest.raises(Refused):
        BucketSource(store, "m", "v1")
