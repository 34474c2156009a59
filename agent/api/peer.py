"""What only other nodes of the rack may ask."""

import contextlib
import time

import msgspec
from aiohttp import web

from agent.api.context import CONTEXT, note, require_rack
from agent.frames import MAX_FRAME_BYTES, Accepted, Done, Embed, Failed, Frame, Generate, decode, encode
from agent.peers import Beat
from shared.errors import RackError, Refused, Retryable


async def beat(request: web.Request) -> web.Response:
    """What this node offers now."""
    require_rack(request)
    context = request.app[CONTEXT]
    here = context.dispatch.here()
    body = Beat(
        node=here.node,
        rack=context.config.node.rack,
        draining=here.draining,
        models=here.models,
        t_ms=time.time_ns() // 1_000_000,
    )
    return web.Response(body=msgspec.msgpack.encode(body), content_type="application/x-msgpack")


async def generate(request: web.Request) -> web.StreamResponse:
    """Work for a peer's client. It is never forwarded again, so a request cannot travel in circles."""
    require_rack(request)
    context = request.app[CONTEXT]
    wanted = decode(await _frame(request))
    if not isinstance(wanted, Generate | Embed):
        raise Refused("a Generate or an Embed frame was expected", code="bad_frame")
    note(request, model=wanted.model, door=wanted.door, client_request=wanted.request_id)
    response = web.StreamResponse(headers={"Content-Type": "application/x-msgpack"})
    await response.prepare(request)
    try:
        async with contextlib.aclosing(context.dispatch.work(wanted)) as answers:
            async for answer in answers:
                if isinstance(answer, Accepted):
                    note(request, version=answer.version, prompt_tok=answer.prompt_tok, cached_tok=answer.cached_tok)
                elif isinstance(answer, Done):
                    note(request, completion_tok=answer.completion_tok, finish=answer.finish)
                await response.write(encode(answer))
    except RackError as error:
        await response.write(encode(_failed(error)))
    await response.write_eof()
    return response


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
