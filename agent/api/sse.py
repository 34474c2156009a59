"""Server-sent events as OpenAI clients read them."""

from typing import Any

import msgspec
from aiohttp import web

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_DONE = b"data: [DONE]\n\n"


class EventStream:
    """A stream of ``data:`` lines; the status goes out with the first of them."""

    def __init__(self, request: web.Request, headers: dict[str, str]) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={**_HEADERS, **headers})

    async def open(self) -> None:
        """Send status and headers."""
        await self._response.prepare(self._request)

    async def send(self, body: dict[str, Any]) -> None:
        """One event."""
        await self._response.write(b"data: " + msgspec.json.encode(body) + b"\n\n")

    async def close(self, *, done: bool) -> web.StreamResponse:
        """End the stream; ``done`` says that the answer is complete."""
        if done:
            await self._response.write(_DONE)
        await self._response.write_eof()
        return self._response
