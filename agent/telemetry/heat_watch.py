"""Changes of the thermal pressure level become events when they happen, not at the next sample."""

import asyncio
import time
from collections.abc import Callable

from agent.telemetry.sensors.thermal import ThermalCollector
from agent.telemetry.sensors.throttle import as_record
from shared.records import Event


class HeatWatch:
    """``emit`` receives throttling that began or ended."""

    def __init__(self, thermal: ThermalCollector, emit: Callable[[Event], None]) -> None:
        self._thermal, self._emit = thermal, emit
        self._descriptor: int | None = None

    @property
    def level(self) -> int:
        """The current thermal pressure level; 0 where the system reports none."""
        return self._thermal.level or 0

    def watch(self) -> None:
        """Subscribe to the system's notifications, where it has them, unless already subscribed."""
        if self._descriptor is None:
            self._descriptor = self._thermal.descriptor()
            if self._descriptor is not None:
                asyncio.get_running_loop().add_reader(self._descriptor, self._changed)

    def close(self) -> None:
        """Unsubscribe."""
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)

    def emit_changes(self) -> None:
        """Emit the changes since the last call."""
        now_s, now_ms = time.monotonic(), time.time_ns() // 1_000_000
        for event in self._thermal.take():
            self._emit(as_record(event, now_s, now_ms))

    def _changed(self) -> None:
        self._thermal.posted()
        self.emit_changes()
