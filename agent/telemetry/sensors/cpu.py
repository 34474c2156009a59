"""How busy the CPU was: the kernel's own counters of CPU time, else psutil's. Unprivileged."""

import re
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.process.machine import optional, psutil_cpu_times
from agent.telemetry.sensors.mach import MachHost
from agent.telemetry.sensors.reading import known
from agent.telemetry.sensors.source import file_bytes
from agent.telemetry.sensors.system_library import LIBRARY

HOST_CPU_LOAD_INFO = 3
_MAC_KINDS = ("user", "system", "idle", "nice")
_LINUX_KINDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
_STAT = re.compile(rb"cpu +(\d{1,19}(?: \d{1,19}){3,9})\n")

Times = dict[str, float]


def parse_proc_stat(raw: bytes) -> Times | None:
    """Ticks of all cores by kind since boot, from /proc/stat; None for anything else. Kernels add kinds at the end."""
    if (match := _STAT.match(raw)) is None:
        return None
    return {name: float(ticks) for name, ticks in zip(_LINUX_KINDS, match[1].split(), strict=False)}


class CpuTimes:
    """CPU time by kind since some start, in one unit; None when no source tells it."""

    def __init__(
        self,
        platform: str = sys.platform,
        *,
        library: str = LIBRARY,
        stat: Path = Path("/proc/stat"),
        last: Callable[[], Times | None] = psutil_cpu_times,
    ) -> None:
        self._is_mac, self._library, self._stat, self._last = platform == "darwin", library, stat, last
        self._host: MachHost | None = None

    def __call__(self) -> Times | None:
        return optional(self._mac if self._is_mac else self._linux) or self._last()

    def _mac(self) -> Times:
        self._host = self._host or MachHost(self._library)
        ticks = struct.unpack_from("<4I", self._host.words("host_statistics", HOST_CPU_LOAD_INFO, len(_MAC_KINDS)))
        return dict(zip(_MAC_KINDS, map(float, ticks), strict=True))

    def _linux(self) -> Times:
        return known(parse_proc_stat(file_bytes(self._stat)), f"{self._stat}: unexpected content")


class CpuUse:
    """CPU use since the last look. Counters of its own: psutil.cpu_percent keeps its state per thread, and readings
    come from any thread."""

    def __init__(self, times: Callable[[], Times | None] | None = None) -> None:
        self._times = times or CpuTimes()
        self._before = self._times()

    @property
    def known(self) -> bool:
        """Whether the last look found a source."""
        return self._before is not None

    def busy_ppm(self) -> int | None:
        """Millionths of the time since the last call that were not idle; None where that is not known."""
        before, self._before = self._before, self._times()
        return None if before is None or self._before is None else busy_ppm(before, self._before)


def busy_ppm(before: Mapping[str, float], after: Mapping[str, float]) -> int | None:
    """CPU time between two readings that was not idle, in millionths; None when no time has passed or a counter
    wrapped: macOS counts ticks in 32 bits."""
    if before.keys() != after.keys():
        return None  # of two sources
    # guest time is part of user time on Linux
    spent = {name: after[name] - before[name] for name in after if not name.startswith("guest")}
    total = sum(spent.values())
    if total <= 0 or spent.get("idle", 0.0) < 0:
        return None
    idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
    return round(min(1.0, max(0.0, 1 - idle / total)) * 1e6)
