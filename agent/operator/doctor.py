"""Asks what `doctor` shows: this machine, the peers, the store, the GPU, the sensors and the running agent. What it
means is judged in agent/operator/checks.py; nothing is written."""

import asyncio
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from agent.audit import chain, disk
from agent.audit.service import FOLDER
from agent.config import AgentConfig, configured_peers
from agent.files.modelstore import ModelStore, model_folder
from agent.mesh.peer_client import PeerClient
from agent.mesh.signing import RackKeys
from agent.operator import checks, install, mac_checks, state_folder
from agent.operator.checks import Budget, Finding, PeerFact, StoreFact
from agent.operator.facts import budget_of, gather, policy_of
from agent.operator.first_node import machine
from agent.operator.mac import readings
from agent.operator.resolved import Resolver, resolver
from agent.operator.statusview import talks_text
from agent.process import gpu
from agent.process.loader_process import environment
from agent.telemetry.meters.rack import RackMeters
from agent.telemetry.sensors import Sensors
from agent.telemetry.sensors.host import hardware
from shared.errors import AccessDenied, NotFound, PreconditionFailed, RackError
from shared.keys import DESIRED, MOST_CLAIM_BYTES, MOST_DESIRED_BYTES, claim_key, raw_node_prefix
from shared.secrets import strong
from shared.store import ObjectStore
from shared.store_open import open_store
from shared.store_s3 import NO_BUCKET

PEER_S = 3.0
"""How long a peer may take to answer."""


def examine(
    config: AgentConfig, state: Path, logs: Path, environ: Mapping[str, str], *, mac: bool = False
) -> list[Finding]:
    """Every check, in the order in which an operator would run them. ``mac`` adds what somebody has to look at on a
    Mac."""
    looking = resolver(config, state, environ, may_ask=True)
    device = asyncio.run(gpu.ask(environ))
    budget = budget_of(config, device)
    sources = _sources(state)
    return [
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        _blas(),
        checks.chip(hardware(), on_a_mac=machine.is_mac()),
        *_memory(budget, device),
        *checks.here(config, gather(config, state, logs, looking, budget)),
        *_files(config, state, environ),
        _state(state, logs),
        _audit(config, state / FOLDER),
        *_store(config, looking),
        *_peers(config, looking),
        *_meters(config, environ, looking),
        *(Finding(f"source {name}", "warning" if why else "ok", why or seen) for name, (seen, why) in sources.items()),
        *_mac(config, looking, device, sources, to_look_at=mac),
    ]


def _blas() -> Finding:
    """Runs in a child process, because BLAS and MLX cannot be unloaded."""
    code = (
        "from agent.loader import blas; name = blas.install(); import mlx.core as mx; print(mx.__version__, '|', name)"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines()
        return Finding("mlx", "problem", f"import failed: {lines[-1] if lines else run.returncode}")
    version, _, name = run.stdout.strip().partition("|")
    return Finding("mlx", "warning" if "reference" in name else "ok", f"{version.strip()}, BLAS:{name}")


def _memory(budget: Budget, device: gpu.Device) -> Iterator[Finding]:
    if not budget.bytes:
        return  # checks.models says so
    of = f" of {budget.machine_bytes / 1e9:.1f} GB" if budget.machine_bytes is not None else ""
    why = f"; {device.reason}" if device.reason and budget.source != "configured" else ""
    yield Finding("memory", "ok", f"{budget.bytes / 1e9:.1f} GB{of} for models ({budget.source}{why})")


def _files(config: AgentConfig, state: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the models' files are whole, and how their chat templates are spoken to. What was found before is not
    found again."""
    store = ModelStore(state / "models.json", model_folder(config, state))
    for n, model in enumerate(config.models):
        try:
            store.outlook(model)
        except RackError:
            continue
        try:
            spec = store.describe(model)
        except RackError as error:
            seen = error.message.removeprefix(f"model {model.name}: ")
            yield Finding(f"{model.name}: files", "problem", seen, f"models[{n}].path")
            continue
        yield Finding(f"{model.name}: files", "ok", f"version {spec.version}")
        if model.engine == "mlx":
            talks = _described(spec.path, environ)
            verdict: checks.Verdict = "warning" if "template" in talks else "ok"
            yield Finding(f"{model.name}: chat", verdict, talks_text(talks))


def _described(folder: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Asked in a child process, which loads the model's tokenizer only."""
    command = [sys.executable, "-P", "-m", "agent.loader", "--describe", folder]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment(environ, threads=1)
    )
    try:
        return msgspec.json.decode(run.stdout, type=dict[str, str])
    except msgspec.DecodeError:
        return {"template": f"it cannot be examined (exit status {run.returncode})"}


def _state(state: Path, logs: Path) -> Finding:
    if found := state_folder.problems(state, logs):
        return Finding("state", "warning", state_folder.shown(found, state))
    return Finding("state", "ok", f"{state} is this user's alone" if state.is_dir() else f"{state} does not exist yet")


def _audit(config: AgentConfig, folder: Path) -> Finding:
    """Whether the audit log can be written, and is whole at its end; `audit verify` checks all of it."""
    if not config.audit.enabled:
        return Finding("audit", "warning", "off: nothing is recorded of what requests asked for", "audit.enabled")
    if not folder.is_dir():
        return Finding("audit", "ok", f"{folder} does not exist yet; the agent makes it")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("audit", "problem", f"{folder} cannot be written to by this user")
    tip = disk.known_tip(folder) or chain.NOTHING
    verdict = chain.verify(disk.contents(folder, 2), tip=tip, alone=False)
    if verdict.fault is not None:
        return Finding("audit", "problem", f"{verdict.fault.text()}; run `mlxrack-agent audit verify --bucket`")
    return Finding("audit", "ok", f"whole at its end, line {verdict.last.seq}; `mlxrack-agent audit verify` checks all")


# ---- the store ----


def _store(config: AgentConfig, looking: Resolver) -> Iterator[Finding]:
    named = [one for one in checks.references(config) if one.key.startswith("store.")]
    if config.store.kind == "directory" and not Path(config.store.path).expanduser().is_dir():
        yield Finding("store", "ok", f"{config.store.path} does not exist yet; the agent makes it")
    elif all(looking.problem(one)[0] == "" for one in named):
        yield from checks.store(config.store.kind, _asked_store(config, looking))
    elif looking.running is not None:
        push = looking.running.status["push"]
        verdict: checks.Verdict = "problem" if push["reason"] else "ok"
        yield Finding("store", verdict, f"the running agent says: {push['state']} {push['reason']}".strip())
    else:
        yield Finding("store", "problem", "cannot be asked without its secrets (see above)", "store")


def _asked_store(config: AgentConfig, looking: Resolver) -> StoreFact:
    try:
        store = open_store(config.store, looking.environ, attempts=1)
    except RackError as error:
        return StoreFact(problem=_of_store(error))
    try:
        claim, denied = _claim(store, config.node.id), _desired(store)
        problem = ""
    except RackError as error:
        claim, denied, problem = "none", [], _why_denied(store, config.node.id, error)
    # error responses carry the time, too
    return StoreFact(problem, denied, claim, store.clock_skew_ms)


def _claim(store: ObjectStore, node: str) -> Any:
    """What becomes of this node's claim when it is written again, unchanged and on the condition that there is none.
    Raises RackError."""
    try:
        there = store.get(key := claim_key(node, 1), MOST_CLAIM_BYTES)
    except NotFound:
        return "none"
    try:
        store.put_if_absent(key, there.body)
    except PreconditionFailed:
        return "kept"
    return "overwritten"


def _desired(store: ObjectStore) -> list[str]:
    try:
        store.get(DESIRED, MOST_DESIRED_BYTES)
    except NotFound:
        pass
    except AccessDenied as error:
        return [f"{DESIRED}: {_of_store(error)}; the desired state cannot be followed without"]
    return []


def _why_denied(store: ObjectStore, node: str, error: RackError) -> str:
    """A store that denies everything in a bucket that it does not have may still say so when it is to list it."""
    if isinstance(error, AccessDenied):
        try:
            store.list_after(raw_node_prefix(node), limit=1)
        except RackError as listing:
            if listing.code == NO_BUCKET:
                return _of_store(listing)
    return _of_store(error)


def _of_store(error: RackError) -> str:
    """The message without the key that was tried."""
    return re.sub(r"^(get|put|list) \S*: ", "", error.message)


# ---- the peers ----


def _peers(config: AgentConfig, looking: Resolver) -> Iterator[Finding]:
    if not config.peers.nodes:
        yield Finding("peers", "ok", "none configured")
        return
    try:
        named = [one for one in checks.references(config) if one.key.startswith("peers.")]
        keys = RackKeys([strong(one.reference, one.key, looking.environ) for one in named])
        facts = asyncio.run(_answers(config, keys))
    except RackError as error:
        if looking.running is None:
            yield Finding("peers", "problem", f"cannot be asked: {error.message}", "peers.secret")
        else:
            yield from _seen_by_agent(looking.running.status)
        return
    yield from checks.peer_answers(config, facts, time.time_ns() // 1_000_000)
    running = looking.running.status.get("policy", {}) if looking.running else {}
    if mine := running.get("digest") or policy_of(config).digest:
        yield from checks.policies(mine, facts)


def _seen_by_agent(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Where only the running agent has the secret, what it says of its peers."""
    for peer in status["peers"]:
        why, ready = peer["problem"].removeprefix(f"peer {peer['url']}: "), ", ".join(peer["models"]) or "none yet"
        seen = why or f"{peer['state']}; models that answer there: {ready}"
        verdict: checks.Verdict = "ok" if peer["state"] == "up" and not why else "problem"
        yield Finding(f"peer {peer['node']}", verdict, f"{seen} (as seen by the running agent)")


async def _answers(config: AgentConfig, keys: RackKeys) -> list[PeerFact]:
    """Ask every peer as the agent does, all at the same time. Raises RackError when this node's own TLS is at fault."""
    tls = None
    if config.tls.certificate:
        from agent.mesh.tls import NodeTls

        tls = NodeTls(config.tls, rack=config.node.rack, node=config.node.id)
    client = PeerClient(keys, config.node.id, tls=tls)
    try:
        return await asyncio.gather(*(_answer(client, node, url) for node, url in configured_peers(config)))
    finally:
        await client.close()


async def _answer(client: PeerClient, node: str, url: str) -> PeerFact:
    began = time.monotonic()
    try:
        heard = await client.heartbeat(node, url, PEER_S)
    except RackError as error:
        return PeerFact(node, url, problem=error.message)
    return PeerFact(node, url, heard, hop_ms=(time.monotonic() - began) * 1000)


# ---- meters ----


def _meters(config: AgentConfig, environ: Mapping[str, str], looking: Resolver) -> Iterator[Finding]:
    """Every meter, polled once from here; the running agent's reading stands for one whose secret only it can use."""
    if config.meters:
        told = looking.running.status.get("meters", []) if looking.running else []
        yield from checks.meters(asyncio.run(_polled(config, environ)), told)


async def _polled(config: AgentConfig, environ: Mapping[str, str]) -> list[dict[str, Any]]:
    meters = RackMeters(config.meters, environ, logs=False)
    try:
        await meters.poll()
        return meters.status()
    finally:
        await meters.close()


# ---- sensors, and what only a Mac can show ----


def _sources(state: Path) -> dict[str, tuple[str, str]]:
    """Every source of every sensor: its current reading, and why there is none."""
    sensors = Sensors(state.absolute())
    try:
        return {
            source.name: (source.seen, source.reason) for collector in sensors.all for source in collector.sources()
        }
    finally:
        sensors.close()


def _mac(
    config: AgentConfig,
    looking: Resolver,
    device: gpu.Device,
    sources: Mapping[str, tuple[str, str]],
    *,
    to_look_at: bool,
) -> Iterator[Finding]:
    facts = None
    if machine.is_mac():
        facts = mac_checks.MacFacts(
            sources=sources,
            gpu_bytes=device.recommended_bytes,
            drain_s=config.limits.drain_s,
            service=install.installed(),
            status=looking.running.status if looking.running else None,
            renames=install.NEWSYSLOG.exists(),
            missing_tools=[tool for tool in ("notifyutil", "vm_stat", "launchctl") if not shutil.which(tool)],
        )
        yield from mac_checks.decided(facts)
        yield from readings.settings()
        yield from readings.local_network(facts.status)
    yield from mac_checks.awake(looking.running.status if looking.running else None)
    if to_look_at:
        yield from mac_checks.undecided(facts)
