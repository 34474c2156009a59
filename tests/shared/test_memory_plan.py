"""Bytes of a model before it is loaded: against published figures and against mlx-lm's own caches."""

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import memory_plan, model_shape
from shared.errors import Refused
from shared.memory_plan import MemoryPlan, kv_bytes
from shared.model_shape import ModelShape, Tensor, parse_shape

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def shape(**more: Any) -> ModelShape:
    return parse_shape(json.dumps({**LLAMA, **more}).encode())


def per_token(one: ModelShape) -> int:
    """Without parts that do not grow with the row."""
    return (kv_bytes(one, rows=1, row_tok=2560, chunk_tok=0) - one.state_bytes) // 2560


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Llama-3.1-8B: 128 KiB a token
        ({}, 128 << 10),
        # SmolLM2-135M in float32
        (
            {
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "hidden_size": 576,
                "torch_dtype": "float32",
            },
            46_080,
        ),
        # every head has its own keys and values
        ({"num_key_value_heads": None}, 512 << 10),
        ({"head_dim": 64}, 64 << 10),
        # DeepSeek-V3: 512 + 64 numbers a layer, whatever the heads
        (
            {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 61},
            61 * 576 * 2,
        ),
        # DeepSeek-V2 in mlx-lm keeps whole heads: 128 + 64 for keys, 128 for values
        (
            {
                "model_type": "deepseek_v2",
                "kv_lora_rank": 512,
                "qk_rope_head_dim": 64,
                "qk_nope_head_dim": 128,
                "v_head_dim": 128,
                "num_hidden_layers": 2,
            },
            2 * 32 * 320 * 2,
        ),
        ({"model_type": "mamba"}, 0),
        ({"model_type": "bert"}, 0),
        ({"full_attention_interval": 4}, 32 << 10),
        # families with another way to tell which layers attend, or another KV layout
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba"] * 28 + ["attention"] * 4}, 16 << 10),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*" * 8}, 32 << 10),
        ({"model_type": "jamba", "attn_layer_period": 8, "attn_layer_offset": 4}, 16 << 10),
        ({"model_type": "lfm2", "full_attn_idxs": [2, 5, 8, 10]}, 16 << 10),
        ({"model_type": "gemma3n", "num_kv_shared_layers": 16}, 64 << 10),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32, "sliding_window": 64}, 128 << 10),
        (
            {
                "model_type": "deepseek_v32",
                "kv_lora_rank": 512,
                "qk_rope_head_dim": 64,
                "index_head_dim": 128,
                "num_hidden_layers": 1,
            },
            704 * 2,
        ),
        (
            {
                "model_type": "longcat_flash",
                "num_hidden_layers": None,
                "num_layers": 28,
                "kv_lora_rank": 512,
                "qk_rope_head_dim": 64,
            },
            56 * 576 * 2,
        ),
        (
            {
                "model_type": "kimi_linear",
                "kv_lora_rank": 512,
                "qk_rope_head_dim": 64,
                "linear_attn_config": {"full_attn_layers": [4, 8], "num_heads": 1, "head_dim": 1},
            },
            2 * 576 * 2,
        ),
        ({"text_config": {"num_hidden_layers": 16}}, 64 << 10),
    ],
)
def test_kv_bytes_per_token(config: dict[str, Any], expected: int) -> None:
    assert expected == per_token(shape(**config))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sliding_window": 4096}, (32, 0, 0)),
        ({"layer_types": ["sliding_attention", "full_attention"] * 16, "sliding_window": 128}, (16, 16, 128)),
        ({"layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8}, (8, 0, 0)),
        (
            {"model_type": "llama4", "layer_types": ["chunked_attention"] * 24, "attention_chunk_size": 8192},
            (0, 24, 8192),
        ),
        ({"model_type": "gemma3_text", "num_hidden_layers": 26}, (4, 22, 512)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2, "sliding_window": 64}, (16, 16, 64)),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG", "sliding_window": 4096}, (8, 24, 4096)),
    ],
)
def test_layers_with_sliding_attention(config: dict[str, Any], expected: tuple[int, int, int]) -> None:
    one = shape(**config)
    assert expected == (one.full, one.sliding, one.window_tok)


def test_a_sliding_layer_keeps_only_its_window() -> None:
    one = shape(layer_types=["sliding_attention"] * 32, sliding_window=512)
    long = kv_bytes(one, rows=2, row_tok=100_000, chunk_tok=256)
    assert long == 2 * (512 + 256) * (128 << 10)
    assert kv_bytes(one, rows=1, row_tok=300, chunk_tok=256) == 512 * (128 << 10)


def test_memory_grows_in_steps() -> None:
    one = shape()
    assert kv_bytes(one, rows=1, row_tok=1, chunk_tok=1) == kv_bytes(one, rows=1, row_tok=256, chunk_tok=1)
    assert kv_bytes(one, rows=3, row_tok=257, chunk_tok=1) == 3 * 512 * (128 << 10)


def test_quantised_kv_caches_match_mlx_lm() -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import QuantizedKVCache

    one = shape(num_hidden_layers=1)
    for bits in (4, 8):
        cache: Any = QuantizedKVCache(group_size=64, bits=bits)
        keys = mx.zeros((1, 8, 300, 128), dtype=mx.bfloat16)
        cache.update_and_fetch(keys, keys)
        assert cache.nbytes == kv_bytes(one, rows=1, row_tok=300, chunk_tok=300, kv_bits=bits)


def test_plain_and_rotating_caches_match_mlx_lm() -> None:
    import mlx.core as mx
    from mlx_lm.models import cache as mlx_cache

    one = shape(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], sliding_window=128)
    made: Any = mlx_cache
    caches = [made.KVCache(), made.RotatingKVCache(max_size=128)]
    for _ in range(3):
        for cache in caches:
            piece = mx.zeros((1, 8, 256, 128), dtype=mx.bfloat16)
            cache.update_and_fetch(piece, piece)
    held = sum(cache.nbytes for cache in caches)
    planned = kv_bytes(one, rows=1, row_tok=768, chunk_tok=256)
    token = 2 * 8 * 128 * 2
    assert planned - held == token, "a rotating cache holds one token less than its window and the piece"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Qwen3-Next: 36 of 48 layers keep 32 x 128 x 128 numbers of a row
        (
            {
                "num_hidden_layers": 48,
                "full_attention_interval": 4,
                "linear_num_value_heads": 32,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
            },
            36 * 32 * 128 * 128 * 4,
        ),
        ({"model_type": "mamba", "intermediate_size": 64, "state_size": 8}, 32 * 64 * 8 * 4),
        ({}, 0),
    ],
)
def test_recurrent_layer_state_per_row(config: dict[str, Any], expected: int) -> None:
    one = shape(**config)
    assert one.state_bytes == expected
    many = kv_bytes(one, rows=3, row_tok=256, chunk_tok=0) - 3 * (kv_bytes(one, rows=1, row_tok=256, chunk_tok=0))
    assert many == 0


def test_shapes_with_omitted_defaults_of_mlx_lm() -> None:
    gemma = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560}}
    one = parse_shape(json.dumps({**gemma, "num_hidden_layers": 34, "vocab_size": 262208}).encode())
    assert (one.heads, one.sliding_token_bytes, one.window_tok) == (8, 2 * 4 * 256 * 2, 512)
    mamba = {"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2}
    assert kv_bytes(parse_shape(json.dumps(mamba).encode()), rows=1, row_tok=99, chunk_tok=1) == 0
    assert shape(intermediate_size=[100, 300, 200]).intermediate == 300


def test_tensors_mlx_lm_skips_do_not_count_and_8_bits_become_16() -> None:
    tensors = [
        Tensor("model.layers.0.weight", "BF16", 10),
        Tensor("vision_tower.patch.weight", "BF16", 1000),
        Tensor("model.mtp.head.weight", "BF16", 1000),
        Tensor("model.layers.0.experts.weight", "F8_E4M3", 20),
    ]
    assert model_shape.weight_bytes(tensors, shape()) == 50


@pytest.mark.parametrize("missing", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_an_incomplete_config_is_rejected(missing: str) -> None:
    with pytest.raises(Refused, match=missing):
        parse_shape(json.dumps({k: v for k, v in LLAMA.items() if k != missing}).encode())
    for wrong in (0, -1, "8", True, None):
        with pytest.raises(Refused, match=missing):
            shape(**{missing: wrong})


def test_the_dtype_is_read_from_the_norms() -> None:
    tensors = [Tensor("model.norm.weight", "F32", 4), Tensor("model.layers.0.mlp.weight", "U32", 4)]
    assert parse_shape(json.dumps(LLAMA).encode(), tensors).act_bytes == 4
    assert shape().act_bytes == 2


def header(tree: object) -> bytes:
    return json.dumps(tree).encode()


def test_safetensors_headers_are_read() -> None:
    raw = header(
        {
            "__metadata__": {"format": "mlx"},
            "model.embed_tokens.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "lm_head.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]},
        }
    )
    tensors = model_shape.read_header(raw)
    assert [t.nbytes for t in tensors] == [16, 16]
    assert model_shape.weight_bytes(tensors, shape()) == 32
    assert model_shape.weight_bytes(tensors, shape(tie_word_embeddings=True)) == 16, "the head is the embeddings"


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {"a": 1},
        {"a": {}},
        {"a": {"dtype": "F32", "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "data_offsets": [1]}},
    ],
)
def test_an_invalid_header_is_rejected(tree: object) -> None:
    with pytest.raises(Refused, match="header"):
        model_shape.read_header(header(tree))


@given(st.binary(max_size=64))
def test_arbitrary_header_bytes_are_rejected_cleanly(raw: bytes) -> None:
    with pytest.raises(Refused):
        model_shape.read_header(b"\xff" + raw)


@given(st.binary(max_size=8), st.integers(0, 1 << 40))
def test_a_header_length_beyond_the_file_is_rejected(first: bytes, size: int) -> None:
    try:
        length = model_shape.header_bytes(first, size)
    except Refused:
        return
    assert 0 < length <= size - 8
    assert first == struct.pack("<Q", length)


def test_a_header_of_many_megabytes_is_not_read() -> None:
    length = model_shape.MAX_HEADER_BYTES
    assert model_shape.header_bytes(struct.pack("<Q", length), 1 << 40) == length
    with pytest.raises(Refused, match="its header has more than 16,777,216 bytes"):
        model_shape.header_bytes(struct.pack("<Q", length + 1), 1 << 40)


def test_a_plan_adds_up() -> None:
    one = memory_plan.plan(shape(), 16 << 30, rows=4, row_tok=2048, chunk_tok=512, cache_bytes=1 << 28, fused=True)
    assert one.kv_bytes == 4 * 2048 * (128 << 10)
    assert one.peak_bytes == (16 << 30) + one.kv_bytes + one.workspace_bytes + (1 << 28)
    assert one.need_bytes == one.peak_bytes + one.reuse_bytes + one.overhead_bytes
    unfused = memory_plan.plan(shape(), 16 << 30, rows=4, row_tok=2048, chunk_tok=512, cache_bytes=1 << 28)
    assert unfused.workspace_bytes > one.workspace_bytes
    assert MemoryPlan(weights_bytes=1, kv_bytes=2, workspace_bytes=3, overhead_bytes=0).need_bytes == 6
