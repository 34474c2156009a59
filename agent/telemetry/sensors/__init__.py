"""Sensors of the machine, one file per source: pure ``parse_*`` functions first, then a reader."""

from pathlib import Path

from agent.telemetry.sensors.chip import Chip
from agent.telemetry.sensors.host import HostCollector
from agent.telemetry.sensors.memory import MemoryCollector
from agent.telemetry.sensors.power import PowerCollector
from agent.telemetry.sensors.powermetrics import Powermetrics, PowermetricsStream
from agent.telemetry.sensors.reading import Collector
from agent.telemetry.sensors.thermal import ThermalCollector


class Sensors:
    """Every collector of this machine, in the order of the report; disk space is that of ``folder``'s file system. Must
    be closed."""

    def __init__(self, folder: Path = Path("/")) -> None:
        self._powermetrics = PowermetricsStream.if_allowed()
        chip = Chip()
        self.thermal = ThermalCollector(
            chip, powermetrics=lambda: self._sample().level, also_failed=self._powermetrics_failed
        )
        power = PowerCollector(chip, powermetrics=self._soc_w)
        self.all: tuple[Collector, ...] = (HostCollector(folder), MemoryCollector(), self.thermal, power)

    def close(self) -> None:
        """Release all resources."""
        self.thermal.close()
        if self._powermetrics is not None:
            self._powermetrics.close()

    def _sample(self) -> Powermetrics:
        found = self._powermetrics.last() if self._powermetrics is not None else None
        return found or Powermetrics(elapsed_ns=0)

    def _powermetrics_failed(self) -> dict[str, str]:
        reason = self._powermetrics.guard.reason if self._powermetrics is not None else ""
        return {"powermetrics": reason} if reason else {}

    def _soc_w(self) -> float | None:
        soc_mw = self._sample().soc_mw
        return None if soc_mw is None else soc_mw / 1000
