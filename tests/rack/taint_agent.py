"""``python -m tests.rack.taint_agent``: mlxrack-agent with taints, and as much of the wall as shows what they do: a
request with SENSITIVE in X-Task-Class, or with something that was in such a request, is private. X-Test-Sensitive says
why."""

import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from agent import cli, daemon
from agent.api import answering, app
from agent.api.answers import Choice
from agent.api.openai import AnswerRequest
from agent.api.peer import TAINTS
from agent.gateway.call import Call
from agent.gateway.taints import Taints
from agent.policy.taint import messages_of
from agent.wire.frames import Answer, Done, Message, Tokens

WHY = web.RequestKey("why", str)
build, walled, whole, pieces = app.build, answering._answered, answering.whole, answering.pieces


class WithTaints(daemon.Daemon):
    """The agent with its taints wired."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.taints = Taints(self._state, self._live, self._table, self._peer_client, self._keys, self._emit)
        self.status.taints = self.taints
        self._heartbeats.on_heard = self.taints.heard
        app.build = self._built  # type: ignore[assignment]

    def _built(self, context: Any) -> web.Application:
        made = build(context, self.taints)

        async def say(request: web.Request, response: web.StreamResponse) -> None:
            response.headers["X-Test-Sensitive"] = request.get(WHY, "")

        made.on_response_prepare.append(say)
        return made

    async def run(self, started: Callable[[int], None] = lambda _: None) -> None:
        self.taints.start()
        try:
            await super().run(started)
        finally:
            await self.taints.close()


async def _answered(request: web.Request, wanted: AnswerRequest, shape: answering.Shape, key_id: str) -> Any:
    taints, messages = request.app[TAINTS], messages_of(wanted.generate)
    label = "label" if "SENSITIVE" in request.headers.get("X-Task-Class", "") else None
    reasons: Any = [reason for reason in (label, await taints.look(messages)) if reason]
    request[WHY] = ",".join(reasons)
    if reasons:
        wanted = msgspec.structs.replace(wanted, generate=msgspec.structs.replace(wanted.generate, private=True))
        await taints.add(messages, reasons)
    return await walled(request, wanted, shape, key_id)


async def _whole(request: web.Request, calls: Sequence[Call]) -> list[Choice]:
    choices = await whole(request, calls)
    if request[WHY]:
        said = [Message(role="assistant", content=one.text, reasoning=one.reasoning) for one in choices]
        await request.app[TAINTS].add(said, request[WHY].split(","))  # type: ignore[arg-type]
    return choices


async def _pieces(request: web.Request, calls: Sequence[Call]) -> AsyncGenerator[tuple[int, Answer], None]:
    text = ""
    async for index, answer in pieces(request, calls):
        text += answer.text if isinstance(answer, Tokens) else ""
        if isinstance(answer, Done) and request[WHY]:
            await request.app[TAINTS].add_text(text, request[WHY].split(","))  # type: ignore[arg-type]
        yield index, answer


if __name__ == "__main__":
    daemon.Daemon = WithTaints  # type: ignore[misc]
    answering._answered, answering.whole, answering.pieces = _answered, _whole, _pieces
    sys.exit(cli.main())
