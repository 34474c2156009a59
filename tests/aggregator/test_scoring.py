"""Accuracy of the judgements on synthetic weeks and traces. `make score` runs the full set."""

import os
import tomllib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.aggregator import scored
from tests.made_rack import CAUSES

FIGURES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("scoring.toml").read_text())
WHOLE = os.environ.get("MLXRACK_SCORE") == "1"
RIGHT, SILENT = 0.95, 0.99


def told(name: str, weeks: Sequence[scored.Week]) -> float:
    """Print how many of the flagged weeks name their cause, those near the limit apart; the share of all that do."""
    verdicts = [(week, scored.right(week)) for week in weeks]
    named = [(week, good) for week, good in verdicts if good is not None]
    near = [good for week, good in named if week.near]
    wrong = sorted({c for w, good in named if not good for f, c, _ in w.said.values() if f and c not in w.causes})
    good = sum(bool(verdict) for _, verdict in named)
    print(
        f"{name}: {len(weeks)} weeks, {len(named)} flagged, {good} named right {wrong or ''}; "
        f"within 10 % of the limit: {sum(map(bool, near))} of {len(near)}"
    )
    assert named, f"{name}: no week was flagged"
    return good / len(named)


@pytest.mark.timeout(1200)
def test_a_doubled_cost_is_attributed_to_its_cause() -> None:
    figures = FIGURES["weeks"]
    count = figures["of_each_cause"] if WHOLE else 2
    print()
    for number, cause in enumerate(CAUSES):
        seeds = range(figures["first_seed"] + 1000 * number, figures["first_seed"] + 1000 * number + count)
        assert told(cause, [scored.judged(seed, (cause,), figures) for seed in seeds]) >= RIGHT, cause


@pytest.mark.timeout(1200)
def test_a_cost_doubled_by_two_causes_is_attributed_to_one_of_them() -> None:
    """What both do at once may look like a third: a poisoned cache whose hit rate fell, too, is a miss."""
    figures = FIGURES["weeks"]
    pairs = list(combinations(CAUSES, 2))
    count = FIGURES["pairs"]["of_each_pair"] if WHOLE else 1
    first = FIGURES["pairs"]["first_seed"]
    print()
    found = []
    for number, pair in enumerate(pairs if WHOLE else pairs[::4]):
        seeds = range(first + 1000 * number, first + 1000 * number + count)
        found += (weeks := [scored.judged(seed, pair, figures) for seed in seeds])
        told(" and ".join(pair), weeks)
    assert told("all pairs", found) >= RIGHT


@pytest.mark.timeout(1200)
def test_a_clean_week_is_not_flagged() -> None:
    figures = FIGURES["weeks"]
    count = figures["clean"] if WHOLE else 6
    seeds = range(figures["first_seed"] + 50_000, figures["first_seed"] + 50_000 + count)
    found = [scored.judged(seed, (), figures) for seed in seeds]
    silent = sum(not any(flag for flag, _, _ in week.said.values()) for week in found)
    print(f"\n{count} clean weeks, {silent} silent; {sum(week.near for week in found)} within 10 % of the limit")
    assert silent / count >= SILENT


def test_evictions_get_the_correct_verdict() -> None:
    figures = FIGURES["evictions"]
    seeds = range(figures["first_seed"], figures["first_seed"] + figures["traces"])
    pairs = [pair for seed in seeds for pair in scored.verdicts(scored.trace(seed))]
    good = sum(known == said for known, said in pairs)
    print(f"\n{len(pairs)} evictions, {good} verdicts right")
    assert good / len(pairs) >= RIGHT
