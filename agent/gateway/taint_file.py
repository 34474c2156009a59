"""The marks of SENSITIVE messages on disk: a file of fixed records that is only appended to, and the keys of the marks.
Every call blocks; agent/gateway/taints.py makes them in threads, one at a time."""

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from agent.policy.taint import KEY_BYTES, RECORD_BYTES, Marks, read_records, record
from shared.durable import created, sync, sync_folder, write_whole
from shared.errors import Refused

FOLDER = "taints"
_HEAD = b"mlxrack taints 1".ljust(RECORD_BYTES)


class Found(NamedTuple):
    """What a node knew when it was ended. ``damaged``: records that are invalid and not merely cut off."""

    keys: tuple[bytes, ...]
    marks: Marks
    damaged: int


class TaintFile:
    """The folder of one node's marks."""

    def __init__(self, folder: Path) -> None:
        self._marks, self._keys = folder / "marks", folder / "keys"
        self._descriptor = -1
        self._end = 0

    def read(self, first_key: bytes) -> Found:
        """Open and read, making what is missing; ``first_key`` is the key to begin with, b"" for a random one. What a
        crash has cut off is removed. Raises Refused or OSError for what cannot be read."""
        self._marks.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        keys = self._read_keys()
        self._descriptor = created(self._marks, os.O_RDWR)
        try:
            return self._read(keys, first_key)
        except BaseException:
            self.close()  # nothing is written over what another version may read
            raise

    def _read(self, keys: tuple[bytes, ...], first_key: bytes) -> Found:
        raw = self._read_all()
        if not raw.startswith(_HEAD):
            if raw and raw[: len(_HEAD)] != _HEAD[: len(raw)]:
                raise Refused(f"{self._marks} is not a file of marks that this version reads")
            self._start()
            raw = _HEAD
        reading = read_records(raw[len(_HEAD) :])
        self._end = len(_HEAD) + reading.good_bytes
        os.ftruncate(self._descriptor, self._end)
        if not keys:
            if len(reading.marks):
                raise Refused(f"{self._keys} is missing; without the keys the marks recognise nothing")
            keys = (first_key or secrets.token_bytes(KEY_BYTES),)
            self.keep_keys(keys)
        return Found(keys, reading.marks, reading.damaged)

    def append(self, marks: Sequence[bytes]) -> None:
        """Add marks; they are on the drive when this returns. After a failure the file is as before. Raises OSError."""
        if self._descriptor < 0:
            raise OSError(0, "not open")
        raw = memoryview(b"".join(map(record, marks)))
        try:
            done = 0
            while done < len(raw):
                done += os.pwrite(self._descriptor, raw[done:], self._end + done)
            sync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(raw)

    def keep_keys(self, keys: Sequence[bytes]) -> None:
        """Replace the keys. Raises OSError."""
        write_whole(self._keys, "".join(f"{key.hex()}\n" for key in keys).encode())
        sync_folder(self._keys.parent)

    def clear(self) -> None:
        """Forget all marks, also those of a file that could not be read; the keys stay. Raises OSError."""
        self.close()
        self._marks.unlink(missing_ok=True)
        self._descriptor = created(self._marks, os.O_RDWR)
        self._start()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _start(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, _HEAD, 0)
        sync(self._descriptor)
        sync_folder(self._marks.parent)
        self._end = len(_HEAD)

    def _read_all(self) -> bytes:
        with open(self._descriptor, "rb", closefd=False) as file:
            return file.read()

    def _read_keys(self) -> tuple[bytes, ...]:
        try:
            lines = self._keys.read_text(encoding="ascii").split()
        except FileNotFoundError:
            return ()
        except UnicodeDecodeError:
            lines = ["unreadable"]
        try:
            keys = tuple(bytes.fromhex(line) for line in lines)
        except ValueError:
            keys = ()
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise Refused(
                f"{self._keys} does not hold keys; restore it from a copy, or remove both files in its folder"
            )
        return keys
