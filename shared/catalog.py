"""A model's manifest and its version. Memory needs are computed in memory_plan."""

import hashlib
import re

import msgspec

from shared.errors import Refused
from shared.ids import Version

MANIFEST_NAME = "mlxrack-manifest.json"
PROBES_NAME = "mlxrack-probes.json"
"""Recorded probes; they may change without a change of the model's version."""
INDEX_NAME = "model.safetensors.index.json"
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt")
MOST_PARTS = 3
"""Folders in folders, the file included."""
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,126}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ModelFile(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One file of a model: path relative to the folder, size in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a model, sorted by name."""

    files: tuple[ModelFile, ...]


def version_of(manifest: Manifest) -> Version:
    """Content-derived version: 16 hex digits of the SHA-256 over the sorted manifest."""
    return Version(hashlib.sha256(msgspec.json.encode(sorted(manifest.files))).hexdigest()[:16])


def is_part(name: str) -> bool:
    """Whether a file or folder may have this name in a model: nothing hidden, no separator, nothing beyond ASCII."""
    return bool(_PART.fullmatch(name))


def is_model_file(name: str) -> bool:
    """Whether a file (relative path in a model folder) belongs to the model; executables and documents do not."""
    parts = name.split("/")
    ours = parts[-1] in (MANIFEST_NAME, PROBES_NAME)
    return not ours and len(parts) <= MOST_PARTS and name.endswith(_SUFFIXES) and all(map(is_part, parts))


def is_loaded(name: str) -> bool:
    """Whether mlx-lm reads weights from the file: model*.safetensors next to config.json."""
    return "/" not in name and name.startswith("model") and name.endswith(".safetensors")


def check_manifest(manifest: Manifest, what: str) -> None:
    """Validate an untrusted manifest. Raises Refused for files that are not model files or lie outside its folder."""
    names = [file.name for file in manifest.files]
    if strange := [name for name in names if not is_model_file(name)]:
        raise Refused(f"{what}: the manifest lists {strange[0]!r}, which is not a model file", code="bad_model")
    # the usual file system of a Mac takes names that differ in case alone for one
    folded = {name.casefold() for name in names}
    inner = any(parent in folded for name in folded for parent in _parents(name))
    if len(folded) != len(names) or inner or any(file.size < 0 for file in manifest.files):
        raise Refused(f"{what}: the manifest lists a duplicate file or a negative size", code="bad_model")
    if not all(_SHA256.fullmatch(file.sha256) for file in manifest.files):
        raise Refused(f"{what}: the manifest lists a file without a SHA-256", code="bad_model")
    if not any(name.endswith(".safetensors") for name in names):
        raise Refused(f"{what}: the manifest lists no .safetensors file", code="bad_model")


def _parents(name: str) -> list[str]:
    """The folders that a file is in."""
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def missing_shards(index: bytes, names: set[str]) -> list[str]:
    """Files that a model's index refers to and that are missing. Raises Refused when the index cannot be parsed."""
    try:
        tree = msgspec.json.decode(index, type=_Index)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError):
        raise Refused(f"{INDEX_NAME}: cannot be parsed", code="bad_model") from None
    return sorted(set(tree.weight_map.values()) - names)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
