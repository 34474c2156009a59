"""The table of models by memory: what it lists fits, and its figures follow from the memory plan and the chip."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import cli
from agent.files.hub_listing import Asked, parse_name
from agent.operator import recommended
from agent.operator.recommended import MAX_ROWS, MODELS, Recommended, markdown
from shared import chips
from shared.memory_plan import default_budget_bytes

models = st.sampled_from(MODELS)
budgets = st.integers(0, 200 << 30)


@given(models, budgets)
def test_as_many_rows_as_fit(model: Recommended, budget: int) -> None:
    rows = recommended.fits(model, budget)
    assert not rows or recommended.need_bytes(model, rows) <= budget
    assert rows == MAX_ROWS or recommended.need_bytes(model, rows + 1) > budget


@given(budgets, budgets)
def test_more_memory_fits_no_less(one: int, other: int) -> None:
    smaller, larger = ({fit.repo: fit.rows for fit in recommended.recommend(b, 0, None)} for b in sorted((one, other)))
    assert all(larger.get(repo, 0) >= rows for repo, rows in smaller.items())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.repo)
def test_figures_follow_from_weights_and_bandwidth(model: Recommended) -> None:
    assert parse_name(model.repo) == Asked(model.repo), "it can be pulled by this name"
    assert model.active_b <= model.params_b
    read_gb = model.active_b * model.bits / 8
    assert recommended.tokens_per_s(model, 100) == pytest.approx(80 / read_gb)
    # full attention stores keys and values of every layer; a sliding window less
    shape = model.shape
    assert (
        shape.token_bytes * (shape.full + shape.sliding) * 8192
        >= recommended.need_bytes(model, 2) - recommended.need_bytes(model, 1)
        > 0
    )


@pytest.mark.parametrize(
    ("memory_gb", "chip", "fit", "not_fit"),
    [
        (16, "M4", "mlx-community/Qwen3-8B-4bit", "mlx-community/Qwen3-32B-4bit"),
        (24, "M4 Pro", "mlx-community/gpt-oss-20b-MXFP4-Q8", "mlx-community/Qwen3-32B-4bit"),
        (32, "M4", "mlx-community/Qwen3-30B-A3B-4bit", "mlx-community/Llama-3.3-70B-Instruct-4bit"),
        (64, "M4 Pro", "mlx-community/Llama-3.3-70B-Instruct-4bit", "mlx-community/gpt-oss-120b-MXFP4-Q8"),
        (128, "M4 Max", "mlx-community/gpt-oss-120b-MXFP4-Q8", ""),
    ],
)
def test_what_fits_a_mac(memory_gb: int, chip: str, fit: str, not_fit: str) -> None:
    found = recommended.for_memory(memory_gb, chips.find(chip))
    names = [one.repo for one in found]
    assert fit in names
    assert not_fit not in names
    assert all(one.need_bytes <= default_budget_bytes(memory_gb << 30) and one.tokens_per_s for one in found)


def test_the_usual_chips_are_sold_with_that_memory() -> None:
    for memory_gb, name in recommended.USUAL_CHIP.items():
        chip = chips.find(name)
        assert chip is not None
        assert memory_gb in (*chips.sizes(chip, "mini"), *chips.sizes(chip, "studio"))


def test_the_command_prints_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "recommend", "--memory", "24", "--chip", "M4 Pro", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["memory_gb"], told["chip"]) == (24, "M4 Pro")
    assert told["models"][0]["tokens_per_s"] > 0
    assert cli.main(["models", "recommend", "--memory", "24", "--chip", "M9 Pro"]) == 0
    out = capsys.readouterr().out
    assert "chip M9 Pro (unknown to this program: no tokens/s)" in out
    assert cli.main(["models", "recommend", "--memory", "2"]) == 0
    assert "no model of the table fits" in capsys.readouterr().out
    assert cli.main(["models", "recommend"]) == 0, "this machine"


def test_the_table_for_the_documentation_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "recommend", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in lines} == {9}
    assert {line.split("|")[1].strip() for line in lines[2:]} == {f"{gb} GB" for gb in (16, 24, 32, 48, 64, 128)}


def test_the_documented_table_is_the_computed_one() -> None:
    text = (Path(__file__).parents[3] / "docs/models.md").read_text(encoding="utf-8")
    table = text.partition("<!-- recommended: generated -->")[2].partition("<!-- recommended: end -->")[0]
    assert table.strip() == markdown().strip()
