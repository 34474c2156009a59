"""Power and energy, each kind under its own name and never substituted: the whole system (the SMC's PSTR), and the
chip's parts (IOReport, powermetrics, RAPL). Metered outlets are read for the rack as a whole:
agent/telemetry/meters/rack.py. Missing values stay missing; nothing is estimated here.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from agent.telemetry.gauge import Gauge, Seen
from agent.telemetry.sensors.chip import MACMON_SOURCE, Chip
from agent.telemetry.sensors.cpu import CpuUse
from agent.telemetry.sensors.reading import MOST_W, Failure, Reading, Source
from agent.telemetry.sensors.source import Guarded, bytes_or_none, file_bytes
from shared.records import HostSample

BUSY_SHARE = 0.01
"""A CPU this busy uses energy; a counter that does not advance meanwhile is broken (as in macOS 27)."""
COVERS = 0.9
"""Power known for this share of a window gives the window's energy; otherwise counters do, where there are any."""
MOST_OVER_SYSTEM = 1.1
"""The parts draw no more than the whole system, with 10 % tolerance."""


class Energy(NamedTuple):
    """Microjoules since an arbitrary start, by part."""

    parts: dict[str, int]


def parse_energy_uj(raw: bytes) -> int | None:
    """A RAPL counter in microjoules; None for a truncated line or anything else."""
    match = re.fullmatch(rb"(\d{1,19})\n", raw)
    return int(match[1]) if match else None


def spent_uj(before: Energy, now: Energy, *, busy: float, wraps: dict[str, int] | None = None) -> int | None:
    """Energy between two readings; None when a counter ran backwards, the set of parts changed, or the CPU's counter
    did not advance while the CPU was busy."""
    if before.parts.keys() != now.parts.keys():
        return None
    total = 0
    for name, after in now.parts.items():
        spent = after - before.parts[name]
        if spent < 0 and before.parts[name] > (whole := (wraps or {}).get(name, 0)) / 2:
            spent += whole  # wrapped around; a drop from the lower half is a reset
        if spent < 0 or (name == "cpu" and spent == 0 and busy > BUSY_SHARE):
            return None
        total += spent
    return total


class Rapl:
    """Linux energy counters of CPU packages. Raises Failure where none can be read."""

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        self._powercap = powercap
        self.wraps: dict[str, int] = {}

    def read(self) -> Energy:
        parts = {}
        for path in sorted(self._powercap.glob("intel-rapl:[0-9]*/energy_uj")):
            if path.parent.name.count(":") > 1 or not bytes_or_none(path.parent / "name").startswith(b"package"):
                continue  # a subdomain of a package, or the whole platform: both would be counted twice
            if (counter := parse_energy_uj(file_bytes(path))) is not None:
                parts[path.parent.name] = counter
                self.wraps[path.parent.name] = parse_energy_uj(bytes_or_none(path.parent / "max_energy_range_uj")) or 0
        if not parts:
            raise Failure("rapl: no readable energy counter found")
        return Energy(parts)


class IoReport:
    """macOS energy counters without root, through zeus-apple-silicon where it is installed."""

    def __init__(self) -> None:
        self._monitor: Any = None
        self.wraps: dict[str, int] = {}

    def read(self) -> Energy:
        if self._monitor is None:
            try:
                import zeus_apple_silicon  # optional, macOS only
            except ImportError:
                why = "ioreport: zeus-apple-silicon is not installed (pip install zeus-apple-silicon)"
                raise Failure(why) from None
            self._monitor = zeus_apple_silicon.AppleEnergyMonitor()
        return energy_of(self._monitor.get_cumulative_energy())


def energy_of(metrics: object) -> Energy:
    """CPU, GPU and neural engine of an AppleEnergyMetrics (millijoules); a chip may lack some. DRAM is left out,
    because no other source of chip power counts it. Raises Failure when the CPU's is missing."""
    names = {"cpu": "cpu_total_mj", "gpu": "gpu_mj", "ane": "ane_mj"}
    found = {part: getattr(metrics, name, None) for part, name in names.items()}
    parts = {
        part: round(value * 1000) for part, value in found.items() if isinstance(value, int | float) and value >= 0
    }
    if "cpu" not in parts:
        raise Failure("ioreport: no CPU energy counter")
    return Energy(parts)


class PowerCollector:
    """Means over the window, and energy from the best available source: system power over time, else the chip's
    counters. ``powermetrics`` returns the chip's last power, None where it does not run."""

    name = "power"

    def __init__(
        self,
        chip: Chip,
        platform: str = sys.platform,
        *,
        counters: Rapl | IoReport | None = None,
        powermetrics: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        cpu: CpuUse | None = None,
    ) -> None:
        self._chip = chip
        self._counters = counters or (IoReport() if platform == "darwin" else Rapl())
        self._powermetrics, self._clock, self._cpu = powermetrics, clock, cpu or CpuUse()
        self._system, self._soc = Gauge(), Gauge()
        self._last: tuple[float, Energy] | None = None
        self._closed_s, self._whole = clock(), "PSTR"
        self._guard = Guarded("ioreport" if platform == "darwin" else "rapl", clock)

    def poll(self) -> None:
        now, reading = self._clock(), self._chip.read()
        self._system.add(now, reading.system_w if reading is not None else None)
        if reading is not None:
            self._whole = "macmon" if reading.source == MACMON_SOURCE else "PSTR"
        if (watts := self._powermetrics()) is None and reading is not None:
            watts = reading.soc_w
        self._soc.add(now, watts)

    def read(self) -> Reading:
        self.poll()
        now, failed = self._clock(), dict[str, str]()
        system, soc = self._system.close(now), self._soc.close(now)
        counted = self._counted(now, failed)
        soc_w = counted[0] / counted[1] / 1e6 if counted is not None else soc.mean if soc is not None else None
        if system is not None and soc_w is not None and soc_w > MOST_OVER_SYSTEM * system.most:
            failed["soc_power"] = f"{soc_w:.1f} W, more than the whole system's power"
            counted = soc = soc_w = None
        window_s, self._closed_s = now - self._closed_s, now
        energy = _energy(system, counted, soc, window_s=window_s, names=(self._whole, self._guard.name))
        sample = HostSample(
            system_power_mw=round(system.mean * 1000) if system is not None else None,
            system_power_max_mw=round(system.most * 1000) if system is not None else None,
            soc_power_mw=round(soc_w * 1000) if soc_w is not None else None,
            energy_mj=energy[0] if energy else None,
            energy_source=energy[1] if energy else None,
        )
        return Reading(sample, {**failed, **({self._guard.name: self._guard.reason} if self._guard.reason else {})})

    def sources(self) -> list[Source]:
        energy = self._guard.call(self._counters.read)
        seen = ", ".join(f"{part} {uj / 1e6:.0f} J" for part, uj in energy.parts.items()) if energy else ""
        reading = self._chip.read()
        watts = reading.system_w if reading is not None else None
        system = Source("PSTR", "" if watts else "no reading of system power", f"{watts:.1f} W" if watts else "")
        return [system, Source(self._guard.name, self._guard.reason, seen)]

    def _counted(self, now: float, failed: dict[str, str]) -> tuple[int, float] | None:
        """Microjoules and seconds since the last window, from the chip's counters."""
        busy = (self._cpu.busy_ppm() or 0) / 1e6  # where that is unknown, no counter is called stuck
        energy = self._guard.call(self._counters.read)
        before, self._last = self._last, (now, energy) if energy is not None else None
        if before is None or energy is None or now <= before[0]:
            return None
        if (spent := spent_uj(before[1], energy, busy=busy, wraps=self._counters.wraps)) is None:
            failed[self._guard.name] = "energy counters stuck or ran backwards"
            return None
        if spent > MOST_W * 1e6 * (now - before[0]):
            failed[self._guard.name] = "energy counters jumped"
            return None
        return spent, now - before[0]


def _energy(
    system: Seen | None, counted: tuple[int, float] | None, soc: Seen | None, *, window_s: float, names: tuple[str, str]
) -> tuple[int, str] | None:
    """Millijoules of the window, and the source: the one that sees most of the machine over most of the time. ``names``
    are those of the system's watts and of the counters."""
    whole, counter = names
    covers = system is not None and system.covered_s >= COVERS * window_s
    if system is not None and system.covered_s > 0 and (covers or counted is None):
        return round(system.mean * system.covered_s * 1000), whole
    if counted is not None:
        return counted[0] // 1000, counter
    if soc is not None and soc.covered_s > 0:
        return round(soc.mean * soc.covered_s * 1000), "soc_estimate"
    return None
