"""MemoryEviction: what leaves memory so that a model fits. (NodeEviction, in the aggregator, is another matter.)"""

from collections.abc import Sequence

import msgspec


class Occupant(msgspec.Struct, frozen=True, kw_only=True):
    """A model in memory. ``leases`` are requests that use it; ``last_used_s`` on a monotonic clock."""

    name: str
    need_bytes: int
    leases: int
    pinned: bool
    last_used_s: float


class Fits(msgspec.Struct, frozen=True):
    """Nothing has to leave."""


class Evict(msgspec.Struct, frozen=True, kw_only=True):
    """These leave, in this order."""

    victims: tuple[str, ...]


class NoRoom(msgspec.Struct, frozen=True, kw_only=True):
    """It cannot fit; ``missing_bytes`` are short even without everything that may leave."""

    missing_bytes: int
    kept: tuple[str, ...]


def make_room(
    need_bytes: int, occupants: Sequence[Occupant], budget_bytes: int, *, may_evict: bool = True
) -> Fits | Evict | NoRoom:
    """Decide how ``need_bytes`` more come under ``budget_bytes``.

    Leased and pinned models never leave. Least recently used first; then any victim is spared whose bytes turn out
    not to be needed. Models in use are thus never disturbed for one that is not.
    """
    used = sum(o.need_bytes for o in occupants)
    short = used + need_bytes - budget_bytes
    if short <= 0:
        return Fits()
    movable = sorted((o for o in occupants if not o.pinned and o.leases == 0), key=lambda o: (o.last_used_s, o.name))
    chosen: list[Occupant] = []
    for occupant in movable if may_evict else ():
        if short <= sum(o.need_bytes for o in chosen):
            break
        chosen.append(occupant)
    freed = sum(o.need_bytes for o in chosen)
    if freed < short:
        gone = {o.name for o in chosen}
        return NoRoom(missing_bytes=short - freed, kept=tuple(o.name for o in occupants if o.name not in gone))
    for occupant in list(chosen):
        if freed - occupant.need_bytes >= short:
            chosen.remove(occupant)
            freed -= occupant.need_bytes
    return Evict(victims=tuple(o.name for o in chosen))
