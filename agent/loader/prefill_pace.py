"""Prefill pace: how many prompt tokens one step may compute, learnt from the chunks before. Pure."""

import math

SMALLEST_CHUNK_TOK = 32
FORGET = 0.9
"""Weight of a chunk relative to the next one."""
MARGIN = 0.75
"""Share of the time that decoding rows may wait that is planned for; the rest absorbs estimation errors."""
PRESSED = 4
"""Under memory pressure, prefill chunks are smaller by this factor."""
_MEASURED_TOK = 32
"""Smaller chunks are not used to measure the speed of prefill."""


class PrefillCost:
    """Prefill time of a chunk, fitted to earlier ones: seconds = a x tokens + b x tokens x their mean position. The
    second term is attention over all previous tokens. Least squares in which a chunk has 0.9 of the weight of the next
    one."""

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


class PrefillPace:
    """Chunk size and speed of an engine's prefill. Decoding rows wait about ``stall_s`` for a chunk, which has at most
    ``largest_tok`` tokens; ``pressed`` while memory is short."""

    def __init__(self, largest_tok: int, stall_s: float) -> None:
        self._largest_tok, self.stall_s = largest_tok, stall_s
        self._decode_s = 0.0
        self.cost = PrefillCost()
        self.rate_tok_per_s = 0.0
        self.pressed = False

    def chunk_tok(self, before_tok: float, *, decoding: bool) -> int:
        """Prompt tokens for the next step, after ``before_tok`` tokens; ``decoding`` while rows wait for it."""
        decode_s = max(self._decode_s, 1e-6) if decoding else 0.0
        largest = max(SMALLEST_CHUNK_TOK, self._largest_tok // PRESSED) if self.pressed else self._largest_tok
        return chunk_tok(self.cost, self.stall_s, decode_s, before_tok, largest)

    def prefilled(self, tokens: int, before_tok: float, seconds: float) -> None:
        """Learn from a chunk."""
        if tokens < _MEASURED_TOK or seconds <= 0:
            return
        # a chunk that took far longer than expected was delayed by something else; a real change shows in the next ones
        foreseen_s = self.cost.seconds(tokens, before_tok) if self.cost.known else seconds
        self.cost.learn(tokens, before_tok, min(seconds, 3 * foreseen_s))
        rate = tokens / seconds
        self.rate_tok_per_s = rate if not self.rate_tok_per_s else 0.7 * self.rate_tok_per_s + 0.3 * rate

    def decoded(self, seconds: float) -> None:
        """Learn from a step without prefill."""
        self._decode_s = 0.5 * (self._decode_s + seconds)
