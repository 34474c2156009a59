"""Model folders on this node: what is in them, whether they are whole, what they will need. Blocking; use a thread."""

import contextlib
import hashlib
import threading
from pathlib import Path

import msgspec

from agent.config import Model
from shared import catalog
from shared.errors import Refused
from shared.ids import Version

_SKIPPED = {catalog.MANIFEST_NAME, ".gitattributes", "README.md"}


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model as this node would load it."""

    model: Model
    path: str
    version: Version
    need_bytes: int


class _Hashed(msgspec.Struct, kw_only=True):
    size: int
    mtime_ns: int
    sha256: str


class ModelStore:
    """Reads model folders; remembers file hashes in ``memo``, because hashing 20 GB takes a while."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        self._hashes: dict[str, _Hashed] = self._read_memo()
        self._hashing = threading.Lock()
        self._changed = False

    def describe(self, model: Model) -> ModelSpec:
        """Version and planned bytes of a configured model. Raises Refused naming what is wrong and what mends it."""
        if model.engine == "fake":
            version = Version(hashlib.sha256(f"fake:{model.path or model.name}".encode()).hexdigest()[:16])
            return ModelSpec(model=model, path=model.path, version=version, need_bytes=model.need_bytes or 1 << 20)
        folder = Path(model.path).expanduser()
        manifest = self._manifest(model.name, folder)
        weights = sum(f.size for f in manifest.files if f.name.endswith(".safetensors"))
        shape = catalog.parse_shape(self._config(model.name, folder))
        planned = catalog.need_bytes(weights, shape, rows=model.rows, context_tok=model.plan_context_tok)
        need = model.need_bytes or planned + model.cache_bytes
        return ModelSpec(model=model, path=str(folder), version=catalog.version_of(manifest), need_bytes=need)

    def _config(self, name: str, folder: Path) -> bytes:
        try:
            return (folder / "config.json").read_bytes()
        except OSError:
            raise Refused(
                f"model {name}: {folder} has no config.json; it is no mlx-lm model folder", code="bad_model"
            ) from None

    def _manifest(self, name: str, folder: Path) -> catalog.Manifest:
        if not folder.is_dir():
            raise Refused(
                f"model {name}: there is no folder {folder}; put the model there or mend its path", code="bad_model"
            )
        with self._hashing:
            return self._read_manifest(name, folder)

    def _read_manifest(self, name: str, folder: Path) -> catalog.Manifest:
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _SKIPPED)
        if not any(p.suffix == ".safetensors" for p in paths):
            raise Refused(f"model {name}: {folder} holds no .safetensors file", code="bad_model")
        try:
            files = tuple(self._file(path, folder) for path in paths)
        except OSError as error:
            raise Refused(f"model {name}: cannot be read ({error.strerror})", code="bad_model") from None
        self._write_memo()
        made = catalog.Manifest(files=files)
        self._compare(name, folder, made)
        return made

    def _file(self, path: Path, folder: Path) -> catalog.ModelFile:
        stat = path.stat()
        known = self._hashes.get(str(path))
        if known is None or (known.size, known.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._changed = True
            known = self._hashes[str(path)] = _Hashed(size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=digest)
        return catalog.ModelFile(name=path.relative_to(folder).as_posix(), size=known.size, sha256=known.sha256)

    @staticmethod
    def _compare(name: str, folder: Path, made: catalog.Manifest) -> None:
        """Against the manifest that came with the model, where there is one."""
        try:
            came = msgspec.json.decode((folder / catalog.MANIFEST_NAME).read_bytes(), type=catalog.Manifest)
        except FileNotFoundError:
            return
        except msgspec.DecodeError:
            raise Refused(f"model {name}: its {catalog.MANIFEST_NAME} cannot be read", code="bad_model") from None
        have = {f.name: f for f in made.files}
        for wanted in came.files:
            got = have.get(wanted.name)
            if got is None:
                raise Refused(f"model {name}: file {wanted.name} is missing; fetch the model again", code="bad_model")
            if got != wanted:
                seen = f"{got.size} bytes, sha256 {got.sha256[:8]}.."
                raise Refused(
                    f"model {name}: file {wanted.name} is corrupt ({seen}; expected {wanted.size} bytes, "
                    f"{wanted.sha256[:8]}..); delete the folder and fetch the model again",
                    code="bad_model",
                )

    def _read_memo(self) -> dict[str, _Hashed]:
        try:
            return msgspec.json.decode(self._memo.read_bytes(), type=dict[str, _Hashed])
        except (OSError, msgspec.DecodeError):
            return {}  # it only saves work

    def _write_memo(self) -> None:
        """Remember what was hashed; a disk that refuses costs time at the next start and nothing else."""
        if not self._changed:
            return
        with contextlib.suppress(OSError):
            self._store_memo()
            self._changed = False

    def _store_memo(self) -> None:
        temporary = self._memo.with_suffix(".tmp")
        self._memo.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(self._hashes))
        temporary.replace(self._memo)
