"""Memory: use by kind, the system's memory pressure, swap-outs and swap-ins.

On macOS ``used`` comes from vm.py; on Linux it is total minus available. psutil is asked for none of it: on macOS its
"used" omits the compressor, its swap-ins are page-ins of any file, and in macOS 27 it raises.
"""

import re
import resource
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from agent.process import machine
from agent.telemetry.gauge import Gauge
from agent.telemetry.sensors import sysctl, vm
from agent.telemetry.sensors.reading import Failure, Reading, Source, known, merged, text_of
from agent.telemetry.sensors.source import Guarded, command_bytes, file_bytes
from agent.telemetry.sensors.system_library import LIBRARY
from shared.records import HostSample

PRESSURE_LEVEL = "kern.memorystatus_vm_pressure_level"
WIRED_LIMIT = "iogpu.wired_limit_mb"
_ORDER = ("unknown", "normal", "warn", "critical")
COMPRESSED_SHARE = 0.2
"""A fifth of memory compressed while pages go to swap: the system is short of memory, whatever its level."""
WIRED_SHARE = 0.9
"""This close to the GPU's wired-memory limit the next model does not fit."""


def parse_psi_total_us(raw: bytes) -> int | None:
    """Microseconds since boot during which some task stalled on memory, from /proc/pressure/memory."""
    match = re.search(
        r"^some avg10=\d+\.\d+ avg60=\d+\.\d+ avg300=\d+\.\d+ total=(\d{1,19})\n", text_of(raw), re.MULTILINE
    )
    return int(match[1]) if match else None


def parse_vmstat(raw: bytes) -> tuple[int, int] | None:
    """Pages swapped in and out since boot, from /proc/vmstat; None where one is missing."""
    found = {name: int(count) for name, count in re.findall(rb"^(pswpin|pswpout) (\d{1,19})\n", raw, re.MULTILINE)}
    return (found[b"pswpin"], found[b"pswpout"]) if len(found) == 2 else None


def worse(one: str, other: str) -> str:
    """The higher of two levels."""
    return max(one, other, key=_ORDER.index)


def verdict(level: str, *, swapped_out: int, compressed: float, wired: float | None) -> str:
    """The memory verdict: the worst of the kernel's level, swap-outs while a large share of memory is compressed, and
    wired memory near the GPU's limit (shares in 0..1; None where there is no limit)."""
    short = (swapped_out > 0 and compressed >= COMPRESSED_SHARE) or (wired is not None and wired >= WIRED_SHARE)
    return worse(level, "warn") if short else level


def _less(whole: int | None, part: int | None) -> int | None:
    return whole - part if whole is not None and part is not None and part <= whole else None


class MacMemory:
    """Readings of macOS, through the system library or, where that fails, its commands. Those named ``polled`` never
    run a command: they are asked every two seconds, for as long as the agent runs."""

    def __init__(self, library: str = LIBRARY, run: Callable[..., bytes] = command_bytes) -> None:
        self._library, self._run = library, run

    @cached_property
    def _sysctl(self) -> sysctl.Sysctl:
        return sysctl.Sysctl(self._library)

    @cached_property
    def _statistics(self) -> vm.HostStatistics:
        return vm.HostStatistics(self._library)

    def polled_level(self) -> str:
        """``level`` of the library. Raises Failure."""
        return sysctl.pressure_name(self._sysctl.integer(PRESSURE_LEVEL))

    def polled_vm(self) -> vm.Vm:
        """``vm`` of the library. Raises Failure."""
        return self._statistics.read()

    def total_bytes(self) -> int | None:
        """Memory of the machine; None when no source tells it."""
        return machine.memory_bytes("darwin", library=self._library)

    def level(self) -> str:
        """Name of the kernel's pressure level. Raises Failure."""
        return sysctl.pressure_name(self.integer(PRESSURE_LEVEL))

    def integer(self, name: str) -> int:
        """An integer by its sysctl name. Raises Failure."""
        try:
            return self._sysctl.integer(name)
        except Failure:
            values = sysctl.parse_sysctl(self._run("/usr/sbin/sysctl", name))
            return known(sysctl.parse_integer(values.get(name, "")), f"sysctl {name}: not an integer")

    def vm(self) -> tuple[vm.Vm, str]:
        """Memory by kind, and the source. Raises Failure."""
        try:
            return self._statistics.read(), "host_statistics64"
        except Failure:
            return known(vm.parse_vm_stat(self._run("/usr/bin/vm_stat")), "vm_stat: unexpected output"), "vm_stat"

    def swap(self) -> tuple[int, int]:
        """Total and used bytes of swap. Raises Failure."""
        try:
            return self._sysctl.swap()
        except Failure:
            raw = self._run("/usr/sbin/sysctl", "vm.swapusage")
            return known(sysctl.parse_swapusage(raw), "sysctl vm.swapusage: unexpected output")


class MemoryCollector:
    """Memory from the platform's own counters. Swap and stall are differences since the last reading."""

    name = "memory"

    def __init__(
        self,
        platform: str = sys.platform,
        mac: MacMemory | None = None,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_mac = platform == "darwin"
        self._mac = mac or MacMemory()
        self._proc, self._clock = proc, clock
        self._used = Gauge()
        self._worst = "unknown"
        self._counters: dict[str, int] = {}
        names = ("pressure", "vm", "swap", "wired_limit", "psi", "meminfo", "vmstat")
        self._guards = {name: Guarded(name, clock) for name in names}

    def poll(self) -> None:
        now = self._clock()
        if not self._is_mac:
            known_of = machine.optional(self._meminfo) or {}
            self._used.add(now, _less(known_of.get("MemTotal"), known_of.get("MemAvailable")))
            return
        self._worst = worse(self._worst, machine.optional(self._mac.polled_level) or "unknown")
        found = machine.optional(self._mac.polled_vm)
        self._used.add(now, None if found is None else found.used_bytes)

    def read(self) -> Reading:
        self.poll()
        sample = self._read_mac() if self._is_mac else self._read_linux()
        if (seen := self._used.close(self._clock())) is not None:
            used = HostSample(memory_used_bytes=round(seen.mean), memory_used_max_bytes=round(seen.most))
            sample = merged(sample, used)
        failed = {guard.name: guard.reason for guard in self._guards.values() if guard.reason}
        return Reading(sample, failed)

    def sources(self) -> list[Source]:
        reading = self.read()
        source, used = reading.sample.memory_source, reading.sample.memory_used_bytes
        seen = f"{used / 1e9:.1f} GB used" if used is not None else ""
        return [Source(source or "memory", "" if seen else "no source is readable", seen)] + [
            Source(name, why) for name, why in reading.failed.items()
        ]

    def _read_linux(self) -> HostSample:
        found = self._guards["meminfo"].call(self._meminfo) or {}
        pages = self._guards["vmstat"].call(self._swapped)
        came, left = [None, None] if pages is None else [count * resource.getpagesize() for count in pages]
        return HostSample(
            memory_total_bytes=machine.memory_bytes("linux", meminfo=self._proc / "meminfo"),
            memory_source="meminfo" if found else None,
            swap_used_bytes=_less(found.get("SwapTotal"), found.get("SwapFree")),
            swap_total_bytes=found.get("SwapTotal"),
            swap_in_bytes=self._since_last("swap_in", came),
            swap_out_bytes=self._since_last("swap_out", left),
            memory_stall_us=self._since_last("stall", self._guards["psi"].call(self._stalled_us)),
        )

    def _meminfo(self) -> dict[str, int]:
        path = self._proc / "meminfo"
        return known(machine.parse_meminfo(file_bytes(path)) or None, f"{path}: unexpected content")

    def _swapped(self) -> tuple[int, int]:
        path = self._proc / "vmstat"
        return known(parse_vmstat(file_bytes(path)), f"{path}: unexpected content")

    def _stalled_us(self) -> int:
        path = self._proc / "pressure/memory"
        return known(parse_psi_total_us(file_bytes(path)), f"{path}: unexpected content")

    def _read_mac(self) -> HostSample:
        total, now = self._mac.total_bytes(), self._guards["pressure"].call(self._mac.level)
        swap = self._guards["swap"].call(self._mac.swap)
        limit_mb = self._guards["wired_limit"].call(lambda: self._mac.integer(WIRED_LIMIT))
        limit = limit_mb << 20 if limit_mb else None  # 0 stands for the system's default, which is not published
        parts = self._parts()
        level, self._worst = worse(self._worst, now or "unknown"), "unknown"
        wired = parts.memory_wired_bytes
        whole = HostSample(
            memory_total_bytes=total,
            swap_total_bytes=swap[0] if swap is not None else None,
            swap_used_bytes=swap[1] if swap is not None else None,
            gpu_wired_limit_bytes=limit,
            memory_pressure=level,
            memory_verdict=verdict(
                level,
                swapped_out=parts.swap_out_bytes or 0,
                compressed=(parts.memory_compressed_bytes or 0) / total if total else 0.0,
                wired=wired / limit if wired is not None and limit else None,
            ),
        )
        return merged(parts, whole)

    def _parts(self) -> HostSample:
        if (found := self._guards["vm"].call(self._mac.vm)) is None:
            return HostSample()
        parts, source = found
        both = parts.swapped_in_bytes is not None and parts.swapped_out_bytes is not None
        return HostSample(
            memory_source=source,
            memory_used_bytes=parts.used_bytes,  # of this moment, unless the polls saw the whole window
            memory_used_max_bytes=parts.used_bytes,
            memory_wired_bytes=parts.wired_bytes,
            memory_compressed_bytes=parts.compressor_bytes,
            swap_in_bytes=self._since_last("swap_in", parts.swapped_in_bytes if both else None),
            swap_out_bytes=self._since_last("swap_out", parts.swapped_out_bytes if both else None),
        )

    def _since_last(self, name: str, counter: int | None) -> int | None:
        """How much a counter grew; None when it was not read, for the first time, or ran backwards."""
        before = self._counters.get(name)
        if counter is None:
            return None
        self._counters[name] = counter
        return None if before is None or counter < before else counter - before
