"""The memory plan against MLX's measured memory, for models of different shapes with over 100 MB of random weights.

Each runs in a separate loader process, driven by the daemon's frames.
"""

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert

from agent.config import AgentConfig, Live, Model
from agent.files.modelstore import ModelSpec, ModelStore
from agent.models.loaders import Loaders
from agent.process.loader_process import LoaderProcess
from agent.wire.frames import Done, Failed, Generate
from shared import memory_plan
from tests.tiny_model import write_tiny_model

BAR = 0.10
CHECKED = ("grouped heads", "sliding window")
"""Shapes of `make check`; `make memory` runs all of them (MLXRACK_SHAPES=all)."""
DENSE = {
    "hidden_size": 640,
    "num_hidden_layers": 6,
    "intermediate_size": 2048,
    "num_attention_heads": 10,
    "max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {**DENSE, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "a head each": {**DENSE, "num_key_value_heads": 10},
    "tied embeddings": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "sliding window": {
        "model_type": "gemma3_text",
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "sliding_window": 256,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 128,
        "vocab_size": 15_000,
        "max_position_embeddings": 8192,
    },
    "4 bits": {
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 90_000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}


def quantise(folder: Path) -> None:
    """Weights in groups of 64 numbers of 4 bits, as mlx_lm.convert stores them."""
    import mlx.core as mx

    config = json.loads((folder / "config.json").read_text())
    arrays: dict[str, Any] = dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]
    packed: dict[str, Any] = {}
    for name, array in arrays.items():
        if array.ndim == 2:
            stem = name.removesuffix(".weight")
            weight, scales, biases = mx.quantize(array, group_size=64, bits=4)
            packed |= {f"{stem}.weight": weight, f"{stem}.scales": scales, f"{stem}.biases": biases}
        else:
            packed[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), packed, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))


def folder_of(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_tiny_model(folder, seed=3, config=SHAPES[name])
    if name == "4 bits":
        quantise(folder)
    return folder


async def started(tmp_path: Path, folder: Path, **more: Any) -> tuple[ModelSpec, LoaderProcess]:
    config = convert({"node": {"id": "n", "rack": "r"}, "store": {"path": "x"}, "loader": {"threads": 2}}, AgentConfig)
    model = convert(
        {"name": "m", "path": str(folder), "cache_bytes": 0, "stall_s": 600.0, "prefill_chunk_tok": 256, **more}, Model
    )
    spec = await asyncio.to_thread(
        lambda: ModelStore(tmp_path / "memo", tmp_path / "store", fused=False).describe(model)
    )
    loaders = Loaders(Live(config), {}, prompts=tmp_path, on_report=lambda name, reported: None)
    return spec, await loaders.start(spec)


async def answer(loader: LoaderProcess, tokens: int, number: int) -> None:
    """A request whose prompt and answer have this many tokens in total."""
    letters = "abcdefghij"[number % 10] + "klmnopqrst"
    prompt = "".join(letters[n % 11] for n in range(tokens - 8))
    request = Generate(id=1, model="m", prompt=prompt, max_tokens=8, temperature=0.0)
    async for frame in loader.generate(request):
        assert not isinstance(frame, Failed), frame
        if isinstance(frame, Done):
            assert frame.prompt_tok + frame.completion_tok <= tokens


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHAPES if os.environ.get("MLXRACK_SHAPES") == "all" else CHECKED)
async def test_planned_memory_equals_measured_memory(name: str, tmp_path: Path) -> None:
    folder = await asyncio.to_thread(folder_of, name, tmp_path)
    length, several = (256, 128) if name == "4 bits" else (1024, 512)
    for rows, row_tok in ((1, length), (3, several)):
        spec, loader = await started(tmp_path, folder, rows=rows, plan_context_tok=row_tok)
        try:
            assert spec.shape is not None
            assert spec.plan.weights_bytes > 100e6
            ready = loader.ready
            assert ready is not None
            first = spec.planned_warm_bytes(ready.warm_tok, fused=False)
            assert first is not None
            assert ready.active_bytes == pytest.approx(spec.plan.weights_bytes, rel=0.03), "weights"
            assert ready.peak_bytes == pytest.approx(first, rel=BAR), "the first prompt"
            await loader.report()
            await asyncio.gather(*(answer(loader, row_tok, number) for number in range(rows)))
            reported = await loader.report()
            assert reported is not None
            # what these requests need: one row each, only as long as itself
            workspace = memory_plan.workspace_bytes(spec.shape, chunk_tok=256, context_tok=row_tok, rows=rows)
            planned = spec.plan.weights_bytes + spec.plan.kv_bytes + workspace
            print(f"{name}, {rows} x {row_tok}: planned {planned / 1e6:.1f} MB, held {reported.peak_bytes / 1e6:.1f}")
            assert reported.peak_bytes == pytest.approx(planned, rel=BAR)
            assert reported.peak_bytes <= spec.plan.peak_bytes * (1 + BAR)
        finally:
            await loader.stop(10.0)
    await asyncio.to_thread(shutil.rmtree, folder)
