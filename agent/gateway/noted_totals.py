"""Totals that survive SIGKILL, at the cost of a store into memory: a mapped file of rows. A loss of power may take the
last seconds of it; agent/gateway/allowances.py saves everything twice a second."""

import hashlib
import mmap
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from shared.durable import created
from shared.logs import get_logger

ROWS = 4096
_ROW = struct.Struct("<16sqq")
"""The digest of a label, its total, and nothing."""
_TOTAL = struct.Struct("<q")
_AT = 16
_MOST = (1 << 63) - 1
_EMPTY = bytes(16)

log = get_logger("agent.gateway")


class NotedTotals:
    """The rows of one agent, in a file that is made if it is missing. Raises OSError."""

    def __init__(self, path: Path) -> None:
        descriptor = created(path, os.O_RDWR)
        try:
            os.ftruncate(descriptor, ROWS * _ROW.size)
            self._map = mmap.mmap(descriptor, ROWS * _ROW.size)
        finally:
            os.close(descriptor)
        rows = ((number * _ROW.size, _ROW.unpack_from(self._map, number * _ROW.size)) for number in range(ROWS))
        self._found: dict[bytes, tuple[int, int]] = {
            digest: (at, total) for at, (digest, total, _) in rows if digest != _EMPTY
        }
        self._free = sorted(set(range(0, ROWS * _ROW.size, _ROW.size)) - {at for at, _ in self._found.values()})[::-1]
        self._open: set[bytes] = set()
        self._full = False

    def noted(self, label: str) -> int:
        """The total that an earlier run noted; 0 without one."""
        return self._found.get(_digest(label), (0, 0))[1]

    def row(self, label: str) -> Callable[[int], None]:
        """Opens a label's row: call the result with each new total."""
        digest = _digest(label)
        self._open.add(digest)
        if digest not in self._found and not self._free:
            self._drop_oldest()
        if digest not in self._found:
            if not self._free:
                return self._unnoted
            at = self._free.pop()
            _ROW.pack_into(self._map, at, digest, 0, 0)
            self._found[digest] = at, 0
        return partial(_put, self._map, self._found[digest][0] + _AT)

    def _drop_oldest(self) -> None:
        """Rows of earlier runs that nothing of this one has asked for: of keys and periods that are gone."""
        for digest in [digest for digest in self._found if digest not in self._open]:
            at, _ = self._found.pop(digest)
            _ROW.pack_into(self._map, at, _EMPTY, 0, 0)
            self._free.append(at)

    def _unnoted(self, _: int) -> None:
        if not self._full:
            self._full = True
            log.warning("limits_not_noted", reason=f"there are more than {ROWS} limits; SIGKILL may lose half a second")


def _digest(label: str) -> bytes:
    return hashlib.blake2b(label.encode(), digest_size=16).digest()


def _put(rows: mmap.mmap, at: int, total: int) -> None:
    _TOTAL.pack_into(rows, at, min(total, _MOST))
