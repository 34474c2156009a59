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
from typing import TYPE_CHECKING, Any

from agent import schedule
from agent.api import app as api
from agent.api.connections import Listener, table_for
from agent.api.context import Context
from agent.api.errors import STATUS
from agent.api.host_metrics import HostMetrics
from agent.api.metrics import Metrics
from agent.api.wire import Runner
from agent.boundary import Boundary, Neighbours
from agent.config import AgentConfig, Live, configured_peers, plain_warnings
from agent.control.follower import Follower
from agent.egress.connections import Reach
from agent.files.modelstore import ModelStore, model_folder
from agent.gateway.dispatch import Dispatch
from agent.mesh.heartbeats import Heartbeats
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import PeerTable
from agent.mesh.sightings import Sightings, mark_of
from agent.mesh.signing import Nonces, RackKeys
from agent.models.loaders import Loaders
from agent.models.pool import Pool
from agent.operator import resolved
from agent.operator.admin_client import SERVED_NAME
from agent.process import awake
from agent.process.gpu import Budget
from agent.process.machine import default_budget, memory_bytes
from agent.reload_run import Parts, Read, Reloader, rack_secrets
from agent.status import Status
from agent.telemetry.meters.rack import POLL_S
from agent.telemetry.sampler import Sources
from agent.telemetry.service import Telemetry
from agent.views import offers
from agent.wire.frames import Reported
from shared import __version__, private
from shared.clocks import SleepWatch
from shared.durable import write_whole
from shared.logs import get_logger
from shared.records import AgentStopped, EngineWindow, Event
from shared.store import ObjectStore
from shared.store_open import open_store

if TYPE_CHECKING:
    from agent.mesh.tls import NodeTls

LAST_PUSH_S = 15.0
TLS_POLL_S = 5.0
"""How often files of certificates are compared with those in force."""
ADMIN_TOKEN, METRICS_TOKEN = "admin.token", "metrics.token"

log = get_logger("agent.daemon")


class Daemon:
    """One agent. ``state`` is its folder; ``environ`` resolves references to secrets by ``env:``; ``read`` gives the
    configuration again, for a reload. Without ``lasting``, operators' orders end with it, and those of earlier runs do
    not count."""

    def __init__(
        self,
        config: AgentConfig,
        state: Path,
        environ: Mapping[str, str],
        read: Read | None = None,
        *,
        lasting: bool = True,
        reach: Reach | None = None,
    ) -> None:
        self._live, self._state, self._environ = Live(config), state, environ
        self._stop, self._awake, self._connections = asyncio.Event(), awake.of_this_machine(), table_for(self._live)
        self._steady: list[asyncio.Task[None]] = []
        self._timetable, self._sleeps = schedule.Timetable(self._clock_was_set), SleepWatch()
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._budget = Budget(config.memory.budget_bytes, default_budget(config.memory.budget_bytes, memory_bytes()))
        self._keys = RackKeys(rack_secrets(config, environ))
        self._tls = self._node_tls()
        self._table = PeerTable(configured_peers(config), beat_s=config.peers.beat_s, now=time.monotonic())
        self.telemetry = self._telemetry()
        mark = mark_of(self.telemetry.spool.identity.hardware, self.telemetry.spool.identity.spool_id)
        self._peer_client = PeerClient(
            self._keys, config.node.id, tls=self._tls, accepts=self._table.accepts, mark=mark
        )
        self._metrics = self._live_metrics()
        self._models = ModelStore(state / "models.json", model_folder(config, state))
        self._pool = self._model_pool()
        near = Neighbours(self._table, self._peer_client, self._keys, self._pool, self._emit, _store_of(self))
        self.boundary = Boundary(self._live, state, environ, near, STATUS, reach=reach)
        self._dispatch = _new_dispatch(self)
        self._follower = self._new_follower(lasting=lasting)
        self._heartbeats = self._new_heartbeats(mark)
        parts = (self.telemetry, self._pool, self._dispatch, self._follower, self._table, self._heartbeats)
        more = (self._warnings, self._awake.view)
        self.status = Status(config.node, self._budget, *parts, *more, boundary=self.boundary, keys=self._keys)
        reloaded = (self._live, self._keys, self._tls, self._pool, self._follower, self._models, self.boundary.policy)
        self.reloader = Reloader(Parts(*reloaded), environ, read)
        self._live.follow(lambda now: self._put_budget(now.memory.budget_bytes))

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
        host = HostMetrics(
            identity, telemetry.outbox.status, telemetry.meters.status, lambda: self.boundary.audit.status()
        )
        return Metrics(lambda: self._pool.inventory.status(), lambda: self._table.view(time.monotonic()), host)

    def _new_follower(self, *, lasting: bool) -> Follower:
        return Follower(
            *(self._live, self._pool, self._models),
            _store_of(self),
            self._state / "desired.json",
            carried_by_peer=self._carried_by_peer,
            on_peers=self._set_peers,
            lasting=lasting,
        )

    def _new_heartbeats(self, mark: str) -> Heartbeats:
        node = self.config.node
        made = Heartbeats(
            *(self._table, self._peer_client, self.telemetry.outbox.emit),
            rack=node.rack,
            beat_s=self.config.peers.beat_s,
            sightings=Sightings(node.id, mark),
            on_back=self._dispatch.peer_is_back,
            on_shares=self.boundary.allowances.heard,
        )
        made.on_heard = self.boundary.heard
        return made

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
        of_orders, of_reloads = self._follower.in_force.warnings(), self.reloader.warnings()
        plain = plain_warnings(self.config, self._table.urls())
        return [*plain, *of_files, *of_orders, *of_reloads, *self._awake.warnings(), *self.boundary.warnings()]

    def _model_pool(self) -> Pool:
        prompts = self._state / "prompts"

        def reported(model: str, report: Reported) -> None:
            self._metrics.engine(model, report)
            self._pool.inventory.reported_peak(model, report.peak_bytes)

        loaders = Loaders(self._live, self._environ, prompts=prompts, on_report=reported)
        return Pool(
            *(self._live, self._models, loaders),
            budget_bytes=self._budget.bytes,
            emit=self._emit,
            carried_by_peer=self._carried_by_peer,
            figures=self._state / "step_times.json",
        )

    def _context(self) -> Context:
        return Context(
            live=self._live,
            dispatch=self._dispatch,
            boundary=self.boundary,
            pool=self._pool,
            follower=self._follower,
            peers=self._table,
            status=self.status,
            metrics=self._metrics.text,
            connections=self._connections,
            seal=lambda: _sealed(self),
            secrets=lambda: resolved.problems(self.config, self._environ),
            admin_token=token(self._state, ADMIN_TOKEN),
            metrics_token=token(self._state, METRICS_TOKEN),
            keys=self._keys,
            nonces=Nonces(),
            reloader=self.reloader,
        )

    # ---- start and stop ----

    async def run(self, started: Callable[[int], None] = lambda _: None) -> None:
        """Serve until stopped. ``started`` receives the port. Raises Halt when the address cannot be bound."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _tune_garbage_collector()
        # a client that disconnects cancels its handler, and with it the work in the loader
        runner = Runner(api.build(self._context()), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        self._live.follow(lambda now: runner.keep_idle(now.limits.idle_s))
        try:
            listener = Listener(runner, self._live, self._connections, self._tls.listener if self._tls else None)
            await listener.start()
            self._awake.start()
            await self._start(listener.port)
            self.reloader.state = ""
            started(listener.port)
            await self._stop.wait()
            self.reloader.state = "stopping"
            self._timetable.shutdown()
            await self._shut_down(runner, listener)
        finally:
            # not before: requests in flight here still need the peers' state
            for task in self._steady:
                task.cancel()
            await asyncio.gather(*self._steady, return_exceptions=True)
            await self._heartbeats.close()
            await runner.cleanup()
            await self._peer_client.close()
            await self.telemetry.close()
            await self.boundary.close()
            await self._awake.close()

    @property
    def config(self) -> AgentConfig:
        """The configuration in force."""
        return self._live.now

    @property
    def hangs(self) -> bool:
        """Whether a thread waits for an unresponsive store or sensor, and would delay the exit."""
        return self.telemetry.hangs or self._follower.hangs or self.boundary.audit.hangs

    def stop(self) -> None:
        """Begin a graceful shutdown."""
        self._stop.set()

    async def poll(self) -> None:
        """Check the wall clock and poll the sensors."""
        self._timetable.look()
        await self.telemetry.poll()

    async def _start(self, port: int) -> None:
        node, telemetry = self.config.node, self.telemetry
        self._emit(telemetry.serves())
        log.info("agent_started", node=node.id, port=port, version=__version__, epoch=telemetry.spool.epoch)
        await self._follower.prepare()
        # the GPU may respond slowly, and a run that is killed meanwhile must leave a record
        await telemetry.sampler.keep()
        await self._ask_gpu()
        self.boundary.start()
        self._pool.start(self._follower.in_force.loaded_first())
        self._timetable.start(
            schedule.jobs(
                self.config,
                sample=telemetry.sampler.tick,
                keep=telemetry.sampler.keep,
                push=telemetry.outbox.push,
                follow=self._follower.tick,
            )
        )
        self._live.follow(lambda now: self._timetable.retime("follow", now.desired.follow_s))
        telemetry.heat.watch()
        _warn_of_plain_http(self.config, self._table.urls())
        if self._tls is not None:
            self._tls.report()
        self._steady = [asyncio.create_task(schedule.steadily(job)) for job in self._steady_jobs()]
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)

    def _steady_jobs(self) -> tuple[schedule.Job, ...]:
        meters = [schedule.Job("meters", POLL_S, self.telemetry.meters.poll)] if self.config.meters else []
        tls = [schedule.Job("tls", TLS_POLL_S, self._tls.poll)] if self._tls is not None else []
        return (
            schedule.Job("heartbeat", self._heartbeats.every_s, self._heartbeats.tick),
            schedule.Job("maintain", schedule.MAINTAIN_S, self._pool.maintain),
            schedule.Job("poll", self.config.telemetry.poll_s, self.poll),
            *(schedule.Job(*job) for job in self.boundary.jobs()),
            *meters,
            *tls,
        )

    async def _ask_gpu(self) -> None:
        """Use the budget that the GPU recommends if a model needs the GPU and no other budget is configured."""
        if all(model.engine == "fake" for model in self.config.models) or not await self._budget.ask(self._environ):
            return
        self._put_budget(self.config.memory.budget_bytes)
        log.info("memory_budget", bytes=self._budget.bytes, source=self._budget.source, reason=self._budget.reason)

    def _put_budget(self, configured: int) -> None:
        self._budget.configure(configured)
        self._pool.room.budget_bytes = self.telemetry.sensing.budget_bytes = self._budget.bytes

    async def _shut_down(self, runner: Runner, listener: Listener) -> None:
        """Accept no new work, drain requests in flight, end the loaders, close the last window, push."""
        self._dispatch.draining = True
        self._follower.stop()
        telemetry, deadline = self.telemetry, time.monotonic() + self.config.limits.drain_s
        log.info("agent_stopping", in_flight=self._dispatch.in_flight)
        while _busy(self._pool) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await _leave(runner, listener)
        while self._dispatch.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self._pool.stop(max(0.0, deadline - time.monotonic()))
        await self._follower.orders.keep()
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

    # ---- callbacks between parts ----

    def _emit(self, event: Event) -> None:
        self.telemetry.outbox.emit(event)

    def _clock_was_set(self, jump_s: float) -> None:
        if abs(jump_s - self._sleeps.look()) <= schedule.JUMP_S:
            return  # the machine slept, and its time is right
        log.warning("clock_was_set", seconds=round(jump_s, 1))
        self.telemetry.pusher.clock_was_set()

    async def _engine_windows(self) -> list[EngineWindow]:
        windows = await self._pool.inventory.windows()
        self._metrics.closed(windows)
        return windows

    def _set_peers(self, peers: Sequence[tuple[str, str]]) -> None:
        """Replace the peers. Without a secret there are none: no node could prove that it is one."""
        known = bool(self.config.peers.secret)
        if peers and not known:
            log.warning("peers_without_secret", reason="the desired state lists peers, but peers.secret is not set")
        before = set(self._table.urls())
        for removed in self._table.become(peers if known else (), time.monotonic()):
            self._peer_client.retire(removed)
        self.boundary.members()
        if not before.issuperset(self._table.urls()):
            _warn_of_plain_http(self.config, self._table.urls())

    def _carried_by_peer(self, name: str) -> bool:
        return any(True for _ in offers(self._table.view(time.monotonic()), name, up=True, ready=True))


async def _sealed(daemon: Daemon) -> dict[str, Any]:
    """Close the telemetry's window and the file of the audit log, and upload both."""
    return {**await daemon.telemetry.outbox.seal(), "audit": await daemon.boundary.audit.seal()}


def _store_of(daemon: Daemon) -> Callable[[], ObjectStore]:
    """Opens the bucket that is configured."""
    return lambda: open_store(daemon.config.store, daemon._environ, attempts=1)


def _new_dispatch(daemon: Daemon) -> Dispatch:
    near = (daemon._pool, daemon._table, daemon._peer_client, daemon.telemetry.ledger, daemon._live)
    return Dispatch(
        *(daemon.config.node.id, *near),
        prefix_key=lambda: daemon._keys.prefix_key,
        heat=lambda: daemon.telemetry.heat.level,
        overflow=daemon.boundary.overflow,
    )


def _busy(pool: Pool) -> bool:
    """Whether a loader of this node has work. What peers compute for clients of this node is waited for later."""
    return any(m.in_flight for m in pool.views())


async def _leave(runner: Runner, listener: Listener) -> None:
    """Refuse connections, so that clients try the next address, and close each one after its answer; idle ones now."""
    await listener.stop()
    if runner.server is not None:
        runner.server.pre_shutdown()


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


def _warn_of_plain_http(config: AgentConfig, peers: Sequence[tuple[str, str]]) -> None:
    """At the start, and when there are others; `status` shows it as long as it holds."""
    for warning in plain_warnings(config, peers):
        log.warning("plain_http", reason=warning)


def _tune_garbage_collector() -> None:
    """Freeze the objects made at the start, and collect cycles rarely: there are few. At its defaults the garbage
    collector took an eighth of the time of a busy gateway."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
