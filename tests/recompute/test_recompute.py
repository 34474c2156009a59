"""Small racks: every figure of their reports is what raw segments say, and one fact has one value wherever it is shown.

`make recompute` does the same for every made rack.
"""

import ast
from pathlib import Path

import pytest

from tests.aggregator.ten_racks import write
from tests.recompute import compare, drive, facts, spans
from tests.recompute.more_racks import ALL
from tests.recompute.volume import Sketch

HERE = Path(__file__).parent
SMALL = ("polish", "all refused")
"""Few batches: an outage that an operator explains, and a rack of which nothing was answered."""


@pytest.fixture(scope="module", params=SMALL)
def reported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A rack's folder, with its reports."""
    name, folder = str(request.param), tmp_path_factory.mktemp("rack")
    made = ALL[name]
    drive.run(write(made, folder).config, made.now_ms, made.weeks, made.months)
    return name, folder


@pytest.mark.timeout(300)
def test_every_figure_is_what_raw_segments_say(reported: tuple[str, Path]) -> None:
    name, folder = reported
    made = ALL[name]
    found = compare.compare(folder / "aggregator.toml", made.now_ms, made.weeks, made.months)
    assert found.differences == []
    assert found.verdicts == []
    assert found.compared > 300


def test_one_fact_has_one_value_wherever_it_is_shown(reported: tuple[str, Path]) -> None:
    name, folder = reported
    reports = folder / "bucket" / "report" / "v1"
    for week in ALL[name].weeks:
        assert facts.of_week(reports / "weekly" / week) == []
    for month in ALL[name].months:
        assert facts.of_month(reports / "monthly" / month) == []


def test_a_wrong_figure_is_found(reported: tuple[str, Path]) -> None:
    name, folder = reported
    made, week = ALL[name], ALL[name].weeks[0]
    page = compare.newest(folder / "bucket" / "report" / "v1" / "weekly" / week, "uptime")
    assert page is not None
    body = page.read_text(encoding="utf-8")
    refused = compare.load(page.parent, "uptime")["refused_capacity"]
    key = '"refused_capacity": '
    try:
        page.write_text(body.replace(f"{key}{refused}", f"{key}{refused + 1}"), encoding="utf-8")
        found = compare.compare(folder / "aggregator.toml", made.now_ms, (week,), ())
    finally:
        page.write_text(body, encoding="utf-8")
    assert found.differences == [(f"{week}/uptime/refused_capacity", refused + 1, refused)]


def test_a_number_that_nobody_recomputes_is_a_difference() -> None:
    found = compare.Outcome()
    found.tree("uptime", {"new_figure": 3, "rack": {"up_s": 1.0}}, {"rack": {"up_s": 1.0}})
    assert found.differences == [("uptime/new_figure", 3, "not recomputed")]


def test_nothing_is_shared_with_the_aggregator() -> None:
    made_by = {"__main__.py", "more_racks.py", "test_recompute.py", "sentences.py"}
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            roots = {one.partition(".")[0] for one in names}
            assert not roots & {"aggregator", "shared", "agent"}, path.name
            assert path.name in made_by or not roots & {"tests", "scripts"}, path.name


@pytest.mark.parametrize(
    ("shown", "times", "value", "right"),
    [
        ("78.571", 0.01, 0.7857142857, True),
        ("78.58", 0.01, 0.7857142857, True),
        ("78.60", 0.01, 0.7857142857, False),
        ("195,049", 1.0, 195_049, True),
        ("195,051", 1.0, 195_049, False),
        ("0.0", 0.01, None, False),
    ],
)
def test_a_rounded_number_agrees_within_its_last_digit(shown: str, times: float, value: object, right: bool) -> None:
    assert facts.agrees(shown, times, value) is right


def test_spans_are_sets_of_moments() -> None:
    assert spans.union([(5, 7), (0, 2), (3, 4)], 1) == [(0, 7)]
    assert spans.subtract([(0, 10)], [(2, 3), (5, 6)]) == [(0, 2), (3, 5), (6, 10)]
    assert spans.intersect([(0, 4), (6, 9)], [(3, 7)]) == [(3, 4), (6, 7)]
    assert spans.edges([[(2, 5)]], 0, 9) == [(0, 2), (2, 5), (5, 9)]


def test_a_quantile_is_the_representative_of_its_bucket_within_the_extremes() -> None:
    sketch = Sketch()
    sketch.add({"count": 3, "zero": 1, "min": 0, "max": 990, "idx": (160, 158), "cnt": (1, 1)})
    assert sketch.quantile(0.1) == 0.0
    low, high = 2 ** (160 / 32), 2 ** (161 / 32)
    assert sketch.quantile(0.5) == 2 * low * high / (low + high)
    assert sketch.quantile(1.0) == 990
