"""Scheduling: which prompt is prefilled next, and which are prefilled together. Pure.

The prompt with the fewest tokens left goes first, so that a short question does not wait behind a long document;
waiting raises a prompt's priority, so that no document starves. A long prompt yields between two chunks to one that
has at most half as much left. Short prompts that fit into one chunk together are prefilled together.
"""

from collections.abc import Sequence
from typing import NamedTuple

AGEING = 0.5
"""A second of waiting counts as this share of the tokens prefilled in a second."""


class Turn(NamedTuple):
    """A prompt that waits or is being prefilled; ``left_tok`` are the tokens still to be prefilled."""

    id: int
    left_tok: int
    waited_s: float


def urgency(turn: Turn, rate_tok_per_s: float) -> float:
    """Tokens left minus the credit for waiting; the smallest goes first."""
    return turn.left_tok - AGEING * rate_tok_per_s * turn.waited_s


def first(waiting: Sequence[Turn], rate_tok_per_s: float) -> Turn:
    """The prompt to prefill next; the earliest among equals."""
    return min(waiting, key=lambda turn: (urgency(turn, rate_tok_per_s), turn.id))


def yields(current: Turn, best: Turn, rate_tok_per_s: float) -> bool:
    """Whether the prompt in prefill yields: only to half as much or less, so that similar ones do not alternate."""
    return 2 * best.left_tok <= current.left_tok and urgency(best, rate_tok_per_s) < urgency(current, rate_tok_per_s)


def together(lead: Turn, others: Sequence[Turn], rate_tok_per_s: float, largest_tok: int) -> list[int]:
    """Ids of the prompts that are prefilled with ``lead`` in one padded chunk of at most ``largest_tok`` tokens."""
    longest, ids = lead.left_tok, [lead.id]
    for turn in sorted(others, key=lambda turn: (urgency(turn, rate_tok_per_s), turn.id)):
        longest_then = max(longest, turn.left_tok)
        if (len(ids) + 1) * longest_then <= largest_tok:
            ids.append(turn.id)
            longest = longest_then
    return ids
