"""macOS sysctl: through the system library, or the command's output. Unprivileged."""

import re
import struct

from agent.process.machine import sysctl_bytes
from agent.telemetry.sensors.reading import Failure, known, text_of
from agent.telemetry.sensors.system_library import LIBRARY

_LINE = re.compile(r"^([A-Za-z][\w.]*): (.*)\n", re.MULTILINE)
_SWAP = re.compile(r"\btotal = (\d+\.\d\d)M  used = (\d+\.\d\d)M  free = (\d+\.\d\d)M\b")
_SPEED_LIMIT = re.compile(r"^[ \t]+CPU_Speed_Limit[ \t]+= (\d{1,3})\n", re.MULTILINE)
_PROFILE = {
    "hw.model": re.compile(r'(?:Model Identifier: |"machine_model" : ")([A-Za-z]+\d+,\d+)["\n]'),
    "machdep.cpu.brand_string": re.compile(r'(?:^ *Chip: |"chip_type" : ")([^"\n]+)["\n]', re.MULTILINE),
    "hw.memsize": re.compile(r'(?:^ *Memory: |"physical_memory" : ")(\d+ GB)["\n]', re.MULTILINE),
}
_PRESSURE = {1: "normal", 2: "warn", 4: "critical"}


def parse_sysctl(raw: bytes) -> dict[str, str]:
    """Values by name. A truncated line is ignored: half a number still parses as a number."""
    return {name: value.strip() for name, value in _LINE.findall(text_of(raw))}


def parse_swapusage(raw: bytes) -> tuple[int, int] | None:
    """Total and used bytes of swap from `vm.swapusage`; None for anything else and for inconsistent values."""
    if (match := _SWAP.search(text_of(raw))) is None:
        return None
    total, used, free = (round(float(one) * (1 << 20)) for one in match.groups())
    # each is rounded to hundredths of a MiB
    return (total, used) if abs(total - used - free) <= (1 << 20) // 25 else None


def parse_pmset_therm(raw: bytes) -> int | None:
    """The last CPU_Speed_Limit in percent of `pmset -g therm` or `-g thermlog`, which Intel Macs print. None on Apple
    Silicon, where it prints only notes, throttled or not, from which nothing can be concluded."""
    found = _SPEED_LIMIT.findall(text_of(raw))
    return int(found[-1]) if found and 0 < int(found[-1]) <= 100 else None


def parse_system_profiler(raw: bytes) -> dict[str, str]:
    """Chip, model and memory of `system_profiler SPHardwareDataType`, as text or JSON (even invalid JSON), by the names
    of ``parse_sysctl``. Serial numbers are not read."""
    text, found = text_of(raw), {}
    for name, pattern in _PROFILE.items():
        if match := pattern.search(text):
            found[name] = match[1].strip()
    if match := re.fullmatch(r"(\d+) GB", found.get("hw.memsize", "")):
        found["hw.memsize"] = str(int(match[1]) << 30)
    return found


def pressure_name(level: int | None) -> str:
    """Name of a `kern.memorystatus_vm_pressure_level`; any value but 1, 2 and 4 is unknown."""
    return _PRESSURE.get(level if level is not None else -1, "unknown")


def parse_integer(text: str) -> int | None:
    """A decimal number and nothing else."""
    text = text.strip()
    return int(text) if re.fullmatch(r"-?\d{1,20}", text) and text.isascii() else None


def swap_of(raw: bytes) -> tuple[int, int] | None:
    """Total and used bytes of swap from a struct xsw_usage; None for anything else and for inconsistent values."""
    if len(raw) < 24:
        return None
    total, free, used = struct.unpack_from("<QQQ", raw)
    return (total, used) if used <= total and free <= total else None


class Sysctl:
    """sysctlbyname(3)."""

    def __init__(self, library: str = LIBRARY) -> None:
        self._library = library

    def raw(self, name: str) -> bytes:
        """A value's bytes. Raises Failure where the function or the name does not exist."""
        try:
            return sysctl_bytes(name, self._library)
        except OSError as error:
            raise Failure(f"sysctl {name}: errno {error.errno}") from None

    def integer(self, name: str) -> int:
        """An integer of four or eight bytes. Raises Failure."""
        raw = self.raw(name)
        if len(raw) not in (4, 8):
            raise Failure(f"sysctl {name}: {len(raw)} bytes, expected 4 or 8")
        return int.from_bytes(raw, "little", signed=True)

    def text(self, name: str) -> str:
        """A string value. Raises Failure."""
        return self.raw(name).split(b"\0")[0].decode("utf-8", "replace")

    def swap(self) -> tuple[int, int]:
        """Total and used bytes of swap (struct xsw_usage). Raises Failure."""
        raw = self.raw("vm.swapusage")
        if len(raw) < 24:
            raise Failure(f"sysctl vm.swapusage: {len(raw)} bytes, expected at least 24")
        return known(swap_of(raw), "sysctl vm.swapusage: inconsistent values")
