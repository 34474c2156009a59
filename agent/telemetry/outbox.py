"""What this node uploads to the bucket: windows in order, and copies of urgent events at once."""

import asyncio
from collections.abc import Callable
from typing import Any

from agent.tasks import Tasks
from agent.telemetry.pusher import Pusher
from agent.telemetry.sampler import Sampler
from agent.telemetry.spool import Spool
from shared.records import URGENT, Event


class Outbox:
    """``on_event`` receives each event too, for live metrics."""

    def __init__(self, sampler: Sampler, spool: Spool, pusher: Pusher, on_event: Callable[[Event], None]) -> None:
        self._sampler, self._spool, self._pusher, self._on_event = sampler, spool, pusher, on_event
        self._tasks, self._urgent = Tasks(), Tasks()
        self._pushing, self._sending = asyncio.Lock(), asyncio.Lock()

    @property
    def pushing(self) -> bool:
        """Whether a push still runs, for example against an unresponsive store."""
        return len(self._tasks) + len(self._urgent) > 0

    def emit(self, event: Event) -> None:
        """An event for the next batch, and for the bucket at once if it is urgent."""
        self._sampler.emit(event)
        self._on_event(event)
        if isinstance(event, URGENT):
            self._urgent.spawn(self._send_urgent(event))

    async def push(self) -> int:
        """Upload the spool; one push at a time, completed once begun. Returns the number of batches sent."""
        return await self._tasks.finish(self._push())

    async def seal(self) -> dict[str, Any]:
        """Close the window now and push."""
        await self._sampler.tick()
        sent = await self.push()
        return {"epoch": self._spool.epoch, "seq": self._spool.next_seq() - 1, "sent": sent}

    def status(self) -> dict[str, Any]:
        """For display."""
        state = self._pusher.state
        return {
            "state": state.state,
            "reason": state.reason,
            "since_ms": state.since_ms,
            "waiting_batches": self._spool.count,
            "held_windows": self._sampler.held_windows,
            "disk_problem": self._sampler.disk_problem,
            "sent_batches": state.sent_batches,
            "dropped_batches": self._spool.dropped + self._sampler.lost_windows,
        }

    async def _push(self) -> int:
        async with self._pushing:
            sent = await asyncio.to_thread(self._pusher.drain)
        if (clash := self._pusher.claims.news()) is not None:
            self.emit(clash)
        return sent

    async def _send_urgent(self, event: Event) -> None:
        async with self._sending:
            await asyncio.to_thread(self._pusher.urgent, (event,), self._sampler.urgent_batch)
