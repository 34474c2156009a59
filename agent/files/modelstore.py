"""Models on this node's disk: what is there, whether it is intact, what memory it needs. Blocking; use a thread.

A model is a folder anywhere, or one that was pulled into the store: ``<store>/<name>/<version>``. Partial downloads
lie under ``<store>/.partial`` and cannot be loaded.
"""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.config import STORED, AgentConfig, Model
from agent.files.hub_listing import ORIGIN_NAME, Asked, Origin, local_name, matches, parse_name, parse_origin
from agent.files.model_folder import MOST_BYTES, ModelFolder
from agent.files.probes import BUILT_IN, Probe, parse
from shared import catalog, memory_plan, model_shape
from shared.catalog import Manifest, ModelFile
from shared.durable import write_whole
from shared.errors import Refused
from shared.ids import Version
from shared.keys import check_name
from shared.memory_plan import MemoryPlan
from shared.model_shape import ModelShape, Tensor
from shared.regular_file import read_file

PARTIAL = ".partial"
HASHED_BYTES = 1 << 20


def model_folder(config: AgentConfig, state: Path) -> Path:
    """The folder of pulled models."""
    return Path(config.model_store.path).expanduser() if config.model_store.path else state / "models"


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model as this node would load it. ``shape`` is None for an engine without files."""

    model: Model
    path: str
    version: Version
    need_bytes: int
    plan: MemoryPlan
    shape: ModelShape | None = None
    probes: tuple[Probe, ...] = BUILT_IN

    def planned_warm_bytes(self, warm_tok: int, *, fused: bool) -> int | None:
        """Planned peak of MLX memory after the loader answered its first prompt; None without a shape."""
        if self.shape is None or not warm_tok:
            return None
        chunk = min(warm_tok, self.model.prefill_chunk_tok)
        return (
            self.plan.weights_bytes
            + memory_plan.kv_bytes(self.shape, rows=1, row_tok=warm_tok, chunk_tok=chunk)
            + memory_plan.workspace_bytes(self.shape, chunk_tok=chunk, context_tok=warm_tok, fused=fused)
        )


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """A version in the store or the bucket; ``origin`` is None for one that did not come from the hub."""

    name: str
    version: str
    size: int
    origin: Origin | None = None


class _Hashed(msgspec.Struct, kw_only=True):
    size: int
    mtime_ns: int
    sha256: str


class ModelStore:
    """Reads model folders; remembers file hashes in ``memo``, because hashing 20 GB takes a while. ``folder`` holds
    pulled models. ``fused`` says that attention does not materialize scores, as on a GPU."""

    def __init__(self, memo: Path, folder: Path, *, fused: bool = sys.platform == "darwin") -> None:
        self._memo, self.folder, self.fused = memo, folder, fused
        self._hashes: dict[str, _Hashed] = self._read_memo()
        self._hashing = threading.Lock()
        self._changed = False

    def describe(self, model: Model) -> ModelSpec:
        """Version and planned bytes of a configured model. Raises Refused naming what is wrong and the remedy."""
        if model.engine == "fake":
            version = Version(hashlib.sha256(f"fake:{model.path or model.name}".encode()).hexdigest()[:16])
            need = model.need_bytes or 1 << 20
            plan = MemoryPlan(weights_bytes=need, kv_bytes=0, workspace_bytes=0, overhead_bytes=0)
            probes = self._probes(model, None)
            return ModelSpec(model=model, path=model.path, version=version, need_bytes=need, plan=plan, probes=probes)
        folder = _folder(model.name, self.resolve(model))
        manifest = self.manifest(model.name, folder.path)
        shape, plan = self._planned(
            model, self._config(model.name, folder), _all_tensors(model, folder, manifest.files)
        )
        need = model.need_bytes or plan.need_bytes
        version = catalog.version_of(manifest)
        return ModelSpec(
            model=model,
            path=str(folder.path),
            version=version,
            need_bytes=need,
            plan=plan,
            shape=shape,
            probes=self._probes(model, folder),
        )

    def outlook(self, model: Model) -> int:
        """Planned bytes of a configured model, from the headers of its files: nothing is hashed, nothing is written.
        Raises Refused as ``describe`` does, but for damaged weights."""
        if model.engine == "fake":
            return self.describe(model).need_bytes
        folder = _folder(model.name, self.resolve(model))
        if not folder.path.is_dir():
            raise _no_folder(model.name, folder.path)
        try:
            files = [_unhashed(folder, name) for name in _part_names(model.name, folder)]
        except OSError as error:
            raise _bad(model.name, f"its files cannot be read ({error.strerror})") from None
        _, plan = self._planned(model, self._config(model.name, folder), _all_tensors(model, folder, files))
        self._probes(model, folder)
        return model.need_bytes or plan.need_bytes

    def resolve(self, model: Model) -> Path:
        """The folder behind a configured path. Raises Refused when the store does not hold it."""
        if not model.path.startswith(STORED):
            return Path(model.path).expanduser()
        name, _, version = model.path.removeprefix(STORED).partition("@")
        check_name(name, "model")
        if not (held := [one.version for one in self.installed(name)]):
            remedy = f"fetch it with `mlxrack-agent models pull SOURCE --name {name}`"
            raise _bad(model.name, f"nothing named {name} is in the store ({self.folder}); {remedy}")
        if not version and len(held) > 1:
            seen = f"the store holds {len(held)} versions of {name} ({', '.join(held)})"
            raise _bad(model.name, f'{seen}; specify one: path = "{STORED}{name}@VERSION"')
        if version and version not in held:
            raise _bad(model.name, f"the store does not hold version {version} of {name}, only {', '.join(held)}")
        return self.place(name, version or held[0])

    def place(self, name: str, version: str) -> Path:
        """The folder of a version, installed or not."""
        return self.folder / check_name(name, "model") / check_name(version, "version")

    def installed(self, name: str = "") -> list[Installed]:
        """The complete versions in the store, in order."""
        folders = [self.folder / check_name(name, "model")] if name else _folders(self.folder)
        return [
            Installed(name=folder.name, version=version.name, size=_size(version), origin=_origin(version))
            for folder in folders
            for version in _folders(folder)
        ]

    def from_hub(self, asked: Asked, name: str = "") -> list[Installed]:
        """The installed versions of a model of the hub, under one name or any."""
        return [one for one in self.installed(name) if matches(one.origin, asked)]

    def fragments(self, name: str) -> list[Path]:
        """Folders that may hold files of another version of ``name``: installed ones and partial downloads."""
        found = [folder for folder in _folders(self.folder / PARTIAL) if folder.name.startswith(f"{name}@")]
        return [*found, *_folders(self.folder / check_name(name, "model"))]

    def remember(self, place: Path, manifest: Manifest) -> None:
        """Note the hashes of a version that was just verified, so that it need not be hashed again."""
        with self._hashing, contextlib.suppress(OSError):
            for file in manifest.files:
                stat = (place / file.name).stat()
                self._hashes[str(place / file.name)] = _Hashed(
                    size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=file.sha256
                )
            self._changed = True
            self._write_memo()

    def partials(self) -> list[Installed]:
        """Partial downloads of interrupted pulls, which resume from there."""
        found = [folder.name.partition("@") for folder in _folders(self.folder / PARTIAL)]
        return [
            Installed(name=name, version=version, size=size)
            for name, at, version in found
            if at and (size := _size(self.folder / PARTIAL / f"{name}@{version}"))
        ]

    def remove(self, name: str, version: str) -> None:
        """Remove a version, or its partial download, from the store. Raises Refused when there is none."""
        place = self.place(name, version)
        for left in (self.folder / PARTIAL).glob("removed-*"):
            shutil.rmtree(left, ignore_errors=True)  # an interrupted removal
        if not place.is_dir() and (partial := self.folder / PARTIAL / f"{name}@{version}").is_dir():
            shutil.rmtree(partial)
            return
        if not place.is_dir():
            raise Refused(f"remove {name}@{version}: it is not in the store ({self.folder})", code="not_found")
        # moved away in one atomic step, so that nothing half-removed can be loaded
        doomed = self.folder / PARTIAL / f"removed-{name}-{version}"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(place, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(OSError):
            place.parent.rmdir()

    def manifest(self, name: str, folder: Path) -> Manifest:
        """The files of a model folder, hashed and compared with the manifest that came with them. Raises Refused."""
        if not folder.is_dir():
            raise _no_folder(name, folder)
        with self._hashing:
            return self._read_manifest(name, _folder(name, folder))

    def _planned(self, model: Model, config: bytes, tensors: Sequence[Tensor]) -> tuple[ModelShape | None, MemoryPlan]:
        """The memory plan; for an unknown shape, the need_bytes that the operator configured."""
        try:
            shape = model_shape.parse_shape(config, tensors)
        except Refused as error:
            if not model.need_bytes:
                raise _bad(model.name, f"{error.message}; or configure the memory it needs with need_bytes") from None
            weights = sum(tensor.nbytes for tensor in tensors)
            return None, MemoryPlan(weights_bytes=weights, kv_bytes=0, workspace_bytes=0, cache_bytes=model.cache_bytes)
        plan = memory_plan.plan(
            shape,
            model_shape.weight_bytes(tensors, shape),
            rows=model.rows,
            row_tok=model.plan_context_tok,
            chunk_tok=model.prefill_chunk_tok,
            cache_bytes=model.cache_bytes,
            fused=self.fused,
        )
        return shape, plan

    @staticmethod
    def _probes(model: Model, folder: ModelFolder | None) -> tuple[Probe, ...]:
        """Recorded answers: from the configured file, else those that came with the model."""
        if model.probes:
            path = Path(model.probes).expanduser()
            try:
                return parse(read_file(path, MOST_BYTES), f"model {model.name}: probes {path}")
            except OSError as error:
                why = f"model {model.name}: its probes {path} cannot be read ({error.strerror})"
                raise Refused(why, code="bad_probes") from None
        if folder is not None:
            with contextlib.suppress(FileNotFoundError):
                raw = folder.read(catalog.PROBES_NAME)
                return parse(raw, f"model {model.name}: its {catalog.PROBES_NAME}")
        return BUILT_IN

    def _config(self, name: str, folder: ModelFolder) -> bytes:
        try:
            return folder.read("config.json")
        except OSError:
            raise _bad(name, f"{folder.path} has no config.json; it is not an mlx-lm model folder") from None

    def _read_manifest(self, name: str, folder: ModelFolder) -> Manifest:
        try:
            files = tuple(self._file(name, folder, one) for one in _part_names(name, folder))
        except OSError as error:
            raise _bad(name, f"its files cannot be read ({error.strerror})") from None
        self._write_memo()
        made = Manifest(files=files)
        self._compare(name, folder, made)
        return made

    def _file(self, name: str, folder: ModelFolder, inside: str) -> ModelFile:
        path = str(folder.path / inside)
        with folder.open(inside) as file:
            stat = os.fstat(file.fileno())
            known = self._hashes.get(path)
            if known is None or (known.size, known.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                digest = _digest(file, stat.st_size)
                after = os.fstat(file.fileno())
                if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                    raise _bad(name, f"file {inside} is being written; wait until that is done")
                self._changed = True
                known = self._hashes[path] = _Hashed(size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=digest)
        return ModelFile(name=inside, size=known.size, sha256=known.sha256)

    @staticmethod
    def _compare(name: str, folder: ModelFolder, made: Manifest) -> None:
        """Compare with the manifest that came with the model, if there is one."""
        try:
            came = msgspec.json.decode(folder.read(catalog.MANIFEST_NAME), type=Manifest)
        except FileNotFoundError:
            return
        except (msgspec.DecodeError, RecursionError):
            raise _bad(name, f"its {catalog.MANIFEST_NAME} cannot be read") from None
        have = {f.name: f for f in made.files}
        for wanted in came.files:
            if (got := have.get(wanted.name)) is None:
                raise _bad(name, f"file {wanted.name} is missing; fetch the model again")
            if got != wanted:
                seen = f"{got.size} bytes, sha256 {got.sha256[:8]}.."
                expected = f"expected {wanted.size} bytes, {wanted.sha256[:8]}.."
                why = f"file {wanted.name} is corrupt ({seen}; {expected}); delete the folder and fetch the model again"
                raise _bad(name, why)

    def _read_memo(self) -> dict[str, _Hashed]:
        try:
            return msgspec.json.decode(self._memo.read_bytes(), type=dict[str, _Hashed])
        except (OSError, msgspec.DecodeError):
            return {}  # only a cache

    def _write_memo(self) -> None:
        """Save the hashes; a failed write costs time at the next start and nothing else."""
        if not self._changed:
            return
        with contextlib.suppress(OSError):
            self._memo.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(self._memo, msgspec.json.encode(self._hashes), synced=False)
            self._changed = False


def _folder(name: str, folder: Path) -> ModelFolder:
    return ModelFolder(folder, f"model {name}")


def _part_names(name: str, folder: ModelFolder) -> list[str]:
    """The files of a model. Raises Refused where none holds weights, or some are missing; OSError."""
    names = folder.names()
    if not any(one.endswith(".safetensors") for one in names):
        raise _bad(name, f"{folder.path} holds no .safetensors file")
    _check_shards(name, folder, set(names))
    return names


def _unhashed(folder: ModelFolder, name: str) -> ModelFile:
    with folder.open(name) as file:
        return ModelFile(name=name, size=os.fstat(file.fileno()).st_size, sha256="")


def _digest(file: BinaryIO, size: int) -> str:
    """The SHA-256 of the first ``size`` bytes: one that grows as it is read has no end."""
    digest, left = hashlib.sha256(), size
    while left and (piece := file.read(min(HASHED_BYTES, left))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def _all_tensors(model: Model, folder: ModelFolder, files: Sequence[ModelFile]) -> list[Tensor]:
    every = (t for file in files for t in _tensors(model.name, folder, file))
    tensors = list(itertools.islice(every, model_shape.MOST_TENSORS + 1))
    if len(tensors) > model_shape.MOST_TENSORS:
        raise _bad(model.name, f"its weights have more than {model_shape.MOST_TENSORS:,} tensors")
    return tensors


def _tensors(name: str, folder: ModelFolder, file: ModelFile) -> Iterator[Tensor]:
    """The tensors of a weights file, from its header alone."""
    if not catalog.is_loaded(file.name):
        return
    try:
        with folder.open(file.name) as weights:
            length = model_shape.header_bytes(weights.read(8), file.size)
            tensors = model_shape.read_header(weights.read(length))
        if 8 + length + sum(t.nbytes for t in tensors) > file.size:
            raise Refused("it is truncated", code="bad_model")
        yield from tensors
    except Refused as error:
        raise _bad(name, f"file {file.name}: {error.message}; fetch the model again") from None
    except OSError as error:
        raise _bad(name, f"{file.name} cannot be read ({error.strerror})") from None


def _check_shards(name: str, folder: ModelFolder, names: set[str]) -> None:
    if catalog.INDEX_NAME not in names:
        return
    if missing := catalog.missing_shards(folder.read(catalog.INDEX_NAME), names):
        raise _bad(name, f"{folder.path} lacks {len(missing)} of its weights files ({missing[0]}); finish its download")


def _no_folder(name: str, folder: Path) -> Refused:
    """A name of the hub is a relative path, too: which of them was meant, only who wrote it knows."""
    if folder.exists():
        return _bad(name, f"{folder} is a file; its path is the folder that holds config.json and the weights")
    asked = parse_name(re.sub(r"^(https?:)/", r"\1//", str(folder)))
    if asked is None:
        return _bad(name, f"no such folder: {folder}; put the model there or correct its path")
    pull = f'fetch it with `mlxrack-agent models pull {asked.repo}`, then path = "{STORED}{local_name(asked.repo)}"'
    return _bad(name, f"no such folder: {folder}; correct its path, or if it is a model of the Hugging Face hub {pull}")


def _bad(name: str, why: str) -> Refused:
    return Refused(f"model {name}: {why}", code="bad_model")


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return []


def _origin(folder: Path) -> Origin | None:
    with contextlib.suppress(Refused):
        return parse_origin(_folder(folder.name, folder).find(ORIGIN_NAME))
    return None


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
