"""One request from admission to its last token: admitted or rejected, answered by attempts, counted once at its end."""

import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from agent.config import Live
from agent.gateway.admission import Admitted, DrainRate, Load, Places, Turn, admit
from agent.gateway.attempt import Attempts
from agent.gateway.call import Call
from agent.gateway.decisions import Decisions, Trail
from agent.gateway.node_health import NodeHealth
from agent.gateway.node_selection import NodeSelection
from agent.gateway.outcomes import CANCELLED, FAILED, OK, Ended, ended
from agent.gateway.overflow import Overflow
from agent.gateway.passage import Passage
from agent.gateway.retry_budget import RetryBudget
from agent.gateway.withheld import withheld
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import PeerTable
from agent.models.pool import Pool
from agent.policy.rules import DEFAULT
from agent.process.prefixes import Text, text_of
from agent.telemetry.ledger import Answered, Ledger
from agent.views import NodeView, offers
from agent.wire.frames import Accepted, Answer, Ask, Done, Generate, Tokens
from agent.wire.namespaces import OPEN
from agent.wire.priority import NEUTRAL, Priority
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger

_REJECTIONS = {
    "draining": "this node is shutting down",
    "queue_full": "too many requests in flight for this model",
    "key_queue_full": "too many requests in flight for this API key",
}

_ELSEWHERE = ""
"""Counts requests that the rack refused and another place answers; no model has this name."""
_ANY_MODEL = Load(0, 1)
"""Room for any model, while a request's is not known."""

log = get_logger("agent.dispatch")


class Dispatch:
    """The gateway of this node. ``prefix_key`` gives the key of the hashes of prompt prefixes; ``heat`` is the thermal
    level; ``overflow`` answers from other places what the policy allows there."""

    def __init__(
        self,
        node: str,
        pool: Pool,
        table: PeerTable,
        peer_client: PeerClient,
        ledger: Ledger,
        live: Live,
        *,
        prefix_key: Callable[[], bytes] = bytes,
        heat: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        draw: Callable[[], float] = random.random,
        overflow: Overflow | None = None,
    ) -> None:
        self._overflow = overflow
        self._node, self._pool, self._table, self._peer_client = node, pool, table, peer_client
        self._ledger, self._live, self._prefix_key, self._heat = ledger, live, prefix_key, heat
        self._clock, self._wall_ms = clock, wall_ms
        self._places, self._of_keys = Places(), Places()
        """Requests in flight of each model and of each API key."""
        self._drain: dict[tuple[str, int], DrainRate] = {}
        """By model and rank."""
        self.health = NodeHealth()
        self.budget = RetryBudget(clock())
        self.decisions = Decisions()
        selection = NodeSelection(node, pool, table, self.health, live, here=self.here, draw=draw, clock=clock)
        self._attempts = Attempts(
            *(node, table, peer_client, live, selection, self.health, self.budget, self.work),
            prefix_key=prefix_key,
            clock=clock,
        )
        self.draining = False

    @property
    def in_flight(self) -> int:
        """Client requests admitted and not ended."""
        return self._places.total

    def saturated(self, model: str) -> bool:
        """Whether one more request for the model would be rejected."""
        return Load(self._places.of(model), self._live.now.limits.in_flight_per_model).over > 0

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

    def peer_is_back(self, node: str) -> None:
        """A peer is up again or has restarted."""
        self.health.fresh(node, self._clock())

    async def answer(self, call: Call) -> AsyncGenerator[Answer, None]:
        """Accepted, Tokens and Done for one part of an admitted request; counts it when it ends, whatever the outcome.
        Raises Refused for what the client must change, Retryable for what may succeed later."""
        call.began_s = call.last_s = self._clock()
        call.due_s = call.began_s + self._live.now.limits.request_s
        self._begin_trail(call)
        end = CANCELLED
        try:
            async with contextlib.aclosing(self._answers(call)) as answers:
                async for answer in answers:
                    if call.passage is not None:
                        await _note(call, call.passage, answer)
                    yield answer
            end = OK
        except RackError as error:
            end, call.code = ended(error), error.code
            raise
        except Exception:  # a bug; whose it is, the client did not leave
            end = FAILED
            raise
        finally:
            # a part that was cancelled because another failed has the end of that one
            self._count(call, call.fate if end is CANCELLED and call.fate else end)

    def _answers(self, call: Call) -> AsyncGenerator[Answer, None]:
        """From the rack alone, or from wherever the policy allows; without what its content filter withholds."""
        if self._overflow is None or call.passage is None or not call.passage.elsewhere:
            answers = self._attempts.run(call)
        else:
            answers = self._overflow.run(call, self._attempts.run, call.refused)
        content = call.passage.rules.content if call.passage is not None else DEFAULT.content
        return withheld(answers, content) if content != DEFAULT.content else answers

    def reading(self, key_id: str, priority: Priority = NEUTRAL) -> Admitted:
        """Admit a request whose body, and with it its model, is not known yet. Raises Retryable."""
        decision = admit(
            model=_ANY_MODEL,
            key=self._of_keys.load(key_id, 1, priority, self._live.now.limits.in_flight_per_key, self._clock()),
            draining=self._closed_to(),
            drain_rate_per_s=self._drain_rate_per_s,
        )
        if isinstance(decision, Turn):
            raise Retryable(_REJECTIONS[decision.code], code=decision.code, retry_after_s=decision.retry_after_s)
        self._of_keys.enter(key_id, 1, priority.rank)
        return Admitted(partial(self._of_keys.leave, key_id, 1, priority.rank))

    def turned_away(self, request_id: str, key_id: str, error: RackError) -> None:
        """Count a request that ended with this error before its model was known."""
        now = self._clock()
        call = Call(
            ask=Generate(id=0, model="", max_tokens=None),
            request_id=request_id,
            cache=OPEN,
            key_id=key_id,
            began_s=now,
            last_s=now,
        )
        self._begin_trail(call)
        self._count(call, ended(error), error.code)

    def enter(self, calls: Sequence[Call]) -> Admitted:
        """Admit all parts of one request, or none. Raises Refused or Retryable, and counts the rejection."""
        first = calls[0]
        first.began_s = first.last_s = self._clock()
        first.known = self._is_known(first.model)
        try:
            self._admit(first, len(calls))
        except RackError as error:
            elsewhere = self._overflow is not None and self._overflow.takes(first, error)
            if not elsewhere or self._is_full(first, len(calls)):
                self._begin_trail(first)
                self._count(first, ended(error), error.code)
                raise
            first.refused = error
            self._admitted(_ELSEWHERE, first, len(calls))
        self.budget.asked()
        return Admitted(partial(self._leave, _ELSEWHERE if first.refused else first.model, first, len(calls)))

    async def work(self, ask: Ask, text: Text | None = None) -> AsyncGenerator[Answer, None]:
        """Answer on this node, for a client of ours or for a peer. Raises Retryable when the loader is lost."""
        version = ask.version if isinstance(ask, Generate) else ""
        if version:
            # its loader may be restarting, after a crash in service or while it drained
            await self._pool.wait_for_version(ask.model, version, self._live.now.limits.load_wait_s)
        if text is None:
            text = text_of(self._prefix_key(), ask)
        with self._pool.lease(ask.model, version) as lease:
            async with contextlib.aclosing(lease.generate(ask, text)) as answers:
                async for answer in answers:
                    if isinstance(answer, Accepted):
                        answer = msgspec.structs.replace(answer, version=lease.version, node=self._node)
                    yield answer

    # ---- admission ----

    def _is_known(self, model: str) -> bool:
        """Whether some node serves the name; any other is arbitrary client text and is not recorded."""
        return self._pool.has(model) or any(
            m.name == model for peer in self._table.view(self._clock()) for m in peer.models
        )

    def _closed_to(self, model: str | None = None) -> bool:
        """Whether a draining node rejects a request for a model (None: not known yet): no peer could take it. A client
        may have other connections to this node, on which it would be rejected as often as it tries."""
        if not self.draining:
            return False
        peers = [peer for peer in self._table.view(self._clock()) if peer.state == "up" and not peer.draining]
        return not (peers if model is None else any(True for _ in offers(peers, model, ready=True)))

    def _admit(self, call: Call, parts: int) -> None:
        limits = self._live.now.limits
        most = min(limits.in_flight_per_model, limits.in_flight_per_key)
        if parts > most:
            raise Refused(f"n: this node generates at most {most} answers per request", code="invalid_value", param="n")
        now, drain = self._clock(), self._drain.get((call.model, call.priority.rank))
        decision = admit(
            model=self._places.load(
                *(call.model, parts, call.priority, limits.in_flight_per_model, now), leaves=call.priority.leaves_rows
            ),
            key=self._of_keys.load(call.key_id, parts, call.priority, limits.in_flight_per_key, now),
            draining=self._closed_to(call.model),
            drain_rate_per_s=lambda: drain.per_s(now) if drain else 0.0,
        )
        if isinstance(decision, Turn):
            if decision.code == "queue_full":
                self._places.refused(call.model, call.priority.rank, now)
            raise Retryable(_REJECTIONS[decision.code], code=decision.code, retry_after_s=decision.retry_after_s)
        self._admitted(call.model, call, parts)

    def _is_full(self, call: Call, parts: int) -> bool:
        """Whether its key has as many requests in flight as it may, wherever they are answered."""
        limit = self._live.now.limits.in_flight_per_key
        return self._of_keys.load(call.key_id, parts, call.priority, limit, self._clock()).over > 0

    def _admitted(self, model: str, call: Call, parts: int) -> None:
        self._places.enter(model, parts, call.priority.rank)
        self._of_keys.enter(call.key_id, parts, call.priority.rank)

    def _leave(self, model: str, call: Call, parts: int) -> None:
        self._places.leave(model, parts, call.priority.rank)
        self._of_keys.leave(call.key_id, parts, call.priority.rank)

    def _drain_rate_per_s(self) -> float:
        return sum(drain.per_s(self._clock()) for drain in self._drain.values())

    # ---- records of a request ----

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

    def _count(self, call: Call, end: Ended, code: str = "") -> None:
        now, call.end, call.code = self._clock(), end, call.code or code
        if end is OK and (call.passage is None or call.passage.at is None):
            self._drain.setdefault((call.model, call.priority.rank), DrainRate()).ended(now)
        # a name that no node serves is arbitrary client text and is not recorded
        model = call.model if call.known else ""
        if call.trail is not None:
            call.trail.outcome, call.trail.worker, call.trail.model = end.outcome, call.worker, model
            call.trail.prompt_tok = call.text.prompt_tok
            call.trail.add(now, "ended", why=code)
        self._ledger.record(
            Answered(
                model=model,
                version=call.version,
                worker=call.worker,
                key_id=call.key_id,
                **_elsewhere(call),
                outcome=end.outcome,
                finish=end.reason or call.finish,
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


async def _note(call: Call, passage: Passage, answer: Answer) -> None:
    """What the wall has to know of an answer."""
    if isinstance(answer, Tokens):
        if passage.told is not None:
            passage.said.setdefault(call.part, []).append(answer)
    elif isinstance(answer, Accepted):
        if len(passage.calls) == 1 and passage.reservation is not None:
            passage.reservation.counted(answer.prompt_tok)
    elif passage.told is not None and isinstance(answer, Done):
        await passage.told(call.part)


def _elsewhere(call: Call) -> dict[str, Any]:
    """How a request is told in telemetry: its class, and the place that answered it if that was not the rack."""
    passage = call.passage
    if passage is None:
        return {}
    found: dict[str, Any] = {"task_class": passage.facts.task_class}
    if (place := passage.at) is None:
        return found
    micro = 0 if passage.usd is None else int((passage.usd * 1_000_000).to_integral_value())
    return {**found, "place": place.provider, "place_category": place.category, "usd_micro": micro}
