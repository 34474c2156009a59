"""Keeps the machine awake while the agent serves: `caffeinate` holds a power assertion of macOS for as long as this
process lives, and ends by itself when it dies in any way.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from shared.logs import get_logger

COMMAND = ("/usr/bin/caffeinate", "-i", "-s", "-w", str(os.getpid()))
"""-i against idle sleep, -s against sleep on mains power; the display may sleep, and disks as `pmset` says."""
FIRST_DELAY_S, MOST_DELAY_S = 1.0, 60.0
END_S = 2.0
"""After SIGTERM, and again after SIGKILL."""
STEADY_S = 60.0
"""A program that ran for so long is started again at once."""

log = get_logger("agent.awake")


class Awake:
    """One program that holds the assertion, started again whenever it ends. Without a ``command`` there is nothing to
    hold: other systems sleep when somebody tells them to."""

    def __init__(
        self,
        command: Sequence[str] = (),
        *,
        delay_s: float = FIRST_DELAY_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._command, self._delay_s, self._clock, self._sleep = tuple(command), delay_s, clock, sleep
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.starts, self.problem = 0, ""

    @property
    def pid(self) -> int | None:
        """Of the program that holds the assertion now."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def start(self) -> None:
        """Begin to hold it."""
        if self._command and self._task is None:
            self._task = asyncio.create_task(self._hold())

    async def close(self) -> None:
        """Let go. The program has ended when this returns."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def view(self) -> dict[str, Any]:
        """For `status`: whether it is held, by which process, how often that was started, and why it is not held."""
        state = "not_needed" if not self._command else "held" if self.pid is not None else "not_held"
        return {"state": state, "pid": self.pid, "starts": self.starts, "problem": self.problem}

    def warnings(self) -> list[str]:
        """A sentence while it should be held and is not."""
        if self.pid is not None or not self.problem:
            return []
        return [f"this machine may go to sleep: {self.problem}; set `sudo pmset -a sleep 0`"]

    async def _hold(self) -> None:
        delay_s = self._delay_s
        while True:
            began = self._clock()
            try:
                self.problem = await self._held()
            except OSError as error:
                self.problem = f"{self._command[0]} cannot be started ({error.strerror or type(error).__name__})"
            if self._clock() - began >= STEADY_S:
                delay_s = self._delay_s
            log.warning("awake_lost", reason=self.problem, again_s=delay_s)
            await self._sleep(delay_s)
            delay_s = min(2 * delay_s, MOST_DELAY_S)

    async def _held(self) -> str:
        """Run it once; how it ended. Raises OSError."""
        nothing = asyncio.subprocess.DEVNULL
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command, stdin=nothing, stdout=nothing, stderr=nothing
        )
        self.starts += 1
        log.info("awake_held", pid=process.pid)
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await _ended(process)
        return f"{self._command[0]} ended with status {status}"


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait, for a bounded time: a program that hangs must not hold the agent's own end."""
    for end in (process.kill, None):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_S)
            return
        if end is not None:
            with contextlib.suppress(ProcessLookupError):
                end()


def of_this_machine() -> Awake:
    """The one for this operating system."""
    return Awake(COMMAND if sys.platform == "darwin" else ())
