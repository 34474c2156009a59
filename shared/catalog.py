"""What a model is made of and what it needs: its manifest, its version, its bytes in memory. Pure arithmetic."""

import hashlib

import msgspec

from shared.errors import Refused
from shared.ids import Version

MANIFEST_NAME = "mlxrack-manifest.json"
PROCESS_OVERHEAD_BYTES = 350 << 20
"""What a loader holds besides weights and caches (interpreter, MLX, tokenizer); measured on Linux."""
KV_STEP_TOK = 256
"""mlx-lm grows its key/value caches in steps of this many tokens."""


class ModelFile(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One file of a model: its path inside the folder, size in bytes, sha256 in hex."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The files that are the model; sorted by name."""

    files: tuple[ModelFile, ...]


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a model's key/value bytes; read from its config.json."""

    layers: int
    kv_heads: int
    head_dim: int
    kv_bytes: int = 2


def version_of(manifest: Manifest) -> Version:
    """The name of exactly these bytes: 16 hex digits of the sha256 over the sorted manifest."""
    body = msgspec.json.encode(sorted(manifest.files))
    return Version(hashlib.sha256(body).hexdigest()[:16])


def kv_bytes_per_token(shape: ModelShape) -> int:
    """Bytes that one token of context costs: 2 (keys, values) x layers x kv heads x head dim x bytes each."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.kv_bytes


def need_bytes(weight_bytes: int, shape: ModelShape, *, rows: int, context_tok: int) -> int:
    """Planned bytes of a loader: weights, caches for ``rows`` requests of ``context_tok`` tokens, and the process."""
    steps = -(-context_tok // KV_STEP_TOK)
    return weight_bytes + rows * steps * KV_STEP_TOK * kv_bytes_per_token(shape) + PROCESS_OVERHEAD_BYTES


def default_budget_bytes(ram_bytes: int) -> int:
    """What models may use of a node that does not say: 2/3 of its memory below 36 GiB, 3/4 from there on.

    These are the shares that Metal recommends as working set on such machines.
    """
    return ram_bytes * 2 // 3 if ram_bytes < (36 << 30) else ram_bytes * 3 // 4


def parse_shape(config_json: bytes) -> ModelShape:
    """The shape from a model's config.json. Raises Refused naming what is missing."""
    try:
        tree = msgspec.json.decode(config_json, type=dict[str, object])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Refused(f"config.json: not a JSON object ({error})", code="bad_model") from None
    heads = _integer(tree, "num_attention_heads")
    kv_heads = _integer(tree, "num_key_value_heads") if "num_key_value_heads" in tree else heads
    head_dim = _integer(tree, "head_dim") if tree.get("head_dim") else _integer(tree, "hidden_size") // heads
    kv_bytes = 4 if tree.get("torch_dtype") == "float32" else 2
    return ModelShape(
        layers=_integer(tree, "num_hidden_layers"), kv_heads=kv_heads, head_dim=head_dim, kv_bytes=kv_bytes
    )


def _integer(tree: dict[str, object], key: str) -> int:
    value = tree.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise Refused(f"config.json: {key} is missing or not a positive number", code="bad_model")
    return value
