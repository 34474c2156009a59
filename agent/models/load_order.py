"""Which model loads next when more are requested than fit: A B C A B C becomes AA BB CC. Pure.

Requests for a resident model are served at once, so all that wait for a model are served together when its turn comes.
A turn ends by itself when the model is no longer used; one that lasts while others wait is ended: its model is closed
to new requests, and evicted when those in flight have ended.
"""

from collections.abc import Sequence

import msgspec

from agent.models.eviction import Evict, Fits, NoRoom, Occupant, make_room


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is not resident and has requests waiting, the oldest since ``since_s``."""

    name: str
    need_bytes: int
    since_s: float


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What to do now: load ``load`` ("" for nothing), and close those in ``close`` to new requests, for ``waiter``."""

    load: str = ""
    close: frozenset[str] = frozenset()
    waiter: str = ""


def next_turn(
    wanted: Sequence[Wanted], occupants: Sequence[Occupant], budget_bytes: int, now_s: float, *, max_wait_s: float
) -> Turn:
    """Decide for this moment.

    1. The model that has waited longest goes first, and loads when it fits or idle models can be evicted for it. One
       that would not fit even if no model was in use blocks none.
    2. When it has waited ``max_wait_s``, the cheapest models in use that would make room are closed for it.
    3. Meanwhile, others load only into free memory.
    """
    possible = [one for one in wanted if could_fit(one.need_bytes, occupants, budget_bytes)]
    queue = sorted(possible, key=lambda one: (one.since_s, one.name))
    close: frozenset[str] = frozenset()
    waiter = ""
    for place, one in enumerate(queue):
        room = make_room(one.need_bytes, occupants, budget_bytes, now_s=now_s)
        if isinstance(room, Fits) or (isinstance(room, Evict) and place == 0):
            return Turn(load=one.name, close=close, waiter=waiter)
        if place == 0 and now_s - one.since_s >= max_wait_s:
            close = _closed_for(one, occupants, budget_bytes, now_s)
            waiter = one.name if close else ""
    return Turn(close=close, waiter=waiter)


def could_fit(need_bytes: int, occupants: Sequence[Occupant], budget_bytes: int) -> bool:
    """Whether it would fit if no model was in use and none had just been loaded."""
    unused = [msgspec.structs.replace(o, leases=0) for o in occupants]
    return not isinstance(make_room(need_bytes, unused, budget_bytes), NoRoom)


def _closed_for(one: Wanted, occupants: Sequence[Occupant], budget_bytes: int, now_s: float) -> frozenset[str]:
    """The models in use that have to drain for it, besides idle ones that can be evicted at once."""
    idle = [msgspec.structs.replace(o, leases=0) for o in occupants]
    room = make_room(one.need_bytes, idle, budget_bytes, now_s=now_s)
    busy = {o.name for o in occupants if o.leases}
    return frozenset(room.victims) & busy if isinstance(room, Evict) else frozenset()
