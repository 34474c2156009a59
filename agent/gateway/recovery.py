"""Failover: what happens to a request whose worker was lost. Pure; dispatch carries it out."""

from typing import Literal

import msgspec

MAX_RETRIES = 2
CRASHES = 2
"""Crashed loaders after which a request that was in each of them counts as their cause."""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A lost worker, and what is known at that time.

    ``how``: the worker or its loader was lost; it rejected the request, although an old heartbeat had offered to take
    it; its engine failed at this request; or the request is suspect (agent.process.blame says when).
    ``crashes`` are the loaders that crashed with this request, perhaps by chance, in their hands.
    ``elsewhere``: another node has it, and none failed at it before.
    ``left``: the client has part of the answer. ``can_go_on``: every token produced is known. ``held``: a live peer
    can continue it. ``retries`` were made before. ``in_time``: the time for waiting is not over.
    """

    how: Literal["lost", "turned_away", "engine_failed", "suspect"]
    elsewhere: bool
    left: bool
    can_go_on: bool
    held: bool
    retries: int
    in_time: bool
    crashes: int = 0


class Next(msgspec.Struct, frozen=True, kw_only=True):
    """Continue from the tokens produced, start over elsewhere, or give up. A ``paid`` attempt is charged to the retry
    budget, and given up when the budget is exhausted."""

    what: Literal["go_on", "start_over", "give_up"]
    paid: bool = False


def after(loss: Loss) -> Next:
    """Decide.

    1. A request that ends loaders is tried nowhere again: a suspect one, or one that was there when ``CRASHES`` loaders
       crashed. What only waited at such a loader is merely lost.
    2. Rejected before the first byte: start over elsewhere, free of charge.
    3. A client that has part of its answer is owed the rest: continue it, free of charge, or give up; never start over.
    4. An engine that fails at a request may fail at it everywhere: one other node is tried, no more.
    5. Anything else is bounded by ``MAX_RETRIES`` and the budget: continue where a peer can, else start over.
    """
    if loss.how == "suspect" or loss.crashes >= CRASHES:
        return Next(what="give_up")
    if loss.how == "engine_failed" and not loss.elsewhere:
        return Next(what="give_up")
    if loss.how == "turned_away" and not loss.left and loss.in_time:
        return Next(what="start_over")
    if loss.left:
        return Next(what="go_on" if loss.can_go_on else "give_up")
    if loss.retries >= MAX_RETRIES:
        return Next(what="give_up")
    return Next(what="go_on" if loss.can_go_on and loss.held else "start_over", paid=True)
