"""Where a request goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.peers import Beat, PeerTable
from agent.routing import Forward, Local, ModelView, NodeView, Refuse, RouteRequest, choose


def node(
    name: str, *, ready: bool = True, load: int = 0, state: str = "up", model: str = "m", **more: bool
) -> NodeView:
    view = ModelView(name=model, version="v", ready=ready, coming=not ready, in_flight=load)
    return NodeView(node=name, url="" if name == "here" else f"http://{name}", state=state, models=(view,), **more)


HERE = node("here")


@pytest.mark.parametrize(
    ("here", "peers", "expected"),
    [
        (HERE, [], "here"),
        (HERE, [node("a")], "here"),
        (node("here", load=1), [node("a")], "a"),
        (node("here", load=5), [node("a", load=2), node("b", load=1)], "b"),
        (node("here", load=5), [node("a"), node("b")], "a"),
        (node("here", ready=False), [node("a", load=9)], "a"),
        (node("here", ready=False), [node("a", state="suspect"), node("b", load=50)], "b"),
        (node("here", ready=False), [node("a", state="suspect"), node("b", state="down")], "a"),
        (node("here", draining=True), [node("a", draining=True), node("b", load=3)], "b"),
    ],
)
def test_the_least_loaded_living_node_answers(here: NodeView, peers: list[NodeView], expected: str) -> None:
    place = choose(RouteRequest(model="m"), here, tuple(peers))
    assert isinstance(place, Local | Forward)
    assert expected == place.node


def test_what_was_tried_is_not_tried_again() -> None:
    place = choose(RouteRequest(model="m", tried=frozenset({"here", "a"})), HERE, (node("a"), node("b", load=7)))
    assert Forward(node="b", url="http://b") == place


def test_a_forwarded_request_goes_no_further() -> None:
    place = choose(RouteRequest(model="m", hop=True), node("here", ready=False), (node("a"),))
    assert isinstance(place, Refuse)


def test_unknown_and_unavailable_are_told_apart() -> None:
    unknown = choose(RouteRequest(model="x"), HERE, (node("a", model="y"),))
    assert Refuse(code="model_not_found", known=("m", "y")) == unknown
    away = choose(RouteRequest(model="m"), node("here", ready=False), (node("a", state="down"),))
    assert isinstance(away, Refuse)
    assert (away.code, away.loading) == ("no_capacity", True)


def test_just_after_a_start_nobody_is_told_that_a_model_does_not_exist() -> None:
    table = PeerTable([("a", "http://a")], beat_s=1.0, now=0.0)
    early = choose(RouteRequest(model="x"), HERE, table.view(1.0))
    assert isinstance(early, Refuse)
    assert (early.code, early.loading) == ("no_capacity", True)
    late = choose(RouteRequest(model="x"), HERE, table.view(9.0))
    assert isinstance(late, Refuse)
    assert late.code == "model_not_found"


nodes = st.builds(
    lambda name, ready, load, state, draining: node(name, ready=ready, load=load, state=state, draining=draining),
    st.sampled_from("abcdef"),
    st.booleans(),
    st.integers(0, 9),
    st.sampled_from(("up", "suspect", "down")),
    st.booleans(),
)


@given(st.lists(nodes, max_size=5, unique_by=lambda n: n.node), st.frozensets(st.sampled_from("abcdef")))
def test_a_dead_tried_or_unready_node_is_never_chosen(peers: list[NodeView], tried: frozenset[str]) -> None:
    place = choose(RouteRequest(model="m", tried=tried), node("here", ready=False), tuple(peers))
    usable = [p for p in peers if p.state != "down" and not p.draining and p.node not in tried and p.models[0].ready]
    if isinstance(place, Refuse):
        assert not usable
    else:
        assert place.node in {p.node for p in usable}


def beat(name: str = "a", load: int = 0) -> Beat:
    return Beat(node=name, rack="r", models=(ModelView(name="m", version="v", ready=True, in_flight=load),))


@pytest.mark.parametrize(
    ("age", "state"), [(0.0, "up"), (1.4, "up"), (1.6, "suspect"), (3.4, "suspect"), (3.6, "down")]
)
def test_silence_makes_suspect_and_then_dead(age: float, state: str) -> None:
    table = PeerTable([("a", "u")], beat_s=1.0, now=0.0)
    table.heard("a", beat(), 10.0)
    assert state == table.view(10.0 + age)[0].state


def test_a_refused_connection_counts_at_once_and_a_beat_heals_it() -> None:
    table = PeerTable([("a", "u")], beat_s=1.0, now=0.0)
    table.heard("a", beat(), 1.0)
    table.refused("a", 1.1)
    assert table.view(1.1)[0].state == "down"
    table.heard("a", beat(), 1.2)
    assert table.view(1.2)[0].state == "up"


def test_what_was_sent_counts_until_the_next_beat() -> None:
    table = PeerTable([("a", "u")], beat_s=1.0, now=0.0)
    table.heard("a", beat(load=2), 1.0)
    table.sent("a")
    assert table.view(1.0)[0].models[0].in_flight == 3
    table.heard("a", beat(load=2), 2.0)
    assert table.view(2.0)[0].models[0].in_flight == 2


def test_changes_are_told_once() -> None:
    table = PeerTable([("a", "u"), ("never", "u2")], beat_s=1.0, now=0.0)
    table.heard("a", beat(), 1.0)
    assert table.changes(2.0) == []
    assert [(c.node, c.up) for c in table.changes(5.0)] == [("a", False)]
    assert table.changes(6.0) == []
    table.heard("a", beat(), 7.0)
    (back,) = table.changes(7.0)
    assert (back.up, back.for_s) == (True, 6.0)
