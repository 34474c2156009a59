"""Power: energy counters where the system has them without root. Absent is absent; nothing is estimated here."""

import sys
import time
from pathlib import Path

from agent.collectors.reading import Reading, file_text


def parse_energy_uj(text: str) -> int | None:
    """A RAPL counter in microjoules."""
    try:
        value = int(text.strip())
    except ValueError:
        return None
    return value if value >= 0 else None


class PowerCollector:
    """Mean power of the processor package over the time since the last reading (Linux RAPL)."""

    name = "power"

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        self._powercap = powercap
        self._last: tuple[float, int] | None = None

    def read(self) -> Reading:
        if sys.platform == "darwin":
            return Reading({}, {"power": "no source without root is built in yet"})
        texts = [file_text(path) for path in sorted(self._powercap.glob("intel-rapl:[0-9]/energy_uj"))]
        counters = [c for c in (parse_energy_uj(text) for text in texts if text) if c is not None]
        if not counters:
            return Reading({}, {"rapl": "no readable energy counter"})
        now, total = time.monotonic(), sum(counters)
        before, self._last = self._last, (now, total)
        if before is None or total < before[1] or now <= before[0]:
            return Reading({}, {})
        used_uj, seconds = total - before[1], now - before[0]
        return Reading({"energy_mj": used_uj // 1000, "soc_power_mw": int(used_uj / seconds / 1000)}, {})
