"""Memory plan of a model, computed before loading from its config.json and its safetensors headers.

Pure arithmetic over model_shape, shared by the agent (does it fit here?) and the aggregator (where would it fit?).
Weights and KV cache follow exactly from the files; the prefill workspace is a formula fitted to measurements; the
process overhead is a measured constant. Every load compares the plan with what MLX reports afterwards.
"""

import msgspec

from shared.model_shape import ModelShape

PROCESS_OVERHEAD_BYTES = 350 << 20
"""Memory of a loader besides MLX's arrays (interpreter, libraries, tokenizer); measured on Linux."""
KV_STEP_TOK = 256
"""mlx-lm grows its KV caches in steps of this many tokens."""
_ATTENTION, _INTERMEDIATE, _HIDDEN = 1.09, 2.5, 8.8
"""Arrays of the prefill workspace that are live at the same time, by kind: scores of all heads, the feed-forward
layer's inner width, the hidden width. Least squares over 25 measured peaks (5 shapes, chunks of 128 to 1,024 tokens,
contexts of 512 to 2,048) on MLX's CPU build; the residuals are within 10 % but for the smallest chunk."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one loader. ``peak_bytes`` is the planned peak of MLX's own report; the process adds its
    ``overhead_bytes`` and freed arrays that MLX keeps for reuse (``reuse_bytes``)."""

    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    cache_bytes: int = 0
    reuse_bytes: int = 0
    overhead_bytes: int = PROCESS_OVERHEAD_BYTES

    @property
    def peak_bytes(self) -> int:
        """Peak memory of MLX."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes + self.cache_bytes

    @property
    def need_bytes(self) -> int:
        """Peak memory of the process."""
        return self.peak_bytes + self.reuse_bytes + self.overhead_bytes


def kv_bytes(shape: ModelShape, *, rows: int, row_tok: int, chunk_tok: int, kv_bits: int = 0, group: int = 64) -> int:
    """Bytes of the KV cache of ``rows`` rows of ``row_tok`` tokens each.

    A full-attention layer grows in steps of 256 tokens. A sliding one holds its window and the chunk being prefilled.
    With ``kv_bits`` (4 or 8) numbers are stored in groups that share a scale and a bias.
    """
    stepped = -(-row_tok // KV_STEP_TOK) * KV_STEP_TOK
    windowed = min(stepped, shape.window_tok + chunk_tok)
    held = shape.full * stepped * shape.token_bytes + shape.sliding * windowed * shape.sliding_token_bytes
    if kv_bits:
        numbers = held // shape.act_bytes
        held = numbers * kv_bits // 8 + numbers // group * 2 * shape.act_bytes
    return rows * (held + shape.state_bytes)


def workspace_bytes(shape: ModelShape, *, chunk_tok: int, context_tok: int, rows: int = 1, fused: bool = False) -> int:
    """Bytes of intermediate results while a chunk of ``chunk_tok`` prompt tokens is computed in a context of
    ``context_tok``, or ``rows`` tokens are sampled. ``fused`` attention (Metal, CUDA) never stores its scores."""
    scores = 0.0 if fused else _ATTENTION * shape.heads * context_tok
    prefill = chunk_tok * (scores + _INTERMEDIATE * shape.intermediate + _HIDDEN * shape.hidden) * shape.act_bytes
    # logits, log probabilities, and a sorted copy if a request restricts sampling (top-k, top-p)
    drawing = 3 * rows * shape.vocabulary * 4
    return int(max(prefill, drawing))


def plan(
    shape: ModelShape,
    weights_bytes: int,
    *,
    rows: int,
    row_tok: int,
    chunk_tok: int,
    cache_bytes: int = 0,
    fused: bool = False,
) -> MemoryPlan:
    """Plan a loader for ``rows`` requests of ``row_tok`` tokens, or one request as long as all of them."""
    longest = min(shape.context_tok, rows * row_tok)
    workspace = workspace_bytes(shape, chunk_tok=min(chunk_tok, longest), context_tok=longest, rows=rows, fused=fused)
    return MemoryPlan(
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes(shape, rows=rows, row_tok=row_tok, chunk_tok=chunk_tok),
        workspace_bytes=workspace,
        cache_bytes=cache_bytes,
        reuse_bytes=workspace,
    )


def default_budget_bytes(ram_bytes: int) -> int:
    """Memory budget of a node without a configured one: 2/3 of its memory below 36 GiB, 3/4 from there on, the shares
    that Metal recommends as working set size on such machines."""
    return ram_bytes * 2 // 3 if ram_bytes < (36 << 30) else ram_bytes * 3 // 4
