"""Syncing in groups: blocking work in one thread, once for all that was written meanwhile, and who waits for it."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

GROUP_S = 0.005
"""What is written within this time shares one sync."""
T = TypeVar("T")


class Group:
    """``begin`` is called in the loop and returns the work for the thread, None for none; ``ended`` is called in the
    loop with what it raised. For the loop's thread."""

    def __init__(
        self, begin: Callable[[], Callable[[], int] | None], ended: Callable[[int, BaseException | None], None]
    ) -> None:
        self._begin, self._ended = begin, ended
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._timer: asyncio.TimerHandle | None = None
        self._waiters: list[tuple[int, asyncio.Future[bool]]] = []
        self._again = self.busy = False
        self._began_s = 0.0

    def soon(self, delay_s: float = GROUP_S) -> None:
        """Sync after a moment in which more may be written; at once with ``delay_s`` 0. Without a loop, as at the
        start, nothing happens."""
        if self.busy:
            self._again = True
            return
        if self._timer is not None:
            if delay_s:
                return
            self._timer.cancel()
        try:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._run)
        except RuntimeError:
            self._timer = None

    def busy_s(self) -> float:
        """For how long the thread has been busy."""
        return time.monotonic() - self._began_s if self.busy else 0.0

    async def reached(self, seq: int, within_s: float) -> bool:
        """Wait until what was written up to ``seq`` is synced; False when that failed. Raises TimeoutError."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append((seq, waiter))
        self.soon(0.0)
        async with asyncio.timeout(within_s):
            return bool(await waiter)

    async def run(self, work: Callable[[], T]) -> T:
        """Blocking work in the same thread, beside which nothing is synced."""
        self.busy, self._began_s = True, time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self.busy = False

    def settle(self, seq: int | None) -> None:
        """Tell who waits for up to this number; None tells everybody that it failed."""
        for waiting in [one for one in self._waiters if seq is None or one[0] <= seq]:
            self._waiters.remove(waiting)
            if not waiting[1].done():
                waiting[1].set_result(seq is not None)

    def close(self) -> None:
        """Begin nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        self._thread.shutdown(wait=False)

    def _run(self) -> None:
        self._timer = None
        if self.busy or (work := self._begin()) is None:
            return
        self.busy, self._again, self._began_s = True, False, time.monotonic()
        asyncio.get_running_loop().run_in_executor(self._thread, work).add_done_callback(self._done)

    def _done(self, done: "asyncio.Future[int]") -> None:
        self.busy = False
        error = None if done.cancelled() else done.exception()
        self._ended(0 if error or done.cancelled() else done.result(), error)
        if self._again:
            self.soon(0.0 if self._waiters else GROUP_S)
