"""Memory footprint of a process, as the system counts it."""

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest

from agent.process.footprint import _RusageInfo, footprint_bytes, physical_footprint


class Libproc:
    """proc_pid_rusage as on macOS: returns a status and fills the structure through the pointer."""

    def __init__(self, status: int, footprint: int = 0) -> None:
        self._status, self._footprint = status, footprint
        self.asked: tuple[int, int] | None = None

    def proc_pid_rusage(self, pid: int, flavor: int, buffer: Any) -> int:
        self.asked = (pid, flavor)
        info = ctypes.cast(buffer, ctypes.POINTER(_RusageInfo)).contents
        info.resident_size, info.phys_footprint = 1, self._footprint
        return self._status


def test_the_physical_footprint_is_read_at_its_offset() -> None:
    """rusage_info_v0 of <sys/resource.h>: 16 bytes of UUID, then 8-byte integers; the footprint is the eighth."""
    assert _RusageInfo.phys_footprint.offset == 16 + 7 * 8
    assert ctypes.sizeof(_RusageInfo) == 16 + 10 * 8
    fake = Libproc(0, 123_456_789)
    assert physical_footprint(42, fake) == 123_456_789
    assert fake.asked == (42, 0)
    assert physical_footprint(42, Libproc(-1, 5)) is None
    assert physical_footprint(42, None) is None


@pytest.mark.skipif(sys.platform == "darwin", reason="counts otherwise there")
def test_a_live_process_has_a_footprint_and_an_ended_one_none() -> None:
    own = footprint_bytes(os.getpid())
    assert own is not None
    assert own > 10 << 20
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert footprint_bytes(gone.pid) is None
