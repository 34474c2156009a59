"""What only other nodes of the rack may ask. Requests are signed (agent/signing.py), and so are answers."""

import contextlib
import time

import msgspec
from aiohttp import web

from agent.api.context import CONTEXT, note
from agent.frames import MAX_FRAME_BYTES, Accepted, Done, Embed, Failed, Frame, Generate, Together, decode, encode
from agent.signing import ANSWER_HEADER, NotAPeer, Signed
from shared.errors import RackError, Refused, Retryable

_MSGPACK = "application/x-msgpack"


async def beat(request: web.Request) -> web.Response:
    """What this node offers now."""
    signed = _signed(request, b"")
    context = request.app[CONTEXT]
    body = msgspec.msgpack.encode(context.beat())
    signature = context.rack_key.answer(signed.nonce, context.config.node.id, body)
    return web.Response(body=body, content_type=_MSGPACK, headers={ANSWER_HEADER: signature})


async def generate(request: web.Request) -> web.StreamResponse:
    """Work for a peer's client. It is never forwarded again, so a request cannot travel in circles."""
    context = request.app[CONTEXT]
    raw = await _frame(request)
    signed = _signed(request, raw)
    wanted = decode(raw)
    if not isinstance(wanted, Generate | Embed):
        raise Refused("a Generate or an Embed frame was expected", code="bad_frame")
    here = context.config.node.id
    if wanted.door == here:
        raise Refused("this request came from this very node; a peer's url leads back here", code="loop")
    note(request, model=wanted.model, door=wanted.door, client_request=wanted.request_id)
    response = web.StreamResponse(
        headers={"Content-Type": _MSGPACK, ANSWER_HEADER: context.rack_key.answer(signed.nonce, here)}
    )
    pieces = Together() if isinstance(wanted, Generate) and wanted.whole else None
    await response.prepare(request)
    try:
        async with contextlib.aclosing(context.dispatch.work(wanted)) as answers:
            async for answer in answers:
                if isinstance(answer, Accepted):
                    note(request, version=answer.version, prompt_tok=answer.prompt_tok, cached_tok=answer.cached_tok)
                elif isinstance(answer, Done):
                    note(request, completion_tok=answer.completion_tok, finish=answer.finish)
                due = pieces.put(answer, time.monotonic()) if pieces is not None else (answer,)
                if due:
                    await response.write(b"".join(encode(one) for one in due))
    except RackError as error:
        await response.write(encode(_failed(error)))
    await response.write_eof()
    return response


def _signed(request: web.Request, body: bytes) -> Signed:
    """Who asks, proved. Raises NotAPeer."""
    context = request.app[CONTEXT]
    if not context.rack_secret:
        raise NotAPeer("this node has no peers.secret, so it has no peers")
    now_ms = time.time_ns() // 1_000_000
    header = request.headers.get("Authorization", "")
    signed = context.rack_key.check(header, method=request.method, path=request.path_qs, body=body, now_ms=now_ms)
    if not context.nonces.take(signed.nonce, now_ms):
        raise NotAPeer("this signature has been used before")
    return signed


async def _frame(request: web.Request) -> bytes:
    """The body, which may be longer than a client's: it is the same request in other bytes."""
    body = bytearray()
    while chunk := await request.content.readany():
        body += chunk
        if len(body) > MAX_FRAME_BYTES:
            raise Refused("the frame is too large", code="body_too_large")
    return bytes(body)


def _failed(error: RackError) -> Frame:
    return Failed(
        id=1, code=error.code, message=error.message, param=error.param, retryable=isinstance(error, Retryable)
    )
