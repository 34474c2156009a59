"""HTTP that never becomes a request: what cannot be parsed, and expectations. Answers quote nothing of it."""

import asyncio
from http import HTTPStatus
from typing import Any

from aiohttp import hdrs, web
from aiohttp.web_protocol import RequestHandler

from agent.api.answers import error_body
from agent.api.context import json_response, new_request_id
from shared.errors import Refused

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class _Protocol(RequestHandler):
    """aiohttp's own answers are plain text that echoes what was sent, and so is what it logs of them."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("something has been sent already")
        response = _answer(status)
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """An AppRunner whose protocol is ours."""

    __slots__ = ()

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server  # aiohttp has no hook for the protocol's class
        return server


async def expect(request: web.Request) -> web.StreamResponse | None:
    """Go on with what expects 100-continue; there is nothing else to expect."""
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        return _answer(417)
    await request.writer.write(_CONTINUE)
    return None


async def body_of(request: web.Request, limit_s: float) -> bytes:
    """The whole body. Raises Refused when it does not come or cannot be unpacked."""
    try:
        if request.content.is_eof():
            return await request.read()  # it came with its head, as most do
        async with asyncio.timeout(limit_s):
            return await request.read()
    except TimeoutError:
        raise Refused(f"the body did not come within {limit_s:g} s", code="body_timeout") from None
    except web.RequestPayloadError:
        raise Refused("the body is not what its headers say", code="invalid_json") from None


def _answer(status: int) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    try:
        phrase = HTTPStatus(status).phrase.lower()
    except ValueError:
        phrase = "refused"
    body: dict[str, Any] = error_body(f"not a request that can be read ({phrase})", kind=kind, code=f"http_{status}")
    response = json_response(body, status=status)
    # nobody has given it an id yet
    response.headers["X-Mlxrack-Request-Id"] = new_request_id()
    return response
