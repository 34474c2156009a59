"""Files that survive a loss of power: whole or not at all, synced to the drive, with a durable name."""

import contextlib
import fcntl
import os
import sys
from pathlib import Path


def write_whole(path: Path, body: bytes, *, synced: bool = True) -> None:
    """Write atomically; the name is durable only once the folder is synced, too. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(body)
            file.flush()
            if synced:
                sync(file.fileno())
        rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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
