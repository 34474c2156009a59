"""Batches on this node's disk until the store has them; blocking, to be used from a thread.

A batch is written to a temporary file, synced, renamed into place and its folder synced: only then is it taken. What
the window that is still open holds is kept under another name, renamed but not synced, and the finished batch takes
that over; an agent that was killed finds it at its next start, a loss of power may take it. The oldest make room
before the bounds would be passed, and are counted. Age is counted in batches, never by a clock: one that jumps must
not cost a month of data. One agent at a time: a lock file says so.
"""

import contextlib
import errno
import fcntl
import os
import re
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from shared.batch import Batch, decode, encode
from shared.errors import Halt, Refused, Retryable
from shared.logs import get_logger

RESERVE_BYTES = 64 << 10
"""Of the disk, set by for a start when nothing else is left of it: a node that cannot count can still answer."""
KEPT_BAD = 100
"""Damaged or refused batches that are kept for a look."""
_OPEN = ".open"
_RESERVE = "reserve"
_NAME = re.compile(r"e(\d{8,})-(\d{10,})\.batch")

log = get_logger("agent.telemetry.spool")


class Identity(msgspec.Struct, kw_only=True):
    """Who writes here: kept beside the batches, so that epochs never repeat."""

    spool_id: str
    node: str
    rack: str
    hardware: str
    incarnation: int | None = None
    epoch: int = 0
    clean: bool = True


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A batch on disk."""

    epoch: int
    seq: int
    path: Path
    size: int


class Spool:
    """The spool in ``folder``; opening it begins a new epoch. Raises Halt when it cannot be ours."""

    def __init__(self, folder: Path, *, node: str, rack: str, hardware: str, max_bytes: int, max_batches: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_batches = max_batches
        self._bounds = threading.Lock()
        self._naming = threading.Lock()
        self._count = self._bytes = 0
        self.dropped = 0
        with _as_ours("open", folder):
            (folder / "bad").mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        try:
            self._begin(node, rack, hardware)
        except BaseException:
            self._lock.close()
            raise

    def _begin(self, node: str, rack: str, hardware: str) -> None:
        """A new epoch, remembered before its first batch."""
        with _as_ours("open", self._folder):
            self._sweep()
            self.identity = self._identity(node, rack, hardware)
            self._recover()
        self.first_run = self.identity.epoch == 0
        self.previous_clean = self.identity.clean
        self.identity.epoch += 1
        self.identity.clean = False
        waiting = self.waiting()
        self._count, self._bytes = len(waiting), sum(one.size for one in waiting)
        self._make_room(0)
        self._write_identity()
        self._seq = 0

    @property
    def epoch(self) -> int:
        """This run's number."""
        return self.identity.epoch

    @property
    def count(self) -> int:
        """How many batches wait."""
        return self._count

    def next_seq(self) -> int:
        """The sequence number of the batch to be appended next."""
        return self._seq + 1

    def keep(self, batch: Batch) -> None:
        """What the open window holds so far, in place of what was kept of it before. Raises Retryable when the disk
        refuses; nothing that is sealed makes room on a full one for what is not yet.

        It is for an agent that is killed, and not synced: a drive that is slow to sync must not keep it from being
        written, and a loss of power takes the open window.
        """
        path, body = self._path_of(batch), encode(batch)
        with _as_ours("write", path):
            self._make_room(len(body))
            _write_whole(path.with_suffix(_OPEN), body, synced=False)

    def append(self, batch: Batch) -> None:
        """Take a batch. Raises Retryable when the disk refuses; the batch is then not taken."""
        path, body = self._path_of(batch), encode(batch)
        with _as_ours("write", path):
            self._make_room(len(body))
            # over what was kept of it, and then by its own name: at every instant it is there once
            self._write(path.with_suffix(_OPEN), body)
            _renamed(path.with_suffix(_OPEN), path)
            _sync_folder(self._folder)
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
            match = _NAME.fullmatch(path.name)
            if match:
                with contextlib.suppress(FileNotFoundError):
                    found.append(Waiting(epoch=int(match[1]), seq=int(match[2]), path=path, size=path.stat().st_size))
        return sorted(found, key=lambda w: (w.epoch, w.seq))

    def read(self, waiting: Waiting) -> Batch | None:
        """The batch, or None when the file is damaged; it is then set aside in ``bad/``."""
        try:
            return decode(waiting.path.read_bytes())
        except FileNotFoundError:
            return None
        except Refused as error:
            log.error("batch_unreadable", epoch=waiting.epoch, seq=waiting.seq, reason=error.message)
            self.set_aside(waiting)
            return None

    def set_aside(self, waiting: Waiting) -> None:
        """Out of the way, but not lost."""
        try:
            waiting.path.replace(self._folder / "bad" / waiting.path.name)
        except FileNotFoundError:
            return  # it had to make room meanwhile, and was counted then
        self.dropped += 1
        self._gone(waiting)
        aside = sorted((self._folder / "bad").iterdir())
        for path in aside[:-KEPT_BAD]:
            path.unlink(missing_ok=True)

    def delete(self, sent: list[Waiting]) -> None:
        """Forget batches that the store has confirmed."""
        for one in sent:
            if _unlinked(one.path):
                self._gone(one)

    def _make_room(self, size: int) -> None:
        """Before a batch of so many bytes comes in, the oldest leave that would be beyond the bounds."""
        if self._count < self._max_batches and self._bytes + size <= self._max_bytes:
            return
        for one in self.waiting():
            if self._count < self._max_batches and self._bytes + size <= self._max_bytes:
                return
            if _unlinked(one.path):
                self._gone(one)
                self.dropped += 1

    def _gone(self, one: Waiting) -> None:
        with self._bounds:
            self._count, self._bytes = self._count - 1, self._bytes - one.size

    def claim(self, incarnation: int) -> None:
        """Remember the incarnation that the store granted; nothing once the spool is closed, it may be another's."""
        if self._lock.closed:
            return
        self.identity.incarnation = incarnation
        self._write_identity()

    def close(self, *, clean: bool) -> None:
        """Give the spool up; ``clean`` when this run ended in order."""
        self.identity.clean = clean
        self._write_identity()
        self._lock.close()

    def _locked(self) -> IO[str]:
        lock = open(self._folder / "lock", "a", encoding="utf-8")  # noqa: SIM115  # held while the agent runs
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise Halt(
                f"spool {self._folder}: another agent runs on it; stop that one, or give this one its own paths.state",
                code="spool_in_use",
            ) from None
        return lock

    def _sweep(self) -> None:
        for leftover in self._folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)

    def _recover(self) -> None:
        """What was kept of the window that was open when the last run was killed is its last batch. After a loss of
        power it may be half of one; the window is gone then."""
        for kept in sorted(self._folder.glob(f"*{_OPEN}")):
            path = kept.with_suffix(".batch")
            if (match := _NAME.fullmatch(path.name)) is None:
                continue
            if _is_whole(kept):
                with open(kept, "rb") as file:
                    _sync(file.fileno())  # it was not while it was only kept
                _renamed(kept, path)
                log.info("window_recovered", of_epoch=int(match[1]), seq=int(match[2]))
            else:
                kept.unlink()
                log.warning("window_unreadable", of_epoch=int(match[1]), seq=int(match[2]))
        _sync_folder(self._folder)

    def _identity(self, node: str, rack: str, hardware: str) -> Identity:
        path = self._folder / "identity.json"
        if not path.exists():
            return Identity(spool_id=uuid.uuid4().hex, node=node, rack=rack, hardware=hardware)
        try:
            identity = msgspec.json.decode(path.read_bytes(), type=Identity)
        except msgspec.DecodeError:
            raise Halt(f"spool: {path} is damaged; move the folder away and start again", code="bad_spool") from None
        if (identity.node, identity.rack) != (node, rack):
            raise Halt(
                f"spool {self._folder} belongs to node {identity.node!r} of rack {identity.rack!r}, and the "
                f"configuration says {node!r} of {rack!r}; put node.id back, or give the new node another paths.state",
                code="wrong_identity",
            )
        if "unknown" in (identity.hardware, hardware):
            # it could not be read, then or now; what is known is kept
            identity.hardware = hardware if identity.hardware == "unknown" else identity.hardware
        elif identity.hardware != hardware:
            raise Halt(
                f"spool {self._folder} was written by other hardware; a copied disk must not report as {node!r}: "
                "move the spool folder away and start again",
                code="wrong_identity",
            )
        return identity

    def _write_identity(self) -> None:
        path = self._folder / "identity.json"
        with _as_ours("write", path), self._naming:
            try:
                _write_whole(path, msgspec.json.encode(self.identity))
            except OSError as error:
                if error.errno != errno.ENOSPC or not _unlinked(self._folder / _RESERVE):
                    raise
                self._write(path, msgspec.json.encode(self.identity))
            _sync_folder(self._folder)
        self._set_by()

    def _write(self, path: Path, body: bytes) -> None:
        """A disk that is full is asked once more after the oldest tenth has left: models and logs need it, too."""
        try:
            _write_whole(path, body)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._gave_way():
                raise
            _write_whole(path, body)

    def _gave_way(self) -> bool:
        oldest = self.waiting()
        for one in oldest[: 1 + len(oldest) // 10]:
            if _unlinked(one.path):
                self._gone(one)
                self.dropped += 1
        return bool(oldest)

    def _set_by(self) -> None:
        reserve = self._folder / _RESERVE
        if not reserve.exists():
            # on a full disk there is none, until there is room again
            with contextlib.suppress(OSError):
                _write_whole(reserve, bytes(RESERVE_BYTES))


@contextlib.contextmanager
def _as_ours(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Retryable(f"spool: {verb} {path}: {error.strerror}", code="disk") from None


def _unlinked(path: Path) -> bool:
    """False when it was gone already: who drops and who has sent may meet."""
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


def _write_whole(path: Path, body: bytes, *, synced: bool = True) -> None:
    """All of it under its name, or nothing; the name is lasting once the folder is synced, too."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(body)
            file.flush()
            if synced:
                _sync(file.fileno())
        _renamed(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _renamed(before: Path, path: Path) -> None:
    # not by pathlib: it interns every part of every name, and Python's table of those would grow with each batch
    os.replace(before, path)


def _sync_folder(folder: Path) -> None:
    """What is in it has its name already, and is taken: what is left is only when the disk knows that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def _sync(descriptor: int) -> None:
    """To the drive itself; on macOS fsync alone stops at its cache."""
    if sys.platform == "darwin":
        # a file system of another kind may not know it
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
