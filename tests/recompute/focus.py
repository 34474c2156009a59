"""The FOCUS export: rows of the period divided between its days, which must add up to the same."""

import csv
from collections import defaultdict
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from .cost import Costs
from .lives import Rack
from .periods import Period

Key = tuple[str, str]
"""Node, and the name, idle or silent."""


def read(path: Path) -> list[dict[str, str]]:
    """Rows of the CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def sums(rows: list[dict[str, str]]) -> dict[Key, Fraction]:
    """Cost by node and SKU."""
    found: dict[Key, Fraction] = defaultdict(Fraction)
    for one in rows:
        found[one["ResourceId"], one["SkuId"]] += Fraction(one["EffectiveCost"])
    return dict(found)


def wanted(costs: Costs) -> dict[Key, Fraction]:
    """The rows of the period."""
    found: dict[Key, Fraction] = {}
    for node in costs.nodes.values():
        found |= {(node.node, name or "unattributed"): cost for name, cost in node.rows.items()}
        found |= {(node.node, "idle"): node.idle, (node.node, "silent"): node.silent}
    return {key: cost for key, cost in found.items() if cost}


def tokens(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], int]:
    """By day, node and name."""
    found: dict[tuple[str, str, str], int] = defaultdict(int)
    for one in rows:
        if one["ConsumedUnit"] == "Tokens":
            found[one["ChargePeriodStart"], one["ResourceId"], one["SkuId"]] += int(one["ConsumedQuantity"])
    return {key: count for key, count in found.items() if count}


def wanted_tokens(rack: Rack, period: Period, costs: Costs) -> dict[tuple[str, str, str], int]:
    """Prompt and answer tokens of each day at each priced node."""
    found: dict[tuple[str, str, str], int] = defaultdict(int)
    for _, start, end in period.days():
        day = datetime.fromtimestamp(start / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for one in (r for b in rack.ended_in(start, end) for r in b.served):
            if one.get("worker", "") in costs.nodes:
                count = one.get("prompt_tok", 0) + one.get("completion_tok", 0)
                found[day, one["worker"], one["model"]] += count
    return {key: count for key, count in found.items() if count}


def shown(found: dict[Any, Any]) -> dict[str, Any]:
    """Keys as texts."""
    return {" ".join(key): value for key, value in sorted(found.items())}
