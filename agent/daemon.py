"""The agent process: every object is built here, once. Begin reading here.

Start: spool (one agent per spool), sockets, peers, models, schedule. Stop: no new work, drain requests in flight,
end loaders, last window, last push. MLX is never imported in this process; each model lives in a child.
"""

import asyncio
import contextlib
import gc
import os
import resource
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from agent import schedule
from agent.api import app as api
from agent.api.connections import Listener, table_for
from agent.api.context import Context
from agent.api.host_metrics import HostMetrics
from agent.api.metrics import Metrics
from agent.api.wire import Runner
from agent.config import AgentConfig, configured_peers, plain_warnings
from agent.control.follower import Follower
from agent.files.modelstore import ModelStore, model_folder
from agent.gateway.dispatch import Dispatch
from agent.mesh.heartbeats import Heartbeats
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import PeerTable
from agent.mesh.signing import Key, Nonces
from agent.models.loaders import Loaders
from agent.models.pool import Pool
from agent.operator import resolved
from agent.operator.admin_client import SERVED_NAME
from agent.process.gpu import Budget
from agent.process.prefixes import prefix_key
from agent.status import Status
from agent.telemetry.meters.rack import POLL_S
from agent.telemetry.sampler import Sources
from agent.telemetry.service import Telemetry
from agent.views import offers
from agent.wire.frames import Reported
from shared import __version__, private
from shared.durable import write_whole
from shared.logs import get_logger
from shared.memory_plan import default_budget_bytes
from shared.records import AgentStarted, AgentStopped, EngineWindow, Event
from shared.secrets import strong
from shared.store_open import open_store

if TYPE_CHECKING:
    from agent.mesh.tls import NodeTls

LAST_PUSH_S = 15.0
TLS_POLL_S = 5.0
"""How often files of certificates are compared with those in force."""
ADMIN_TOKEN, METRICS_TOKEN = "admin.token", "metrics.token"

log = get_logger("agent.daemon")


class Daemon:
    """One agent. ``state`` is its folder; ``environ`` resolves references to secrets by ``env:``."""

    def __init__(self, config: AgentConfig, state: Path, environ: Mapping[str, str]) -> None:
        self.config, self._state, self._environ = config, state, environ
        self._stop = asyncio.Event()
        self._connections = table_for(config)
        self._steady: list[asyncio.Task[None]] = []
        self._timetable = schedule.Timetable(self._clock_was_set)
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._budget = Budget(config.memory.budget_bytes, default_budget_bytes(psutil.virtual_memory().total))
        self._rack_secret = strong(config.peers.secret, "peers.secret", environ) if config.peers.secret else ""
        self._tls = self._node_tls()
        self._table = PeerTable(configured_peers(config), beat_s=config.peers.beat_s, now=time.monotonic())
        self._peer_client = PeerClient(self._rack_secret, config.node.id, tls=self._tls)
        self.telemetry = self._telemetry()
        self._metrics = self._live_metrics()
        self._models = ModelStore(state / "models.json", model_folder(config, state))
        self._pool = self._model_pool()
        self._dispatch = Dispatch(
            *(config.node.id, self._pool, self._table, self._peer_client, self.telemetry.ledger, config.limits),
            prefix_key=prefix_key(self._rack_secret) if self._rack_secret else b"",
            heat=lambda: self.telemetry.heat.level,
        )
        self._follower = Follower(
            *(config, self._pool, self._models),
            lambda: open_store(config.store, environ, attempts=1),
            state / "desired.json",
            carried_by_peer=self._carried_by_peer,
            on_peers=self._set_peers,
        )
        self._heartbeats = Heartbeats(
            *(self._table, self._peer_client, self.telemetry.outbox.emit),
            rack=config.node.rack,
            beat_s=config.peers.beat_s,
            on_back=self._dispatch.peer_is_back,
        )
        parts = (self.telemetry, self._pool, self._dispatch, self._follower, self._table, self._heartbeats)
        self.status = Status(config.node, self._budget, *parts, warnings=self._warnings)

    # ---- construction ----

    def _telemetry(self) -> Telemetry:
        sources = Sources(
            windows=self._engine_windows,
            refresh=lambda: self._pool.inventory.refresh(),
            so_far=lambda: self._pool.inventory.windows_so_far(),
            standing=lambda: (*self._pool.inventory.residents(), self._follower.observed()),
            on_sample=lambda sample: self._metrics.host.sampled(sample),
        )
        return Telemetry(
            *(self.config, self._state, self._environ, sources),
            budget_bytes=self._budget.bytes,
            on_event=lambda event: self._metrics.event(event),
            on_answered=lambda answered: self._metrics.answered(answered),
        )

    def _live_metrics(self) -> Metrics:
        node, telemetry = self.config.node, self.telemetry
        identity = {"node": node.id, "rack": node.rack, "version": __version__}
        host = HostMetrics(identity, telemetry.outbox.status, telemetry.meters.status)
        return Metrics(lambda: self._pool.inventory.status(), lambda: self._table.view(time.monotonic()), host)

    def _node_tls(self) -> "NodeTls | None":
        """Imported only where it is configured, because cryptography takes seven megabytes."""
        if not self.config.tls.certificate:
            return None
        from agent.mesh.tls import NodeTls

        node = self.config.node
        served = self._state / SERVED_NAME
        return NodeTls(self.config.tls, rack=node.rack, node=node.id, served=served, emit=self._emit)

    def _warnings(self) -> list[str]:
        of_files = self._tls.warnings() if self._tls is not None else ()
        return [*plain_warnings(self.config, self._table.urls()), *of_files]

    def _model_pool(self) -> Pool:
        config = self.config
        loaders = Loaders(
            *(config, self._environ),
            prompts=self._state / "prompts",
            threads=config.loader.threads or max(1, (os.cpu_count() or 1) // max(1, len(config.models))),
            on_report=self._on_report,
        )
        return Pool(
            *(config, self._models, loaders),
            budget_bytes=self._budget.bytes,
            emit=self._emit,
            carried_by_peer=self._carried_by_peer,
        )

    def _context(self) -> Context:
        return Context(
            config=self.config,
            dispatch=self._dispatch,
            pool=self._pool,
            follower=self._follower,
            peers=self._table,
            status=self.status,
            metrics=self._metrics.text,
            connections=self._connections,
            seal=self.telemetry.outbox.seal,
            secrets=lambda: resolved.problems(self.config, self._environ),
            admin_token=token(self._state, ADMIN_TOKEN),
            metrics_token=token(self._state, METRICS_TOKEN),
            rack_secret=self._rack_secret,
            rack_key=Key(self._rack_secret),
            nonces=Nonces(),
        )

    # ---- start and stop ----

    async def run(self, started: Callable[[int], None] = lambda _: None) -> None:
        """Serve until stopped. ``started`` receives the port. Raises Halt when the address cannot be bound."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _tune_garbage_collector()
        # a client that disconnects cancels its handler, and with it the work in the loader
        runner = Runner(
            api.build(self._context()),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=1.0,
            keepalive_timeout=self.config.limits.idle_s,
        )
        await runner.setup()
        try:
            listener = Listener(runner, self.config, self._connections, self._tls.listener if self._tls else None)
            await listener.start()
            await self._start(listener.port)
            started(listener.port)
            await self._stop.wait()
            self._timetable.shutdown()
            await self._shut_down()
        finally:
            # not before: requests in flight here still need the peers' state
            for task in self._steady:
                task.cancel()
            await asyncio.gather(*self._steady, return_exceptions=True)
            await self._heartbeats.close()
            await runner.cleanup()
            await self._peer_client.close()
            await self.telemetry.close()

    @property
    def hangs(self) -> bool:
        """Whether a thread waits for an unresponsive store or sensor, and would delay the exit."""
        return self.telemetry.hangs or self._follower.hangs

    def stop(self) -> None:
        """Begin a graceful shutdown."""
        self._stop.set()

    async def poll(self) -> None:
        """Check the wall clock and poll the sensors."""
        self._timetable.look()
        await self.telemetry.poll()

    async def _start(self, port: int) -> None:
        node, telemetry = self.config.node, self.telemetry
        self._emit(AgentStarted(t_ms=_wall_ms(), version=__version__, previous=telemetry.previous()))
        log.info("agent_started", node=node.id, port=port, version=__version__, epoch=telemetry.spool.epoch)
        self._follower.prepare()
        # the GPU may respond slowly, and a run that is killed meanwhile must leave a record
        await telemetry.sampler.keep()
        await self._ask_gpu()
        self._pool.start()
        self._timetable.start(
            schedule.jobs(
                self.config,
                sample=telemetry.sampler.tick,
                keep=telemetry.sampler.keep,
                push=telemetry.outbox.push,
                follow=self._follower.tick,
            )
        )
        telemetry.heat.watch()
        self._warn()
        self._steady = [asyncio.create_task(schedule.steadily(job)) for job in self._steady_jobs()]
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)

    def _warn(self) -> None:
        """At the start; `status` shows them as long as they hold."""
        self._warn_of_plain_http()
        if self._tls is not None:
            self._tls.report()

    def _warn_of_plain_http(self) -> None:
        for warning in plain_warnings(self.config, self._table.urls()):
            log.warning("plain_http", reason=warning)

    def _steady_jobs(self) -> tuple[schedule.Job, ...]:
        meters = [schedule.Job("meters", POLL_S, self.telemetry.meters.poll)] if self.config.meters else []
        tls = [schedule.Job("tls", TLS_POLL_S, self._tls.poll)] if self._tls is not None else []
        return (
            schedule.Job("heartbeat", self._heartbeats.every_s, self._heartbeats.tick),
            schedule.Job("maintain", schedule.MAINTAIN_S, self._pool.maintain),
            schedule.Job("poll", self.config.telemetry.poll_s, self.poll),
            *meters,
            *tls,
        )

    async def _ask_gpu(self) -> None:
        """Use the budget that the GPU recommends if a model needs the GPU and no other budget is configured."""
        if all(model.engine == "fake" for model in self.config.models) or not await self._budget.ask(self._environ):
            return
        self._pool.room.budget_bytes = self.telemetry.sensing.budget_bytes = self._budget.bytes
        log.info("memory_budget", bytes=self._budget.bytes, source=self._budget.source, reason=self._budget.reason)

    async def _shut_down(self) -> None:
        """Accept no new work, drain requests in flight, end the loaders, close the last window, push."""
        self._dispatch.draining = True
        self._follower.stop()
        telemetry, deadline = self.telemetry, time.monotonic() + self.config.limits.drain_s
        log.info("agent_stopping", in_flight=self._dispatch.in_flight)
        while self._busy() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self._pool.stop(max(0.0, deadline - time.monotonic()))
        telemetry.sampler.emit(AgentStopped(t_ms=_wall_ms(), reason="shutdown requested"))
        try:
            await telemetry.sampler.tick()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_PUSH_S):
                    await telemetry.outbox.push()
        finally:
            telemetry.pusher.stop()
            telemetry.spool.close(clean=True)
        log.info("agent_stopped", waiting_batches=telemetry.pusher.state.waiting_batches)

    def _busy(self) -> bool:
        return self._dispatch.in_flight > 0 or any(m.in_flight for m in self._pool.views())

    # ---- callbacks between parts ----

    def _emit(self, event: Event) -> None:
        self.telemetry.outbox.emit(event)

    def _clock_was_set(self, jump_s: float) -> None:
        log.warning("clock_was_set", seconds=round(jump_s, 1))
        self.telemetry.pusher.clock_was_set()

    async def _engine_windows(self) -> list[EngineWindow]:
        windows = await self._pool.inventory.windows()
        self._metrics.closed(windows)
        return windows

    def _on_report(self, model: str, reported: Reported) -> None:
        self._metrics.engine(model, reported)
        self._pool.inventory.reported_peak(model, reported.peak_bytes)

    def _set_peers(self, peers: Sequence[tuple[str, str]]) -> None:
        """Replace the peers. Without a secret there are none: no node could prove that it is one."""
        if self.config.peers.secret:
            before = set(self._table.urls())
            for removed in self._table.become(peers, time.monotonic()):
                self._peer_client.drop(removed)
            if not before.issuperset(self._table.urls()):
                self._warn_of_plain_http()
        elif peers:
            log.warning("peers_without_secret", reason="the desired state lists peers, but peers.secret is not set")

    def _carried_by_peer(self, name: str) -> bool:
        return any(True for _ in offers(self._table.view(time.monotonic()), name, up=True, ready=True))


def token(state: Path, name: str) -> str:
    """A token of this node's own API, created at the first start, readable by the agent's user only. One that others
    could have read or written is replaced, and so is one that could be guessed."""
    path = state / name
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if private.is_private(os.lstat(path)) and len(known := path.read_text(encoding="ascii").strip()) >= 32:
            return known
        log.warning("token_replaced", name=name, reason="it was not this user's alone, or too short")
    made = secrets.token_hex(32)
    write_whole(path, f"{made}\n".encode())
    return made


def _tune_garbage_collector() -> None:
    """Freeze the objects made at the start, and collect cycles rarely: there are few. At its defaults the garbage
    collector took an eighth of the time of a busy gateway."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
