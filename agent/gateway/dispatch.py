"""One request from admission to its last token: what is tried again, what is gone on with, how it is counted.

Until something has left for the client a request can be tried elsewhere, and is. A whole answer leaves at its end; a
stream leaves with its first token. After that, another loader of the same version goes on where the lost one stopped.
"""

import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Literal

import msgspec

from agent.config import Limits
from agent.gateway.admission import DrainRate, Load, Turn, admit
from agent.gateway.call import Call
from agent.gateway.decisions import Decisions, Trail
from agent.gateway.node_health import Trust
from agent.gateway.node_selection import Placing
from agent.gateway.recovery import MAX_RETRIES, Loss, after
from agent.gateway.retry_budget import RetryBudget
from agent.gateway.routing import Candidate, Decision, Forward, Local
from agent.gateway.timed_reader import OutOfPatience, Patience
from agent.gateway.timeouts import Watch, first_limit_s
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import PeerTable
from agent.models.pool import Pool
from agent.process.prefixes import Text, text_of
from agent.telemetry.ledger import Answered, Ledger
from agent.views import NodeView
from agent.wire.frames import Accepted, Answer, Ask, Embedded, Failed, Generate, Tokens, Waits
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger

TRIAL_S = 1.0
"""An answer that flows for so long closes a breaker."""
TURNED_AWAY = ("queue_full", "key_queue_full", "draining")
LOST = ("worker_lost", "loader_lost", "not_ready")
"""Errors that say that the node is gone, its loader is, or the model is not there. The last says nothing against the
node."""
ENGINE_FAILED = "engine_failed"
"""The engine failed at this one request. It is tried on another node, and only if that can answer it the first is to
blame."""
TOO_LONG = "context_length_exceeded"

_TURNED = {
    "draining": "this node is stopping",
    "queue_full": "too many requests wait for this model",
    "key_queue_full": "too many requests of this API key are in flight",
}

log = get_logger("agent.gateway.dispatch")


class Dispatch:
    """The door of this node. ``prefix_key`` keys the hashes of prompts' beginnings; ``heat`` is the thermal level."""

    def __init__(
        self,
        node: str,
        pool: Pool,
        table: PeerTable,
        peer_client: PeerClient,
        ledger: Ledger,
        limits: Limits,
        *,
        prefix_key: bytes = b"",
        heat: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._node = node
        self._pool = pool
        self._table = table
        self._peer_client = peer_client
        self._ledger = ledger
        self._limits = limits
        self._prefix_key = prefix_key
        self._heat = heat
        self._clock = clock
        self._wall_ms = wall_ms
        self._by_model: Counter[str] = Counter()
        self._by_key: Counter[str] = Counter()
        self._drain: dict[str, DrainRate] = {}
        self.trust = Trust()
        self.budget = RetryBudget(clock())
        self.decisions = Decisions()
        self._placing = Placing(pool, table, self.trust, limits, here=self.here, dice=dice, clock=clock)
        self.draining = False

    @property
    def in_flight(self) -> int:
        """Requests of clients that have not ended."""
        return self._by_model.total()

    def saturated(self, model: str) -> bool:
        """Whether a further request for the model would be turned away."""
        return Load(self._by_model[model], self._limits.in_flight_per_model).over > 0

    def here(self) -> NodeView:
        """This node as routing sees it."""
        return NodeView(
            node=self._node,
            draining=self.draining,
            models=self._pool.views(),
            heat=self._heat(),
            memory=self._pool.memory_level,
            known=self._pool.prefixes(),
        )

    def heard_again(self, node: str) -> None:
        """A peer is back, or has started anew."""
        self.trust.fresh(node, self._clock())

    async def answer(self, call: Call) -> AsyncGenerator[Answer, None]:
        """Accepted, Tokens and Done for one part of a request that has entered; counts it when it ends, however it
        ends.

        Raises Refused for what the client must change, Retryable for what may work later.
        """
        call.began_s = call.last_s = self._clock()
        self._begin_trail(call)
        outcome = "cancelled"
        try:
            async with contextlib.aclosing(self._attempts(call)) as answers:
                async for answer in answers:
                    yield answer
            outcome = "ok"
        except RackError as error:
            outcome = outcome_of(error)
            raise
        finally:
            # a part that was ended because another failed shares its fate
            self._count(call, call.fate if outcome == "cancelled" and call.fate else outcome)

    @contextlib.contextmanager
    def enter(self, calls: Sequence[Call]) -> Iterator[None]:
        """Places for all parts of one request, or for none. Raises Refused or Retryable, and counts that."""
        first = calls[0]
        first.began_s = first.last_s = self._clock()
        first.known = self._is_known(first.model)
        try:
            self._admit(first, len(calls))
        except RackError as error:
            self._begin_trail(first)
            self._count(first, outcome_of(error), error.code)
            raise
        self.budget.asked()
        try:
            yield
        finally:
            self._leave(first, len(calls))

    async def work(self, ask: Ask, text: Text | None = None) -> AsyncGenerator[Answer, None]:
        """Answer on this node, for a client of ours or for a peer. Raises Retryable when the loader is lost."""
        version = ask.version if isinstance(ask, Generate) else ""
        if version:
            # it may be on its way back: started again after its end, or after its end while it drained
            await self._pool.wanted_back(ask.model, version, self._limits.load_wait_s)
        if text is None:
            text = text_of(self._prefix_key, ask)
        async with (
            self._pool.lease(ask.model, version) as lease,
            contextlib.aclosing(lease.generate(ask, text)) as answers,
        ):
            async for answer in answers:
                if isinstance(answer, Accepted):
                    answer = msgspec.structs.replace(answer, version=lease.version, node=self._node)
                yield answer

    # ---- places for requests ----

    def _is_known(self, model: str) -> bool:
        """Whether some node serves the name; any other is a stranger's text and enters no record."""
        return self._pool.has(model) or any(
            m.name == model for peer in self._table.view(self._clock()) for m in peer.models
        )

    def _admit(self, call: Call, parts: int) -> None:
        most = min(self._limits.in_flight_per_model, self._limits.in_flight_per_key)
        if parts > most:
            message = f"n: this node answers at most {most} at the same time"
            raise Refused(message, code="invalid_value", param="n")
        now, drain = self._clock(), self._drain.get(call.model)
        decision = admit(
            model=Load(self._by_model[call.model] + parts - 1, self._limits.in_flight_per_model),
            key=Load(self._by_key[call.key_id] + parts - 1, self._limits.in_flight_per_key),
            draining=self.draining,
            drain_rate_per_s=drain.per_s(now) if drain else 0.0,
        )
        if isinstance(decision, Turn):
            raise Retryable(_TURNED[decision.code], code=decision.code, retry_after_s=decision.retry_after_s)
        self._by_model[call.model] += parts
        self._by_key[call.key_id] += parts

    def _leave(self, call: Call, parts: int) -> None:
        for counts, name in ((self._by_model, call.model), (self._by_key, call.key_id)):
            counts[name] -= parts
            if not counts[name]:
                del counts[name]

    # ---- attempts ----

    async def _attempts(self, call: Call) -> AsyncGenerator[Answer, None]:
        """Try until an answer is complete, or there is no more to be done. What a whole answer has brought is held
        until then."""
        held: list[Answer] = []
        left = False
        call.text = text_of(self._prefix_key, call.ask)
        while True:
            try:
                decision = await self._placing.place(call)
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
        probe = self.trust.begin(node, model, self._clock())
        self._step(call, "continues" if call.going_on else "sent", node, decision=decision)
        watch, verdict, flows_s = self._watch(chosen, call), False, 0.0
        try:
            async with (
                self._attempt(decision, chosen, call) as answers,
                contextlib.aclosing(Patience(answers)) as patience,
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
                                self.trust.ok(node, model, now, probe=True)
                                probe = False
                    elif isinstance(answer, Failed):
                        raise _error_of(answer)
                    if call.going_on and isinstance(answer, Accepted):
                        continue  # the client has heard that already
                    call.note(answer, now)
                    yield answer
            self.trust.ok(node, model, self._clock(), probe=probe)
            verdict = True
            for other in call.faulty:
                why = "an engine failed at a request that another answered"
                self.trust.failed(other, model, self._clock(), why, probe=False)
        except Retryable as error:
            verdict = error.code in LOST and error.code != "not_ready"
            if verdict:
                self.trust.failed(node, model, self._clock(), error.message, probe=probe)
            raise
        finally:
            if not verdict:
                self.trust.given_up(node, model, probe=probe)

    @contextlib.asynccontextmanager
    async def _attempt(
        self, decision: Decision, chosen: Candidate, call: Call
    ) -> AsyncIterator[AsyncGenerator[Answer, None]]:
        """The answers of where it was decided to try; what a peer has been given is on the books meanwhile."""
        ask, place = call.frame(self._node), decision.place
        if isinstance(place, Local):
            async with contextlib.aclosing(self.work(ask, call.text)) as answers:
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

    async def _next(self, patience: Patience[Answer], watch: Watch) -> Answer | None:
        """The next piece, None at the end. Raises Retryable when it does not come in time."""
        try:
            return await patience.next(watch.limit_s(self._clock()))
        except StopAsyncIteration:
            return None
        except OutOfPatience:
            if watch.is_over:
                reason = f"the request took over {self._limits.request_s:g} s"
                raise Retryable(reason, code="deadline_exceeded") from None
            raise Retryable(f"no token for {watch.waited_s:.1f} s", code="worker_lost") from None

    def _watch(self, chosen: Candidate, call: Call) -> Watch:
        return Watch(
            self.trust.gaps(chosen.node, call.model),
            first_s=self._first_limit_s(chosen, call),
            gap_s=self._limits.token_gap_s,
            until_s=call.began_s + self._limits.request_s,
            learned=self._has_another(call, chosen.node),
        )

    def _first_limit_s(self, chosen: Candidate, call: Call) -> float:
        if not isinstance(call.ask, Generate):
            return self._limits.request_s  # a long list of inputs comes back at its end
        if not chosen.measured or not self._has_another(call, chosen.node):
            return self._limits.first_token_s
        return first_limit_s(chosen.first_token_s, self._limits.first_token_s)

    def _has_another(self, call: Call, node: str) -> bool:
        """Whether another node could take the request over, should this one be too slow."""
        if node != self._node:
            views = self._pool.views()
            if any(m.name == call.model and m.ready for m in views):
                return True
        return any(
            peer.state == "up" and peer.node != node and any(m.name == call.model and m.ready for m in peer.models)
            for peer in self._table.view(self._clock())
        )

    def _has_roomier(self, call: Call, decision: Decision, error: Refused) -> bool:
        """Whether another node's context is larger than that of the node which found the prompt too long; one that is
        away for a moment counts. What has been made of an answer is kept."""
        chosen = decision.chosen
        assert chosen is not None
        call.over_tok, call.too_long = max(call.over_tok, chosen.context_tok), error
        if not chosen.context_tok or not self._placing.is_roomier(call):
            return False
        self._step(call, "retries", chosen.node, why=error.message)
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
                elsewhere=len(call.faulty) == 1 and self._has_another(call, node),
                left=left,
                can_go_on=call.can_go_on,
                held=self._placing.held_by_peer(call.model, call.version, node),
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
        self._step(call, "lost", place.node, why=error.message)
        call.tried.add(place.node)
        if error.code == ENGINE_FAILED:
            call.faulty = (*call.faulty, place.node)
        elif isinstance(place, Forward) and error.code == "not_ready":
            self._table.unready(place.node, call.model)
        elif isinstance(place, Forward) and error.code == "worker_lost":
            self._table.lose(place.node)

    def _paid(self) -> bool:
        return self.budget.take(self._clock())

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
            self._step(call, "retries", node, why=reason)
            log.info("retried", request=call.request_id, node=node, retries=call.retries)

    # ---- what is kept of it ----

    def _begin_trail(self, call: Call) -> None:
        call.trail = self.decisions.keep(
            Trail(
                request_id=call.request_id,
                t_ms=self._wall_ms(),
                began_s=call.began_s,
                model=call.model if call.known else "",
                key_id=call.key_id,
            )
        )

    def _step(self, call: Call, what: str, node: str, *, why: str = "", decision: Decision | None = None) -> None:
        if call.trail is not None:
            call.trail.add(self._clock(), what, node, why, decision)

    def _count(self, call: Call, outcome: str, code: str = "") -> None:
        now = self._clock()
        if outcome == "ok":
            self._drain.setdefault(call.model, DrainRate()).ended(now)
        # a name that nobody serves is a stranger's text and stays out of the records
        model = call.model if call.known else ""
        if call.trail is not None:
            call.trail.outcome, call.trail.worker, call.trail.model = outcome, call.worker, model
            call.trail.prompt_tok = call.text.prompt_tok
            call.trail.add(now, "ended", why=code)
        self._ledger.record(
            Answered(
                model=model,
                version=call.version,
                worker=call.worker,
                key_id=call.key_id,
                outcome=outcome,
                finish=call.finish,
                requests=1 if call.part == 0 else 0,
                retries=call.retries,
                continuations=call.continuations,
                prompt_tok=call.prompt_tok if call.turn == 0 else 0,
                cached_tok=call.cached_tok if call.turn == 0 else 0,
                completion_tok=call.completion_tok,
                ttft_us=None if call.first_s is None else int((call.first_s - call.began_s) * 1e6),
                itl_us=tuple(call.gaps_us),
                total_us=int((now - call.began_s) * 1e6),
            )
        )


def outcome_of(error: RackError) -> str:
    """What a request that ended with this error is counted as."""
    return "refused" if isinstance(error, Refused) or error.code in TURNED_AWAY else "failed"


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
