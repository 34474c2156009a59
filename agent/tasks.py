"""Background tasks: referenced while they run, completed once begun, cancelled together. And slow calls of the system,
in threads."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine, Hashable
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


class Lookups:
    """Slow system calls (keychain, name server), each in its own daemon thread, and at most one at a time per subject:
    a call that hangs must neither occupy the threads that the agent's other work needs, nor keep the agent from
    exiting."""

    def __init__(self) -> None:
        self._asked: dict[Hashable, asyncio.Future[Any]] = {}

    async def ask(self, what: Hashable, question: Callable[[], Any]) -> Any:
        """The result of ``question``, or of the pending one for the same ``what``. Raises what it raises."""
        if (answer := self._asked.get(what)) is None:
            loop = asyncio.get_running_loop()
            answer = loop.create_future()
            threading.Thread(target=_answer, args=(loop, answer, question), daemon=True, name="lookup").start()
            self._asked[what] = answer
            answer.add_done_callback(lambda done: (self._asked.pop(what, None), done.exception()))
        return await asyncio.shield(answer)


def _answer(loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[Any]", question: Callable[[], Any]) -> None:
    try:
        found, error = question(), None
    except Exception as raised:  # noqa: BLE001  # raised again in the caller
        found, error = None, raised
    with contextlib.suppress(RuntimeError):  # the agent has exited meanwhile
        if error is None:
            loop.call_soon_threadsafe(answer.set_result, found)
        else:
            loop.call_soon_threadsafe(answer.set_exception, error)
