"""Gathers what is known of a configuration and its machine without asking anybody else and without writing anything.
What it means is judged in agent/operator/checks.py."""

import errno
import os
import pwd
import socket
from pathlib import Path

import msgspec

from agent.config import AgentConfig, Model, key_ids
from agent.files.modelstore import ModelStore, model_folder
from agent.operator.checks import (
    Budget,
    Facts,
    FolderFact,
    ListenFact,
    ModelFact,
    PolicyFact,
    Secret,
    SecretFact,
    references,
)
from agent.operator.resolved import Resolver
from agent.policy.rules import digest
from agent.process import gpu, machine
from agent.telemetry.spool_identity import Identity
from shared.config import ConfigError
from shared.errors import Halt, RackError
from shared.transport import check_tls

_BIND_ERRORS = {
    errno.EADDRINUSE: "in_use",
    errno.EADDRNOTAVAIL: "no_such_address",
    errno.EACCES: "not_permitted",
    errno.EPERM: "not_permitted",
}


def gather(config: AgentConfig, state: Path, logs: Path, resolver: Resolver, budget: Budget | None = None) -> Facts:
    """Facts for ``checks.here``. ``budget`` is what the GPU was asked for; by default the share that it recommends."""
    (problem, warnings), policy = _tls(config), policy_of(config)
    return Facts(
        secrets=[SecretFact(one, *resolver.problem(one)) for one in (*references(config), *policy.secrets)],
        models=_models(config, state),
        budget=budget or default_budget(config),
        folders=_folders(config, state, logs),
        listen=_listen(config, running=resolver.agent_runs),
        tls_problem=problem,
        tls_warnings=warnings,
        spool_of=_spool_of(state),
        policy=policy,
    )


def policy_of(config: AgentConfig) -> PolicyFact:
    """The policy file that a start would put in force."""
    from agent.policy.doubts import Known, doubts  # with it comes an engine for patterns
    from agent.policy.reading import read

    try:
        rules = read(config.policy.path).rules
    except ConfigError as error:
        return PolicyFact(error.problems)
    named = [(f"policy.providers[{n}].secret", one.secret) for n, one in enumerate(rules.providers)]
    secrets = [Secret(key, reference) for key, reference in named if reference]
    return PolicyFact((), rules.version, digest(rules), doubts(rules, Known(keys=key_ids(config))), secrets)


def default_budget(config: AgentConfig) -> Budget:
    """The budget without asking the GPU."""
    return budget_of(config, gpu.Device())


def budget_of(config: AgentConfig, device: gpu.Device) -> Budget:
    """The budget, with what the GPU told; of no bytes where nothing tells them and the agent would not start."""
    total, configured = machine.memory_bytes(), config.memory.budget_bytes
    try:
        default = machine.default_budget(configured, total)
    except Halt as error:
        return Budget(0, error.message, None)
    return Budget(*gpu.budget_bytes(configured, device, default), total)


def _models(config: AgentConfig, state: Path) -> list[ModelFact]:
    store = ModelStore(state / "models.json", model_folder(config, state))
    return [
        _model(store, n, model)
        for n, model in enumerate(config.models)
        if model.engine == "fake" or model.path  # one without is reported as such
    ]


def _model(store: ModelStore, n: int, model: Model) -> ModelFact:
    key = f"models[{n}].path"
    try:
        need = store.outlook(model)
        smallest = msgspec.structs.replace(model, rows=1, plan_context_tok=min(2048, model.plan_context_tok))
        least = store.outlook(smallest)
    except RackError as error:
        key = f"models[{n}].probes" if error.code == "bad_probes" else key
        return ModelFact(key, model.name, problem=error.message.removeprefix(f"model {model.name}: "))
    return ModelFact(key, model.name, need, least, model.pinned)


def _folders(config: AgentConfig, state: Path, logs: Path) -> list[FolderFact]:
    named = {"paths.state": state, "paths.logs": logs, "model_store.path": model_folder(config, state)}
    if config.store.kind == "directory" and config.store.path:
        named["store.path"] = Path(config.store.path).expanduser()
    # one inside another says nothing new
    return [
        _folder(key, path)
        for key, path in named.items()
        if not any(path != other and path.is_relative_to(other) for other in named.values())
    ]


def _folder(key: str, path: Path) -> FolderFact:
    existing = next(one for one in (path.absolute(), *path.absolute().parents) if os.path.lexists(one))
    if not existing.is_dir():
        kind = "link that leads nowhere" if existing.is_symlink() and not existing.exists() else "file"
        return FolderFact(key, str(path), str(existing), kind, writable=False)
    try:
        owner = pwd.getpwuid(existing.stat().st_uid).pw_name
    except KeyError:
        owner = f"user {existing.stat().st_uid}"
    writable = os.access(existing, os.W_OK | os.X_OK)
    return FolderFact(key, str(path), str(existing), "folder", writable, owner, machine.free_bytes(existing))


def _listen(config: AgentConfig, *, running: bool) -> ListenFact:
    host, port = config.listen.host, config.listen.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with socket.socket(found[0][0]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
    except socket.gaierror:
        return ListenFact(host, port, "no_such_address")
    except OSError as error:
        taken_by = "agent" if running else ""
        return ListenFact(host, port, _BIND_ERRORS.get(error.errno or 0, "other"), taken_by, error.strerror or "")  # type: ignore[arg-type]
    return ListenFact(host, port)


def _tls(config: AgentConfig) -> tuple[str, list[str]]:
    """Why the files cannot be used, and what is to be known of them. What is missing is reported elsewhere."""
    if not config.tls.certificate or check_tls(config.tls):
        return "", []
    from agent.mesh.tls import NodeTls

    try:
        tls = NodeTls(config.tls, rack=config.node.rack, node=config.node.id)
    except RackError as error:
        return error.message, []
    return "", list(tls.warnings())


def _spool_of(state: Path) -> tuple[str, str] | None:
    try:
        identity = msgspec.json.decode((state / "spool" / "identity.json").read_bytes(), type=Identity)
    except (OSError, msgspec.DecodeError):
        return None
    return identity.node, identity.rack
