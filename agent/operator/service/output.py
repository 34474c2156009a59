"""launchd's output file: the agent keeps it short itself, in place.

launchd opens the file once and its descriptor stays with the agent, so that a file that is renamed goes on growing
under its other name. Here what was written is copied to a second file, and the first one is cut to nothing.
"""

import asyncio
import contextlib
import fcntl
import os
import stat
from pathlib import Path

from shared.durable import created
from shared.logs import get_logger

NAME = "agent.stdout.log"
MOST_BYTES = 10 << 20
EVERY_S = 30.0
_COPIED = 1 << 20
_DESCRIPTORS = (1, 2)

log = get_logger("agent.output")


async def keep_short(folder: Path) -> None:
    """Bound the output file in ``folder`` for ever, if this process writes to it."""
    while True:
        with contextlib.suppress(OSError):
            if await asyncio.to_thread(shorten, folder / NAME):
                log.info("output_file_shortened", most_bytes=MOST_BYTES)
        await asyncio.sleep(EVERY_S)


def shorten(path: Path, most: int = MOST_BYTES) -> bool:
    """Cut the file to nothing where it is longer than ``most`` bytes and an output of this process; its last ``most``
    bytes are in a file beside it, whose name ends with .1, unless the disk is full. Raises OSError."""
    ours = [one for one in _DESCRIPTORS if _is_file(one, path)]
    for one in ours:
        # or what is written next would begin where the file ended, behind a hole
        fcntl.fcntl(one, fcntl.F_SETFL, fcntl.fcntl(one, fcntl.F_GETFL) | os.O_APPEND)
    if not ours or os.fstat(ours[0]).st_size <= most:
        return False
    with contextlib.suppress(OSError):
        _copy_end(path, path.with_name(f"{path.name}.1"), most)
    os.ftruncate(ours[0], 0)
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        here, there = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(there.st_mode) and os.path.samestat(here, there)


def _copy_end(path: Path, other: Path, most: int) -> None:
    with path.open("rb") as source, open(created(other), "wb") as target:
        source.seek(max(0, os.fstat(source.fileno()).st_size - most))
        left = most
        while left > 0 and (part := source.read(min(left, _COPIED))):
            left -= target.write(part)
