"""What a loader's preparing thread works on, told through a few bytes of an unnamed file that daemon and loader share.

A frame would not do: a request that ends the process, or holds the interpreter, ends or holds every frame with it.
"""

import contextlib
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
    """One end of the file. Without room for it (``fd`` is -1) nothing is told: the watchdog has the frames."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd, self._now = _made() if fd is None else fd, Prepares()

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
        """The other end's last word; that nothing is in preparation where it could not be told."""
        raw = b"" if self.fd < 0 else os.pread(self.fd, _LAYOUT.size, 0)
        return Prepares(*_LAYOUT.unpack(raw)) if len(raw) == _LAYOUT.size else Prepares()

    def close(self) -> None:
        """Close this end."""
        if self.fd >= 0:
            os.close(self.fd)

    def _write(self, now: Prepares) -> None:
        self._now = now
        if self.fd < 0:
            return
        try:
            os.pwrite(self.fd, _LAYOUT.pack(*now), 0)
        except OSError:  # a full disk
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, 0)  # no word is better than the last one for ever


def _made() -> int:
    """The descriptor of a new file with its bytes in it, -1 where there is no room."""
    try:
        with tempfile.TemporaryFile(buffering=0) as made:
            os.pwrite(made.fileno(), _LAYOUT.pack(0, 0), 0)
            return os.dup(made.fileno())
    except OSError:
        return -1
