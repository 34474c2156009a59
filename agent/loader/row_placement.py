"""Row placement: which prompt starts or preempts another, and beside which rows each is decoded. Pure.

A batch holds its rows' KV cache as one block, so every row occupies as much as the longest. Rows of very unequal length
are therefore decoded in different batches, where reading the model's weights once more costs less than reading the
padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agent.loader.scheduling import Turn, first, yields

STEP_TOK = 256
"""mlx-lm's caches grow in steps of this many tokens."""
GROWTH_TOK = 256
"""Room for the first tokens of an answer that is required to admit a row."""
FIRST_TOKEN_TOK = 64
"""A chunk of more tokens waits until every row with a complete prompt has its first token."""


class Block(NamedTuple):
    """Memory of a batch: each of ``rows`` occupies ``longest_tok``."""

    rows: int
    longest_tok: int

    @property
    def padded_tok(self) -> int:
        """Tokens it occupies, padding included, rounded up to the growth step."""
        return self.rows * -(-self.longest_tok // STEP_TOK) * STEP_TOK

    def joined(self, length_tok: int) -> "Block":
        """With one more row."""
        return Block(self.rows + 1, max(self.longest_tok, length_tok))


def place(blocks: Sequence[Block], length_tok: int, weights_tok: float) -> int | None:
    """The batch in which a row of ``length_tok`` adds least to the memory read per step; None for a batch of its own.
    ``weights_tok`` is the cost of one more batch per step: reading the model's weights, in tokens of KV cache."""
    alone = Block(1, length_tok).padded_tok + weights_tok
    costs = [block.joined(length_tok).padded_tok - block.padded_tok for block in blocks]
    best = min(range(len(costs)), key=costs.__getitem__, default=None)
    return best if best is not None and costs[best] <= alone else None


def fits(others: Sequence[Block], joined: Block, budget_tok: int) -> bool:
    """Whether a batch may become ``joined`` beside the ``others`` within ``budget_tok`` in total. A row that would be
    alone always fits, or it could never run."""
    if not others and joined.rows == 1:
        return True
    return sum(block.padded_tok for block in others) + joined.padded_tok <= budget_tok


class Candidate(NamedTuple):
    """A waiting row. An ``apart`` one failed together with others, and must first succeed alone."""

    turn: Turn
    length_tok: int
    left_to_make_tok: int
    apart: bool = False

    @property
    def planned_tok(self) -> int:
        """Tokens that it is expected to occupy soon: its current ones and the first of its answer."""
        return self.length_tok + min(GROWTH_TOK, self.left_to_make_tok)


class Placed(NamedTuple):
    """A row in a batch; ``begun_s`` is when it started, ``made_tok`` the length of its answer so far."""

    id: int
    length_tok: int
    begun_s: float
    made_tok: int
    prefilling: bool
    apart: bool = False


class Limits(NamedTuple):
    """``rows`` and ``kv_tok`` of all batches, padding included. ``weights_tok`` is the cost of one more batch per step:
    reading the model's weights, in tokens of KV cache. ``pressed``: under memory pressure no row joins running ones."""

    rows: int
    kv_tok: int
    weights_tok: float = 0.0
    pressed: bool = False


class Start(NamedTuple):
    """What is prefilled next: the row that is preempted for it, and the row that begins."""

    preempts: int | None = None
    begins: int | None = None


@dataclass(frozen=True)
class Placement:
    """Where an engine's rows are: each batch's rows."""

    batches: tuple[tuple[Placed, ...], ...]
    limits: Limits

    @property
    def rows(self) -> list[Placed]:
        """Rows of all batches."""
        return [row for batch in self.batches for row in batch]

    def without(self, row_id: int) -> "Placement":
        """After a row has left its batch."""
        return Placement(tuple(tuple(row for row in batch if row.id != row_id) for batch in self.batches), self.limits)

    def room_for(self, row: Candidate) -> bool:
        """Whether a row may start beside the running ones."""
        rows = self.rows
        if self.limits.pressed and rows:
            return False
        if sum(not other.prefilling for other in rows) >= self.limits.rows:
            return False
        return self._batch_for(row, self._blocks, self._shut) is not None

    def start(self, ready: Sequence[Candidate], prefilling: Sequence[Turn], rate_tok_per_s: float) -> Start:
        """The next prompt when none is being prefilled, or in place of one that yields."""
        turn = first([row.turn for row in ready], rate_tok_per_s)
        best = next(row for row in ready if row.turn == turn)
        after, preempts = self, None
        if len(prefilling) == 1 and yields(prefilling[0], turn, rate_tok_per_s) and self.room_for(best):
            preempts = prefilling[0].id
            after = self.without(preempts)
        # a long chunk would delay the first token of a row that is a step or two from it
        first_token_due = any(not row.made_tok and not row.prefilling for row in after.rows)
        if (prefilling and preempts is None) or (turn.left_tok > FIRST_TOKEN_TOK and first_token_due):
            return Start(preempts)
        return Start(preempts, turn.id if after.room_for(best) else None)

    def seats(self, rows: Sequence[Candidate]) -> dict[int, list[int]]:
        """Ids of the rows that have room, by the index of the batch that they join; new batches follow the others."""
        blocks, shut = self._blocks, self._shut
        found: dict[int, list[int]] = {}
        for row in rows[: max(0, self.limits.rows - len(self.rows))]:
            if (at := self._batch_for(row, blocks, shut)) is None:
                break
            shut |= {at} if row.apart else set()
            blocks += [Block(0, 0)] * (at + 1 - len(blocks))
            blocks[at] = blocks[at].joined(row.planned_tok)
            found.setdefault(at, []).append(row.turn.id)
        return found

    def outgrown(self) -> int | None:
        """The youngest row when all exceed the memory planned for them; a row that is alone may."""
        rows = self.rows
        if len(rows) < 2 or sum(block.padded_tok for block in self._blocks) <= self.limits.kv_tok:
            return None
        return max(rows, key=lambda row: row.begun_s).id

    @property
    def _blocks(self) -> list[Block]:
        return [Block(len(rows), max((row.length_tok for row in rows), default=0)) for rows in self.batches]

    @property
    def _shut(self) -> set[int]:
        """Batches that no row may join: an ``apart`` row must first succeed alone."""
        return {at for at, rows in enumerate(self.batches) if any(row.apart for row in rows)}

    def _batch_for(self, row: Candidate, blocks: Sequence[Block], shut: set[int]) -> int | None:
        """Index of the batch that a row joins, ``len(blocks)`` for a new one; None when it does not fit in memory. The
        batch that is cheapest to read may have no room, because a row occupies as much as the longest there: then the
        next one is tried."""
        open_to = [] if row.apart else [at for at in range(len(blocks)) if at not in shut]
        while True:
            best = place([blocks[at] for at in open_to], row.planned_tok, self.limits.weights_tok)
            at = len(blocks) if best is None else open_to.pop(best)
            others = [block for number, block in enumerate(blocks) if number != at and block.rows]
            joined = blocks[at].joined(row.planned_tok) if at < len(blocks) else Block(1, row.planned_tok)
            if fits(others, joined, self.limits.kv_tok):
                return at
            if best is None:
                return None
