"""The spool and the pusher: no batch is lost or duplicated, whatever fails."""

import fcntl
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import pytest

from agent.telemetry import spool as spool_module
from agent.telemetry.pusher import Pusher
from agent.telemetry.spool import Spool
from shared import durable
from shared.batch import Batch, encode, seal, unseal
from shared.errors import AccessDenied, Halt, Refused, Retryable
from shared.records import DesiredObserved, PeerDown
from shared.store import Listed, ObjectStore, Stored, list_all
from shared.store_dir import DirectoryStore

_open: list[Spool] = []


@pytest.fixture(autouse=True)
def close_spools() -> Iterator[None]:
    """Release all locks after each test."""
    yield
    while _open:
        _open.pop()._lock.close()


def opened(
    folder: Path, *, node: str = "n1", hardware: str = "h", max_bytes: int = 10**9, max_batches: int = 10**9
) -> Spool:
    spool = Spool(folder, node=node, rack="r", hardware=hardware, max_bytes=max_bytes, max_batches=max_batches)
    _open.append(spool)
    return spool


def make(spool: Spool, records: tuple[PeerDown, ...] = ()) -> Batch:
    seq = spool.next_seq()
    return Batch(rack="r", node="n1", epoch=spool.epoch, seq=seq, t_start_ms=seq, t_end_ms=seq + 1, records=records)


def fill(spool: Spool, count: int) -> None:
    for _ in range(count):
        spool.append(make(spool))


class Flaky:
    """A directory store that fails on command, before or after the write."""

    clock_skew_ms = 1_500

    def forget_clock(self) -> None:
        pass

    def __init__(self, root: Path) -> None:
        self.inner = DirectoryStore(root)
        self.faults: list[Callable[[str, bytes], None]] = []

    def put_if_absent(self, key: str, body: bytes) -> str:
        if self.faults:
            self.faults.pop(0)(key, body)
        return self.inner.put_if_absent(key, body)

    def put(self, key: str, body: bytes) -> str:
        return self.inner.put(key, body)

    def put_if_match(self, key: str, body: bytes, etag: str) -> str:
        return self.inner.put_if_match(key, body, etag)

    def get(self, key: str, most_bytes: int) -> Stored:
        return self.inner.get(key, most_bytes)

    def get_part(self, key: str, start: int, length: int) -> bytes:
        return self.inner.get_part(key, start, length)

    def put_file(self, key: str, file: BinaryIO) -> None:
        self.inner.put_file(key, file)

    def list_after(self, prefix: str, after: str = "", limit: int = 1000) -> list[Listed]:
        return self.inner.list_after(prefix, after, limit)

    def delete(self, key: str) -> None:
        self.inner.delete(key)


def read_all(store: ObjectStore) -> list[tuple[int, int, int]]:
    keys = [o.key for o in list_all(store, "raw/") if not o.key.endswith("/claim")]
    return [(b.incarnation, b.epoch, b.seq) for key in keys for b in unseal(store.get(key, 1 << 30).body)]


def pusher(spool: Spool, store: ObjectStore, clock: Callable[[], float] = lambda: 0.0) -> Pusher:
    return Pusher(spool, lambda: store, clock=clock, random_01=lambda: 0.5, pace_s=0.0)


def test_batches_are_pushed_in_order_and_then_deleted(tmp_path: Path) -> None:
    spool, store = opened(tmp_path / "s"), DirectoryStore(tmp_path / "b")
    fill(spool, 130)
    assert pusher(spool, store).drain() == 130
    assert [(1, 1, n) for n in range(1, 131)] == read_all(store)
    assert spool.waiting() == []
    assert len([o for o in list_all(store, "raw/") if o.key.endswith(".mpz")]) == 3, "60 batches a segment"


def test_an_outage_loses_nothing_and_is_reported_as_state(tmp_path: Path) -> None:
    def away(key: str, body: bytes) -> None:
        raise Retryable("the store is away")

    now = [0.0]
    spool, store = opened(tmp_path / "s"), Flaky(tmp_path / "b")
    one = pusher(spool, store, lambda: now[0])
    fill(spool, 3)
    store.faults = [away]
    assert one.drain() == 0
    assert (one.state.state, one.state.reason, one.state.waiting_batches) == ("waiting", "the store is away", 3)
    assert one.state.since_ms is not None
    assert one.drain() == 0, "nothing is tried before the backoff is over"
    now[0] = 10.0
    assert one.drain() == 3
    assert (one.state.state, one.state.reason) == ("ok", "")
    assert one.state.since_ms is None


def test_retry_after_from_the_store_is_honoured(tmp_path: Path) -> None:
    store, clock = Flaky(tmp_path / "store"), [0.0]
    spool = opened(tmp_path / "spool")
    fill(spool, 1)

    def busy(key: str, body: bytes) -> None:
        raise Retryable("slow down", retry_after_s=120.0)

    store.faults = [lambda key, body: None, busy]  # the first is its claim
    push = pusher(spool, store, lambda: clock[0])
    push.drain()
    for clock[0] in (1.0, 60.0, 120.0):
        assert push.drain() == 0
        assert push.state.failures == 1, "it was not even asked"
    clock[0] = 121.0
    assert push.drain() == 1
    assert push.clock_skew_ms == 1_500


def test_a_client_is_kept_during_an_outage_and_recreated_for_new_credentials(tmp_path: Path) -> None:
    store, made = Flaky(tmp_path / "store"), [0]
    spool = opened(tmp_path / "spool")
    fill(spool, 1)

    def make_one() -> ObjectStore:
        made[0] += 1
        return store

    def away(key: str, body: bytes) -> None:
        raise Retryable("away")

    def refused(key: str, body: bytes) -> None:
        raise AccessDenied("no")

    push = Pusher(spool, make_one, random_01=lambda: 0.0, pace_s=0.0)
    store.faults = [away, away, away, refused]
    for _ in range(4):
        push.drain(force=True)
    assert made[0] == 1
    push.drain(force=True)
    assert (made[0], spool.waiting()) == (2, [])
    push.stop()
    fill(spool, 1)
    assert push.drain(force=True) == 0, "nothing is touched once the spool may be another's"


def test_a_renamed_batch_is_spooled_even_if_the_directory_sync_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(tmp_path)
    real = os.open

    def full(path: object, flags: int, *more: object) -> int:
        if path == tmp_path:
            raise OSError(24, "Too many open files")
        return real(path, flags, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    fill(spool, 2)
    assert ([w.seq for w in spool.waiting()], spool.count) == ([1, 2], 2)


def test_a_repacked_batch_is_not_a_conflicting_agent(tmp_path: Path) -> None:
    store, spool = Flaky(tmp_path / "store"), opened(tmp_path / "spool")
    fill(spool, 1)
    batch = spool.read(spool.waiting()[0])
    assert batch is not None
    push = pusher(spool, store)
    push.drain()
    (key,) = [one.key for one in list_all(store, "raw/") if not one.key.endswith("/claim")]
    store.put(key, seal([msgspec.structs.replace(batch, incarnation=1, mono_ms=77, dropped_batches=1)]))
    spool.close(clean=True)
    (tmp_path / "spool" / "e00000001-0000000001.batch").write_bytes(encode(batch))
    again = opened(tmp_path / "spool")
    assert pusher(again, store).drain() == 1
    assert again.waiting() == []


def test_a_backlog_is_pushed_at_a_bounded_rate_and_stops_at_once(tmp_path: Path) -> None:
    spool = opened(tmp_path / "spool")
    fill(spool, 24 * 60)
    push = Pusher(spool, lambda: DirectoryStore(tmp_path / "store"), pace_s=0.02)
    began = time.monotonic()
    assert push.drain() == 24 * 60
    assert time.monotonic() - began >= 23 * 0.02
    assert len(list((tmp_path / "store").rglob("*.mpz"))) == 24
    fill(spool, 24 * 60)
    slow = Pusher(spool, lambda: DirectoryStore(tmp_path / "store"), pace_s=60.0)
    threading.Timer(0.3, slow.stop).start()
    assert slow.drain() == 60, "what was being sent, and no more"
    assert len(spool.waiting()) == 23 * 60


def test_refused_credentials_keep_everything(tmp_path: Path) -> None:
    def denied(key: str, body: bytes) -> None:
        raise AccessDenied("the store refuses our credentials")

    spool, store = opened(tmp_path / "s"), Flaky(tmp_path / "b")
    fill(spool, 2)
    store.faults = [denied]
    one = pusher(spool, store)
    one.drain()
    assert (one.state.state, one.state.waiting_batches) == ("refused", 2)


def test_a_lost_upload_response_is_recognised(tmp_path: Path) -> None:
    spool, store = opened(tmp_path / "s"), Flaky(tmp_path / "b")
    one = pusher(spool, store)
    fill(spool, 1)
    one.drain()

    def stored_but_no_answer(key: str, body: bytes) -> None:
        store.inner.put_if_absent(key, body)
        raise Retryable("cut off")

    fill(spool, 2)
    store.faults = [stored_but_no_answer]
    one.drain()
    assert one.state.waiting_batches == 2
    assert one.drain(force=True) == 2
    assert read_all(store) == [(1, 1, 1), (1, 1, 2), (1, 1, 3)]


def test_two_agents_with_one_node_id_are_detected(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "b")
    spool = opened(tmp_path / "s")
    fill(spool, 1)
    spool.claim(1)
    store.put_if_absent(
        "raw/v1/node=n1/i0001/e00000001/0000000001-0000000001.mpz",
        seal([Batch(rack="r", node="n1", incarnation=1, epoch=1, seq=1, t_start_ms=0, t_end_ms=99)]),
    )
    one = pusher(spool, store)
    one.drain()
    assert one.state.state == "refused"
    assert "another agent writes under this node's name" in one.state.reason
    assert len(spool.waiting()) == 1


def test_a_lost_spool_takes_the_next_incarnation(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "b")
    for number in (1, 2, 3):
        spool = opened(tmp_path / f"s{number}")
        fill(spool, 1)
        pusher(spool, store).drain()
        spool.close(clean=True)
    assert read_all(store) == [(1, 1, 1), (2, 1, 1), (3, 1, 1)]


def test_a_segment_the_store_refuses_for_good_does_not_block_the_rest(tmp_path: Path) -> None:
    def refused(key: str, body: bytes) -> None:
        raise Refused("too large")

    spool, store = opened(tmp_path / "s"), Flaky(tmp_path / "b")
    one = pusher(spool, store)
    one.drain()
    fill(spool, 61)
    store.faults = [refused]
    one.drain()
    assert read_all(store) == [(1, 1, 61)]
    assert spool.dropped == 60
    assert len(list((tmp_path / "s/bad").iterdir())) == 60


def test_urgent_events_are_pushed_first(tmp_path: Path) -> None:
    spool, store = opened(tmp_path / "s"), DirectoryStore(tmp_path / "b")
    one = pusher(spool, store)
    fill(spool, 1)
    one.drain()
    event = PeerDown(t_ms=1, peer="n2", last_seen_ms=0)
    one.urgent((event,), lambda seq, events: make(spool, events))  # type: ignore[arg-type]
    (listed,) = list_all(store, "urgent/")
    (copy,) = unseal(store.get(listed.key, 1 << 30).body)
    assert ((event,), 1) == (copy.records, copy.incarnation)


def test_every_start_is_a_new_epoch_and_knows_the_previous_exit(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert (first.epoch, first.previous) == (1, "first")
    first.serves()
    first.close(clean=False)
    second = opened(tmp_path)
    assert (second.epoch, second.previous) == (2, "unclean")
    second.serves()
    second.close(clean=True)
    third = opened(tmp_path)
    assert (third.epoch, third.previous) == (3, "clean")


def test_a_start_that_never_served_leaves_what_the_last_run_left(tmp_path: Path) -> None:
    """However it ended: with a message, killed, or because the disk was full."""
    for served, clean, left in ((False, False, "first"), (True, True, "clean"), (True, False, "unclean")):
        if served:
            good = opened(tmp_path)
            good.serves()
            good.close(clean=clean)
        for _ in range(3):
            failed = opened(tmp_path)
            assert failed.previous == left
            failed._lock.close()  # as the system does when a process ends
    path = tmp_path / "identity.json"
    old = json.loads(path.read_text())
    del old["served"], old["claim"]
    path.write_text(json.dumps({**old, "clean": True}))
    last = opened(tmp_path)
    assert last.previous == "clean", "a version that did not note it"


def test_a_second_agent_on_one_spool_is_rejected(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(Halt, match="in use by another agent"):
        opened(tmp_path)
    first.close(clean=True)


@pytest.mark.parametrize(
    ("node", "hardware", "why"), [("n2", "h", "belongs to node 'n1'"), ("n1", "other", "written by other hardware")]
)
def test_a_spool_of_another_node_is_rejected(tmp_path: Path, node: str, hardware: str, why: str) -> None:
    opened(tmp_path).close(clean=True)
    with pytest.raises(Halt, match=why):
        opened(tmp_path, node=node, hardware=hardware)


def test_partial_files_are_removed_and_damaged_batches_set_aside(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, 3)
    spool.close(clean=False)
    (tmp_path / "e00000001-0000000009.tmp").write_bytes(b"half")
    (tmp_path / "e00000001-0000000002.batch").write_bytes(b"\xc1 damaged")
    spool, store = opened(tmp_path), DirectoryStore(tmp_path / "b")
    pusher(spool, store).drain()
    assert not list(tmp_path.glob("*.tmp"))
    assert read_all(store) == [(1, 1, 1), (1, 1, 3)]
    assert os.listdir(tmp_path / "bad") == ["e00000001-0000000002.batch"]


def test_a_batch_that_this_node_cannot_read_is_shown_until_one_is_sent(tmp_path: Path) -> None:
    spool, store = opened(tmp_path), Flaky(tmp_path / "b")
    push = pusher(spool, store)
    record = DesiredObserved(generation=2**50, state="converged")
    spool.append(msgspec.structs.replace(make(spool), records=(record,)))
    for _ in range(2):  # also while nothing is waiting
        push.drain(force=True)
        assert (push.state.state, push.state.sent_batches) == ("refused", 0)
        assert "e00000001-0000000001.batch" in push.state.reason
        assert "generation: 1125899906842624 is out of range" in push.state.reason
        assert push.state.since_ms is not None
    fill(spool, 1)
    push.drain(force=True)
    assert (push.state.state, push.state.reason, push.state.since_ms) == ("ok", "", None)


def test_bounds_drop_the_oldest_and_count_it(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, 10)
    size = sum(w.size for w in spool.waiting())
    spool.close(clean=True)
    small = opened(tmp_path, max_bytes=size // 2)
    assert small.dropped == 5
    assert [w.seq for w in small.waiting()] == [6, 7, 8, 9, 10]
    for _ in range(20):
        small.append(make(small))
        assert sum(w.size for w in small.waiting()) <= size // 2, "never beyond it, not for a moment"
    assert small.dropped == 25
    assert [w.seq for w in small.waiting()] == [16, 17, 18, 19, 20]
    small.delete(small.waiting()[:4])
    fill(small, 4)
    assert small.dropped == 25, "what was sent has made room"
    small.close(clean=True)
    aged = opened(tmp_path, max_batches=3)
    fill(aged, 3)
    assert [(w.epoch, w.seq) for w in aged.waiting()] == [(3, 1), (3, 2), (3, 3)]


def test_clock_jumps_drop_no_batch(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_batches=100)
    fill(spool, 3)
    for waiting in spool.waiting():
        os.utime(waiting.path, (0, 0))
    fill(spool, 3)
    assert (len(spool.waiting()), spool.dropped) == (6, 0)


def test_skew_is_unknown_after_a_clock_change_until_the_store_answers(tmp_path: Path) -> None:
    """A rejection is a response, too: a store that rejects a skewed clock also reports its own time."""

    class Telling(Flaky):
        skew_ms: int | None = None

        @property
        def clock_skew_ms(self) -> int | None:  # type: ignore[override]
            return self.skew_ms

        def forget_clock(self) -> None:
            self.skew_ms = None

    def refuses(key: str, body: bytes) -> None:
        stores[-1].skew_ms = 7_200_000
        raise Halt("this machine's clock is too far from the store's; set it", code="clock_skew")

    def away(key: str, body: bytes) -> None:
        raise Retryable("the store is away")

    def opened_store() -> Telling:
        stores.append(Telling(tmp_path / "b"))
        stores[-1].faults = faults
        return stores[-1]

    spool, stores, faults = opened(tmp_path / "s"), list[Telling](), list[Callable[[str, bytes], None]]()
    push = Pusher(spool, opened_store, clock=lambda: 0.0, random_01=lambda: 0.5, pace_s=0.0)
    fill(spool, 1)
    assert push.drain() == 1
    stores[-1].skew_ms = 40
    assert push.clock_skew_ms == 40
    push.clock_was_set()
    assert push.clock_skew_ms is None
    fill(spool, 1)
    faults[:] = [away]
    assert push.drain(force=True) == 0
    assert push.clock_skew_ms is None, "an outage tells nothing"
    faults[:] = [refuses]
    assert push.drain(force=True) == 0
    assert push.state.state == "refused"
    assert push.clock_skew_ms == 7_200_000
    assert push.drain(force=True) == 1


def test_an_out_of_order_batch_is_rejected(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    with pytest.raises(Refused, match="expected 1/1"):
        spool.append(Batch(rack="r", node="n1", epoch=1, seq=7, t_start_ms=0, t_end_ms=1))


def test_a_disk_error_spools_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.durable.sync", full)
    with pytest.raises(Retryable, match="No space left"):
        spool.append(make(spool))
    monkeypatch.undo()
    assert spool.next_seq() == 1
    spool.append(make(spool))
    assert [w.seq for w in spool.waiting()] == [1]


def test_a_full_disk_drops_the_oldest_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened(tmp_path)
    fill(spool, 20)
    real, refusals = durable.sync, [1]

    def full_once(descriptor: int) -> None:
        if refusals and refusals.pop():
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("shared.durable.sync", full_once)
    fill(spool, 1)
    assert [w.seq for w in spool.waiting()] == list(range(4, 22))
    assert (spool.dropped, spool.count) == (3, 18)
    assert not list(tmp_path.glob("*.tmp"))
    spool.close(clean=True)
    refusals.append(1)
    again = opened(tmp_path)
    assert (again.epoch, again.count) == (2, 18), "a start takes what was set by, and no batch"


@pytest.mark.parametrize("waiting", [0, 20])
def test_a_start_on_a_full_disk_uses_only_the_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    spool = opened(tmp_path)
    fill(spool, waiting)
    spool.close(clean=True)
    reserve, real = tmp_path / "reserve", durable.write_whole
    assert reserve.stat().st_size == spool_module.RESERVE_BYTES

    def full(path: Path, body: bytes, *, synced: bool = True) -> None:
        if reserve.exists() or len(body) > 4096:  # the freed space is enough for the identity, not for another reserve
            raise OSError(28, "No space left on device")
        real(path, body, synced=synced)

    with monkeypatch.context() as patched:
        patched.setattr(durable, "write_whole", full)
        again = opened(tmp_path)
    assert (again.epoch, again.dropped, again.count) == (2, 0, waiting)
    assert not reserve.exists()
    fill(again, 1)
    assert reserve.exists(), "there is room again"


def test_telemetry_does_not_use_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, body: bytes, *, synced: bool = True) -> None:
        raise OSError(28, "No space left on device")

    spool = opened(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(durable, "write_whole", full)
        with pytest.raises(Retryable, match="No space left"):
            spool.append(make(spool))
    assert (tmp_path / "reserve").exists()


def test_a_full_disk_without_a_reserve_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(Retryable, match="No space left"):
        opened(tmp_path)


def test_the_identity_is_plain_json(tmp_path: Path) -> None:
    opened(tmp_path).close(clean=True)
    assert {"node", "rack", "epoch", "incarnation", "claim", "spool_id", "hardware", "served", "clean"} == set(
        json.loads((tmp_path / "identity.json").read_text())
    )


def test_a_persisted_open_window_is_the_last_batch_of_a_killed_run(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, 2)
    for t_end in (10, 20):
        spool.keep(msgspec.structs.replace(make(spool), t_end_ms=t_end))
    assert [one.seq for one in spool.waiting()] == [1, 2]
    spool._lock.close()  # as a kill does

    again = opened(tmp_path)
    assert [(one.epoch, one.seq) for one in again.waiting()] == [(1, 1), (1, 2), (1, 3)]
    recovered = again.read(again.waiting()[-1])
    assert recovered is not None
    assert recovered.t_end_ms == 20
    assert (again.count, again.epoch, again.next_seq()) == (3, 2, 1)
    store = DirectoryStore(tmp_path / "bucket")
    assert pusher(again, store).drain() == 3
    assert read_all(store) == [(1, 1, 1), (1, 1, 2), (1, 1, 3)]


@pytest.mark.parametrize("renames", range(5))
def test_a_run_killed_between_two_renames_keeps_its_window_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Persisted twice, then sealed: whichever of the renames is the last, one batch is found."""
    spool, left = opened(tmp_path), [renames]

    class KilledError(BaseException):
        pass

    def until_killed(before: Path, path: Path) -> None:
        if not left[0]:
            raise KilledError
        left[0] -= 1
        before.replace(path)

    ends = {0: None, 1: 10, 2: 20, 3: 30, 4: 30}
    with monkeypatch.context() as patched:
        patched.setattr(durable, "rename", until_killed)
        try:
            spool.keep(msgspec.structs.replace(make(spool), t_end_ms=10))
            spool.keep(msgspec.structs.replace(make(spool), t_end_ms=20))
            spool.append(msgspec.structs.replace(make(spool), t_end_ms=30))
        except KilledError:
            pass
    spool._lock.close()
    again = opened(tmp_path)
    found = [again.read(one) for one in again.waiting()]
    assert [one.t_end_ms for one in found if one is not None] == [ends[renames]] * bool(renames)
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob("*.open"))


def test_a_window_that_fails_at_the_last_step_is_spooled_on_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(tmp_path)
    spool.keep(make(spool))
    calls: list[Path] = []

    def fails_once(before: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        before.replace(path)

    monkeypatch.setattr(durable, "rename", fails_once)
    with pytest.raises(Retryable, match="Input/output error"):
        spool.append(make(spool))
    assert (spool.waiting(), spool.next_seq()) == ([], 1)
    spool.append(make(spool))
    assert [path.name for path in tmp_path.glob("e*")] == ["e00000001-0000000001.batch"]


def test_an_open_window_drops_no_sealed_batch_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened(tmp_path)
    fill(spool, 20)

    def full(path: Path, body: bytes, *, synced: bool = True) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write_whole", full)
    with pytest.raises(Retryable, match="No space left"):
        spool.keep(make(spool))
    assert (len(spool.waiting()), spool.dropped) == (20, 0)


def test_an_open_window_does_not_wait_for_a_slow_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    spool = opened(tmp_path)
    monkeypatch.setattr(durable, "sync", synced.append)
    spool.keep(make(spool))
    assert synced == []
    spool.append(make(spool))
    assert len(synced) == 2, "the file, and the folder with its name"


def what_is(descriptor: int) -> str:
    return "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"


def test_a_recovered_window_is_synced_before_it_counts_as_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, synced = opened(tmp_path), list[str]()
    spool.keep(make(spool))
    spool._lock.close()  # as a kill does
    monkeypatch.setattr(durable, "sync", lambda descriptor: synced.append(what_is(descriptor)))
    opened(tmp_path)
    assert synced[:2] == ["file", "folder"]


def test_a_mac_flushes_the_drive_for_the_file_and_for_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, plain = list[str](), list[int]()
    known = [True]

    def full(descriptor: int, command: int) -> int:
        assert command == 51
        if not known[0]:
            raise OSError(45, "Operation not supported")
        flushed.append(what_is(descriptor))
        return 0

    spool = opened(tmp_path)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", plain.append)
    fill(spool, 1)
    assert (flushed, plain) == (["file", "folder"], [])
    known[0] = False
    fill(spool, 1)
    assert len(plain) == 2, "a file system that does not know it is synced as it can"


@pytest.mark.parametrize("left", [b"", bytes(4096), b"half"])
def test_a_truncated_open_window_is_dropped_and_the_agent_starts(tmp_path: Path, left: bytes) -> None:
    """A power loss can leave a name without its contents."""
    spool = opened(tmp_path)
    fill(spool, 1)
    spool.keep(make(spool))
    (kept,) = tmp_path.glob("*.open")
    kept.write_bytes(left if left != b"half" else kept.read_bytes()[:-1])
    spool._lock.close()  # as a kill does
    again = opened(tmp_path)
    assert [(one.epoch, one.seq) for one in again.waiting()] == [(1, 1)]
    assert (again.epoch, again.dropped) == (2, 0)
    assert not list(tmp_path.glob("*.open"))
    assert not list((tmp_path / "bad").iterdir())


def test_an_open_window_counts_towards_the_bound(tmp_path: Path) -> None:
    probe = opened(tmp_path / "probe")
    size = len(encode(make(probe)))
    spool = opened(tmp_path / "spool", max_bytes=10 * size)
    fill(spool, 10)
    spool.keep(make(spool))
    assert sum(path.stat().st_size for path in (tmp_path / "spool").glob("e*")) <= 10 * size
    assert spool.dropped == 1
