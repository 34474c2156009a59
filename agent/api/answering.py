"""One client request as its parts: each of n answers to each prompt is one call, and all run concurrently."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from aiohttp import web

from agent.api import ignored
from agent.api.answers import Choice, Identity, Usage, annotated, error_body
from agent.api.bodies import Held, weight
from agent.api.context import (
    BODIES,
    CONTEXT,
    KEY_ID,
    LOGGED,
    PARSING,
    PASSAGE,
    REQUEST_ID,
    cache_of,
    client_key_id,
    json_response,
    note,
)
from agent.api.openai import AnswerRequest, EmbedRequest
from agent.api.sse import EventStream, Unread
from agent.api.wire import body_of
from agent.config import Api
from agent.gateway.call import Call
from agent.gateway.outcomes import ended
from agent.gateway.passage import Passage
from agent.gateway.wall import Asked
from agent.policy import classes
from agent.wire.frames import Accepted, Answer, Ask, Done, Generate, Scored, Tokens, Waits
from shared.errors import RackError, Retryable

R = TypeVar("R", bound=AnswerRequest | EmbedRequest)

_LARGE_BYTES = 256 << 10
_QUEUED = 64
"""Pieces queued for a slow client before the parts are blocked."""


Event = dict[str, Any]
"""A JSON object as sent to the client."""


class Shape(Protocol):
    """How the pieces of a stream are encoded for the client."""

    prefix: str

    def whole(self, who: Identity, choices: Sequence[Choice], usage: Usage) -> Event:
        """A complete answer."""

    def begin(self, who: Identity, index: int) -> Event | None:
        """The event before a choice's first text; None for none."""

    def pieces(self, who: Identity, index: int, answer: Tokens, scored: Sequence[Scored] | None) -> list[Event]:
        """Part of a choice, in as many events as it takes."""

    def end(self, who: Identity, index: int, finish: str) -> Event:
        """The event that ends a choice, with its finish reason."""

    def usage(self, who: Identity, usage: Usage) -> Event:
        """Token counts over all choices."""


async def read(request: web.Request, parse: Callable[[bytes, Api], R], key_id: str, held: Held) -> R:
    """A request's body, parsed; ``held`` counts its memory. It is admitted before it is read, and weighed before it is
    decoded; a large one is decoded in a thread, because peers wait at most a second for a heartbeat."""
    config = request.app[CONTEXT].config
    request[KEY_ID] = key_id
    note(request, key=key_id)
    try:
        with request.app[CONTEXT].dispatch.reading(key_id):
            body = await body_of(request, config.limits.body_s, held)
            if len(body) < _LARGE_BYTES:
                held.take(max(0, weight(body, held.most) - held.bytes))
                wanted = parse(body, config.api)
            else:
                run = partial(asyncio.get_running_loop().run_in_executor, request.app[PARSING])
                held.take(max(0, await run(weight, body, held.most) - held.bytes))
                wanted = await run(parse, body, config.api)
    except Retryable as error:
        request.app[CONTEXT].dispatch.turned_away(request[REQUEST_ID], key_id, error)
        if not request.content.is_eof():  # it will be read and dropped, which takes CPU time, too
            await asyncio.sleep(held.pace_s(request.content_length or 0, time.monotonic()))
        raise
    ignored.log_once(wanted.ignored, request.app[LOGGED])
    return wanted


async def passed(request: web.Request, wanted: AnswerRequest | EmbedRequest, key_id: str) -> Passage:
    """The request, decided by the policy; it is closed with its response. Raises Refused and Retryable."""
    header = request.headers.getall(classes.HEADER, ())
    declared = classes.declared(header, classes.HEADER) if header else classes.NOTHING
    asked = Asked(request[REQUEST_ID], key_id, _ask_of(wanted), declared, wanted.declared)
    if isinstance(wanted, AnswerRequest):
        asked = asked._replace(prompts=wanted.prompts, answers=wanted.n, stream=wanted.stream)
    try:
        passage = request[PASSAGE] = await request.app[CONTEXT].boundary.wall.enter(asked)
    except RackError as error:
        request.app[CONTEXT].dispatch.turned_away(request[REQUEST_ID], key_id, error)
        raise
    return passage


def _ask_of(wanted: AnswerRequest | EmbedRequest) -> Ask:
    return wanted.generate if isinstance(wanted, AnswerRequest) else wanted.embed


def calls_of(request: web.Request, wanted: AnswerRequest, key_id: str, passage: Passage) -> list[Call]:
    """A call for each choice. Parts beyond the first of a prompt do not count the request or its prompt again."""
    cache = cache_of(request, key_id)
    ask = msgspec.structs.replace(
        wanted.generate, model=passage.model or wanted.generate.model, private=passage.private
    )
    parts = [(prompt, turn) for prompt in (wanted.prompts or (None,)) for turn in range(wanted.n)]
    return [
        Call(
            ask=ask if prompt is None else msgspec.structs.replace(ask, prompt=prompt),
            request_id=request[REQUEST_ID] if index == 0 else f"{request[REQUEST_ID]}-{index}",
            key_id=key_id,
            cache=cache,
            whole=not wanted.stream,
            part=index,
            turn=turn,
            seed=wanted.seed,
            passage=passage,
            priority=passage.priority,
        )
        for index, (prompt, turn) in enumerate(parts)
    ]


async def answer(
    request: web.Request, parse: Callable[[bytes, Api], AnswerRequest], shape: Shape
) -> web.StreamResponse:
    """A client's request from its body to its last byte, whole or streamed."""
    key_id = client_key_id(request)
    with request.app[BODIES].held(key_id) as held:
        return await _answered(request, await read(request, parse, key_id, held), shape, key_id)


async def _answered(request: web.Request, wanted: AnswerRequest, shape: Shape, key_id: str) -> web.StreamResponse:
    passage = await passed(request, wanted, key_id)
    calls = passage.calls = calls_of(request, wanted, key_id, passage)
    try:
        if wanted.stream:
            return await streamed(request, calls, wanted, shape)
        choices = await whole(request, calls)
        body = shape.whole(identity(calls, shape.prefix), choices, usage(calls))
        ends = [call.done for call in calls if call.done]
        return json_response(annotated(body, ends, timed=wanted.timings), headers=headers(calls, wanted.ignored))
    finally:
        note_calls(request, calls)


async def whole(request: web.Request, calls: Sequence[Call]) -> list[Choice]:
    """Every choice, complete. The first part that fails cancels the others."""
    with request.app[CONTEXT].dispatch.enter(calls):
        if len(calls) == 1:
            return [await _collected(request, calls[0])]
        tasks = [asyncio.create_task(_collected(request, call)) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        except RackError as error:
            calls[0].fate = ended(error)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def pieces(request: web.Request, calls: Sequence[Call]) -> AsyncGenerator[tuple[int, Answer], None]:
    """(choice, answer) of all parts as they arrive."""
    with request.app[CONTEXT].dispatch.enter(calls):
        async with contextlib.aclosing(_side_by_side(request, calls)) as found:
            async for index, answer in found:
                yield index, answer


async def _side_by_side(request: web.Request, calls: Sequence[Call]) -> AsyncGenerator[tuple[int, Answer], None]:
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
            if isinstance(piece := await _next_piece(queue, tasks), RackError):
                calls[0].fate = ended(piece)
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
    """The next piece; an unexpected failure of a part is raised instead of waited for."""
    getting = asyncio.ensure_future(queue.get())
    try:
        while not getting.done():
            await asyncio.wait({getting}, timeout=1.0)
            for task in tasks:
                if task.done() and (task.cancelled() or task.exception() is not None):
                    task.result()
        return getting.result()
    finally:
        getting.cancel()


async def streamed(
    request: web.Request, calls: Sequence[Call], wanted: AnswerRequest, shape: Shape
) -> web.StreamResponse:
    """All parts as one stream. Nothing is sent before the first token or the first comment that keeps the connection
    alive: until then, errors get a proper status."""
    stream: EventStream | None = None
    who = identity(calls, shape.prefix)
    begun: set[int] = set()
    config = request.app[CONTEXT].config
    quiet = _Quiet(config.api.keepalive_s)
    # with usage requested, every chunk has the field, as clients expect
    more = {"usage": None} if wanted.include_usage else {}
    try:
        async with contextlib.aclosing(pieces(request, calls)) as parts:
            async for index, answer in parts:
                told = isinstance(answer, Tokens)
                due = quiet.due(answer, time.monotonic())
                if (told or due) and stream is None:
                    patience_s = config.limits.token_gap_s
                    stream = EventStream(request, headers(calls, wanted.ignored, calls[index]), patience_s)
                    await stream.open()
                    settle(calls[index])
                if due and stream is not None:
                    await stream.keep_alive()
                if told and not begun:
                    who = identity(calls, shape.prefix, answered=calls[index])
                if stream is not None:
                    for event in _events(answer, index, who, shape, wanted, begun):
                        await stream.send({**event, **more})
        if stream is None or not begun:
            raise Retryable("the worker sent no tokens", code="worker_lost")
        if wanted.include_usage:
            await stream.send(shape.usage(who, usage(calls)))
        return await stream.close(done=True)
    except Unread:
        return _unread(request, stream)
    except RackError as error:
        if stream is None:
            raise
        with contextlib.suppress(Unread):
            # a stream that cannot be continued ends with an error event, on which clients raise, never silently
            await stream.send(error_body(error.message, kind="server_error", code=error.code))
            return await stream.close(done=False)
        return _unread(request, stream)


class _Quiet:
    """When a stream without tokens is to be kept alive: every ``every_s`` (0: never), from when a worker took it."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._since_s: float | None = None

    def due(self, answer: Answer, now_s: float) -> bool:
        """Whether a comment is to be sent, now that ``answer`` came."""
        if isinstance(answer, Tokens):
            self._every_s = 0.0
        if not self._every_s or not isinstance(answer, Accepted | Waits):
            return False
        if self._since_s is None:
            self._since_s = now_s if isinstance(answer, Accepted) else None
            return False
        if now_s - self._since_s < self._every_s:
            return False
        self._since_s = now_s
        return True


def _unread(request: web.Request, stream: EventStream | None) -> web.StreamResponse:
    """The client has stopped reading."""
    assert stream is not None
    note(request, unread=True)
    return stream.response


def _events(
    answer: Answer, index: int, who: Identity, shape: Shape, wanted: AnswerRequest, begun: set[int]
) -> list[Event]:
    """The events that one piece becomes on the stream."""
    if isinstance(answer, Done):
        return [annotated(shape.end(who, index, answer.finish), [answer], timed=wanted.timings)]
    if not isinstance(answer, Tokens):
        return []
    found: list[Event] = []
    if index not in begun:
        begun.add(index)
        first = shape.begin(who, index)
        found += [first] if first is not None else []
    return found + shape.pieces(who, index, answer, answer.scored if wanted.generate.logprobs is not None else None)


def identity(calls: Sequence[Call], prefix: str, answered: Call | None = None) -> Identity:
    """The fields that every object of this answer repeats; the fingerprint is of the part that ``answered`` first."""
    first = calls[0]
    place = first.passage.at if first.passage is not None else None
    return Identity(
        answer_id=f"{prefix}-{first.request_id.removeprefix('req_')}",
        created=int(time.time()),
        model=first.model if place is None else place.model,
        fingerprint=f"fp_{(answered or first).version}",
    )


def usage(calls: Sequence[Call]) -> Usage:
    """Token counts over all parts; each prompt is counted once, however many answers it has."""
    return Usage(
        prompt_tok=sum(call.prompt_tok for call in calls if call.turn == 0),
        cached_tok=sum(call.cached_tok for call in calls if call.turn == 0),
        completion_tok=sum(call.completion_tok for call in calls),
        reasoning_tok=sum(call.done.reasoning_tok for call in calls if call.done),
    )


def headers(calls: Sequence[Call], unused: Sequence[str] = (), answered: Call | None = None) -> dict[str, str]:
    """Headers that name the worker and version of the part that ``answered`` first, and fields that had no effect."""
    first = answered or calls[0]
    # an answer from elsewhere has neither
    named = {"X-Mlxrack-Version": first.version, "X-Mlxrack-Node": first.worker}
    found = {name: value for name, value in named.items() if value}
    if first.passage is not None:
        found |= _ruled(first.passage)
    if first.retries:
        found["X-Mlxrack-Retries"] = str(first.retries)
    return found | ignored.header([*unused, *(name for call in calls for name in call.ignored)])


def settle(call: Call) -> None:
    """The client has a sign of life: from here on the answer stays where it is."""
    if call.passage is not None:
        call.passage.settled = True


def _ruled(passage: Passage) -> dict[str, str]:
    """Headers that say how the request was taken, and where its answer is from."""
    place = passage.at
    found = {
        "X-Mlxrack-Class": f"{passage.facts.task_class}{', SENSITIVE' if passage.private else ''}",
        "X-Mlxrack-Place": "rack" if place is None else place.category,
    }
    return found if place is None else {**found, "X-Mlxrack-Provider": place.provider}


def note_calls(request: web.Request, calls: Sequence[Call]) -> None:
    """Add the request's numbers to its log line."""
    first, total = calls[0], usage(calls)
    note(
        request,
        model=first.model if first.known else "",
        worker=first.worker,
        version=first.version,
        stream=not first.whole,
        parts=len(calls),
        prompt_tok=total.prompt_tok,
        cached_tok=total.cached_tok,
        completion_tok=total.completion_tok,
        finish=first.finish,
        retries=sum(call.retries for call in calls),
        key=first.key_id,
    )


async def _collected(request: web.Request, call: Call) -> Choice:
    found: list[Tokens] = []
    finish = ""
    async with contextlib.aclosing(request.app[CONTEXT].dispatch.answer(call)) as answers:
        async for answer in answers:
            if isinstance(answer, Tokens):
                found.append(answer)
            elif isinstance(answer, Done):
                finish = answer.finish
    scored = isinstance(call.ask, Generate) and call.ask.logprobs is not None
    return Choice(
        index=call.part,
        text="".join(one.text for one in found),
        finish=finish,
        reasoning="".join(one.reasoning for one in found),
        calls=tuple(each for one in found for each in one.calls),
        scored=tuple(each for one in found for each in one.scored) if scored else None,
    )
