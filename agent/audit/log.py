"""The audit log on this node's disk: one system call for each line, synced in groups by a thread, never by the loop.

A line is written before `write` returns, so a SIGKILL loses none that was; it is synced within GROUP_S and the time
of one sync, so a loss of power costs at most that. When the disk fails, requests that stay here go on and are counted;
`ok` is False for the others. It recovers by itself: in a new file, whose first lines say what is missing. A file is
never written to again after an error or a restart, and an unfinished line is never repaired but counted by the next
file.
"""

import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from agent.audit import disk as files
from agent.audit.chain import Tip, file_name, link
from agent.audit.disk import Disk
from agent.audit.entry import Begin, Entry, Gap, Known, Pruned, Vocabulary, Why, encode
from agent.audit.grouping import Group
from shared.durable import sync_folder
from shared.errors import Halt, Retryable
from shared.logs import get_logger

HUNG_S = 5.0
"""A disk that has not synced by then does not answer."""
SEGMENT_BYTES = 8 << 20
SAY_S = 60.0
"""How often the program's log says that the disk still fails."""
_WHY: dict[int, Why] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "full"),
    errno.EROFS: "read_only",
    **dict.fromkeys((errno.ENOENT, errno.ESTALE), "deleted"),
    errno.ETIMEDOUT: "no_answer",
}

log = get_logger("agent.audit")


class _File(NamedTuple):
    """The file that is written to; ``began_s`` is by the monotonic clock."""

    path: Path
    descriptor: int
    began: Tip
    began_s: float


class Trouble(NamedTuple):
    """``problem`` is a sentence; of ``unsynced`` lines before it is not known whether they reached the disk."""

    problem: str
    why: Why
    since_ms: int
    unsynced: int


def unavailable() -> Retryable:
    """The error for a request that must not be served without the audit log."""
    message = "this request cannot be served while the audit log cannot be written; see `mlxrack-agent audit`"
    return Retryable(message, code="audit_unavailable", retry_after_s=5.0)


class AuditLog:
    """The log of one node in ``folder``, for the event loop's thread. ``known`` tells which names may be recorded.
    Raises Halt when another agent writes it; whatever the disk does is a ``problem`` and raises nothing."""

    def __init__(
        self,
        folder: Path,
        *,
        node: str,
        known: Known,
        enabled: bool = True,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.folder, self.enabled, self._node, self._disk = folder, enabled, node, disk or Disk()
        self._vocabulary, self._clock, self._wall_ms = Vocabulary(known), clock, wall_ms
        self._file: _File | None = None
        self.trouble: Trouble | None = None
        self._lock = self._size = self._torn = self._gap = self.lost = self.written = 0
        self._chain, self._epoch, self._after = os.urandom(8).hex(), 0, ""
        self._tip = self._synced = self._reached = Tip()
        self._old: list[int] = []
        self._group = Group(self._work, self._ended)
        self._said_s = 0.0
        if enabled:
            self._start()

    # ---- for each request ----

    @property
    def ok(self) -> bool:
        """Whether what is written now is kept. Requests that are SENSITIVE or may leave are refused without."""
        return self.trouble is None

    @property
    def problem(self) -> str:
        """Why not, for an operator; "" when it is."""
        return self.trouble.problem if self.trouble else ""

    def write(self, entry: Entry) -> bool:
        """Append an entry; False when it could not be written, which is counted. Raises nothing for the disk."""
        if not self.enabled:
            return True
        if not self._append(self._vocabulary.body(entry)):
            self.lost += 1
            self._gap += 1
            return False
        self.written += 1
        if self._size >= SEGMENT_BYTES:
            self.rotate()
        return True

    async def write_first(self, entry: Entry) -> None:
        """Append an entry and wait until it is on the drive: for a request that must not be worked on without. Raises
        Retryable (audit_unavailable)."""
        if not self.write(entry) or not await self.durable():
            raise unavailable()

    async def durable(self) -> bool:
        """Wait until everything written so far is synced; False when the disk does not do it."""
        if not self.enabled or (self.ok and self._synced.seq >= self._tip.seq):
            return True
        if not self.ok:
            return False
        with contextlib.suppress(TimeoutError):
            return await self._group.reached(self._tip.seq, HUNG_S)
        self._hung()
        return False

    # ---- from time to time ----

    async def tick(self) -> Gap | None:
        """Once a second: see that the file is still there; after a failure try again. Returns what is missing when it
        has just recovered."""
        if not self.enabled:
            return None
        if self.trouble is None and self._group.busy_s() < HUNG_S:
            self._group.soon(0.0)
            return None
        if self.trouble is None:
            self._hung()
        if (now_s := self._clock()) >= self._said_s + SAY_S:
            self._said_s = now_s
            log.error("audit_fails", reason=self.problem, lost=self._gap)
        return None if self._group.busy or self.trouble is None else await self._recover(self.trouble)

    def rotate(self, after_s: float = 0.0) -> None:
        """Go on in a new file, if this one is that old and has more than its first line."""
        before = self._file
        if before is None or self._tip == before.began or self._clock() - before.began_s < after_s:
            return
        try:
            opened = self._opened()
        except OSError as error:
            self._failed(error)
            return
        self._old.append(before.descriptor)
        self._adopt(opened)
        self._group.soon()

    def current(self) -> str:
        """The name of the file that is written to; "" for none."""
        return self._file.path.name if self._file is not None else ""

    async def prune(self, through: int, gone: list[Path]) -> None:
        """Delete files, once a line that says so is synced."""
        if self._append(encode(Pruned(t_ms=self._wall_ms(), through=through))) and await self.durable():
            await self._group.run(functools.partial(files.unlink, gone))

    def status(self) -> dict[str, Any]:
        """For display."""
        trouble = self.trouble
        return {
            "enabled": self.enabled,
            "problem": self.problem,
            "since_ms": trouble.since_ms if trouble else None,
            "chain": self._chain,
            "seq": self._tip.seq,
            "synced_seq": self._synced.seq,
            "written": self.written,
            "lost": self.lost,
        }

    @property
    def hangs(self) -> bool:
        """Whether its thread waits for the disk."""
        return self._group.busy

    async def close(self) -> None:
        """Sync what was written, and leave the folder to others."""
        await self.durable()
        self._group.close()
        if not self._group.busy:
            files.close([*self._old, *([self._file.descriptor] if self._file else []), self._lock])
        self._file, self._old, self._lock, self.enabled = None, [], 0, False

    # ---- lines and files ----

    def _append(self, encoded: bytes) -> bool:
        if self._file is None:
            return False
        line, tip = link(self._tip, encoded)
        try:
            written = self._disk.write(self._file.descriptor, line)
        except OSError as error:
            self._failed(error)
            return False
        if written != len(line):
            self._torn = written
            self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            return False
        self._tip = tip
        self._size += written
        self._group.soon()
        return True

    def _start(self) -> None:
        try:
            self._lock = self._disk.lock(self.folder)
            found = files.newest(self.folder)
            self._tip = self._synced = found.tip
            self._chain, self._after, self._torn = found.chain or self._chain, found.after, found.torn
            self._epoch = found.epoch + 1
            self._adopt(self._opened())
        except OSError as error:
            self._failed(error)

    def _opened(self) -> _File:
        """A new file with its first line. Raises OSError; then there is no such file."""
        path, tip = self.folder / file_name(self._tip.seq + 1), self._tip
        begin = Begin(
            t_ms=self._wall_ms(),
            chain=self._chain,
            epoch=self._epoch,
            node=self._node,
            prev=tip.hash,
            after=self._after,
            torn=self._torn,
        )
        line, began = link(tip, encode(begin))
        descriptor = self._disk.create(path)
        try:
            if self._disk.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            files.close([descriptor])
            path.unlink(missing_ok=True)
            raise
        return _File(path, descriptor, began, self._clock())

    def _adopt(self, opened: _File) -> None:
        self._file, self._tip, self._size = opened, opened.began, 0
        self._after, self._torn = opened.path.name, 0

    # ---- syncing ----

    def _work(self) -> Callable[[], int] | None:
        if self._file is None:
            return None
        old, self._old = self._old, []
        return functools.partial(self._sync, old, self._file, self._tip, self._synced)

    def _sync(self, old: list[int], file: _File, upto: Tip, synced: Tip) -> int:
        """In the thread: sync what was written up to a line; its number. Raises OSError."""
        for descriptor in old:
            self._disk.sync(descriptor)
            files.close([descriptor])
        if upto != synced:
            self._disk.sync(file.descriptor)
        if not self._disk.is_there(file.path, file.descriptor):
            raise FileNotFoundError(errno.ENOENT, f"{file.path.name} was deleted or replaced")
        if upto != synced:
            files.note_tip(self.folder, upto)
        if synced.seq < file.began.seq:
            sync_folder(self.folder)
        self._reached = upto
        return upto.seq

    def _ended(self, seq: int, error: BaseException | None) -> None:
        if error is not None:
            self._failed(error if isinstance(error, OSError) else OSError(errno.EIO, type(error).__name__))
        elif self._file is not None:  # else it came too late
            self._synced = self._reached
            self._group.settle(seq)

    # ---- failure and recovery ----

    def _failed(self, error: OSError) -> None:
        """Write no more to this file: what was not synced may be lost, and a sync that failed proves nothing later."""
        if self.trouble is None:
            why = _WHY.get(error.errno or 0, "error")
            problem = f"{self.folder}: {error.strerror or type(error).__name__}"
            self.trouble = Trouble(problem, why, self._wall_ms(), max(0, self._tip.seq - self._synced.seq))
            self._said_s = self._clock()
            log.error("audit_fails", reason=problem, lost=self._gap)
        if self._file is not None:
            self._old.append(self._file.descriptor)
            self._file = None
        self._group.settle(None)

    def _hung(self) -> None:
        self._failed(OSError(errno.ETIMEDOUT, f"the disk has not synced for {HUNG_S:g} s"))

    async def _recover(self, trouble: Trouble) -> Gap | None:
        old, self._old = self._old, []
        try:
            opened = await self._group.run(functools.partial(self._reopened, old))
        except OSError as error:
            self.trouble = trouble._replace(problem=f"{self.folder}: {error.strerror or type(error).__name__}")
            return None
        except Halt as error:
            self.trouble = trouble._replace(problem=error.message)
            return None
        self._adopt(opened)
        self._synced = self._tip
        gap = Gap(
            t_ms=self._wall_ms(), since_ms=trouble.since_ms, lost=self._gap, unsynced=trouble.unsynced, why=trouble.why
        )
        if not self._append(encode(gap)):
            return None
        self.trouble, self._gap = None, 0
        log.info("audit_recovered", lost=gap.lost, unsynced=gap.unsynced)
        return gap

    def _reopened(self, old: list[int]) -> _File:
        """In the thread: a new file that the disk has synced. Raises OSError, and Halt."""
        files.close(old)
        if self._lock and not self._disk.is_there(self.folder / files.LOCK, self._lock):
            files.close([self._lock])
            self._lock = 0
        self._lock = self._lock or self._disk.lock(self.folder)
        opened = self._opened()
        try:
            self._disk.sync(opened.descriptor)
        except OSError:
            files.close([opened.descriptor])
            opened.path.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)
        return opened
