"""Ranks in the engine: whose prompt starts, which rows are kept for higher ranks, and which row yields its own. Pure.

``agent.loader.row_placement`` decides among requests of one rank; this narrows what it sees to those of the highest.
Where all rows have the same rank and leave none to others, it sees everything.

A step with many rows takes longer than one with few, which no order of turns can help. So where rows are reserved,
those that have them are decoded in a batch of their own, and the batches that leave rows to them pause until they have
their first token: an operator who reserves rows pays with one more reading of the weights in each step.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from agent.loader.row_placement import Candidate, Placed, Placement
from agent.loader.scheduling import Turn, first
from agent.wire.priority import STARVED

MAX_YIELDS = 4
"""A row yields to higher ranks so many times; then it stays until its answer is complete."""


class Standing(NamedTuple):
    """A row among others. Of all rows it leaves ``leaves_rows`` to those that leave fewer. ``yielded`` is how often it
    yielded to a higher rank."""

    rank: int = 0
    leaves_rows: int = 0
    yielded: int = 0

    @property
    def held_by(self) -> int:
        """The rank that holds it in its row."""
        return self.rank if self.yielded < MAX_YIELDS else STARVED

    @property
    def leaves(self) -> int:
        """Rows that it leaves to others: none once it has waited long enough for them."""
        return 0 if self.rank == STARVED else self.leaves_rows


Standings = Mapping[int, Standing]
"""By row."""


class Begin(NamedTuple):
    """What is prefilled next: the prompt that is set aside for it, the row that begins, and the rows of lower rank that
    are preempted for it."""

    sets_aside: int | None = None
    begins: int | None = None
    preempts: tuple[int, ...] = ()


def rows_for(leaves: int, others: Sequence[Standing], rows: int) -> int:
    """How many of all ``rows`` may be taken when one that leaves so many joins the ``others``: those that leave fewer
    may be in the rows that it leaves. One of all rows is never left to others."""
    leaves = min(leaves, rows - 1)
    return min(rows, rows - leaves + sum(other.leaves < leaves for other in others)) if leaves else rows


def could_start(waiting: Standings, placed: Standings, rows: int) -> set[int]:
    """Which of the waiting rows would find one of all ``rows`` free that they do not leave to others. The others wait
    for their equals, or for what nobody reserved from them: a turn of a higher rank takes nothing from them."""
    others = list(placed.values())
    return {number for number, one in waiting.items() if len(others) < rows_for(one.leaves, others, rows)}


def yielding(placed: Sequence[Placed], standings: Standings, rank: int) -> list[int]:
    """Ids of rows that yield theirs to this rank, in this order: the lowest rank first, of it one whose answer has not
    begun, then the youngest."""
    lower = [row for row in placed if standings[row.id].held_by < rank and not row.prefilling]
    lower.sort(key=lambda row: (standings[row.id].held_by, row.made_tok > 0, -row.begun_s))
    return [row.id for row in lower]


def least(placed: Sequence[Placed], standings: Standings) -> int:
    """The row that is preempted when there is too little memory: the youngest of the lowest rank."""
    return min(placed, key=lambda row: (standings[row.id].held_by, -row.begun_s)).id


def seen(placement: Placement, best: Standing, standings: Standings) -> Placement:
    """The placement as one that starts sees it: without the rows that it leaves to others, without the batches of those
    that leave more or fewer, and without regard to first tokens of lower ranks."""
    others = [standings[row.id] for row in placement.rows]
    if not best.leaves and all(other.rank >= best.rank and not other.leaves for other in others):
        return placement

    def as_seen(row: Placed) -> Placed:
        other = standings[row.id]
        made_tok = max(1, row.made_tok) if other.rank < best.rank else row.made_tok
        return row._replace(made_tok=made_tok, apart=row.apart or other.leaves != best.leaves)

    batches = tuple(tuple(map(as_seen, batch)) for batch in placement.batches)
    return Placement(batches, placement.limits._replace(rows=rows_for(best.leaves, others, placement.limits.rows)))


def paused(placement: Placement, standings: Standings) -> set[int]:
    """Batches that pause: each of their rows leaves more rows to others than one that has no token yet."""
    awaited = [standings[row.id].leaves for row in placement.rows if not row.made_tok]
    if not awaited:
        return set()
    return {
        at
        for at, batch in enumerate(placement.batches)
        if batch and all(standings[row.id].leaves > min(awaited) for row in batch)
    }


def begin(
    placement: Placement, ready: Sequence[Candidate], prefilling: Sequence[Turn], rate: float, standings: Standings
) -> Begin:
    """The next prompt to prefill among ``ready`` ones, which are all of the highest rank that waits. ``standings`` are
    those of all rows."""
    turn = first([row.turn for row in ready], rate)
    best = next(row for row in ready if row.turn == turn)
    rank = standings[turn.id].rank
    there = [standings[one.id].held_by for one in prefilling]
    if any(other > rank for other in there) or (len(there) > 1 and min(there) < rank):
        return Begin()  # several prompts at once are short: they are done in a step
    if there and there[0] < rank:
        current = prefilling[0].id
        rest = placement.without(current)
        preempts = _making_way(rest, best, standings)
        rest = _without(rest, preempts)
        if not seen(rest, standings[turn.id], standings).room_for(best):
            return Begin()
        begins = seen(rest, standings[turn.id], standings).start(ready, [], rate).begins
        return Begin(current, begins, preempts if begins is not None else ())
    preempts = () if prefilling else _making_way(placement, best, standings)
    rest = seen(_without(placement, preempts), standings[turn.id], standings)
    sets_aside, begins = rest.start(ready, prefilling, rate)
    return Begin(sets_aside, begins, preempts if begins is not None else ())


def _making_way(placement: Placement, row: Candidate, standings: Standings) -> tuple[int, ...]:
    """Rows of lower rank without which a row has room: as few as that takes, none where it does not help. Under memory
    pressure none, since what is preempted has to be kept, or computed again."""
    mine = standings[row.turn.id]
    if placement.limits.pressed or seen(placement, mine, standings).room_for(row):
        return ()
    ids: tuple[int, ...] = ()
    for number in yielding(placement.rows, standings, mine.rank):
        ids += (number,)
        if seen(_without(placement, ids), mine, standings).room_for(row):
            return ids
    return ()


def _without(placement: Placement, ids: Sequence[int]) -> Placement:
    for number in ids:
        placement = placement.without(number)
    return placement
