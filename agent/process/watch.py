"""What is known of a loader's requests: which wait, for how long there was no progress, and which may have ended it."""

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

from agent.process.blame import Ending, blamed
from agent.process.preparation import PreparationLine
from agent.wire.frames import SUSPECT
from agent.wire.priority import NEUTRAL, Priority
from agent.wire.progress import Prepares, Progress
from shared.errors import Retryable

STALLED_S = 5.0
"""While the thread that prepares has moved within this time, the requests behind it are told that they wait."""
STEP_S = 30.0
"""The same of the main thread: one step of an engine may take long where memory is short."""


class Silence(NamedTuple):
    """For how many seconds a loader's two threads have made no progress: 0 for one that has nothing to do."""

    preparing_s: float
    main_s: float


class Watch:
    """The requests of one loader from the daemon's call to the last frame. ``progress`` is the daemon's end of the file
    in which the loader says what it prepares."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress, self._clock = progress, clock
        self._line = PreparationLine()
        self._owed: dict[int, None] = {}
        """Sent and not done, in the order in which they were sent, which is that of their preparation."""
        self._accepted: set[int] = set()
        self._answering: set[int] = set()
        self._cancelled = False
        self._heard_s = self._began_s = self._moved_s = clock()
        self._last = Prepares()
        self._stood_still = (False, False)
        self._cause = ""
        self._blamed: dict[int, str] = {}

    def add(self, number: int, key: str, size: int, priority: Priority = NEUTRAL) -> list[int]:
        """A request of an API key waits for its preparation; returns those that are refused for lack of room."""
        return self._line.add(number, key, size, priority, self._clock())

    def next(self) -> int | None:
        """The request to send to the loader now; None while none may be sent."""
        if (number := self._line.next(self._clock())) is not None:
            if not (self._owed or self._cancelled):
                self._heard_s = self._clock()  # it owed nothing before
            self._owed[number] = None
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
        self._owed.pop(number, None)
        self._accepted.discard(number)
        self._answering.discard(number)

    def left(self, number: int) -> bool:
        """Nobody waits for a request any more; whether the loader has to be told. It then owes a sign of life: clients
        that leave a loader that hangs must not hide that it does."""
        if is_there := number in self._owed:
            self._silence()
            self._cancelled = True
        self.done(number)
        return is_there

    @property
    def silent_s(self) -> float:
        """Seconds without progress of the thread that is without for longer. A request that waits for its turn ages
        nothing."""
        return max(self._silence())

    @property
    def waiting(self) -> list[int]:
        """Requests whose silence means nothing now: the one in preparation, which the watchdog times, and while both
        threads make progress those that are not prepared, or not in the engine yet."""
        silence, number = self._silence(), self._last.request_id
        first = [number] if number else []
        if silence.preparing_s >= STALLED_S or silence.main_s >= STEP_S:
            return first
        sent = [one for one in self._owed if one != number and one not in self._accepted]
        return [*first, *sent, *self._line.waiting]

    def stuck(self, limit_s: float) -> bool:
        """Whether a thread made no progress for longer than the watchdog allows. Remembers which: the other one may be
        still for nearly as long, where one holds the interpreter."""
        silence = self._silence()
        if max(silence) <= limit_s:
            return False
        self._stood_still = (silence.preparing_s > limit_s / 2, silence.main_s > limit_s / 2)
        return True

    def ended(self, cause: str, status: int, *, ours: bool) -> None:
        """The loader has ended with this exit status; ``ours``: the daemon wanted it gone."""
        number = self._look().request_id
        prepared_s = self._clock() - self._began_s
        end = Ending(status, self._stood_still, ours, number, prepared_s, self._accepted, self._answering)
        self._cause, self._blamed = cause, blamed(end)
        self._progress.close()

    def loss(self, number: int) -> Retryable:
        """The error of a request that was lost with the loader."""
        code = self._blamed.get(number, "worker_lost")
        if code != SUSPECT:
            return Retryable(f"the loader ended ({self._cause})", code=code)
        did = "computed" if number in self._accepted else "prepared"
        message = f"the loader ended ({self._cause}) while it {did} this request, which may be why, so it is not"
        return Retryable(f"{message} tried again; shorten or simplify it", code=code)

    def _silence(self) -> Silence:
        """The one that prepares is timed from its last move, also when nobody waits for the request any more: those to
        come would wait behind it. The main thread is timed from its last frame, or from when it began to owe one."""
        now, number = self._clock(), self._look().request_id
        if not self._owes(number):
            self._heard_s = now
        return Silence(now - self._moved_s if number else 0.0, now - self._heard_s)

    def _owes(self, preparing: int) -> bool:
        """Whether the main thread owes a frame: to a Cancel, or about a request that it has. It has all that were sent
        before the one in preparation, and all if none is."""
        if self._cancelled or self._accepted or not preparing:
            return self._cancelled or bool(self._owed)
        return preparing in self._owed and next(iter(self._owed)) != preparing

    def _look(self) -> Prepares:
        """The loader's last word on what it prepares."""
        if not self._cause:
            with contextlib.suppress(OSError):
                now, before = self._progress.read(), self._last
                if now != before:
                    self._last, self._moved_s = now, self._clock()
                if now.request_id != before.request_id:
                    self._began_s = self._moved_s
        return self._last
