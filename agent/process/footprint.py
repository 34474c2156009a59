"""Memory footprint of a process as the system counts it.

On macOS that is the physical footprint (what Activity Monitor shows, and what memory pressure is based on): resident
size omits compressed and includes shared memory. Elsewhere it is the resident size.
"""

import ctypes
import ctypes.util
import functools
import re
import resource
import sys
from pathlib import Path
from typing import Any

_RUSAGE_INFO_V0 = 0


class _RusageInfo(ctypes.Structure):
    """struct rusage_info_v0 of <sys/resource.h> on macOS. Its size is part of the version asked for: what a release
    adds has another version."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        *((name, ctypes.c_uint64) for name in ("user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups")),
        *((name, ctypes.c_uint64) for name in ("pageins", "wired_size", "resident_size", "phys_footprint")),
        *((name, ctypes.c_uint64) for name in ("proc_start_abstime", "proc_exit_abstime")),
    )


def footprint_bytes(pid: int) -> int | None:
    """Memory footprint of a process in bytes; None when it has exited."""
    if sys.platform == "darwin":
        return physical_footprint(pid, _libproc())
    return resident_bytes(pid)


def resident_bytes(pid: int, proc: Path = Path("/proc")) -> int | None:
    """Resident size in bytes, from /proc/PID/statm; None when the process has exited or the file is missing."""
    try:
        found = re.match(rb"\d+ (\d+) ", (proc / str(pid) / "statm").read_bytes())
    except OSError:
        return None
    return int(found[1]) * resource.getpagesize() if found else None


def physical_footprint(pid: int, libproc: Any) -> int | None:
    """proc_pid_rusage's ri_phys_footprint; None when the call fails."""
    info = _RusageInfo()
    if libproc is None or libproc.proc_pid_rusage(pid, _RUSAGE_INFO_V0, ctypes.byref(info)) != 0:
        return None
    return int(info.phys_footprint)


@functools.cache
def _libproc() -> Any:
    try:
        return ctypes.CDLL(ctypes.util.find_library("proc") or "/usr/lib/libproc.dylib")
    except OSError:
        return None
