"""Heat: the system's thermal pressure level and its duration, temperatures and fans.

The level comes from notify(3), whose descriptor signals every change, so that none between two polls is lost; else
from notifyutil, else from powermetrics where that runs. 0 also stands for a key that was never published: verify once
on a real Mac that the level moves. Linux has temperatures but no such level.
"""

import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from agent.telemetry.gauge import Gauge
from agent.telemetry.sensors.chip import Chip
from agent.telemetry.sensors.notify import Notify
from agent.telemetry.sensors.reading import Failure, Reading, Source, known, merged, text_of
from agent.telemetry.sensors.source import Guarded, command_bytes, preferred
from agent.telemetry.sensors.sysctl import parse_pmset_therm
from agent.telemetry.sensors.throttle import LEVELS, PRESSURED_FROM, THROTTLED_FROM, Throttle, Throttled, Window
from shared.records import HostSample

NOTIFY_KEY = "com.apple.system.thermalpressurelevel"
_TEMPERATURES = {"package_temp": "package_c", "pcore_temp": "pcore_c", "gpu_temp": "gpu_c"}


def parse_notifyutil(raw: bytes) -> int | None:
    """The level 0..4 that `notifyutil -g` prints after the key; None for its failures, which exit 0, too."""
    match = re.fullmatch(rf"{re.escape(NOTIFY_KEY)}[ \t]+(\d)\n", text_of(raw))
    return level_of_state(int(match[1])) if match else None


def level_of_state(state: int) -> int | None:
    """A published number as a level; None for values that macOS does not publish."""
    return state if 0 <= state < len(LEVELS) else None


class ThermalCollector:
    """Level, temperatures and fans. ``take`` returns events; ``on_event`` is called from any thread when there are any.
    ``powermetrics`` returns its last level, None where it does not run; ``also_failed`` gives the reason where it
    should run."""

    name = "thermal"

    def __init__(
        self,
        chip: Chip,
        platform: str = sys.platform,
        *,
        notify: Callable[[], Notify] = lambda: Notify(NOTIFY_KEY),
        run: Callable[..., bytes] = command_bytes,
        powermetrics: Callable[[], int | None] = lambda: None,
        also_failed: Callable[[], dict[str, str]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chip, self._is_mac = chip, platform == "darwin"
        self._open_notify, self._run, self._powermetrics = notify, run, powermetrics
        self._also_failed, self._clock = also_failed, clock
        self._notify: Notify | None = None
        self._throttle = Throttle(clock())
        self._gauges = {name: Gauge() for name in _TEMPERATURES}
        self._source = ""
        self._events: list[Throttled] = []
        # the event loop handles changes at once while another thread polls
        self._lock = threading.Lock()
        self._guards = {name: Guarded(name, clock) for name in ("notify", "notifyutil")}
        self._readers: dict[str, Callable[[], int | None]] = {"notify": self._by_notify, "notifyutil": self._by_command}
        self.on_event: Callable[[], None] = lambda: None

    @property
    def level(self) -> int | None:
        """The last known level."""
        return self._throttle.level

    def descriptor(self) -> int | None:
        """Descriptor that is readable after the level changed (call ``posted`` then); None where unsupported."""
        if not self._is_mac:
            return None
        self._guards["notify"].call(self._by_notify)
        return self._notify.descriptor if self._notify is not None else None

    def posted(self) -> None:
        """Read the level that was just published. Runs on the event loop and starts no command."""
        if self._notify is not None:
            self._notify.drain()
            self._look_now()

    def poll(self) -> None:
        if self._is_mac and not self._look_now():
            self._look_elsewhere()
        reading, now = self._chip.read(), self._clock()
        for name, field in _TEMPERATURES.items():
            self._gauges[name].add(now, getattr(reading, field) if reading is not None else None)

    def take(self) -> list[Throttled]:
        """Events since the last call, on this collector's clock."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def read(self) -> Reading:
        self.poll()
        now, reading = self._clock(), self._chip.read()
        degrees: dict[str, int] = {}
        for name, gauge in self._gauges.items():
            if (seen := gauge.close(now)) is not None:
                degrees |= {f"{name}_mc": round(seen.most * 1000), f"{name}_mean_mc": round(seen.mean * 1000)}
        chip = HostSample(
            temp_source=reading.source if reading is not None else None,
            fan_rpm=reading.fans_rpm if reading is not None else (),
            pcore_asleep=reading is not None and reading.pcore_asleep,
            **degrees,  # type: ignore[arg-type]
        )
        sample = merged(chip, self._level_sample(now)) if self._is_mac else chip
        asked = preferred(self._guards.values(), self._source)
        failed = {guard.name: guard.reason for guard in asked if guard.reason}
        return Reading(sample, {**failed, **self._chip.failed, **self._also_failed()})

    def sources(self) -> list[Source]:
        found = []
        if self._is_mac:
            found.append(self._by_pmset())
            for name, read in self._readers.items():
                level = self._guards[name].call(read)
                found.append(Source(name, self._guards[name].reason, LEVELS[level] if level is not None else ""))
        return [*found, *(Source(name, why) for name, why in self._also_failed().items()), *self._chip.sources()]

    def close(self) -> None:
        """Release all resources."""
        if self._notify is not None:
            self._notify.close()
        self._chip.close()

    def _level_sample(self, now: float) -> HostSample:
        with self._lock:
            window = self._throttle.window(now)
            share, coverage = self._throttle.share_5m(now)
            pressured, _ = self._throttle.share_5m(now, PRESSURED_FROM)
            level = self._throttle.level
        return HostSample(
            thermal_level=LEVELS[level] if level is not None else "unknown",
            thermal_source=self._source,
            thermal_worst=LEVELS[window.worst] if window.worst is not None else "unknown",
            thermal_coverage_ppm=round(coverage * 1e6),
            throttled_5m_ppm=None if share is None else round(share * 1e6),
            pressured_5m_ppm=None if pressured is None else round(pressured * 1e6),
            **_seconds(window),
        )

    def _look_now(self) -> bool:
        """Read by notify(3), which is fast; False when it fails. Read and recorded under one lock: an older level must
        not follow a newer one."""
        with self._lock:
            level = self._guards["notify"].call(self._by_notify)
            found = self._note("notify", level) if level is not None else []
        self._tell(found)
        return level is not None

    def _look_elsewhere(self) -> None:
        """Read by a command, which may be slow, else from powermetrics' last sample."""
        source, level = "notifyutil", self._guards["notifyutil"].call(self._by_command)
        if level is None:
            level = self._powermetrics()
            source = "powermetrics" if level is not None else "unknown"
        with self._lock:
            found = self._note(source, level)
        self._tell(found)

    def _tell(self, found: list[Throttled]) -> None:
        if found:
            self.on_event()

    def _note(self, source: str, level: int | None) -> list[Throttled]:
        """Call with the lock held."""
        self._source = source
        found = self._throttle.see(self._clock(), level)
        self._events += found
        return found

    def _by_notify(self) -> int:
        if self._notify is None:
            self._notify = self._open_notify()
        return known(level_of_state(self._notify.state()), "notify(3): no thermal pressure level")

    def _by_pmset(self) -> Source:
        """Shown by `doctor` but never used: it works on Intel Macs only."""
        try:
            percent = parse_pmset_therm(self._run("/usr/bin/pmset", "-g", "therm"))
        except Failure as error:
            return Source("pmset", str(error))
        why = "reports nothing on Apple Silicon, throttled or not; not used"
        return (
            Source("pmset", why) if percent is None else Source("pmset", "", f"CPU speed limit {percent} %; not used")
        )

    def _by_command(self) -> int:
        raw = self._run("/usr/bin/notifyutil", "-g", NOTIFY_KEY)
        return known(parse_notifyutil(raw), "notifyutil: no thermal pressure level")


def _seconds(window: Window) -> dict[str, Any]:
    return {
        "thermal_known_us": round(window.known_s * 1e6),
        "thermal_level_us": tuple(round(one * 1e6) for one in window.level_s),
        "throttled_us": round(window.from_s(THROTTLED_FROM) * 1e6),
    }
