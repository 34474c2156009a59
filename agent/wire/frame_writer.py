"""Writes frames of many requests to one WebSocket. Frames queued at the same time leave as one message, by one task: a
request costs no task and no system call of its own, and cancelling one request affects no other."""

import asyncio
from collections.abc import Awaitable, Callable

MOST_WAITING = 1 << 20
"""Bytes that may be queued before writers have to wait."""
MESSAGE_BYTES = 1 << 20
"""Frames are batched up to this size; a larger one is sent alone."""


class FrameWriter:
    """``send`` sends a message. Must be ended."""

    def __init__(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: list[bytes] = []
        self._bytes = 0
        self._wake: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self.lost = False
        self._task = asyncio.create_task(self._run())

    async def put(self, frame: bytes) -> None:
        """Queue a frame, and wait while too much is queued. Raises ConnectionResetError when the connection is gone."""
        self.put_now(frame)
        if self._bytes > MOST_WAITING:
            await self._room.wait()
            if self.lost:
                raise ConnectionResetError

    def put_now(self, frame: bytes) -> None:
        """The same without waiting, for frames that are small and must not wait."""
        if self.lost:
            raise ConnectionResetError
        self._waiting.append(frame)
        self._bytes += len(frame)
        if self._bytes > MOST_WAITING:
            self._room.clear()
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def end(self) -> None:
        """Stop sending, and wait for the writing task to end."""
        self._end()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def abort(self) -> None:
        """The same without waiting."""
        self._end()
        self._task.cancel()

    def _end(self) -> None:
        self.lost = True
        self._room.set()

    async def _run(self) -> None:
        try:
            while True:
                if not self._waiting:
                    self._wake = asyncio.get_running_loop().create_future()
                    await self._wake
                message = self._taken()
                await self._send(message)
                self._bytes -= len(message)
                if self._bytes <= MOST_WAITING:
                    self._room.set()
        except (ConnectionError, RuntimeError, OSError):
            pass  # the reader notices that the connection is gone
        finally:
            self._end()

    def _taken(self) -> bytes:
        """As many of the queued frames as fit into one message."""
        if len(self._waiting) == 1:
            return self._waiting.pop()
        size = count = 0
        for frame in self._waiting:
            if count and size + len(frame) > MESSAGE_BYTES:
                break
            size, count = size + len(frame), count + 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return b"".join(taken)
