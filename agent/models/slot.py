"""One served model on this node: names, files, loader and life. ``Lifecycles`` alone changes the last two."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import NamedTuple

from agent.config import Model
from agent.files.modelstore import ModelSpec
from agent.models.demand import Demand
from agent.models.eviction import Occupant
from agent.models.lifecycle import Life
from agent.process.loader_process import LoaderProcess
from agent.process.prefixes import Text
from agent.wire.frames import Answer, Ask
from shared.errors import Refused


class Loaded(NamedTuple):
    """What answers: the files and the process that holds them."""

    name: str
    spec: ModelSpec
    process: LoaderProcess
    since_s: float
    load_s: float = 0.0


class Slot:
    """One served model under one or more names."""

    def __init__(self, model: Model) -> None:
        self.names = [model.name]
        self.model = model
        self.spec: ModelSpec | None = None
        self.loaded: Loaded | None = None
        self.life = Life()
        self.demand = Demand()
        self.waiting: list[float] = []
        self.peak_bytes = 0
        self.keep_alive_s = model.keep_alive_s
        self.pinned = model.pinned
        self.changed = asyncio.Event()

    @property
    def name(self) -> str:
        """The name it was configured with, or that it took first."""
        return self.names[0]

    @property
    def ready(self) -> bool:
        """Whether a request may be leased now."""
        loaded, life = self.loaded, self.life
        return loaded is not None and life.in_rotation and not life.closed_for and loaded.process.usable

    @property
    def leases(self) -> int:
        """Requests that use the loader."""
        return self.loaded.process.in_flight if self.loaded else 0

    @property
    def occupied_bytes(self) -> int:
        """Planned bytes of what is in memory or on its way there."""
        held = self.spec.need_bytes if self.spec and (self.loaded or self.life.state in ("starting", "draining")) else 0
        return held + self.life.standby_bytes

    @property
    def planned_bytes(self) -> int:
        """What it will need, as far as that is known before its files were read."""
        return self.spec.need_bytes if self.spec else self.model.need_bytes

    def occupant(self, now_s: float, min_residency_s: float) -> Occupant:
        """As eviction sees it. A slot that is being changed is in use, whatever its leases."""
        loaded = self.loaded
        stays_s = max(self.life.open_until_s, loaded.since_s + max(min_residency_s, loaded.load_s)) if loaded else 0
        return Occupant(
            name=self.name,
            need_bytes=self.occupied_bytes,
            leases=self.leases,
            pinned=self.pinned or bool(self.life.claim) or loaded is None,
            last_used_s=self.demand.last_s or 0.0,
            reload_s=loaded.load_s if loaded else 0.0,
            per_s=self.demand.per_s(now_s),
            stays_until_s=stays_s,
        )

    def idle_s(self, now_s: float) -> float | None:
        """How long nobody has used it; None while it is in use, wanted, pinned or not in memory."""
        if self.loaded is None or self.pinned or self.leases or self.waiting:
            return None
        return now_s - max(self.loaded.since_s, self.demand.last_s or 0.0)

    def notify(self) -> None:
        """Wake everybody who waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


class Slots:
    """All served models of this node."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._slots = [Slot(model) for model in models]

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._slots))

    def __contains__(self, slot: object) -> bool:
        return slot in self._slots

    def find(self, name: str) -> Slot | None:
        """The slot with a name."""
        return next((slot for slot in self._slots if name in slot.names), None)

    def named(self, name: str) -> Slot:
        """The same. Raises Refused when this node does not know the name."""
        slot = self.find(name)
        if slot is None:
            known = ", ".join(sorted(n for slot in self._slots for n in slot.names)) or "none"
            raise Refused(f"model {name}: not configured on this node; known: {known}", code="model_not_found")
        return slot

    def add(self, model: Model) -> None:
        """Serve one more."""
        self._slots.append(Slot(model))

    def rename(self, slot: Slot, name: str) -> None:
        """Give a name to a slot and take it from the others; one that has none left is gone."""
        for other in self:
            if other is not slot and name in other.names:
                other.names.remove(name)
                if not other.names:
                    self._slots.remove(other)
        if name not in slot.names:
            slot.names.append(name)

    def occupants(self, now_s: float, min_residency_s: float, but: Slot | None = None) -> list[Occupant]:
        """Everything that holds memory, as eviction sees it."""
        return [s.occupant(now_s, min_residency_s) for s in self._slots if s.occupied_bytes and s is not but]


class Lease:
    """The right to use one loader for one request."""

    def __init__(self, loaded: Loaded) -> None:
        self.spec = loaded.spec
        self.process = loaded.process
        self.version = loaded.spec.version

    def generate(self, request: Ask, text: Text | None = None) -> AsyncGenerator[Answer, None]:
        """Answers to the request; see LoaderProcess.generate."""
        return self.process.generate(request, text)
