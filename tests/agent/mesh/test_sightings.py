"""Two agents under one node id are told apart by their marks, and a restart or a new machine is no second one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.mesh.heartbeats import Heartbeats
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import PeerTable
from agent.mesh.sightings import TOLD_EVERY_S, TWICE_S, Sightings, mark_of, sentence
from agent.mesh.signing import RackKeys

ME, A, B = mark_of("c" * 16, "0" * 32), mark_of("a" * 16, "1" * 32), mark_of("b" * 16, "2" * 32)


def seen(*marks: str, node: str = "n1", every_s: float = 1.0) -> Sightings:
    found = Sightings("n2", ME)
    for at, mark in enumerate(marks):
        found.saw(node, mark, at * every_s)
    return found


@pytest.mark.parametrize(
    ("marks", "twice"),
    [
        ([A], False),
        ([A, A, A], False),
        ([A, A, B, B, B], False),
        ([A, B, A], True),
        ([A, B, B, A, B], True),
        (["", A, ""], False),
        (["x" * 99, A, "x" * 99], False),
        (["<a>", A, "<a>"], False),
    ],
)
def test_an_id_that_changes_back_is_used_twice(marks: list[str], twice: bool) -> None:
    found = seen(*marks).twice(float(len(marks)))
    assert [(one.node, one.one, one.other) for one in found] == ([("n1", A, B)] if twice else [])


def test_a_machine_that_comes_back_after_a_while_is_no_second_one() -> None:
    assert not seen(A, B, A, every_s=TWICE_S + 1).twice(3 * TWICE_S + 3)


def test_it_is_over_when_one_of_the_two_is() -> None:
    found = seen(A, B, A, B, B)
    assert found.twice(TWICE_S)
    assert not found.twice(TWICE_S + 4)


def test_this_nodes_own_id_is_used_twice_by_the_first_stranger() -> None:
    found = seen(A, node="n2")
    (one,) = found.twice(1.0)
    text = sentence(one, "n2")
    assert text.startswith(f"two agents ({ME} and {A}) use this node's id 'n2'")
    assert not seen(ME, node="n2").twice(1.0), "its own request came back"


def test_what_a_peer_sees_is_told_by_the_node_that_it_concerns() -> None:
    found = Sightings("n1", A)
    found.heard("n3", ("n7",), 0.0)
    assert not found.twice(0.0)
    found.heard("n3", ("n1", "n7"), 0.0)
    (one,) = found.twice(0.0)
    assert sentence(one, "n1").startswith("n3 sees two agents under this node's id 'n1': each machine needs its own")


def test_news_are_told_at_first_and_again_from_time_to_time() -> None:
    found = seen(A, B, A)
    assert len(found.news(3.0)) == 1
    assert not found.news(4.0)
    for at in range(10, int(TOLD_EVERY_S) + 10):
        found.saw("n1", (A, B)[at % 2], float(at))
    assert len(found.news(TOLD_EVERY_S + 9)) == 1


@given(st.lists(st.tuples(st.sampled_from(["n1", "n3"]), st.sampled_from([A, B, "", "?"]), st.floats(0, 100))))
def test_memory_is_bounded_by_time_and_one_mark_is_never_two(steps: list[tuple[str, str, float]]) -> None:
    found, now = Sightings("n2", ME), 0.0
    for node, mark, later in steps:
        now += later
        found.saw(node, mark, now)
    for one in found.twice(now):
        assert {one.one, one.other} == {A, B}


# heartbeats


@pytest.mark.parametrize(("late_s", "slept_s", "said"), [(5.0, 0.0, "heartbeats_late"), (5.0, 4.0, "sleep_detected")])
async def test_a_late_tick_alone_is_no_sleep(
    late_s: float, slept_s: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[tuple[str, str]] = []

    class Log:
        def warning(self, event: str, **_: object) -> None:
            lines.append(("warning", event))

        def info(self, event: str, **_: object) -> None:
            lines.append(("info", event))

    monkeypatch.setattr("agent.mesh.heartbeats.log", Log())
    now, slept = [0.0], [0.0]
    table = PeerTable([], beat_s=1.0, now=0.0)
    beats = Heartbeats(
        *(table, PeerClient(RackKeys(["s" * 40]), "n1"), lambda _: None),
        rack="r",
        beat_s=1.0,
        clock=lambda: now[0],
        slept=lambda: slept[0],
    )
    await beats.tick()
    now[0], slept[0] = late_s, slept_s
    await beats.tick()
    assert lines == [("warning" if slept_s else "info", said)]
