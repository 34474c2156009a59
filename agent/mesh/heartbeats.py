"""Sends a heartbeat to every peer each interval and updates the PeerTable; its changes become events.

Each heartbeat is a task of its own, so that a peer that does not answer delays no other. Models run in other
processes, so nothing here waits for them.
"""

import asyncio
import re
import time
from collections.abc import Callable

from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import Heartbeat, PeerTable, of_another_rack, skewed
from agent.mesh.sightings import Sightings, sentence
from agent.policy.limits.share import Share
from shared.clocks import SleepWatch
from shared.errors import RackError
from shared.logs import get_logger
from shared.records import Event, NodeIdClash, PeerDown, PeerUp

TICKS_PER_BEAT = 4
_NUMBER = re.compile(r"[\d.]+ s\b")
_MOST_OPEN = 2
"""Heartbeats to one peer that may be in flight at the same time."""

log = get_logger("agent.mesh.heartbeats")


class Heartbeats:
    """``emit`` receives PeerDown and PeerUp; ``on_back`` is called for a peer that came back or restarted, and
    ``on_heard`` (settable) with every heartbeat, ``on_shares`` with what each tells of the rack's limits."""

    def __init__(
        self,
        table: PeerTable,
        client: PeerClient,
        emit: Callable[[Event], None],
        *,
        rack: str,
        beat_s: float,
        sightings: Sightings | None = None,
        on_back: Callable[[str], None] = lambda _: None,
        on_shares: Callable[[str, tuple[Share, ...]], None] = lambda _, __: None,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        slept: Callable[[], float] | None = None,
    ) -> None:
        self._slept = slept or SleepWatch().look
        self._table, self._client, self._emit, self._rack = table, client, emit, rack
        self._beat_s, self._on_back, self._clock, self._wall_ms = beat_s, on_back, clock, wall_ms
        self.sightings = sightings or Sightings("", "")
        self._on_shares = on_shares
        self._due: dict[str, float] = {}
        self._open: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._woke = 0
        self.on_heard: Callable[[str, Heartbeat], None] = lambda _node, _heartbeat: None
        self.problems: dict[str, str] = {}

    @property
    def every_s(self) -> float:
        """How often to call ``tick``, in seconds."""
        return self._beat_s / TICKS_PER_BEAT

    async def tick(self) -> None:
        """Send the heartbeats that are due, and report what has changed."""
        now = self._clock()
        late_s, slept_s = self._table.tick(now, self.every_s), self._slept()
        if late_s or slept_s:
            self._woke += 1
            self._due.clear()
        if slept_s:
            log.warning("sleep_detected", seconds=round(slept_s, 2))
        elif late_s:
            log.info("heartbeats_late", seconds=round(late_s, 2), reason="this machine is busy")
        for node, url in self._table.urls():
            if now >= self._due.get(node, 0.0) and self._open.get(node, 0) < _MOST_OPEN:
                # a little early rather than a tick late
                self._due[node] = now + self._beat_s - self.every_s / 2
                self._spawn(node, url)
        self._report(now)
        for found in self.sightings.news(now):
            self._emit(NodeIdClash(t_ms=self._wall_ms(), peer=found.node, one=found.one, other=found.other))
            log.warning("node_id_clash", reason=sentence(found, self.sightings.me))

    async def close(self) -> None:
        """Cancel all heartbeats in flight."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _report(self, now: float) -> None:
        for change in self._table.changes(now):
            t_ms, for_ms = self._wall_ms(), int(change.for_s * 1000)
            if change.up:
                self._emit(PeerUp(t_ms=t_ms, peer=change.node, down_us=for_ms * 1000))
                log.info("peer_up", peer=change.node, down_s=round(change.for_s, 1))
            else:
                # requests that wait for it fail over now
                self._client.drop(change.node)
                self._emit(PeerDown(t_ms=t_ms, peer=change.node, last_seen_ms=t_ms - for_ms))
                log.warning("peer_down", peer=change.node, silent_s=round(change.for_s, 1))

    def _spawn(self, node: str, url: str) -> None:
        self._open[node] = self._open.get(node, 0) + 1
        task = asyncio.create_task(self._ask(node, url))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, node: str, url: str) -> None:
        began, woke = self._clock(), self._woke
        try:
            heartbeat = await self._client.heartbeat(node, url, self._beat_s)
            if foreign := of_another_rack(url, heartbeat, self._rack):
                self._note(node, foreign)
                return
        except RackError as error:
            self._note(node, error.message)
            if woke == self._woke and self._clock() - began < 2 * self._beat_s:
                self._table.missed(node, self._clock())
                self._report(self._clock())
            return
        finally:
            self._open[node] -= 1
        now = self._clock()
        self.sightings.saw(node, heartbeat.agent, now)
        self.sightings.heard(node, heartbeat.twice, now)
        self._note(node, skewed(url, heartbeat, self._wall_ms()))
        if self._table.heard(node, heartbeat, now, hop_s=now - began):
            self._on_back(node)
        self.on_heard(node, heartbeat)
        if now - began < 2 * self._beat_s:  # not what was read after this process had been stopped
            self._on_shares(node, heartbeat.shares)
        self._report(now)

    def _note(self, node: str, problem: str) -> None:
        # a clock's difference is another one at every heartbeat
        if problem and _NUMBER.sub("", self.problems.get(node, "")) != _NUMBER.sub("", problem):
            log.warning("peer_problem", peer=node, reason=problem)
        if problem:
            self.problems[node] = problem
        else:
            self.problems.pop(node, None)
