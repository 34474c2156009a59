"""What is known of a loader's requests: which wait, for how long there was no progress, and which may have ended it."""

import contextlib
import signal
import time
from collections.abc import Callable

from agent.process.preparation import PreparationLine
from agent.wire.progress import Prepares, Progress
from shared.errors import Retryable

STALLED_S = 5.0
"""While the thread that prepares has moved within this time, the requests behind it are told that they wait."""
SUSPECT = "suspect_request"
"""Code of the error that ends a request which may have ended its loader: it is not tried again."""
CRASHED = "loader_crashed"
"""Code of a loss where the loader ended by its own doing, with this request among several in its engine."""


class Watch:
    """The requests of one loader from the daemon's call to the last frame. ``progress`` is the daemon's end of the file
    in which the loader says what it prepares."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress, self._clock = progress, clock
        self._line = PreparationLine()
        self._owed: set[int] = set()
        self._accepted: set[int] = set()
        self._answering: set[int] = set()
        self._heard_s = self._moved_s = clock()
        self._last = Prepares()
        self._cause = ""
        self._crashed = self._cancelled = False
        self._suspects: set[int] = set()

    def add(self, number: int, key: str, size: int) -> list[int]:
        """A request of an API key waits for its preparation; returns those that are refused for lack of room."""
        return self._line.add(number, key, size)

    def next(self) -> int | None:
        """The request to send to the loader now; None while none may be sent."""
        if (number := self._line.next()) is not None:
            if not self._owed and not self._cancelled:
                self._heard_s = self._clock()  # it owed no sign of life before
            self._owed.add(number)
        return number

    def heard(self) -> None:
        """The loader's main thread sent a frame that is more than a report."""
        self._heard_s, self._cancelled = self._clock(), False

    def accepted(self, number: int) -> None:
        """The engine has a request."""
        if number in self._owed:  # else its client has left
            self._accepted.add(number)
        self._line.leave(number)

    def answers(self, number: int) -> None:
        """A part of its answer arrived."""
        if number in self._accepted:
            self._answering.add(number)

    def done(self, number: int) -> None:
        """The engine is done with a request, even if the client reads slowly; or it was never sent."""
        self._line.leave(number)
        for known in (self._owed, self._accepted, self._answering):
            known.discard(number)

    def left(self, number: int) -> bool:
        """Nobody waits for a request any more; whether the loader has to be told. It then owes a sign of life: clients
        that leave a loader that hangs must not hide that it does."""
        is_there = number in self._owed
        self._cancelled = self._cancelled or is_there
        self.done(number)
        return is_there

    @property
    def silent_s(self) -> float:
        """Seconds without progress on a request: of the thread that prepares, or of the whole loader. A request that
        waits for its turn ages nothing."""
        now, prepares = self._clock(), self._look()
        if prepares.request_id:
            return now - self._moved_s  # also when its client has left: those to come would wait behind it
        return now - max(self._heard_s, self._moved_s) if self._owed or self._cancelled else 0.0

    @property
    def waiting(self) -> list[int]:
        """Requests whose silence means nothing now: the one in preparation, which the watchdog times, and those behind
        it while it moves."""
        number = self._look().request_id
        if not number:
            return []
        moves = self._clock() - self._moved_s < STALLED_S
        behind = [*(self._owed - self._accepted - {number}), *self._line.waiting]
        return [number, *(behind if moves else ())]

    def ended(self, cause: str, status: int, *, stuck: bool) -> None:
        """The loader has ended with this exit status, or was ended because it was stuck. Names the suspects."""
        self._look()
        self._cause = cause
        self._crashed = stuck or (status < 0 and status != -signal.SIGKILL)
        if self._last.request_id:
            self._suspects = {self._last.request_id}
        elif self._crashed and len(self._accepted) == 1:
            self._suspects = self._accepted - self._answering
        self._progress.close()

    def loss(self, number: int) -> Retryable:
        """The error of a request that was lost with the loader."""
        if number in self._suspects:
            did = "computed" if number in self._accepted else "prepared"
            message = f"the loader ended ({self._cause}) while it {did} this request, which may be why, so it is not"
            return Retryable(f"{message} tried again; shorten or simplify it", code=SUSPECT)
        code = CRASHED if self._crashed and number in self._accepted else "worker_lost"
        return Retryable(f"the loader ended ({self._cause})", code=code)

    def _look(self) -> Prepares:
        """The loader's last word on what it prepares."""
        if not self._cause:
            with contextlib.suppress(OSError):
                now = self._progress.read()
                if now != self._last:
                    self._last, self._moved_s = now, self._clock()
        return self._last
