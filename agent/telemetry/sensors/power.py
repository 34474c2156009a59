"""Power and energy, each kind under its own name and never substituted: the whole system (the SMC's PSTR), and the
chip's parts (IOReport, powermetrics, RAPL). Metered outlets are read for the rack as a whole:
agent/telemetry/meters/rack.py. Missing values stay missing; nothing is estimated here.
"""

import re
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from agent.telemetry.gauge import Gauge, Seen
from agent.telemetry.sensors.chip import MACMON_SOURCE, Chip
from agent.telemetry.sensors.cpu import CpuTimes, Times, busy_ppm
from agent.telemetry.sensors.reading import MOST_OVER_SYSTEM, MOST_W, Failure, Reading, Source, number
from agent.telemetry.sensors.source import Guarded, bytes_or_none, file_bytes
from agent.telemetry.sensors.sysctl import Sysctl
from shared.records import HostSample

BUSY_SHARE = 0.01
"""A CPU this busy uses energy; a counter that does not advance meanwhile is broken (as in macOS 27)."""
COVERS = 0.9
"""Power known for this share of a window gives the window's energy; otherwise counters do, where there are any."""
LEAST_SPAN_S = 10.0
"""IOReport's counters are means over less time than this: an M5 Max publishes them every two seconds or so."""
MOST_MJ = 1e15
STALLED_BELOW = 0.5
"""Counters that saw less than this share of another source's watts stood still for a part of the time."""
ONE_DIE = (1, 1, 0)
"""zeus-apple-silicon up to this version keeps the counter of one die where a chip has several (DIE_0_, DIE_1_)."""


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

    least_span_s = 0.0

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


def chip_name() -> str:
    """The chip's name on macOS; "" where it cannot be read."""
    try:
        return Sysctl().text("machdep.cpu.brand_string")
    except Failure:
        return ""


class IoReport:
    """macOS energy counters without root, through zeus-apple-silicon where it is installed. ``chip`` is the machine's,
    ``version`` the library's."""

    least_span_s = LEAST_SPAN_S

    def __init__(self, chip: Callable[[], str] = chip_name, version: Callable[[], str] | None = None) -> None:
        self._monitor: Any = None
        self._chip, self._version = chip, version or (lambda: metadata.version("zeus-apple-silicon"))
        self.wraps: dict[str, int] = {}

    def read(self) -> Energy:
        if self._monitor is None:
            try:
                import zeus_apple_silicon  # optional, macOS only
            except ImportError:
                why = "ioreport: zeus-apple-silicon is not installed (pip install zeus-apple-silicon)"
                raise Failure(why) from None
            if counts_one_die(chip := self._chip(), version := self._version()):
                raise Failure(f"ioreport: zeus-apple-silicon {version} counts one die only, and an {chip} has several")
            self._monitor = zeus_apple_silicon.AppleEnergyMonitor()
        return energy_of(self._monitor.get_cumulative_energy())


def counts_one_die(chip: str, version: str) -> bool:
    """Whether this version of zeus-apple-silicon misses a part of this chip: an Ultra is two dies."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return bool(re.search(r"\bUltra\b", chip)) and numbers <= ONE_DIE


def energy_of(metrics: object) -> Energy:
    """CPU, GPU and neural engine of an AppleEnergyMetrics (millijoules); a chip may lack some. DRAM is left out,
    because no other source of chip power counts it. Raises Failure when the CPU's is missing."""
    names = {"cpu": "cpu_total_mj", "gpu": "gpu_mj", "ane": "ane_mj"}
    found = {part: number(getattr(metrics, name, None), MOST_MJ) for part, name in names.items()}
    parts = {part: round(value * 1000) for part, value in found.items() if value is not None}
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
        cpu_times: Callable[[], Times | None] | None = None,
    ) -> None:
        self._chip = chip
        self._counters = counters or (IoReport() if platform == "darwin" else Rapl())
        self._powermetrics, self._clock, self._cpu_times = powermetrics, clock, cpu_times or CpuTimes(platform)
        self._system, self._soc = Gauge(), Gauge()
        self._past: deque[tuple[float, Energy, Times | None]] = deque()
        self._problem = ""
        self._closed_s, self._whole = clock(), "PSTR"
        self._guard = Guarded("ioreport" if platform == "darwin" else "rapl", clock)

    def poll(self) -> None:
        now, reading = self._clock(), self._chip.read()
        self._system.add(now, reading.system_w if reading is not None else None)
        if reading is not None:
            self._whole = "macmon" if reading.source == MACMON_SOURCE else "PSTR"
            self._problem = reading.power_problem or self._problem
        if (watts := self._powermetrics()) is None and reading is not None:
            watts = reading.soc_w
        self._soc.add(now, watts)

    def read(self) -> Reading:
        self.poll()
        now, failed = self._clock(), dict[str, str]()
        window_s, self._closed_s = now - self._closed_s, now
        system, soc = self._system.close(now), self._soc.close(now)
        if self._problem:
            failed["macmon"], self._problem = self._problem, ""
        watts = self._counted_w(now, failed)
        if watts is not None and (stalled := _stalled(watts, soc, window_s)):
            failed[self._guard.name], watts = stalled, None
        soc_w = watts if watts is not None else soc.mean if soc is not None else None
        if system is not None and soc_w is not None and soc_w > MOST_OVER_SYSTEM * system.most:
            failed["soc_power"] = f"{soc_w:.1f} W, more than the whole system's power"
            watts = soc = soc_w = None
        energy = _energy(system, watts, soc, window_s=window_s, names=(self._whole, self._guard.name))
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
        why = (reading.power_problem if reading is not None else "") or "no reading of system power"
        system = Source("PSTR", "" if watts else why, f"{watts:.1f} W" if watts else "")
        return [system, Source(self._guard.name, self._guard.reason, seen)]

    def _counted_w(self, now: float, failed: dict[str, str]) -> float | None:
        """Mean watts by the chip's counters: since the last window, or longer where windows are too short for them."""
        energy, cpu = self._guard.call(self._counters.read), self._cpu_times()
        if energy is None:
            self._past.clear()
            return None
        from_s = now - self._counters.least_span_s
        while len(self._past) > 1 and self._past[1][0] <= from_s:
            self._past.popleft()
        before = self._past[0] if self._past else (now, energy, cpu)
        self._past.append((now, energy, cpu))
        if before[0] > from_s or before[0] >= now:
            return None
        spent = spent_uj(before[1], energy, busy=_busy(before[2], cpu), wraps=self._counters.wraps)
        if spent is None:
            failed[self._guard.name] = "energy counters stalled while the CPU was busy, or ran backwards"
        elif spent > MOST_W * 1e6 * (now - before[0]):
            failed[self._guard.name], spent = "energy counters jumped", None
        if spent is None:
            # of no use for what follows either
            self._past = deque([(now, energy, cpu)])
            return None
        return spent / (now - before[0]) / 1e6


def _busy(before: Times | None, now: Times | None) -> float:
    """The busy share of all CPU time between two readings. 1.0 where it cannot be read: no CPU runs without energy."""
    if before is None or now is None:
        return 1.0
    return (busy_ppm(before, now) or 0) / 1e6


def _stalled(watts: float, soc: Seen | None, window_s: float) -> str:
    """Why counters are not believed against watts that were read all the time; "" if they are."""
    covers = soc is not None and soc.covered_s >= COVERS * window_s
    if soc is None or not covers or watts >= STALLED_BELOW * soc.mean:
        return ""
    return f"energy counters stalled: {watts:.1f} W, where another source has {soc.mean:.1f} W"


def _energy(
    system: Seen | None, watts: float | None, soc: Seen | None, *, window_s: float, names: tuple[str, str]
) -> tuple[int, str] | None:
    """Millijoules of the window, and the source: the one that sees most of the machine over most of the time. ``watts``
    are those of the counters; ``names`` those of the system's watts and of the counters."""
    whole, counter = names
    covers = system is not None and system.covered_s >= COVERS * window_s
    if system is not None and system.covered_s > 0 and (covers or watts is None):
        return round(system.mean * system.covered_s * 1000), whole
    if watts is not None:
        return round(watts * window_s * 1000), counter
    if soc is not None and soc.covered_s > 0:
        return round(soc.mean * soc.covered_s * 1000), "soc_estimate"
    return None
