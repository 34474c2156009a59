"""Files that survive a loss of power: whole or not at all, synced to the drive, with a durable name."""

import contextlib
import fcntl
import os
import sys
from pathlib import Path

PRIVATE = 0o600
"""The mode of a file of our state, whatever the umask."""
PUBLIC = 0o644
"""The mode of a file of a model: anybody on the machine may serve it."""


def write_whole(path: Path, body: bytes, *, synced: bool = True, mode: int = PRIVATE) -> None:
    """Write atomically; the name is durable only once the folder is synced, too. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(created(temporary, mode=mode), "wb") as file:
            file.write(body)
            file.flush()
            if synced:
                sync(file.fileno())
        rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def created(path: Path, flags: int = os.O_WRONLY | os.O_TRUNC, *, mode: int = PRIVATE) -> int:
    """The descriptor of a file that is created if it is missing and has this mode in the end; never of what a link
    leads to. Raises OSError."""
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    # on a file that was there, or under a umask; some file systems have no modes
    with contextlib.suppress(OSError, NotImplementedError):
        os.fchmod(descriptor, mode)
    return descriptor


def rename(before: Path, path: Path) -> None:
    """Rename, replacing what has the name. Not by pathlib: it interns every part of every name, and Python's intern
    table would grow with each batch."""
    os.replace(before, path)


def sync_folder(folder: Path) -> None:
    """Make names in the folder durable. A failure is ignored: the files are in place already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


def sync(descriptor: int) -> None:
    """Flush to the drive itself; on macOS fsync alone stops at the drive's cache."""
    if sys.platform == "darwin":
        # some file systems do not support it
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
