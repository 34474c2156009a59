"""A file that a person named, wherever it is: a regular one, of a bounded size, read once."""

import os
import stat
from pathlib import Path

MOST_PEM_BYTES = 1 << 20
"""Of a certificate with its chain, a key, or a CA."""


def read_file(path: Path, most_bytes: int, *, unless_mode: int = 0) -> bytes:
    """The content of a regular file. Raises OSError, also for a FIFO, a device, or too many bytes; and PermissionError
    without an errno for a file whose mode has one of the bits ``unless_mode``, of the very file that is read."""
    # without O_NONBLOCK, opening a FIFO waits for a writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) or mode & unless_mode:
        os.close(descriptor)
        raise PermissionError(None, "readable by others") if stat.S_ISREG(mode) else OSError(None, "not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if len(body := file.read(most_bytes + 1)) > most_bytes:
            raise OSError(None, f"more than {most_bytes:,} bytes")
        return body
