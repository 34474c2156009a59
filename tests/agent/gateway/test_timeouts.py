"""Timeouts of an attempt: silence is limited, not the time that a prompt takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.timeouts import AttemptTimeouts, TokenGaps


def timeouts(**more: object) -> AttemptTimeouts:
    given: dict[str, object] = {"first_s": 2.0, "gap_s": 5.0, "until_s": 10.0, "learned": False, "request_s": 10.0}
    return AttemptTimeouts(TokenGaps(), **(given | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("events", "now_s", "limit_s", "is_over"),
    [
        ([], 0.0, 2.0, False),
        ([], 9.0, 1.0, True),
        ([("waits", 9.0, 0)], 9.0, 1.0, True),
        ([("waits", 1.0, 100)], 1.0, 2.0, False),
        ([("waits", s, s * 100) for s in range(1, 60)], 59.0, 2.0, False),
        ([("waits", s, 100) for s in range(1, 10)], 9.0, 1.0, True),
        ([("token", 9.0, 0)], 9.0, 5.0, False),
        ([("token", 9.0, 0)], 18.0, 1.0, True),
        ([("token", 1.0, 0), ("waits", 9.0, 900)], 9.0, 2.0, True),
    ],
    ids=[
        "silent",
        "nearly over",
        "queued for long",
        "computed",
        "computed for long",
        "computed no further",
        "a late first token",
        "as long again",
        "set aside",
    ],
)
def test_silence_is_limited_and_not_the_time_of_a_prompt(
    events: list[tuple[str, float, int]], now_s: float, limit_s: float, is_over: bool
) -> None:
    watch = timeouts()
    for what, at_s, done_tok in events:
        watch.limit_s(at_s)
        if what == "token":
            watch.token(at_s)
        else:
            watch.waits(at_s, done_tok)
    assert (watch.limit_s(now_s), watch.is_over) == (limit_s, is_over)


def test_a_continued_answer_has_no_more_time_than_what_was_left() -> None:
    watch = timeouts(fresh=False, until_s=10.0)
    for second in (1.0, 2.0, 3.0):
        watch.waits(second, int(second))
    watch.token(4.0)
    assert watch.until_s == 12.0, "but for the time in which its prompt was computed again"


@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=200))
def test_a_prompt_that_moves_is_never_cut(steps: list[float]) -> None:
    """However long it takes in all, while each silence is shorter than the limit."""
    watch, now_s = timeouts(first_s=2.01, request_s=5.0, until_s=5.0), 0.0
    watch.waits(now_s, 1)
    for done_tok, step_s in enumerate(steps, 2):
        assert watch.limit_s(now_s) > step_s
        now_s += step_s
        watch.waits(now_s, done_tok)
        assert watch.until_s - now_s == pytest.approx(5.0)
