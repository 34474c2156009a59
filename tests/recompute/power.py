"""What a node draws, and what an hour of it costs."""

import re
from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from .raw import Batch

ASSUMED_W = 45
YEAR_H, MONTH_H = 8_766, Fraction("730.5")
_DOCS = Path(__file__).parents[2] / "docs" / "hardware.md"


def watts(node: str, table: dict[str, Any], counted: Iterable[Batch], busy_share: Fraction) -> tuple[Fraction, str]:
    """Mean power of a node and where it is known from. ``counted`` are all batches of the period: an outlet is read
    by any node."""
    batches = list(counted)
    if (metered := _outlets(node, batches)) is not None:
        return metered, "outlet"
    mine = [one for one in batches if one.node == node]
    for name, source in (("wall_power_mw", "wall"), ("system_power_mw", "system")):
        if (mean := _mean(name, mine)) is not None:
            return mean / 1000, source
    if table.get("watts") is not None:
        return Fraction(table["watts"]), "configured"
    idle, most = chip_watts().get(str(table.get("chip", "")), (None, None))
    if idle is not None and most is not None:
        return idle + (most - idle) * busy_share, "chip"
    return Fraction(ASSUMED_W), "assumed"


def _outlets(node: str, batches: list[Batch]) -> Fraction | None:
    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
    for one in (record for batch in batches for record in batch.of("outlet")):
        if node in one["nodes"]:
            both = sums[(one["meter"], *one["nodes"])]
            both[0] += one["energy_mj"]
            both[1] += one["covered_us"]
    # millijoules by microseconds are kilowatts
    found = [Fraction(mj, us) * 1000 / (len(key) - 1) for key, (mj, us) in sums.items() if us]
    return sum(found, Fraction()) if found else None


def _mean(name: str, mine: list[Batch]) -> Fraction | None:
    """Weighted by the length of the windows that have it."""
    known = [(one[name], b.length_ms) for b in mine for one in b.of("host") if one.get(name) is not None]
    whole = sum(length for _, length in known)
    return Fraction(sum(value * length for value, length in known), whole) if whole else None


def owned_per_h(table: dict[str, Any]) -> Fraction:
    """What ownership costs."""
    residual = Fraction(table.get("residual", Fraction("0.2")))
    life = Fraction(table.get("life_years", 3))
    other = Fraction(table.get("other_per_month", 0))
    return Fraction(table["price"]) * (1 - residual) / (life * YEAR_H) + other / MONTH_H


def power_per_h(drawn_w: Fraction, cost: dict[str, Any]) -> Fraction:
    """What electricity costs."""
    price, pue = cost.get("electricity_per_kwh", Fraction("0.15")), cost.get("pue", 1)
    return drawn_w / 1000 * Fraction(price) * Fraction(pue)


@cache
def chip_watts() -> dict[str, tuple[Fraction, Fraction]]:
    """Apple's idle and largest figures of each chip, as docs/hardware.md has them in its table."""
    rows = [[c.strip() for c in line.strip("| \n").split("|")] for line in _DOCS.read_text("utf-8").splitlines()]
    head = next((row for row in rows if any("idle" in c.lower() for c in row) and "chip" in row[0].lower()), None)
    if head is None:
        return {}
    column = next(n for n, c in enumerate(head) if "idle" in c.lower())
    found = {}
    for row in rows:
        numbers = re.findall(r"\d+(?:\.\d+)?", row[column]) if len(row) == len(head) else []
        if len(numbers) >= 2:
            found[row[0]] = (Fraction(numbers[0]), Fraction(numbers[1]))
    return found
