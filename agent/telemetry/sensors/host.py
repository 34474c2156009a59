"""CPU, disk, and the identity of this machine."""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from agent.telemetry.sensors import sysctl
from agent.telemetry.sensors.reading import Failure, Reading, Source, text_of
from agent.telemetry.sensors.source import bytes_or_none, command_bytes
from shared.batch import MAX_COUNT
from shared.records import Hardware, HostSample

_SYSCTLS = (
    *("hw.model", "machdep.cpu.brand_string", "hw.memsize", "hw.nperflevels"),
    *("hw.perflevel0.logicalcpu", "hw.perflevel1.logicalcpu", "kern.osproductversion", "kern.osversion"),
)


class HostCollector:
    """CPU use since the last reading, and free space on the file system of ``folder`` (models and spool)."""

    name = "host"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # psutil.cpu_percent keeps its state per thread, and readings come from any thread
        self._last = psutil.cpu_times()

    def poll(self) -> None:
        """Nothing to poll: the system counts CPU time."""

    def sources(self) -> list[Source]:
        reading = self.read()
        free = reading.sample.disk_free_bytes or 0
        return [Source("CPU and disk", reading.failed.get("disk", ""), f"{free / 1e9:.0f} GB free")]

    def read(self) -> Reading:
        before, self._last = self._last, psutil.cpu_times()
        # the folder does not exist before the first start
        there = next(one for one in (self._folder, *self._folder.parents) if one.exists())
        free, share = psutil.disk_usage(str(there)).free, busy_ppm(before._asdict(), self._last._asdict())
        if free > MAX_COUNT:
            # some network file systems report exabytes, which exceeds the field's range
            over = f"{free / 1e12:.0f} TB free exceeds the largest value of a window"
            return Reading(HostSample(cpu_ppm=share), {"disk": over})
        return Reading(HostSample(cpu_ppm=share, disk_free_bytes=free), {})


def busy_ppm(before: dict[str, float], after: dict[str, float]) -> int | None:
    """CPU time between two readings that was not idle, in millionths; None when no time has passed."""
    # guest time is part of user time on Linux
    spent = {name: after[name] - before.get(name, 0.0) for name in after if not name.startswith("guest")}
    total = sum(spent.values())
    if total <= 0:
        return None
    idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
    return round(min(1.0, max(0.0, 1 - idle / total)) * 1e6)


def hardware_id() -> str:
    """A stable, hashed id of this machine, to detect a copied disk; "unknown" where there is none."""
    found = ""
    if sys.platform != "darwin":
        found = text_of(bytes_or_none(Path("/etc/machine-id"))).strip()
    else:
        with contextlib.suppress(Failure):
            text = text_of(command_bytes("/usr/sbin/ioreg", "-rd1", "-c", "IOPlatformExpertDevice"))
            match = re.search(r'"IOPlatformUUID" = "([^"]+)"', text)
            found = match[1] if match else ""
    return hashlib.sha256(f"mlxrack:{found}".encode()).hexdigest()[:16] if found else "unknown"


def boot_id() -> str:
    """Changes with every boot; "" where it cannot be read."""
    if sys.platform != "darwin":
        return text_of(bytes_or_none(Path("/proc/sys/kernel/random/boot_id"))).strip()
    with contextlib.suppress(Failure):
        return text_of(command_bytes("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")).strip()
    return ""


def hardware(platform: str = sys.platform, run: Callable[..., bytes] = command_bytes) -> Hardware:
    """Description of this machine, sent once per start and day; contains no serial number and no personal name."""
    memory = psutil.virtual_memory().total
    if platform != "darwin":
        cores = psutil.cpu_count(logical=True) or 0
        return Hardware(model="", chip=_linux_chip(), memory_bytes=memory, cores=(cores,), system=_linux_system())
    values: dict[str, str] = {}
    with contextlib.suppress(Failure):
        # -i: a name that this system lacks must not fail the others
        values = sysctl.parse_sysctl(run("/usr/sbin/sysctl", "-i", *_SYSCTLS))
    if not values.get("machdep.cpu.brand_string") or not values.get("hw.model"):
        with contextlib.suppress(Failure):
            values = {**sysctl.parse_system_profiler(run("/usr/sbin/system_profiler", "SPHardwareDataType")), **values}
    return hardware_of(values, memory)


def hardware_of(values: dict[str, str], memory_bytes: int) -> Hardware:
    """From macOS sysctl. ``cores`` by tier, fastest first: the names of tiers differ between chips."""
    tiers = sorted(name for name in values if re.fullmatch(r"hw\.perflevel\d\.logicalcpu", name))
    cores = [sysctl.parse_integer(values[name]) for name in tiers]
    version = f"macOS {values.get('kern.osproductversion', '')} {values.get('kern.osversion', '')}"
    return Hardware(
        model=values.get("hw.model", ""),
        chip=values.get("machdep.cpu.brand_string", ""),
        memory_bytes=sysctl.parse_integer(values.get("hw.memsize", "")) or memory_bytes,
        cores=tuple(count for count in cores if count is not None and 0 < count < 1024),
        system=" ".join(version.split()),
    )


def _linux_chip() -> str:
    match = re.search(r"^model name\s*: (.+)\n", text_of(bytes_or_none(Path("/proc/cpuinfo"))), re.MULTILINE)
    return match[1].strip() if match else ""


def _linux_system() -> str:
    return f"Linux {os.uname().release}"
