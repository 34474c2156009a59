"""What becomes of a request whose worker was lost. Pure; dispatch does what this decides."""

from typing import Literal

import msgspec

MAX_RETRIES = 2


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A worker was lost, and what is known then.

    ``how``: the worker or its loader is lost; it turned the request away, which an old beat had promised to take; or
    its engine failed at this request. ``elsewhere``: another node has it, and none failed at it before. ``left``: the
    client has a part of the answer. ``can_go_on``: every token that exists is known. ``held``: a living peer can go
    on. ``retries`` were made before. ``in_time``: the time for waiting is not over.
    """

    how: Literal["lost", "turned_away", "engine_failed"]
    elsewhere: bool
    left: bool
    can_go_on: bool
    held: bool
    retries: int
    in_time: bool


class Next(msgspec.Struct, frozen=True, kw_only=True):
    """Go on from the tokens that exist, start over elsewhere, or give up. What is ``paid`` comes out of the retry
    budget, and is given up when there is nothing in it."""

    what: Literal["go_on", "start_over", "give_up"]
    paid: bool = False


def after(loss: Loss) -> Next:
    """Decide.

    1. Turned away before anything has left: elsewhere, and it costs nothing.
    2. A client that has a part of its answer is owed the rest: on from there, and it costs nothing; nowhere else.
    3. An engine that fails at a request may fail at it everywhere: one other node is tried, no more.
    4. Anything else is bounded by ``MAX_RETRIES`` and by the budget: on from the tokens where a peer can, else anew.
    """
    if loss.how == "engine_failed" and not loss.elsewhere:
        return Next(what="give_up")
    if loss.how == "turned_away" and not loss.left and loss.in_time:
        return Next(what="start_over")
    if loss.left:
        return Next(what="go_on" if loss.can_go_on else "give_up")
    if loss.retries >= MAX_RETRIES:
        return Next(what="give_up")
    return Next(what="go_on" if loss.can_go_on and loss.held else "start_over", paid=True)
