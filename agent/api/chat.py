"""POST /v1/chat/completions, whole and streamed."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from agent import answers, openai
from agent.answers import Identity, Usage
from agent.api import answering
from agent.api.answering import Shape
from agent.api.context import client_key_id, json_response
from agent.frames import Scored


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer one conversation."""
    key_id = client_key_id(request)
    wanted = openai.parse_chat(await request.read())
    calls = answering.calls_of(request, wanted, key_id)
    try:
        if wanted.stream:
            return await answering.streamed(request, calls, _Chunks())
        choices = await answering.whole(request, calls)
        body = answers.chat_completion(answering.identity(calls, "chatcmpl"), choices, answering.usage(calls))
        return json_response(body, headers=answering.headers(calls[0]))
    finally:
        answering.note_calls(request, calls)


class _Chunks(Shape):
    """A streamed chat: a role first, then content, then the reason why it ended."""

    prefix = "chatcmpl"

    def begin(self, who: Identity, index: int) -> dict[str, Any] | None:
        return answers.chat_chunk(who, index, {"role": "assistant", "content": ""})

    def piece(self, who: Identity, index: int, text: str, scored: Sequence[Scored] | None) -> dict[str, Any]:
        return answers.chat_chunk(who, index, {"content": text}, scored=scored)

    def end(self, who: Identity, index: int, finish: str) -> dict[str, Any]:
        return answers.chat_chunk(who, index, {}, finish=finish)

    def usage(self, who: Identity, usage: Usage) -> dict[str, Any]:
        return answers.usage_chunk(who, "chat.completion.chunk", usage)
