"""One connection to one peer that multiplexes every request to it: frames of many answers, distinguished by their ids.

It is a WebSocket whose handshake is signed. A request costs one frame there and its answers back, without an HTTP
request of its own. When the connection ends, every open answer on it is lost, and its reader is notified at once.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator
from socket import SHUT_RDWR

import aiohttp
import msgspec

from agent.mesh.signing import Key
from agent.wire.answer_queue import AnswerQueue
from agent.wire.frame_writer import FrameWriter
from agent.wire.frames import (
    MAX_FRAME_BYTES,
    Accepted,
    Answer,
    Ask,
    Cancel,
    Decoder,
    Done,
    Embedded,
    Failed,
    Tokens,
    Waits,
    encode,
)
from shared.errors import Refused, Retryable

_ANSWERS = (Accepted, Tokens, Embedded, Waits, Done, Failed)
_ENDS = (Done, Failed)
CLOSE_S = 1.0
HEARTBEAT_S = 10.0
"""A connection that returns nothing for this long, and half as long again, is dead."""


class PeerLink:
    """An open connection. ``alive`` until it ends; ``key`` is the one with which both ends authenticated."""

    def __init__(self, node: str, url: str, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.node, self.url, self._socket = node, url, socket
        self._open: dict[int, AnswerQueue] = {}
        self._ids = itertools.count(1)
        self._writer = FrameWriter(socket.send_bytes)
        self.alive = True
        self.key: Key | None = None
        self._is_retired = False
        self._reading: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def read(self, key: Key) -> None:
        """Start receiving frames, after the handshake."""
        self.key = key
        self._reading = asyncio.create_task(self._read())

    async def generate(self, request: Ask) -> AsyncGenerator[Answer, None]:
        """Answers to one request. Closing early cancels it. Raises Retryable (worker_lost) when the connection ends."""
        number, answers, finished = next(self._ids), AnswerQueue(), False
        self._open[number] = answers
        try:
            frame = encode(msgspec.structs.replace(request, id=number))
            if len(frame) > MAX_FRAME_BYTES:
                raise Refused("the request is too large to forward", code="body_too_large")
            await self._send(frame)
            while not finished:
                if (answer := await answers.get()) is None:
                    raise Retryable(f"peer {self.node}: connection lost", code="worker_lost")
                finished = isinstance(answer, _ENDS)
                yield answer
        finally:
            del self._open[number]
            if not finished and self.alive:
                self._cancel(number)
            if self._is_retired:
                self.retire()

    def retire(self) -> None:
        """Close it when no request is open on it any more; the caller opens none from now on."""
        self._is_retired = True
        # who was handed it a moment ago may not have sent anything yet
        asyncio.get_running_loop().call_later(CLOSE_S, self._close_if_unused)

    def _close_if_unused(self) -> None:
        if self._is_retired and self.alive and not self._open and self._closing is None:
            self._closing = asyncio.create_task(self.close())

    def abort(self) -> None:
        """Abort the connection: the peer is gone."""
        self._lost()
        self._writer.abort()
        if (wire := self._socket.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                wire.shutdown(SHUT_RDWR)
        if self._reading is not None:
            self._reading.cancel()

    async def close(self) -> None:
        """Close the connection gracefully."""
        self._lost()
        reading = [self._reading] if self._reading is not None else []
        for task in reading:
            task.cancel()
        await self._writer.end()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                await self._socket.close()
        await asyncio.gather(*reading, return_exceptions=True)

    async def _send(self, frame: bytes) -> None:
        try:
            await self._writer.put(frame)
        except ConnectionError:
            self._lost()
            raise Retryable(f"peer {self.node}: connection lost", code="worker_lost") from None

    def _cancel(self, number: int) -> None:
        with contextlib.suppress(ConnectionError):
            self._writer.put_now(encode(Cancel(id=number)))

    async def _read(self) -> None:
        decoder = Decoder()
        try:
            async for message in self._socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    break
                for frame in decoder.feed(message.data):
                    if isinstance(frame, _ANSWERS) and frame.id in self._open:
                        self._open[frame.id].put(frame)
        except Refused:
            pass  # invalid frames: not a peer
        finally:
            self._lost()
            self._writer.abort()
            if not self._socket.closed:
                with contextlib.suppress(Exception):
                    await self._socket.close()

    def _lost(self) -> None:
        self.alive = False
        for answers in self._open.values():
            answers.put(None)
