"""POST /v1/chat/completions, whole and streamed."""

from collections import Counter
from collections.abc import Sequence

from aiohttp import web

from agent.api import answering, answers, openai
from agent.api.answering import Event, Shape
from agent.api.answers import Choice, Identity, Usage
from agent.wire.frames import Scored, Tokens


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer one conversation."""
    return await answering.answer(request, openai.parse_chat, _Chunks())


class _Chunks(Shape):
    """A streamed chat: the role first, then content, then the finish reason."""

    prefix = "chatcmpl"

    def __init__(self) -> None:
        self._called: Counter[int] = Counter()

    def whole(self, who: Identity, choices: Sequence[Choice], usage: Usage) -> Event:
        return answers.chat_completion(who, choices, usage)

    def begin(self, who: Identity, index: int) -> Event | None:
        return answers.chat_chunk(who, index, {"role": "assistant", "content": ""})

    def pieces(self, who: Identity, index: int, answer: Tokens, scored: Sequence[Scored] | None) -> list[Event]:
        deltas: list[Event] = []
        if answer.reasoning:
            deltas.append({"reasoning_content": answer.reasoning})
        if answer.text or (answer.scored and not answer.reasoning):
            deltas.append({"content": answer.text})
        for call in answer.calls:
            deltas += answers.call_deltas(call, self._called[index])
            self._called[index] += 1
        # log probabilities are sent once, with the first delta
        return [
            answers.chat_chunk(who, index, delta, scored=scored if number == 0 else None)
            for number, delta in enumerate(deltas)
        ]

    def end(self, who: Identity, index: int, finish: str) -> Event:
        return answers.chat_chunk(who, index, {}, finish=finish)

    def usage(self, who: Identity, usage: Usage) -> Event:
        return answers.usage_chunk(who, "chat.completion.chunk", usage)
