"""SIGHUP: the configuration is to be read again, or the terminal of this program is gone."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

from agent.operator.early_hangups import heard

TERMINAL = "/dev/tty"


class Hangups:
    """Takes the signal from its construction on, or before
    if the program has imported early_hangups: one that comes before
    somebody listens is delivered then. A program that was started from a terminal ends when the terminal does, unless
    the signal was ignored (`nohup`)."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._again: Callable[[], None] = lambda: None
        self._gone: Callable[[], None] = lambda: None
        self._pending = False
        ignored = signal.signal(signal.SIGHUP, lambda number, frame: self._heard()) is signal.SIG_IGN
        self._pending = self._pending or bool(heard)
        self._has_terminal = not ignored and _is_there()

    def listen(self, again: Callable[[], None], gone: Callable[[], None]) -> None:
        """From now on call ``again`` in the running loop for each signal, or ``gone`` if there is no terminal any
        more."""
        self._loop, self._again, self._gone = asyncio.get_running_loop(), again, gone
        if self._pending:
            self._deliver()

    def _heard(self) -> None:
        self._pending = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the program is about to
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        if self._pending:  # several that came together are one
            self._pending = False
            (self._gone if self._has_terminal and not _is_there() else self._again)()


def _is_there() -> bool:
    try:
        os.close(os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
