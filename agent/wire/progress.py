"""What a loader's preparing thread works on, told through a few bytes of an unnamed file that daemon and loader share.

A frame would not do: a request that ends the process, or holds the interpreter, ends or holds every frame with it.
"""

import os
import struct
import tempfile
from typing import NamedTuple

_LAYOUT = struct.Struct("<QQ")


class Prepares(NamedTuple):
    """The request that is in preparation (0: none), and a count that rises whenever that work moves on."""

    request_id: int = 0
    moves: int = 0


class Progress:
    """One end of the file. Raises OSError where there is no room for it."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            with tempfile.TemporaryFile(buffering=0) as made:
                fd = os.dup(made.fileno())
            os.pwrite(fd, _LAYOUT.pack(0, 0), 0)
        self.fd, self._now = fd, Prepares()

    def begin(self, request_id: int) -> None:
        """The preparation of a request begins."""
        self._write(Prepares(request_id, self._now.moves + 1))

    def advance(self) -> None:
        """It moves on."""
        self._write(Prepares(self._now.request_id, self._now.moves + 1))

    def end(self) -> None:
        """Nothing is in preparation."""
        self._write(Prepares(0, self._now.moves + 1))

    def read(self) -> Prepares:
        """The other end's last word."""
        return Prepares(*_LAYOUT.unpack(os.pread(self.fd, _LAYOUT.size, 0)))

    def close(self) -> None:
        """Close this end."""
        os.close(self.fd)

    def _write(self, now: Prepares) -> None:
        self._now = now
        os.pwrite(self.fd, _LAYOUT.pack(*now), 0)
