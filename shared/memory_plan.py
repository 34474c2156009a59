"""What a model will need of memory, computed before it is loaded from its config.json and its safetensors headers.

Pure arithmetic over model_shape, shared by the agent (does it fit here?) and the aggregator (where would it fit?).
Weights and keys and values follow from the files exactly; the prefill's workspace is a formula fitted to measurements;
the process is a measured constant. Every load compares the plan with what MLX then reports.
"""

import msgspec

from shared.model_shape import ModelShape

PROCESS_OVERHEAD_BYTES = 350 << 20
"""What a loader holds besides MLX's arrays (interpreter, libraries, tokenizer); measured on Linux."""
KV_STEP_TOK = 256
"""mlx-lm grows its key/value caches in steps of this many tokens."""
_ATTENTION, _INTERMEDIATE, _HIDDEN = 1.09, 2.5, 8.8
"""Prefill's workspace in arrays that live at the same time, by kind: scores of all heads, the feed-forward layer's
inner width, the hidden width. Least squares over 25 measured peaks (5 shapes, chunks of 128 to 1,024 tokens, contexts
of 512 to 2,048) on MLX's CPU build; the residuals are within 10 % but for the smallest chunk."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one loader. What MLX is planned to report at its highest is ``peak_bytes``; the process adds to that
    its own ``overhead_bytes`` and freed arrays that MLX keeps for reuse (``reuse_bytes``)."""

    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    cache_bytes: int = 0
    reuse_bytes: int = 0
    overhead_bytes: int = PROCESS_OVERHEAD_BYTES

    @property
    def peak_bytes(self) -> int:
        """The most that MLX holds at a time."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes + self.cache_bytes

    @property
    def need_bytes(self) -> int:
        """The most that the process holds."""
        return self.peak_bytes + self.reuse_bytes + self.overhead_bytes


def kv_bytes(shape: ModelShape, *, rows: int, row_tok: int, chunk_tok: int, kv_bits: int = 0, group: int = 64) -> int:
    """Bytes of keys and values of ``rows`` rows of ``row_tok`` tokens each.

    A full layer grows in steps of 256 tokens. A sliding one holds its window and the piece that is being prefilled.
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
    """Bytes of intermediate results while ``chunk_tok`` prompt tokens are computed before ``context_tok`` others, or
    ``rows`` tokens are drawn. ``fused`` attention (Metal, CUDA) never writes its scores down."""
    scores = 0.0 if fused else _ATTENTION * shape.heads * context_tok
    prefill = chunk_tok * (scores + _INTERMEDIATE * shape.intermediate + _HIDDEN * shape.hidden) * shape.act_bytes
    # logits and their logarithms, and a sorted copy where a request limits what is drawn from
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
    """The plan of a loader for ``rows`` requests of ``row_tok`` tokens, or one request as long as all of them."""
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
    """What models may use of a node that does not say: 2/3 of its memory below 36 GiB, 3/4 from there on.

    These are the shares that Metal recommends as working set on such machines.
    """
    return ram_bytes * 2 // 3 if ram_bytes < (36 << 30) else ram_bytes * 3 // 4
