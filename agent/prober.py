"""Asks every peer how it is, once a beat, and tells the PeerTable; its changes become events."""

import asyncio
import time
from collections.abc import Callable

from agent.peer_client import PeerClient
from agent.peers import PeerTable
from shared.errors import RackError
from shared.logs import get_logger
from shared.records import Event, PeerDown, PeerUp

SKEW_WARNING_MS = 2_000

log = get_logger("agent.prober")


class Prober:
    """``emit`` takes PeerDown and PeerUp."""

    def __init__(
        self,
        table: PeerTable,
        client: PeerClient,
        emit: Callable[[Event], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._table = table
        self._client = client
        self._emit = emit
        self._clock = clock
        self._wall_ms = wall_ms
        self.problems: dict[str, str] = {}

    async def tick(self) -> None:
        """One round of beats, all peers at the same time."""
        await asyncio.gather(*(self._ask(node, url) for node, url in self._table.urls()))
        now = self._clock()
        for change in self._table.changes(now):
            t_ms, for_ms = self._wall_ms(), int(change.for_s * 1000)
            if change.up:
                self._emit(PeerUp(t_ms=t_ms, peer=change.node, down_us=for_ms * 1000))
                log.info("peer_up", peer=change.node, down_s=round(change.for_s, 1))
            else:
                self._emit(PeerDown(t_ms=t_ms, peer=change.node, last_seen_ms=t_ms - for_ms))
                log.warning("peer_down", peer=change.node, silent_s=round(change.for_s, 1))

    async def _ask(self, node: str, url: str) -> None:
        try:
            beat = await self._client.beat(url)
        except RackError as error:
            self._note(node, error.message)
            return
        if beat.node != node:
            self._note(node, f"peer {url}: says it is {beat.node!r}, and the configuration calls it {node!r}")
            return
        skew_ms = beat.t_ms - self._wall_ms()
        late = f"peer {url}: its clock differs by {skew_ms / 1000:.1f} s" if abs(skew_ms) > SKEW_WARNING_MS else ""
        self._note(node, late)
        self._table.heard(node, beat, self._clock())

    def _note(self, node: str, problem: str) -> None:
        if problem and self.problems.get(node) != problem:
            log.info("peer_problem", peer=node, reason=problem)
        if problem:
            self.problems[node] = problem
        else:
            self.problems.pop(node, None)
