"""Exact sums of money."""

from collections.abc import Hashable, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
MICRO = Fraction(1, 10**6)


def rounded(value: Fraction, unit: Fraction = MICRO) -> Fraction:
    """To a millionth, half to even."""
    return round(value / unit) * unit


def text(value: Fraction | None) -> str | None:
    """As reports print it: six digits after the point."""
    if value is None:
        return None
    exact = Decimal(value.numerator) / Decimal(value.denominator)
    return str(exact.quantize(Decimal("0.000001"), rounding=ROUND_HALF_EVEN))


def divided(total: Fraction, weights: Sequence[tuple[Key, Fraction]]) -> dict[Key, Fraction]:
    """Rounded parts of a rounded total; the last one in order takes the remainder."""
    found: dict[Key, Fraction] = {}
    left, whole = total, sum(weight for _, weight in weights)
    for key, weight in weights[:-1]:
        found[key] = rounded(total * weight / whole)
        left -= found[key]
    if weights:
        found[weights[-1][0]] = left
    return found


def per_m(cost: Fraction, tokens: int) -> Fraction | None:
    """Of a million tokens."""
    return rounded(cost / tokens * 10**6) if tokens else None
