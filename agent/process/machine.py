"""What is known of this machine without a sensor: its memory, and the free space of a disk. Nothing here raises, unless
it says so: these are optional facts, and none may stop an agent, a loader or a window.

psutil is imported by this module alone, and asked last. Its virtual_memory() raises on macOS 27, where the structure it
passes to the kernel is too small; a library that is used for one number brings its other failures along.
"""

import ctypes
import errno
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import Halt
from shared.memory_plan import default_budget_bytes

LIBRARY = "/usr/lib/libSystem.B.dylib"
MEMINFO = Path("/proc/meminfo")
LEAST_MEMORY_BYTES, MOST_MEMORY_BYTES = 16 << 20, 1 << 50
"""What a source says outside of this is an error of the source."""
_ROOM_BYTES, _MOST_ROOM_BYTES = 4096, 1 << 18
_COMMAND = ("/usr/sbin/sysctl", "-n", "hw.memsize")
_COMMAND_S = 5.0
_MEMINFO_LINE = re.compile(rb"^(\w+): +(\d{1,15}) kB\n", re.MULTILINE)

T = TypeVar("T")


def memory_bytes(
    platform: str = sys.platform,
    *,
    library: str = LIBRARY,
    command: tuple[str, ...] = _COMMAND,
    meminfo: Path = MEMINFO,
) -> int | None:
    """Total memory of this machine; None when no source tells it."""
    kernel: tuple[Callable[[], int], ...] = (
        lambda: parse_meminfo(meminfo.read_bytes())["MemTotal"],
        lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    if platform == "darwin":
        kernel = (lambda: int.from_bytes(sysctl_bytes("hw.memsize", library), "little"), lambda: _said(command))
    for ask in (*kernel, lambda: _psutil().virtual_memory().total):
        found = optional(ask)
        if found is not None and LEAST_MEMORY_BYTES <= found <= MOST_MEMORY_BYTES:
            return int(found)
    return None


def default_budget(configured: int, machine_bytes: int | None) -> int:
    """Bytes for all models until the GPU is asked, or where it tells nothing; ``configured`` is memory.budget_bytes, 0
    for none. Raises Halt when neither that nor the machine's memory is known."""
    if machine_bytes is not None:
        return default_budget_bytes(machine_bytes)
    if configured:
        return configured
    why = "neither the system nor psutil tells how much memory this machine has"
    raise Halt(f"{why}; set memory.budget_bytes to what the models may use", code="memory_unknown")


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of a folder, of its nearest parent while it does not exist; None when the system does not
    tell."""
    there = (one for one in (folder, *folder.parents) if os.path.lexists(one))
    return optional(lambda: shutil.disk_usage(next(there)).free)


def psutil_cpu_times() -> dict[str, float] | None:
    """Seconds by kind since boot, by psutil; None where it fails."""
    return optional(lambda: dict(_psutil().cpu_times()._asdict()))


def parse_meminfo(raw: bytes) -> dict[str, int]:
    """Bytes by name of /proc/meminfo. Lines without a size, and a truncated one, are ignored."""
    return {name.decode(): int(kib) << 10 for name, kib in _MEMINFO_LINE.findall(raw)}


def sysctl_bytes(name: str, library: str = LIBRARY) -> bytes:
    """A value of sysctlbyname(3). The kernel says how much it wrote and refuses a buffer that is too small, so a
    structure may grow. Raises OSError where the function or the name does not exist."""
    call, room = _sysctlbyname(library), _ROOM_BYTES
    while True:
        buffer, size = ctypes.create_string_buffer(room), c_size_t(room)
        if call(name.encode(), buffer, byref(size), None, 0) == 0:
            return buffer.raw[: min(size.value, room)]
        code, room = ctypes.get_errno(), room * 8
        if code != errno.ENOMEM or room > _MOST_ROOM_BYTES:
            raise OSError(code, os.strerror(code), name)


def optional(ask: Callable[[], T]) -> T | None:
    """An answer; None when there is none, whatever was raised: a source may fail in any way it likes."""
    try:
        return ask()
    except Exception:  # noqa: BLE001  # see above
        return None


@functools.lru_cache(maxsize=8)
def _sysctlbyname(library: str) -> Any:
    try:
        call = ctypes.CDLL(library, use_errno=True).sysctlbyname
    except AttributeError:
        raise OSError(errno.ENOSYS, "no such function", "sysctlbyname") from None
    call.restype, call.argtypes = c_int, (c_char_p, c_void_p, c_void_p, c_void_p, c_size_t)
    return call


def _said(command: tuple[str, ...]) -> int:
    run = subprocess.run(command, capture_output=True, timeout=_COMMAND_S, check=True, stdin=subprocess.DEVNULL)
    return int(run.stdout)


def _psutil() -> Any:
    """Imported when it is needed: its import may fail, too."""
    import psutil

    return psutil
