"""The loader processes of this node from start to end, and the counts of what they did.

Before a loader ends, for whatever reason, its last counts are collected if that is possible.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from agent.config import Live
from agent.files.modelstore import ModelSpec
from agent.models.slot import Loaded
from agent.process.footprint import footprint_bytes
from agent.process.loader_process import LoaderProcess, LoaderSpec, total_of
from agent.wire.frames import Reported
from shared.errors import RackError
from shared.logs import get_logger
from shared.records import EngineWindow
from shared.secrets import strong

STOP_GRACE_S = 10.0
CUT_OFF_S = 0.5
"""Requests that a loader's end interrupted ask for its version again within this time."""
MARGIN_S = 5.0
"""How much longer than the requests' own deadline a drain waits, so that their ends are counted."""
MAX_STARTS = 2

log = get_logger("agent.models.loaders")


class Loaders:
    """Starts and ends loaders. Those ``retiring`` accept no new work and finish what they have; ``missed`` counts, by
    version, interrupted answers that only this version can continue."""

    def __init__(
        self,
        live: Live,
        environ: Mapping[str, str],
        *,
        prompts: Path,
        on_report: Callable[[str, Reported], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._environ, self._prompts = live, environ, prompts
        self._on_report, self._clock = on_report, clock
        self._reports: dict[tuple[str, str], Reported] = {}
        self.retiring: list[Loaded] = []
        self.missed: Counter[str] = Counter()
        self.before_change: Callable[[], None] = lambda: None
        """Called before a loader is started or ended."""

    async def start(self, spec: ModelSpec) -> LoaderProcess:
        """Start a loader; returns with its model in memory and warmed up. Raises RackError with the reason."""
        self.before_change()
        model = spec.model
        arguments = (
            *("--engine", model.engine, "--path", spec.path, "--rows", str(model.rows)),
            *("--prefill-chunk", str(model.prefill_chunk_tok), "--cache-bytes", str(model.cache_bytes)),
            *("--kv-tok", str(model.rows * model.plan_context_tok), "--stall-s", str(model.stall_s)),
            *("--reuse-bytes", str(spec.plan.reuse_bytes)),
            *("--disk-cache", str(self._prompts / model.name), "--fingerprint", spec.version),
            *("--disk-cache-bytes", str(model.disk_cache_bytes), "--max-tokens", str(model.max_tokens)),
            *("--fake-step-s", str(model.fake_step_s), "--fake-load-s", str(model.fake_load_s)),
            *("--fake-row-s", str(model.fake_row_s), "--fake-prefill-tps", str(model.fake_prefill_tps)),
            *("--fake-cache-tok", str(model.fake_cache_tok), "--fake-held-bytes", str(model.fake_held_bytes)),
        )
        secret = ""
        if model.disk_cache_bytes:  # a keychain may respond slowly
            reference = self._live.now.disk_cache.secret
            secret = await asyncio.to_thread(strong, reference, "disk_cache.secret", self._environ)
        start = LoaderSpec(
            arguments=arguments,
            threads=self._threads(),
            rows=model.rows,
            keeps_prompts=bool(model.fake_cache_tok if model.engine == "fake" else model.cache_bytes),
            stuck_s=lambda: self._live.now.limits.stuck_s,
            secret=secret,
        )
        return await LoaderProcess.start(start, self._environ)

    def _threads(self) -> int:
        """Of a loader that is started now."""
        config = self._live.now
        return config.loader.threads or max(1, (os.cpu_count() or 1) // max(1, len(config.models)))

    async def retire(self, loaded: Loaded, drain_s: float) -> int:
        """Wait for the last request, collect the last counts, end the process. Returns the bytes it held until then. If
        this is cancelled, the pool's ``stop`` ends it."""
        self.before_change()
        if loaded not in self.retiring:
            self.retiring.append(loaded)
        loaded = await self.drain(loaded, drain_s)
        loaded.process.stopping = True
        held = footprint_bytes(loaded.process.pid) or 0
        await self.take_window(loaded)
        await loaded.process.stop(STOP_GRACE_S)
        if loaded in self.retiring:
            self.retiring.remove(loaded)
        return held

    async def drain(self, loaded: Loaded, limit_s: float) -> Loaded:
        """Wait until its requests have ended. One that dies meanwhile is restarted for answers that only it can
        continue. Returns the loader at the end."""
        deadline, starts = self._clock() + limit_s, 0
        while self._clock() < deadline and not loaded.process.stopping:
            version = loaded.spec.version
            if loaded.process.ended.is_set():
                await asyncio.sleep(CUT_OFF_S)
                if not self.missed[version] or starts >= MAX_STARTS:
                    break
                starts += 1
                loaded = await self._restart(loaded)
            elif not loaded.process.in_flight and not self.missed[version]:
                break
            else:
                await asyncio.sleep(0.02)
        return loaded

    async def _restart(self, loaded: Loaded) -> Loaded:
        log.warning("draining_loader_died", model=loaded.name, version=loaded.spec.version, cause=loaded.process.cause)
        await self.take_window(loaded)
        try:
            fresh = loaded._replace(process=await self.start(loaded.spec))
        except RackError as error:
            log.error("draining_loader_restart_failed", model=loaded.name, reason=error.message)
            return loaded
        if loaded in self.retiring:
            self.retiring[self.retiring.index(loaded)] = fresh
        return fresh

    async def take_window(self, loaded: Loaded) -> None:
        """Ask a loader for its counts since its last report."""
        if (reported := await loaded.process.report()) is None:
            return
        self._on_report(loaded.name, reported)
        key = (loaded.name, loaded.spec.version)
        known = [self._reports[key]] if key in self._reports else []
        self._reports[key] = total_of([*known, reported])

    def so_far(self) -> list[EngineWindow]:
        """Counts since the last window, including loaders that ended meanwhile."""
        return [EngineWindow(*loaded, **msgspec.structs.asdict(reported)) for loaded, reported in self._reports.items()]

    def windows(self) -> list[EngineWindow]:
        """The same, and begin a new window."""
        taken, self._reports = self.so_far(), {}
        return taken
