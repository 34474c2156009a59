"""Answers from other places: servers on the premises and providers outside, where the policy allows them and the rack
cannot answer, or not in time. Nothing goes on to another place once the client has a part of the answer."""

import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from decimal import Decimal

import msgspec

from agent.egress.prices import cost, unpriced
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
from agent.policy.rules import KeyPolicy, Money, Provider, of_key, provider
from agent.wire.frames import SUSPECT, Accepted, Answer, Done, Tokens, ToolCall
from shared.errors import NotFound, RackError, Refused, Retryable
from shared.logs import get_logger

Frames = AsyncGenerator[Answer, None]
_STAYS = frozenset({SUSPECT, "key_queue_full", "key_bodies_full", "context_length_exceeded"})
"""Errors of the rack after which no other place is asked: they are of the request or of its key."""
_ELSEWHERE = frozenset({"model_not_found", "not_redactable", "sensitive", "provider_not_allowed"})
"""What one place cannot do, or may not, and another one can."""
_NEVER_S = 1e9

log = get_logger("agent.overflow")


class Overflow:
    """What is behind the rack: ``wall`` lets a request out, ``egress`` sends it. ``clock`` is monotonic seconds."""

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
        places = passage.places
        for at, place in enumerate(places):
            # an analysis may have taken places away since it came in
            if (place.category == "rack" and refused is not None) or place not in passage.places:
                continue
            if failure is not None and (not passes_on(failure) or passage.settled):
                break
            left = left or ("always" if place.when == "first" and place.category != "rack" else "")
            if place.category == "rack":
                if passage.private:  # it may have become SENSITIVE on its way to another place
                    call.ask = msgspec.structs.replace(call.ask, private=True)
                source = rack(call)
            else:
                source = self._counted(call, self._elsewhere(call, passage, place, left))
            begun = False
            try:
                async with contextlib.aclosing(
                    self._limited(source, call, _wait_s(passage, place, places[at + 1 :]))
                ) as answers:
                    async for answer in answers:
                        begun = begun or isinstance(answer, Tokens | Done)
                        yield answer
                return
            except _Waited:
                failure = Retryable("no node could begin this request in time", code="no_capacity", retry_after_s=5)
                left = "waited"
            except RackError as error:
                if begun or (passage.private and error.code == "audit_unavailable"):
                    raise
                failure, left = error, left or _why(error)
            of_rack = failure if place.category == "rack" else of_rack
            passage.at = None
            call.start_over()
            log.info("passed_on", request=call.request_id, category=place.category, code=failure.code, left=left)
        raise of_rack or failure or Retryable("no place can answer this now", code="no_capacity", retry_after_s=5)

    async def _limited(self, source: Frames, call: Call, limit_s: float) -> Frames:
        """The frames of a place, of which the first token has to come within ``limit_s`` while the request may go on
        to another one. An answer that is not streamed is begun, too, once the rack has its first token."""
        passage, until_s, begun = call.passage, self._clock() + limit_s, False
        assert passage is not None
        async with contextlib.aclosing(source):
            with TimedReader(source, lambda: call.first_s is not None) as reader:
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

    async def _counted(self, call: Call, source: Frames) -> Frames:
        """The frames of another place, counted as those of a node are."""
        async with contextlib.aclosing(source):
            async for answer in source:
                if isinstance(answer, Done):
                    call.prompt_tok = answer.prompt_tok
                call.note(answer, self._clock())
                yield answer

    async def _elsewhere(self, call: Call, passage: Passage, place: Place, left: Left) -> Frames:
        target = provider(passage.rules, place.provider)
        outgoing = outgoing_of(call.ask, place.model)
        await self._wall.leaves(passage, place, call.ask)
        if target.category == "premises":
            redacted = on_premises(outgoing, target)
        else:
            redacted = await self._analysis.redacted(outgoing, target)
        most_usd = await self._egress.most_usd(target, redacted.outgoing)
        key_id = passage.facts.key_id
        money = _money(of_key(passage.rules, key_id))
        if most_usd is None and (money.day.usd or money.week.usd or money.month.usd):
            raise unpriced(target, place.model)
        spending = self._allowances.reserve(money, 0, 0, None, key_id=key_id, provider=target, most_usd=most_usd)
        passage.at, passage.left, passage.redacted = place, left, redacted.counts
        end, charged = End(finish="length"), True
        try:
            yield Accepted(id=1, prompt_tok=passage.facts.prompt_tok, cached_tok=0)
            async with contextlib.aclosing(self._restored(redacted)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, End):
                        end = piece
                    elif piece.text or piece.reasoning or piece.calls:
                        yield _tokens(piece)
            yield _done(end, call)
        except RackError as error:
            # an answer that never began costs nothing, unless it may be on its way
            charged = call.first_s is not None or error.code == "provider_timeout"
            raise
        finally:
            usd = _cost(target, place, end, call) if charged else Decimal(0)
            passage.usd = spent(passage.usd, usd) if charged else passage.usd
            spending.settle(0, 0, usd)

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
    if isinstance(error, NotFound) or error.code in _ELSEWHERE:
        return True
    return not isinstance(error, Refused) and (error.code in BY_CODE or isinstance(error, Retryable))


def _why(error: RackError | None) -> Left:
    if error is None:
        return ""
    return "no_replica" if error.code in ("model_not_found", "no_capacity", "not_ready") else "full"


def _wait_s(passage: Passage, place: Place, later: Sequence[Place]) -> float:
    """How many seconds a place may take until its first token: as long as the next one says."""
    following = [one for one in later if one in passage.places]
    return following[0].wait_s or _NEVER_S if place.category == "rack" and following else _NEVER_S


def _money(key: KeyPolicy) -> KeyPolicy:
    """Of a key's limits those of what it spends: the others were reserved when its request came in."""
    return KeyPolicy(
        id=key.id, day=Money(usd=key.day.usd), week=Money(usd=key.week.usd), month=Money(usd=key.month.usd)
    )


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
