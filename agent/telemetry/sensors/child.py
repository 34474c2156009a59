"""A program that prints continuously, read without blocking: started on first use, restarted after it exited or fell
silent, and ended with the agent."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from agent.telemetry.sensors.reading import Failure

SILENT_S = 30.0
FIRST_S = 10.0
"""Time that a started program may take until its first output."""


class Child:
    """Runs ``argv`` and reads its standard output."""

    def __init__(self, argv: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._argv, self._name, self._clock = tuple(argv), Path(argv[0]).name, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._heard_s = self.started_s = 0.0

    def read(self) -> bytes:
        """Its output since the last call. Raises Failure when it cannot run or has been silent for too long; the next
        call starts it again."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdout is not None
        found = b""
        while piece := self._piece(self._process.stdout.fileno()):
            found += piece
        if found:
            self._heard_s = self._clock()
        elif self._clock() - self._heard_s > SILENT_S:
            self.close()
            raise Failure(f"{self._name}: no output for {SILENT_S:g} s")
        return found

    def close(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def _start(self) -> None:
        ended = self._process.returncode if self._process is not None else None
        self.close()
        if ended is not None:
            raise Failure(f"{self._name}: exited (status {ended})")
        try:
            self._process = subprocess.Popen(
                self._argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise Failure(f"{self._name}: {error.strerror or type(error).__name__}") from None
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._heard_s = self.started_s = self._clock()

    @staticmethod
    def _piece(descriptor: int) -> bytes:
        try:
            return os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return b""
