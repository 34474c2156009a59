"""Memory eviction: which models are evicted so that another fits.

A victim's cost is what its absence is expected to cost: the seconds that reloading takes, times its request rate. The
cheapest per byte is evicted first.
"""

from collections.abc import Callable, Sequence

import msgspec


class Occupant(msgspec.Struct, frozen=True, kw_only=True):
    """A resident model. ``leases`` are requests that use it; times are on a monotonic clock. ``reload_s`` is how long
    it took to load, ``per_s`` its request rate. Before ``stays_until_s`` it is not evicted for another model."""

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
        """Expected cost of its absence, in seconds of loading per second of time."""
        return self.reload_s * self.per_s


class Fits(msgspec.Struct, frozen=True):
    """It fits; nothing is evicted."""


class Evict(msgspec.Struct, frozen=True, kw_only=True):
    """Evict these, in this order."""

    victims: tuple[str, ...]


class NoRoom(msgspec.Struct, frozen=True, kw_only=True):
    """It cannot fit now: ``missing_bytes`` would be short even after evicting all models that may be evicted. ``kept``
    are the models that may not be evicted: in use, pinned, or just loaded."""

    missing_bytes: int
    kept: tuple[str, ...]


Ranking = Callable[[Occupant], tuple[float, float, str]]
"""The smallest is evicted first."""


def by_cost(occupant: Occupant) -> tuple[float, float, str]:
    """Cheapest per byte, then least recently used."""
    return occupant.cost / occupant.need_bytes if occupant.need_bytes else 0.0, occupant.last_used_s, occupant.name


def by_age(occupant: Occupant) -> tuple[float, float, str]:
    """Least recently used: the common policy, with which the simulator compares."""
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
    """Decide how ``need_bytes`` more fit into ``budget_bytes``.

    1. Leased and pinned models are never evicted, nor those whose ``stays_until_s`` is after ``now_s``.
    2. Victims are the cheapest, until it fits; then those whose bytes are not needed are spared, most expensive first.
    3. A single victim whose absence costs no more than theirs together replaces them.
    """
    short = sum(o.need_bytes for o in occupants) + need_bytes - budget_bytes
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
        evictable = {o.name for o in movable}
        kept = tuple(o.name for o in occupants if o.name not in evictable)
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
