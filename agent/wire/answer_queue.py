"""Queued pieces of one answer that wait for its reader: bounded by the answer's text, not by the number of its
pieces."""

import asyncio
from collections import deque

from agent.wire.frames import Answer, Tokens, joined

TOGETHER = 64
"""When this many queued pieces are single tokens, they are joined to one."""


class AnswerQueue:
    """One answer's pieces, in order; None is its end. A slow reader never blocks the engine: the row is free as soon as
    the answer is generated, and what is queued here is text."""

    def __init__(self) -> None:
        self._pieces: deque[Answer | None] = deque()
        self._singles = 0
        self._reader: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._pieces)

    def put(self, piece: Answer | None) -> None:
        """Append a piece."""
        self._pieces.append(piece)
        self._singles = self._singles + 1 if isinstance(piece, Tokens) else 0
        if self._singles >= TOGETHER:
            self._join()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Answer | None:
        """The next piece; one reader at a time."""
        while not self._pieces:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        # fewer singles may be left than were counted
        self._singles = min(self._singles, len(self._pieces) - 1)
        return self._pieces.popleft()

    def _join(self) -> None:
        last = [self._pieces.pop() for _ in range(TOGETHER)]
        self._pieces.append(joined([one for one in reversed(last) if isinstance(one, Tokens)]))
        self._singles = 0
