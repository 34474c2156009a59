"""What a million tokens of a model of the rack cost, as budgets of money count them. Pure data."""

from decimal import Decimal
from fractions import Fraction

import msgspec


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """US dollars per million tokens: prompt tokens that were computed, answer tokens, and prompt tokens that a prompt
    cache held."""

    usd_per_mtok_in: Decimal
    usd_per_mtok_out: Decimal
    usd_per_mtok_cached: Decimal = Decimal(0)

    def usd_micro(self, prompt_tok: int, completion_tok: int, cached_tok: int = 0) -> int:
        """What a request costs, in millionths of a dollar, rounded up; ``cached_tok`` are among ``prompt_tok``."""
        # dollars per million tokens are millionths of a dollar per token
        computed = max(0, prompt_tok - cached_tok) * Fraction(self.usd_per_mtok_in)
        cached, answer = (cached_tok * self.usd_per_mtok_cached, completion_tok * self.usd_per_mtok_out)
        return -int(-(computed + Fraction(cached) + Fraction(answer)) // 1)
