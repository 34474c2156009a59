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
        ("", 0, 2.0, False),
        ("", 9, 1.0, True),
        ("w1", 1, 2.0, False),
        ("".join(f"w{second} " for second in range(1, 60)), 59, 2.0, False),
        ("w8 ", 17, 1.0, True),
        ("t9", 9, 5.0, False),
        ("t9", 18, 1.0, True),
        ("w40 t49", 50, 5.0, False),
        ("t1 w9", 9, 2.0, True),
    ],
    ids=[
        "silent",
        "nearly over",
        "computed",
        "computed for long",
        "computed no further",
        "a late first token",
        "as long again",
        "as long again after a long prompt",
        "set aside",
    ],
)
def test_silence_is_limited_and_not_the_time_of_a_prompt(
    events: str, now_s: float, limit_s: float, is_over: bool
) -> None:
    watch = timeouts()
    watch.limit_s(0.0)
    for event in events.split():
        at_s = float(event[1:])
        watch.token(at_s) if event[0] == "t" else watch.waits(at_s)
        watch.limit_s(at_s)
    assert (watch.limit_s(now_s), watch.is_over) == (limit_s, is_over)


def test_a_continued_answer_has_no_more_time_than_what_was_left() -> None:
    watch = timeouts(fresh=False, until_s=10.0)
    for second in (0.0, 1.0, 2.0, 3.0):
        watch.waits(second)
        watch.limit_s(second)
    watch.token(4.0)
    assert watch.until_s == 13.0, "but for the time in which its prompt was computed again"


@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=200))
def test_a_prompt_that_moves_is_never_cut(steps: list[float]) -> None:
    """However long it takes in all, while each silence is shorter than the limit."""
    watch, now_s = timeouts(first_s=2.01, request_s=5.0, until_s=5.0), 0.0
    for step_s in steps:
        assert watch.limit_s(now_s) > step_s
        now_s += step_s
        watch.waits(now_s)
        assert watch.until_s - now_s == pytest.approx(5.0)
