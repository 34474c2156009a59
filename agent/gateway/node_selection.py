"""Where a request is sent next, and waiting while no node can take it: for a loader that is starting, a peer that may
come back, or a half-open circuit breaker."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import msgspec

from agent.config import Live
from agent.gateway.call import Call
from agent.gateway.node_health import NodeHealth
from agent.gateway.routing import Decision, Forward, Refuse, RouteRequest, choose
from agent.mesh.peers import PeerTable
from agent.models.pool import Pool
from agent.views import NodeView, offers
from shared.errors import Refused, Retryable

LOST_S = 3.0
"""How long after a loss a peer that has not answered since may still come back."""
_STEP_S = 0.05


class NodeSelection:
    """``here`` is this node as routing sees it; for admitted requests it is a candidate even while it drains."""

    def __init__(
        self,
        node: str,
        pool: Pool,
        table: PeerTable,
        health: NodeHealth,
        live: Live,
        *,
        here: Callable[[], NodeView],
        draw: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node, self._pool, self._table, self._health, self._live = node, pool, table, health, live
        self._here, self._draw, self._clock = here, draw, clock

    def decide(self, call: Call) -> Decision:
        """Where to try now."""
        now = self._clock()
        request = RouteRequest(
            model=call.model,
            tried=frozenset(call.tried),
            version=call.version if call.continuing else "",
            chain=call.text.chain,
            prompt_tok=call.text.prompt_tok,
            answer_tok=call.answer_tok,
            over_tok=call.over_tok,
            breakers=self._health.states(call.model, now),
            sent=self._table.sent_since_beat(call.model),
            draw=self._draw(),
        )
        here, peers = self._here(), self._table.view(now)
        if here.draining:
            elsewhere = choose(request, here, peers)
            if isinstance(elsewhere.place, Forward):
                return elsewhere
            here = msgspec.structs.replace(here, draining=False)
        return choose(request, here, peers)

    async def place(self, call: Call) -> Decision:
        """Where to try next, waiting for a model that is loading or restarting. Raises Refused or Retryable."""
        decision = self.decide(call)
        call.known = not isinstance(decision.place, Refuse) or decision.place.code != "model_not_found"
        if not isinstance(decision.place, Refuse):
            return decision
        with contextlib.ExitStack() as waits:
            return await self._waited(call, decision, waits)

    async def _waited(self, call: Call, decision: Decision, waits: contextlib.ExitStack) -> Decision:
        over_s = call.due_s
        deadline, queued, noted = min(over_s, self._clock() + self._live.now.limits.load_wait_s), False, False
        while True:
            place = decision.place
            call.known = not isinstance(place, Refuse) or place.code != "model_not_found"
            if not isinstance(place, Refuse):
                return decision
            if not noted and call.trail is not None:
                call.trail.add(self._clock(), "waits", decision=decision)
                noted = True
            if place.code == "model_not_found":
                known = ", ".join(place.known) or "none"
                raise Refused(f"no node serves this model; known: {known}", code="model_not_found", param="model")
            if call.too_long is not None and not self.has_larger_context(call):
                raise call.too_long
            if self._pool.refusing and self._is_here(call.model) and not (call.continuing or place.loading):
                raise Retryable("this node is under memory pressure", code="memory_pressure", retry_after_s=5)
            if not queued and not call.continuing and self._is_here(call.model):
                # keeps its place in the load queue, however often the wait below is repeated
                waits.enter_context(self._pool.waiting(call.model))
                queued = True
            left_s = deadline - self._clock()
            if left_s <= 0 or not await self._wait(call, place, min(left_s, 1.0)):
                if self._clock() >= over_s:
                    late = f"the request exceeded limits.request_s ({self._live.now.limits.request_s:g} s)"
                    raise Retryable(late, code="deadline_exceeded")
                if call.continuing:
                    lost = "the loader was lost, and no node holds the version that began this answer"
                    raise Retryable(lost, code="worker_lost")
                raise Retryable("no node can serve this model now", code="no_capacity", retry_after_s=5)
            call.tried.clear()
            decision = self.decide(call)

    async def _wait(self, call: Call, refused: Refuse, step_s: float) -> bool:
        """True when another try may help: a loader is starting, here or on a peer, or a failed node may be back."""
        name = call.model
        if call.continuing:
            return await self._wait_for_version(call, step_s)
        if self._is_here(name):
            if await self._pool.wait_ready(name, step_s):
                await asyncio.sleep(min(0.005, step_s))  # ready, yet not a candidate: its breaker is half-open
                return True
            await asyncio.sleep(min(_STEP_S, step_s))
            gone = not self._is_here(name)  # taken away by a reload meanwhile; who else has it is decided anew
            return gone or self._pool.is_coming(name) or bool(call.tried) or refused.loading
        if call.tried or refused.loading:
            await asyncio.sleep(min(_STEP_S, step_s))
            return True
        return False

    async def _wait_for_version(self, call: Call, step_s: float) -> bool:
        """True while exactly the version that began an answer may still come back, here or on a peer."""
        name, version = call.model, call.version
        here = self._is_here(name) and self._pool.can_continue(name, version)
        # whether a node that has just failed answers again shows within a heartbeat or two
        if self.held_by_peer(name, version) or here or self._clock() - call.lost_s < LOST_S:
            await asyncio.sleep(min(_STEP_S, step_s))
            return True
        return False

    def has_larger_context(self, call: Call) -> bool:
        """Whether a live node has, or may have once its loader is up, a larger context than was found too small."""
        return any(
            one.context_tok > call.over_tok or (one.coming and not one.context_tok)
            for _, one in offers((self._here(), *self._table.view(self._clock())), call.model)
        )

    def held_by_peer(self, model: str, version: str, excluding: str = "") -> bool:
        """Whether a live peer can continue answers of this version."""
        return any(version in one.versions for _, one in offers(self._table.view(self._clock()), model, but=excluding))

    def has_another(self, model: str, node: str) -> bool:
        """Whether another node could take over a request from one that is too slow or failed."""
        peers = self._table.view(self._clock())  # this node's own view costs more, and is asked for each attempt
        nodes = peers if node == self._node else (self._here(), *peers)
        return any(True for _ in offers(nodes, model, but=node, up=True, ready=True))

    def _is_here(self, model: str) -> bool:
        return self._pool.has(model)
