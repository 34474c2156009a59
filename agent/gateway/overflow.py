"""Answers from other places: servers on the premises and providers outside, where the policy allows them and the rack
cannot answer, or not in time. Nothing goes on to another place once the client has a part of the answer."""

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from decimal import Decimal

from agent.egress.prices import cost, most
from agent.egress.providers import Egress
from agent.gateway.allowances import Allowances
from agent.gateway.analysis import Analysis
from agent.gateway.asking import outgoing_of
from agent.gateway.call import Call
from agent.gateway.outcomes import BY_CODE
from agent.gateway.passage import Left, Passage
from agent.gateway.recorded import spent
from agent.gateway.timed_reader import ReadTimeout, TimedReader
from agent.gateway.wall import Wall
from agent.policy.deciding import Place
from agent.policy.outgoing import End, Piece
from agent.policy.redaction import Redacted
from agent.policy.redaction.replacing import on_premises
from agent.policy.redaction.restoring import Restorer
from agent.policy.rules import KeyPolicy, Provider, provider
from agent.wire.frames import SUSPECT, Accepted, Answer, Done, Tokens, ToolCall
from shared.errors import NotFound, RackError, Refused, Retryable
from shared.logs import get_logger

Frames = AsyncGenerator[Answer, None]
_STAYS = frozenset({SUSPECT, "key_queue_full", "key_bodies_full", "context_length_exceeded"})
"""Errors of the rack after which no other place is asked: they are of the request or of its key."""
_NEVER_S = 1e9

log = get_logger("agent.overflow")


class Overflow:
    """``attempts`` answers on the rack."""

    def __init__(
        self,
        wall: Wall,
        egress: Egress,
        analysis: Analysis,
        allowances: Allowances,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall, self._egress, self._analysis = wall, egress, analysis
        self._allowances, self._clock = allowances, clock

    def takes(self, call: Call, error: RackError) -> bool:
        """Whether a request that the rack refused at admission may be answered elsewhere."""
        passage = call.passage
        return passage is not None and bool(passage.elsewhere) and passes_on(error)

    async def run(self, call: Call, rack: Callable[[Call], Frames], refused: RackError | None) -> Frames:
        """The answer of the first place that gives one. ``refused`` is why the rack did not admit it. Raises what the
        rack failed with, or else the last place."""
        passage = call.passage
        assert passage is not None
        failure: RackError | None = refused
        of_rack, left = refused, _why(refused)
        for place in passage.places:
            if place.category == "rack" and refused is not None:
                continue
            if failure is not None and (not passes_on(failure) or passage.settled):
                break
            left = left or ("always" if place.when == "first" and place.category != "rack" else "")
            source = rack(call) if place.category == "rack" else self._elsewhere(call, passage, place, left)
            begun = False
            try:
                async with contextlib.aclosing(self._limited(source, passage, _wait_s(passage, place))) as answers:
                    async for answer in answers:
                        begun = begun or isinstance(answer, Tokens | Done)
                        yield answer
                return
            except _Waited:
                failure = Retryable("no node could begin this request in time", code="no_capacity", retry_after_s=5)
                left = "waited"
            except RackError as error:
                if begun:
                    raise
                failure, left = error, left or _why(error)
            of_rack = failure if place.category == "rack" else of_rack
            passage.at = None
            call.start_over()
            log.info("passed_on", request=call.request_id, category=place.category, code=failure.code, left=left)
        raise of_rack or failure or Retryable("no place can answer this now", code="no_capacity", retry_after_s=5)

    async def _limited(self, source: Frames, passage: Passage, limit_s: float) -> Frames:
        """The frames of a place, of which the first token has to come within ``limit_s`` while the request may go on
        to another one."""
        until_s, begun = self._clock() + limit_s, False
        async with contextlib.aclosing(source):
            with TimedReader(source) as reader:
                while True:
                    left_s = _NEVER_S if begun or passage.settled else until_s - self._clock()
                    try:
                        answer = await reader.next(max(0.0, left_s))
                    except StopAsyncIteration:
                        return
                    except ReadTimeout:
                        raise _Waited from None
                    begun = begun or isinstance(answer, Tokens | Done)
                    yield answer

    # ---- elsewhere ----

    async def _elsewhere(self, call: Call, passage: Passage, place: Place, left: Left) -> Frames:
        target = provider(passage.rules, place.provider)
        outgoing = outgoing_of(call.ask, place.model)
        await self._wall.leaves(passage, place, call.ask)
        if target.category == "premises":
            redacted = on_premises(outgoing, target)
        else:
            redacted = await self._analysis.redacted(outgoing, target)
        spending = self._allowances.reserve(
            KeyPolicy(id=""), 0, 0, None, key_id="", provider=target, most_usd=most(target, outgoing)
        )
        passage.at, passage.left, passage.redacted = place, left, redacted.counts
        end = End(finish="length")
        try:
            yield self._noted(call, Accepted(id=1, prompt_tok=passage.facts.prompt_tok, cached_tok=0))
            async with contextlib.aclosing(self._restored(redacted)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, End):
                        end = piece
                    elif piece.text or piece.reasoning or piece.calls:
                        yield self._noted(call, _tokens(piece))
            yield self._noted(call, _done(end, call))
        finally:
            usd = _cost(target, place, end, call)
            passage.usd = spent(passage.usd, usd)
            spending.settle(0, 0, usd)

    def _noted(self, call: Call, answer: Answer) -> Answer:
        """A frame, counted like one of the rack; the place has the last word on the number of tokens."""
        call.note(answer, self._clock())
        if isinstance(answer, Done):
            call.prompt_tok = answer.prompt_tok
        return answer

    async def _restored(self, redacted: Redacted) -> AsyncGenerator[Piece | End, None]:
        """What the place answers, with the client's own texts in place of the placeholders."""
        restorer = Restorer(redacted)
        async with contextlib.aclosing(self._egress.send(redacted)) as pieces:
            async for piece in pieces:
                if isinstance(piece, End):
                    yield restorer.end()
                    yield piece
                else:
                    yield restorer.piece(piece)


class _Waited(Exception):
    """No first token came in time."""


def passes_on(error: RackError) -> bool:
    """Whether another place may be asked after this error: nobody could serve the request, or a place failed at it."""
    if error.code in _STAYS:
        return False
    if isinstance(error, NotFound) or error.code in ("model_not_found", "not_redactable", "sensitive"):
        return True
    return not isinstance(error, Refused) and (error.code in BY_CODE or isinstance(error, Retryable))


def _why(error: RackError | None) -> Left:
    if error is None:
        return ""
    return "no_replica" if error.code in ("model_not_found", "no_capacity", "not_ready") else "full"


def _wait_s(passage: Passage, place: Place) -> float:
    """How long a place may take until its first token: as long as the next one says."""
    at = passage.places.index(place)
    following = passage.places[at + 1 :]
    if place.category != "rack" or not following or not following[0].wait_s:
        return _NEVER_S
    return following[0].wait_s


def _tokens(piece: Piece) -> Tokens:
    calls = tuple(ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in piece.calls)
    # a provider tells the number of its tokens at the end
    return Tokens(id=1, text=piece.text, reasoning=piece.reasoning, calls=calls, count=1)


def _done(end: End, call: Call) -> Done:
    return Done(
        id=1,
        finish=end.finish,
        prompt_tok=end.prompt_tok if end.prompt_tok is not None else call.prompt_tok,
        cached_tok=end.cached_tok,
        completion_tok=end.completion_tok if end.completion_tok is not None else call.completion_tok,
        reasoning_tok=end.reasoning_tok,
    )


def _cost(target: Provider, place: Place, end: End, call: Call) -> Decimal | None:
    """What an answer cost, by the provider's own counts where it gave them."""
    prompt = end.prompt_tok if end.prompt_tok is not None else call.prompt_tok
    completion = end.completion_tok if end.completion_tok is not None else call.completion_tok
    return cost(target, place.model, prompt, completion, end.cached_tok)
