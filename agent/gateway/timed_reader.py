"""A timeout that is cheap to renew: one timer for a whole stream instead of one for each of its pieces."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_EXCUSED_S = 0.25


class ReadTimeout(Exception):
    """Nothing arrived in time."""


class TimedReader(Generic[T]):
    """Reads pieces from ``source``, each within a time limit, which does not count while it is ``excused``. Its
    context ends the timer."""

    def __init__(self, source: AsyncIterator[T], excused: Callable[[], bool] | None = None) -> None:
        self._source, self._loop, self._excused = source, asyncio.get_running_loop(), excused
        self._task: asyncio.Task[object] | None = None
        self._until_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False

    async def next(self, limit_s: float) -> T:
        """The next piece. Raises ReadTimeout on timeout, StopAsyncIteration at the end."""
        self._until_s = self._loop.time() + limit_s
        if self._timer is None or self._timer.when() > self._until_s:
            self._arm(self._until_s)
        self._task = asyncio.current_task(self._loop)
        try:
            return await anext(self._source)
        except asyncio.CancelledError:
            if self._expired and self._task is not None and self._task.uncancel() <= 0:
                raise ReadTimeout from None
            raise
        finally:
            self._task, self._expired = None, False

    def __enter__(self) -> "TimedReader[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self._disarm()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, at_s: float) -> None:
        self._disarm()
        self._timer = self._loop.call_at(at_s, self._fired)

    def _fired(self) -> None:
        self._timer = None
        if self._task is None:
            return  # no reader waits; the next wait arms it again
        if self._loop.time() < self._until_s:
            self._arm(self._until_s)
            return
        if self._excused is not None and self._excused():
            self._arm(self._loop.time() + _EXCUSED_S)
            return
        self._expired = True
        self._task.cancel()
