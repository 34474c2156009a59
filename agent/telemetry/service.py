"""The telemetry of one node: sensors, meters, windows, spool and uploads."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.config import AgentConfig
from agent.telemetry.heat_watch import HeatWatch
from agent.telemetry.ledger import Answered, Ledger
from agent.telemetry.meters.rack import RackMeters
from agent.telemetry.outbox import Outbox
from agent.telemetry.pusher import Pusher
from agent.telemetry.sampler import Sampler, Sources
from agent.telemetry.sensing import Sensing
from agent.telemetry.sensors import Sensors
from agent.telemetry.sensors.host import boot_id, hardware, hardware_id
from agent.telemetry.spool import Spool
from shared import __version__
from shared.errors import RackError
from shared.logs import get_logger
from shared.records import AgentStarted, Event
from shared.store_open import open_store

DAY_S = 86_400.0

log = get_logger("agent.telemetry")


class Telemetry:
    """``sources`` provides records of models; ``on_event`` and ``on_answered`` feed live metrics. Raises Halt when
    another agent uses the spool or it belongs to another node."""

    def __init__(
        self,
        config: AgentConfig,
        state: Path,
        environ: Mapping[str, str],
        sources: Sources,
        *,
        budget_bytes: int,
        on_event: Callable[[Event], None],
        on_answered: Callable[[Answered], None],
    ) -> None:
        settings = config.telemetry
        self._sensors = Sensors(state.absolute())
        self.meters = RackMeters(config.meters, environ)
        self.spool = Spool(
            state / "spool",
            node=config.node.id,
            rack=config.node.rack,
            hardware=hardware_id(),
            max_bytes=settings.spool_bytes,
            max_batches=max(1, int(settings.spool_days * DAY_S / settings.sample_s)),
        )
        self.ledger, self.machine = Ledger(on_answered), hardware()
        self.pusher = Pusher(self.spool, lambda: open_store(config.store, environ, attempts=1))
        self.sensing = Sensing(self._sensors.all, budget_bytes=budget_bytes, problems=lambda: self.meters.problems)
        self.sampler = Sampler(
            *(self.spool, self.ledger, self.sensing, sources._replace(metered=self.meters.drain)),
            boot_id=boot_id(),
            daily=(self.machine,),
            clock_skew_ms=lambda: self.pusher.clock_skew_ms,
        )
        self.outbox = Outbox(self.sampler, self.spool, self.pusher, on_event)
        self.heat = HeatWatch(self._sensors.thermal, self.outbox.emit)

    @property
    def hangs(self) -> bool:
        """Whether a thread waits for an unresponsive store or sensor, and would delay the exit."""
        return self.outbox.pushing or self.sensing.hangs

    async def poll(self) -> None:
        """Measure what changes from second to second."""
        self.heat.watch()
        await self.sensing.poll()
        self.heat.emit_changes()

    def serves(self) -> AgentStarted:
        """The agent serves from now on: the event that says so."""
        try:
            self.spool.serves()
        except RackError as error:
            # the node serves all the same; at worst the next start asks about the run before this one
            log.error("spool_failed", code=error.code, reason=error.message)
        return AgentStarted(t_ms=time.time_ns() // 1_000_000, version=__version__, previous=self.spool.previous)

    async def close(self) -> None:
        """Release sensors and meters."""
        self.heat.close()
        self._sensors.close()
        await self.meters.close()
