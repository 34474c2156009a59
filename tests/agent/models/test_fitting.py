"""A model that no eviction makes room for: what is said names settings with which it fits, and they do."""

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import Model
from agent.files.modelstore import ModelSpec
from agent.models.fitting import LEAST_TOK, never_fits
from shared import memory_plan
from shared.ids import Version
from shared.memory_plan import MemoryPlan
from shared.model_shape import ModelShape

SHAPE = ModelShape(
    full=28,
    token_bytes=28 * 4096,
    heads=16,
    hidden=2048,
    intermediate=8192,
    vocabulary=150_000,
    context_tok=1 << 20,
    act_bytes=2,
)
WEIGHTS = 2_000_000_000


def plan(rows: int, row_tok: int, weights: int = WEIGHTS) -> MemoryPlan:
    model = Model(name="m")
    chunk_tok, cache_bytes = model.prefill_chunk_tok, model.cache_bytes
    return memory_plan.plan(SHAPE, weights, rows=rows, row_tok=row_tok, chunk_tok=chunk_tok, cache_bytes=cache_bytes)


def spec(rows: int, row_tok: int, weights: int = WEIGHTS, shape: ModelShape | None = SHAPE) -> ModelSpec:
    model, planned = Model(name="m", rows=rows, plan_context_tok=row_tok), plan(rows, row_tok, weights)
    return ModelSpec(
        model=model, path="/m", version=Version("1" * 16), need_bytes=planned.need_bytes, plan=planned, shape=shape
    )


def test_a_mistyped_context_is_named_with_what_would_fit() -> None:
    said = never_fits(spec(8, 1_000_000), 16_851_000_000, fused=False)
    assert "so it can never fit with rows = 8 times plan_context_tok = 1000000; rows = 1 with plan_context_tok" in said
    assert "over the whole memory budget of 16851 MB" in said


@given(
    st.integers(min_value=1, max_value=64),
    st.integers(min_value=LEAST_TOK, max_value=1 << 20),
    st.integers(min_value=1, max_value=64),
)
def test_what_is_named_fits(rows: int, row_tok: int, budget_gb: int) -> None:
    one, budget = spec(rows, row_tok), budget_gb * 10**9
    if one.need_bytes <= budget:
        return
    said = never_fits(one, budget, fused=False)
    if (found := re.search(r"; rows = (\d+) with plan_context_tok = (\d+) would", said)) is None:
        assert plan(1, LEAST_TOK).need_bytes > budget
        assert "use a smaller model" in said
    else:
        assert plan(int(found[1]), int(found[2])).need_bytes <= budget


@pytest.mark.parametrize(
    ("one", "remedy"),
    [
        (spec(1, LEAST_TOK, 10**12), "use a smaller model (`mlxrack-agent models recommend`)"),
        (spec(8, 4096, 10**12, shape=None), "use a smaller model, or raise memory.budget_bytes"),
        (
            msgspec.structs.replace(spec(8, 4096, 10**12), model=Model(name="m", need_bytes=10**12)),
            "need_bytes in agent.toml says so",
        ),
    ],
)
def test_each_cause_has_its_remedy(one: ModelSpec, remedy: str) -> None:
    assert remedy in never_fits(one, 10**9, fused=True)
