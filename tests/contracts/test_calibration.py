"""A real engine is timed and is afterwards as if it had not been: memory, states, counts and answers."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from agent.config import Model
from agent.files.modelstore import ModelStore
from agent.loader import calibration
from agent.loader.measuring import Measuring
from agent.loader.mlx.engine import MLXEngine
from agent.wire.frames import Calibrated, Frame
from agent.wire.step_times import StepTimes
from tests.contracts.test_engine import ask, run, text_of
from tests.tiny_model import write_tiny_model

ROWS, CONTEXT_TOK, CHUNK_TOK = 8, 512, 64
ROOMY = {"max_position_embeddings": 8192, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}


def made(folder: Path) -> MLXEngine:
    kv_tok = ROWS * CONTEXT_TOK
    return MLXEngine(str(folder), rows=ROWS, prefill_chunk_tok=CHUNK_TOK, cache_bytes=8 << 20, kv_tok=kv_tok)


def timed(engine: MLXEngine) -> StepTimes:
    """Its figures, as a loader takes them."""
    measuring, said = Measuring(engine), list[Frame]()
    while not said:
        said = measuring.step()
    assert isinstance(said[0], Calibrated)
    assert said[0].times is not None, said[0].problem
    return said[0].times


def test_a_timed_engine_answers_as_before_and_holds_nothing(tiny_model: Path) -> None:
    engine = made(tiny_model)
    try:
        asked: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 7}]
        before = [text_of(run(engine, ask(1, **more))[1]) for more in asked]
        kept, held = engine.working().cache_bytes, mx.get_active_memory()
        engine.report()
        random: Any = mx.random.state
        state = random[0].tolist()
        found = timed(engine)
        assert mx.get_active_memory() <= held + 4096
        assert random[0].tolist() == state
        report, working = engine.report(), engine.working()
        assert (report.steps, report.decode_tok, report.prefill_tok, report.kv_peak_bytes) == (0, 0, 0, 0)
        assert (report.busy_decode_us, report.busy_prefill_us) == (0, 0)
        assert (report.cache_hits, report.cache_misses, working.cache_bytes) == (0, 0, kept)
        assert (working.decode_steps, working.waits, engine.busy) == (0, (), False)
        assert [text_of(run(engine, ask(2, **more))[2]) for more in asked] == before
        assert [one.rows for one in found.decode] == [1, 4, 8]
        assert all(len(one.points) > 1 and one.us(one.points[0][0]) == one.points[0][1] for one in found.decode)
        assert {(one.rows, one.tokens) for one in found.verify} >= {(r, t) for r in (1, 2) for t in (2, 4, 8)}
        assert min(found.step_us(1, 100), found.prefill_us(64, 0)) > 0
    finally:
        engine.close()


def test_what_is_timed_stays_within_the_memory_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "ROUNDS", 1)
    folder = tmp_path / "m"
    write_tiny_model(folder, seed=2, config=ROOMY)
    model = Model(
        name="m", path=str(folder), rows=ROWS, plan_context_tok=CONTEXT_TOK, prefill_chunk_tok=CHUNK_TOK, cache_bytes=0
    )
    plan = ModelStore(tmp_path / "memo", tmp_path / "store", fused=False).describe(model).plan
    engine = made(folder)
    try:
        mx.reset_peak_memory()
        found = timed(engine)
        peak = mx.get_peak_memory()
        print(f"peak {peak:,} of {plan.peak_bytes:,}, of it {plan.kv_bytes:,} keys and values")
        assert found.context_tok >= CONTEXT_TOK
        assert peak > plan.weights_bytes + plan.kv_bytes // 2, "it was not timed at eight rows of long contexts"
        assert peak <= plan.peak_bytes
    finally:
        engine.close()


def test_an_interrupted_engine_holds_nothing_and_goes_on(tiny_model: Path) -> None:
    engine = made(tiny_model)
    try:
        held = mx.get_active_memory()
        measuring, said, number = Measuring(engine), list[Frame](), 0
        while not said:
            measuring.allowed = True
            said, number = measuring.step(), number + 1
            if number % 17 == 0:
                measuring.rest()
                assert mx.get_active_memory() <= held + 4096
            assert number < 2_000
        assert isinstance(said[0], Calibrated)
        assert said[0].times is not None, said[0].problem
    finally:
        engine.close()
