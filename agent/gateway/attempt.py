"""The attempts of one request: sent to a node, supervised, and retried or continued elsewhere if the worker is lost.

A request can be retried until something was sent to the client: an answer that is not streamed is sent at its end, a
stream from its first token on. After that, only another loader of the same version can continue the answer.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Literal

import msgspec

from agent.config import Live
from agent.gateway.call import Call
from agent.gateway.node_health import NodeHealth
from agent.gateway.node_selection import NodeSelection
from agent.gateway.recovery import CRASHES, MAX_RETRIES, Loss, after
from agent.gateway.retry_budget import RetryBudget
from agent.gateway.routing import Candidate, Decision, Forward, Local
from agent.gateway.timed_reader import ReadTimeout, TimedReader
from agent.gateway.timeouts import AttemptTimeouts, first_limit_s
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import PeerTable
from agent.process.prefixes import Text, text_of
from agent.wire.frames import CRASHED, SUSPECT, Accepted, Answer, Ask, Done, Embedded, Failed, Generate, Tokens, Waits
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger

TRIAL_S = 1.0
"""A half-open circuit breaker closes when its probe has streamed tokens for this long."""
LOST = ("worker_lost", "loader_lost", CRASHED, "not_ready")
"""Error codes: the node was lost, its loader was lost or crashed, or the model is not ready there. The last does not
count against the node."""
ENGINE_FAILED = "engine_failed"
"""The engine failed at this one request. It is tried on one other node, and only if that completes it does the failure
count against the first."""
TOO_LONG = "context_length_exceeded"
FULL_S = 5.0
"""When a client may come again that was refused because too much text waits at a loader."""

log = get_logger("agent.dispatch")


class Attempts:
    """``work`` serves on this node; ``prefix_key`` gives the key of the hashes of prompt prefixes."""

    def __init__(
        self,
        node: str,
        table: PeerTable,
        peer_client: PeerClient,
        live: Live,
        selection: NodeSelection,
        health: NodeHealth,
        budget: RetryBudget,
        work: Callable[[Ask, Text], AsyncGenerator[Answer, None]],
        *,
        prefix_key: Callable[[], bytes] = bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node, self._table, self._peer_client, self._live = node, table, peer_client, live
        self._selection, self._health, self._budget, self._work = selection, health, budget, work
        self._prefix_key, self._clock = prefix_key, clock

    async def run(self, call: Call) -> AsyncGenerator[Answer, None]:
        """Try until an answer is complete or recovery gives up. An answer that is not streamed is held until then."""
        held: list[Answer] = []
        sent = False
        call.text = text_of(self._prefix_key(), msgspec.structs.replace(call.ask, cache=call.cache))
        while True:
            try:
                decision = await self._selection.place(call)
            except Retryable:
                if not (call.continuing and call.whole and call.retries < MAX_RETRIES and self._paid()):
                    raise
                # no node can continue it, and nothing was sent: start over, on any version
                held.clear()
                self._start_over(call, "", "no node holds its version")
                continue
            try:
                async with contextlib.aclosing(self._watched(decision, call)) as answers:
                    async for answer in answers:
                        if call.whole:
                            held.append(answer)
                            continue
                        sent = sent or isinstance(answer, Tokens | Embedded)
                        yield answer
            except Refused as error:
                if error.code != TOO_LONG or not self._has_larger_context(call, decision, error):
                    raise
                if not call.continuing:
                    held.clear()
                continue
            except Retryable as error:
                if error.code not in (*LOST, ENGINE_FAILED, SUSPECT):
                    raise
                if not self._recovered(call, decision, error, sent=sent):
                    if call.crashes >= CRASHES:
                        raise _suspect(call) from None
                    raise
                if not call.continuing:
                    held.clear()
                continue
            for answer in held:
                yield answer
            return

    async def _watched(self, decision: Decision, call: Call) -> AsyncGenerator[Answer, None]:
        """One attempt, recorded on the call, and its verdict on the node: good, bad, or none if the client left. One
        layer does everything for each frame: each further one would cost the gateway as much as the work."""
        chosen = decision.chosen
        assert chosen is not None
        node, model = chosen.node, call.model
        probe = self._health.begin(node, model, self._clock())
        self._note(call, "continues" if call.continuing else "sent", node, decision=decision)
        watch, verdict, flows_s = self._watch(chosen, call), False, 0.0
        try:
            async with self._attempt(decision, chosen, call) as answers:
                with TimedReader(answers) as reader:
                    while (answer := await self._next(reader, watch)) is not None:
                        now = self._clock()
                        if isinstance(answer, Waits):
                            watch.waits(now)
                            if call.whole or call.first_s is not None:
                                continue
                        elif isinstance(answer, Tokens):
                            watch.token(now)
                            if probe:
                                flows_s = flows_s or now
                                if now - flows_s > TRIAL_S:
                                    self._health.ok(node, model, now, probe=True)
                                    probe = False
                        elif isinstance(answer, Failed):
                            raise _error_of(answer)
                        elif isinstance(answer, Done):
                            answer = call.told(answer)
                        elif isinstance(answer, Accepted):
                            call.taken(answer, now)
                            if call.continuing:
                                continue  # the client has already received it
                        call.note(answer, now)
                        yield answer
            self._health.ok(node, model, self._clock(), probe=probe)
            verdict = True
            for other in call.faulty:
                why = "the engine failed at a request that another node completed"
                self._health.failed(other, model, self._clock(), why, probe=False)
        except Retryable as error:
            verdict = error.code in LOST and error.code != "not_ready"
            if verdict:
                self._health.failed(node, model, self._clock(), error.message, probe=probe)
            raise
        finally:
            call.due_s = watch.until_s
            if not verdict:
                self._health.given_up(node, model, probe=probe)

    def _attempt(
        self, decision: Decision, chosen: Candidate, call: Call
    ) -> contextlib.AbstractAsyncContextManager[AsyncGenerator[Answer, None]]:
        """The answers of the chosen node."""
        ask, place = call.frame(self._node), decision.place
        if isinstance(place, Local):
            return contextlib.aclosing(self._work(ask, call.text))
        assert isinstance(place, Forward)
        return self._forwarded(ask, place, call.model, max(1, call.text.prompt_tok - chosen.saved_tok))

    @contextlib.asynccontextmanager
    async def _forwarded(
        self, ask: Ask, place: Forward, model: str, prompt_tok: int
    ) -> AsyncIterator[AsyncGenerator[Answer, None]]:
        """The answers of a peer, whose load the request counts as meanwhile."""
        sent_at = self._table.sent(place.node, model, prompt_tok)
        try:
            link = await self._peer_client.link(place.node, place.url)
            async with contextlib.aclosing(link.generate(ask)) as answers:
                yield answers
        finally:
            self._table.ended(place.node, model, prompt_tok, sent_at)

    async def _next(self, reader: TimedReader[Answer], watch: AttemptTimeouts) -> Answer | None:
        """The next frame, None at the end. Raises Retryable on a timeout."""
        try:
            return await reader.next(watch.limit_s(self._clock()))
        except StopAsyncIteration:
            return None
        except ReadTimeout:
            if watch.is_over:
                reason = f"the request exceeded limits.request_s ({self._live.now.limits.request_s:g} s)"
                raise Retryable(reason, code="deadline_exceeded") from None
            raise Retryable(f"no token for {watch.waited_s:.1f} s", code="worker_lost") from None

    def _watch(self, chosen: Candidate, call: Call) -> AttemptTimeouts:
        return AttemptTimeouts(
            self._health.gaps(chosen.node, call.model),
            first_s=self._first_limit_s(chosen, call),
            gap_s=self._live.now.limits.token_gap_s,
            until_s=call.due_s,
            learned=self._selection.has_another(call.model, chosen.node),
            request_s=self._live.now.limits.request_s,
            fresh=not call.continuing,
            step_s=chosen.step_s,
        )

    def _first_limit_s(self, chosen: Candidate, call: Call) -> float:
        if not isinstance(call.ask, Generate):
            return self._live.now.limits.request_s  # embeddings of a long list arrive at its end
        if not chosen.measured or not self._selection.has_another(call.model, chosen.node):
            return self._live.now.limits.first_token_s
        return first_limit_s(chosen.first_token_s, self._live.now.limits.first_token_s)

    def _has_larger_context(self, call: Call, decision: Decision, error: Refused) -> bool:
        """Whether another node has a larger context than the one that found the prompt too long; a node that is
        temporarily unavailable counts. Tokens already produced are kept."""
        chosen = decision.chosen
        assert chosen is not None
        call.over_tok, call.too_long = max(call.over_tok, chosen.context_tok), error
        if not chosen.context_tok or not self._selection.has_larger_context(call):
            return False
        self._note(call, "retries", chosen.node, why=error.message)
        if not call.continuing:
            call.start_over()
        return True

    def _recovered(self, call: Call, decision: Decision, error: Retryable, *, sent: bool) -> bool:
        """Prepare what recovery.after decides; False to give up."""
        place = decision.place
        assert isinstance(place, Local | Forward)
        node = place.node
        self._lose(call, place, error)
        then = after(
            Loss(
                how=_how(error.code),
                elsewhere=len(call.faulty) == 1 and self._selection.has_another(call.model, node),
                left=sent,
                can_go_on=call.can_continue,
                held=self._selection.held_by_peer(call.model, call.version, node),
                retries=call.retries,
                in_time=self._clock() < call.began_s + self._live.now.limits.load_wait_s,
                crashes=call.crashes,
            )
        )
        if then.what == "give_up" or (then.paid and not self._paid()):
            return False
        if then.what == "go_on":
            self._continue(call, node, paid=then.paid)
        else:
            self._start_over(call, node, error.message, paid=then.paid)
        return True

    def _lose(self, call: Call, place: Local | Forward, error: Retryable) -> None:
        """Record a loss: the node gets no new request before its next heartbeat, which may be soon."""
        self._note(call, "lost", place.node, why=error.message)
        call.tried.add(place.node)
        call.lose(self._clock())
        call.crashes += error.code == CRASHED
        if error.code == ENGINE_FAILED:
            call.faulty = (*call.faulty, place.node)
        elif isinstance(place, Forward) and error.code == "not_ready":
            self._table.unready(place.node, call.model)
        elif isinstance(place, Forward) and error.code == "worker_lost":
            self._table.lose(place.node)

    def _paid(self) -> bool:
        return self._budget.take(self._clock())

    def _continue(self, call: Call, node: str, *, paid: bool) -> None:
        """Keep the tokens produced; another loader continues after them. This node may be tried again at once: a loader
        that died while draining is restarted only for requests that wait for it."""
        if node == self._node and node not in call.faulty:
            call.tried.discard(node)
        if paid:
            call.retries += 1
        call.continuing = True
        call.lost_s = self._clock()
        call.continuations += 1
        log.info("continued", request=call.request_id, node=node, tokens=len(call.made), version=call.version)

    def _start_over(self, call: Call, node: str, reason: str, *, paid: bool = True) -> None:
        """Start over elsewhere. A rejection by the node does not count as a retry."""
        call.start_over()
        if paid:
            call.retries += 1
            self._note(call, "retries", node, why=reason)
            log.info("retried", request=call.request_id, node=node, retries=call.retries)

    def _note(self, call: Call, what: str, node: str, *, why: str = "", decision: Decision | None = None) -> None:
        if call.trail is not None:
            call.trail.add(self._clock(), what, node, why, decision)


def _suspect(call: Call) -> Retryable:
    message = (
        f"{call.crashes} loaders ended with this request in their hands, which may be why, so it is not tried again"
    )
    return Retryable(f"{message}; shorten or simplify it", code=SUSPECT)


def _error_of(failed: Failed) -> RackError:
    if failed.retryable:
        if failed.code == "queue_full":
            return Retryable(failed.message, code=failed.code, retry_after_s=FULL_S)
        kept = failed.code in ("not_ready", SUSPECT, CRASHED)
        return Retryable(failed.message, code=failed.code if kept else "loader_lost")
    if failed.code == "engine_failed":
        return Retryable(failed.message, code="engine_failed")
    return Refused(failed.message, code=failed.code, param=failed.param)


def _how(code: str) -> Literal["lost", "turned_away", "engine_failed", "suspect"]:
    """An error code as recovery names the kind of loss."""
    if code == SUSPECT:
        return "suspect"
    return "engine_failed" if code == ENGINE_FAILED else "turned_away" if code == "not_ready" else "lost"
