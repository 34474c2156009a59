"""The breaker of a provider: when it is left alone."""

from hypothesis import given
from hypothesis import strategies as st

from agent.egress.breaker import FIRST_PAUSE_S, MOST_PAUSE_S, MOST_TOLD_S, OPENS_AFTER, Breaker


def test_it_opens_after_three_failures_and_lets_one_try() -> None:
    breaker = Breaker()
    for n in range(OPENS_AFTER):
        assert breaker.rest_s(n) == 0
        tried = breaker.began()
        breaker.failed(n, "why")
        breaker.ended(tried=tried)
    assert breaker.rest_s(2) == FIRST_PAUSE_S
    later_s = 2 + FIRST_PAUSE_S
    assert breaker.rest_s(later_s) == 0
    assert breaker.began()
    assert breaker.rest_s(later_s) > 0, "one at a time"
    breaker.failed(later_s, "of one that was sent before")
    breaker.failed(later_s, "again", tried=True)
    breaker.ended(tried=True)
    assert breaker.rest_s(later_s) == 2 * FIRST_PAUSE_S
    assert breaker.began()
    breaker.ok()
    breaker.ended(tried=True)
    assert (breaker.rest_s(later_s), breaker.reason) == (0, "")


def test_whoever_tries_and_leaves_makes_room() -> None:
    breaker = Breaker()
    for _ in range(OPENS_AFTER):
        breaker.failed(0, "why")
    later_s = FIRST_PAUSE_S
    assert breaker.began()
    breaker.ended(tried=True)
    assert breaker.rest_s(later_s) == 0


EVENTS = st.lists(st.tuples(st.sampled_from(["ok", "failed", "told", "left"]), st.floats(0, 1000)), max_size=60)


@given(EVENTS)
def test_a_pause_is_bounded_and_a_success_ends_it(events: list[tuple[str, float]]) -> None:
    breaker, now_s = Breaker(), 0.0
    for event, seconds in events:
        now_s += seconds
        tried = breaker.began()
        if event == "ok":
            breaker.ok()
        elif event != "left":
            breaker.failed(now_s, "why", 10_000.0 if event == "told" else None, tried=tried)
        breaker.ended(tried=tried)
        assert 0 <= breaker.rest_s(now_s) <= max(MOST_PAUSE_S, MOST_TOLD_S)
        assert event != "ok" or breaker.rest_s(now_s) == 0
        assert breaker.rest_s(now_s + MOST_PAUSE_S) == 0, "it is always tried again"
