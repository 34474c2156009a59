"""The processor and the disk, and who this machine is."""

import hashlib
import re
import sys
from pathlib import Path

import psutil

from agent.collectors.reading import Reading, command_text, file_text


class HostCollector:
    """Processor use since the last reading, and the space left for models and spool."""

    name = "host"

    def __init__(self) -> None:
        # psutil's own cpu_percent remembers by thread, and readings come from any
        self._last = psutil.cpu_times()

    def read(self) -> Reading:
        before, self._last = self._last, psutil.cpu_times()
        fields = {"disk_free_bytes": psutil.disk_usage("/").free}
        share = busy_ppm(before._asdict(), self._last._asdict())
        return Reading(fields if share is None else {**fields, "cpu_ppm": share}, {})


def busy_ppm(before: dict[str, float], after: dict[str, float]) -> int | None:
    """Millionths of the processors' time between two readings that was not idle; None when no time has passed."""
    # guest time is part of user time on Linux
    spent = {name: after[name] - before.get(name, 0.0) for name in after if not name.startswith("guest")}
    total = sum(spent.values())
    if total <= 0:
        return None
    idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
    return round(min(1.0, max(0.0, 1 - idle / total)) * 1e6)


def hardware_id() -> str:
    """A stable name of this machine, hashed, so that a copied disk is noticed; "unknown" where there is none."""
    if sys.platform == "darwin":
        text = command_text("/usr/sbin/ioreg", "-rd1", "-c", "IOPlatformExpertDevice") or ""
        match = re.search(r'"IOPlatformUUID" = "([^"]+)"', text)
        found = match[1] if match else ""
    else:
        found = (file_text(Path("/etc/machine-id")) or "").strip()
    return hashlib.sha256(f"mlxrack:{found}".encode()).hexdigest()[:16] if found else "unknown"


def boot_id() -> str:
    """Changes with every boot; "" where it cannot be read."""
    if sys.platform == "darwin":
        return (command_text("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid") or "").strip()
    return (file_text(Path("/proc/sys/kernel/random/boot_id")) or "").strip()
