"""Which requests may have ended a loader: 1 is in preparation, 2 and 3 are in the engine, 4 waits."""

import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.process.blame import LONG_S, Ending, blamed
from agent.wire.frames import CRASHED, SUSPECT

ABORTED, FAULT, KILLED, RAISED = -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL, 4
PREPARES, COMPUTES, BOTH = (True, False), (False, True), (True, True)
LONG, SHORT = {"preparing": 1, "prepared_s": LONG_S + 0.1}, {"preparing": 1, "prepared_s": LONG_S - 0.1}
ONE, TWO, ANSWERS = {"accepted": {2}}, {"accepted": {2, 3}}, {"accepted": {2}, "answering": {2}}


@pytest.mark.parametrize(
    ("known", "codes"),
    [
        # SIGKILL from outside, or the kernel's for lack of memory
        ({"status": KILLED}, {}),
        ({"status": KILLED} | LONG, {1: SUSPECT}),
        ({"status": KILLED} | SHORT, {1: CRASHED}),
        ({"status": KILLED} | ONE, {2: CRASHED}),
        ({"status": KILLED} | TWO, {2: CRASHED, 3: CRASHED}),
        ({"status": KILLED} | ANSWERS, {2: CRASHED}),
        ({"status": KILLED} | LONG | ONE, {1: SUSPECT, 2: CRASHED}),
        ({"status": KILLED} | SHORT | ONE, {1: CRASHED, 2: CRASHED}),
        # of the daemon's own will: unloaded, swapped, shut down
        ({"status": KILLED, "ours": True} | LONG | TWO, {}),
        ({"status": KILLED, "ours": True} | ONE, {}),
        ({"status": 0, "ours": True} | LONG | ONE, {}),
        ({"status": 0} | LONG | ONE, {}),
        # by its own doing, as a GPU without memory does, even while it is to be unloaded
        ({"status": ABORTED} | ONE, {2: SUSPECT}),
        ({"status": ABORTED, "ours": True} | ONE, {2: SUSPECT}),
        ({"status": ABORTED} | TWO, {2: CRASHED, 3: CRASHED}),
        ({"status": ABORTED} | ANSWERS, {2: CRASHED}),
        ({"status": FAULT} | LONG, {1: SUSPECT}),
        ({"status": FAULT} | SHORT, {1: CRASHED}),
        ({"status": FAULT} | LONG | ONE, {1: SUSPECT, 2: CRASHED}),
        ({"status": ABORTED} | SHORT | ONE, {1: CRASHED, 2: CRASHED}),
        ({"status": ABORTED} | LONG | TWO, {1: SUSPECT, 2: CRASHED, 3: CRASHED}),
        # an engine that raised, in the main thread
        ({"status": RAISED}, {}),
        ({"status": RAISED} | LONG, {}),
        ({"status": RAISED} | LONG | ONE, {2: SUSPECT}),
        ({"status": RAISED} | SHORT | TWO, {2: CRASHED, 3: CRASHED}),
        ({"status": RAISED} | ANSWERS, {2: CRASHED}),
        # ended by the watchdog, which knows what stood still
        ({"status": KILLED, "stood_still": PREPARES} | SHORT | ONE, {1: SUSPECT}),
        ({"status": KILLED, "stood_still": COMPUTES} | LONG | ONE, {2: SUSPECT}),
        ({"status": KILLED, "stood_still": COMPUTES} | LONG | TWO, {2: CRASHED, 3: CRASHED}),
        ({"status": KILLED, "stood_still": COMPUTES} | ANSWERS, {2: CRASHED}),
        ({"status": KILLED, "stood_still": COMPUTES} | LONG, {}),
        ({"status": KILLED, "stood_still": BOTH} | LONG | ONE, {1: SUSPECT, 2: CRASHED}),
        ({"status": KILLED, "stood_still": PREPARES, "ours": True} | LONG, {1: SUSPECT}),
    ],
)
def test_who_may_have_ended_a_loader(known: dict[str, Any], codes: dict[int, str]) -> None:
    assert blamed(Ending(**known)) == codes


endings = st.builds(
    Ending,
    status=st.sampled_from([0, 1, RAISED, KILLED, ABORTED, FAULT]),
    stood_still=st.sampled_from([(False, False), PREPARES, COMPUTES, BOTH]),
    ours=st.booleans(),
    preparing=st.sampled_from([0, 1]),
    prepared_s=st.floats(0.0, 5.0),
    accepted=st.frozensets(st.sampled_from([2, 3])),
    answering=st.just(frozenset()),
)


@given(endings)
def test_at_most_one_request_is_given_up_at_once(end: Ending) -> None:
    found = blamed(end)
    assert list(found.values()).count(SUSPECT) <= 1
    assert set(found) <= {end.preparing, *end.accepted} - {0}
    if not any(end.stood_still) and (end.status in (0, RAISED, 1) or (end.ours and end.status == KILLED)):
        assert end.preparing not in found
