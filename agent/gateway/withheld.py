"""What of an answer its client does not get: every answer passes the policy's content filter, wherever it is from."""

import contextlib
from collections.abc import AsyncGenerator

import msgspec

from agent.policy.outgoing import Called, Piece
from agent.policy.redaction.withholding import Withholder
from agent.policy.rules import Content
from agent.wire.frames import Answer, Done, Tokens, ToolCall


async def withheld(answers: AsyncGenerator[Answer, None], content: Content) -> AsyncGenerator[Answer, None]:
    """The frames of one answer without what is withheld. Log probabilities are left out: they spell the answer. Raises
    Retryable when a pattern takes too long, and whatever ``answers`` does."""
    withholder = Withholder(content)
    async with contextlib.aclosing(answers):
        async for answer in answers:
            if isinstance(answer, Tokens):
                calls = tuple(Called(id=one.id, name=one.name, arguments=one.arguments) for one in answer.calls)
                piece = withholder.piece(Piece(text=answer.text, reasoning=answer.reasoning, calls=calls))
                yield msgspec.structs.replace(
                    answer, text=piece.text, reasoning=piece.reasoning, calls=_calls(piece), scored=()
                )
            elif isinstance(answer, Done):
                if (rest := withholder.end()).text or rest.reasoning:
                    yield Tokens(id=answer.id, text=rest.text, reasoning=rest.reasoning, count=0)
                yield msgspec.structs.replace(answer, finish=withholder.finish(answer.finish))
            else:
                yield answer


def _calls(piece: Piece) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(id=one.id, name=one.name, arguments=one.arguments) for one in piece.calls)
