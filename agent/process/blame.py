"""Which requests may have ended a loader. Pure.

A loader has two threads that a request can end it by: the one that prepares, one request at a time, and the main one,
which computes all those that it has accepted. Each is judged by itself.
"""

from collections.abc import Set
from typing import NamedTuple

from agent.wire.frames import CRASHED, SUSPECT

LONG_S = 1.0
"""A request that was being prepared for longer than this when its loader crashed was not there by chance."""
_SIGKILL = -9


class Ending(NamedTuple):
    """How a loader ended. ``stood_still``: the threads (preparing, main) that the watchdog ended it for, if it did;
    ``ours``: the daemon wanted it gone. ``preparing`` (0: none) had been in preparation for ``prepared_s``;
    ``accepted`` were in the engine, and some of them ``answering``."""

    status: int = 0
    stood_still: tuple[bool, bool] = (False, False)
    ours: bool = False
    preparing: int = 0
    prepared_s: float = 0.0
    accepted: Set[int] = frozenset()
    answering: Set[int] = frozenset()


def blamed(end: Ending) -> dict[int, str]:
    """The error codes of the requests that may be why; the others were merely there.

    1. A loader that the daemon ended for reasons of its own, or that left in peace, was ended by no request.
    2. The watchdog knows which thread stood still: only that one's requests may be why.
    3. A signal may be of either thread; an exit status is of the main one, where an engine raised.
    4. SUSPECT: there is no other, and chance does not explain it; a SIGKILL may come from outside, so there it takes a
       long preparation. Else CRASHED: what happens to a request twice is not chance.
    """
    stuck = any(end.stood_still)
    if not stuck and (end.status == 0 or (end.ours and end.status == _SIGKILL)):
        return {}
    prepares, computes = end.stood_still if stuck else (end.status < 0, True)
    found = {}
    if prepares and end.preparing:
        found[end.preparing] = SUSPECT if stuck or end.prepared_s > LONG_S else CRASHED
    if computes:
        alone = not found and len(end.accepted) == 1 and not end.answering
        found |= dict.fromkeys(end.accepted, SUSPECT if alone and (stuck or end.status != _SIGKILL) else CRASHED)
    return found
