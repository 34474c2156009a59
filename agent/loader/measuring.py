"""Performs a calibration on a loader's engine in the moments in which it has nothing to do, one step at a time."""

import time

from agent.loader.calibration import Calibration
from agent.loader.generation import Engine
from agent.wire.frames import Calibrated, Frame


class Measuring:
    """``allowed`` is what the daemon said last. What was timed is kept when a request interrupts."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.allowed = engine, False
        self._calibration = self._begun()

    @property
    def wanted(self) -> bool:
        """Whether there is something to time, and it may be timed now."""
        return self.allowed and self._calibration is not None

    def step(self) -> list[Frame]:
        """Time one step; returns the figures after the last."""
        calibration = self._calibration
        assert calibration is not None
        began = time.perf_counter()
        task = calibration.next()
        try:
            if task is not None:
                us = self._engine.measure(task)
                calibration.learn(task, us, (time.perf_counter() - began) * 1e6)
            times = calibration.times() if calibration.done else None
        except Exception as error:  # noqa: BLE001  # an unusual model may raise anything, and serves all the same
            return self._ended(Calibrated(problem=type(error).__name__))
        if not calibration.done:
            return []
        told = self._ended(Calibrated(times=times, problem="" if times else "too slow to be timed"))
        self._calibration = self._begun()  # the daemon may want it again
        return told

    def rest(self) -> None:
        """Give back all memory, because there is something to do; it goes on when it is allowed again."""
        if self.allowed:
            self.allowed = False
            self._give_back()

    def _begun(self) -> Calibration | None:
        bounds = self._engine.bounds()
        return Calibration(bounds) if bounds is not None else None

    def _ended(self, frame: Calibrated) -> list[Frame]:
        self._calibration, self.allowed = None, False
        self._engine.rest()
        return [frame]

    def _give_back(self) -> None:
        self._engine.rest()
        if self._calibration is not None:
            self._calibration.rest()
