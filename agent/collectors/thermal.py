"""Heat: the system's thermal pressure level where there is one, temperatures where they can be read.

macOS publishes a pressure level (nominal, moderate, heavy, trapping, sleeping) without root; heavy and above is what
slows a model down and counts as throttled. Linux has temperatures of thermal zones and no such level.
"""

import re
import sys
import time
from pathlib import Path
from typing import Any

from agent.collectors.reading import Reading, command_text, file_text

NOTIFY_KEY = "com.apple.system.thermalpressurelevel"
LEVELS = ("nominal", "moderate", "heavy", "trapping", "sleeping")
THROTTLED_FROM = 2
PLAUSIBLE_MC = range(1_000, 130_000)


def parse_notifyutil(text: str) -> int | None:
    """The level 0..4 that `notifyutil -g` prints after the key; None for its failures, which also exit 0."""
    match = re.fullmatch(rf"{re.escape(NOTIFY_KEY)}\s+(\d+)\s*", text.strip())
    level = int(match[1]) if match else -1
    return level if 0 <= level < len(LEVELS) else None


def parse_zone(text: str) -> int | None:
    """Thousandths of a degree Celsius from a thermal zone's ``temp`` file; None for what no chip can have."""
    try:
        value = int(text.strip())
    except ValueError:
        return None
    return value if value in PLAUSIBLE_MC else None


class ThermalCollector:
    """Level and hottest zone now; the level's time is counted from the last reading."""

    name = "thermal"

    def __init__(self, zones: Path = Path("/sys/class/thermal")) -> None:
        self._zones = zones
        self._last_s = time.monotonic()

    def read(self) -> Reading:
        now = time.monotonic()
        elapsed_us, self._last_s = int((now - self._last_s) * 1e6), now
        return self._read_macos(elapsed_us) if sys.platform == "darwin" else self._read_linux()

    def _read_linux(self) -> Reading:
        texts = [file_text(path) for path in sorted(self._zones.glob("thermal_zone*/temp"))]
        temperatures = [t for t in (parse_zone(text) for text in texts if text) if t is not None]
        if not temperatures:
            return Reading({}, {"thermal_zone": "no readable thermal zone"})
        return Reading({"package_temp_mc": max(temperatures), "thermal_source": "thermal_zone"}, {})

    def _read_macos(self, elapsed_us: int) -> Reading:
        level = parse_notifyutil(command_text("/usr/bin/notifyutil", "-g", NOTIFY_KEY) or "")
        if level is None:
            return Reading({}, {"notifyutil": "no thermal pressure level"})
        fields: dict[str, Any] = {
            "thermal_level": LEVELS[level],
            "thermal_source": "notifyutil",
            "thermal_known_us": elapsed_us,
            "throttled_us": elapsed_us if level >= THROTTLED_FROM else 0,
        }
        return Reading(fields, {})
