"""A model's shape as its files describe it: what each layer caches per token, its widths, the size of its weights.

Pure; read from config.json as mlx-lm reads it, family by family, and from the headers of the safetensors files.
"""

import math
import struct
from collections.abc import Iterable, Sequence

import msgspec

from shared.errors import Refused

MAX_HEADER_BYTES = 16 << 20
"""Of one weights file: 100,000 tensors, which is more than models in many files have in one."""
MOST_TENSORS = 500_000
"""Of a model: with every expert apart, and scales, those of a trillion parameters have under 300,000."""
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_CONFIG_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_LATENT = (
    *("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "kimi_linear"),
    *("longcat_flash", "mistral4"),
)
"""Families for which mlx-lm caches the compressed latent; others with low-rank keys cache full heads."""
_ENCODERS = ("bert",)
_RECURRENT = ("mamba", "mamba2", "rwkv7", "falcon_mamba")
_HEAD_BY_FILE = ("gemma3_text", "minicpm", "recurrent_gemma")
"""Families that use a separate output head if the files contain one, whatever config.json says."""
_ROTATING = (
    *("afmoe", "cohere2", "exaone4", "exaone_moe", "gemma3_text", "gemma3n", "gemma4_text", "gpt_oss", "laguna"),
    *("llama", "mellum", "mimo_v2_flash", "ministral3", "olmo3", "plamo3", "step3p5"),
)
"""Families for which mlx-lm keeps only the window of a sliding layer; for others it keeps everything."""
_PATTERNS = {"gemma3_text": (6, 512), "cohere2": (4, 4096)}
"""Sliding pattern and window of families that may omit them from config.json."""
_DEFAULTS: dict[str, dict[str, object]] = {
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
}
"""mlx-lm's defaults for keys missing from config.json."""
_DROPPED = (
    *("vision_tower.", "vision_model.", "multi_modal_projector.", "embed_vision."),
    *("audio_tower.", "embed_audio.", "mtp."),
)
"""Parts of checkpoints that mlx-lm does not load into a language model."""


class Tensor(msgspec.Struct, frozen=True):
    """One array of a safetensors file."""

    name: str
    dtype: str
    nbytes: int


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The dimensions that determine a model's memory. ``full`` layers hold ``token_bytes`` per token of a context,
    ``sliding`` ones ``sliding_token_bytes`` for the last ``window_tok`` only. ``state_bytes`` is the state of all
    recurrent layers per row, of any length. ``act_bytes`` is the width of an activation."""

    full: int
    sliding: int = 0
    window_tok: int = 0
    token_bytes: int
    sliding_token_bytes: int = 0
    state_bytes: int = 0
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    context_tok: int
    act_bytes: int
    tied: bool = False


def read_header(raw: bytes) -> tuple[Tensor, ...]:
    """Arrays listed in the JSON header of a safetensors file (without its eight length bytes). Raises Refused."""
    try:
        tree = msgspec.json.decode(raw, type=dict[str, dict[str, object]])
        return tuple(_tensor(name, entry) for name, entry in tree.items() if name != "__metadata__")
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError, ValueError, RecursionError):
        raise Refused("invalid safetensors header", code="bad_model") from None


def header_bytes(first_eight: bytes, file_bytes: int) -> int:
    """Header length announced by these bytes. Raises Refused if the file is too short for it."""
    length = struct.unpack("<Q", first_eight)[0] if len(first_eight) == 8 else 0
    if MAX_HEADER_BYTES < length <= file_bytes - 8:
        raise Refused(f"its header has more than {MAX_HEADER_BYTES:,} bytes", code="bad_model")
    if not 0 < length <= file_bytes - 8:
        raise Refused("it is not a safetensors file, or truncated", code="bad_model")
    return int(length)


def weight_bytes(tensors: Iterable[Tensor], shape: ModelShape) -> int:
    """Bytes of the arrays that stay in memory: what mlx-lm drops on loading (a head tied to the embeddings, vision and
    audio towers) does not count, and 8-bit floats become 16-bit ones."""
    kept = [t for t in tensors if not (shape.tied and t.name.endswith("lm_head.weight")) and not _is_dropped(t.name)]
    return sum(t.nbytes * (2 if t.dtype.startswith("F8") else 1) for t in kept)


def parse_shape(config_json: bytes, tensors: Sequence[Tensor] = ()) -> ModelShape:
    """Derive the shape from a model's config.json and its arrays. Raises Refused naming what is missing."""
    try:
        tree = msgspec.json.decode(config_json, type=dict[str, object])
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise Refused(f"config.json: not a JSON object ({error})", code="bad_model") from None
    if isinstance(inner := tree.get("text_config"), dict):
        tree = {**_DEFAULTS.get(str(tree.get("model_type")), {}), **tree, **inner}
    tree = {**_DEFAULTS.get(str(tree.get("model_type")), {}), **tree}
    act_bytes, hidden = _act_bytes(tree, tensors), _integer(tree, "hidden_size")
    kinds, window = _layers(tree)
    full, sliding = kinds.count("full"), kinds.count("sliding")
    attends = full + sliding > 0 and tree.get("model_type") not in _ENCODERS
    heads = _integer(tree, "num_attention_heads", 0 if attends else 1)
    wide = {**tree, "head_dim": tree.get("global_head_dim") or tree.get("head_dim")}
    wide["num_key_value_heads"] = tree.get("num_global_key_value_heads") or tree.get("num_key_value_heads")
    return ModelShape(
        full=full,
        sliding=sliding,
        window_tok=window if sliding else 0,
        token_bytes=_token_numbers(wide, heads, hidden) * act_bytes if attends else 0,
        sliding_token_bytes=_token_numbers(tree, heads, hidden) * act_bytes if attends else 0,
        state_bytes=kinds.count("state") * _state_numbers(tree) * 4,
        heads=heads,
        hidden=hidden,
        intermediate=_largest(tree, "intermediate_size", 4 * hidden),
        vocabulary=_integer(tree, "vocab_size", 1),
        context_tok=_integer(tree, "max_position_embeddings", 1 << 20),
        act_bytes=act_bytes,
        tied=tree.get("tie_word_embeddings") is True and tree.get("model_type") not in _HEAD_BY_FILE,
    )


def _tensor(name: str, entry: dict[str, object]) -> Tensor:
    begin, end = entry["data_offsets"]  # type: ignore[misc]
    nbytes = int(end) - int(begin)  # type: ignore[has-type]
    if nbytes < 0:
        raise ValueError
    return Tensor(name, str(entry["dtype"]), nbytes)


def _act_bytes(tree: dict[str, object], tensors: Sequence[Tensor]) -> int:
    """Width of an activation in bytes: that of the norm weights, else the one in the configuration."""
    norms = [t.dtype for t in tensors if "norm" in t.name.lower() and t.dtype in _DTYPE_BYTES]
    if norms:
        return _DTYPE_BYTES[max(set(norms), key=norms.count)]
    return _CONFIG_BYTES.get(str(tree.get("torch_dtype") or tree.get("dtype")), 2)


def _token_numbers(tree: dict[str, object], heads: int, hidden: int) -> int:
    """Numbers that one layer caches per token."""
    if "kv_lora_rank" in tree:
        rope = _integer(tree, "qk_rope_head_dim")
        if tree.get("model_type") in _LATENT:
            index = _integer(tree, "index_head_dim", -1) if "index_head_dim" in tree else 0
            return _integer(tree, "kv_lora_rank") + rope + index
        value = _integer(tree, "v_head_dim", hidden // heads)
        return heads * (_integer(tree, "qk_nope_head_dim") + rope + value)
    kv_heads = _integer(tree, "num_key_value_heads", heads)
    return 2 * kv_heads * _integer(tree, "head_dim", hidden // heads)


def _state_numbers(tree: dict[str, object]) -> int:
    """Numbers (float32) in one recurrent layer's state of a row; 0 if negligible."""
    if isinstance(linear := tree.get("linear_attn_config"), dict):
        return _integer(linear, "num_heads", 1) * _integer(linear, "head_dim", 1) ** 2
    for names in (
        ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
        ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
        ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
        ("intermediate_size", "state_size"),
        ("hidden_size", "mamba_expand", "mamba_d_state"),
    ):
        if all(isinstance(tree.get(name), int) for name in names):
            return math.prod(_integer(tree, name) for name in names)
    return 0


def _layers(tree: dict[str, object]) -> tuple[list[str], int]:
    """What each layer caches (full, sliding, state or nothing), and the window.

    Families encode this in seven ways; without any of them every layer uses full attention.
    """
    family = str(tree.get("model_type"))
    count = _integer(tree, "num_hidden_layers", _integer(tree, "num_layers", -1) if "num_layers" in tree else 0)
    pattern, window = _PATTERNS.get(family, (0, 0))
    window = _integer(tree, "sliding_window", window or 1 << 20)
    period = tree.get("attn_layer_period")
    linear = tree.get("linear_attn_config")
    letters = tree.get("sliding_window_pattern", pattern or None)
    listed = tree.get("hybrid_override_pattern") or tree.get("layers_block_type") or tree.get("layer_types")
    if family in _RECURRENT:
        kinds = ["state"] * count
    elif isinstance(listed, list | str):
        if "chunked_attention" in listed:
            window = _integer(tree, "attention_chunk_size", window)
        kinds = [_KINDS.get(str(one), "") for one in listed]
        if family not in _ROTATING and "chunked_attention" not in listed:
            kinds = ["full" if kind == "sliding" else kind for kind in kinds]
    elif isinstance(linear, dict) and isinstance(attending := linear.get("full_attn_layers"), list):
        kinds = ["full"] * len(attending) + ["state"] * (count - len(attending))
    elif isinstance(attending := tree.get("full_attn_idxs"), list):
        kinds = ["full"] * len(attending)
    elif isinstance(period, int) and period > 0:
        kinds = ["full" if n % period == tree.get("attn_layer_offset", 0) else "state" for n in range(count)]
    elif isinstance(letters, str) and letters:
        kinds = ["full" if letters[n % len(letters)] == "G" else "sliding" for n in range(count)]
    elif isinstance(letters, int) and letters > 0:
        kinds = ["full" if n % letters == letters - 1 else "sliding" for n in range(count)]
    elif "full_attention_interval" in tree:
        every = _integer(tree, "full_attention_interval")
        kinds = ["full" if (n + 1) % every == 0 else "state" for n in range(count)]
    else:
        kinds = ["full"] * count
    return _with_own(family, tree, kinds), window


def _with_own(family: str, tree: dict[str, object], kinds: list[str]) -> list[str]:
    """Exceptions of single families: caches shared between layers, or two per layer."""
    shared = tree.get("num_kv_shared_layers")
    if isinstance(shared, int) and 0 < shared < len(kinds):
        return kinds[: len(kinds) - shared]
    if family == "falcon_h1":
        return kinds + ["state"] * len(kinds)
    return kinds * 2 if family == "longcat_flash" else kinds


_KINDS = {
    "full_attention": "full",
    "attention": "full",
    "*": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "state",
    "mamba": "state",
    "M": "state",
    "recurrent": "state",
}


def _is_dropped(name: str) -> bool:
    return any(name.startswith((part, f"model.{part}")) for part in _DROPPED)


def _largest(tree: dict[str, object], key: str, default: int) -> int:
    value = tree.get(key)
    if isinstance(value, list) and value and all(isinstance(one, int) for one in value):
        return int(max(value))
    return _integer(tree, key, default)


def _integer(tree: dict[str, object], key: str, default: int = 0) -> int:
    value = tree.get(key)
    if value is None and default > 0:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise Refused(f"config.json: {key} is missing or not a positive number", code="bad_model")
    return value
