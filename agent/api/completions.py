"""POST /v1/completions: continues a prompt, whole and streamed."""

from collections import Counter
from collections.abc import Sequence

from aiohttp import web

from agent.api import answering, answers, openai
from agent.api.answering import Event, Shape
from agent.api.answers import Choice, Identity, Usage
from agent.wire.frames import Scored, Tokens


async def completions(request: web.Request) -> web.StreamResponse:
    """Continue one or several prompts."""
    return await answering.answer(request, openai.parse_text, _Pieces())


class _Pieces(Shape):
    """A streamed text: every event is a text_completion with one piece of it."""

    prefix = "cmpl"

    def __init__(self) -> None:
        self._offset: Counter[int] = Counter()

    def whole(self, who: Identity, choices: Sequence[Choice], usage: Usage) -> Event:
        return answers.text_completion(who, choices, usage)

    def begin(self, who: Identity, index: int) -> Event | None:
        return None

    def pieces(self, who: Identity, index: int, answer: Tokens, scored: Sequence[Scored] | None) -> list[Event]:
        if not (answer.text or answer.scored):
            return []
        held = tuple(scored) if scored is not None else None
        choice = Choice(index=index, text=answer.text, finish="", scored=held)
        piece = answers.text_completion(who, [choice], None, begin=self._offset[index])
        self._offset[index] += sum(len(one.chosen.text) for one in held or ())
        return [piece]

    def end(self, who: Identity, index: int, finish: str) -> Event:
        return answers.text_completion(who, [Choice(index=index, text="", finish=finish)], None)

    def usage(self, who: Identity, usage: Usage) -> Event:
        return answers.usage_chunk(who, "text_completion", usage)
