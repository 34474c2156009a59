"""Circuit breakers, retry budgets and stall timeouts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.circuit_breaker import FIRST_PAUSE_S, MAX_PAUSE_S, CircuitBreaker
from agent.gateway.node_health import NodeHealth
from agent.gateway.retry_budget import FLOOR_PER_S, MOST, SHARE, RetryBudget
from agent.gateway.timeouts import FIRST_FLOOR_S, GAP_FLOOR_S, TokenGaps, first_limit_s


def opened() -> CircuitBreaker:
    breaker = CircuitBreaker()
    for n in range(3):
        breaker.failed((n - 2) * 0.2, "broke off")
    return breaker


def test_three_consecutive_failures_open_the_breaker_and_two_do_not() -> None:
    breaker = CircuitBreaker()
    for n in range(20):
        breaker.failed(n, "broke off")
        breaker.failed(n + 0.2, "broke off")
        assert breaker.state(n + 0.2) == "closed"
        for _ in range(4):
            breaker.ok(n + 0.3)
    assert opened().state(0.0) == "open"


def test_a_failure_rate_of_half_opens_the_breaker_without_three_in_a_row() -> None:
    breaker = CircuitBreaker()
    for n in range(20):
        breaker.failed(n / 5, "stalls")
        breaker.ok(n / 5)
        if breaker.state(n / 5) == "open":
            break
    assert breaker.state(n / 5) == "open"
    assert n > 3


def test_a_lost_connection_with_fifty_requests_counts_as_one_failure() -> None:
    breaker = CircuitBreaker()
    for number in range(2):
        for n in range(50):
            breaker.failed(number + n / 1000, "broke off")
        assert breaker.state(number) == "closed"
    breaker.failed(2.0, "broke off")
    assert breaker.state(2.0) == "open"


def test_after_the_back_off_one_trial_request_decides() -> None:
    breaker = opened()
    assert breaker.state(FIRST_PAUSE_S - 0.1) == "open"
    assert breaker.state(FIRST_PAUSE_S) == "half_open"
    assert breaker.begin(FIRST_PAUSE_S)
    assert breaker.state(FIRST_PAUSE_S) == "probing"
    breaker.ok(FIRST_PAUSE_S, probe=True)
    assert breaker.state(FIRST_PAUSE_S) == "closed"
    assert not breaker.begin(FIRST_PAUSE_S)


def test_a_failed_trial_doubles_the_back_off_up_to_a_bound() -> None:
    breaker, now = opened(), 0.0
    pauses = []
    for _ in range(8):
        now += breaker.left_s(now)
        assert breaker.begin(now)
        breaker.failed(now, "broke off", probe=True)
        pauses.append(breaker.left_s(now))
    assert pauses[:3] == pytest.approx([4.0, 8.0, 16.0])
    assert max(pauses) == pytest.approx(MAX_PAUSE_S)


def test_requests_in_flight_during_a_trial_do_not_decide() -> None:
    breaker = opened()
    assert breaker.begin(3.0)
    assert not breaker.begin(3.0)
    breaker.failed(3.1, "broke off", probe=False)
    breaker.given_up(probe=False)
    assert breaker.state(3.2) == "probing"


def test_an_early_trial_does_not_prolong_the_back_off() -> None:
    breaker = opened()
    for n in range(5):
        assert breaker.begin(0.5 + n / 10)
        breaker.failed(0.6 + n / 10, "broke off", probe=True)
    assert breaker.state(FIRST_PAUSE_S) == "half_open"


def test_late_results_of_earlier_requests_are_ignored() -> None:
    breaker = opened()
    breaker.ok(0.5)
    assert breaker.state(0.5) == "open"
    breaker.failed(1.9, "broke off")
    assert breaker.state(FIRST_PAUSE_S) == "half_open"


def test_an_inconclusive_trial_lets_the_next_request_try() -> None:
    breaker = opened()
    assert breaker.begin(3.0)
    breaker.given_up(probe=True)
    assert breaker.state(3.0) == "half_open"


def test_a_recovered_node_is_tried_at_once() -> None:
    breaker = opened()
    breaker.fresh(0.1)
    assert breaker.state(0.1) == "half_open"
    fine = CircuitBreaker()
    fine.fresh(0.1)
    assert fine.state(0.1) == "closed"


steps = st.lists(
    st.tuples(st.floats(0.0, 5.0), st.sampled_from(("ok", "failed", "given_up", "begin", "fresh"))), max_size=60
)


@given(steps)
def test_at_most_one_request_is_on_trial_and_success_always_closes(happened: list[tuple[float, str]]) -> None:
    breaker, now, trial = CircuitBreaker(), 0.0, False
    for after_s, what in happened:
        now += after_s
        before = breaker.state(now)
        if what == "begin":
            if before == "half_open":
                assert breaker.begin(now)
                trial = True
        elif what == "fresh":
            breaker.fresh(now)
            trial = trial and breaker.state(now) == "probing"
        elif what == "ok":
            breaker.ok(now, probe=trial)
            if trial:
                assert breaker.state(now) == "closed"
            trial = False
        elif what == "failed":
            breaker.failed(now, "x", probe=trial)
            if trial:
                assert breaker.state(now) in ("open", "half_open")
            trial = False
        else:
            breaker.given_up(probe=trial)
            trial = False
        assert (breaker.state(now) == "probing") == trial


def test_breakers_are_per_model_and_readable_in_status() -> None:
    trust = NodeHealth()
    for n in range(3):
        trust.failed("a", "m", 0.5 + n / 4, "broke off", probe=False)
    assert trust.states("m", 1.0) == {"a": "open"}
    assert trust.states("other", 1.0) == {}
    (one,) = trust.view(1.0)
    assert (one["node"], one["model"], one["state"], one["reason"]) == ("a", "m", "open", "broke off")
    trust.fresh("a", 1.5)
    assert trust.begin("a", "m", 1.5)
    trust.ok("a", "m", 1.6, probe=True)
    assert trust.states("m", 1.6) == {}
    assert trust.view(1.6) == []


def test_retries_are_bounded_by_a_share_of_the_traffic() -> None:
    budget = RetryBudget(0.0)
    while budget.take(0.0):
        pass
    taken = 0
    for _ in range(1000):
        budget.asked()
        taken += budget.take(0.0)
    assert taken == pytest.approx(1000 * SHARE, abs=1)
    assert budget.refused == 1 + 1000 - taken


def test_a_quiet_rack_may_still_retry() -> None:
    budget = RetryBudget(0.0)
    for _ in range(int(MOST)):
        assert budget.take(0.0)
    assert not budget.take(0.0)
    assert budget.take(1.1 / FLOOR_PER_S)
    assert budget.left() < 1.0


def test_stall_timeouts_adapt_between_a_floor_and_the_configured_bound() -> None:
    gaps = TokenGaps()
    assert gaps.limit_s(60.0) == GAP_FLOOR_S
    for _ in range(500):
        gaps.add(0.8)
    assert gaps.limit_s(60.0) == pytest.approx(8.0, rel=0.03)
    assert gaps.limit_s(6.0) == 6.0
    for _ in range(5000):
        gaps.add(0.01)
    assert gaps.limit_s(60.0) == GAP_FLOOR_S, "what was long ago is forgotten"
    assert gaps.limit_s(60.0, 2.0) == 20.0, "a slow model's steps are known before any was seen"
    assert gaps.limit_s(15.0, 2.0) == 15.0


@pytest.mark.parametrize(
    ("expected_s", "limit_s"), [(0.0, FIRST_FLOOR_S), (1.0, FIRST_FLOOR_S), (4.0, 40.0), (100.0, 120.0)]
)
def test_the_first_token_may_take_ten_times_the_estimate(expected_s: float, limit_s: float) -> None:
    assert first_limit_s(expected_s, 120.0) == limit_s
