"""Whether a request may start now."""

import msgspec


class Admit(msgspec.Struct, frozen=True):
    """Go ahead."""


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """Turned away; ``retry_after_s`` is when a place is likely to be free."""

    code: str
    retry_after_s: int


def admit(*, in_flight: int, limit: int, draining: bool, drain_rate_per_s: float) -> Admit | Turn:
    """One model's door: refuse while the node stops, and beyond ``limit`` requests in flight.

    The hint is the time in which the measured rate of completions works off what stands above the limit, 1 to 60 s.
    """
    if draining:
        return Turn(code="draining", retry_after_s=1)
    if in_flight < limit:
        return Admit()
    over = in_flight - limit + 1
    wait_s = over / drain_rate_per_s if drain_rate_per_s > 0 else 5.0
    return Turn(code="queue_full", retry_after_s=round(min(60.0, max(1.0, wait_s))))
