"""HTTP below the handlers: requests that cannot be parsed, Expect headers, bodies. Responses quote nothing of them."""

import asyncio
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web
from aiohttp.http_exceptions import ContentEncodingError
from aiohttp.web_protocol import RequestHandler

from agent.api.answers import error_body
from agent.api.bodies import LIGHT_BYTES, TEXT_TWICE, Held
from agent.api.connections import Tracked
from agent.api.context import CONTEXT, json_response, new_request_id, sign
from agent.api.errors import ENCODINGS, response_of, undecodable
from shared.errors import Refused, Retryable

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy

MAX_HEADER_BYTES = 32 << 10
"""Of one request, all lines together."""
MOST_UNSENT_BYTES = 64 << 10
"""So much waits for a client to read before its handler does, with TLS as without."""
_ROOM_S = 0.02
_CHUNKED = "chunked"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class _Protocol(RequestHandler):
    """aiohttp's own error responses are plain text that echoes the request, and so are its log lines for them.
    ``tracked`` learns what happens to the connection, where the listener counts them."""

    tracked: Tracked | None = None
    _header_bytes = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._waiter is None or self._waiter.done():
            self._header_bytes = 0
        elif (size := self._header_bytes + len(data)) <= MAX_HEADER_BYTES:
            self._header_bytes = size
        else:  # the parser bounds each line only, and keeps them all
            self.force_close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.WriteTransport)
        transport.set_write_buffer_limits(MOST_UNSENT_BYTES)
        if self.tracked is not None:
            self.tracked.opened(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.tracked is not None:
            self.tracked.lost()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.tracked is not None:
            self.tracked.stalled()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.tracked is not None:
            self.tracked.reads()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            if self.tracked is not None:
                self.tracked.enters("idle")

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        # the rest of a body that the client has been told is not what its headers say
        if not isinstance(kwargs.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kwargs)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the response has already been started")
        # the parser itself refuses encodings for which aiohttp lacks a library, and bodies that it cannot decode
        response = response_of(undecodable()) if _is_unsupported(exc) else _answer(status)
        sign(response, new_request_id())  # none has been assigned yet
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """An AppRunner that uses our protocol class."""

    __slots__ = ()

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server  # aiohttp has no hook for the protocol's class
        return server

    def keep_idle(self, idle_s: float) -> None:
        """How long a connection that is opened from now on may wait for its next request."""
        assert self.server is not None
        self.server._kwargs["keepalive_timeout"] = idle_s


async def expect(request: web.Request) -> web.StreamResponse | None:
    """Honor Expect: 100-continue; any other expectation is a 417."""
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        return _answer(417)
    await request.writer.write(_CONTINUE)
    return None


async def body_of(request: web.Request, limit_s: float, held: Held | None = None) -> bytes:
    """The whole body; ``held`` counts its bytes as far as they are announced or have come. Raises Refused when it does
    not arrive in time or cannot be decoded, and what Held.take raises."""
    _check_codings(request.headers)
    most, announced = request.app[CONTEXT].config.limits.body_bytes, request.content_length or 0
    if announced > most:
        raise web.HTTPRequestEntityTooLarge(max_size=most, actual_size=announced)
    if held is not None:
        await _room(held, announced, limit_s)
    try:
        if request.content.is_eof() and 0 < announced <= LIGHT_BYTES and hdrs.CONTENT_ENCODING not in request.headers:
            body = request.content.read_nowait()  # it arrived with its headers, as most do
        else:
            async with asyncio.timeout(limit_s):
                body = await _received(request, most, announced, held)
    except TimeoutError:
        raise Refused(f"no complete body within {limit_s:g} s (limits.body_s)", code="body_timeout") from None
    except web.RequestPayloadError:
        raise Refused("the request body does not match its headers", code="invalid_json") from None
    return body


def _check_codings(headers: "CIMultiDictProxy[str]") -> None:
    """Raises Refused for codings of the body that would be left on it."""
    if hdrs.CONTENT_ENCODING in headers and _named(headers, hdrs.CONTENT_ENCODING) not in ("", "identity", *ENCODINGS):
        raise undecodable()
    if hdrs.TRANSFER_ENCODING in headers and _named(headers, hdrs.TRANSFER_ENCODING) != _CHUNKED:
        # the parser takes the last coding off and would leave the others on
        raise Refused("this Transfer-Encoding is not supported; send chunked alone, or none", code="http_400")


def _named(headers: "CIMultiDictProxy[str]", name: str) -> str:
    return ",".join(headers.getall(name)).strip().lower()


async def _room(held: Held, announced: int, limit_s: float) -> None:
    """Hold what a body and its text will take, before any of it is read. While other requests hold the budget, the
    client waits as long as for a body: what it has not sent yet costs nothing here. Raises as Held.take does."""
    if announced <= LIGHT_BYTES:
        held.take(announced)
        return
    until_s = time.monotonic() + limit_s
    while True:
        try:
            held.take(TEXT_TWICE * announced)
            break
        except Retryable:
            if time.monotonic() >= until_s:
                raise
        await asyncio.sleep(_ROOM_S)


async def _received(request: web.Request, most: int, announced: int, held: Held | None) -> bytes:
    """The decoded bytes, at most ``most``; one that is compressed or chunked is counted as it comes."""
    parts: list[bytes] = []
    size, counted = 0, held.bytes if held is not None else announced
    while part := await request.content.readany():
        parts.append(part)
        if (size := size + len(part)) > most:
            raise web.HTTPRequestEntityTooLarge(max_size=most, actual_size=size)
        if held is not None and size > counted:
            held.take(size - counted)
            counted = size
        if held is not None and size > LIGHT_BYTES and (wait_s := held.pace_s(len(part), time.monotonic())):
            await asyncio.sleep(wait_s)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_unsupported(exc: BaseException | None) -> bool:
    return isinstance(exc, ContentEncodingError) and not any(one in exc.message for one in ENCODINGS)


def _answer(status: int) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    try:
        phrase = HTTPStatus(status).phrase.lower()
    except ValueError:
        phrase = "refused"
    body = error_body(f"invalid HTTP request ({phrase})", kind=kind, code=f"http_{status}")
    return json_response(body, status=status)
