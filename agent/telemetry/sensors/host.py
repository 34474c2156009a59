"""CPU, disk, and the identity of this machine."""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from agent.process import machine
from agent.telemetry.sensors import sysctl
from agent.telemetry.sensors.cpu import CpuUse
from agent.telemetry.sensors.reading import Failure, Reading, Source, merged, text_of
from agent.telemetry.sensors.source import bytes_or_none, command_bytes, optional_fact
from shared.batch import MAX_COUNT
from shared.records import Hardware, HostSample

_SYSCTLS = (
    *("hw.model", "machdep.cpu.brand_string", "hw.memsize", "hw.nperflevels"),
    *("hw.perflevel0.logicalcpu", "hw.perflevel1.logicalcpu", "kern.osproductversion", "kern.osversion"),
)


class HostCollector:
    """CPU use since the last reading, and free space on the file system of ``folder`` (models and spool)."""

    name = "host"

    def __init__(self, folder: Path, cpu: CpuUse | None = None) -> None:
        self._folder, self._cpu = folder, cpu or CpuUse()

    def poll(self) -> None:
        """Nothing to poll: the system counts CPU time."""

    def sources(self) -> list[Source]:
        reading = self.read()
        free = reading.sample.disk_free_bytes or 0
        return [Source("CPU and disk", "; ".join(reading.failed.values()), f"{free / 1e9:.0f} GB free")]

    def read(self) -> Reading:
        share = HostSample(cpu_ppm=self._cpu.busy_ppm())
        failed = {} if self._cpu.known else {"cpu": "no source tells CPU times"}
        if (free := machine.free_bytes(self._folder)) is None:
            return Reading(share, {**failed, "disk": f"the disk of {self._folder} does not tell its free space"})
        if free > MAX_COUNT:
            # some network file systems report exabytes, which exceeds the field's range
            over = f"{free / 1e12:.0f} TB free exceeds the largest value of a window"
            return Reading(share, {**failed, "disk": over})
        return Reading(merged(share, HostSample(disk_free_bytes=free)), failed)


@optional_fact("unknown")
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


@optional_fact("")
def boot_id() -> str:
    """Changes with every boot; "" where it cannot be read."""
    if sys.platform != "darwin":
        return text_of(bytes_or_none(Path("/proc/sys/kernel/random/boot_id"))).strip()
    with contextlib.suppress(Failure):
        return text_of(command_bytes("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")).strip()
    return ""


@optional_fact(Hardware(model="", chip="", memory_bytes=0))
def hardware(platform: str = sys.platform, run: Callable[..., bytes] = command_bytes) -> Hardware:
    """Description of this machine, sent once per start and day; contains no serial number and no personal name. What
    cannot be learnt is "" or 0."""
    memory = machine.memory_bytes() or 0
    if platform != "darwin":
        cores = (count,) if (count := os.cpu_count()) else ()
        return Hardware(model="", chip=_linux_chip(), memory_bytes=memory, cores=cores, system=_linux_system())
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
