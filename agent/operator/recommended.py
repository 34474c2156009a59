"""Models that fit a Mac's memory, and how fast they would be there. Pure; the figures are arithmetic, not measurements.

What fits is the memory plan with 8,192 tokens for each request. Decode reads every active weight once per token, at
the share of the chip's bandwidth that MLX reaches (shared/chips.py).
"""

import json
from collections.abc import Iterable, Mapping

import msgspec

from shared.chips import BITS_PER_WEIGHT, Chip, decode_tok_s, find
from shared.memory_plan import default_budget_bytes, plan
from shared.model_shape import ModelShape, parse_shape

USUAL_CHIP = {16: "M4", 24: "M4 Pro", 32: "M4", 48: "M4 Pro", 64: "M4 Pro", 128: "M4 Max"}
"""The chip of the Mac that is usually bought with so much memory."""
ROW_TOK, CHUNK_TOK, MAX_ROWS = 8192, 512, 8
CACHE_BYTES = 256 << 20
_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "inner": "intermediate_size",
    "heads": "num_attention_heads",
    "kv": "num_key_value_heads",
    "vocab": "vocab_size",
}


class Recommended(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the hub: parameters in all and read per token, in billions, and bits per parameter with the scales of
    its quantisation. ``config`` holds what config.json says of its shape."""

    repo: str
    good_for: str
    params_b: float
    active_b: float
    bits: float
    config: Mapping[str, object]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return int(self.params_b * 1e9 * self.bits / 8)

    @property
    def shape(self) -> ModelShape:
        """Its shape, for the memory plan."""
        return parse_shape(json.dumps({_KEYS.get(key, key): value for key, value in self.config.items()}).encode())


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """A model on a machine: requests of 8,192 tokens at the same time, bytes planned for them, tokens per second of one
    request (None for an unknown chip)."""

    repo: str
    good_for: str
    weights_bytes: int
    need_bytes: int
    rows: int
    tokens_per_s: float | None


def fits(model: Recommended, budget_bytes: int) -> int:
    """How many requests of 8,192 tokens the budget allows at the same time; 0 if the model does not fit."""
    return next((rows for rows in range(MAX_ROWS, 0, -1) if need_bytes(model, rows) <= budget_bytes), 0)


def need_bytes(model: Recommended, rows: int) -> int:
    """The memory plan of a model for ``rows`` requests of 8,192 tokens."""
    planned = plan(
        *(model.shape, model.weights_bytes),
        rows=rows,
        row_tok=ROW_TOK,
        chunk_tok=CHUNK_TOK,
        cache_bytes=CACHE_BYTES,
        fused=True,
    )
    return planned.need_bytes


def tokens_per_s(model: Recommended, bandwidth_gb_s: float) -> float:
    """Expected decode rate of one request with a short context."""
    return decode_tok_s(bandwidth_gb_s, model.active_b * 1e9 * model.bits / 8)


def recommend(budget_bytes: int, memory_gb: float, chip: Chip | None) -> list[Fit]:
    """Every model of the table that fits, the largest first."""
    found = [
        Fit(
            repo=model.repo,
            good_for=model.good_for,
            weights_bytes=model.weights_bytes,
            need_bytes=need_bytes(model, rows),
            rows=rows,
            tokens_per_s=round(tokens_per_s(model, chip.bandwidth(memory_gb)), 1) if chip else None,
        )
        for model in MODELS
        if (rows := fits(model, budget_bytes))
    ]
    return sorted(found, key=lambda fit: -fit.weights_bytes)


def for_memory(memory_gb: float, chip: Chip | None) -> list[Fit]:
    """The same for a machine with its default memory budget."""
    return recommend(default_budget_bytes(int(memory_gb * (1 << 30))), memory_gb, chip)


def rows_of(found: Iterable[Fit]) -> list[tuple[str, ...]]:
    """The cells of a table."""
    return [
        (
            fit.repo,
            f"{fit.weights_bytes / 1e9:.1f} GB",
            f"{fit.need_bytes / 1e9:.1f} GB",
            str(fit.rows),
            "unknown" if fit.tokens_per_s is None else f"{fit.tokens_per_s:.0f}",
            fit.good_for,
        )
        for fit in found
    ]


HEAD = ("MODEL", "WEIGHTS", "PLANNED", "ROWS OF 8K", "TOKENS/S", "GOOD FOR")


def markdown(most: int = 4) -> str:
    """The table of docs/models.md: for each memory size the ``most`` largest models that fit."""
    lines = ["| Memory | Chip | Model | Weights | Planned | Rows of 8k | Tokens/s | Good for |", "|" + "---|" * 8]
    lines += [
        "| " + " | ".join((f"{memory_gb} GB", name, *cells)) + " |"
        for memory_gb, name in USUAL_CHIP.items()
        for cells in rows_of(for_memory(memory_gb, find(name))[:most])
    ]
    return "\n".join(lines)


def _qwen3(layers: int, hidden: int, inner: int, heads: int, kv: int = 8, kind: str = "qwen3") -> dict[str, object]:
    shape = {"layers": layers, "hidden": hidden, "inner": inner, "heads": heads, "kv": kv, "vocab": 151936}
    return {**shape, "model_type": kind, "head_dim": 128, "max_position_embeddings": 40960}


def _llama(layers: int, hidden: int, inner: int, heads: int) -> dict[str, object]:
    shape = {"layers": layers, "hidden": hidden, "inner": inner, "heads": heads, "kv": 8, "vocab": 128256}
    return {**shape, "model_type": "llama", "head_dim": 128, "max_position_embeddings": 131072}


def _gpt_oss(layers: int) -> dict[str, object]:
    shape = {"layers": layers, "hidden": 2880, "inner": 2880, "heads": 64, "kv": 8, "vocab": 201088}
    windows = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * (layers // 2)}
    return {**shape, **windows, "model_type": "gpt_oss", "head_dim": 64, "max_position_embeddings": 131072}


_MISTRAL_24B = {
    "layers": 40,
    "hidden": 5120,
    "inner": 32768,
    "heads": 32,
    "kv": 8,
    "vocab": 131072,
    "head_dim": 128,
    "model_type": "mistral3",
    "max_position_embeddings": 131072,
}
_GLM_AIR = {
    "layers": 46,
    "hidden": 4096,
    "inner": 10944,
    "heads": 96,
    "kv": 8,
    "vocab": 151552,
    "head_dim": 128,
    "model_type": "glm4_moe",
    "max_position_embeddings": 131072,
}


def _model(
    name: str,
    good_for: str,
    params_b: float,
    config: Mapping[str, object],
    active_b: float = 0.0,
    bits: float = BITS_PER_WEIGHT,
) -> Recommended:
    return Recommended(
        repo=f"mlx-community/{name}",
        good_for=good_for,
        params_b=params_b,
        active_b=active_b or params_b,
        bits=bits,
        config=config,
    )


MODELS = (
    _model("Qwen3-4B-4bit", "extraction, classification", 4.02, _qwen3(36, 2560, 9728, 32)),
    _model("Qwen3-8B-4bit", "chat, tools, short drafts", 8.19, _qwen3(36, 4096, 12288, 32)),
    _model("Qwen3-14B-4bit", "reasoning, tools", 14.77, _qwen3(40, 5120, 17408, 40)),
    _model("gpt-oss-20b-MXFP4-Q8", "reasoning at speed", 20.91, _gpt_oss(24), 3.61, 4.63),
    _model("Mistral-Small-3.2-24B-Instruct-2506-4bit", "drafting, European languages", 23.57, _MISTRAL_24B),
    _model("Qwen3-30B-A3B-4bit", "chat at speed, tools", 30.53, _qwen3(48, 2048, 6144, 32, 4), 3.35),
    _model("Qwen3-32B-4bit", "reasoning, code", 32.76, _qwen3(64, 5120, 25600, 64)),
    _model("Llama-3.3-70B-Instruct-4bit", "drafting, planning", 70.55, _llama(80, 8192, 28672, 64)),
    _model("GLM-4.5-Air-4bit", "planning, code, tools", 106.9, _GLM_AIR, 12.7),
    _model("gpt-oss-120b-MXFP4-Q8", "reasoning, planning", 116.8, _gpt_oss(36), 5.13, 4.34),
)
