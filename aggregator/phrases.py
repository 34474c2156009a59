"""Numbers and lists as they stand in a sentence, each in one form. Pure."""

from collections.abc import Sequence


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 node, 2 nodes, 1,234 queries; ``many`` where an s is not enough."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def verb(number: int, one: str, many: str) -> str:
    """The form of a verb that goes with a number: was, were."""
    return one if number == 1 else many


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names in a sentence: "a, b", of many only the first ones and how many more."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def percent(share: float) -> str:
    """A share as 6.8 %, or 19 % from ten on."""
    return f"{share * 100:.1f} %" if share < 0.0995 else f"{share * 100:.0f} %"


def millions(number: float) -> str:
    """A count as 576 M, 12.5 M or 1.25 M, and as 12,345 below a million."""
    size = number / 1e6
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    return f"{size:,.{digits}f} M" if size >= 1 else f"{number:,.0f}"


def tokens(number: int) -> str:
    """1 token, 8,300 tokens, 669 M tokens."""
    return counted(number, "token") if number < 1_000_000 else f"{millions(number)} tokens"
