"""Files and commands as untrusted sources: bounded in size and time, paused after repeated failures."""

import contextlib
import functools
import itertools
import selectors
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from agent.telemetry.sensors.reading import MAX_OUTPUT_BYTES, Failure
from shared.logs import get_logger

COMMAND_TIMEOUT_S = 5.0
FAILURES_TO_PAUSE = 3
PAUSE_S = 60.0
MOST_PAUSE_S = 3600.0

P = ParamSpec("P")
T = TypeVar("T")
log = get_logger("agent.sensors")


class Guarded:
    """A source that fails three times in a row is paused, longer each time: a hanging command must not be run every two
    seconds forever."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self._clock = name, clock
        self._failures = 0
        self._not_before_s = 0.0
        self.reason = ""

    def call(self, read: Callable[[], T]) -> T | None:
        """The result of ``read``; None when it failed or is paused, and then ``reason`` says why. A ``read`` that
        returns None has nothing yet: that neither counts as a failure nor resets the count."""
        if self._clock() < self._not_before_s:
            return None
        try:
            found = read()
        except Failure as error:
            self.reason = str(error)
        except Exception as error:  # noqa: BLE001  # whatever a sensor does, the agent continues
            self.reason = type(error).__name__
        else:
            if found is not None:
                self._failures, self.reason = 0, ""
            return found
        self._failures += 1
        if self._failures >= FAILURES_TO_PAUSE:
            times = self._failures - FAILURES_TO_PAUSE
            self._not_before_s = self._clock() + min(MOST_PAUSE_S, PAUSE_S * 2 ** min(times, 10))
        return None


def preferred(guards: Iterable[Guarded], answered: str) -> Iterator[Guarded]:
    """Sources before the one that ``answered``, all when none did; the others were not tried."""
    return itertools.takewhile(lambda guard: guard.name != answered, guards)


def optional_fact(otherwise: T) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """An optional fact: what it is when its source raises, anything at all. It is logged, and the start goes on."""

    def of(ask: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(ask)
        def asked(*args: P.args, **options: P.kwargs) -> T:
            try:
                return ask(*args, **options)
            except Exception as error:  # noqa: BLE001  # no fact of this kind may stop an agent
                log.warning("fact_unknown", fact=ask.__name__, error=type(error).__name__)
                return otherwise

        return asked

    return of


def file_bytes(path: Path) -> bytes:
    """The content of a small system file. Raises Failure."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_OUTPUT_BYTES + 1)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or type(error).__name__}") from None


def bytes_or_none(path: Path) -> bytes:
    """A small system file; b"" where there is none to read."""
    with contextlib.suppress(Failure):
        return file_bytes(path)
    return b""


def command_bytes(*argv: str) -> bytes:
    """The output of a system command. Raises Failure when it is missing, fails, times out or prints too much."""
    name = Path(argv[0]).name
    try:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise Failure(f"{name}: {error.strerror or type(error).__name__}") from None
    try:
        found = _output(process, time.monotonic() + COMMAND_TIMEOUT_S)
    finally:
        # it may have ended, or hang; either way it is over here
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    if found is None:
        raise Failure(f"{name}: timed out after {COMMAND_TIMEOUT_S:g} s")
    if len(found) > MAX_OUTPUT_BYTES:
        raise Failure(f"{name}: output exceeds {MAX_OUTPUT_BYTES >> 20} MiB")
    return found


def _output(process: "subprocess.Popen[bytes]", deadline: float) -> bytes | None:
    """Its output up to the bound; None on a timeout. Raises Failure when the command fails."""
    assert process.stdout is not None
    found = b""
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while len(found) <= MAX_OUTPUT_BYTES:
            if not waiting.select(max(0.0, deadline - time.monotonic())):
                return None
            piece = process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            if not piece:
                break
            found += piece
        else:
            return found
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    if code != 0:
        raise Failure(f"{Path(str(process.args[0])).name}: exit {code}")  # type: ignore[index]
    return found
