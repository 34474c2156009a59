"""One node id, one agent: claims in the bucket, whoever starts where and when."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from agent.telemetry.claims import CONTEST_S, Claim, Grant, why_not
from agent.telemetry.pusher import Pusher
from agent.telemetry.spool import Spool
from agent.telemetry.spool_identity import Identity
from shared import keys
from shared.errors import AccessDenied, Retryable
from shared.records import NodeIdClash
from shared.store import ObjectStore, Stored, list_all
from shared.store_dir import DirectoryStore
from tests.agent.telemetry.test_spool_pusher import Flaky, fill, read_all

_OPEN: list[Spool] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """No test leaves the lock of a spool open."""
    yield
    while _OPEN:
        _OPEN.pop().close(clean=True)


class Node:
    """An agent's spool and its pusher."""

    def __init__(self, state: Path, store: ObjectStore, hardware: str = "a" * 16, rack: str = "r") -> None:
        self.now = 0.0
        self.spool = Spool(state, node="n1", rack=rack, hardware=hardware, max_bytes=1 << 30, max_batches=10_000)
        _OPEN.append(self.spool)
        self.pusher = Pusher(self.spool, lambda: store, clock=lambda: self.now, random_01=lambda: 0.5, pace_s=0.0)
        self.pusher.claims._clock = lambda: self.now

    def push(self, batches: int = 1) -> int:
        fill(self.spool, batches)
        return self.pusher.drain(force=True)

    def end(self) -> None:
        _OPEN.remove(self.spool)
        self.spool.close(clean=True)

    @property
    def reason(self) -> str:
        return self.pusher.state.reason

    @property
    def problem(self) -> str:
        return self.pusher.claims.problem


def identity(**more: object) -> Identity:
    return Identity(**{"spool_id": "s1", "node": "n1", "rack": "r", "hardware": "a" * 16, **more})  # type: ignore[arg-type]


def grant(store: ObjectStore, number: int, to: str) -> None:
    store.put(keys.grant_key("n1", number), msgspec.json.encode(Grant(to=to)))


A, B = "a" * 16, "b" * 16


@pytest.mark.parametrize(
    ("holder", "me", "granted", "why"),
    [
        (None, {}, "", ""),
        (Claim(spool_id="s1", hardware=B, rack="x"), {}, "", ""),
        (Claim(spool_id="s2", hardware=A, rack="r"), {}, "", ""),
        (Claim(spool_id="s2", rack="r"), {}, "", ""),
        (Claim(spool_id="s2", hardware=B, rack="r"), {"hardware": "unknown"}, "", ""),
        (Claim(spool_id="s2", hardware=B, rack="r"), {}, "", "is claimed by other hardware (hardware bbbbbbbb"),
        (Claim(spool_id="s2", hardware=B, rack="r"), {}, "s1", ""),
        (Claim(spool_id="s2", hardware=B, rack="r"), {}, A, ""),
        (Claim(spool_id="s2", hardware=B, rack="r"), {}, "s3", "is claimed by other hardware"),
        (Claim(spool_id="s2", hardware=A, rack="r"), {"claim": 1}, "", "by another agent after this one"),
        (Claim(spool_id="s2"), {"incarnation": 1}, "", "by another agent after this one"),
        (Claim(spool_id="s2", hardware=A, rack="r"), {"claim": 1}, "s1", ""),
        (Claim(spool_id="s2", hardware=A, rack="q"), {}, "", "is of rack 'q', and this node is of rack 'r'"),
    ],
)
def test_who_may_claim_an_id_after_whom(holder: Claim | None, me: dict[str, object], granted: str, why: str) -> None:
    found = why_not(holder, identity(**me), granted)
    assert found.startswith("node id 'n1'") if why else not found
    assert why in found


def test_other_hardware_is_refused_keeps_its_batches_and_both_are_told(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "b")
    first, second = Node(tmp_path / "1", store, A), Node(tmp_path / "2", store, B)
    assert first.push() == 1
    assert second.push(3) == 0
    assert second.pusher.state.state == "refused"
    assert "claimed by other hardware" in second.reason
    assert "`mlxrack-agent claim take`" in second.reason
    assert (len(second.spool.waiting()), second.spool.dropped) == (3, 0)
    assert first.push() == 1, "its holder goes on"
    assert "another agent uses node id 'n1', too (hardware bbbbbbbb)" in first.problem
    assert second.problem == second.reason
    event = first.pusher.claims.news()
    assert isinstance(event, NodeIdClash)
    assert (event.peer, event.one, event.other) == ("n1", "aaaaaaaa", "bbbbbbbb")
    assert first.pusher.claims.news() is None, "not at each push"
    assert [b[0] for b in read_all(only(store))] == [1, 1]


def test_a_contest_that_is_over_is_forgotten(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "b")
    first, second = Node(tmp_path / "1", store, A), Node(tmp_path / "2", store, B)
    first.push()
    second.push()
    first.push()
    assert first.problem
    first.now = CONTEST_S - 1
    first.push()
    assert first.problem
    first.now = CONTEST_S + 1
    first.push()
    assert not first.problem
    first.end()
    again = Node(tmp_path / "1", store, A)
    again.push()
    assert not again.problem, "what was there before it started may be long over"
    second.push()
    again.push()
    assert again.problem


def test_a_machine_that_replaces_another_takes_the_id_and_nothing_waits(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "b")
    dead, new = Node(tmp_path / "1", store, A), Node(tmp_path / "2", store, B)
    dead.push(2)
    new.push(3)
    grant(store, 1, new.spool.identity.spool_id)
    assert new.push() == 4
    assert (new.reason, new.problem) == ("", "")
    assert read_all(only(store)) == [(1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 1, 2), (2, 1, 3), (2, 1, 4)]
    assert dead.push() == 0, "it lives after all"
    assert "was claimed by another agent after this one" in dead.reason


def test_an_id_that_is_taken_back_goes_on_under_its_own_keys(tmp_path: Path) -> None:
    """The batches of one spool are of one incarnation for good: what it sent before a lost answer is not counted
    again."""
    store = DirectoryStore(tmp_path / "b")
    first, second = Node(tmp_path / "1", store, A), Node(tmp_path / "2", store, A)
    first.push()
    assert second.push() == 1, "a state folder that was lost is not asked for"
    assert first.push(2) == 0
    assert second.push() == 1
    assert second.problem.startswith("another agent uses node id 'n1', too (hardware aaaaaaaa)")
    grant(store, 2, first.spool.identity.spool_id)
    assert first.push() == 3
    assert second.push() == 0
    assert {b[0] for b in read_all(only(store))} == {1, 2}
    assert (first.spool.identity.incarnation, first.spool.identity.claim) == (1, 3)
    first.end()
    again = Node(tmp_path / "1", store, A)
    assert again.push() == 1


def test_the_claim_of_an_older_version_is_completed(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "b")
    old = Node(tmp_path / "1", store, A)
    old.spool.claim(1)
    store.put(keys.claim_key("n1", 1), old.spool.identity.spool_id.encode())
    assert old.push() == 1
    assert Node(tmp_path / "2", store, B).push() == 0
    claim = msgspec.json.decode(store.get(keys.claim_key("n1", 1), 1 << 10).body, type=Claim)
    assert (claim.hardware, claim.rack) == (A, "r")


def test_another_bucket_is_claimed_anew_and_another_racks_is_refused(tmp_path: Path) -> None:
    first, second = DirectoryStore(tmp_path / "b1"), DirectoryStore(tmp_path / "b2")
    node = Node(tmp_path / "1", first, A)
    node.push()
    node.end()
    moved = Node(tmp_path / "1", second, A)
    assert moved.push() == 1
    assert list_all(second, keys.claim_key("n1", 1))
    stranger = Node(tmp_path / "2", second, A, rack="q")
    assert stranger.push() == 0
    assert "node id 'n1' in this bucket is of rack 'r', and this node is of rack 'q'" in stranger.reason
    second.put(keys.RACK, b'{"rack": "office"}')
    other = Node(tmp_path / "3", second, B)
    assert other.push() == 0
    assert "this bucket is that of rack 'office', and this node is of rack 'r'" in other.reason
    assert len(other.spool.waiting()) == 1


def test_in_a_new_bucket_the_number_of_a_claim_may_be_another_agents(tmp_path: Path) -> None:
    """The one that was refused in the old bucket may be the first in the new one."""
    old, new = DirectoryStore(tmp_path / "old"), DirectoryStore(tmp_path / "new")
    first, second = Node(tmp_path / "1", old, A), Node(tmp_path / "2", old, B)
    assert (first.push(), second.push()) == (1, 0)
    first.end()
    second.end()
    second = Node(tmp_path / "2", new, B)
    assert second.push() == 2
    first = Node(tmp_path / "1", new, A)
    for _ in range(3):
        assert first.push() == 0, "one of the two uploads"
        assert "was claimed by another agent after this one" in first.reason
    assert second.push() == 1
    assert second.problem
    assert len(read_all(only(new))) == 3


def test_a_store_that_is_away_at_the_start_is_claimed_later(tmp_path: Path) -> None:
    def away(*_: object) -> None:
        raise Retryable("the store is away")

    class Away(Flaky):
        def get(self, key: str, most_bytes: int) -> Stored:
            if self.faults:
                self.faults.pop(0)(key, b"")
            return self.inner.get(key, most_bytes)

    store = Away(tmp_path / "b")
    node = Node(tmp_path / "1", store, A)
    for at in range(6):
        store.faults = [lambda *_: None] * at + [away]
        sent = node.push()
        assert sent == 0 or at > 3, f"call {at} of the claim fails"
        assert len(node.spool.waiting()) == (0 if sent else at + 1)
        if sent:
            return
    store.faults = []
    assert node.push() == 7


def test_a_store_that_denies_what_is_not_there_is_no_obstacle(tmp_path: Path) -> None:
    """Some do, to who may not list."""

    class Denying(Flaky):
        def get(self, key: str, most_bytes: int) -> Stored:
            if not list_all(self.inner, key):
                raise AccessDenied("403")
            return self.inner.get(key, most_bytes)

    store = Denying(tmp_path / "b")
    assert Node(tmp_path / "1", store, A).push() == 1
    assert Node(tmp_path / "2", store, B).push() == 0


@pytest.mark.parametrize("garbage", [b"x" * 5000, b"\xff\xfe{", b"[" * 900, b'{"rack": 3, "to": [], "spool_id": 1}'])
@pytest.mark.parametrize("at", [keys.claim_key, keys.contest_key, keys.grant_key, lambda *_: keys.RACK])
def test_what_no_agent_wrote_beside_a_claim_stops_nobody(
    at: Callable[[str, int], str], garbage: bytes, tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path / "b")
    store.put(at("n1", 1), garbage)
    node = Node(tmp_path / "1", store, A)
    assert node.push() == 1
    if at is not keys.claim_key:
        store.put(at("n1", 1), garbage + b" ")
    assert node.push() == 1
    node.end()
    assert Node(tmp_path / "1", store, A).push() == 1


def only(store: ObjectStore) -> ObjectStore:
    """The store without what claims leave beside segments."""
    for one in list_all(store, "raw/"):
        if one.key.endswith(("/contested", "/granted")):
            store.delete(one.key)
    return store


def test_two_that_start_at_the_same_moment_do_not_both_get_the_id(tmp_path: Path) -> None:
    class Raced(Flaky):
        """Another agent claims between a look and a write."""

        first: Callable[[], object] | None = None

        def put_if_absent(self, key: str, body: bytes) -> str:
            if self.first is not None:
                call, self.first = self.first, None
                call()
            return self.inner.put_if_absent(key, body)

    store = Raced(tmp_path / "b")
    quick, slow = Node(tmp_path / "1", store.inner, A), Node(tmp_path / "2", store, B)
    store.first = quick.push
    assert slow.push() == 0
    assert "at this moment" in slow.reason
    assert slow.push() == 0
    assert "claimed by other hardware" in slow.reason
    assert quick.push() == 1
