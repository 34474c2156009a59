"""Checks of this machine with their remedies, and the list of checks that need a real Mac."""

import asyncio
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from agent.config import AgentConfig, configured_peers, plain_warnings
from agent.files.modelstore import ModelStore, model_folder
from agent.mesh.heartbeats import SKEW_WARNING_MS
from agent.operator import state_folder
from agent.operator.statusview import talks_text
from agent.process import gpu
from agent.process.loader_process import environment
from agent.telemetry.sensors import Sensors
from shared.errors import NotFound, RackError
from shared.keys import MOST_CLAIM_BYTES, claim_key
from shared.memory_plan import default_budget_bytes
from shared.secrets import strong
from shared.store_open import open_store

MAC_ONLY = (
    "the thermal pressure level reaches heavy under load, and notify(3)'s descriptor signals it (`sample`, /metrics)",
    "the SMC is readable from a LaunchDaemon without a login: F0Ac and PSTR exist, P-cores warm up under load",
    "PSTR agrees with a wall power meter, less the power supply's loss",
    "IOReport's CPU energy counter advances (zeus-apple-silicon), or is reported as stuck (macOS 27)",
    "an APC outlet reports watts, or needs `scale` (test with a known load)",
    "the agent runs as a LaunchDaemon without a login and reaches Metal",
    "host_statistics64, vm.swapusage and the memory pressure level agree with Activity Monitor",
    "launchd waits ExitTimeOut before it sends SIGKILL, and newsyslog rotates launchd's output",
    "MLX's Metal build gives the same answers as the CPU build in the tests",
    "the GPU's recommended working set is reported (line `memory` above)",
    "proc_pid_rusage's physical footprint agrees with Activity Monitor",
    "the memory plan holds with Metal's fused attention and buffer cache (`status` shows each load's plan error)",
)


class Finding(NamedTuple):
    """One check. ``verdict`` is ok, warning or problem."""

    what: str
    verdict: str
    seen: str


def examine(config: AgentConfig, state: Path, logs: Path, environ: Mapping[str, str]) -> list[Finding]:
    """Every check, in the order in which an operator would run them."""
    return [
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        _blas(),
        _memory(config, environ),
        *_models(config, state, environ),
        _port(config),
        _state(state, logs),
        *_store(config, environ),
        *_peers(config, environ),
        *_transport(config),
        *_sensors(state),
        *_mac_only(),
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


def _memory(config: AgentConfig, environ: Mapping[str, str]) -> Finding:
    total = psutil.virtual_memory().total
    device = gpu.Device() if config.memory.budget_bytes else asyncio.run(gpu.ask(environ))
    budget, source = gpu.budget_bytes(config.memory.budget_bytes, device, default_budget_bytes(total))
    verdict = "warning" if budget > total else "ok"
    why = f"; {device.reason}" if device.reason else ""
    return Finding("memory", verdict, f"budget {budget / 1e9:.1f} GB of {total / 1e9:.1f} GB ({source}{why})")


def _talks(folder: str, environ: Mapping[str, str]) -> dict[str, str]:
    """How a model's chat template is spoken to; asked in a child process, which loads its tokenizer only."""
    command = [sys.executable, "-P", "-m", "agent.loader", "--describe", folder]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment(environ, threads=1)
    )
    try:
        return msgspec.json.decode(run.stdout, type=dict[str, str])
    except msgspec.DecodeError:
        return {"template": f"it cannot be examined (exit status {run.returncode})"}


def _models(config: AgentConfig, state: Path, environ: Mapping[str, str]) -> list[Finding]:
    store, found = ModelStore(state / "models.json", model_folder(config, state)), []
    for model in config.models:
        try:
            spec = store.describe(model)
        except RackError as error:
            found.append(Finding(f"model {model.name}", "problem", error.message))
            continue
        seen = f"version {spec.version}, needs {spec.need_bytes / 1e6:.0f} MB"
        if model.engine == "mlx":
            talks = _talks(spec.path, environ)
            found.append(Finding(f"model {model.name}", "warning" if "template" in talks else "ok", seen))
            found.append(Finding("  chat template", found[-1].verdict, talks_text(talks)))
        else:
            found.append(Finding(f"model {model.name}", "ok", seen))
    return found or [Finding("models", "warning", "none configured; this node only forwards requests")]


def _port(config: AgentConfig) -> Finding:
    host, port = config.listen.host, config.listen.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding("port", "warning", f"{host}:{port} is in use ({error.strerror}); is the agent running?")
    return Finding("port", "ok", f"{host}:{port} is free")


def _state(state: Path, logs: Path) -> Finding:
    if found := state_folder.problems(state, logs):
        return Finding("state", "warning", state_folder.shown(found, state))
    return Finding("state", "ok", f"{state} is this user's alone" if state.is_dir() else f"{state} does not exist yet")


def _store(config: AgentConfig, environ: Mapping[str, str]) -> list[Finding]:
    skew_ms = None
    try:
        store = open_store(config.store, environ)
        try:
            store.get(claim_key(config.node.id, 1), MOST_CLAIM_BYTES)
        finally:
            skew_ms = store.clock_skew_ms  # error responses carry the time, too
    except NotFound:
        pass
    except RackError as error:
        return [Finding("store", "problem", error.message), *_clock(skew_ms)]
    return [Finding("store", "ok", f"{config.store.kind} is reachable and accepts the credentials"), *_clock(skew_ms)]


def _clock(skew_ms: int | None) -> list[Finding]:
    """A store in a folder reports no time."""
    if skew_ms is None:
        return []
    if abs(skew_ms) <= SKEW_WARNING_MS:
        return [Finding("clock", "ok", f"within {SKEW_WARNING_MS / 1000:g} s of the store's")]
    seen = f"{abs(skew_ms) / 1000:.0f} s {'ahead of' if skew_ms > 0 else 'behind'} the store's; set it by NTP"
    return [Finding("clock", "warning", seen)]


def _peers(config: AgentConfig, environ: Mapping[str, str]) -> list[Finding]:
    if not config.peers.nodes:
        return [Finding("peers", "ok", "none configured")]
    try:
        strong(config.peers.secret, "peers.secret", environ)
    except RackError as error:
        return [Finding("peers", "problem", error.message)]
    return [Finding("peers", "ok", f"{len(config.peers.nodes)} configured; `status` shows their state")]


def _transport(config: AgentConfig) -> list[Finding]:
    """TLS: whether its files can be used, and when they expire; and what is sent without it."""
    plain = [Finding("plain HTTP", "warning", warning) for warning in plain_warnings(config, configured_peers(config))]
    if not config.tls.certificate:
        return plain or [Finding("tls", "ok", "not configured; this node is reachable from this machine only")]
    from agent.mesh.tls import NodeTls

    try:
        tls = NodeTls(config.tls, rack=config.node.rack, node=config.node.id)
    except RackError as error:
        return [*plain, Finding("tls", "problem", error.message)]
    near = [Finding("tls", "warning", warning) for warning in tls.warnings()]
    return [*plain, *(near or [Finding("tls", "ok", "all certificates are valid for over 30 days")])]


def _sensors(state: Path) -> list[Finding]:
    """Every source of every sensor: its current reading, or why there is none."""
    sensors = Sensors(state.absolute())
    try:
        return [
            Finding(f"source {source.name}", "warning" if source.reason else "ok", source.reason or source.seen)
            for collector in sensors.all
            for source in collector.sources()
        ]
    finally:
        sensors.close()


def _mac_only() -> list[Finding]:
    if sys.platform == "darwin":
        missing = [tool for tool in ("notifyutil", "vm_stat", "newsyslog") if not shutil.which(tool)]
        tools = Finding("macOS tools", "warning" if missing else "ok", ", ".join(missing) or "all found")
        return [tools, *(Finding("verify once on this Mac", "warning", text) for text in MAC_ONLY)]
    return [Finding("verify on a Mac", "warning", text) for text in MAC_ONLY]
