"""The files of the audit log: `log.py` writes them through a ``Disk``, and everything else reads them here."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from agent.audit.chain import SUFFIX, Tip, first_seq, parse, whole_lines
from agent.audit.entry import Begin, Entry, decode
from shared import durable
from shared.errors import Halt

TIP, LOCK, SHIPPED = "tip", "lock", "shipped"
"""Beside the files: the last line that was synced, who writes, and what of it is in the bucket."""
OURS = (TIP, LOCK, SHIPPED)
DAY_MS = 86_400_000


class Segment(NamedTuple):
    """A file of the log."""

    path: Path
    first: int
    size: int
    written_ms: int


class Found(NamedTuple):
    """What a start finds: the last line, the file that ends with it and the bytes of an unfinished one after it."""

    tip: Tip = Tip()
    chain: str = ""
    epoch: int = 0
    after: str = ""
    torn: int = 0


class Disk:
    """What the log asks of the disk. Every call raises OSError."""

    def write(self, descriptor: int, line: bytes) -> int:
        """One line by one call; the bytes that were written."""
        return os.write(descriptor, line)

    def sync(self, descriptor: int) -> None:
        """Make what was written last through a loss of power."""
        durable.sync(descriptor)

    def create(self, path: Path) -> int:
        """A new file, its owner's alone."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return durable.created(path, os.O_WRONLY | os.O_APPEND | os.O_EXCL)

    def lock(self, folder: Path) -> int:
        """Hold the folder until the descriptor is closed. Raises Halt when another process does."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = durable.created(folder / LOCK, os.O_WRONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            why = "in use by another agent; stop that one, or set another paths.state here"
            raise Halt(f"audit log {folder}: {why}", code="spool_in_use") from None
        return descriptor

    def is_there(self, path: Path, descriptor: int) -> bool:
        """Whether an open file still has its name."""
        try:
            return os.stat(path).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            return False


def segments(folder: Path) -> list[Segment]:
    """The files of a log, oldest first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if (first := first_seq(path.name)) is not None:
                with contextlib.suppress(FileNotFoundError):
                    seen = path.stat()
                    found.append(Segment(path, first, seen.st_size, seen.st_mtime_ns // 1_000_000))
    return sorted(found, key=lambda one: one.first)


def strange(folder: Path) -> list[str]:
    """Names in the folder that are not of a log, but for what macOS puts into every folder."""
    named = (name for name in os.listdir(folder) if name not in (*OURS, ".DS_Store") and not name.startswith("._"))
    return sorted(name for name in named if first_seq(name) is None)


def newest(folder: Path) -> Found:
    """Where a log goes on, whatever was done to it: after the last line that can be read. A file without a finished
    line, whose beginning was never written, is removed."""
    found = Found()
    for segment in reversed(segments(folder)):
        lines, torn = whole_lines(segment.path.read_bytes())
        if not lines:
            segment.path.unlink()
            continue
        if not found.after:
            last = next((one for one in map(parse, reversed(lines)) if one is not None), None)
            tip = Tip(last.seq, last.hash) if last else Tip(segment.first + len(lines) - 1)
            found = found._replace(tip=tip, after=segment.path.name, torn=torn)
        if isinstance(begin := decode(lines[0]), Begin):
            return found._replace(chain=begin.chain, epoch=begin.epoch)
    return found


def contents(folder: Path, newest: int = 0) -> Iterator[tuple[str, bytes]]:
    """The name and content of each file, or of so many of the newest, in order; one that was deleted meanwhile is
    passed over."""
    for segment in segments(folder)[-newest:]:
        with contextlib.suppress(FileNotFoundError):
            yield segment.path.name, segment.path.read_bytes()


def known_tip(folder: Path) -> Tip | None:
    """The last line that was synced; None if nothing tells."""
    with contextlib.suppress(OSError, ValueError):
        seq, digest = (folder / TIP).read_text(encoding="ascii").split()
        return Tip(int(seq), digest)
    return None


def note_tip(folder: Path, tip: Tip) -> None:
    """Note the last line beside the log, so that what is cut off its end is found. It need not be synced: it is written
    after what it tells of was. Raises OSError."""
    descriptor = os.open(folder / TIP, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, durable.PRIVATE)
    try:
        os.pwrite(descriptor, b"%015d %b\n" % (tip.seq, tip.hash.encode()), 0)
    finally:
        os.close(descriptor)


def close(descriptors: Iterable[int]) -> None:
    """Close files, in whatever state they are; 0 is none."""
    for descriptor in filter(None, descriptors):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def unlink(paths: Iterable[Path]) -> None:
    """Delete files."""
    for path in paths:
        path.unlink(missing_ok=True)


def entries(content: bytes, since_ms: int = 0) -> Iterator[Entry]:
    """The entries of one file's content; a line that is not finished, or of another version, is passed over."""
    for line in whole_lines(content)[0]:
        one = decode(line)
        if isinstance(one, Entry) and one.t_ms >= since_ms:
            yield one


def read(folder: Path, since_ms: int = 0) -> Iterator[Entry]:
    """Every entry from a time on (UTC), in the order of writing; at most one file is in memory."""
    for segment in _since(segments(folder), since_ms):
        with contextlib.suppress(FileNotFoundError):
            yield from entries(segment.path.read_bytes(), since_ms)


def _since(found: Sequence[Segment], since_ms: int) -> Iterator[Segment]:
    """Files that may hold something from then on; a day more, for clocks that were set."""
    return (one for one in found if one.written_ms >= since_ms - DAY_MS and one.path.suffix == SUFFIX)
