"""POST /v1/chat/completions, whole and streamed."""

import contextlib
import time
from collections.abc import AsyncGenerator

from aiohttp import web

from agent import openai
from agent.api.context import CONTEXT, REQUEST_ID, client_key_id, note
from agent.api.context import json_response as as_json
from agent.api.errors import response_of
from agent.api.sse import EventStream
from agent.dispatch import Call
from agent.frames import Answer, Done, Tokens
from shared.errors import RackError, Retryable


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer one conversation."""
    context = request.app[CONTEXT]
    key_id = client_key_id(request)
    chat = openai.parse_request(await request.read())
    call = Call(request=chat, request_id=request[REQUEST_ID], key_id=key_id, whole=not chat.stream)
    try:
        async with contextlib.aclosing(context.dispatch.answer(call)) as answers:
            return await (_streamed(request, call, answers) if chat.stream else _whole(call, answers))
    finally:
        note(
            request,
            model=chat.model if call.known else "",
            worker=call.worker,
            version=call.version,
            stream=chat.stream,
            prompt_tok=call.prompt_tok,
            cached_tok=call.cached_tok,
            completion_tok=call.completion_tok,
            finish=call.finish,
            retries=call.retries,
            key=key_id,
        )


async def _whole(call: Call, answers: AsyncGenerator[Answer, None]) -> web.Response:
    texts = [answer.text async for answer in answers if isinstance(answer, Tokens)]
    body = openai.completion(
        answer_id=_answer_id(call),
        created=int(time.time()),
        model=call.request.model,
        fingerprint=_fingerprint(call),
        text="".join(texts),
        finish=call.finish,
        usage=_usage(call),
    )
    return as_json(body, headers=_headers(call))


async def _streamed(request: web.Request, call: Call, answers: AsyncGenerator[Answer, None]) -> web.StreamResponse:
    """Nothing is sent before the first token, so that everything up to then has a proper status."""
    created = int(time.time())
    stream: EventStream | None = None
    shape = {"answer_id": _answer_id(call), "created": created, "model": call.request.model}
    try:
        async for answer in answers:
            if isinstance(answer, Tokens):
                if stream is None:
                    stream = EventStream(request, {**_headers(call), "X-Mlxrack-Request-Id": call.request_id})
                    await stream.open()
                    first = {"role": "assistant", "content": ""}
                    await stream.send(openai.chunk(**shape, fingerprint=_fingerprint(call), delta=first))  # type: ignore[arg-type]
                if answer.text:
                    delta = {"content": answer.text}
                    await stream.send(openai.chunk(**shape, fingerprint=_fingerprint(call), delta=delta))  # type: ignore[arg-type]
            elif isinstance(answer, Done) and stream is not None:
                last = openai.chunk(**shape, fingerprint=_fingerprint(call), delta={}, finish=answer.finish)  # type: ignore[arg-type]
                await stream.send(last)
    except RackError as error:
        if stream is None:
            raise
        return await _broken(stream, error)
    if stream is None:
        raise Retryable("the worker sent no token", code="worker_lost")
    if call.request.include_usage:
        await stream.send(openai.usage_chunk(**shape, fingerprint=_fingerprint(call), usage=_usage(call)))  # type: ignore[arg-type]
    return await stream.close(done=True)


async def _broken(stream: EventStream, error: RackError) -> web.StreamResponse:
    """A stream that cannot go on ends with an error event, on which clients raise; never with a silent stop."""
    body = response_of(error).body
    assert isinstance(body, bytes)
    await stream.send(openai.error_body(error.message, kind="server_error", code=error.code))
    return await stream.close(done=False)


def _answer_id(call: Call) -> str:
    return "chatcmpl-" + call.request_id.removeprefix("req_")


def _fingerprint(call: Call) -> str:
    return f"fp_{call.version}"


def _usage(call: Call) -> openai.Usage:
    return openai.Usage(prompt_tok=call.prompt_tok, cached_tok=call.cached_tok, completion_tok=call.completion_tok)


def _headers(call: Call) -> dict[str, str]:
    return {"X-Mlxrack-Version": call.version, "X-Mlxrack-Node": call.worker}
