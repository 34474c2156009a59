"""Temperatures, fans and power of the chip, from the best available source: the SMC, else macmon; on Linux hwmon and
thermal zones. One reading is shared by all collectors."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.telemetry.sensors import smc
from agent.telemetry.sensors.child import FIRST_S, Child
from agent.telemetry.sensors.macmon import Macmon, parse_macmon
from agent.telemetry.sensors.reading import MOST_RPM, Failure, Source, text_of
from agent.telemetry.sensors.source import Guarded, bytes_or_none, preferred

FRESH_S = 0.5
"""Collectors that read within this time share one reading."""
CLOSE_S = 1.0
MACMON_S = 2
MACMON_SOURCE = "macmon (unfiltered means)"
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


class ChipReading(msgspec.Struct, frozen=True, kw_only=True):
    """Degrees Celsius (hottest of each kind), revolutions per minute, watts; None where not measured. ``power_problem``
    says why watts that the source has are not believed."""

    source: str
    package_c: float | None = None
    pcore_c: float | None = None
    gpu_c: float | None = None
    pcore_asleep: bool = False
    fans_rpm: tuple[int, ...] = ()
    system_w: float | None = None
    soc_w: float | None = None
    power_problem: str = ""


def of_smc(values: dict[str, float]) -> ChipReading:
    """From the SMC's keys."""
    hottest = smc.temperatures(values)
    return ChipReading(
        source="smc",
        package_c=hottest.package_c,
        pcore_c=hottest.pcore_c,
        gpu_c=hottest.gpu_c,
        pcore_asleep=hottest.pcore_asleep,
        fans_rpm=smc.fans_rpm(values),
        system_w=smc.system_power_w(values),
    )


def of_macmon(line: Macmon) -> ChipReading:
    """From macmon, whose temperatures are unfiltered means."""
    return ChipReading(
        source=MACMON_SOURCE,
        package_c=line.cpu_mean_c,
        gpu_c=line.gpu_mean_c,
        fans_rpm=line.fans_rpm,
        system_w=line.system_w,
        soc_w=line.soc_w,
        power_problem=line.problem,
    )


def parse_millidegrees(raw: bytes) -> float | None:
    """Degrees Celsius from a thermal zone or a hwmon sensor; None for implausible values."""
    text = text_of(raw).strip()
    if not text.lstrip("-").isdigit() or len(text) > 8 or not raw.endswith(b"\n"):
        return None
    celsius = int(text) / 1000
    return celsius if 1.0 <= celsius < 130.0 else None


def parse_rpm(raw: bytes) -> int | None:
    """Revolutions per minute from a hwmon fan."""
    text = text_of(raw).strip()
    return int(text) if text.isdigit() and int(text[:9]) <= MOST_RPM and raw.endswith(b"\n") else None


class Chip:
    """``read`` returns the current reading, None when there is none."""

    def __init__(
        self,
        platform: str = sys.platform,
        *,
        sys_class: Path = Path("/sys/class"),
        open_smc: Callable[[], smc.Smc] = smc.Smc,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_mac = platform == "darwin"
        self._sys_class, self._open_smc, self._clock = sys_class, open_smc, clock
        # thermal and power read from their own threads
        self._lock = threading.Lock()
        self._smc: smc.Smc | None = None
        self._macmon: MacmonPipe | None = None
        self._last: tuple[float, ChipReading | None] | None = None
        names = ("smc", "macmon") if self._is_mac else ("hwmon",)
        self.guards = {name: Guarded(name, clock) for name in names}
        self._answered = ""

    def read(self) -> ChipReading | None:
        """The reading of the first source that answers."""
        with self._lock:
            now = self._clock()
            if self._last is None or now - self._last[0] > FRESH_S:
                self._last = (now, self._read())
            return self._last[1]

    @property
    def failed(self) -> dict[str, str]:
        """Why sources failed: all of them when none answers, else those preferred to the one that does."""
        return {guard.name: guard.reason for guard in preferred(self.guards.values(), self._answered) if guard.reason}

    def sources(self) -> list[Source]:
        """Every source, read now."""
        found = []
        for name, read in self._readers().items():
            with self._lock:
                reading = self.guards[name].call(read)
            reason = self.guards[name].reason or ("" if reading else "no reading yet")
            found.append(Source(name, reason, _seen(reading) if reading else ""))
        return found

    def close(self) -> None:
        """Release all resources, unless a system call hangs: it must not block the agent's exit."""
        if not self._lock.acquire(timeout=CLOSE_S):
            return
        try:
            if self._smc is not None:
                self._smc.close()
            if self._macmon is not None:
                self._macmon.close()
        finally:
            self._lock.release()

    def _read(self) -> ChipReading | None:
        for name, read in self._readers().items():
            if (found := self.guards[name].call(read)) is not None:
                self._answered = name
                if name != "macmon" and self._macmon is not None:
                    # its output would no longer be read, and stale output would later be taken for current
                    self._macmon.close()
                    self._macmon = None
                return found
        self._answered = ""
        return None

    def _readers(self) -> dict[str, Callable[[], ChipReading | None]]:
        return {"smc": self._read_smc, "macmon": self._read_macmon} if self._is_mac else {"hwmon": self._read_linux}

    def _read_smc(self) -> ChipReading:
        if self._smc is None:
            self._smc = self._open_smc()
        try:
            return of_smc(self._smc.values())
        except Failure:
            # reopened at the next reading
            self._smc.close()
            self._smc = None
            raise

    def _read_macmon(self) -> ChipReading | None:
        if self._macmon is None:
            self._macmon = MacmonPipe(self._clock)
        return of_macmon(last) if (last := self._macmon.last()) is not None else None

    def _read_linux(self) -> ChipReading:
        sensors, fans = self._hwmon()
        if not sensors:
            zones = sorted((self._sys_class / "thermal").glob("thermal_zone*/temp"))
            found = [parse_millidegrees(bytes_or_none(path)) for path in zones]
            sensors = {"zones": [celsius for celsius in found if celsius is not None]}
        cpu = [t for name in _CPU_SENSORS for t in sensors.get(name, [])]
        hottest = max(cpu or [t for group in sensors.values() for t in group], default=None)
        if hottest is None and not fans:
            raise Failure("no hwmon sensor and no thermal zone found")
        return ChipReading(source="hwmon", package_c=hottest, fans_rpm=tuple(fans))

    def _hwmon(self) -> tuple[dict[str, list[float]], list[int]]:
        sensors: dict[str, list[float]] = {}
        fans: list[int] = []
        for folder in sorted((self._sys_class / "hwmon").glob("hwmon*")):
            name = text_of(bytes_or_none(folder / "name")).strip()
            found = [parse_millidegrees(bytes_or_none(path)) for path in sorted(folder.glob("temp*_input"))]
            if kept := [t for t in found if t is not None]:
                sensors.setdefault(name, []).extend(kept)
            speeds = [parse_rpm(bytes_or_none(path)) for path in sorted(folder.glob("fan*_input"))]
            fans += [rpm for rpm in speeds if rpm is not None]
        return sensors, fans


class MacmonPipe:
    """`macmon pipe`; its last line is the current reading. Raises Failure where it is not installed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, program: str = "macmon") -> None:
        if (path := shutil.which(program)) is None:
            raise Failure("macmon is not installed (`brew install macmon`; PyPI's macmon is another program)")
        self._child = Child((path, "pipe", "-s", "0", "-i", str(MACMON_S * 1000)), clock)
        self._clock, self._kept = clock, b""
        self._last: Macmon | None = None

    def last(self) -> Macmon | None:
        """The newest line; None while the first may still come. Raises Failure when macmon exited or prints none."""
        try:
            said = self._child.read()
        except Failure:
            self._last = None
            raise
        *lines, self._kept = (self._kept + said).split(b"\n")
        self._kept = self._kept[-65_536:]
        self._last = next((found for line in reversed(lines) if (found := parse_macmon(line))), self._last)
        if self._last is None and self._clock() - self._child.started_s > FIRST_S:
            self._child.close()
            raise Failure(f"macmon: no reading within {FIRST_S:g} s of its start")
        return self._last

    def close(self) -> None:
        """Kill the child."""
        self._child.close()


def _seen(reading: ChipReading) -> str:
    fields = msgspec.structs.asdict(reading).items()
    return json.dumps({k: v for k, v in fields if v not in (None, (), False, "") and k != "source"})
