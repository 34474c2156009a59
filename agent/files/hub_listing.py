"""What the Hugging Face hub lists of a model, what of it a node takes, and where a model came from. Pure."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from shared import catalog
from shared.errors import Refused
from shared.keys import check_name

ORIGIN_NAME = "mlxrack-origin"
"""The file of a version that records its origin; not one of the model's files, so it does not change the version."""
MAX_SMALL_BYTES = 256 << 20
"""Files without a SHA-256 on the hub (configuration, tokenizers) are held in memory until they are checked."""
_TRUE = ("1", "on", "yes", "true")
_HUB = re.compile(r"^(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:(?://)?)")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ASKED = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:(?:@|/tree/)(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?")
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_COMMIT_START = re.compile(r"[0-9a-f]{7,40}")


class Asked(NamedTuple):
    """A model of the hub as somebody asked for it. ``revision`` is a commit, its first digits, a branch or a tag; ""
    takes whatever revision this rack has, else the newest."""

    repo: str
    revision: str = ""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a version came from: model on the hub, commit, licence as its card states it ("" if it states none)."""

    repo: str
    revision: str
    licence: str = ""


class HubFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the hub lists it: its git blob id (SHA-1), and for a large one its SHA-256."""

    name: str
    size: int
    blob: str
    sha256: str = ""


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """A model at one commit, with the files that a node takes."""

    origin: Origin
    files: tuple[HubFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


def parse_name(text: str) -> Asked | None:
    """A hub name: ``org/model``, with ``@revision``, after ``hf:``, or the address of its page. None for other text."""
    match = _ASKED.fullmatch(_HUB.sub("", text.strip()).rstrip("/"))
    return Asked(match["repo"], match["revision"] or "") if match else None


def local_name(repo: str) -> str:
    """The name in the store for a model of the hub: without its organisation. Raises Refused if that is too long."""
    return check_name(repo.rpartition("/")[2], "model name (choose one with --name)")


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit or its first digits, which can be compared without asking the hub."""
    return bool(_COMMIT_START.fullmatch(revision))


def matches(origin: Origin | None, asked: Asked) -> bool:
    """Whether a version with this origin is what was asked for, as far as can be told without asking the hub."""
    if origin is None or origin.repo.casefold() != asked.repo.casefold():
        return False
    return not asked.revision or (is_commit(asked.revision) and origin.revision.startswith(asked.revision))


def parse_origin(raw: bytes | None) -> Origin | None:
    """The origin that a version's file records; None where there is none or it is not one."""
    try:
        origin = msgspec.json.decode(raw or b"", type=Origin)
    except (msgspec.DecodeError, RecursionError):
        return None
    valid = parse_name(origin.repo) == Asked(origin.repo) and _COMMIT.fullmatch(origin.revision)
    return msgspec.structs.replace(origin, licence=shown(origin.licence)) if valid else None


def shown(text: object) -> str:
    """A text of the hub as it may be printed on a terminal: printable ASCII, 80 characters at most."""
    return re.sub(r"[^\x20-\x7e]", "", str(text))[:80]


def licence_of(card: Mapping[str, object]) -> str:
    """The licence in a model card's metadata; its own name where it is not a common one; "" if none is stated."""
    stated = card.get("license")
    named = card.get("license_name") if stated in (None, "other") else stated
    several = named if isinstance(named, list) else [named or stated or ""]
    return shown(", ".join(str(one) for one in several))


def taken(repo: str, files: Sequence[HubFile]) -> tuple[HubFile, ...]:
    """The files that a served model needs, in order; never programs, pickles or second copies of the weights. Raises
    Refused for a model that mlx-lm cannot load, or whose list cannot be trusted."""
    found = tuple(sorted((file for file in files if _is_needed(file.name)), key=lambda file: file.name))
    if not any(catalog.is_loaded(file.name) for file in found):
        kinds = sorted({file.name.rpartition(".")[2] for file in files if "." in file.name})[:6]
        why = f"it has no model*.safetensors, only {shown(', '.join(kinds)) or 'no files'}"
        raise Refused(f"{repo}: {why}; choose an MLX conversion, for example from mlx-community", code="bad_model")
    if odd := [f for f in found if f.size < 0 or not (_SHA256 if f.sha256 else _COMMIT).fullmatch(f.sha256 or f.blob)]:
        raise Refused(f"{repo}: the hub lists {odd[0].name} without size or hash", code="bad_model")
    if (small := sum(f.size for f in found if not f.sha256)) > MAX_SMALL_BYTES:
        raise Refused(f"{repo}: the hub lists {small / 1e6:.0f} MB of files without a SHA-256", code="bad_model")
    return found


def _is_needed(name: str) -> bool:
    return catalog.is_model_file(name) and (not name.endswith(".safetensors") or catalog.is_loaded(name))


def is_blob(content: bytes, blob: str) -> bool:
    """Whether git would give this content the blob id."""
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == blob


def offline_because(environ: Mapping[str, str], *, asked: bool = False) -> str:
    """Why the hub must not be asked; "" when it may."""
    if asked:
        return "--offline was given"
    names = [n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if environ.get(n, "").lower() in _TRUE]
    return f"{names[0]} is set" if names else ""
