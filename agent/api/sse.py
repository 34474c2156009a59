"""Server-sent events as OpenAI clients read them."""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"


class Unread(Exception):
    """The client has not read for too long; its connection was cut."""


class EventStream:
    """A stream of ``data:`` lines; the status is sent with the first of them. A client has ``patience_s`` to read
    each; one that stopped reading would hold its row in the engine forever."""

    def __init__(self, request: web.Request, headers: dict[str, str], patience_s: float) -> None:
        self._request, self._patience_s = request, patience_s
        self._response = web.StreamResponse(headers={**_HEADERS, **headers})

    async def open(self) -> None:
        """Send status and headers."""
        await self._response.prepare(self._request)

    async def send(self, body: dict[str, Any]) -> None:
        """One event. Raises Unread."""
        await self._write(b"data: " + msgspec.json.encode(body) + b"\n\n")

    async def keep_alive(self) -> None:
        """A comment, which readers skip. Raises Unread."""
        await self._write(_COMMENT)

    async def close(self, *, done: bool) -> web.StreamResponse:
        """End the stream; ``done`` marks the answer as complete."""
        if done:
            await self._write(_DONE)
        await self._response.write_eof()
        return self._response

    @property
    def response(self) -> web.StreamResponse:
        """What the handler returns when the client is gone."""
        return self._response

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                await self._response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise Unread from None
