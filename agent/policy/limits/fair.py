"""Fair shares of a model's places among API keys. Pure."""

from collections.abc import Mapping

RECENT_S = 10.0
"""What a key wanted counts that long."""


def fair_share(places: int, wanted: Mapping[str, int], key_id: str) -> int:
    """How many places a key may hold, of all that a model has: an equal share with every other key that wants some,
    and of what those do not want that want less (max-min fairness). ``wanted`` is by key what it holds and would hold;
    a key that is not listed wants one place. At least 1."""
    claims = dict(wanted)
    claims[key_id] = max(1, claims.get(key_id, 0))
    left, waiting = places, sorted(claims, key=lambda one: (claims[one], one))
    while waiting:
        equal = left // len(waiting)
        if claims[waiting[0]] > equal:
            # all that remain want more than an equal share; the rest of the division goes to the first by name
            more = key_id in sorted(waiting)[: left % len(waiting)]
            return max(1, equal + more if key_id in waiting else claims[key_id])
        if waiting[0] == key_id:
            # nobody after it wants less: it may have all that the others leave
            return max(1, left - sum(min(claims[one], equal) for one in waiting[1:]))
        left -= claims[waiting.pop(0)]
    return max(1, left)


class Claims:
    """By model, how many places each key has wanted at the same time lately: the most it held or was refused beyond
    what it held. The time is an argument, in seconds."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, int]] = {}
        self._most: dict[str, dict[str, tuple[int, float]]] = {}

    def most(self, model: str, key_id: str, places: int, parts: int, now_s: float) -> int:
        """A request of this many parts asks: how many places its key may hold, itself included. It counts as wanted,
        whether it is admitted or not."""
        held = self._held.get(model, {}).get(key_id, 0)
        claims = self._most.setdefault(model, {})
        before, at_s = claims.get(key_id, (0, now_s))
        if held + parts >= before or now_s - at_s > RECENT_S:
            claims[key_id] = held + parts, now_s
        for other in [other for other, (_, other_s) in claims.items() if now_s - other_s > RECENT_S]:
            if not self._held.get(model, {}).get(other):
                del claims[other]
        return fair_share(places, {other: want for other, (want, _) in claims.items()}, key_id)

    def entered(self, model: str, key_id: str, parts: int) -> None:
        """A request was admitted."""
        held = self._held.setdefault(model, {})
        held[key_id] = held.get(key_id, 0) + parts

    def left(self, model: str, key_id: str, parts: int) -> None:
        """It has ended."""
        held = self._held.get(model, {})
        held[key_id] = held.get(key_id, 0) - parts
        if held[key_id] <= 0:
            held.pop(key_id)
        if not held:
            self._held.pop(model, None)

    def holds(self, model: str, key_id: str) -> int:
        """How many places a key holds."""
        return self._held.get(model, {}).get(key_id, 0)
