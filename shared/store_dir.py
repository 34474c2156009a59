"""An object store in a directory: for a single machine, for tests, for inspection with `ls`.

Writes go to a temporary file, are synced and then renamed into place, so a reader never sees a partial object.
Conditional writes are atomic between processes of one machine (a lock file and link(2)).
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from shared.errors import NotFound, PreconditionFailed, Refused, Retryable
from shared.store import Listed, Stored, too_large

_LOCK = ".mlxrack-lock"
_TEMPORARY = ".mlxrack-tmp-"


class DirectoryStore:
    """ObjectStore over ``root``, which is created if missing."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with _as_ours("open", str(root)):
            root.mkdir(parents=True, exist_ok=True)
            self._real_root = root.resolve()

    @property
    def clock_skew_ms(self) -> int | None:
        return None

    def forget_clock(self) -> None:
        """No-op: there is no store clock."""

    def put(self, key: str, body: bytes) -> str:
        path = self._path(key)
        with _as_ours("put", key), self._locked(), self._temporary(body) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        return _etag(body)

    def put_if_absent(self, key: str, body: bytes) -> str:
        path = self._path(key)
        with _as_ours("put", key), self._temporary(body) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, path)
            except FileExistsError:
                with self._locked():
                    if not path.is_file() or path.stat().st_size:
                        raise PreconditionFailed(f"put {key}: already exists") from None
                    os.replace(temporary, path)
        return _etag(body)

    def put_if_match(self, key: str, body: bytes, etag: str) -> str:
        path = self._path(key)
        with _as_ours("put", key), self._locked(), self._temporary(body) as temporary:
            try:
                seen = self._listed(key).etag
            except FileNotFoundError:
                seen = "nothing"
            if seen != etag:
                raise PreconditionFailed(f"put {key}: etag mismatch (found {seen}, expected {etag})")
            os.replace(temporary, path)
        return _etag(body)

    def get(self, key: str, most_bytes: int) -> Stored:
        with _as_ours("get", key), self._opened(key) as file:
            body = file.read(most_bytes + 1)
        if len(body) > most_bytes:
            raise too_large(f"get {key}", most_bytes)
        if not body:
            raise NotFound(f"get {key}: empty object, left by an interrupted write")
        return Stored(body, _etag(body))

    def get_part(self, key: str, start: int, length: int) -> bytes:
        with _as_ours("get", key), self._opened(key) as file:
            file.seek(start)
            return file.read(length)

    def put_file(self, key: str, file: BinaryIO) -> None:
        target = self._path(key)
        with _as_ours("put", key), tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=self._root) as folder:
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = Path(folder, "file")
            with copy.open("wb") as made:
                shutil.copyfileobj(file, made)
                made.flush()
                os.fsync(made.fileno())
            os.replace(copy, target)

    def list_after(self, prefix: str, after: str = "", limit: int = 1000) -> list[Listed]:
        start = self._root.joinpath(*prefix.split("/")[:-1])
        with _as_ours("list", prefix):
            keys = sorted(key for key in self._keys_under(start) if key.startswith(prefix) and key > after)
            listed: list[Listed] = []
            for key in keys:
                if len(listed) == limit:
                    break
                # deleted meanwhile, or a link or a pipe that is no object
                with contextlib.suppress(FileNotFoundError, Refused):
                    if (one := self._listed(key)).size:
                        listed.append(one)
        return listed

    def delete(self, key: str) -> None:
        with _as_ours("delete", key), contextlib.suppress(NotFound, FileNotFoundError):
            self._path(key).unlink()

    def _listed(self, key: str) -> Listed:
        with self._opened(key) as file:
            etag = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            return Listed(key, file.tell(), etag, os.fstat(file.fileno()).st_mtime_ns // 1_000_000)

    def _opened(self, key: str) -> BufferedReader:
        """An object's file. A pipe would make the reader wait, so only a regular file is one."""
        path = self._path(key)
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise Refused(f"get {key}: not a regular file", code="bad_key")
        return path.open("rb")

    def _keys_under(self, start: Path) -> Iterator[str]:
        for folder, folders, names in os.walk(start):
            folders[:] = [one for one in folders if not one.startswith(_TEMPORARY)]
            for name in names:
                if not name.startswith((_LOCK, _TEMPORARY)):
                    yield Path(folder, name).relative_to(self._root).as_posix()

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        odd = any(p in ("", ".", "..") or p.startswith(".mlxrack-") for p in parts)
        if not key or len(key) > 1024 or odd or "\0" in key:
            raise Refused(f"key {key!r}: invalid object key", code="bad_key")
        path = self._root.joinpath(*parts)
        if not path.resolve().is_relative_to(self._real_root):
            raise Refused(f"key {key!r}: a link leads out of the store's folder", code="bad_key")
        return path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._root / _LOCK, "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _temporary(self, body: bytes) -> Iterator[str]:
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._root)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            yield name
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


@contextlib.contextmanager
def _as_ours(verb: str, key: str) -> Iterator[None]:
    """Translate OSError into the store's errors."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"{verb} {key}: no such object") from None
    except (IsADirectoryError, NotADirectoryError, FileExistsError):
        raise Refused(f"{verb} {key}: another key is a folder of this one", code="bad_key") from None
    except OSError as error:
        raise Retryable(f"{verb} {key}: {error.strerror or error}") from None


def _etag(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()
