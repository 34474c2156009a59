"""Scheduling: which prompt is prefilled next, in which chunk size, and in which batch a row is decoded. Pure.

The prompt with the fewest tokens left goes first, so that a short question does not wait behind a long document;
waiting raises a prompt's priority, so that no document starves. A long prompt yields between two chunks to one that
has at most half as much left. Short prompts that fit into one chunk together are prefilled together.

A batch holds its rows' KV cache as one block, so every row occupies as much as the longest. Rows of very unequal length
are therefore decoded in different batches, where reading the model's weights once more costs less than reading the
padding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

SMALLEST_CHUNK_TOK = 32
STEP_TOK = 256
"""mlx-lm's caches grow in steps of this many tokens."""
FORGET = 0.9
"""Weight of a chunk relative to the next one."""
MARGIN = 0.75
"""Share of the time that decoding rows may wait that is planned for; the rest absorbs estimation errors."""
FIRST_TOKEN_TOK = 64
"""A chunk of more tokens waits until every row with a complete prompt has its first token."""
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
    shorter = 2 * best.left_tok <= current.left_tok
    return shorter and urgency(best, rate_tok_per_s) < urgency(current, rate_tok_per_s)


class PrefillCost:
    """Prefill time of a chunk, fitted to earlier ones: seconds = a x tokens + b x tokens x their mean position.

    The second term is attention over all previous tokens. Least squares in which a chunk has 0.9 of the weight of the
    next one.
    """

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def learn(self, tokens: int, before_tok: float, seconds: float) -> None:
        """Add a chunk of ``tokens`` after ``before_tok`` tokens."""
        n, m = float(tokens), tokens * (before_tok + tokens / 2)
        fresh = (n * n, n * m, m * m, n * seconds, m * seconds)
        self._sums = tuple(FORGET * old + new for old, new in zip(self._sums, fresh, strict=True))  # type: ignore[assignment]

    @property
    def known(self) -> bool:
        """Whether any chunk was measured."""
        return self._sums[0] > 0

    def seconds(self, tokens: int, before_tok: float) -> float:
        """Expected time of a chunk; 0 while nothing is known."""
        a, b = self._fit()
        return a * tokens + b * tokens * (before_tok + tokens / 2)

    def tokens_in(self, seconds: float, before_tok: float) -> int:
        """The largest chunk that takes at most ``seconds``: the root of b/2 n^2 + (a + b p) n = seconds."""
        a, b = self._fit()
        linear = a + b * before_tok
        if b <= 0:
            return int(seconds / linear) if linear > 0 else 0
        # the quadratic formula's stable form, which does not subtract nearly equal numbers
        return int(2 * seconds / (linear + math.sqrt(linear * linear + 2 * b * seconds)))

    def _fit(self) -> tuple[float, float]:
        nn, nm, mm, nt, mt = self._sums
        if nn <= 0:
            return 0.0, 0.0
        determinant = nn * mm - nm * nm
        if determinant > 1e-6 * nn * mm:
            a, b = (nt * mm - mt * nm) / determinant, (nn * mt - nm * nt) / determinant
            if a >= 0 and b >= 0:
                return a, b
            if a < 0:
                return 0.0, mt / mm
        return nt / nn, 0.0


def chunk_tok(cost: PrefillCost, stall_s: float, decode_s: float, before_tok: float, largest_tok: int) -> int:
    """Prompt tokens for one step: the largest chunk, or what fits beside a decode step into the time that decoding rows
    may wait. ``decode_s`` is 0 when no row decodes; twice the time is then allowed, since only new requests wait."""
    if not cost.known:
        return largest_tok
    left_s = MARGIN * stall_s - decode_s if decode_s > 0 else 2 * stall_s
    return max(SMALLEST_CHUNK_TOK, min(largest_tok, cost.tokens_in(max(0.0, left_s), before_tok)))


def together(lead: Turn, others: Sequence[Turn], rate_tok_per_s: float, largest_tok: int) -> list[int]:
    """Ids of the prompts that are prefilled with ``lead`` in one padded chunk of at most ``largest_tok`` tokens."""
    longest, ids = lead.left_tok, [lead.id]
    for turn in sorted(others, key=lambda turn: (urgency(turn, rate_tok_per_s), turn.id)):
        longest_then = max(longest, turn.left_tok)
        if (len(ids) + 1) * longest_then <= largest_tok:
            ids.append(turn.id)
            longest = longest_then
    return ids


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

    ``weights_tok`` is the cost of one more batch per step: reading the model's weights, in tokens of KV cache.
    """
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
