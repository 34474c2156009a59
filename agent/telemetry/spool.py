"""Batches on this node's disk until the store has confirmed them; blocking, call it from a thread.

A batch is written to a temporary file, synced, renamed into place and its folder synced: only then is it accepted. The
open window's contents so far are kept under another name, renamed but not synced, and the finished batch replaces
them; an agent that was killed recovers them at its next start, a power failure may lose them. The oldest batches are
dropped, and counted, before a bound would be exceeded. Age is counted in batches, never by a clock: a clock that jumps
must not cost a month of data. A lock file admits one agent at a time.
"""

import contextlib
import errno
import fcntl
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from agent.telemetry import spool_identity
from shared import durable
from shared.batch import Batch, decode, encode
from shared.errors import Halt, Refused, Retryable
from shared.logs import get_logger

RESERVE_BYTES = 64 << 10
"""Disk space reserved so that the agent can start on a full disk: a node without telemetry can still answer."""
KEPT_BAD = 100
"""Damaged or refused batches that are kept for inspection."""
_OPEN = ".open"
_RESERVE = "reserve"
_NAME = re.compile(r"e(\d{8,})-(\d{10,})\.batch")

log = get_logger("agent.telemetry.spool")


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A batch on disk."""

    epoch: int
    seq: int
    path: Path
    size: int


class Spool:
    """The spool in ``folder``; opening it begins a new epoch. Raises Halt when it is in use or another node's."""

    def __init__(self, folder: Path, *, node: str, rack: str, hardware: str, max_bytes: int, max_batches: int) -> None:
        self._folder, self._max_bytes, self._max_batches = folder, max_bytes, max_batches
        self._bounds, self._naming = threading.Lock(), threading.Lock()
        self._count = self._bytes = self.dropped = 0
        self.unreadable = ""
        with _as_ours("open", folder):
            (folder / "bad").mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        try:
            self._begin(node, rack, hardware)
        except BaseException:
            self._lock.close()
            raise

    def _begin(self, node: str, rack: str, hardware: str) -> None:
        """A new epoch, stored before its first batch."""
        with _as_ours("open", self._folder):
            for leftover in self._folder.glob("*.tmp"):
                leftover.unlink(missing_ok=True)
            self.identity = spool_identity.read(self._folder, node=node, rack=rack, hardware=hardware)
            self._recover()
        self.previous = spool_identity.previous(self.identity)
        self.identity.epoch += 1
        waiting = self.waiting()
        self._count, self._bytes = len(waiting), sum(one.size for one in waiting)
        self._make_room(0)
        self._write_identity()
        self._seq = 0

    @property
    def epoch(self) -> int:
        """This run's epoch."""
        return self.identity.epoch

    @property
    def count(self) -> int:
        """Number of batches not yet sent."""
        return self._count

    def next_seq(self) -> int:
        """Sequence number of the next batch."""
        return self._seq + 1

    def keep(self, batch: Batch) -> None:
        """Store the open window's contents so far, replacing the previous copy. Raises Retryable when the write fails;
        on a full disk no sealed batch is dropped for an open one. It protects against a killed agent and is not synced:
        a drive that is slow to sync must not delay it, and a power failure loses the open window."""
        path, body = self._path_of(batch), encode(batch)
        with _as_ours("write", path):
            self._make_room(len(body))
            durable.write_whole(path.with_suffix(_OPEN), body, synced=False)

    def append(self, batch: Batch) -> None:
        """Append a batch. Raises Retryable when the write fails; the batch is then not in the spool."""
        path, body = self._path_of(batch), encode(batch)
        with _as_ours("write", path):
            self._make_room(len(body))
            # first over the open window's copy, then renamed: at every instant exactly one copy exists
            self._write(path.with_suffix(_OPEN), body)
            durable.rename(path.with_suffix(_OPEN), path)
            durable.sync_folder(self._folder)
        self._seq = batch.seq
        self._set_by()
        with self._bounds:
            self._count, self._bytes = self._count + 1, self._bytes + len(body)

    def _path_of(self, batch: Batch) -> Path:
        if (batch.epoch, batch.seq) != (self.epoch, self._seq + 1):
            raise Refused(f"spool batch {batch.epoch}/{batch.seq}: expected {self.epoch}/{self._seq + 1}")
        return self._folder / f"e{batch.epoch:08d}-{batch.seq:010d}.batch"

    def waiting(self) -> list[Waiting]:
        """Batches not yet sent, oldest first."""
        found = []
        for path in self._folder.iterdir():
            if match := _NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    found.append(Waiting(epoch=int(match[1]), seq=int(match[2]), path=path, size=path.stat().st_size))
        return sorted(found, key=lambda w: (w.epoch, w.seq))

    def read(self, waiting: Waiting) -> Batch | None:
        """The batch, or None when the file is damaged; it is then moved to ``bad/``, and ``unreadable`` says why."""
        try:
            return decode(waiting.path.read_bytes())
        except FileNotFoundError:
            return None
        except Refused as error:
            log.error("batch_unreadable", epoch=waiting.epoch, seq=waiting.seq, reason=error.message)
            self.set_aside(waiting)
            self.unreadable = f"spool: {waiting.path.name} was moved to {self._folder / 'bad'}: {error.message}"
            return None

    def set_aside(self, waiting: Waiting) -> None:
        """Move a batch to ``bad/``, so that it neither blocks others nor is lost."""
        try:
            waiting.path.replace(self._folder / "bad" / waiting.path.name)
        except FileNotFoundError:
            return  # dropped to make room meanwhile, and counted then
        self.dropped += 1
        self._gone(waiting)
        for path in sorted((self._folder / "bad").iterdir())[:-KEPT_BAD]:
            path.unlink(missing_ok=True)

    def delete(self, sent: list[Waiting]) -> None:
        """Delete batches that the store has confirmed."""
        for one in sent:
            if _unlinked(one.path):
                self._gone(one)

    def _make_room(self, size: int) -> None:
        """Drop the oldest batches until one of ``size`` bytes fits within the bounds."""
        if self._count < self._max_batches and self._bytes + size <= self._max_bytes:
            return
        for one in self.waiting():
            if self._count < self._max_batches and self._bytes + size <= self._max_bytes:
                return
            self._drop(one)

    def _drop(self, one: Waiting) -> None:
        if _unlinked(one.path):
            self._gone(one)
            self.dropped += 1

    def _gone(self, one: Waiting) -> None:
        with self._bounds:
            self._count, self._bytes = self._count - 1, self._bytes - one.size

    def serves(self) -> None:
        """The agent serves: only now is this run one that the next start asks about. A start that fails before leaves
        what the last run left."""
        self.identity.served, self.identity.clean = True, False
        self._write_identity()

    def claim(self, number: int) -> None:
        """Store the claim on the node id that is this spool's; its first one is the incarnation that its batches are
        written under for good. Ignored once the spool is closed, since another agent may own it."""
        if self._lock.closed:
            return
        self.identity.claim = number
        self.identity.incarnation = self.identity.incarnation or number
        self._write_identity()

    def close(self, *, clean: bool) -> None:
        """Release the spool; ``clean`` after an orderly shutdown."""
        self.identity.clean = clean
        self._write_identity()
        self._lock.close()

    def _locked(self) -> IO[str]:
        lock = open(self._folder / "lock", "a", encoding="utf-8")  # noqa: SIM115  # held while the agent runs
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            why = "in use by another agent; stop that one, or set another paths.state here"
            raise Halt(f"spool {self._folder}: {why}", code="spool_in_use") from None
        return lock

    def _recover(self) -> None:
        """The window that was open when the last run was killed becomes its last batch. After a power failure the copy
        may be truncated; the window is lost then."""
        for kept in sorted(self._folder.glob(f"*{_OPEN}")):
            path = kept.with_suffix(".batch")
            if (match := _NAME.fullmatch(path.name)) is None:
                continue
            if _is_whole(kept):
                with open(kept, "rb") as file:
                    durable.sync(file.fileno())  # keep() does not sync
                durable.rename(kept, path)
                log.info("window_recovered", of_epoch=int(match[1]), seq=int(match[2]))
            else:
                kept.unlink()
                log.warning("window_unreadable", of_epoch=int(match[1]), seq=int(match[2]))
        durable.sync_folder(self._folder)

    def _write_identity(self) -> None:
        path = self._folder / "identity.json"
        with _as_ours("write", path), self._naming:
            try:
                durable.write_whole(path, msgspec.json.encode(self.identity))
            except OSError as error:
                if error.errno != errno.ENOSPC or not _unlinked(self._folder / _RESERVE):
                    raise
                self._write(path, msgspec.json.encode(self.identity))
            durable.sync_folder(self._folder)
        self._set_by()

    def _write(self, path: Path, body: bytes) -> None:
        """On a full disk, drop the oldest tenth of the batches and retry once: models and logs need space, too."""
        try:
            durable.write_whole(path, body)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._gave_way():
                raise
            durable.write_whole(path, body)

    def _gave_way(self) -> bool:
        oldest = self.waiting()
        for one in oldest[: 1 + len(oldest) // 10]:
            self._drop(one)
        return bool(oldest)

    def _set_by(self) -> None:
        reserve = self._folder / _RESERVE
        if not reserve.exists():
            # a full disk has no reserve until there is room again
            with contextlib.suppress(OSError):
                durable.write_whole(reserve, bytes(RESERVE_BYTES))


@contextlib.contextmanager
def _as_ours(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Retryable(f"spool: {verb} {path}: {error.strerror}", code="disk") from None


def _unlinked(path: Path) -> bool:
    """False when the file was gone already: dropping and deleting after a push may race."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _is_whole(path: Path) -> bool:
    try:
        decode(path.read_bytes())
    except Refused:
        return False
    return True
