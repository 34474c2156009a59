"""Follows the desired state: fetch it, plan, act, report. What comes of it is kept by ``agent.control.adopted``; what
an operator orders meanwhile is done by ``agent.control.operator_orders``.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.config import STORED, Live, Model
from agent.control.adopted import Adopted
from agent.control.desired_peers import choose
from agent.control.in_force import InForce
from agent.control.operator_orders import OperatorOrders
from agent.control.reconcile import Action, Bring, Pin, Unload, drift, plan
from agent.control.standing import Base
from agent.files.model_pull import BucketSource, pull
from agent.files.modelstore import ModelStore
from agent.models.pool import Pool
from agent.tasks import Tasks
from shared import bucket_rack
from shared.batch import MAX_ITEMS, MAX_TEXT
from shared.desired import Assignment, parse
from shared.errors import NotFound, RackError, Refused, Retryable
from shared.keys import DESIRED, MOST_DESIRED_BYTES
from shared.logs import get_logger
from shared.records import DesiredObserved
from shared.store import ObjectStore

MAX_PAUSE_S = 3600.0

log = get_logger("agent.control.follower")
T = TypeVar("T")


class _Trouble(msgspec.Struct):
    """What failed for one action, how often, and when it is tried again."""

    reason: str
    times: int
    again_s: float


class Follower:
    """``open_store`` gives the bucket, or raises; ``memory`` is the file of what was adopted. ``carried_by_peer`` says
    whether another node serves a model now; ``on_peers`` takes (node, url) of all others. Without ``lasting``,
    operators' orders end with this process. ``orders`` and ``in_force`` are public."""

    def __init__(
        self,
        live: Live,
        pool: Pool,
        models: ModelStore,
        open_store: Callable[[], ObjectStore],
        memory: Path,
        *,
        carried_by_peer: Callable[[str], bool],
        on_peers: Callable[[Sequence[tuple[str, str]]], None] = lambda _: None,
        lasting: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._pool, self._models = live, pool, models
        self._store: ObjectStore | None = None
        self._carried_by_peer, self._on_peers = carried_by_peer, on_peers
        self._open_store, self._clock = open_store, clock
        self._adopted = Adopted(memory, live.now.node.id, lasting=lasting)
        self.in_force = InForce(pool, self._adopted, self._bases, lasting=lasting)
        self.orders = OperatorOrders(pool, models, self._adopted, self.in_force)
        self._reason = ""
        self._refused_peers: Sequence[str] = ()
        self._since_ms: int | None = None
        self._asking = Tasks()
        self._troubles: dict[bytes, _Trouble] = {}
        self._acting = self._stopping = False

    # ---- what others ask ----

    def observed(self) -> DesiredObserved:
        """How far this node is, for the batch and the status."""
        adopted, desired = self._adopted, self._adopted.desired
        if desired is None:
            state = "failed" if self._reason else "none"
            return DesiredObserved(generation=0, state=state, reason=self._reason[:MAX_TEXT])
        found = drift(self._pool.inventory.actual(), adopted.assigned, adopted.orders) if adopted.follows else ()
        found = tuple(one[:MAX_TEXT] for one in (*found, *self._refused_peers)[:MAX_ITEMS])
        reason = self._reason or next((trouble.reason for trouble in self._troubles.values()), "")
        state = "failed" if reason else "acting" if self._acting else "drifted" if found else "converged"
        return DesiredObserved(generation=desired.generation, state=state, reason=reason[:MAX_TEXT], drift=found)

    def governs(self, name: str) -> str:
        """What decides how a name is served, if not agent.toml: "order" of an operator, or "desired" state, which wins
        once it is newer; "" for agent.toml. What governs a name is not to be changed by anything below it."""
        if self.in_force.governs(name):
            return "order"
        return "desired" if any(one.model == name for one in self._adopted.assigned) else ""

    @property
    def names_peers(self) -> bool:
        """Whether the desired state says who the peers are, and agent.toml only where they may be."""
        return self._adopted.desired is not None and bool(self._adopted.desired.peers)

    @property
    def since_ms(self) -> int | None:
        """Since when the desired state could not be asked for, UTC in ms; None while it can. Its reason may have
        changed since."""
        return self._since_ms

    @property
    def hangs(self) -> bool:
        """Whether a thread waits for the bucket, and would delay the exit."""
        return len(self._asking) > 0

    async def prepare(self) -> None:
        """At a start: what was served before is loaded right away, and nothing else."""
        self.tell_peers()
        if self._adopted.follows:
            for base in self._bases():
                self._pool.orders.adopt(base.model)
        await self.orders.prepare()

    def _bases(self) -> list[Base]:
        """What holds without orders: agent.toml, or the desired state where it names this node."""
        models = self._live.now.models
        if not self._adopted.follows or (desired := self._adopted.desired) is None:
            return [Base(model=model) for model in models]
        assigned, says = self._adopted.assigned, f"generation {desired.generation} of the desired state"
        others = [model for model in models if model.name not in {one.model for one in assigned}]
        idle = [Base(model=msgspec.structs.replace(model, preload=False), says=says) for model in others]
        return [*idle, *(Base(model=self._model(one, self._proved(one)), says=says) for one in assigned)]

    def stop(self) -> None:
        """Begin nothing more; a fetch that runs ends with its next piece."""
        self._stopping = True

    async def tick(self) -> None:
        """Look, and bring this node closer. A failure is a state, and is tried again after a pause that grows."""
        await self.orders.keep()
        try:
            before = self._adopted.desired
            await self._asking.finish(asyncio.to_thread(self._look))
            self._reason, self._since_ms = "", None
            if self._adopted.desired is not before:
                self.tell_peers()
        except RackError as error:
            self._store = None  # credentials may have changed
            if error.message != self._reason:
                log.warning("desired_unknown", reason=error.message)
            self._reason = error.message
            self._since_ms = self._since_ms or time.time_ns() // 1_000_000
        if self._adopted.follows:
            await self._reconcile()

    # ---- looking ----

    def _look(self) -> None:
        """Adopt a newer generation. Raises RackError when the bucket cannot be asked or holds no desired state of
        ours."""
        if self._store is None:
            self._store = self._open_store()
        try:
            found = parse(self._store.get(DESIRED, MOST_DESIRED_BYTES).body)
        except NotFound:
            return
        bucket_rack.check(found.rack or bucket_rack.told(self._store), self._live.now.node.rack)
        known = self._adopted.desired
        if known is not None and found.generation < known.generation:
            raise Refused(
                f"desired state: generation {found.generation} in the bucket is older than {known.generation}, which "
                "this node follows; write a higher one",
                code="bad_desired",
            )
        if known is None or found.generation > known.generation:
            self._adopted.adopt(found)
            self._troubles.clear()
            log.info("desired_adopted", generation=found.generation, follows=self._adopted.follows)

    def tell_peers(self) -> None:
        """Who the other nodes are, as the desired state says, or else agent.toml: when either has changed."""
        desired = self._adopted.desired
        chosen = choose(self._live.now, desired.peers if desired is not None else ())
        self._refused_peers = chosen.refused
        for why in chosen.refused:
            log.warning("desired_peer_refused", reason=why)
        self._on_peers(chosen.peers)

    # ---- acting ----

    async def _reconcile(self) -> None:
        """Action by action, planned anew after each, because orders and traffic go on meanwhile."""
        tried: set[bytes] = set()
        missing = False
        while not self._stopping:
            planned = plan(self._pool.inventory.actual(), self._adopted.assigned, self._adopted.orders)
            todo = [a for a in planned if msgspec.json.encode(_tagged(a)) not in tried]
            self._acting = bool(todo)
            if not todo:
                break
            action = todo[0]
            tried.add(msgspec.json.encode(_tagged(action)))
            if isinstance(action, Unload) and (missing or not self._may_leave(action.model)):
                continue
            failed = await self._tried(action)
            missing = missing or (isinstance(action, Bring) and failed not in ("", "no_memory"))
        self._acting = False

    def _may_leave(self, model: str) -> bool:
        """A model that goes to another node stays here until it is served there."""
        return not self._adopted.on_others(model) or self._carried_by_peer(model)

    async def _tried(self, action: Action) -> str:
        """The code of what went wrong; "" when nothing did."""
        key = msgspec.json.encode(_tagged(action))
        if (before := self._troubles.get(key)) is not None and self._clock() < before.again_s:
            return "paused"
        try:
            await self._act(action)
        except RackError as error:
            times = before.times + 1 if before else 1
            pause = min(MAX_PAUSE_S, self._live.now.desired.follow_s * 2.0 ** (times - 1))
            self._troubles[key] = _Trouble(error.message, times, self._clock() + pause)
            log.warning("desired_failed", **_fields(action), reason=error.message, again_in_s=round(pause))
            return error.code
        self._troubles.pop(key, None)
        return ""

    async def _act(self, action: Action) -> None:
        log.info("desired_action", **_fields(action))
        match action:
            case Bring():
                await self._bring(action)
            case Pin():
                await self._pool.orders.pin(action.model, pinned=action.pinned)
            case Unload():
                await self._pool.orders.unload(action.model)

    async def _bring(self, action: Bring) -> None:
        one = action.assignment
        path = await self._asking.finish(asyncio.to_thread(self._fetched, one))
        model = self._model(one, path)
        found = await asyncio.to_thread(self._models.describe, model)
        if found.version != one.version:
            raise Refused(f"desired state: {one.model}: {path} is version {found.version}, not {one.version}")
        if action.swap:
            if (finished := await self._pool.orders.swap_to(one.model, model)).outcome != "flipped":
                raise Refused(f"desired state: swap {one.model}: {finished.reason}", code="swap_failed")
            await self._pool.orders.pin(one.model, pinned=one.pinned)
        else:
            self._pool.orders.adopt(model)
            await self._pool.orders.load(one.model, ordered=False)
        await asyncio.to_thread(self._adopted.brought, one.model, path)

    def _fetched(self, one: Assignment) -> str:
        """The path of an assigned version, brought from the bucket when it is not here."""
        path = self._path_here(one)
        if self._is_fake(one) or self._models.place(one.source, one.version).is_dir():
            return path
        if (configured := self._configured(one.model)) is not None:
            with contextlib.suppress(RackError):
                if self._models.describe(configured).version == one.version:
                    return configured.path
        source = BucketSource(self._store or self._open_store(), one.source, one.version)
        disk_bytes = self._live.now.model_store.disk_bytes
        pull(source, self._models, one.source, disk_bytes=disk_bytes, progress=lambda done, total: self._go_on())
        return path

    def _go_on(self) -> None:
        if self._stopping:
            raise Retryable("the agent is stopping; what was fetched is kept", code="stopping")

    def _proved(self, one: Assignment) -> str:
        """The path that was served for an assigned model before; else where its files should be."""
        if (served := self._adopted.served.get(one.model)) is not None:
            return served
        configured = self._configured(one.model)
        return configured.path if configured is not None else self._path_here(one)

    def _path_here(self, one: Assignment) -> str:
        return one.source if self._is_fake(one) else f"{STORED}{one.source}@{one.version}"

    def _is_fake(self, one: Assignment) -> bool:
        configured = self._configured(one.model)
        return configured is not None and configured.engine == "fake"

    def _configured(self, name: str) -> Model | None:
        return next((model for model in self._live.now.models if model.name == name), None)

    def _model(self, one: Assignment, path: str) -> Model:
        """Settings of the assignment over the node's own. Raises Refused for what cannot be."""
        base = msgspec.to_builtins(self._configured(one.model) or Model(name=one.model))
        names = ("rows", "plan_context_tok", "cache_bytes", "keep_alive_s")
        settings = {name: value for name in names if (value := getattr(one, name)) is not None}
        try:
            return msgspec.convert({**base, **settings, "path": path, "preload": True, "pinned": one.pinned}, Model)
        except msgspec.ValidationError as error:
            raise Refused(f"desired state: {one.model}: {error}", code="bad_desired") from None


def _tagged(action: Action) -> tuple[str, Action]:
    return type(action).__name__, action


def _fields(action: Action) -> dict[str, object]:
    what = type(action).__name__.lower()
    if isinstance(action, Bring):
        one = action.assignment
        return {"action": what, "model": one.model, "version": one.version, "swap": action.swap}
    return {"action": what, "model": action.model}
