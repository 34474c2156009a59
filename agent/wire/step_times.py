"""How long a model's steps take on this node, as its loader measured them, and what follows from that. Pure.

Times are microseconds, lengths are tokens. Between lengths and between row counts that were measured a step is
interpolated, beyond the last it grows as between the last two.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import msgspec
from msgspec import Meta

TYPICAL_TOK = 1_000
"""Length of the prompt and of the context at which single figures are quoted."""
MOST_CROWD = 64.0
Us = Annotated[float, Meta(ge=0, le=1e11)]
"""A time that some step may take, below a day or so: a file or a loader that tells another one is damaged."""
Tokens = Annotated[int, Meta(ge=1, le=1 << 40)]
Rows = Annotated[int, Meta(ge=1, le=1 << 20)]
Number = Annotated[int, Meta(ge=0, le=1 << 53)]


class RowTimes(msgspec.Struct, frozen=True, kw_only=True):
    """A decode step of ``rows`` rows with ``context_tok`` tokens each. ``points`` are (tokens, microseconds) by length,
    as measured, or as fewer rows tell where so many do not fit; a step between them is interpolated. The line
    base_us + token_us x context_tok is the nearest to them: former versions know only that, and figures that they
    kept have no points. Raises ValueError where points are not ascending or a longer context is cheaper."""

    rows: Rows
    base_us: Us
    token_us: Us
    points: Annotated[tuple[tuple[Tokens, Us], ...], Meta(max_length=64)] = ()

    def __post_init__(self) -> None:
        if any(a >= b or us > more for (a, us), (b, more) in pairwise(self.points)):
            raise ValueError("points: lengths ascend, and a longer one takes no less")

    def us(self, context_tok: float) -> float:
        """A step at this length: never below 0, never falling with the length."""
        if not self.points:
            return self.base_us + self.token_us * context_tok
        return max(0.0, _along(self.points, context_tok))


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """One forward of ``rows`` rows with ``tokens`` tokens each, which speculation would verify."""

    rows: Rows
    tokens: Rows
    us: Us


class StepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """``prefill`` are the coefficients of a chunk of n tokens after ``done``: chunk, token, and token x mean position.
    ``decode`` by rows, ascending. ``context_tok`` is the longest context measured; ``steps`` were measured in
    ``took_us``, and half of them were within ``spread_ppm`` of the median of their kind. Raises ValueError where
    ``decode`` is empty or not ascending. Impossible values are rejected when it is decoded: one would fail every
    estimate that routing makes."""

    prefill: tuple[Us, Us, Us]
    decode: tuple[RowTimes, ...]
    verify: tuple[Verified, ...] = ()
    context_tok: Number = 0
    steps: Number = 0
    took_us: Number = 0
    spread_ppm: Number = 0

    def __post_init__(self) -> None:
        rows = [one.rows for one in self.decode]
        if not rows or rows != sorted(set(rows)):
            raise ValueError("decode: one entry for each number of rows, ascending")

    def step_us(self, rows: float, context_tok: float) -> float:
        """A decode step of ``rows`` rows with this many tokens each."""
        known = [(one.rows, one.us(context_tok)) for one in self.decode]
        fewer = [us for count, us in known if count <= rows]
        return max(_along(known, rows), *fewer) if fewer else known[0][1]

    @property
    def by_length(self) -> bool:
        """Whether it knows a step at each length that was measured, and not only a line near them."""
        return all(one.points for one in self.decode)

    def prefill_us(self, tokens: int, done_tok: int) -> float:
        """A prefill chunk of ``tokens`` after ``done_tok`` tokens."""
        chunk, token, pair = self.prefill
        return chunk + token * tokens + pair * tokens * (done_tok + tokens / 2)

    def prompt_us(self, tokens: int, chunk_tok: int, done_tok: int = 0) -> float:
        """A whole prompt in chunks of at most ``chunk_tok``."""
        ends = [*range(done_tok, done_tok + tokens, chunk_tok), done_tok + tokens]
        return sum(self.prefill_us(end - begin, begin) for begin, end in pairwise(ends))

    def prefill_tps(self, chunk_tok: int) -> float:
        """Tokens per second of a typical prompt."""
        return TYPICAL_TOK * 1e6 / max(1.0, self.prompt_us(TYPICAL_TOK, chunk_tok))

    def verify_us(self, rows: int, tokens: int) -> float | None:
        """One forward of ``tokens`` tokens in each of ``rows`` rows; None where that was not measured."""
        return next((one.us for one in self.verify if (one.rows, one.tokens) == (rows, tokens)), None)

    def crowd(self, rows: int) -> float:
        """How steps of an engine of ``rows`` rows grow with its share of rows in use: by this share of ``gap_us``."""
        if rows == 1:
            return 1.0
        growth = self.step_us(rows, TYPICAL_TOK) / max(1.0, self.step_us(1, TYPICAL_TOK))
        return MOST_CROWD if growth >= rows else min(MOST_CROWD, max(0.0, (growth - 1) / (1 - growth / rows)))

    def gap_us(self, rows: int) -> int:
        """ITL of an idle engine of ``rows`` rows: a step of r rows takes gap_us x (1 + crowd x r / rows)."""
        return round(self.step_us(1, TYPICAL_TOK) / (1 + self.crowd(rows) / rows))


def _along(known: Sequence[tuple[float, float]], at: float) -> float:
    """The value at ``at`` of the polyline through (place, value) with ascending places, which continues at both ends as
    its outermost parts do."""
    if len(known) == 1:
        return known[0][1]
    (a, low), (b, high) = next((pair for pair in pairwise(known) if at <= pair[1][0]), known[-2:])
    return low + (high - low) * (at - a) / (b - a)
