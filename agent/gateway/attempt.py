"""One request's attempts: sent to a node, watched, and when its worker is lost retried or continued elsewhere.

Until something has left for the client a request can be retried. A whole answer leaves at its end; a stream leaves with
its first token. After that, another loader of the same version continues where the lost one stopped.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Literal

from agent.config import Limits
from agent.gateway.call import Call
from agent.gateway.node_health import NodeHealth
from agent.gateway.node_selection import NodeSelection
from agent.gateway.recovery import MAX_RETRIES, Loss, after
from agent.gateway.retry_budget import RetryBudget
from agent.gateway.routing import Candidate, Decision, Forward, Local
from agent.gateway.timed_reader import ReadTimeout, TimedReader
from agent.gateway.timeouts import AttemptTimeouts, first_limit_s
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import PeerTable
from agent.process.prefixes import Text, text_of
from agent.wire.frames import Accepted, Answer, Ask, Embedded, Failed, Generate, Tokens, Waits
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger

TRIAL_S = 1.0
"""An answer that flows for so long closes a circuit breaker."""
LOST = ("worker_lost", "loader_lost", "not_ready")
"""Errors that mean that the node is gone, its loader is, or the model is not there. The last says nothing against the
node."""
ENGINE_FAILED = "engine_failed"
"""The engine failed at this one request. It is tried on another node, and only if that can answer it the first is to
blame."""
TOO_LONG = "context_length_exceeded"

log = get_logger("agent.dispatch")


class Attempts:
    """``work`` answers on this node; ``prefix_key`` keys the hashes of prompts' prefixes."""

    def __init__(
        self,
        node: str,
        table: PeerTable,
        peer_client: PeerClient,
        limits: Limits,
        selection: NodeSelection,
        health: NodeHealth,
        budget: RetryBudget,
        work: Callable[[Ask, Text], AsyncGenerator[Answer, None]],
        *,
        prefix_key: bytes = b"",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node, self._table, self._peer_client, self._limits = node, table, peer_client, limits
        self._selection, self._health, self._budget, self._work = selection, health, budget, work
        self._prefix_key = prefix_key
        self._clock = clock

    async def run(self, call: Call) -> AsyncGenerator[Answer, None]:
        """Try until an answer is complete, or there is no more to be done. What a whole answer has brought is held
        until then."""
        held: list[Answer] = []
        left = False
        call.text = text_of(self._prefix_key, call.ask)
        while True:
            try:
                decision = await self._selection.place(call)
            except Retryable:
                if not (call.going_on and call.whole and call.retries < MAX_RETRIES and self._paid()):
                    raise
                # nobody can go on with it, and nothing has left: from the beginning, by any version
                held.clear()
                self._start_over(call, "", "its version is gone")
                continue
            try:
                async with contextlib.aclosing(self._watched(decision, call)) as answers:
                    async for answer in answers:
                        if call.whole:
                            held.append(answer)
                            continue
                        left = left or isinstance(answer, Tokens | Embedded)
                        yield answer
            except Refused as error:
                if error.code != TOO_LONG or not self._has_roomier(call, decision, error):
                    raise
                if not call.going_on:
                    held.clear()
                continue
            except Retryable as error:
                if error.code not in (*LOST, ENGINE_FAILED):
                    raise
                if not self._recovered(call, decision, error, left=left):
                    raise
                if not call.going_on:
                    held.clear()
                continue
            for answer in held:
                yield answer
            return

    async def _watched(self, decision: Decision, call: Call) -> AsyncGenerator[Answer, None]:
        """One attempt, noted on the call, and its verdict on the node: good, bad, or none when the client left. One
        layer for everything that is done to each piece: each further one costs the door as much as the work."""
        chosen = decision.chosen
        assert chosen is not None
        node, model = chosen.node, call.model
        probe = self._health.begin(node, model, self._clock())
        self._note(call, "continues" if call.going_on else "sent", node, decision=decision)
        watch, verdict, flows_s = self._watch(chosen, call), False, 0.0
        try:
            async with (
                self._attempt(decision, chosen, call) as answers,
                contextlib.aclosing(TimedReader(answers)) as patience,
            ):
                while True:
                    answer = await self._next(patience, watch)
                    if answer is None:
                        break
                    now = self._clock()
                    if isinstance(answer, Waits):
                        watch.waits(now)
                        continue
                    if isinstance(answer, Tokens):
                        watch.token(now)
                        if probe:
                            flows_s = flows_s or now
                            if now - flows_s > TRIAL_S:
                                self._health.ok(node, model, now, probe=True)
                                probe = False
                    elif isinstance(answer, Failed):
                        raise _error_of(answer)
                    if call.going_on and isinstance(answer, Accepted):
                        continue  # the client has heard that already
                    call.note(answer, now)
                    yield answer
            self._health.ok(node, model, self._clock(), probe=probe)
            verdict = True
            for other in call.faulty:
                why = "an engine failed at a request that another answered"
                self._health.failed(other, model, self._clock(), why, probe=False)
        except Retryable as error:
            verdict = error.code in LOST and error.code != "not_ready"
            if verdict:
                self._health.failed(node, model, self._clock(), error.message, probe=probe)
            raise
        finally:
            if not verdict:
                self._health.given_up(node, model, probe=probe)

    @contextlib.asynccontextmanager
    async def _attempt(
        self, decision: Decision, chosen: Candidate, call: Call
    ) -> AsyncIterator[AsyncGenerator[Answer, None]]:
        """The answers of where it was decided to try; what a peer has been given is on the books meanwhile."""
        ask, place = call.frame(self._node), decision.place
        if isinstance(place, Local):
            async with contextlib.aclosing(self._work(ask, call.text)) as answers:
                yield answers
            return
        assert isinstance(place, Forward)
        prompt_tok = max(1, call.text.prompt_tok - chosen.saved_tok)
        sent_at = self._table.sent(place.node, call.model, prompt_tok)
        try:
            link = await self._peer_client.link(place.node, place.url)
            async with contextlib.aclosing(link.generate(ask)) as answers:
                yield answers
        finally:
            self._table.ended(place.node, call.model, prompt_tok, sent_at)

    async def _next(self, patience: TimedReader[Answer], watch: AttemptTimeouts) -> Answer | None:
        """The next piece, None at the end. Raises Retryable when it does not come in time."""
        try:
            return await patience.next(watch.limit_s(self._clock()))
        except StopAsyncIteration:
            return None
        except ReadTimeout:
            if watch.is_over:
                reason = f"the request took over {self._limits.request_s:g} s"
                raise Retryable(reason, code="deadline_exceeded") from None
            raise Retryable(f"no token for {watch.waited_s:.1f} s", code="worker_lost") from None

    def _watch(self, chosen: Candidate, call: Call) -> AttemptTimeouts:
        return AttemptTimeouts(
            self._health.gaps(chosen.node, call.model),
            first_s=self._first_limit_s(chosen, call),
            gap_s=self._limits.token_gap_s,
            until_s=call.began_s + self._limits.request_s,
            learned=self._selection.has_another(call.model, chosen.node),
        )

    def _first_limit_s(self, chosen: Candidate, call: Call) -> float:
        if not isinstance(call.ask, Generate):
            return self._limits.request_s  # a long list of inputs comes back at its end
        if not chosen.measured or not self._selection.has_another(call.model, chosen.node):
            return self._limits.first_token_s
        return first_limit_s(chosen.first_token_s, self._limits.first_token_s)

    def _has_roomier(self, call: Call, decision: Decision, error: Refused) -> bool:
        """Whether another node's context is larger than that of the node which found the prompt too long; one that is
        away for a moment counts. What has been made of an answer is kept."""
        chosen = decision.chosen
        assert chosen is not None
        call.over_tok, call.too_long = max(call.over_tok, chosen.context_tok), error
        if not chosen.context_tok or not self._selection.is_roomier(call):
            return False
        self._note(call, "retries", chosen.node, why=error.message)
        if not call.going_on:
            call.start_over()
        return True

    def _recovered(self, call: Call, decision: Decision, error: Retryable, *, left: bool) -> bool:
        """Prepare what recovery.after decides; False when the request is given up."""
        place = decision.place
        assert isinstance(place, Local | Forward)
        node = place.node
        self._lose(call, place, error)
        then = after(
            Loss(
                how=_how(error.code),
                elsewhere=len(call.faulty) == 1 and self._selection.has_another(call.model, node),
                left=left,
                can_go_on=call.can_go_on,
                held=self._selection.held_by_peer(call.model, call.version, node),
                retries=call.retries,
                in_time=self._clock() < call.began_s + self._limits.load_wait_s,
            )
        )
        if then.what == "give_up" or (then.paid and not self._paid()):
            return False
        if then.what == "go_on":
            self._go_on(call, node, paid=then.paid)
        else:
            self._start_over(call, node, error.message, paid=then.paid)
        return True

    def _lose(self, call: Call, place: Local | Forward, error: Retryable) -> None:
        """What a loss says about the node: nothing new goes there before its next beat, which may be soon."""
        self._note(call, "lost", place.node, why=error.message)
        call.tried.add(place.node)
        if error.code == ENGINE_FAILED:
            call.faulty = (*call.faulty, place.node)
        elif isinstance(place, Forward) and error.code == "not_ready":
            self._table.unready(place.node, call.model)
        elif isinstance(place, Forward) and error.code == "worker_lost":
            self._table.lose(place.node)

    def _paid(self) -> bool:
        return self._budget.take(self._clock())

    def _go_on(self, call: Call, node: str, *, paid: bool) -> None:
        """What exists of the answer stays; another loader continues after it. On this node it may be asked for at once,
        so that a loader that was draining is known to be missed."""
        if node == self._node and node not in call.faulty:
            call.tried.discard(node)
        if paid:
            call.retries += 1
        call.going_on = True
        call.lost_s = self._clock()
        call.continuations += 1
        log.info("continued", request=call.request_id, node=node, tokens=len(call.made), version=call.version)

    def _start_over(self, call: Call, node: str, reason: str, *, paid: bool = True) -> None:
        """From the beginning, elsewhere. Being turned away is no retry."""
        call.start_over()
        if paid:
            call.retries += 1
            self._note(call, "retries", node, why=reason)
            log.info("retried", request=call.request_id, node=node, retries=call.retries)

    def _note(self, call: Call, what: str, node: str, *, why: str = "", decision: Decision | None = None) -> None:
        if call.trail is not None:
            call.trail.add(self._clock(), what, node, why, decision)


def _error_of(failed: Failed) -> RackError:
    if failed.retryable:
        code = "not_ready" if failed.code == "not_ready" else "loader_lost"
        return Retryable(failed.message, code=code)
    if failed.code == "engine_failed":
        return Retryable(failed.message, code="engine_failed")
    return Refused(failed.message, code=failed.code, param=failed.param)


def _how(code: str) -> Literal["lost", "turned_away", "engine_failed"]:
    """An error's code in the words of recovery."""
    if code == ENGINE_FAILED:
        return "engine_failed"
    return "turned_away" if code == "not_ready" else "lost"
