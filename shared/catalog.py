"""What a model is made of: its manifest and its version. What it needs of memory: memory_plan."""

import hashlib
import re

import msgspec

from shared.errors import Refused
from shared.ids import Version

MANIFEST_NAME = "mlxrack-manifest.json"
PROBES_NAME = "mlxrack-probes.json"
"""Questions with recorded answers; they may change without the model being another one."""
INDEX_NAME = "model.safetensors.index.json"
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,126}")


class ModelFile(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One file of a model: its path inside the folder, size in bytes, sha256 in hex."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The files that are the model; sorted by name."""

    files: tuple[ModelFile, ...]


def version_of(manifest: Manifest) -> Version:
    """The name of exactly these bytes: 16 hex digits of the sha256 over the sorted manifest."""
    body = msgspec.json.encode(sorted(manifest.files))
    return Version(hashlib.sha256(body).hexdigest()[:16])


def is_model_file(name: str) -> bool:
    """Whether a file of a model folder, by its path inside it, belongs to the model. No programs, no documents."""
    parts = name.split("/")
    ours = parts[-1] in (MANIFEST_NAME, PROBES_NAME)
    return not ours and len(parts) <= 3 and name.endswith(_SUFFIXES) and all(_PART.fullmatch(part) for part in parts)


def is_loaded(name: str) -> bool:
    """Whether mlx-lm reads weights from a file: model*.safetensors, beside the configuration."""
    return "/" not in name and name.startswith("model") and name.endswith(".safetensors")


def check_manifest(manifest: Manifest, what: str) -> None:
    """A manifest from elsewhere: raises Refused when it names files that no model has, or outside its folder."""
    names = [file.name for file in manifest.files]
    strange = [name for name in names if not is_model_file(name)]
    if strange:
        raise Refused(f"{what}: its manifest names {strange[0]!r}, which is no file of a model", code="bad_model")
    if len(set(names)) != len(names) or any(file.size < 0 for file in manifest.files):
        raise Refused(f"{what}: its manifest names a file twice, or a size below zero", code="bad_model")
    if not any(name.endswith(".safetensors") for name in names):
        raise Refused(f"{what}: its manifest names no .safetensors file", code="bad_model")


def missing_shards(index: bytes, names: set[str]) -> list[str]:
    """Files that a model's index counts on and that are not there. Raises Refused when it cannot be read."""
    try:
        tree = msgspec.json.decode(index, type=_Index)
    except (msgspec.DecodeError, msgspec.ValidationError):
        raise Refused(f"{INDEX_NAME} cannot be read", code="bad_model") from None
    return sorted(set(tree.weight_map.values()) - names)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
