"""Peer states over time."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.routing import Refuse, RouteRequest, choose
from agent.mesh.peers import Heartbeat, PeerTable
from agent.process.prefixes import packed
from agent.views import ModelView
from tests.agent.gateway.test_routing import HERE


def heartbeat(name: str = "a", load: int = 0, epoch: int = 1, prefixes: bytes = b"") -> Heartbeat:
    view = ModelView(name="m", version="v", ready=True, in_flight=load, prefixes=prefixes)
    return Heartbeat(node=name, rack="r", epoch=epoch, models=(view,))


def table() -> PeerTable:
    return PeerTable([("a", "http://a")], beat_s=1.0, now=0.0)


def state(peers: PeerTable, now: float) -> str:
    return peers.view(now)[0].state


@pytest.mark.parametrize(
    ("age", "expected"), [(0.0, "up"), (1.4, "up"), (1.6, "suspect"), (3.4, "suspect"), (3.6, "down")]
)
def test_missed_heartbeats_make_a_peer_suspect_then_down(age: float, expected: str) -> None:
    peers = table()
    peers.heard("a", heartbeat(), 10.0)
    assert state(peers, 10.0) == "up"
    assert state(peers, 10.0 + age) == expected


def test_one_miss_is_suspect_three_are_down_and_one_answer_is_up() -> None:
    peers = table()
    peers.heard("a", heartbeat(), 10.0)
    for now, expected in ((10.3, "suspect"), (10.6, "suspect"), (10.9, "down")):
        peers.missed("a", now)
        assert state(peers, now) == expected
    assert peers.heard("a", heartbeat(), 11.0), "it was away"
    assert state(peers, 11.0) == "up"


def test_the_policy_of_a_peer_counts_until_it_is_down() -> None:
    peers = PeerTable([("a", "http://a"), ("b", "http://b"), ("c", "http://c")], beat_s=1.0, now=0.0)
    peers.heard("a", msgspec.structs.replace(heartbeat("a"), policy="aa"), 10.0)
    peers.heard("b", heartbeat("b"), 12.0)
    assert peers.policies(12.0) == {"a": "aa", "b": ""}
    assert peers.policies(13.9) == {"b": ""}


def test_a_node_that_just_woke_marks_no_peer_down_before_its_next_tick() -> None:
    peers = table()
    peers.tick(9.75, 0.25)
    peers.heard("a", heartbeat(), 10.0)
    peers.tick(10.0, 0.25)
    assert state(peers, 70.0) == "up", "asleep for a minute; the beats of that time are still to be heard"
    peers.tick(70.0, 0.25)
    assert state(peers, 70.0) == "up"
    for n in range(1, 20):
        peers.tick(70.0 + n / 4, 0.25)
    assert state(peers, 74.75) == "down"


def test_a_lost_request_excludes_the_peer_until_the_next_heartbeat() -> None:
    peers = table()
    peers.heard("a", heartbeat(), 1.0)
    peers.lose("a")
    assert state(peers, 1.1) == "lost"
    assert not peers.heard("a", heartbeat(), 1.2), "it was not away; its breaker knows more"
    assert state(peers, 1.2) == "up"


def test_a_restarted_peer_is_distinguished_from_a_recovered_one() -> None:
    peers = table()
    assert not peers.heard("a", heartbeat(epoch=1), 1.0)
    assert not peers.heard("a", heartbeat(epoch=1), 2.0)
    assert peers.heard("a", heartbeat(epoch=2), 3.0)


def test_a_model_found_unready_stays_so_until_the_next_heartbeat() -> None:
    peers = table()
    peers.heard("a", heartbeat(), 1.0)
    peers.unready("a", "m")
    (model,) = peers.view(1.1)[0].models
    assert (model.ready, model.coming) == (False, True)
    peers.heard("a", heartbeat(), 2.0)
    assert peers.view(2.0)[0].models[0].ready
    peers.unready("gone", "m")


def test_sent_requests_count_until_the_next_heartbeat() -> None:
    peers = table()
    peers.heard("a", heartbeat(load=2), 1.0)
    peers.sent("a", "m", 70)
    peers.sent("a", "m", 30)
    assert peers.sent_since_beat("m") == {"a": (2, 100)}
    assert peers.sent_since_beat("other") == {}
    peers.heard("a", heartbeat(load=2), 2.0)
    assert peers.sent_since_beat("m") == {}


def test_ended_requests_no_longer_count() -> None:
    peers = table()
    peers.heard("a", heartbeat(), 1.0)
    before = peers.sent("a", "m", 70)
    peers.heard("a", heartbeat(load=1), 2.0)
    after = peers.sent("a", "m", 30)
    peers.ended("a", "m", 70, before)
    assert peers.sent_since_beat("m") == {"a": (0, 30)}
    peers.ended("a", "m", 30, after)
    assert peers.sent_since_beat("m") == {"a": (-1, 0)}, "one less than it said"
    peers.ended("gone", "m", 30, after)


def test_time_asleep_does_not_count_as_missed_heartbeats() -> None:
    peers = table()
    peers.heard("a", heartbeat(), 10.0)
    assert peers.tick(10.25, 0.25) == pytest.approx(10.0)  # the first tick since the start
    peers.heard("a", heartbeat(), 10.3)
    assert peers.tick(10.5, 0.25) == 0.0
    assert peers.tick(70.5, 0.25) == pytest.approx(59.75)
    assert state(peers, 70.5) == "up"
    for n in range(1, 16):
        peers.tick(70.5 + n / 4, 0.25)
    assert state(peers, 74.5) == "down"


def test_state_changes_are_reported_once() -> None:
    peers = PeerTable([("a", "u"), ("never", "u2")], beat_s=1.0, now=0.0)
    peers.heard("a", heartbeat(), 1.0)
    assert peers.changes(2.0) == []
    assert [(c.node, c.up) for c in peers.changes(5.0)] == [("a", False)]
    assert peers.changes(6.0) == []
    peers.heard("a", heartbeat(), 7.0)
    (back,) = peers.changes(7.0)
    assert (back.up, back.for_s) == (True, 6.0)


def test_just_after_a_start_no_model_is_reported_unknown() -> None:
    peers = table()
    early = choose(RouteRequest(model="x"), HERE, peers.view(1.0)).place
    assert isinstance(early, Refuse)
    assert (early.code, early.loading) == ("no_capacity", True)
    late = choose(RouteRequest(model="x"), HERE, peers.view(9.0)).place
    assert isinstance(late, Refuse)
    assert (late.code, late.loading) == ("no_capacity", False), "what was never heard may serve it"
    peers.heard("a", heartbeat(), 10.0)
    for now in (10.0, 99.0):
        known = choose(RouteRequest(model="x"), HERE, peers.view(now)).place
        assert Refuse(code="model_not_found", known=("m",)) == known


def test_the_round_trip_is_the_minimum_of_recent_heartbeats() -> None:
    peers = table()
    for n, hop_s in enumerate((0.002, 0.9, 0.003, 0.5, 0.6, 0.7)):
        peers.heard("a", heartbeat(), float(n), hop_s=hop_s)
    assert peers.view(5.0)[0].hop_s == 0.003
    peers.heard("a", heartbeat(), 6.0, hop_s=0.8)
    assert peers.view(6.0)[0].hop_s == 0.5


def test_prefix_hashes_arrive_as_a_set() -> None:
    peers = table()
    peers.heard("a", heartbeat(prefixes=packed([1, 2, 3])), 1.0)
    assert peers.view(1.0)[0].known["m"] == frozenset({1, 2, 3})


def test_replacing_peers_keeps_the_state_of_those_that_stay() -> None:
    peers = PeerTable([("a", "http://a"), ("b", "http://b")], beat_s=1.0, now=0.0)
    peers.heard("a", heartbeat(), 1.0)
    peers.heard("b", heartbeat("b"), 1.0)
    peers.become([("a", "http://a"), ("b", "http://b2"), ("c", "http://c")], 1.1)
    assert [(p.node, p.state) for p in peers.view(1.1)] == [("a", "up"), ("b", "unknown"), ("c", "unknown")]
    assert not peers.heard("gone", heartbeat("gone"), 1.2), "a late answer of one that is no peer any more"


class _Event(msgspec.Struct, frozen=True):
    after_s: float
    what: str


events = st.lists(
    st.builds(_Event, st.floats(0.0, 2.0), st.sampled_from(("heard", "missed", "lose", "tick", "look"))), max_size=40
)


@given(events)
def test_a_heartbeat_always_makes_a_peer_usable_and_silence_down(happened: list[_Event]) -> None:
    peers, now = table(), 0.0
    peers.heard("a", heartbeat(), now)
    for event in happened:
        now += event.after_s
        if event.what == "heard":
            peers.heard("a", heartbeat(), now)
            assert state(peers, now) == "up"
        elif event.what == "missed":
            peers.missed("a", now)
            assert state(peers, now) != "up"
        elif event.what == "lose":
            peers.lose("a")
            assert state(peers, now) in ("lost", "down")
        elif event.what == "tick":
            peers.tick(now, 0.25)
        else:
            peers.changes(now)
            peers.view(now)
    for n in range(1, 17):
        peers.tick(now + n / 4, 0.25)
    assert state(peers, now + 4.0) == "down"
    peers.heard("a", heartbeat(), now + 4.0)
    assert state(peers, now + 4.0) == "up"
