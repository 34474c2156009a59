"""What a meter's answer comes to: watts, or a sentence that says why there are none. Pure.

No number stands for "not available": what says so is a ``NoPower``, with which nothing can be computed.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from agent.telemetry.sensors.reading import number


class NoPower(NamedTuple):
    """The meter answers, and its answer holds no power; ``why`` is for the operator."""

    why: str


Power = float | NoPower
"""Watts, or why there are none."""


def says_no(why: str) -> NoPower:
    """The meter itself says that it has no power to report."""
    return NoPower(f"answers, and says no power: {why}")


def without(why: str) -> NoPower:
    """The answer has no power where one is expected."""
    return NoPower(f"answers without a power reading: {why}")


def watts(value: Any, most_w: float, what: str) -> Power:
    """A number of a JSON answer as watts. ``what`` names it."""
    if value is None:
        return says_no(f"{what} is missing or null; is this outlet metered, and its number right?")
    if (found := number(value, most_w)) is not None:
        return found
    if number(value, float("inf")) is None and number(-value if isinstance(value, int | float) else None, most_w):
        return without(f"{what} is negative: reversed wiring, or a plug that feeds power in")
    return without(f"{what} is beyond any possible power")


def total(parts: Iterable[Power]) -> Power:
    """The sum; what one part lacks, the sum lacks."""
    found = 0.0
    for part in parts:
        if isinstance(part, NoPower):
            return part
        found += part
    return found


def known(power: Power) -> float | None:
    """Watts, None without."""
    return None if isinstance(power, NoPower) else power
