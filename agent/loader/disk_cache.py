"""KV states of prompts on disk, so that they survive a restart. Off unless configured.

Tokens are split into blocks. A block's file is named by a keyed hash of all tokens up to its end, of their namespace
and of the model, so a prompt finds its blocks by computing names, prefixes that a namespace shares are stored once, and
a name reveals nothing without the key. Contents are encrypted and authenticated with AES-GCM, which also serves as the
checksum: a file that was truncated, swapped or forged fails to decrypt and is quarantined. A separate thread writes;
when it falls behind, blocks are dropped rather than waited for.
"""

import contextlib
import hashlib
import hmac
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from agent.loader.generation import Advance, nothing
from agent.loader.prompt_cache import Tokens

BLOCK_TOK = 256
_NONCE_BYTES = 12
_SUFFIX = ".kv"
_BEHIND = 4
"""Length of the write queue; blocks beyond it are dropped."""

Array = tuple[str, tuple[int, ...], bytes]
"""Type, shape and raw bytes."""


class DiskCache:
    """Blocks in ``folder``, at most ``budget_bytes`` in total. ``secret`` is stored elsewhere; ``fingerprint`` names
    the model. Reads and writes may run in different threads."""

    def __init__(self, folder: Path, secret: bytes, fingerprint: str, budget_bytes: int) -> None:
        self._folder, self._budget = folder, budget_bytes
        self._names = hmac.digest(secret, b"mlxrack disk cache: names", "sha256")
        self._cipher = AESGCM(hmac.digest(secret, b"mlxrack disk cache: contents", "sha256"))
        self._first = hmac.digest(self._names, fingerprint.encode(), "sha256")
        self._lock = threading.Lock()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._read_s = 0.0
        self.quarantined = self.failures = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._find_files()
        self._queue: queue.Queue[tuple[str, list[Array]] | None] = queue.Queue(_BEHIND)
        self._writer = threading.Thread(target=self._write_all, daemon=True)
        self._writer.start()

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        with self._lock:
            return sum(self._files.values())

    def held(self, tokens: Tokens) -> int:
        """Length of the prefix whose states are on disk; the last token never counts."""
        names = self._chain(tokens[:-1])
        with self._lock:
            return next((n for n, name in enumerate(names) if name not in self._files), len(names)) * BLOCK_TOK

    def read(self, tokens: Tokens, begin: int, end: int, advance: Advance = nothing) -> list[list[Array]]:
        """Blocks ``begin`` to ``end`` (block numbers), up to the first that cannot be read or decrypted. ``advance`` is
        called before each."""
        found: list[list[Array]] = []
        for name in self._chain(tokens)[begin:end]:
            advance()
            began = time.monotonic()
            if (block := self._open(name)) is None:
                break
            took = time.monotonic() - began
            self._read_s = took if not self._read_s else 0.7 * self._read_s + 0.3 * took
            found.append(block)
        return found

    def seconds(self, blocks: int) -> float:
        """Expected time to read ``blocks`` blocks, as far as known."""
        return blocks * self._read_s

    def offer(self, tokens: Tokens, block_of: Callable[[int, int], list[Array]]) -> None:
        """Store the full blocks of ``tokens`` that are missing; ``block_of(begin, end)`` returns the tokens' state."""
        for number, name in enumerate(self._chain(tokens)):
            with self._lock:
                known = name in self._files
            if known:
                continue
            if self._queue.full():
                return  # a block is useless without those before it
            self._queue.put((name, block_of(number * BLOCK_TOK, (number + 1) * BLOCK_TOK)))

    def close(self, wait_s: float = 10.0) -> None:
        """Write the queued blocks, then stop the writer."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=wait_s)
        self._writer.join(wait_s)

    def _chain(self, tokens: Tokens) -> list[str]:
        """Names of the full blocks of ``tokens``. A block is sealed for its name, and so for its namespace."""
        names, state = [], self._first
        if tokens.namespace:
            state = hmac.digest(self._names, state + b"namespace\0" + tokens.namespace.encode(), hashlib.sha256)
        for begin in range(0, len(tokens) - BLOCK_TOK + 1, BLOCK_TOK):
            state = hmac.digest(self._names, state + tokens.ids[begin : begin + BLOCK_TOK].tobytes(), hashlib.sha256)
            names.append(state.hex())
        return names

    def _find_files(self) -> None:
        seen = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(".tmp"):
                Path(entry.path).unlink(missing_ok=True)
            elif entry.name.endswith(_SUFFIX) and entry.is_file():
                stat = entry.stat()
                seen.append((stat.st_mtime, entry.name.removesuffix(_SUFFIX), stat.st_size))
        for _, name, size in sorted(seen):
            self._files[name] = size

    def _open(self, name: str) -> list[Array] | None:
        """A block's arrays; None when it is missing, or fails to decrypt and is quarantined."""
        path = self._path(name)
        try:
            raw = path.read_bytes()
            opened = self._cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], name.encode())
            found = [(kind, tuple(shape), data) for kind, shape, data in msgpack.unpackb(opened)]
        except OSError:
            self._forget(name)
            return None
        except (InvalidTag, ValueError, TypeError, msgpack.UnpackException):
            self._put_aside(name)
            return None
        with self._lock, contextlib.suppress(KeyError):
            self._files.move_to_end(name)
        with contextlib.suppress(OSError):
            os.utime(path)  # keeps the order of use over a restart
        return found

    def _put_aside(self, name: str) -> None:
        self.quarantined += 1
        self._forget(name)
        with contextlib.suppress(OSError):
            aside = self._folder / "quarantine"
            aside.mkdir(mode=0o700, exist_ok=True)
            self._path(name).replace(aside / f"{name}{_SUFFIX}")

    def _forget(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            name, arrays = item
            try:
                self._write(name, arrays)
            except OSError:
                self.failures += 1  # on a full disk only this block is lost

    def _write(self, name: str, arrays: Sequence[Array]) -> None:
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, msgpack.packb(arrays), name.encode())
        if len(sealed) > self._budget:
            return
        self._make_room(len(sealed))
        temporary = self._folder / f"{name}.tmp"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(sealed)
            temporary.replace(self._path(name))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        with self._lock:
            self._files[name] = len(sealed)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files until one of ``size`` fits."""
        while True:
            with self._lock:
                if not self._files or sum(self._files.values()) + size <= self._budget:
                    return
                name, _ = self._files.popitem(last=False)
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"
