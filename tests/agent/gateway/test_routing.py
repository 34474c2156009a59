"""Routing decisions and their reasons."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.circuit_breaker import State
from agent.gateway.routing import Decision, Forward, Local, Refuse, RouteRequest, choose
from agent.process.prefixes import BLOCK_TOK
from agent.views import ModelView, NodeView


def node(
    name: str,
    *,
    ready: bool = True,
    load: int = 0,
    state: str = "up",
    model: str = "m",
    draining: bool = False,
    known: frozenset[int] = frozenset(),
    heat: int = 0,
    memory: str = "calm",
    **more: object,
) -> NodeView:
    fields = {"prefill_tps": 1000.0, "gap_us": 20_000, "answer_tok": 100, **more}
    view = ModelView(name=model, version="v", ready=ready, coming=not ready, in_flight=load, **fields)  # type: ignore[arg-type]
    url = "" if name == "here" else f"http://{name}"
    return NodeView(
        node=name,
        url=url,
        state=state,
        models=(view,),
        draining=draining,
        known={model: known},
        heat=heat,
        memory=memory,
        hop_s=0.0 if name == "here" else 0.002,
    )


HERE = node("here")
AWAY = node("here", ready=False)
WANTED = RouteRequest(model="m", prompt_tok=100, answer_tok=100)


def where(decision: Decision) -> str:
    assert isinstance(decision.place, Local | Forward), decision.place
    return decision.place.node


@pytest.mark.parametrize(
    ("here", "peers", "expected"),
    [
        (HERE, [], "here"),
        (HERE, [node("a")], "here"),
        (node("here", load=1), [node("a")], "a"),
        (node("here", load=5), [node("a", load=2), node("b", load=1)], "b"),
        (AWAY, [node("a", load=9)], "a"),
        (AWAY, [node("a", state="suspect"), node("b", load=50)], "b"),
        (AWAY, [node("a", state="suspect"), node("b", state="down")], "a"),
        (AWAY, [node("a", state="suspect"), node("b", state="lost")], "a"),
        (node("here", draining=True), [node("a", draining=True), node("b", load=3)], "b"),
        # pending work counts, at the node's speed
        (AWAY, [node("a", prefill_tok=2000), node("b", prefill_tok=100)], "b"),
        (AWAY, [node("a", prefill_tok=2000, prefill_tps=8000.0), node("b", prefill_tok=500)], "a"),
        (AWAY, [node("a", gap_us=80_000), node("b", load=4)], "b"),
        # when all rows are taken, one must become free first
        (AWAY, [node("a", load=8), node("b", load=7)], "b"),
        # throttling and memory pressure count against a node
        (AWAY, [node("a", heat=3), node("b", load=1)], "b"),
        (AWAY, [node("a", memory="hard"), node("b", load=1)], "b"),
        (AWAY, [node("a", kv_ppm=950_000), node("b", load=1)], "b"),
    ],
)
def test_the_node_with_the_earliest_finish_is_chosen(here: NodeView, peers: list[NodeView], expected: str) -> None:
    assert where(choose(WANTED, here, tuple(peers))) == expected


def test_a_continuation_avoids_small_contexts_and_nodes_on_trial() -> None:
    small, large = node("a", context_tok=1_000, versions=("v",)), node("b", context_tok=8_000, versions=("v",), load=9)
    going_on = msgspec.structs.replace(WANTED, version="v", over_tok=1_000)
    found = choose(going_on, AWAY, (small, large))
    assert (where(found), dict(found.excluded)["a"]) == ("b", "context too small")
    on_trial = msgspec.structs.replace(WANTED, version="v", breakers={"a": "probing"})
    found = choose(on_trial, AWAY, (small, large))
    assert (where(found), dict(found.excluded)["a"]) == ("b", "circuit breaker: probing")


def test_a_peer_without_a_heartbeat_may_serve_the_model() -> None:
    unseen = NodeView(node="a", url="http://a", state="down", heard=False)
    unknown = msgspec.structs.replace(WANTED, model="another")
    assert choose(unknown, HERE, ()).place == Refuse(code="model_not_found", known=("m",))
    assert choose(unknown, HERE, (unseen,)).place == Refuse(code="no_capacity", loading=False, known=("m",))


CHAIN = tuple(range(40))


@pytest.mark.parametrize(("holder_load", "expected"), [(0, "a"), (2, "a"), (8, "a"), (40, "b"), (80, "b")])
def test_prompt_cache_hits_are_weighed_against_queueing(holder_load: int, expected: str) -> None:
    request = msgspec.structs.replace(WANTED, chain=CHAIN, prompt_tok=40 * BLOCK_TOK)
    holder = node("a", load=holder_load, known=frozenset(CHAIN[:35]))
    decision = choose(request, AWAY, (holder, node("b")))
    assert where(decision) == expected
    saved = {one.node: one.saved_tok for one in decision.candidates}
    assert saved == {"a": 35 * BLOCK_TOK, "b": 0}


def test_an_uncached_prompt_goes_to_the_least_loaded_node() -> None:
    request = msgspec.structs.replace(WANTED, chain=CHAIN, prompt_tok=40 * BLOCK_TOK)
    known = frozenset(range(100, 200))
    assert where(choose(request, AWAY, (node("a", load=1, known=known), node("b"), node("c", load=2)))) == "b"


def test_requests_sent_since_the_last_heartbeat_count() -> None:
    request = msgspec.structs.replace(WANTED, sent={"a": (3, 300)})
    assert where(choose(request, AWAY, (node("a"), node("b", load=1)))) == "b"


def test_ties_are_broken_at_random_and_the_local_node_wins_them() -> None:
    peers = (node("a"), node("b"), node("c"))
    found = {where(choose(msgspec.structs.replace(WANTED, draw=n / 10), AWAY, peers)) for n in range(10)}
    assert found == {"a", "b", "c"}
    assert where(choose(msgspec.structs.replace(WANTED, draw=0.9), HERE, peers)) == "here"


def test_a_node_without_measurements_gets_default_speeds() -> None:
    fresh = node("b", prefill_tps=None, gap_us=None, answer_tok=None)
    decision = choose(WANTED, AWAY, (node("a", load=1), fresh))
    assert where(decision) == "b"
    assert {one.node: one.measured for one in decision.candidates} == {"a": True, "b": False}


def test_an_answer_is_sent_where_its_tokens_are_not_capped() -> None:
    small, large = node("here", context_tok=2_000), node("a", load=8, context_tok=8_000)
    long_answer = msgspec.structs.replace(WANTED, answer_tok=4_000)
    assert where(choose(WANTED, small, [large])) == "here"
    assert where(choose(long_answer, small, [large])) == "a"
    assert where(choose(long_answer, small, [])) == "here", "it is capped there"


def test_a_context_estimated_too_small_is_tried_last_and_one_known_too_small_never() -> None:
    small, large = node("here", context_tok=1_000), node("a", load=20, context_tok=4_000)
    fits, too_long = WANTED, msgspec.structs.replace(WANTED, prompt_tok=1_500)
    assert where(choose(fits, small, [large])) == "here"
    assert where(choose(too_long, small, [large])) == "a"
    assert where(choose(too_long, small, [])) == "here", "a guess excludes nobody"
    found = choose(msgspec.structs.replace(WANTED, over_tok=1_000), small, [large])
    assert (where(found), found.excluded) == ("a", (("here", "context too small"),))
    assert isinstance(choose(msgspec.structs.replace(WANTED, over_tok=4_000), small, [large]).place, Refuse)


def test_a_node_is_not_tried_twice() -> None:
    request = msgspec.structs.replace(WANTED, tried=frozenset({"here", "a"}))
    decision = choose(request, HERE, (node("a"), node("b", load=7)))
    assert decision.place == Forward(node="b", url="http://b")
    assert dict(decision.excluded) == {"here": "tried", "a": "tried"}


@pytest.mark.parametrize(
    ("breakers", "expected"),
    [
        ({}, "a"),
        ({"a": "open"}, "b"),
        ({"a": "half_open"}, "a"),
        ({"a": "probing"}, "b"),
        ({"a": "open", "b": "open"}, "a"),
        ({"a": "probing", "b": "open"}, "b"),
    ],
)
def test_open_breakers_exclude_nodes(breakers: dict[str, State], expected: str) -> None:
    request = msgspec.structs.replace(WANTED, breakers=breakers)
    assert where(choose(request, AWAY, (node("a"), node("b", load=3)))) == expected


def test_all_nodes_on_trial_gives_a_short_wait() -> None:
    request = msgspec.structs.replace(WANTED, breakers={"a": "probing", "b": "probing"})
    decision = choose(request, AWAY, (node("a"), node("b")))
    assert isinstance(decision.place, Refuse)
    assert (decision.place.code, decision.place.loading) == ("no_capacity", True)


def test_a_continuation_needs_the_same_version_and_prefers_a_ready_node() -> None:
    request = msgspec.structs.replace(WANTED, version="old")
    back = node("here", ready=False, versions=("old",))
    assert where(choose(request, back, (node("a", load=6, versions=("old", "new")), node("b")))) == "a"
    assert where(choose(request, back, (node("b"),))) == "here"


def test_unknown_and_unavailable_models_are_distinguished() -> None:
    unknown = choose(RouteRequest(model="x"), HERE, (node("a", model="y"),)).place
    assert Refuse(code="model_not_found", known=("m", "y")) == unknown
    away = choose(WANTED, AWAY, (node("a", state="down"),)).place
    assert isinstance(away, Refuse)
    assert (away.code, away.loading) == ("no_capacity", True)


states = st.sampled_from(("up", "suspect", "lost", "down", "unknown"))
nodes = st.builds(
    node,
    st.sampled_from("abcdef"),
    ready=st.booleans(),
    load=st.integers(0, 20),
    state=states,
    draining=st.booleans(),
    prefill_tok=st.integers(0, 10_000),
    prefill_tps=st.none() | st.floats(1.0, 1e5),
    gap_us=st.none() | st.integers(1, 10**6),
    answer_tok=st.none() | st.integers(0, 5000),
    kv_ppm=st.integers(0, 10**6),
    heat=st.integers(0, 9),
)
breakers_of = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(("open", "half_open", "probing")))


@given(
    st.lists(nodes, max_size=6, unique_by=lambda n: n.node),
    st.frozensets(st.sampled_from("abcdef")),
    breakers_of,
    st.floats(0, 1, exclude_max=True),
)
def test_an_eligible_node_is_chosen_whenever_one_exists(
    peers: list[NodeView], tried: frozenset[str], breakers: dict[str, State], dice: float
) -> None:
    request = msgspec.structs.replace(WANTED, tried=tried, breakers=breakers, draw=dice)
    decision = choose(request, AWAY, tuple(peers))
    usable = {
        p.node: p
        for p in peers
        if p.state in ("up", "suspect")
        and not p.draining
        and p.node not in tried
        and p.models[0].ready
        and breakers.get(p.node) != "probing"
    }
    assert {one.node for one in decision.candidates} == set(usable)
    assert {one for one, _ in decision.excluded} == {p.node for p in peers if p.node not in usable} | {"here"}
    if isinstance(decision.place, Refuse):
        assert not usable
        return
    assert decision.place.node in usable
    good = [n for n, p in usable.items() if p.state == "up" and breakers.get(n) != "open"]
    assert not good or decision.place.node in good
    assert all(one.cost_s >= 0 for one in decision.candidates)


def test_a_calibration_stands_for_what_was_not_measured_lately() -> None:
    """From the first request on a node knows its own speed, with as many rows as there are, and its stall limits."""
    idle = node("here", prefill_tps=500.0, gap_us=1_000_000, answer_tok=None, crowd=4.0)
    (one,) = choose(WANTED, idle, []).candidates
    assert one.measured
    assert one.step_s == pytest.approx(1.0 + 4.0 / 8)
    assert one.prefill_s == pytest.approx(100 / 500)
    # all rows taken: how long until one is free depends on answers, of which nothing is known
    (full,) = choose(WANTED, node("here", load=8, answer_tok=None, crowd=4.0), []).candidates
    assert not full.measured
    (unknown,) = choose(WANTED, node("here", prefill_tps=None, gap_us=None, answer_tok=None), []).candidates
    assert (unknown.measured, unknown.step_s) == (False, 0.0)
