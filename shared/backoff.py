"""How long to wait before the next try; pure, so that waiting can be tested without waiting."""


def full_jitter_s(attempt: int, random_01: float, *, base_s: float = 1.0, cap_s: float = 300.0) -> float:
    """Seconds before try ``attempt`` + 1 (attempt counts from 0): ``random_01`` times a doubling, capped ceiling.

    Full jitter, because nodes that lost one store come back at different moments.
    """
    ceiling = min(cap_s, base_s * 2.0 ** min(attempt, 30))
    return random_01 * ceiling
