"""What tokens of the rack cost, from the bucket: the aggregator writes it with the week's report. The last good one is
kept, in memory and in the state folder, so that budgets of money hold where the bucket cannot be asked."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from agent.config import Live
from agent.policy.rates import Rate
from agent.tasks import Tasks
from shared import rates
from shared.durable import write_whole
from shared.errors import NotFound, RackError, Refused
from shared.keys import RATES
from shared.logs import get_logger
from shared.rates import MOST_BYTES
from shared.store import ObjectStore

EVERY_S = 600.0
"""How often the bucket is asked; what it says changes once a week."""

log = get_logger("agent.control.rates")


class Rates:
    """``open_store`` gives the bucket, or raises; ``memory`` is the file of the last good object. ``tick`` belongs into
    a job that runs more often than ``EVERY_S``."""

    def __init__(
        self,
        live: Live,
        open_store: Callable[[], ObjectStore],
        memory: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._open_store, self._memory, self._clock = live, open_store, memory, clock
        self._found: rates.Rates | None = None
        self._by_model: dict[str, Rate] = {}
        self._next_s, self._reason = 0.0, ""
        self._store: ObjectStore | None = None
        self._asking = Tasks()
        self._remembered = False

    def of(self, model: str) -> Rate | None:
        """What a served name's tokens cost; None where no report has said it, and before the first ``tick``."""
        return self._by_model.get(model)

    @property
    def period(self) -> str:
        """The week that they come from; "" before the first."""
        return self._found.period if self._found is not None else ""

    async def tick(self) -> None:
        """Ask the bucket, if it is time. Never raises: what cannot be read leaves what is known."""
        if self._clock() < self._next_s:
            return
        self._next_s = self._clock() + EVERY_S
        try:
            await self._asking.finish(asyncio.to_thread(self._look))
            self._reason = ""
        except RackError as error:
            self._store = None  # credentials may have changed
            if error.message != self._reason:
                log.warning("rates_unknown", reason=error.message, kept=self.period)
            self._reason = error.message

    def _look(self) -> None:
        self._remember()
        if self._store is None:
            self._store = self._open_store()
        try:
            body = self._store.get(RATES, MOST_BYTES).body
        except NotFound:
            return  # no week has been reported
        found = rates.parse(body)
        if found == self._found:
            return
        self._take(found)
        log.info("rates_adopted", period=found.period, models=len(found.models))
        try:
            write_whole(self._memory, body)
        except OSError as error:
            log.warning("rates_not_kept", reason=error.strerror or type(error).__name__)

    def _remember(self) -> None:
        """What an earlier run of the agent knew."""
        if not self._remembered:
            self._remembered = True
            with contextlib.suppress(OSError, RackError):
                if self._memory.stat().st_size <= MOST_BYTES:
                    self._take(rates.parse(self._memory.read_bytes()))

    def _take(self, found: rates.Rates) -> None:
        """Raises Refused for those of another rack."""
        if found.rack != (mine := self._live.now.node.rack):
            raise Refused(f"rates: those of rack {found.rack!r}, and this node is of rack {mine!r}", code="bad_rates")
        self._by_model = {
            name: Rate(
                usd_per_mtok_in=one.usd_per_mtok_in,
                usd_per_mtok_out=one.usd_per_mtok_out,
                usd_per_mtok_cached=one.usd_per_mtok_cached,
            )
            for name, one in found.models.items()
        }
        self._found = found
