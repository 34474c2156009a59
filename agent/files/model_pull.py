"""Pulls a model into the store from a folder, the Hugging Face hub or the bucket, and pushes one to the bucket.

Blocking; use a thread. Files are fetched under ``.partial`` and installed in one atomic step when every file is
there, its SHA-256 matches and all of it is synced to disk. An interrupted pull resumes where it stopped.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import msgspec

from agent.files.hub_listing import ORIGIN_NAME, Asked, matches, parse_origin
from agent.files.model_folder import ModelFolder
from agent.files.modelstore import PARTIAL, Installed, ModelStore
from shared import catalog
from shared.catalog import Manifest, ModelFile
from shared.durable import PUBLIC, created, sync, sync_folder, write_whole
from shared.errors import NotFound, RackError, Refused, Retryable
from shared.keys import (
    MODEL_PREFIX,
    MOST_COMPANION_BYTES,
    MOST_MODEL_MANIFEST_BYTES,
    model_file_key,
    model_manifest_key,
    model_prefix,
    parse_model_manifest_key,
)
from shared.store import ObjectStore, list_all

PIECE_BYTES = 8 << 20
RESERVE_BYTES = 512 << 20
"""Disk space that stays free for the spool and the logs."""
MOST_REF_BYTES = 256
COMPANIONS = (catalog.PROBES_NAME, ORIGIN_NAME)
"""Files that travel with a version and are not part of it: recorded answers, and where it came from."""

Progress = Callable[[int, int], None]
"""Called with the bytes fetched and the total."""
Write = Callable[[bytes], object]


class Source(Protocol):
    """Where a model is pulled from."""

    @property
    def manifest(self) -> Manifest:
        """Its files."""

    def copy(self, file: ModelFile, start: int, write: Write) -> None:
        """Write one file's bytes from ``start`` on, piece by piece. Raises Refused or Retryable."""

    def companion(self, name: str) -> bytes | None:
        """One of COMPANIONS; None where the model has none."""


class FolderSource:
    """A model folder, or a Hugging Face cache folder of a model."""

    def __init__(self, store: ModelStore, folder: Path) -> None:
        self._folder = ModelFolder(snapshot_of(folder), f"model {folder.name}")
        self.manifest = store.manifest(folder.name, self._folder.path)
        for file in self.manifest.files:
            self._open(file.name).close()

    def copy(self, file: ModelFile, start: int, write: Write) -> None:
        with self._open(file.name) as opened:
            opened.seek(start)
            # a file that grows has one byte too many, which its reader notices
            left = file.size - start + 1
            while left > 0 and (piece := opened.read(min(PIECE_BYTES, left))):
                write(piece)
                left -= len(piece)

    def companion(self, name: str) -> bytes | None:
        return self._folder.find(name)

    def put(self, file: ModelFile, bucket: ObjectStore, key: str) -> None:
        """Upload one file. Raises Refused when it is no longer what the manifest says; then nothing is left of it."""
        with self._open(file.name) as opened:
            hashed = _HashedFile(opened, file.size)
            bucket.put_file(key, cast(BinaryIO, hashed))
            if hashed.hexdigest() == file.sha256 and not opened.read(1):
                return
        with contextlib.suppress(RackError):
            bucket.delete(key)
        raise Refused(f"push: {file.name} was changed meanwhile; push again when that is done", code="bad_model")

    def _open(self, name: str) -> BinaryIO:
        try:
            return self._folder.open(name, to_copy=True)
        except OSError as error:
            raise Refused(f"pull: {name} cannot be read ({error.strerror})", code="bad_model") from None


class _HashedFile:
    """A file's first ``size`` bytes, hashed as they are read, once and in order."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left, self._digest = file, size, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        """At most ``count`` bytes."""
        piece = self._file.read(self._left if count < 0 else min(count, self._left))
        self._left -= len(piece)
        self._digest.update(piece)
        return piece

    def hexdigest(self) -> str:
        """Of what was read."""
        return self._digest.hexdigest()


class BucketSource:
    """A version under ``models/`` in the bucket; without ``version``, the only one there."""

    def __init__(self, bucket: ObjectStore, name: str, version: str = "") -> None:
        self._bucket = bucket
        self._version = version or _only_version(bucket, name)
        key = model_manifest_key(name, self._version)
        try:
            self.manifest = msgspec.json.decode(bucket.get(key, MOST_MODEL_MANIFEST_BYTES).body, type=Manifest)
        except NotFound:
            why = f"the bucket does not hold it; upload it with `mlxrack-agent models push FOLDER {name}`"
            raise Refused(f"pull {name}@{self._version}: {why}", code="not_found") from None
        except (msgspec.DecodeError, RecursionError):
            raise Refused(f"pull {name}: {key} is not a manifest", code="bad_model") from None
        if catalog.version_of(self.manifest) != self._version:
            raise Refused(f"pull {name}: {key} does not describe version {self._version}", code="bad_model")

    def copy(self, file: ModelFile, start: int, write: Write) -> None:
        key, at = model_file_key(self._version, file.name), start
        while at < file.size and (piece := self._bucket.get_part(key, at, min(PIECE_BYTES, file.size - at))):
            write(piece)
            at += len(piece)

    def companion(self, name: str) -> bytes | None:
        return _companion(self._bucket, self._version, name)


def snapshot_of(folder: Path) -> Path:
    """The snapshot in a Hugging Face cache folder; any other folder itself. Raises Refused when it is ambiguous."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    found = [] if snapshots.is_symlink() else [p for p in snapshots.iterdir() if p.is_dir() and not p.is_symlink()]
    main = (ModelFolder(folder, f"model {folder.name}").find("refs/main", MOST_REF_BYTES) or b"").strip()
    if len(named := [p for p in found if os.fsencode(p.name) == main]) == 1:
        return named[0]
    if len(found) == 1:
        return found[0]
    raise Refused(f"{folder} holds {len(found)} snapshots and no refs/main; specify one of them", code="bad_model")


def pull(
    source: Source,
    store: ModelStore,
    name: str,
    *,
    disk_bytes: int = 0,
    progress: Progress = lambda done, total: None,
    begins: Callable[[ModelFile], None] = lambda file: None,
    free_bytes: Callable[[Path], int] = lambda folder: _free_bytes(folder),
) -> Installed:
    """Fetch, verify, install. ``disk_bytes`` limits the whole store; 0 means that only the disk limits it. ``begins``
    is called before each file. Raises Refused naming what is missing or wrong, Retryable when the source does not
    answer; what was fetched is kept for the next attempt."""
    manifest = source.manifest
    catalog.check_manifest(manifest, f"pull {name}")
    version = catalog.version_of(manifest)
    place = store.place(name, version)
    total = sum(file.size for file in manifest.files)
    origin = parse_origin(source.companion(ORIGIN_NAME))
    installed = Installed(name=name, version=version, size=total, origin=origin)
    if _is_whole(store, name, place):
        return installed
    with _of_the_disk(f"pull {name}"), _alone(store.folder / PARTIAL / f"{name}@{version}") as partial:
        if place.is_dir():
            if _is_whole(store, name, place):
                return installed  # another pull has installed it meanwhile
            # corrupt: its intact files need not be fetched again
            shutil.rmtree(partial)
            os.replace(place, partial)
        partial.mkdir(exist_ok=True)
        _unlink_links(partial)
        there = sum(_size(partial / file.name) for file in manifest.files)
        _check_room(store, name, total, there, disk_bytes, free_bytes(partial))
        done = 0
        # the small ones first: an interrupted pull has them, and what is wrong with them is known before the weights
        for file in sorted(manifest.files, key=lambda file: file.size):
            begins(file)
            done = _fetch(source, file, partial / file.name, done, total, progress)
        _install(source, manifest, partial, place)
        store.remember(place, manifest)
    return installed


def push(
    folder: Path,
    store: ModelStore,
    bucket: ObjectStore,
    name: str,
    *,
    again: bool = False,
    progress: Progress = lambda done, total: None,
) -> Installed:
    """Upload a model folder to the bucket, its manifest last. Files that are there with the right size are skipped
    unless ``again``. Raises Refused or Retryable."""
    source = FolderSource(store, folder)
    catalog.check_manifest(source.manifest, f"push {name}")
    version, done = catalog.version_of(source.manifest), 0
    total = sum(file.size for file in source.manifest.files)
    for file in source.manifest.files:
        key = model_file_key(version, file.name)
        if again or not _is_there(bucket, key, file.size):
            source.put(file, bucket, key)
        done += file.size
        progress(done, total)
    for companion in COMPANIONS:
        if (body := source.companion(companion)) is not None:
            bucket.put(model_file_key(version, companion), body)
    bucket.put(model_manifest_key(name, version), msgspec.json.encode(source.manifest))
    origin = parse_origin(source.companion(ORIGIN_NAME))
    return Installed(name=name, version=version, size=total, origin=origin)


def in_bucket(bucket: ObjectStore) -> list[Installed]:
    """Every model in the bucket. Raises RackError when the bucket cannot be listed."""
    found = []
    for listed in list_all(bucket, MODEL_PREFIX):
        with contextlib.suppress(Refused):  # a foreign key, or not a manifest
            name, version = parse_model_manifest_key(listed.key)
            source = BucketSource(bucket, name, version)
            origin = parse_origin(source.companion(ORIGIN_NAME))
            size = sum(file.size for file in source.manifest.files)
            found.append(Installed(name=name, version=version, size=size, origin=origin))
    return found


def find_in_bucket(bucket: ObjectStore, name: str, asked: Asked) -> BucketSource | None:
    """The version in the bucket that came from a model of the hub; None where there is none. Raises Refused for
    several."""
    found = [v for v in versions(bucket, name) if matches(parse_origin(_companion(bucket, v, ORIGIN_NAME)), asked)]
    if len(found) > 1:
        what = f"the bucket holds {len(found)} revisions of it as {name} ({', '.join(found)})"
        raise Refused(f"pull {asked.repo}: {what}; specify one: bucket:{name}@VERSION, or --revision COMMIT")
    return BucketSource(bucket, name, found[0]) if found else None


def versions(bucket: ObjectStore, name: str) -> list[str]:
    """The versions of a model in the bucket."""
    return [parse_model_manifest_key(listed.key)[1] for listed in list_all(bucket, model_prefix(name))]


def _only_version(bucket: ObjectStore, name: str) -> str:
    found = versions(bucket, name)
    if len(found) == 1:
        return found[0]
    if found:
        what = f"the bucket holds {len(found)} versions ({', '.join(found)}); specify one: bucket:{name}@VERSION"
    else:
        there = _names(bucket)
        held = f"it holds {', '.join(there)}" if there else "it holds no model at all"
        what = f"the bucket holds none of that name, {held}; upload it with `mlxrack-agent models push FOLDER {name}`"
    raise Refused(f"pull {name}: {what}", code="not_found")


def _names(bucket: ObjectStore) -> list[str]:
    """The names of all models in the bucket."""
    found = set()
    for listed in list_all(bucket, MODEL_PREFIX):
        with contextlib.suppress(Refused):  # a foreign key, or a file of a model
            found.add(parse_model_manifest_key(listed.key)[0])
    return sorted(found)


def _companion(bucket: ObjectStore, version: str, name: str) -> bytes | None:
    with contextlib.suppress(NotFound):
        return bucket.get(model_file_key(version, name), MOST_COMPANION_BYTES).body
    return None


def _is_there(bucket: ObjectStore, key: str, size: int) -> bool:
    with contextlib.suppress(NotFound):
        return len(bucket.get_part(key, max(0, size - 1), 2)) == min(1, size)
    return False


def _is_whole(store: ModelStore, name: str, place: Path) -> bool:
    """Whether a version is installed and intact."""
    with contextlib.suppress(Refused):
        return place.is_dir() and bool(store.manifest(name, place))
    return False


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return sys.maxsize  # some file systems do not tell; a write that finds the disk full does


def _check_room(store: ModelStore, name: str, total: int, there: int, disk_bytes: int, free: int) -> None:
    held = sum(one.size for one in (*store.installed(), *store.partials())) - there
    if disk_bytes and held + total > disk_bytes:
        raise Refused(
            f"pull {name}: {total / 1e6:.0f} MB do not fit beside {held / 1e6:.0f} MB of other models in "
            f"model_store.disk_bytes ({disk_bytes / 1e6:.0f} MB); remove one with `mlxrack-agent models remove`",
            code="disk_full",
        )
    if total - there > free - RESERVE_BYTES:
        missing = total - there + RESERVE_BYTES - free
        raise Refused(
            f"pull {name}: {(total - there) / 1e6:.0f} MB more are needed and {free / 1e6:.0f} MB are free "
            f"({RESERVE_BYTES / 1e6:.0f} MB of them stay reserved): {missing / 1e6:.0f} MB are missing; free some and "
            "pull again",
            code="disk_full",
        )


def _fetch(source: Source, file: ModelFile, path: Path, done: int, total: int, progress: Progress) -> int:
    """Fetch one file, from where an earlier attempt stopped; returns the bytes done so far. Data that does not match is
    deleted and fetched once more."""
    try:
        return _fetched(source, file, path, done, total, progress)
    except Refused as error:
        if error.code != "bad_hash":
            raise
    return _fetched(source, file, path, done, total, progress)


def _fetched(source: Source, file: ModelFile, path: Path, done: int, total: int, progress: Progress) -> int:
    _make_folder(path.parent)
    digest, at = hashlib.sha256(), 0

    def count(piece: bytes) -> None:
        nonlocal at
        at += len(piece)
        digest.update(piece)
        progress(done + min(at, file.size), total)

    def write(piece: bytes) -> None:
        opened.write(piece)
        count(piece)
        if at > file.size:
            raise _mismatch(file, path, f"{file.name} has more than {file.size} bytes")

    with open(created(path, os.O_RDWR | os.O_APPEND, mode=PUBLIC), "ab+") as opened:
        if (there := opened.tell()) > file.size:
            there = opened.truncate(0)
        opened.seek(0)
        while piece := opened.read(min(PIECE_BYTES, there - at)):
            count(piece)
        if at < file.size:
            source.copy(file, at, write)
        if at < file.size:
            raise Refused(f"pull: {file.name} ends after {at} of {file.size} bytes at its source", code="bad_model")
        opened.flush()
        sync(opened.fileno())
    if digest.hexdigest() != file.sha256:
        raise _mismatch(file, path, f"sha256 of {file.name} is {digest.hexdigest()[:12]}..")
    return done + file.size


def _mismatch(file: ModelFile, path: Path, seen: str) -> Refused:
    path.unlink(missing_ok=True)
    return Refused(
        f"pull: {seen}, its manifest says {file.sha256[:12]}..; the file was deleted, nothing was installed; pull "
        "again, and repair the source if that fails too",
        code="bad_hash",
    )


def _install(source: Source, manifest: Manifest, partial: Path, place: Path) -> None:
    wanted = {file.name for file in manifest.files}
    for stray in [p for p in partial.rglob("*") if p.is_file() and p.relative_to(partial).as_posix() not in wanted]:
        stray.unlink()
    for name in COMPANIONS:
        if (body := source.companion(name)) is not None:
            write_whole(partial / name, body, mode=PUBLIC)
    write_whole(partial / catalog.MANIFEST_NAME, msgspec.json.encode(manifest), mode=PUBLIC)
    _make_folder(place.parent)
    os.replace(partial, place)
    for folder in (place, place.parent, partial.parent):
        sync_folder(folder)


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[Path]:
    """The folder of a partial download, locked by one pull at a time."""
    _make_folder(partial)
    lock: Any
    with open(created(Path(f"{partial}.lock"), os.O_WRONLY), "a", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Retryable(f"pull: {partial.name} is already being pulled", code="conflict") from None
        yield partial


@contextlib.contextmanager
def _of_the_disk(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = "the disk is full; what was fetched is kept, nothing was installed; free some and pull again"
            raise Refused(f"{what}: {why}", code="disk_full") from None
        raise Refused(f"{what}: {error.filename or 'the disk'}: {error.strerror}", code="bad_model") from None


def _make_folder(folder: Path) -> None:
    """A folder of the store; models are no secret, and the operator who pulls one need not be the one who serves it."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):
            one.mkdir()
            with contextlib.suppress(OSError):  # some file systems have no modes
                one.chmod(0o755)


def _unlink_links(partial: Path) -> None:
    """Nothing is written to where a link leads."""
    for stray in [p for p in partial.rglob("*") if p.is_symlink()]:
        stray.unlink()


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
