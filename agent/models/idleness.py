"""Which model of a node may be timed now. Pure.

Models share the machine's GPU, so nothing is timed while any of them works, is waited for, or is being loaded, swapped
or drained; nor within a moment after a request, because conversations pause for longer than that."""

from collections.abc import Sequence
from typing import NamedTuple

QUIET_S = 3.0
"""For so long no request has been here."""


class Standing(NamedTuple):
    """A served model. ``settled``: no order or load holds it, and nobody waits for it. ``used_s`` ago its last request
    ended or it was loaded; None when it is not resident. ``due``: ready, and its steps are not timed yet."""

    name: str
    settled: bool
    in_flight: int
    used_s: float | None
    due: bool


def to_time(models: Sequence[Standing], *, calm: bool, retiring: bool) -> str | None:
    """The model to time now; None for none. ``calm``: memory is not short; ``retiring``: a loader is being ended."""
    if not calm or retiring or any(not one.settled or one.in_flight for one in models):
        return None
    if any(one.used_s is not None and one.used_s < QUIET_S for one in models):
        return None
    return next((one.name for one in models if one.due), None)
