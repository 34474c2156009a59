"""One request from admission to its last token: where it goes, what is tried again, how it is counted.

Until something has left for the client a request can be tried elsewhere, and is. A whole answer leaves at its end; a
stream leaves with its first token.
"""

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

import msgspec

from agent.admission import DrainRate, Load, Turn, admit
from agent.collectors.inference import Answered, Ledger
from agent.config import Limits
from agent.frames import Accepted, Answer, Ask, Done, Embedded, Failed, Generate, Tokens
from agent.peer_client import PeerClient
from agent.peers import PeerTable
from agent.pool import Pool
from agent.routing import Forward, Local, NodeView, Refuse, RouteRequest, choose
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger

MAX_RETRIES = 2
MAX_CONTINUATIONS = 4
LOST_S = 3.0
"""For so long after a loss a peer that is not heard of may still be back."""
TURNED_AWAY = ("queue_full", "key_queue_full", "draining")
TURN_SEEDS = 0x51_7C_C1_B7_27
"""Between the seeds of several answers to one prompt, so that they differ and can be had again."""

_TURNED = {
    "draining": "this node is stopping",
    "queue_full": "too many requests wait for this model",
    "key_queue_full": "too many requests of this API key are in flight",
}

log = get_logger("agent.dispatch")


class Call(msgspec.Struct, kw_only=True):
    """One client request on its way, and what became of it.

    A request for several answers is several calls: ``part`` counts them all, ``turn`` those to the same prompt. The
    first part counts as the request, the first turn as the prompt. ``seed`` is None until one is drawn. ``made`` are
    the tokens that the client has; while ``going_on`` the answer continues after them.
    """

    ask: Ask
    request_id: str
    key_id: str = ""
    whole: bool = True
    part: int = 0
    turn: int = 0
    seed: int | None = None
    made: list[int] = msgspec.field(default_factory=list)
    going_on: bool = False
    lost_s: float = 0.0
    continuations: int = 0
    tried: set[str] = msgspec.field(default_factory=set)
    retries: int = 0
    worker: str = ""
    version: str = ""
    prompt_tok: int = 0
    cached_tok: int = 0
    completion_tok: int = 0
    done: Done | None = None
    known: bool = False
    fate: str = ""
    began_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    gaps_us: list[int] = msgspec.field(default_factory=list)

    @property
    def model(self) -> str:
        """The name that was asked for."""
        return self.ask.model

    @property
    def can_go_on(self) -> bool:
        """Whether another loader of the same version could continue the answer: every token of it is known."""
        known = isinstance(self.ask, Generate) and bool(self.version) and len(self.made) == self.completion_tok > 0
        return known and self.continuations < MAX_CONTINUATIONS

    @property
    def finish(self) -> str:
        """Why the answer ended; "" when it has not."""
        return self.done.finish if self.done else ""

    def frame(self, door: str) -> Ask:
        """What the worker is asked."""
        ask = msgspec.structs.replace(self.ask, id=1, request_id=self.request_id, door=door)
        if isinstance(ask, Generate):
            # without a seed the door draws one, so that a retry throws the same dice
            seed = self.seed if self.seed is not None else secrets.randbits(62)
            self.seed = seed
            ask = msgspec.structs.replace(ask, seed=seed + self.turn * TURN_SEEDS)
            if self.going_on:
                ask = msgspec.structs.replace(ask, made=tuple(self.made), version=self.version)
        return ask


class Dispatch:
    """The door of this node."""

    def __init__(
        self,
        node: str,
        pool: Pool,
        table: PeerTable,
        peer_client: PeerClient,
        ledger: Ledger,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._pool = pool
        self._table = table
        self._peer_client = peer_client
        self._ledger = ledger
        self._limits = limits
        self._clock = clock
        self._by_model: Counter[str] = Counter()
        self._by_key: Counter[str] = Counter()
        self._drain: dict[str, DrainRate] = {}
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
        return NodeView(node=self._node, draining=self.draining, models=self._pool.views())

    async def answer(self, call: Call) -> AsyncGenerator[Answer, None]:
        """Accepted, Tokens and Done for one part of a request that has entered; counts it when it ends, however it
        ends.

        Raises Refused for what the client must change, Retryable for what may work later.
        """
        call.began_s = call.last_s = self._clock()
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
            self._count(first, outcome_of(error))
            raise
        try:
            yield
        finally:
            self._leave(first, len(calls))

    def _is_known(self, model: str) -> bool:
        """Whether some node serves the name; any other is a stranger's text and enters no record."""
        views = (self.here(), *self._table.view(self._clock()))
        return any(m.name == model for node in views for m in node.models)

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

    async def _attempts(self, call: Call) -> AsyncGenerator[Answer, None]:
        while True:
            place = await self._place(call)
            held: list[Answer] = []
            left = call.going_on
            try:
                async with contextlib.aclosing(self._attempt(place, call)) as answers:
                    async for answer in answers:
                        if call.going_on and isinstance(answer, Accepted):
                            continue  # the client has heard that already
                        self._note(answer, call)
                        if call.whole:
                            held.append(answer)
                            continue
                        left = left or isinstance(answer, Tokens | Embedded)
                        yield answer
            except Retryable as error:
                if error.code != "worker_lost":
                    raise
                if left and call.can_go_on:
                    self._go_on(call, place)
                    continue
                if left or call.retries >= MAX_RETRIES:
                    raise
                self._forget(call, place)
                log.info("retried", request=call.request_id, node=place.node, reason=error.code, retries=call.retries)
                continue
            for answer in held:
                yield answer
            return

    async def _place(self, call: Call) -> Local | Forward:
        """Where to try next, waiting for a model that is on its way. Raises Refused or Retryable."""
        with contextlib.ExitStack() as waits:
            return await self._placed(call, waits)

    async def _placed(self, call: Call, waits: contextlib.ExitStack) -> Local | Forward:
        deadline, queued = self._clock() + self._limits.load_wait_s, False
        while True:
            place = choose(
                RouteRequest(
                    model=call.model,
                    tried=frozenset(call.tried),
                    version=call.version if call.going_on else "",
                ),
                self.here(),
                self._table.view(self._clock()),
            )
            call.known = not isinstance(place, Refuse) or place.code != "model_not_found"
            if not isinstance(place, Refuse):
                return place
            if place.code == "model_not_found":
                known = ", ".join(place.known) or "none"
                raise Refused(f"there is no such model; known: {known}", code="model_not_found", param="model")
            if self._pool.refusing and not call.going_on:
                raise Retryable("this node's memory is short", code="memory_pressure", retry_after_s=5)
            if not queued and not call.going_on and any(m.name == call.model for m in self._pool.views()):
                # in line from now on, however often what is asked for below is asked again
                waits.enter_context(self._pool.waiting(call.model))
                queued = True
            left_s = deadline - self._clock()
            if left_s <= 0 or not await self._wait_for_capacity(call, place, min(left_s, 1.0)):
                if call.going_on:
                    gone = "the loader was lost, and no node holds the version that began this answer"
                    raise Retryable(gone, code="worker_lost")
                raise Retryable("no node can answer for this model now", code="no_capacity", retry_after_s=5)
            call.tried.clear()

    async def _wait_for_capacity(self, call: Call, refused: Refuse, step_s: float) -> bool:
        """True when trying again makes sense: a loader is coming, here or on a peer, or who failed may be back."""
        if self.draining:
            return False
        name = call.model
        if call.going_on:
            return await self._wait_for_version(call, step_s)
        if any(m.name == name for m in self._pool.views()):
            if await self._pool.wanted(name, step_s):
                return True
            await asyncio.sleep(min(0.05, step_s))
            return self._pool.is_coming(name) or bool(call.tried) or refused.loading
        if call.tried or refused.loading:
            await asyncio.sleep(min(0.2, step_s))
            return True
        return False

    async def _wait_for_version(self, call: Call, step_s: float) -> bool:
        """As long as exactly the version that began an answer may still come back, here or on a peer."""
        name, version = call.model, call.version
        peers = self._table.view(self._clock())
        held = any(m.name == name and version in m.versions for p in peers if p.state != "down" for m in p.models)
        here = any(m.name == name for m in self._pool.views()) and self._pool.comes_back(name, version)
        # who has just failed us is heard of again, or not, within a beat or two
        if held or here or self._clock() - call.lost_s < LOST_S:
            await asyncio.sleep(min(0.2, step_s))
            return True
        return False

    def _attempt(self, place: Local | Forward, call: Call) -> AsyncGenerator[Answer, None]:
        ask = call.frame(self._node)
        if isinstance(place, Local):
            return self._timed(self.work(ask), call)
        self._table.sent(place.node)
        return self._timed(self._peer_client.generate(place.url, ask), call)

    async def work(self, ask: Ask) -> AsyncGenerator[Answer, None]:
        """Answer on this node, for a client of ours or for a peer. Raises Retryable when the loader is lost."""
        version = ask.version if isinstance(ask, Generate) else ""
        if version:
            # it may be on its way back: started again after its end, or after its end while it drained
            await self._pool.wanted_back(ask.model, version, self._limits.load_wait_s)
        async with self._pool.lease(ask.model, version) as lease, contextlib.aclosing(lease.generate(ask)) as answers:
            async for answer in answers:
                if isinstance(answer, Accepted):
                    answer = msgspec.structs.replace(answer, version=lease.version, node=self._node)
                yield answer

    async def _timed(self, answers: AsyncGenerator[Answer, None], call: Call) -> AsyncGenerator[Answer, None]:
        """Bounds on the first token, on gaps and on the whole; failures in the frames become errors."""
        started = False
        async with contextlib.aclosing(answers):
            while True:
                limit_s = self._limits.token_gap_s if started else self._limits.first_token_s
                if not isinstance(call.ask, Generate):
                    limit_s = self._limits.request_s  # a long list of inputs comes back at its end
                over_s = call.began_s + self._limits.request_s - self._clock()
                try:
                    async with asyncio.timeout(max(0.0, min(limit_s, over_s))):
                        answer = await anext(answers)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if over_s <= limit_s:
                        reason = f"the request took over {self._limits.request_s:g} s"
                        raise Retryable(reason, code="deadline_exceeded") from None
                    raise Retryable(f"no token for {limit_s:g} s", code="worker_lost") from None
                if isinstance(answer, Failed):
                    raise _error_of(answer)
                started = started or isinstance(answer, Tokens)
                yield answer

    def _note(self, answer: Answer, call: Call) -> None:
        now = self._clock()
        if isinstance(answer, Accepted):
            call.worker, call.version = answer.node, answer.version
            call.prompt_tok, call.cached_tok = answer.prompt_tok, answer.cached_tok
        elif isinstance(answer, Tokens):
            if call.first_s is None:
                call.first_s = now
            else:
                call.gaps_us.append(int((now - call.last_s) * 1e6))
            call.last_s = now
            call.completion_tok += answer.count
            call.made += answer.ids
        elif isinstance(answer, Done):
            call.done = answer
            if not call.going_on:
                call.cached_tok = answer.cached_tok
            call.completion_tok = answer.completion_tok

    def _go_on(self, call: Call, place: Local | Forward) -> None:
        """What the client has stays; another loader continues after it. On this node it is asked for at once, so that a
        loader that was draining is known to be missed."""
        if isinstance(place, Forward):
            self._table.refused(place.node, self._clock())
            call.tried.add(place.node)
        call.going_on = True
        call.lost_s = self._clock()
        call.continuations += 1
        log.info("continued", request=call.request_id, node=place.node, tokens=len(call.made), version=call.version)

    def _forget(self, call: Call, place: Local | Forward) -> None:
        """A fresh try: nothing of the lost one counts but that it happened."""
        if isinstance(place, Forward):
            self._table.refused(place.node, self._clock())
        call.tried.add(place.node)
        call.retries += 1
        call.completion_tok = call.prompt_tok = call.cached_tok = 0
        call.first_s = None
        call.gaps_us.clear()
        call.made.clear()

    def _count(self, call: Call, outcome: str) -> None:
        now = self._clock()
        if outcome == "ok":
            self._drain.setdefault(call.model, DrainRate()).ended(now)
        self._ledger.record(
            Answered(
                # a name that nobody serves is a stranger's text and stays out of the records
                model=call.model if call.known else "",
                version=call.version,
                worker=call.worker,
                key_id=call.key_id,
                outcome=outcome,
                finish=call.finish,
                requests=1 if call.part == 0 else 0,
                retries=call.retries,
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
        return Retryable(failed.message, code="worker_lost")
    if failed.code == "engine_failed":
        return Retryable(failed.message, code="engine_failed")
    return Refused(failed.message, code=failed.code, param=failed.param)
