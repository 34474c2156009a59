"""A real S3 server behind a relay that fails on command or at random."""

import asyncio
import contextlib
import random
import threading
from typing import Any

import aiohttp
from aiohttp import web

from scripts.seaweed import free_port

HANG_S = 1.0
_HOP = ("Transfer-Encoding", "Connection", "Content-Length", "Content-Encoding")


class FlakyStore:
    """Relays to ``target`` on a port of its own; use as a context manager.

    A share of the calls fails: rejected before or after execution, throttled with a retry hint, or left hanging; some
    responses get lost after the object was stored. ``gone`` rejects everything.
    """

    def __init__(self, target: str, *, share: float = 0.2, seed: int = 1) -> None:
        self._target = target
        self._share = share
        self._dice = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self.port = free_port()
        self.gone = False
        self.calls = self.failed = 0

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FlakyStore":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _stop(self) -> None:
        assert self._runner is not None
        assert self._session is not None
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.calls += 1
        if self.gone:
            return self._cut(request)
        fault = self._dice.choice(("500", "slow_down", "hang", "cut", "lost", "500_after"))
        if self._dice.random() >= self._share:
            return await self._relayed(request)
        self.failed += 1
        if fault == "hang":
            await asyncio.sleep(HANG_S)
        if fault in ("hang", "cut"):
            return self._cut(request)
        if fault == "slow_down":
            return _refusal(503, "SlowDown", {"Retry-After": "1"})
        if fault == "500":
            return _refusal(500, "InternalError")
        await self._relayed(request)
        return self._cut(request) if fault == "lost" else _refusal(500, "InternalError")

    async def _relayed(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        body = await request.read()
        # the Host header is signed
        headers = {name: value for name, value in request.headers.items() if name not in _HOP}
        try:
            async with self._session.request(
                request.method, self._target + request.raw_path, data=body, headers=headers, allow_redirects=False
            ) as answer:
                kept: dict[str, Any] = {name: v for name, v in answer.headers.items() if name not in _HOP}
                return web.Response(status=answer.status, body=await answer.read(), headers=kept)
        except aiohttp.ClientError:
            return self._cut(request)

    def _cut(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            with contextlib.suppress(OSError):
                request.transport.abort()
        return web.Response(status=500)


def _refusal(status: int, code: str, headers: dict[str, str] | None = None) -> web.Response:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>by the test</Message></Error>'
    return web.Response(status=status, text=body, content_type="application/xml", headers=headers)
