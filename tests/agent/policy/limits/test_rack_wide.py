"""Whatever happens to nodes and heartbeats, the rack's limit holds; and capacity moves to where it is needed."""

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.policy.limits.limit import Amounts, Limit, Name
from tests.agent.policy.limits.made_nodes import Node, Rack

EXAMPLES = int(os.environ.get("MLXRACK_LIMITS_EXAMPLES", "200"))
LARGEST = 40
MINUTE = Limit(Name("key:a", "minute", "requests"), 9)
MINUTE_TOKENS = Limit(Name("key:a", "minute", "tokens"), 150)
DAY = Limit(Name("key:a", "day", "requests"), 12)
DAY_TOKENS = Limit(Name("key:a", "day", "completion_tok"), 200)
NODES = [f"n{n}" for n in range(3)]

node = st.sampled_from(NODES)
tokens = st.integers(1, LARGEST)
action = st.one_of(
    st.tuples(st.just("burst"), node, st.integers(1, 8), tokens, tokens, st.booleans()),
    st.tuples(st.just("settle"), node),
    st.tuples(st.just("tick"), node),
    st.tuples(st.just("hear"), node, node, st.sampled_from([0, 0, 0, 1, 2, 5])),
    st.tuples(st.just("meet")),
    st.tuples(st.just("kill"), node),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 0.5, 1.0, 6.0, 20.0, 58.0, 61.0, 71.0])),
)
actions = st.lists(action, min_size=10, max_size=60)
Schedule = list[tuple[Any, ...]]


def played(limit: Limit, schedule: Schedule) -> Rack:
    """A rack whose nodes have heard of each other, after everything on the schedule."""
    rack = Rack(3, [limit])
    rack.meet()
    for what, *args in schedule:
        if what == "burst":
            name, count, first, second, at_once = args
            for _ in range(count):
                bound, real = Amounts(0, max(first, second)), Amounts(0, min(first, second))
                rack.nodes[name].request(bound, real, settled=at_once)
        elif what == "hear":
            giver, to, back = args
            if giver != to:
                rack.deliver(giver, to, back)
        elif what == "meet":
            for each in rack.nodes.values():
                each.tick()
            rack.meet()
        elif what == "wait":
            rack.s += args[0]
        else:
            getattr(rack.nodes[args[0]], "killed" if what == "kill" else str(what))()
        # whatever else: nobody owes, and together they have no more than the limit
        held = [one.book.ledger(limit, one.now).part(rack.s) for one in rack.nodes.values()]
        assert min(held) >= 0
        assert sum(held) <= limit.most
    return rack


@settings(max_examples=EXAMPLES)
@given(actions)
def test_no_schedule_of_losses_delays_doubles_and_kills_exceeds_a_limit_per_minute(schedule: Schedule) -> None:
    assert played(MINUTE, schedule).most_in_a_window("requests") <= MINUTE.most


@settings(max_examples=EXAMPLES)
@given(actions)
def test_no_schedule_exceeds_a_budget_of_requests(schedule: Schedule) -> None:
    assert played(DAY, schedule).total("requests") <= DAY.most


@settings(max_examples=EXAMPLES)
@given(actions)
def test_no_schedule_overspends_tokens_by_more_than_one_request_a_gateway(schedule: Schedule) -> None:
    assert played(MINUTE_TOKENS, schedule).most_in_a_window("tokens") <= MINUTE_TOKENS.most + 3 * (LARGEST - 1)
    assert played(DAY_TOKENS, schedule).total("completion_tok") <= DAY_TOKENS.most + 3 * (LARGEST - 1)


def test_a_borrower_that_hears_that_its_loan_has_ended_does_not_send_back_what_it_has_just_used() -> None:
    at_once, more = ("burst", "n0", 5, 1, 1, True), ("burst", "n0", 8, 1, 1, True)
    schedule: Schedule = [at_once, ("meet",), ("meet",), more, ("meet",), more, ("wait", 58.0)]
    later: Schedule = [("meet",), ("meet",), ("burst", "n2", 8, 1, 1, True), ("burst", "n1", 8, 1, 1, True)]
    assert played(MINUTE, schedule + later).most_in_a_window("requests") <= MINUTE.most


def test_what_a_killed_node_had_let_through_and_given_away_still_counts() -> None:
    for limit in (MINUTE, DAY):
        rack = Rack(3, [limit])
        rack.meet()
        for _ in range(40):
            rack.nodes["n0"].request(Amounts(), Amounts())
            for one in rack.nodes.values():
                one.tick()
            rack.meet()
        before = len(rack.used)
        assert before > limit.most / 3
        rack.nodes["n1"].request(Amounts(), Amounts())  # not saved any more
        for one in rack.nodes.values():
            one.killed()
        for _ in range(20):
            for one in rack.nodes.values():
                one.request(Amounts(), Amounts())
        assert len(rack.used) <= limit.most
        rack.s += 30.0
        for one in rack.nodes.values():
            one.tick()
            rack.s += 9.0
            one.killed()
            one.request(Amounts(), Amounts())
        assert len(rack.used) <= limit.most
        rack.s += 34.0
        for one in rack.nodes.values():
            one.killed()
            one.request(Amounts(), Amounts())
        assert (len(rack.used) > limit.most) == (limit is MINUTE)


def driven(per_s: float, only: Callable[[Node], bool] = lambda _: True) -> Callable[[Node], None]:
    """A client that sends this many requests a second to each of the gateways."""

    def drive(node: Node) -> None:
        if only(node):
            before = int((node.rack.s - 0.1) * per_s)
            for _ in range(int(node.rack.s * per_s) - before):
                node.request(Amounts(3, 5), Amounts(3, 5))

    return drive


EIGHT = [f"n{n}" for n in range(8)]
RPM = Limit(Name("key:a", "minute", "requests"), 240)


def test_a_key_through_eight_gateways_at_ten_times_its_limit_gets_its_limit() -> None:
    rack = Rack(8, [RPM])
    rack.pass_s(180, driven(5))
    assert rack.most_in_a_window("requests") <= 240
    assert len([one for one in rack.used if one.at_s > 120]) >= 0.95 * 240


def test_a_split_in_two_halves_changes_nothing_of_that() -> None:
    rack = Rack(8, [RPM])
    rack.pass_s(90, driven(5))
    rack.pass_s(90, driven(5), [EIGHT[:4], EIGHT[4:]])
    rack.pass_s(90, driven(5))
    assert rack.most_in_a_window("requests") <= 240
    assert len([one for one in rack.used if one.at_s > 210]) >= 0.9 * 240


@pytest.mark.parametrize("times", [1.0, 1.5, 10.0])
def test_one_gateway_alone_gets_nearly_everything_within_seconds(times: float) -> None:
    rack = Rack(8, [RPM])
    rack.pass_s(10, driven(4 * times, lambda node: node.name == "n3"))
    rack.pass_s(60, driven(4 * times, lambda node: node.name == "n3"))
    assert len([one for one in rack.used if one.at_s > 10]) >= 0.9 * 240
    assert rack.most_in_a_window("requests") <= 240


def test_what_one_gateway_had_drifts_to_another_that_needs_it() -> None:
    rack = Rack(8, [RPM])
    rack.pass_s(60, driven(40, lambda node: node.name == "n3"))
    rack.pass_s(90, driven(40, lambda node: node.name in ("n3", "n5")))
    late = [one for one in rack.used if one.at_s > 90]
    assert len([one for one in late if one.node == "n5"]) >= 0.3 * len(late)
    rack.pass_s(70, driven(40, lambda node: node.name == "n5"))
    assert len([one for one in rack.used if one.at_s > 160]) >= 0.85 * 240
    assert rack.most_in_a_window("requests") <= 240


def test_when_a_gateway_that_had_everything_dies_the_others_have_their_parts_again() -> None:
    rack = Rack(8, [RPM])
    rack.pass_s(60, driven(40, lambda node: node.name == "n3"))
    lost = rack.nodes.pop("n3")
    rack.pass_s(80, driven(40, lambda node: node.name == "n5"), [[name for name in EIGHT if name != "n3"]])
    before = rack.s
    rack.pass_s(60, driven(40, lambda node: node.name == "n5"), [[name for name in EIGHT if name != "n3"]])
    assert len([one for one in rack.used if one.at_s > before]) >= 0.9 * 210, "all but the part of the one that is down"
    rack.nodes["n3"] = lost  # it was only cut off
    rack.pass_s(90, driven(40, lambda node: node.name in ("n3", "n5")))
    assert rack.most_in_a_window("requests") <= 240
    assert len([one for one in rack.used if one.at_s > rack.s - 60]) >= 0.9 * 240


@pytest.mark.parametrize(("deaf", "at_s", "driven_too"), [("n3", 70, EIGHT), ("n5", 70, EIGHT), ("n5", 116, ["n5"])])
def test_a_link_that_works_in_one_direction_only_lets_nobody_use_a_loan_that_has_ended(
    deaf: str, at_s: int, driven_too: list[str]
) -> None:
    """n3 has borrowed everything; from then on one of the two hears nothing of anybody, but is heard."""
    rack = Rack(8, [RPM])
    rack.pass_s(at_s, driven(40, lambda node: node.name == "n3"))
    for step in range(1300):
        rack.s += 0.1
        for node in rack.nodes.values():
            driven(40, lambda node: node.name == "n3")(node)
            driven(5, lambda node: node.name in driven_too)(node)
            if step % 5 == 0:
                node.tick()
            if step % 10 == 3 and node.name != deaf:
                for giver in EIGHT:
                    if giver != node.name:
                        rack.deliver(giver, node.name)
    assert rack.most_in_a_window("requests") <= 240
    assert deaf == "n3" or any(one.node == "n5" for one in rack.used), "it had its loan back"


def test_a_machine_that_slept_uses_no_loan_that_has_ended_meanwhile() -> None:
    rack = Rack(8, [RPM])
    rack.pass_s(10, driven(0))
    asleep = rack.nodes["n3"]
    for _ in range(200):
        asleep.request(Amounts(), Amounts())
    rack.pass_s(3, driven(0))
    assert asleep.book.ledger(RPM, asleep.now).left(rack.s) > 30, "it has borrowed, and not used it yet"
    del rack.nodes["n3"]
    rack.pass_s(140, driven(5))
    rack.nodes["n3"], asleep.mono_s = asleep, -140.0  # its monotonic clock stood still
    asleep.tick()
    for _ in range(300):
        asleep.request(Amounts(), Amounts())
    assert rack.most_in_a_window("requests") <= 240


def test_tokens_at_ten_times_their_limit_with_bounds_far_above_the_truth() -> None:
    draw = random.Random(7)
    rack = Rack(8, [Limit(Name("key:a", "minute", "tokens"), 10_000)])

    def drive(node: Node) -> None:
        if draw.random() < 0.5:  # 40 requests a second of 42 tokens at the mean
            node.request(Amounts(400, 4096), Amounts(draw.randint(4, 20), draw.randint(1, 60)), settled=False)
        if draw.random() < 0.6:
            node.settle()

    rack.pass_s(150, drive)
    assert rack.most_in_a_window("tokens") <= 10_500
    assert sum(sum(one.amounts[:2]) for one in rack.used if one.at_s > 90) >= 8_000


def test_a_budget_moves_in_steps_and_is_spent_to_the_end() -> None:
    budget = Limit(Name("key:a", "month", "requests"), 1000)
    rack = Rack(8, [budget])
    rack.pass_s(20, driven(2, lambda node: node.name == "n3"))
    kept = [rack.nodes[name].book.ledger(budget, rack.nodes[name].now).part(rack.s) for name in EIGHT if name != "n3"]
    assert min(kept) >= 100, "a node that dies now would take more with it"
    rack.pass_s(120, driven(20, lambda node: node.name == "n3"))
    assert rack.total("requests") >= 990
    rack.pass_s(20, driven(5))
    assert rack.total("requests") == 1000


def test_a_node_that_is_away_keeps_its_part_until_the_period_ends() -> None:
    budget = Limit(Name("key:a", "day", "requests"), 80)
    rack = Rack(8, [budget])
    rack.pass_s(60, driven(5, lambda node: node.name != "n7"), [EIGHT[:7]])
    assert rack.total("requests") == 70
    rack.s += 86_400
    rack.pass_s(20, driven(5))
    assert rack.total("requests") == 150


@pytest.mark.parametrize("skew_s", [0.0, 7.0, -7.0])
def test_a_clock_that_differs_by_seconds_gives_no_second_budget_at_midnight(skew_s: float) -> None:
    budget = Limit(Name("key:a", "day", "requests"), 80)
    rack = Rack(8, [budget])
    rack.nodes["n3"].skew_s = skew_s
    rack.s = 43_200 - 20.0
    rack.pass_s(60, driven(5))
    assert rack.total("requests") == 160
    rack.nodes["n3"].skew_s = -120.0
    rack.pass_s(20, driven(5))
    assert rack.total("requests") == 160


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(2, 8), st.sampled_from([60, 100, 140])), min_size=1, max_size=3), st.integers(1, 8)
)
@example([(7, 100)], 1)
def test_other_nodes_or_limits_refill_nothing(changes: list[tuple[int, int]], busy: int) -> None:
    """The nodes change one after another, half a second apart: no more is overspent than what is used meanwhile and
    was not heard of, and what a node had used that is no node of the rack any more."""
    rack = Rack(8, [Limit(DAY.name, 100)])
    rack.pass_s(10, driven(3, lambda node: node.name in EIGHT[:busy]))
    spent, most = rack.total("requests"), 100
    gone = max(0, busy - min(count for count, _ in changes)) * spent // busy
    for count, limit in changes:
        rack.members, rack.limits = EIGHT[:count], (Limit(DAY.name, limit),)
        began = rack.total("requests")
        for name in EIGHT:
            rack.nodes[name].become()
            rack.pass_s(0.5, driven(3, lambda node: node.name in EIGHT[:busy]))
        spent += rack.total("requests") - began + 2 * 3 * busy
        most = max(most, limit)
        rack.pass_s(5, driven(3, lambda node: node.name in EIGHT[: min(busy, count)]))  # noqa: B023
    assert rack.total("requests") <= max(most, spent) + gone


def test_a_second_change_back_gives_nothing_twice() -> None:
    budget = Limit(DAY.name, 100)
    rack = Rack(8, [budget])
    rack.pass_s(60, driven(5, lambda node: node.name == "n0"))
    assert rack.total("requests") >= 99
    for count in (7, 8, 7, 8):
        rack.members = EIGHT[:count]
        for name in EIGHT:
            rack.nodes[name].become()
        rack.pass_s(5, driven(5))
    assert rack.total("requests") <= 100


def test_a_node_that_has_lost_its_state_learns_from_its_peers_what_it_returned() -> None:
    budget = Limit(DAY.name, 160)
    rack = Rack(8, [budget])
    rack.pass_s(10, driven(0))
    borrower = rack.nodes["n1"]
    for _ in range(100):
        borrower.request(Amounts(), Amounts())
    rack.pass_s(20, driven(0))
    assert borrower.book.ledger(budget, borrower.now).loans.returned, "it needed less than it had borrowed"
    borrower.disk, borrower.told, borrower.told_s = b"", [()], [rack.s]
    borrower.killed()
    for _ in range(3):
        rack.meet()
        assert sum(one.book.ledger(budget, one.now).part(rack.s) for one in rack.nodes.values()) <= 160
        borrower.tick()


def test_what_was_saved_counts_from_when_it_was_used() -> None:
    rack = Rack(1, [MINUTE])
    node = rack.nodes["n0"]
    assert [node.request(Amounts(), Amounts()) for _ in range(10)] == [True] * 9 + [False]
    node.tick()
    rack.s += 57.0
    node.killed()
    assert not node.request(Amounts(), Amounts())
    rack.s += 4.0
    assert node.request(Amounts(), Amounts())


def test_a_node_that_has_lost_its_state_learns_from_its_peers_what_it_gave_away() -> None:
    budget = Limit(DAY.name, 160)
    rack = Rack(8, [budget])
    rack.pass_s(30, driven(3, lambda node: node.name == "n0"))
    given_away = rack.nodes["n1"].book.ledger(budget, rack.nodes["n1"].now).lent
    assert given_away > 0
    rack.nodes["n1"].disk, rack.nodes["n1"].told, rack.nodes["n1"].told_s = b"", [()], [rack.s]
    rack.nodes["n1"].rows.clear()
    rack.nodes["n1"].killed()
    rack.pass_s(40, driven(5))
    assert rack.total("requests") <= 160
