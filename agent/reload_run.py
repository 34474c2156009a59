"""Reads agent.toml again and puts it in force, all or nothing: everything is read, resolved and tried first, and then
changed without an await in between. What may change is decided in agent/reloading.py."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from agent.config import AgentConfig, Live, Model
from agent.control.follower import Follower
from agent.control.policy_file import PolicyFile
from agent.files.modelstore import ModelStore
from agent.mesh.signing import RackKeys
from agent.models.pool import Pool
from agent.reloading import Comparison, compare, needs_loader, refusal, value_at
from agent.tasks import Tasks
from shared import logs
from shared.config import ConfigError
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger
from shared.secrets import strong

if TYPE_CHECKING:
    from agent.mesh.tls import Loaded, NodeTls

Read = Callable[[], AgentConfig]
"""Gives the configuration as at a start. Blocks; raises ConfigError."""
RACK_SECRETS = ("peers.secret", "peers.old_secret")
"""The newest first."""

log = get_logger("agent.reload")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload did: sentences about what ``changed``, and ``notes`` on what did not although it might be
    expected."""

    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Parts(NamedTuple):
    """What a reload changes."""

    live: Live
    keys: RackKeys
    tls: "NodeTls | None"
    pool: Pool
    follower: Follower
    models: ModelStore
    policy: PolicyFile | None = None


class _Ready(NamedTuple):
    """Read, resolved and tried."""

    config: AgentConfig
    secrets: Mapping[str, str]
    tls: "Loaded | None"
    policy: Callable[[], str]


class Reloader:
    """``read`` gives the configuration as at a start, and blocks; without it there is nothing to read again. ``state``
    is why a reload has to wait, if it has to."""

    def __init__(self, parts: Parts, environ: Mapping[str, str], read: Read | None) -> None:
        self._parts, self._environ, self._read = parts, environ, read
        self._turns, self._next = asyncio.Lock(), list[asyncio.Future[Report]]()
        self._tasks = Tasks()
        self._last: dict[str, Any] = {}
        self.state = "starting"

    def view(self) -> dict[str, Any]:
        """The last reload, and the models that it still changes or could not change, for display."""
        return {**self._last, "models": dict(self._parts.pool.changes.states)}

    def warnings(self) -> list[str]:
        """What an operator has to know, a sentence each."""
        failed = self._parts.pool.changes
        found = [f"model {name} is not as in agent.toml: {failed.states[name]}" for name in failed.failed]
        return [*([f"agent.toml is not in force: {self._last['reason']}"] if self._last.get("reason") else []), *found]

    async def reload(self) -> Report:
        """Put the configuration in force; those who ask while one is being read share the next turn. Raises Refused
        with every reason (code not_reloaded), Retryable while the agent starts or stops."""
        if not self._next:
            turn = self._tasks.spawn(self._turn())
            turn.add_done_callback(lambda done: done.cancelled() or done.exception())  # who asked may have left
            self._next.append(turn)
        return await asyncio.shield(self._next[0])

    def begin(self) -> None:
        """The same for a caller who does not wait; what comes of it is in the log and the status."""
        self._tasks.spawn(self.reload()).add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _turn(self) -> Report:
        async with self._turns:
            self._next.clear()
            try:
                report = await self._reload()
            except RackError as error:
                self._note("refused", reason=error.message)
                log.warning("config_not_reloaded", reason=error.message)
                raise
            except Exception as error:
                self._note("refused", reason=f"unexpected {type(error).__name__}; see the log")
                log.error("config_not_reloaded", exc_info=True)
                raise
        self._note("changed" if report.changed else "unchanged", changed=report.changed, notes=report.notes)
        log.info("config_reloaded", changed=report.changed, notes=report.notes)
        return report

    def _note(self, outcome: str, *, reason: str = "", changed: Sequence[str] = (), notes: Sequence[str] = ()) -> None:
        t_ms = time.time_ns() // 1_000_000
        self._last = {"outcome": outcome, "t_ms": t_ms, "reason": reason, "changed": changed, "notes": notes}

    # ---- one turn ----

    async def _reload(self) -> Report:
        self._check_state()
        if self._read is None:
            raise Refused("reload: this agent was started without a configuration file", code="not_reloaded")
        old, retried = self._parts.live.now, self._parts.pool.changes.failed
        ready, found, problems = await asyncio.to_thread(self._prepared, old)
        if problems:
            raise _refused(problems)
        assert ready is not None
        self._check_state()
        return self._put(ready, found, retried)

    def _check_state(self) -> None:
        if self.state:
            raise Retryable(f"reload: the agent is {self.state}; nothing was changed", code="not_ready")

    def _prepared(self, old: AgentConfig) -> tuple[_Ready | None, Comparison, list[str]]:
        """What would be put in force, what differs, and every reason against it. In a thread: it reads files, and a
        keychain may ask."""
        assert self._read is not None
        try:
            new = self._read()
        except ConfigError as error:
            return None, compare(old, old), list(error.problems)
        except RackError as error:
            return None, compare(old, old), [error.message]
        found = compare(old, new)
        problems = [refusal(found.restarts)] if found.restarts else []
        secrets = self._resolved(new, problems)
        tls = None if found.restarts else self._tried(new, problems)
        for name in found.models:  # one that failed before and has not changed is no reason to keep a key in force
            self._look(new, name, problems)
        return _Ready(new, secrets, tls, self._policy(new, problems)), found, problems

    def _policy(self, new: AgentConfig, problems: list[str]) -> Callable[[], str]:
        """What puts the policy file in force."""
        try:
            if self._parts.policy is not None:
                return self._parts.policy.prepare(new)
        except ConfigError as error:
            problems += [f"the policy file, {problem}" for problem in error.problems]
        return str

    def _resolved(self, new: AgentConfig, problems: list[str]) -> dict[str, str]:
        """The secrets, by key."""
        found = dict[str, str]()
        for path in (*RACK_SECRETS, "disk_cache.secret"):
            try:
                if reference := value_at(new, path):
                    found[path] = strong(reference, path, self._environ)
            except RackError as error:
                problems.append(error.message)
        return found

    def _tried(self, new: AgentConfig, problems: list[str]) -> "Loaded | None":
        try:
            return self._parts.tls.tried(new.tls) if self._parts.tls is not None else None
        except RackError as error:
            problems.append(error.message)
        return None

    def _look(self, new: AgentConfig, name: str, problems: list[str]) -> None:
        """Whether a model that is going to be loaded is there at all."""
        model, follower = _model(new, name), self._parts.follower
        if model is None or (governor := follower.governs(name)) == "desired":
            return
        start = follower.in_force.serving(name) if governor else None
        if start is not None and start.order.swap is not None:
            return  # other files are served
        try:
            self._parts.models.outlook(model)
        except RackError as error:
            problems.append(error.message)

    def _put(self, ready: _Ready, found: Comparison, retried: Sequence[str]) -> Report:
        """No await, and nothing that can fail before everything is changed."""
        parts, new = self._parts, ready.config
        old, marks = parts.live.now, parts.keys.marks
        parts.live.replace(new)
        parts.keys.become([ready.secrets[path] for path in RACK_SECRETS if path in ready.secrets])
        policy = ready.policy()
        if ready.tls is not None and parts.tls is not None:
            parts.tls.put(ready.tls)
        if new.log_level != old.log_level:
            logs.set_level(new.log_level)
        parts.follower.tell_peers()
        again = [name for name in retried if name not in found.models]
        stays = [words for name in (*found.models, *again) if (words := self._begin(name))]
        changed = [*found.changes, *([policy] if policy else [])]
        if parts.keys.marks != marks and not any(one.startswith(RACK_SECRETS) for one in changed):
            changed.append("peers.secret: another value")
        if ready.tls is not None and not any(one.startswith("tls.") for one in changed):
            changed.append("tls: other certificates")
        changed += [f"models: {name} is tried again" for name in again]
        if new.peers.nodes != old.peers.nodes and parts.follower.names_peers:
            stays.append("peers.nodes: the desired state names the peers; `mlxrack-agent status` shows them")
        return Report(changed=tuple(changed), notes=(*stays, *_fixed(old, new)))

    def _begin(self, name: str) -> str:
        """Begin the change of a model; a sentence when something else than agent.toml decides on it."""
        changes = self._parts.pool.changes
        told = self._told(name, changes.served(name))
        changes.begin(name, partial(self._wish, name), needs_loader)
        return f"models: {told}" if told else ""

    def _told(self, name: str, served: Model | None) -> str:
        """What an operator has to know of a model on which agent.toml does not decide alone."""
        if not (governor := self._governor(name, served)):
            return ""
        if governor == "desired":
            return f"what the desired state says of {name} stays"
        start = self._parts.follower.in_force.serving(name)
        if start is None:
            return f"{name} is not configured any more; what was ordered for it waits until it is"
        if served is None and start.order.swap is not None:
            return f"{name} is served with its own files until the next start, which does what was ordered for it"
        return f"what an operator ordered for {name} stays"

    def _governor(self, name: str, served: Model | None) -> str:
        """What decides on a model instead of agent.toml; "" when nothing does."""
        swapped = served is not None and served.name != name
        return self._parts.follower.governs(name) or ("order" if swapped else "")

    def _wish(self, name: str, served: Model | None) -> Model | Literal["stays"] | None:
        """As at a start: agent.toml, with what the desired state or an order says on top."""
        base, governor = self._parts.follower.in_force.base(name), self._governor(name, served)
        if not governor:
            return base.model if base is not None else None
        return self._ordered(name, served) if governor == "order" else self._desired(name, served)

    def _desired(self, name: str, served: Model | None) -> Model | Literal["stays"]:
        """The desired state brings and removes models; what it does not say of one is as agent.toml says."""
        in_force = self._parts.follower.in_force
        if in_force.base(name) is None or served is None or (start := in_force.serving(name)) is None:
            return "stays"
        same = (served.name, served.path) == (start.model.name, start.model.path)
        return msgspec.structs.replace(start.model, preload=False) if same else "stays"

    def _ordered(self, name: str, served: Model | None) -> Model | Literal["stays"] | None:
        """An order says how a configured model is served: that of one which nothing configures any more waits. What was
        not ordered is as agent.toml says; what is in memory, and what is not, stays so."""
        in_force = self._parts.follower.in_force
        if (start := in_force.serving(name)) is None:
            return None
        if served is not None:
            same = served.name == start.model.name
            return msgspec.structs.replace(start.model, preload=False) if same else "stays"
        if (base := in_force.base(name)) is None:
            return "stays"
        own = start.names[0] == name
        preload, pinned = (start.model.preload, start.model.pinned) if own else (False, base.model.pinned)
        return msgspec.structs.replace(base.model, preload=preload, pinned=pinned)


def rack_secrets(config: AgentConfig, environ: Mapping[str, str]) -> list[str]:
    """The secrets of the rack, the newest first. Raises Halt."""
    named = [(path, str(value_at(config, path))) for path in RACK_SECRETS]
    return [strong(reference, path, environ) for path, reference in named if reference]


def _model(config: AgentConfig, name: str) -> Model | None:
    return next((model for model in config.models if model.name == name), None)


def _refused(problems: Sequence[str]) -> Refused:
    if len(problems) == 1:
        return Refused(f"{problems[0]}; nothing was changed", code="not_reloaded")
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return Refused(f"{len(problems)} problems, nothing was changed\n{listed}", code="not_reloaded")


def _fixed(old: AgentConfig, new: AgentConfig) -> list[str]:
    """Secrets that no reload can renew: a process keeps the environment that it was started with."""
    found = []
    for path in (*RACK_SECRETS, "disk_cache.secret"):
        reference = value_at(new, path)
        if reference == value_at(old, path) and reference.startswith("env:"):
            found.append(f"{path}: {reference} is as at the start; to renew it here use file:, or restart the agent")
    return found
