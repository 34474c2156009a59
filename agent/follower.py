"""Follows the desired state: fetch it, plan, act, report. What was adopted is kept on disk, so that a start without the
bucket serves what it served."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from agent.config import STORED, AgentConfig, Model
from agent.model_pull import BucketSource, pull
from agent.modelstore import ModelStore
from agent.pool import Pool
from agent.reconcile import Action, Actual, Bring, Pin, Unload, drift, plan
from shared.desired import Assignment, DesiredState, parse
from shared.errors import NotFound, RackError, Refused
from shared.keys import DESIRED
from shared.logs import get_logger
from shared.records import DesiredObserved
from shared.store import ObjectStore

log = get_logger("agent.follower")


class _Adopted(msgspec.Struct, kw_only=True):
    desired: DesiredState | None = None
    overridden: list[str] = []


class Follower:
    """``open_store`` gives the bucket, or raises; ``memory`` is the file of what was adopted."""

    def __init__(
        self,
        config: AgentConfig,
        pool: Pool,
        models: ModelStore,
        open_store: Callable[[], ObjectStore],
        memory: Path,
    ) -> None:
        self._config = config
        self._pool = pool
        self._models = models
        self._open_store = open_store
        self._store: ObjectStore | None = None
        self._memory = memory
        self._adopted = self._recall()
        self._reason = ""
        self._acting = False

    # ---- what others ask ----

    def observed(self) -> DesiredObserved:
        """How far this node is, for the batch and the status."""
        desired = self._adopted.desired
        if desired is None:
            return DesiredObserved(generation=0, state="none", reason=self._reason)
        found = drift(self._actual(), self._assigned(), self._adopted.overridden)
        state = "failed" if self._reason else "acting" if self._acting else "drifted" if found else "converged"
        return DesiredObserved(generation=desired.generation, state=state, reason=self._reason, drift=found)

    def ordered_here(self, model: str) -> None:
        """An operator's order on this node wins until the next generation."""
        if self._adopted.desired is not None and model not in self._adopted.overridden:
            self._adopted.overridden.append(model)
            with contextlib.suppress(OSError):
                self._remember()

    def prepare(self) -> None:
        """At a start: what was adopted before is loaded right away, in its versions, and nothing else."""
        if not self._follows():
            return
        assigned = self._assigned()
        for model in self._config.models:
            if model.name not in {one.model for one in assigned} | set(self._adopted.overridden):
                self._pool.adopt(msgspec.structs.replace(model, preload=False))
        for one in assigned:
            if one.model not in self._adopted.overridden:
                self._pool.adopt(self._model(one, self._path_here(one)))

    async def tick(self) -> None:
        """Look, and bring this node closer. One at a time; a failure is a state, and is tried again."""
        try:
            await asyncio.to_thread(self._look)
        except RackError as error:
            self._fail(error.message)
            return
        self._reason = ""
        if not self._follows():
            return
        actions = plan(self._actual(), self._assigned(), self._adopted.overridden)
        self._acting = bool(actions)
        try:
            for action in actions:
                await self._tried(action)
        finally:
            self._acting = False

    async def _tried(self, action: Action) -> None:
        try:
            await self._act(action)
        except RackError as error:
            self._fail(error.message)

    # ---- looking ----

    def _look(self) -> None:
        """Adopt a newer generation. Raises RackError when the bucket cannot be asked or holds no desired state of
        ours."""
        if self._store is None:
            self._store = self._open_store()
        try:
            found = parse(self._store.get(DESIRED).body)
        except NotFound:
            return
        known = self._adopted.desired
        if known is not None and found.generation < known.generation:
            raise Refused(
                f"desired state: generation {found.generation} in the bucket is older than {known.generation}, which "
                "this node follows; write a higher one",
                code="bad_desired",
            )
        if known is None or found.generation > known.generation:
            self._adopted = _Adopted(desired=found)
            self._remember()
            log.info("desired_adopted", generation=found.generation, follows=self._follows())

    def _follows(self) -> bool:
        desired = self._adopted.desired
        return desired is not None and self._config.node.id in desired.nodes

    def _assigned(self) -> Sequence[Assignment]:
        desired = self._adopted.desired
        return desired.nodes.get(self._config.node.id, ()) if desired is not None else ()

    def _actual(self) -> list[Actual]:
        return self._pool.actual()

    # ---- acting ----

    async def _act(self, action: Action) -> None:
        log.info("desired_action", action=type(action).__name__, **_fields(action))
        match action:
            case Bring():
                await self._bring(action)
            case Pin():
                self._pool.pin(action.model, pinned=action.pinned)
            case Unload():
                await self._pool.unload(action.model)

    async def _bring(self, action: Bring) -> None:
        one = action.assignment
        path = await asyncio.to_thread(self._fetched, one)
        model = self._model(one, path)
        found = await asyncio.to_thread(self._models.describe, model)
        if found.version != one.version:
            raise Refused(f"desired state: {one.model}: {path} is version {found.version}, not {one.version}")
        if action.swap:
            finished = await self._pool.swap_to(one.model, model)
            if finished.outcome != "flipped":
                raise Refused(f"desired state: swap {one.model}: {finished.reason}", code="swap_failed")
            return
        self._pool.adopt(model)
        await self._pool.load(one.model)

    def _fetched(self, one: Assignment) -> str:
        """The path of an assigned version, brought from the bucket when it is not here."""
        path = self._path_here(one)
        if self._is_fake(one) or self._models.place(one.source, one.version).is_dir():
            return path
        configured = self._configured(one.model)
        if configured is not None:
            with contextlib.suppress(RackError):
                if self._models.describe(configured).version == one.version:
                    return configured.path
        if self._store is None:
            self._store = self._open_store()
        source = BucketSource(self._store, one.source, one.version)
        pull(source, self._models, one.source, disk_bytes=self._config.model_store.disk_bytes)
        return path

    def _path_here(self, one: Assignment) -> str:
        return one.source if self._is_fake(one) else f"{STORED}{one.source}@{one.version}"

    def _is_fake(self, one: Assignment) -> bool:
        configured = self._configured(one.model)
        return configured is not None and configured.engine == "fake"

    def _configured(self, name: str) -> Model | None:
        return next((model for model in self._config.models if model.name == name), None)

    def _model(self, one: Assignment, path: str) -> Model:
        base = self._configured(one.model) or Model(name=one.model)
        settings = {
            name: value
            for name in ("rows", "plan_context_tok", "cache_bytes", "keep_alive_s")
            if (value := getattr(one, name)) is not None
        }
        return msgspec.structs.replace(base, path=path, preload=True, pinned=one.pinned, **settings)

    # ---- remembering ----

    def _fail(self, reason: str) -> None:
        if reason != self._reason:
            log.warning("desired_failed", reason=reason)
        self._reason = reason

    def _recall(self) -> _Adopted:
        try:
            return msgspec.json.decode(self._memory.read_bytes(), type=_Adopted)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            return _Adopted()  # the bucket knows

    def _remember(self) -> None:
        temporary = self._memory.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(self._adopted))
        temporary.replace(self._memory)


def _fields(action: Action) -> dict[str, object]:
    if isinstance(action, Bring):
        return {"model": action.assignment.model, "version": action.assignment.version, "swap": action.swap}
    return {"model": action.model}
