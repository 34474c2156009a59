"""The folder of a program's state: its owner's alone, and one process at a time. It holds the admin token, the spool,
logs, adopted orders; who can write there gives this node orders.
"""

import contextlib
import errno
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
_MODELESS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What file systems without modes answer to a change; others ignore it."""


@contextlib.contextmanager
def held(folder: Path, secret: Collection[str], public: Collection[str] = ()) -> Iterator[list[str]]:
    """The folder, made or corrected, while this process alone uses it. ``secret`` and ``public`` are the names in it
    that are ours; yields a line for each thing that was corrected, or cannot be. Raises Halt when it is another user's,
    in use, or for other things."""
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
    return [f"{path} {why}" for path, seen in entries if (why := _another_owner(seen) or _wrong_mode(seen))]


def is_private(seen: os.stat_result) -> bool:
    """Whether this is a file that nobody but this user (and root) could read or change."""
    return stat.S_ISREG(seen.st_mode) and seen.st_uid == os.geteuid() and not seen.st_mode & _OTHERS


def _corrected(folder: Path, secret: Collection[str]) -> list[str]:
    """Take the rights of group and others away, and give the owner's; returns a line for each that had other ones."""
    found = []
    for path, seen in _entries(folder, secret):
        if why := _another_owner(seen):
            remedy = f"if it is this node's, run `chown {os.geteuid()}` on it; else remove it"
            raise Halt(f"state folder: {path} {why}; {remedy}", code="state_not_private")
        if not (why := _wrong_mode(seen)):
            continue
        if _set_right(path, os.O_NOFOLLOW if path != folder else 0):
            found.append(f"{path} {why}; corrected")
            continue
        where = "and its file system keeps no modes: other users of this machine may read and change it"
        found.append(f"{path} {why}, {where}; set paths.state to a folder on another disk if there are any")
        if path == folder:
            break  # nor will it for what is in it
    return found


def _strange(folder: Path, ours: Collection[str]) -> str:
    """Something in a folder that holds nothing of ours; "" otherwise."""
    names = sorted(os.listdir(folder))
    return "" if not names or set(names) & set(ours) else names[0]


def _another_owner(seen: os.stat_result) -> str:
    return "" if seen.st_uid in (0, os.geteuid()) else f"belongs to user {seen.st_uid}"


def _open_to_others(seen: os.stat_result) -> str:
    return f"has mode {stat.S_IMODE(seen.st_mode):o}" if seen.st_mode & _OTHERS else ""


def _right(seen: os.stat_result) -> int:
    """The mode that something of ours has: all that its owner needs, and no more for anybody else."""
    return seen.st_mode & 0o700 | (0o700 if stat.S_ISDIR(seen.st_mode) else 0o600)


def _wrong_mode(seen: os.stat_result) -> str:
    return "" if seen.st_mode & 0o777 == _right(seen) else f"has mode {stat.S_IMODE(seen.st_mode):o}"


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


def _set_right(path: Path, follow: int) -> bool:
    """Whether the mode is right afterwards, which it is not on a file system without modes. Raises Halt."""
    try:
        return not _wrong_mode(_with_right_mode(path, follow))
    except FileNotFoundError:
        return True  # gone meanwhile
    except OSError as error:
        owner = os.lstat(path).st_uid
        if owner == os.geteuid() and error.errno in _MODELESS:
            return False
        why = f"{path} is user {owner}'s, and its mode cannot be changed ({error.strerror})"
        remedy = f"run `chown {os.geteuid()}` on it, or set paths.state to another folder"
        raise Halt(f"state folder: {why}; {remedy}", code="state_not_private") from None


def _with_right_mode(path: Path, follow: int) -> os.stat_result:
    """By its descriptor: what has its name may change meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | follow)
    except PermissionError:
        # its owner may not read it; by now nobody else can put another file there, because folders come first
        os.chmod(path, _right(os.lstat(path)))
        return os.lstat(path)
    try:
        os.fchmod(descriptor, _right(os.fstat(descriptor)))
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)
