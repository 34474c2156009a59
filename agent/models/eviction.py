"""MemoryEviction: what leaves memory so that a model fits. (NodeEviction, in the aggregator, is another matter.)

A victim's cost is what its absence is expected to cost: the seconds that loading it again takes, times how often it is
asked for. Cheapest per byte leaves first.
"""

from collections.abc import Callable, Sequence

import msgspec


class Occupant(msgspec.Struct, frozen=True, kw_only=True):
    """A model in memory. ``leases`` are requests that use it; times are on a monotonic clock.

    ``reload_s`` is how long it took to load, ``per_s`` how often it is asked for. Before ``stays_until_s`` it leaves
    for no other.
    """

    name: str
    need_bytes: int
    leases: int = 0
    pinned: bool = False
    last_used_s: float = 0.0
    reload_s: float = 1.0
    per_s: float = 0.0
    stays_until_s: float = 0.0

    @property
    def cost(self) -> float:
        """Seconds of loading per second of time that its absence is expected to cost."""
        return self.reload_s * self.per_s


class Fits(msgspec.Struct, frozen=True):
    """Nothing has to leave."""


class Evict(msgspec.Struct, frozen=True, kw_only=True):
    """These leave, in this order."""

    victims: tuple[str, ...]


class NoRoom(msgspec.Struct, frozen=True, kw_only=True):
    """It cannot fit now; ``missing_bytes`` are short even without everything that may leave.

    ``kept`` are the models that stay: in use, pinned, or too young to leave.
    """

    missing_bytes: int
    kept: tuple[str, ...]


Ranking = Callable[[Occupant], tuple[float, float, str]]
"""The smallest leaves first."""


def by_cost(occupant: Occupant) -> tuple[float, float, str]:
    """Cheapest per byte, then the one that was used longest ago."""
    return occupant.cost / occupant.need_bytes if occupant.need_bytes else 0.0, occupant.last_used_s, occupant.name


def by_age(occupant: Occupant) -> tuple[float, float, str]:
    """Least recently used; what others do, and what the simulator compares with."""
    return occupant.last_used_s, 0.0, occupant.name


def make_room(
    need_bytes: int,
    occupants: Sequence[Occupant],
    budget_bytes: int,
    *,
    may_evict: bool = True,
    now_s: float = float("inf"),
    ranking: Ranking = by_cost,
) -> Fits | Evict | NoRoom:
    """Decide how ``need_bytes`` more come under ``budget_bytes``.

    1. Leased and pinned models never leave, nor such as have to stay beyond ``now_s``.
    2. The cheapest leave, until there is room; then any of them is spared, dearest first, whose bytes are not needed.
    3. One victim whose absence costs less than theirs together takes their place.
    """
    used = sum(o.need_bytes for o in occupants)
    short = used + need_bytes - budget_bytes
    if short <= 0:
        return Fits()
    free = [o for o in occupants if not o.pinned and o.leases == 0 and o.stays_until_s <= now_s]
    movable = sorted(free, key=ranking) if may_evict else []
    chosen: list[Occupant] = []
    for occupant in movable:
        if short <= sum(o.need_bytes for o in chosen):
            break
        chosen.append(occupant)
    freed = sum(o.need_bytes for o in chosen)
    if freed < short:
        gone = {o.name for o in movable}
        kept = tuple(o.name for o in occupants if o.name not in gone)
        return NoRoom(missing_bytes=short - sum(o.need_bytes for o in movable), kept=kept)
    for occupant in reversed(list(chosen)):
        if freed - occupant.need_bytes >= short:
            chosen.remove(occupant)
            freed -= occupant.need_bytes
    alone = [o for o in movable if o.need_bytes >= short]
    if ranking is by_cost and len(chosen) > 1 and alone:
        cheapest = min(alone, key=lambda o: (o.cost, o.last_used_s, o.name))
        if cheapest.cost <= sum(o.cost for o in chosen):
            chosen = [cheapest]
    return Evict(victims=tuple(o.name for o in chosen))
