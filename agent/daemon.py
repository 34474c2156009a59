"""The agent process: every object is built here, once. Begin reading here.

Start: spool (one agent per spool), sockets, peers, models, schedule. Stop: no new work, wait for what is in flight,
loaders, the last window, the last push. MLX is never imported in this process; each model lives in a child.
"""

import asyncio
import contextlib
import errno
import gc
import os
import resource
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
from aiohttp import web

from agent import schedule
from agent.api import app as api
from agent.api.context import Context
from agent.api.host_metrics import HostMetrics
from agent.api.metrics import Metrics
from agent.api.wire import Runner
from agent.config import AgentConfig
from agent.control.follower import Follower
from agent.files.modelstore import ModelStore, model_folder
from agent.gateway.dispatch import Dispatch
from agent.mesh.heartbeats import Prober
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import Beat, PeerTable
from agent.mesh.signing import Key, Nonces
from agent.models.loaders import Loaders
from agent.models.pool import Pool
from agent.process import gpu
from agent.process.prefixes import prefix_key
from agent.telemetry.ledger import Ledger
from agent.telemetry.meters.rack import POLL_S, RackMeters
from agent.telemetry.pusher import Pusher
from agent.telemetry.sampler import Sampler
from agent.telemetry.sensors import Sensors
from agent.telemetry.sensors.host import boot_id, hardware, hardware_id
from agent.telemetry.sensors.throttle import LEVELS, as_record
from agent.telemetry.spool import Spool
from agent.views import ModelView
from agent.wire.frames import Reported
from shared import __version__
from shared.bucket import open_store
from shared.errors import Halt
from shared.logs import get_logger
from shared.memory_plan import default_budget_bytes
from shared.records import URGENT, AgentStarted, AgentStopped, EngineWindow, Event
from shared.secrets import resolve

LAST_PUSH_S = 15.0
DAY_S = 86_400.0

log = get_logger("agent.daemon")


class Daemon:
    """One agent. ``state`` is its folder; ``environ`` is where secrets by ``env:`` are looked up."""

    def __init__(self, config: AgentConfig, state: Path, environ: Mapping[str, str]) -> None:
        self.config = config
        self._state = state
        self._environ = environ
        self._stop = asyncio.Event()
        self._urgent_tasks: set[asyncio.Task[None]] = set()
        self._steady: list[asyncio.Task[None]] = []
        self._heat_descriptor: int | None = None
        self._scheduler: schedule.Scheduler | None = None
        self._jobs: tuple[schedule.Job, ...] = ()
        self._clock_watch = schedule.ClockWatch(self._clock_was_set)
        self.sensors = Sensors(state.absolute())
        self.meters = RackMeters(config.meters, environ)
        self._pushing = asyncio.Lock()
        self._telling = asyncio.Lock()
        self._pushes: set[asyncio.Task[int]] = set()
        self._started_s = int(time.time())
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.spool = Spool(
            state / "spool",
            node=config.node.id,
            rack=config.node.rack,
            hardware=hardware_id(),
            max_bytes=config.telemetry.spool_bytes,
            max_batches=max(1, int(config.telemetry.spool_days * DAY_S / config.telemetry.sample_s)),
        )
        rack_secret = resolve(config.peers.secret, environ) if config.peers.secret else ""
        now = time.monotonic()
        urls = [(p.id, p.url.rstrip("/")) for p in config.peers.nodes]
        self.table = PeerTable(urls, beat_s=config.peers.beat_s, now=now)
        self.peer_client = PeerClient(rack_secret, config.node.id)
        self._device = gpu.Device()
        budget, self._budget_from = self._budget()
        self.models = ModelStore(state / "models.json", model_folder(config, state))
        self.loaders = Loaders(
            config,
            environ,
            prompts=state / "prompts",
            threads=config.loader.threads or max(1, (os.cpu_count() or 1) // max(1, len(config.models))),
            on_report=self._on_report,
        )
        self.pool = Pool(
            config,
            self.models,
            self.loaders,
            budget_bytes=budget,
            emit=self._emit,
            carried_by_peer=self._carried_by_peer,
        )
        self.host_metrics = HostMetrics(
            {"node": config.node.id, "rack": config.node.rack, "version": __version__}, self._pushed, self.meters.status
        )
        self.metrics = Metrics(self.pool.inventory.status, lambda: self.table.view(time.monotonic()), self.host_metrics)
        self.ledger = Ledger(self.metrics.answered)
        self.dispatch = Dispatch(
            config.node.id,
            self.pool,
            self.table,
            self.peer_client,
            self.ledger,
            config.limits,
            prefix_key=prefix_key(rack_secret) if rack_secret else b"",
            heat=self._heat,
        )
        self.pusher = Pusher(self.spool, lambda: open_store(config.store, environ, attempts=1))
        self.sampler = Sampler(
            self.spool,
            self.ledger,
            self.sensors.all,
            engine_windows=self._engine_windows,
            engine_refresh=self.pool.inventory.refresh,
            engine_so_far=self.pool.inventory.windows_so_far,
            standing=lambda: (*self.pool.inventory.residents(), self.follower.observed()),
            metered=self.meters.drain,
            meter_problems=lambda: self.meters.problems,
            budget_bytes=budget,
            once=(hardware(),),
            on_sample=self.host_metrics.sampled,
            boot_id=boot_id(),
            clock_skew_ms=lambda: self.pusher.clock_skew_ms,
        )
        self.follower = Follower(
            config,
            self.pool,
            self.models,
            lambda: open_store(config.store, environ, attempts=1),
            state / "desired.json",
            carried_by_peer=self._carried_by_peer,
            on_peers=self._meet,
        )
        self.prober = Prober(
            self.table,
            self.peer_client,
            self._emit,
            rack=config.node.rack,
            beat_s=config.peers.beat_s,
            on_back=self.dispatch.heard_again,
        )
        self.context = Context(
            config=config,
            dispatch=self.dispatch,
            pool=self.pool,
            follower=self.follower,
            peers=self.table,
            sampler=self.sampler,
            status=self.status,
            rack=self.rack,
            metrics=self.metrics.text,
            seal=self.seal,
            started_s=self._started_s,
            admin_token=admin_token(state),
            rack_secret=rack_secret,
            rack_key=Key(rack_secret),
            nonces=Nonces(),
            beat=self.beat,
        )

    async def run(self, started: Callable[[int], None] = lambda _: None) -> None:
        """Serve until told to stop. ``started`` hears the port. Raises Halt when the address cannot be had."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _spare_the_collector()
        app = api.build(self.context)
        # a client that hangs up cancels its handler, and with it the work in the loader
        runner = Runner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        try:
            port = await self._listen(runner)
            self._emit(AgentStarted(t_ms=_wall_ms(), version=__version__, previous=self._previous()))
            log.info("agent_started", node=self.config.node.id, port=port, version=__version__, epoch=self.spool.epoch)
            self.follower.prepare()
            # the GPU may take its time, and a run that is killed meanwhile shall have been one
            await self.sampler.keep()
            await self._ask_gpu()
            self.pool.start()
            self._jobs = schedule.jobs(
                self.config,
                sample=self.sampler.tick,
                keep=self.sampler.keep,
                push=self.push,
                follow=self.follower.tick,
            )
            scheduler = self._scheduler = schedule.start(self._jobs)
            loop = asyncio.get_running_loop()
            steady = (
                schedule.Job("probe", self.prober.every_s, self.prober.tick),
                schedule.Job("tend", schedule.TEND_S, self.pool.tend),
                schedule.Job("poll", self.config.telemetry.poll_s, self.poll),
                *([schedule.Job("meters", POLL_S, self.meters.poll)] if self.config.meters else []),
            )
            self._watch_heat(loop)
            self._steady = [asyncio.create_task(schedule.steadily(job)) for job in steady]
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            started(port)
            await self._stop.wait()
            scheduler.shutdown(wait=False)
            await self._wind_down()
        finally:
            # not before: who still waits for an answer here needs to know the peers
            for task in self._steady:
                task.cancel()
            await asyncio.gather(*self._steady, return_exceptions=True)
            await self.prober.close()
            await runner.cleanup()
            await self.peer_client.close()
            self._unwatch_heat()
            self.sensors.close()
            await self.meters.close()

    def stop(self) -> None:
        """Begin to end in order."""
        self._stop.set()

    def _clock_was_set(self, jump_s: float) -> None:
        log.warning("clock_was_set", seconds=round(jump_s, 1))
        self.pusher.clock_was_set()
        if self._scheduler is not None:
            schedule.realign(self._scheduler, self._jobs)

    async def poll(self) -> None:
        """Look at the clock and at the sensors; heat is told at once."""
        self._clock_watch.look()
        if self._heat_descriptor is None:
            self._watch_heat(asyncio.get_running_loop())
        await self.sampler.poll()
        self._tell_heat()

    def _watch_heat(self, loop: asyncio.AbstractEventLoop) -> None:
        """A change of the thermal pressure level is seen when it happens, not at the next look."""
        self._heat_descriptor = self.sensors.thermal.descriptor()
        if self._heat_descriptor is not None:
            loop.add_reader(self._heat_descriptor, self._heat_changed)

    def _unwatch_heat(self) -> None:
        if self._heat_descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._heat_descriptor)

    def _heat_changed(self) -> None:
        self.sensors.thermal.posted()
        self._tell_heat()

    def _tell_heat(self) -> None:
        now_s, now_ms = time.monotonic(), _wall_ms()
        for event in self.sensors.thermal.take():
            self._emit(as_record(event, now_s, now_ms))

    async def push(self) -> int:
        """Send what waits in the spool; one at a time, and once begun it is finished whoever still waits for it."""
        task = asyncio.create_task(self._push())
        self._pushes.add(task)
        task.add_done_callback(self._pushes.discard)
        return await asyncio.shield(task)

    async def _push(self) -> int:
        async with self._pushing:
            return await asyncio.to_thread(self.pusher.drain)

    @property
    def pushing(self) -> bool:
        """Whether a push still runs, for example against a store that does not answer."""
        return bool(self._pushes)

    async def seal(self) -> dict[str, Any]:
        """Close the window now and push."""
        await self.sampler.tick()
        sent = await self.push()
        return {"epoch": self.spool.epoch, "seq": self.spool.next_seq() - 1, "sent": sent}

    async def _engine_windows(self) -> list[EngineWindow]:
        windows = await self.pool.inventory.windows()
        self.metrics.closed(windows)
        return windows

    def beat(self) -> Beat:
        """What this node says of itself to its peers."""
        here = self.dispatch.here()
        tables = self.pool.prefixes()
        return Beat(
            node=here.node,
            rack=self.config.node.rack,
            epoch=self.spool.epoch,
            draining=here.draining,
            models=tuple(
                msgspec.structs.replace(model, prefixes=tables[model.name].digest()) if model.name in tables else model
                for model in here.models
            ),
            heat=here.heat,
            memory=here.memory,
            t_ms=_wall_ms(),
        )

    def _meet(self, peers: Sequence[tuple[str, str]]) -> None:
        """From now on these are the other nodes. Without a secret there are none: nobody could prove to be one."""
        if self.config.peers.secret:
            for gone in self.table.become(peers, time.monotonic()):
                self.peer_client.drop(gone)
        elif peers:
            log.warning("peers_without_secret", reason="the desired state names peers, and there is no peers.secret")

    def _heat(self) -> int:
        """The thermal pressure level now; 0 where the system has none."""
        return self.sensors.thermal.level or 0

    def status(self) -> dict[str, Any]:
        """What an operator wants to see at once."""
        now = time.monotonic()
        sample = self.sampler.last_sample
        return {
            "node": self.config.node.id,
            "rack": self.config.node.rack,
            "version": __version__,
            "epoch": self.spool.epoch,
            "windows_closed": self.spool.next_seq() - 1,
            "uptime_s": int(time.time()) - self._started_s,
            "draining": self.dispatch.draining,
            "in_flight": self.dispatch.in_flight,
            "budget_bytes": self.pool.room.budget_bytes,
            "budget_from": self._budget_from,
            "models": self.pool.inventory.status(),
            "memory": self.pool.pressure,
            "desired": msgspec.to_builtins(self.follower.observed()),
            **self._trouble(now),
            "push": self._pushed(),
            "meters": self.meters.status(),
            "sources_failed": dict(sample.sources_failed) if sample else {},
        }

    def _pushed(self) -> dict[str, Any]:
        return {
            "state": self.pusher.state.state,
            "reason": self.pusher.state.reason,
            "waiting_batches": self.spool.count,
            "held_windows": self.sampler.held_windows,
            "disk_problem": self.sampler.disk_problem,
            "sent_batches": self.pusher.state.sent_batches,
            "dropped_batches": self.spool.dropped + self.sampler.lost_windows,
        }

    def rack(self) -> dict[str, Any]:
        """The rack as this node sees it: nodes with their load and speed, breakers, retries, swaps."""
        now, here = time.monotonic(), self.dispatch.here()
        return {
            "node": here.node,
            "draining": here.draining,
            "models": [_offered(model) for model in here.models],
            **self._trouble(now),
            "tasks": len(asyncio.all_tasks()),
            "last_requests": [trail.request_id for trail in self.dispatch.decisions.last(20)],
        }

    def _trouble(self, now: float) -> dict[str, Any]:
        """Where to look first when something is wrong."""
        return {
            "peers": self._peers(now),
            "breakers": self.dispatch.trust.view(now),
            "retries_left": self.dispatch.budget.left(),
            "retries_refused": self.dispatch.budget.refused,
            "swaps": self.pool.orders.swaps()[-5:],
        }

    def _peers(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "node": p.node,
                "url": p.url,
                "state": p.state,
                "problem": self.prober.problems.get(p.node, ""),
                "draining": p.draining,
                "hop_ms": round(p.hop_s * 1000, 1),
                "heat": LEVELS[min(p.heat, len(LEVELS) - 1)],
                "memory": p.memory,
                "models": sorted(m.name for m in p.models if m.ready),
                "offers": [_offered(m) for m in p.models],
            }
            for p in self.table.view(now)
        ]

    def _budget(self) -> tuple[int, str]:
        default = default_budget_bytes(psutil.virtual_memory().total)
        return gpu.budget_bytes(self.config.memory.budget_bytes, self._device, default)

    async def _ask_gpu(self) -> None:
        """What the GPU recommends, where a model is served that needs it and nothing else is configured."""
        if self.config.memory.budget_bytes or all(model.engine == "fake" for model in self.config.models):
            return
        self._device = await gpu.ask(self._environ)
        budget, self._budget_from = self._budget()
        self.pool.room.budget_bytes = self.sampler.budget_bytes = budget
        log.info("memory_budget", bytes=budget, source=self._budget_from, reason=self._device.reason)

    async def _listen(self, runner: web.AppRunner) -> int:
        host, port = self.config.listen.host, self.config.listen.port
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            why = "another program uses it" if in_use else (error.strerror or type(error).__name__)
            raise Halt(
                f"listen on {host}:{port}: {why}; stop that program or choose another listen.port", code="port_in_use"
            ) from None
        server: Any = site._server
        return int(server.sockets[0].getsockname()[1])

    async def _wind_down(self) -> None:
        """No new work, then what is in flight, then the loaders, then the last window and the last push."""
        self.dispatch.draining = True
        self.follower.stop()
        drain_s = self.config.limits.drain_s
        log.info("agent_stopping", in_flight=self.dispatch.in_flight)
        deadline = time.monotonic() + drain_s
        while self._busy() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self.pool.stop(max(0.0, deadline - time.monotonic()))
        self.sampler.emit(AgentStopped(t_ms=_wall_ms(), reason="told to stop"))
        try:
            await self.sampler.tick()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_PUSH_S):
                    await self.push()
        finally:
            self.pusher.stop()
            self.spool.close(clean=True)
        log.info("agent_stopped", waiting_batches=self.pusher.state.waiting_batches)

    def _busy(self) -> bool:
        return self.dispatch.in_flight > 0 or any(m.in_flight for m in self.pool.views())

    def _on_report(self, model: str, reported: Reported) -> None:
        self.metrics.engine(model, reported)
        self.pool.inventory.reported_peak(model, reported.peak_bytes)

    def _emit(self, event: Event) -> None:
        self.sampler.emit(event)
        self.metrics.event(event)
        if isinstance(event, URGENT):
            task = asyncio.get_running_loop().create_task(self._send_urgent(event))
            self._urgent_tasks.add(task)
            task.add_done_callback(self._urgent_tasks.discard)

    async def _send_urgent(self, event: Event) -> None:
        async with self._telling:
            await asyncio.to_thread(self.pusher.urgent, (event,), self.sampler.urgent_batch)

    def _carried_by_peer(self, name: str) -> bool:
        view = self.table.view(time.monotonic())
        return any(p.state == "up" and any(m.name == name and m.ready for m in p.models) for p in view)

    def _previous(self) -> str:
        if self.spool.first_run:
            return "first"
        return "clean" if self.spool.previous_clean else "unclean"


def admin_token(state: Path) -> str:
    """The token of the local admin API, made at the first start, readable by the agent's user alone."""
    path = state / "admin.token"
    with contextlib.suppress(FileNotFoundError):
        token = path.read_text(encoding="ascii").strip()
        if token:
            return token
    token = secrets.token_hex(32)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return token


def _spare_the_collector() -> None:
    """What a start has made stays; cycles are few and can wait. At its defaults the collector took an eighth of the
    time of a busy door."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _offered(model: ModelView) -> dict[str, Any]:
    """A model of a node for people; of its prompts' hashes only how many there are."""
    fields = msgspec.structs.asdict(model)
    return {**fields, "prefixes": len(model.prefixes) // 8}


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
