"""Background tasks: referenced while they run, completed once begun, cancelled together."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """The tasks that one object started."""

    def __init__(self) -> None:
        self._running: set[asyncio.Future[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, work: Awaitable[T]) -> "asyncio.Future[T]":
        """Begin work in the background."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def finish(
        self, work: Coroutine[Any, Any, T], then: "Callable[[asyncio.Future[T]], None]" = lambda _: None
    ) -> T:
        """Complete work even if the caller is cancelled meanwhile; ``then`` receives the ended task."""
        task = self.spawn(work)
        task.add_done_callback(then)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # no caller reads the outcome; it is in the status and the log
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def cancel(self) -> None:
        """Cancel all of them."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
