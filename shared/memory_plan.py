"""What a model will need of memory, computed before it is loaded from its config.json and its safetensors headers.

Pure arithmetic, shared by the agent (does it fit here?) and the aggregator (where would it fit?). Weights and keys and
values follow from the files exactly; the prefill's workspace is a formula fitted to measurements; the process is a
measured constant. Every load compares the plan with what MLX then reports.
"""

import struct
from collections.abc import Iterable, Sequence

import msgspec

from shared.errors import Refused

PROCESS_OVERHEAD_BYTES = 350 << 20
"""What a loader holds besides MLX's arrays (interpreter, libraries, tokenizer); measured on Linux."""
KV_STEP_TOK = 256
"""mlx-lm grows its key/value caches in steps of this many tokens."""
MAX_HEADER_BYTES = 100 << 20
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_CONFIG_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_ATTENTION, _INTERMEDIATE, _HIDDEN = 1.09, 2.5, 8.8
"""Prefill's workspace in arrays that live at the same time, by kind: scores of all heads, the feed-forward layer's
inner width, the hidden width. Least squares over 25 measured peaks (5 shapes, chunks of 128 to 1,024 tokens, contexts
of 512 to 2,048) on MLX's CPU build; the residuals are within 10 % but for the smallest chunk."""
_LATENT = ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2", "kimi_linear", "longcat_flash")
"""Families whose mlx-lm code caches the compressed latent; others with low-rank keys cache whole heads."""
_ENCODERS = ("bert",)
_RECURRENT = ("mamba", "mamba2", "rwkv7", "falcon_mamba")
_HEAD_BY_FILE = ("gemma3_text", "minicpm", "recurrent_gemma")
"""Families that use a head of their own wherever the files hold one, whatever config.json says."""
_PATTERNS = {"gemma3_text": (6, 512), "cohere2": (4, 4096)}
"""Sliding window pattern and window of families that may leave them out of config.json."""


class Tensor(msgspec.Struct, frozen=True):
    """One array of a safetensors file."""

    name: str
    dtype: str
    nbytes: int


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a model's memory. ``full`` layers hold ``token_bytes`` for every token of a context, ``sliding``
    ones only for the last ``window_tok``; others hold none. ``act_bytes`` is the width of a number in computation."""

    full: int
    sliding: int = 0
    window_tok: int = 0
    token_bytes: int
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    context_tok: int
    act_bytes: int
    tied: bool = False


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


def read_header(raw: bytes) -> tuple[Tensor, ...]:
    """Arrays named in the JSON header of a safetensors file (without its eight length bytes). Raises Refused."""
    try:
        tree = msgspec.json.decode(raw, type=dict[str, dict[str, object]])
        return tuple(_tensor(name, entry) for name, entry in tree.items() if name != "__metadata__")
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError, ValueError):
        raise Refused("its header is no safetensors header", code="bad_model") from None


def header_bytes(first_eight: bytes, file_bytes: int) -> int:
    """Length of the header that these bytes announce. Raises Refused when the file cannot hold it."""
    length = struct.unpack("<Q", first_eight)[0] if len(first_eight) == 8 else 0
    if not 0 < length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise Refused("it is no safetensors file, or cut off", code="bad_model")
    return int(length)


def weight_bytes(tensors: Iterable[Tensor], shape: ModelShape) -> int:
    """Bytes of the arrays that stay in memory: a head that is tied to the embeddings is dropped on loading."""
    return sum(t.nbytes for t in tensors if not (shape.tied and t.name.endswith("lm_head.weight")))


def parse_shape(config_json: bytes, tensors: Sequence[Tensor] = ()) -> ModelShape:
    """The shape from a model's config.json and its arrays. Raises Refused naming what is missing."""
    try:
        tree = msgspec.json.decode(config_json, type=dict[str, object])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Refused(f"config.json: not a JSON object ({error})", code="bad_model") from None
    if isinstance(inner := tree.get("text_config"), dict):
        tree = {**tree, **inner}
    act_bytes = _act_bytes(tree, tensors)
    heads, hidden = _integer(tree, "num_attention_heads"), _integer(tree, "hidden_size")
    full, sliding, window = _layers(tree)
    return ModelShape(
        full=full,
        sliding=sliding,
        window_tok=window,
        token_bytes=_token_numbers(tree, heads, hidden) * act_bytes,
        heads=heads,
        hidden=hidden,
        intermediate=_integer(tree, "intermediate_size", 4 * hidden),
        vocabulary=_integer(tree, "vocab_size", 1),
        context_tok=_integer(tree, "max_position_embeddings", 1 << 20),
        act_bytes=act_bytes,
        tied=tree.get("tie_word_embeddings") is True and tree.get("model_type") not in _HEAD_BY_FILE,
    )


def kv_bytes(shape: ModelShape, *, rows: int, row_tok: int, chunk_tok: int, kv_bits: int = 0, group: int = 64) -> int:
    """Bytes of keys and values of ``rows`` rows of ``row_tok`` tokens each.

    A full layer grows in steps of 256 tokens. A sliding one holds its window and the piece that is being prefilled.
    With ``kv_bits`` (4 or 8) numbers are stored in groups that share a scale and a bias.
    """
    stepped = -(-row_tok // KV_STEP_TOK) * KV_STEP_TOK
    windowed = min(stepped, shape.window_tok + chunk_tok)
    per_tok = shape.token_bytes
    if kv_bits:
        numbers = per_tok // shape.act_bytes
        per_tok = numbers * kv_bits // 8 + numbers // group * 2 * shape.act_bytes
    return rows * per_tok * (shape.full * stepped + shape.sliding * windowed)


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


def _tensor(name: str, entry: dict[str, object]) -> Tensor:
    begin, end = entry["data_offsets"]  # type: ignore[misc]
    nbytes = int(end) - int(begin)  # type: ignore[has-type]
    if nbytes < 0:
        raise ValueError
    return Tensor(name, str(entry["dtype"]), nbytes)


def _act_bytes(tree: dict[str, object], tensors: Sequence[Tensor]) -> int:
    """Width of the numbers that are computed with: that of the norms' weights, or of what the config says."""
    norms = [t.dtype for t in tensors if "norm" in t.name.lower() and t.dtype in _DTYPE_BYTES]
    if norms:
        return _DTYPE_BYTES[max(set(norms), key=norms.count)]
    return _CONFIG_BYTES.get(str(tree.get("torch_dtype") or tree.get("dtype")), 2)


def _token_numbers(tree: dict[str, object], heads: int, hidden: int) -> int:
    """Numbers that one layer keeps of one token."""
    family = tree.get("model_type")
    if family in _ENCODERS:
        return 0
    if "kv_lora_rank" in tree:
        rope = _integer(tree, "qk_rope_head_dim")
        if family in _LATENT:
            return _integer(tree, "kv_lora_rank") + rope
        return heads * (_integer(tree, "qk_nope_head_dim") + rope + _integer(tree, "v_head_dim"))
    kv_heads = _integer(tree, "num_key_value_heads", heads)
    return 2 * kv_heads * _integer(tree, "head_dim", hidden // heads)


def _layers(tree: dict[str, object]) -> tuple[int, int, int]:
    """How many layers look at everything, how many at a window, and the window."""
    count = _integer(tree, "num_hidden_layers")
    family = str(tree.get("model_type"))
    if family in _RECURRENT:
        return 0, 0, 0
    pattern, window = _PATTERNS.get(family, (0, 0))
    window = _integer(tree, "sliding_window", window or 1 << 20)
    kinds = tree.get("layer_types")
    if isinstance(kinds, list):
        full, sliding = kinds.count("full_attention"), kinds.count("sliding_attention")
        return full, sliding, window if sliding else 0
    letters = tree.get("sliding_window_pattern", pattern or None)
    if isinstance(letters, str) and letters:
        full = sum(letters[n % len(letters)] == "G" for n in range(count))
    elif isinstance(letters, int) and letters > 0:
        full = count // letters
    elif "full_attention_interval" in tree:
        return count // _integer(tree, "full_attention_interval"), 0, 0
    else:
        return count, 0, 0
    return full, count - full, window


def _integer(tree: dict[str, object], key: str, default: int = 0) -> int:
    value = tree.get(key)
    if value is None and default:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise Refused(f"config.json: {key} is missing or not a positive number", code="bad_model")
    return value
