"""Whose prompt is worked on next, in how large pieces, and beside whom it is decoded. Pure.

The prompt with the fewest tokens left goes first, so that a short question does not wait behind a long document; the
time a prompt has waited counts for it, so that no document waits for ever. A long prompt yields between two pieces
to one that has at most half as much left. Short prompts that fit into one piece together are worked on together.

A batch holds its rows' keys and values as one block, so every row occupies as much as the longest. Rows of very
unequal length are therefore decoded in different batches, where reading the model's weights once more costs less than
reading the padding.
"""

from collections.abc import Sequence
from typing import NamedTuple

SMALLEST_CHUNK_TOK = 32
STEP_TOK = 256
"""mlx-lm's caches grow by so many tokens."""
AGEING = 0.5
"""A second of waiting counts as this share of the tokens that are prefilled in a second."""


class Turn(NamedTuple):
    """A prompt that waits or is being worked on; ``left_tok`` are the tokens still to be prefilled."""

    id: int
    left_tok: int
    waited_s: float


def urgency(turn: Turn, rate_tok_per_s: float) -> float:
    """Tokens left less what waiting has earned; the smallest goes first."""
    return turn.left_tok - AGEING * rate_tok_per_s * turn.waited_s


def first(waiting: Sequence[Turn], rate_tok_per_s: float) -> Turn:
    """The prompt to work on next; of equals the one that came first."""
    return min(waiting, key=lambda turn: (urgency(turn, rate_tok_per_s), turn.id))


def yields(current: Turn, best: Turn, rate_tok_per_s: float) -> bool:
    """Whether the prompt in work gives way. Half as much left or less, so that two alike never take turns in vain."""
    shorter = 2 * best.left_tok <= current.left_tok
    return shorter and urgency(best, rate_tok_per_s) < urgency(current, rate_tok_per_s)


def chunk_tok(rate_tok_per_s: float, stall_s: float, largest_tok: int, *, decoding: bool) -> int:
    """Prompt tokens for one step: the largest piece, or what fits into ``stall_s`` while others wait for tokens."""
    if not decoding or rate_tok_per_s <= 0:
        return largest_tok
    return max(SMALLEST_CHUNK_TOK, min(largest_tok, int(rate_tok_per_s * stall_s)))


def together(lead: Turn, others: Sequence[Turn], rate_tok_per_s: float, largest_tok: int) -> list[int]:
    """Ids of the prompts that are prefilled with ``lead`` in one padded piece of at most ``largest_tok`` tokens."""
    longest, ids = lead.left_tok, [lead.id]
    for turn in sorted(others, key=lambda turn: (urgency(turn, rate_tok_per_s), turn.id)):
        longest_then = max(longest, turn.left_tok)
        if (len(ids) + 1) * longest_then <= largest_tok:
            ids.append(turn.id)
            longest = longest_then
    return ids


class Block(NamedTuple):
    """A batch as memory sees it: each of ``rows`` occupies ``longest_tok``."""

    rows: int
    longest_tok: int

    @property
    def padded_tok(self) -> int:
        """Tokens that it occupies, padding included; it grows in steps."""
        return self.rows * -(-self.longest_tok // STEP_TOK) * STEP_TOK

    def joined(self, length_tok: int) -> "Block":
        """With one more row."""
        return Block(self.rows + 1, max(self.longest_tok, length_tok))


def place(blocks: Sequence[Block], length_tok: int, weights_tok: float) -> int | None:
    """The batch in which a row of ``length_tok`` adds least to what one step reads; None for a batch of its own.

    ``weights_tok`` is what one more batch costs at each step: the model's weights, in tokens' worth of keys and values.
    """
    alone = Block(1, length_tok).padded_tok + weights_tok
    costs = [block.joined(length_tok).padded_tok - block.padded_tok for block in blocks]
    best = min(range(len(costs)), key=costs.__getitem__, default=None)
    return best if best is not None and costs[best] <= alone else None


def fits(blocks: Sequence[Block], at: int | None, length_tok: int, budget_tok: int) -> bool:
    """Whether a row may come in without the batches together outgrowing ``budget_tok``; a first row always may."""
    if not blocks:
        return True
    padded = sum(block.padded_tok for block in blocks)
    added = Block(1, length_tok).padded_tok if at is None else blocks[at].joined(length_tok).padded_tok
    return padded + added - (0 if at is None else blocks[at].padded_tok) <= budget_tok
