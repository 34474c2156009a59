"""The folder of a program's state: its owner's alone, and one process at a time. It holds the admin token, the spool,
logs, adopted orders; who can write there gives this node orders.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from shared.durable import created
from shared.errors import Halt

UMASK = 0o077
"""Of a program that keeps state: what it creates is its owner's, unless it says otherwise."""
LOCK_NAME = "lock"
_OTHERS = 0o077


@contextlib.contextmanager
def held(folder: Path, secret: Collection[str], public: Collection[str] = ()) -> Iterator[list[str]]:
    """The folder, made or corrected, while this process alone uses it. ``secret`` and ``public`` are the names in it
    that are ours; yields what was corrected. Raises Halt when it is another user's, in use, or for other things."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (why := _open_to_others(folder.stat())) and (strange := _strange(folder, {*secret, *public})):
        remedy = "set paths.state to a folder for the agent alone, or run `chmod 700` on this one"
        raise Halt(f"state folder {folder}: it {why} and holds {strange!r}; {remedy}", code="state_not_private")
    corrected = _corrected(folder, secret)
    with open(created(folder / LOCK_NAME, os.O_WRONLY), "a", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = "in use by another agent; stop that one, or set another paths.state here"
            raise Halt(f"state folder {folder}: {why}", code="spool_in_use") from None
        yield corrected


def problems(folder: Path, secret: Collection[str]) -> list[str]:
    """What `held` would correct or refuse, for display."""
    entries = _entries(folder, secret) if folder.is_dir() else ()
    return [f"{path} {why}" for path, seen in entries if (why := _another_owner(seen) or _open_to_others(seen))]


def is_private(seen: os.stat_result) -> bool:
    """Whether this is a file that nobody but this user (and root) could read or change."""
    return stat.S_ISREG(seen.st_mode) and seen.st_uid == os.geteuid() and not seen.st_mode & _OTHERS


def _corrected(folder: Path, secret: Collection[str]) -> list[str]:
    """Take the rights of group and others away; returns what had any."""
    found = []
    for path, seen in _entries(folder, secret):
        if why := _another_owner(seen):
            remedy = f"if it is this node's, run `chown {os.geteuid()}` on it; else remove it"
            raise Halt(f"state folder: {path} {why}; {remedy}", code="state_not_private")
        if why := _open_to_others(seen):
            _take_rights(path, os.O_NOFOLLOW if path != folder else 0)
            found.append(f"{path} {why}")
    return found


def _strange(folder: Path, ours: Collection[str]) -> str:
    """Something in a folder that holds nothing of ours; "" otherwise."""
    names = sorted(os.listdir(folder))
    return "" if not names or set(names) & set(ours) else names[0]


def _another_owner(seen: os.stat_result) -> str:
    return "" if seen.st_uid in (0, os.geteuid()) else f"belongs to user {seen.st_uid}"


def _open_to_others(seen: os.stat_result) -> str:
    return f"has mode {stat.S_IMODE(seen.st_mode):o}" if seen.st_mode & _OTHERS else ""


def _entries(folder: Path, secret: Collection[str]) -> Iterator[tuple[Path, os.stat_result]]:
    """The folder and what of it is ours, except links, which are the operator's way to another drive."""
    yield folder, folder.stat()
    for path in (folder / name for name in (LOCK_NAME, *sorted(secret))):
        yield from _entry(path)
        for top, folders, names in os.walk(path) if not path.is_symlink() else ():
            for name in (*folders, *names):
                yield from _entry(Path(top, name))


def _entry(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    with contextlib.suppress(OSError):  # gone meanwhile, or in another user's folder
        seen = os.lstat(path)
        if not stat.S_ISLNK(seen.st_mode):
            yield path, seen


def _take_rights(path: Path, follow: int) -> None:
    """By its descriptor: what has its name may change meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | follow)
        try:
            os.fchmod(descriptor, os.fstat(descriptor).st_mode & 0o700)
        finally:
            os.close(descriptor)
