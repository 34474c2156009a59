"""The audit of one node: its log, what of it is shipped and pruned, and the events that say when it fails."""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.audit import disk
from agent.audit.entry import Gap, Named
from agent.audit.log import AuditLog
from agent.audit.shipping import Shipper, to_prune
from agent.config import Live
from shared.records import AuditFailing, AuditRecovered, Event
from shared.store import ObjectStore

FOLDER = "audit"
"""In the state folder."""
TOLD_EVERY_S = 600.0
CLOSE_S = 10.0


class Audit:
    """``known`` tells, by what a name is of, whether it is one of this rack's; what nothing vouches for is not
    recorded. ``log`` is written for each request."""

    def __init__(
        self,
        live: Live,
        state: Path,
        open_store: Callable[[], ObjectStore],
        emit: Callable[[Event], None],
        known: Mapping[Named, Callable[[str], bool]],
    ) -> None:
        config = live.now
        self._live, self._emit, self._folder = live, emit, state / FOLDER
        self.log = AuditLog(
            self._folder,
            node=config.node.id,
            known=lambda of, name: of in known and known[of](name),
            enabled=config.audit.enabled,
        )
        self._shipper = Shipper(self._folder, config.node.id, open_store)
        self._keeping, self._kept = asyncio.Lock(), set[asyncio.Task[None]]()
        self._told_s: float | None = None
        self._next_s = 0.0

    async def tick(self) -> None:
        """Once a second: recover, tell, close an old file; ship and prune at the pace of uploads."""
        self._tell(None)
        self._tell(await self.log.tick())
        if not self.log.enabled:
            return
        self.log.rotate(self._live.now.audit.segment_s)
        if (now_s := time.monotonic()) >= self._next_s and not self._keeping.locked():
            self._next_s = now_s + self._live.now.telemetry.upload_s
            self._begin(force=False)

    async def seal(self) -> dict[str, Any]:
        """Close the file that is written to, and ship what is closed."""
        if self.log.enabled:
            self.log.rotate()
            await self.log.durable()
            await asyncio.shield(self._begin(force=True))
        return self.status()

    def status(self) -> dict[str, Any]:
        """For display: the log, and what of it is in the bucket."""
        shipper = self._shipper
        shipping = {"seq": shipper.shipped.seq, "t_ms": shipper.shipped.t_ms, "waiting_files": shipper.waiting}
        return {**self.log.status(), "shipped": {**shipping, "problem": shipper.problem}}

    def warnings(self) -> list[str]:
        """Sentences for an operator."""
        why = "SENSITIVE requests are refused, and none leaves the premises"
        failing = "" if self.log.ok else f"the audit log cannot be written ({self.log.problem}): {why}"
        return [one for one in (failing, self._shipper.finding) if one]

    @property
    def hangs(self) -> bool:
        """Whether a thread waits for the disk or the store."""
        return self.log.hangs or bool(self._kept)

    async def close(self) -> None:
        """Sync what was written."""
        self._shipper.stopping = True
        await self.log.close()

    def _begin(self, *, force: bool) -> asyncio.Task[None]:
        """Ship and prune, to the end once begun."""
        task = asyncio.get_running_loop().create_task(self._keep(force=force))
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        return task

    async def _keep(self, *, force: bool) -> None:
        async with self._keeping:
            found = await asyncio.to_thread(disk.segments, self._folder)
            await asyncio.to_thread(self._shipper.drain, found, force=force)
            await self._prune(found)

    async def _prune(self, found: list[disk.Segment]) -> None:
        keep, shipped = self._live.now.audit, self._shipper.shipped.seq
        now_ms = time.time_ns() // 1_000_000
        count = to_prune(found, now_ms, keep_days=keep.keep_days, keep_bytes=keep.keep_bytes, shipped_seq=shipped)
        if count:
            await self.log.prune(found[count].first - 1, [one.path for one in found[:count]])

    def _tell(self, gap: Gap | None) -> None:
        now_ms, now_s = time.time_ns() // 1_000_000, time.monotonic()
        if gap is not None:
            self._told_s = None
            self._emit(AuditRecovered(t_ms=now_ms, why=gap.why, since_ms=gap.since_ms, lost=gap.lost))
        trouble = self.log.trouble
        if trouble is not None and (self._told_s is None or now_s >= self._told_s + TOLD_EVERY_S):
            self._told_s = now_s
            lost = self.log.lost
            self._emit(AuditFailing(t_ms=now_ms, why=trouble.why, since_ms=trouble.since_ms, lost=lost))
