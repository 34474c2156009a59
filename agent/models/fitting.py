"""What to do about a model that is larger than the whole memory budget: no eviction makes room for it."""

from collections.abc import Iterator

from agent.files.modelstore import ModelSpec
from shared import memory_plan

LEAST_TOK = 256
"""A context shorter than this is of no use."""


def never_fits(spec: ModelSpec, budget_bytes: int, *, fused: bool) -> str:
    """Why it can never be loaded under this budget, and which settings in agent.toml would make it fit."""
    model = spec.model
    needs = f"it needs {_mb(spec.need_bytes)}, {_mb(spec.need_bytes - budget_bytes)} over the whole memory budget of"
    why = f"{needs} {_mb(budget_bytes)}, so it can never fit"
    if model.need_bytes:
        return f"{why}; need_bytes in agent.toml says so: lower it, or leave it out and have it planned"
    if spec.shape is None:
        return f"{why}; use a smaller model, or raise memory.budget_bytes"
    asked = f"rows = {model.rows} times plan_context_tok = {model.plan_context_tok}"
    for rows, row_tok in _smaller(model.rows, model.plan_context_tok):
        need = _needed(spec, rows, row_tok, fused=fused)
        if need <= budget_bytes:
            return f"{why} with {asked}; rows = {rows} with plan_context_tok = {row_tok} would ({_mb(need)})"
    least = _needed(spec, 1, LEAST_TOK, fused=fused)
    smallest = f"even one request of {LEAST_TOK} tokens needs {_mb(least)} ({_mb(spec.plan.weights_bytes)} of weights)"
    return f"{why}; {smallest}: use a smaller model (`mlxrack-agent models recommend`)"


def _smaller(rows: int, row_tok: int) -> Iterator[tuple[int, int]]:
    """Fewer rows first, then a shorter context for one."""
    while rows > 1:
        rows //= 2
        yield rows, row_tok
    while row_tok > LEAST_TOK:
        row_tok = max(LEAST_TOK, row_tok // 2)
        yield 1, row_tok


def _needed(spec: ModelSpec, rows: int, row_tok: int, *, fused: bool) -> int:
    assert spec.shape is not None
    model = spec.model
    sizes = {"rows": rows, "row_tok": row_tok, "chunk_tok": model.prefill_chunk_tok, "cache_bytes": model.cache_bytes}
    return memory_plan.plan(spec.shape, spec.plan.weights_bytes, **sizes, fused=fused).need_bytes


def _mb(value: int) -> str:
    return f"{value / 1e6:.0f} MB"
