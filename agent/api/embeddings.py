"""POST /v1/embeddings: a vector for each input."""

import contextlib

import msgspec
from aiohttp import web

from agent.api import answering, answers, openai
from agent.api.context import BODIES, CONTEXT, REQUEST_ID, cache_of, client_key_id, json_response
from agent.gateway.call import Call
from agent.wire.frames import Embedded


async def embeddings(request: web.Request) -> web.Response:
    """Vectors of all inputs, in input order."""
    key_id = client_key_id(request)
    with request.app[BODIES].held(key_id) as held:
        wanted = await answering.read(request, openai.parse_embeddings, key_id, held)
        return await _embedded(request, wanted, key_id)


async def _embedded(request: web.Request, wanted: openai.EmbedRequest, key_id: str) -> web.Response:
    cache = cache_of(request, key_id)
    passage = await answering.passed(request, wanted, key_id)
    ask = msgspec.structs.replace(wanted.embed, model=passage.model or wanted.embed.model, private=passage.private)
    call = Call(
        ask=ask, request_id=request[REQUEST_ID], key_id=key_id, cache=cache, passage=passage, priority=passage.priority
    )
    passage.calls = [call]
    vectors: tuple[bytes, ...] = ()
    try:
        dispatch = request.app[CONTEXT].dispatch
        with dispatch.enter([call]):
            async with contextlib.aclosing(dispatch.answer(call)) as found:
                async for answer in found:
                    if isinstance(answer, Embedded):
                        vectors += answer.vectors
        body = answers.embeddings(call.model, vectors, call.prompt_tok, base64=wanted.base64)
        return json_response(body, headers=answering.headers([call], wanted.ignored))
    finally:
        answering.note_calls(request, [call])
