"""Delay before the next attempt; pure, so that tests need not wait."""


def full_jitter_s(attempt: int, random_01: float, *, base_s: float = 1.0, cap_s: float = 300.0) -> float:
    """Seconds before attempt ``attempt`` + 1 (counted from 0): ``random_01`` times a capped ceiling that doubles.

    Full jitter, so that nodes which lost the same store do not all reconnect at once.
    """
    return random_01 * min(cap_s, base_s * 2.0 ** min(attempt, 30))
