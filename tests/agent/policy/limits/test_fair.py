"""Fair shares of a model's places."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.admission import ADMITTED, Load, Turn, admit
from agent.policy.limits.fair import RECENT_S, Claims, fair_share

claims = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 200), max_size=8)


@pytest.mark.parametrize(
    ("wanted", "key", "places"),
    [
        ({}, "a", 64),
        ({"a": 500}, "a", 64),
        ({"a": 500, "b": 500}, "a", 32),
        ({"a": 500, "b": 10}, "a", 54),
        ({"a": 500, "b": 10}, "b", 32),
        ({"a": 500, "b": 500, "c": 4}, "a", 30),
        ({"a": 500, "b": 500, "c": 500}, "a", 22),  # 64 = 22 + 21 + 21
        ({"a": 500, "b": 500, "c": 500}, "c", 21),
        ({"a": 40, "b": 20}, "a", 44),
    ],
)
def test_a_key_may_hold_its_share_and_what_others_leave(wanted: dict[str, int], key: str, places: int) -> None:
    assert fair_share(64, wanted, key) == places


@given(st.integers(1, 256), claims, st.sampled_from("abcdefgh"))
def test_nobody_gets_less_than_an_equal_share_nor_more_than_all(places: int, wanted: dict[str, int], key: str) -> None:
    found = fair_share(places, wanted, key)
    keys = len(set(wanted) | {key})
    assert max(1, places // keys) <= found <= max(1, places)


@given(st.integers(8, 256), claims.filter(bool))
def test_the_greediest_leaves_the_others_what_they_want_up_to_their_share(places: int, wanted: dict[str, int]) -> None:
    greedy = max(wanted, key=lambda one: (wanted[one], one))
    wanted = {**wanted, greedy: 10_000}
    others = [want for one, want in wanted.items() if one != greedy]
    equal = places // len(wanted)
    assert fair_share(places, wanted, greedy) <= places - sum(min(want, equal) for want in others)


def test_one_key_at_twenty_times_its_share_gets_its_share() -> None:
    """Requests take a second; one client keeps 200 waiting, three others want 10 places each, of 40."""
    seen, ends, served = Claims(), list[tuple[float, str]](), dict.fromkeys("abcd", 0)
    waiting = {"a": 200, "b": 10, "c": 10, "d": 10}
    for step in range(2000):
        now = step * 0.01
        for end in [end for end in ends if end[0] <= now]:
            ends.remove(end)
            seen.left("m", end[1], 1)
        for key in ("a", "a", "a", "b", "a", "c", "a", "d", "a"):
            mine = seen.holds("m", key)
            if mine >= waiting[key]:
                continue
            share = Load(mine, seen.most("m", key, 40, 1, now))
            got = admit(
                model=Load(len(ends), 40), key=Load(mine, 500), draining=False, drain_rate_per_s=lambda: 1, share=share
            )
            if got is ADMITTED:
                seen.entered("m", key, 1)
                ends.append((now + 1.0, key))
                served[key] += step >= 500
    assert served["a"] <= 1.1 * sum(served.values()) / 4
    assert min(served.values()) >= 0.9 * served["a"]


def test_what_a_key_wanted_is_forgotten_and_leaves_its_places() -> None:
    seen = Claims()
    for _ in range(20):
        seen.most("m", "b", 40, 1, 0.0)
        seen.entered("m", "b", 1)
    assert seen.most("m", "a", 40, 1, 1.0) == 20
    for _ in range(20):
        seen.left("m", "b", 1)
    assert seen.holds("m", "b") == 0
    assert seen.most("m", "a", 40, 1, RECENT_S + 1.5) == 40


def test_beyond_its_share_a_key_is_told_that_it_is_its_own_doing() -> None:
    got = admit(model=Load(10, 40), key=Load(5, 64), share=Load(5, 5), draining=False, drain_rate_per_s=lambda: 2.0)
    assert got == Turn(code="key_queue_full", retry_after_s=1)
