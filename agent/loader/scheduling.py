"""Whose prompt is worked on next, and in how large pieces. Pure.

The prompt with the fewest tokens left goes first, so that a short question does not wait behind a long document; the
time a prompt has waited counts for it, so that no document waits for ever. A long prompt yields between two pieces
to one that has at most half as much left.
"""

from collections.abc import Sequence
from typing import NamedTuple

SMALLEST_CHUNK_TOK = 32
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
