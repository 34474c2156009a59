"""Pieces of one answer that wait for who reads them: bounded by what the answer says, not by how many pieces it came
in."""

import asyncio
from collections import deque

from agent.wire.frames import Answer, Tokens, joined

TOGETHER = 64
"""So many single tokens that wait become one piece."""


class AnswerQueue:
    """One answer's pieces, in order; None is its end. The engine is never held up by a slow reader: its row is free as
    soon as the answer is made, and what waits here is text."""

    def __init__(self) -> None:
        self._pieces: deque[Answer | None] = deque()
        self._singles = 0
        self._reader: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._pieces)

    def put(self, piece: Answer | None) -> None:
        """One more."""
        self._pieces.append(piece)
        self._singles = self._singles + 1 if isinstance(piece, Tokens) else 0
        if self._singles >= TOGETHER:
            self._join()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Answer | None:
        """The next; one reader at a time."""
        while not self._pieces:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        # what is left are fewer singles than were counted
        self._singles = min(self._singles, len(self._pieces) - 1)
        return self._pieces.popleft()

    def _join(self) -> None:
        last = [self._pieces.pop() for _ in range(TOGETHER)]
        self._pieces.append(joined([one for one in reversed(last) if isinstance(one, Tokens)]))
        self._singles = 0
