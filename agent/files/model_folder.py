"""A model folder, read as untrusted data: regular files in it and nothing else.

A clone or an archive may carry links. A file is looked up, must lie in the folder (or in the `blobs/` of its own
Hugging Face cache folder), and is then opened from there step by step without following anything, so that a link
which is put into its place meanwhile is not followed either.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shared import catalog
from shared.errors import Refused

MOST_BYTES = 64 << 20
"""Of a file that is read into memory: a configuration, an index, a manifest, recorded answers."""
_CACHE = re.compile(r"models--.+")
_NOT_A_FILE = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EOPNOTSUPP)
_KINDS = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"))


class ModelFolder:
    """The folder of a model. Errors begin with ``what``."""

    def __init__(self, folder: Path, what: str) -> None:
        self.path = folder
        self._what, self._folder = what, Path(os.path.realpath(folder))
        cache = self._folder.parent.parent
        is_snapshot = self._folder.parent.name == "snapshots" and _CACHE.fullmatch(cache.name)
        self._roots = (self._folder, cache / "blobs") if is_snapshot else (self._folder,)

    def names(self) -> list[str]:
        """The model files in it, sorted. Raises Refused for a link to another folder, OSError for an unreadable one."""
        return sorted(self._names("", 1))

    def check(self) -> None:
        """Raises Refused unless each of its files may be read."""
        try:
            for name in self.names():
                self.open(name).close()
        except OSError as error:
            raise self._refused(f"its files cannot be read ({error.strerror})") from None

    def open(self, name: str, *, to_copy: bool = False) -> BinaryIO:
        """A file of it, open for reading. ``to_copy`` also refuses a private file that has another name elsewhere.
        Raises FileNotFoundError, OSError, and Refused for anything but a regular file in the folder."""
        target, root = self._located(name)
        try:
            descriptor = _opened_beneath(root, target)
        except FileNotFoundError:
            if os.path.lexists(self._folder / name):
                raise self._refused(f"file {name} is a link to {str(target)!r}, which does not exist") from None
            raise
        except OSError as error:
            if error.errno not in _NOT_A_FILE:
                raise
            raise self._refused(f"file {name} cannot be opened as a file of this folder ({error.strerror})") from None
        try:
            self._check_kind(name, os.fstat(descriptor), to_copy=to_copy)
        except Refused:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")

    def read(self, name: str, most_bytes: int = MOST_BYTES) -> bytes:
        """The content of a small file. Raises like ``open``."""
        with self.open(name) as file:
            return self._read(name, file, most_bytes)

    def find(self, name: str, most_bytes: int = MOST_BYTES) -> bytes | None:
        """The content of a small file; None where there is none or it cannot be read. Raises Refused."""
        with contextlib.suppress(OSError):
            return self.read(name, most_bytes)
        return None

    def _read(self, name: str, file: BinaryIO, most_bytes: int) -> bytes:
        if len(body := file.read(most_bytes + 1)) > most_bytes:
            raise self._refused(f"file {name} has more than {most_bytes:,} bytes")
        return body

    def _names(self, inside: str, depth: int) -> Iterator[str]:
        with os.scandir(self._folder / inside) as entries:
            found = [entry for entry in entries if catalog.is_part(entry.name)]
        for entry in found:
            name = f"{inside}{entry.name}"
            if entry.is_dir():
                if entry.is_symlink():
                    self._located(name)
                if depth < catalog.MOST_PARTS:
                    yield from self._names(f"{name}/", depth + 1)
            elif catalog.is_model_file(name):
                yield name

    def _located(self, name: str) -> tuple[Path, Path]:
        """Where a file really is, and in which of the folders that it may be in. Raises Refused elsewhere."""
        target = Path(os.path.realpath(self._folder / name))
        for root in self._roots:
            # in the folder itself nothing that is hidden, like the credentials of a clone in .git/config
            if target.is_relative_to(root) and all(catalog.is_part(part) for part in target.relative_to(root).parts):
                return target, root
        raise self._refused(
            f"{name} is a link to {str(target)!r}, which is not in {self._folder}; if it belongs to the model, copy "
            "the folder with what its links lead to (cp -RL)"
        )

    def _check_kind(self, name: str, seen: os.stat_result, *, to_copy: bool) -> None:
        if not stat.S_ISREG(seen.st_mode):
            kind = next((words for is_one, words in _KINDS if is_one(seen.st_mode)), "a device")
            raise self._refused(f"{name} is {kind}, not a file")
        # anybody may give a file another name on some systems, also one that only its owner can read
        if to_copy and seen.st_nlink > 1 and not seen.st_mode & stat.S_IROTH:
            why = f"{name} is private (mode {seen.st_mode & 0o777:o}) and has {seen.st_nlink} names (hard links)"
            raise self._refused(f"{why}; if it belongs to the model, copy it or make it readable (chmod 644)")

    def _refused(self, why: str) -> Refused:
        return Refused(f"{self._what}: {why}", code="bad_model")


def _opened_beneath(root: Path, target: Path) -> int:
    """The descriptor of a file below a folder; no step may be a link."""
    steps = target.relative_to(root).parts
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(root, flags | os.O_DIRECTORY)
    try:
        for step in steps[:-1]:
            inner = os.open(step, flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(steps[-1] if steps else ".", flags | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
