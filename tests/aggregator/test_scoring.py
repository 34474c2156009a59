"""Accuracy of the judgements on synthetic weeks and traces. `make score` runs the full set."""

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.aggregator import scored
from tests.made_rack import CAUSES

FIGURES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("scoring.toml").read_text())
WHOLE = os.environ.get("MLXRACK_SCORE") == "1"
RIGHT, SILENT = 0.95, 0.99


@pytest.mark.timeout(1200)
def test_a_doubled_cost_is_attributed_to_its_cause() -> None:
    figures = FIGURES["weeks"]
    count = figures["of_each_cause"] if WHOLE else 2
    print()
    for number, cause in enumerate(CAUSES):
        seeds = range(figures["first_seed"] + 1000 * number, figures["first_seed"] + 1000 * number + count)
        found = [scored.judged(seed, cause, figures) for seed in seeds]
        verdicts = [scored.right(week) for week in found]
        named = [v for v in verdicts if v is not None]
        good = sum(named)
        wrong = sorted(
            {c for w in found if scored.right(w) is False for f, c, _ in w.said.values() if f and c != cause}
        )
        print(f"{cause}: {len(found)} weeks, {len(named)} flagged, {good} named right {wrong or ''}")
        assert named, f"{cause}: no week was flagged"
        assert good / len(named) >= RIGHT, cause


@pytest.mark.timeout(1200)
def test_a_clean_week_is_not_flagged() -> None:
    figures = FIGURES["weeks"]
    count = figures["clean"] if WHOLE else 6
    seeds = range(figures["first_seed"] + 50_000, figures["first_seed"] + 50_000 + count)
    found = [scored.judged(seed, "", figures) for seed in seeds]
    silent = sum(not any(flag for flag, _, _ in week.said.values()) for week in found)
    print(f"\n{count} clean weeks, {silent} silent")
    assert silent / count >= SILENT


def test_evictions_get_the_correct_verdict() -> None:
    figures = FIGURES["evictions"]
    seeds = range(figures["first_seed"], figures["first_seed"] + figures["traces"])
    pairs = [pair for seed in seeds for pair in scored.verdicts(scored.trace(seed))]
    good = sum(known == said for known, said in pairs)
    print(f"\n{len(pairs)} evictions, {good} verdicts right")
    assert good / len(pairs) >= RIGHT
