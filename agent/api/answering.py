"""One client request as its parts: each of n answers to each prompt is one call, all at the same time."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from aiohttp import web

from agent.answers import Choice, Identity, Usage, error_body
from agent.api.context import CONTEXT, REQUEST_ID, note
from agent.api.sse import EventStream
from agent.dispatch import Call
from agent.frames import Answer, Done, Scored, Tokens
from agent.openai import AnswerRequest
from shared.errors import RackError, Retryable

_QUEUED = 64
"""Pieces that wait for a slow client before the parts have to wait too."""


class Shape(Protocol):
    """How the pieces of a stream look on the wire."""

    prefix: str

    def begin(self, who: Identity, index: int) -> dict[str, Any] | None:
        """What comes before a choice's first text; None for nothing."""
        ...

    def piece(self, who: Identity, index: int, text: str, scored: Sequence[Scored] | None) -> dict[str, Any]:
        """Some text."""
        ...

    def end(self, who: Identity, index: int, finish: str) -> dict[str, Any]:
        """Why a choice ended."""
        ...

    def usage(self, who: Identity, usage: Usage) -> dict[str, Any]:
        """Counts over all choices."""
        ...


def calls_of(request: web.Request, wanted: AnswerRequest, key_id: str) -> list[Call]:
    """A call for each choice. Parts beyond the first of a prompt count no request and no prompt of their own."""
    parts = [(prompt, turn) for prompt in (wanted.prompts or (None,)) for turn in range(wanted.n)]
    return [
        Call(
            request=wanted,
            request_id=request[REQUEST_ID] if index == 0 else f"{request[REQUEST_ID]}-{index}",
            key_id=key_id,
            whole=not wanted.stream,
            prompt=prompt,
            part=index,
            turn=turn,
        )
        for index, (prompt, turn) in enumerate(parts)
    ]


async def whole(request: web.Request, calls: Sequence[Call]) -> list[Choice]:
    """Every choice, complete. The first part that fails ends the others."""
    tasks = [asyncio.create_task(_collected(request, call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def pieces(request: web.Request, calls: Sequence[Call]) -> AsyncGenerator[tuple[int, Answer], None]:
    """(choice, answer) of all parts as they come."""
    if len(calls) == 1:
        async with contextlib.aclosing(request.app[CONTEXT].dispatch.answer(calls[0])) as answers:
            async for answer in answers:
                yield 0, answer
        return
    queue: asyncio.Queue[tuple[int, Answer] | RackError | None] = asyncio.Queue(_QUEUED)

    async def pump(call: Call) -> None:
        try:
            async with contextlib.aclosing(request.app[CONTEXT].dispatch.answer(call)) as answers:
                async for answer in answers:
                    await queue.put((call.part, answer))
        except RackError as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(call)) for call in calls]
    try:
        left = len(calls)
        while left:
            piece = await _next_piece(queue, tasks)
            if isinstance(piece, RackError):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _next_piece(
    queue: "asyncio.Queue[tuple[int, Answer] | RackError | None]", tasks: Sequence[asyncio.Task[None]]
) -> tuple[int, Answer] | RackError | None:
    """The next piece; a part that broke in an unforeseen way is raised instead of waited for."""
    getting = asyncio.ensure_future(queue.get())
    try:
        while not getting.done():
            await asyncio.wait({getting}, timeout=1.0)
            for task in tasks:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    task.result()
        return getting.result()
    finally:
        getting.cancel()


async def streamed(request: web.Request, calls: Sequence[Call], shape: Shape) -> web.StreamResponse:
    """All parts as one stream. Nothing is sent before the first token: up to then errors have a proper status."""
    stream: EventStream | None = None
    who = identity(calls, shape.prefix)
    begun: set[int] = set()
    try:
        async with contextlib.aclosing(pieces(request, calls)) as parts:
            async for index, answer in parts:
                if isinstance(answer, Tokens) and stream is None:
                    who = identity(calls, shape.prefix, answered=calls[index])
                    stream = EventStream(request, headers(calls[index]))
                    await stream.open()
                if stream is not None:
                    for event in _events(answer, index, who, shape, calls[index], begun):
                        await stream.send(event)
    except RackError as error:
        if stream is None:
            raise
        # a stream that cannot go on ends with an event on which clients raise, never with a silent stop
        await stream.send(error_body(error.message, kind="server_error", code=error.code))
        return await stream.close(done=False)
    if stream is None:
        raise Retryable("the worker sent no token", code="worker_lost")
    if calls[0].request.include_usage:
        await stream.send(shape.usage(who, usage(calls)))
    return await stream.close(done=True)


def _events(
    answer: Answer, index: int, who: Identity, shape: Shape, call: Call, begun: set[int]
) -> list[dict[str, Any]]:
    """What one piece becomes on the stream."""
    if isinstance(answer, Done):
        return [shape.end(who, index, answer.finish)]
    if not isinstance(answer, Tokens):
        return []
    found: list[dict[str, Any]] = []
    if index not in begun:
        begun.add(index)
        first = shape.begin(who, index)
        found += [first] if first is not None else []
    if answer.text or answer.scored:
        found.append(shape.piece(who, index, answer.text, answer.scored if call.request.logprobs is not None else None))
    return found


def identity(calls: Sequence[Call], prefix: str, answered: Call | None = None) -> Identity:
    """What every object of this answer repeats; the fingerprint is of the part that ``answered`` first."""
    first = calls[0]
    return Identity(
        answer_id=f"{prefix}-{first.request_id.removeprefix('req_')}",
        created=int(time.time()),
        model=first.request.model,
        fingerprint=f"fp_{(answered or first).version}",
    )


def usage(calls: Sequence[Call]) -> Usage:
    """Counts over all parts; each prompt is counted once, however often it was answered."""
    return Usage(
        prompt_tok=sum(call.prompt_tok for call in calls if call.turn == 0),
        cached_tok=sum(call.cached_tok for call in calls if call.turn == 0),
        completion_tok=sum(call.completion_tok for call in calls),
    )


def headers(call: Call) -> dict[str, str]:
    """Who answered, by the part that did so first."""
    request_id = call.request_id.split("-")[0]
    return {
        "X-Mlxrack-Version": call.version,
        "X-Mlxrack-Node": call.worker,
        "X-Mlxrack-Request-Id": request_id,
    }


def note_calls(request: web.Request, calls: Sequence[Call]) -> None:
    """The request's numbers for its log line."""
    first, total = calls[0], usage(calls)
    note(
        request,
        model=first.request.model if first.known else "",
        worker=first.worker,
        version=first.version,
        stream=first.request.stream,
        parts=len(calls),
        prompt_tok=total.prompt_tok,
        cached_tok=total.cached_tok,
        completion_tok=total.completion_tok,
        finish=first.finish,
        retries=sum(call.retries for call in calls),
        key=first.key_id,
    )


async def _collected(request: web.Request, call: Call) -> Choice:
    texts: list[str] = []
    scored: list[Scored] = []
    finish = ""
    async with contextlib.aclosing(request.app[CONTEXT].dispatch.answer(call)) as answers:
        async for answer in answers:
            if isinstance(answer, Tokens):
                texts.append(answer.text)
                scored += answer.scored
            elif isinstance(answer, Done):
                finish = answer.finish
    wanted = call.request.logprobs is not None
    return Choice(index=call.part, text="".join(texts), finish=finish, scored=tuple(scored) if wanted else None)
