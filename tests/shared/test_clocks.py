"""A machine slept if the clock that counts sleep says so, and however busy it was, not otherwise."""

import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.clocks import SLEPT_S, Reading, SleepWatch, read, slept_s

SECONDS = st.floats(0, 100)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=2, max_size=6), st.floats(0, 10**6))
def test_a_machine_that_is_held_up_anywhere_did_not_sleep(
    steps: list[tuple[float, float, float]], slept: float
) -> None:
    """Each step: time before a reading, and in the middle of it, twice."""
    now, readings = 1000.0, []
    for wait, first, second in steps:
        now += wait
        readings.append(Reading(now, now + first + slept, now + first + second))
        now += first + second
    watch = SleepWatch(iter(readings).__next__)
    assert [watch.look() for _ in readings[1:]] == [0.0] * (len(readings) - 1)


@given(st.floats(SLEPT_S + 0.001, 10**5), SECONDS)
def test_a_sleep_is_told_once(slept: float, between: float) -> None:
    readings = [Reading(0.0, 5.0, 0.0), *(Reading(between + n, between + n + 5.0 + slept, between + n) for n in (0, 1))]
    watch = SleepWatch(iter(readings).__next__)
    assert watch.look() == pytest.approx(slept)
    assert watch.look() == 0.0


def test_a_process_that_was_stopped_did_not_sleep() -> None:
    """By the real clocks."""
    code = (
        "import sys; from shared.clocks import read, slept_s; before = read(); print('.', flush=True);"
        "sys.stdin.readline(); print(slept_s(before, read()))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert child.stdout is not None
    assert child.stdout.readline() == ".\n"
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(child.pid, signal.SIGCONT)
    out, _ = child.communicate("\n", timeout=60)
    assert float(out) == 0.0


def test_the_clocks_of_this_machine_can_be_read() -> None:
    before = read()
    assert slept_s(before, read()) == 0.0
