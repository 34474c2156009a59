"""Memory: what is used, how hard the system presses, what went to swap and back.

``used`` on macOS is (active + wired + compressor) pages, by vm_stat; on Linux total minus available.
"""

import re
import sys
from pathlib import Path
from typing import Any

import psutil

from agent.collectors.reading import Reading, command_text, file_text

_PRESSURE = {1: "normal", 2: "warn", 4: "critical"}
_LINE = re.compile(r'^"?([^":]+)"?:\s+(\d+)\.?\s*$', re.MULTILINE)
_PAGE_SIZE = re.compile(r"page size of (\d+) bytes")
_SWAP = re.compile(r"\bused = (\d+(?:\.\d+)?)M\b")


def parse_vm_stat(text: str) -> dict[str, int]:
    """Bytes by label from `vm_stat`; empty when the header names no page size. Labels it does not know are kept."""
    size = _PAGE_SIZE.search(text)
    if not size:
        return {}
    return {label.strip(): int(pages) * int(size[1]) for label, pages in _LINE.findall(text)}


def used_bytes(vm_stat: dict[str, int]) -> int | None:
    """Active + wired + occupied by compressor; None when a part is missing."""
    parts = [vm_stat.get(k) for k in ("Pages active", "Pages wired down", "Pages occupied by compressor")]
    return sum(p for p in parts if p is not None) if all(p is not None for p in parts) else None


def parse_swapusage(text: str) -> int | None:
    """Used swap in bytes from `sysctl vm.swapusage`."""
    match = _SWAP.search(text)
    return int(float(match[1]) * (1 << 20)) if match else None


def parse_pressure_level(text: str) -> str:
    """`kern.memorystatus_vm_pressure_level` in words; any value but 1, 2 and 4 is unknown."""
    try:
        return _PRESSURE.get(int(text.strip().split()[-1]), "unknown")
    except (ValueError, IndexError):
        return "unknown"


def parse_psi_total_us(text: str) -> int | None:
    """Microseconds in which some task waited for memory, since boot, from /proc/pressure/memory."""
    match = re.search(r"^some .*\btotal=(\d+)\s*$", text, re.MULTILINE)
    return int(match[1]) if match else None


class MemoryCollector:
    """Memory by the platform's own counters. Swap and stall are differences since the last reading."""

    name = "memory"

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def read(self) -> Reading:
        return self._read_macos() if sys.platform == "darwin" else self._read_linux()

    def _read_linux(self) -> Reading:
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        fields: dict[str, Any] = {
            "memory_total_bytes": memory.total,
            "memory_used_bytes": memory.total - memory.available,
            "swap_used_bytes": swap.used,
            **self._since_last("swap_in_bytes", swap.sin),
            **self._since_last("swap_out_bytes", swap.sout),
        }
        text = file_text(Path("/proc/pressure/memory"))
        stalled = parse_psi_total_us(text) if text else None
        if stalled is None:
            return Reading(fields, {"psi": "no /proc/pressure/memory"})
        return Reading({**fields, **self._since_last("memory_stall_us", stalled)}, {})

    def _read_macos(self) -> Reading:
        fields: dict[str, Any] = {"memory_total_bytes": psutil.virtual_memory().total}
        failed = {}
        vm_stat = parse_vm_stat(command_text("/usr/bin/vm_stat") or "")
        used = used_bytes(vm_stat)
        if used is None:
            failed["vm_stat"] = "not readable"
        else:
            fields["memory_used_bytes"] = used
            for field, label in (("swap_in_bytes", "Swapins"), ("swap_out_bytes", "Swapouts")):
                if label in vm_stat:
                    fields.update(self._since_last(field, vm_stat[label]))
        swap = parse_swapusage(command_text("/usr/sbin/sysctl", "vm.swapusage") or "")
        if swap is None:
            failed["vm.swapusage"] = "not readable"
        else:
            fields["swap_used_bytes"] = swap
        level = command_text("/usr/sbin/sysctl", "-n", "kern.memorystatus_vm_pressure_level")
        if level is None:
            failed["kern.memorystatus_vm_pressure_level"] = "not readable"
        else:
            fields["memory_pressure"] = parse_pressure_level(level)
        return Reading(fields, failed)

    def _since_last(self, field: str, counter: int) -> dict[str, int]:
        before = self._last.get(field)
        self._last[field] = counter
        return {} if before is None or counter < before else {field: counter - before}
