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
        psutil.cpu_percent(None)  # the first call has nothing to compare with

    def read(self) -> Reading:
        fields = {
            "cpu_ppm": int(psutil.cpu_percent(None) * 10_000),
            "disk_free_bytes": psutil.disk_usage("/").free,
        }
        return Reading(fields, {})


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
