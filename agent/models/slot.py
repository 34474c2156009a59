"""One served model on this node: names, files, loader and life. Only ``Lifecycles`` changes the last two."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
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
    """A loader and the files that it serves."""

    name: str
    spec: ModelSpec
    process: LoaderProcess
    since_s: float
    load_s: float = 0.0


class Slot:
    """One served model under one or more names."""

    def __init__(self, model: Model) -> None:
        self.names, self.model = [model.name], model
        self.spec: ModelSpec | None = None
        self.loaded: Loaded | None = None
        self.life = Life()
        self.demand = Demand()
        self.waiting: list[float] = []
        self.peak_bytes = 0
        self.keep_alive_s, self.pinned = model.keep_alive_s, model.pinned
        self.changed = asyncio.Event()

    @property
    def name(self) -> str:
        """Its configured name, or the first one that it took over."""
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
        """Planned bytes of what is resident or loading."""
        held = self.spec.need_bytes if self.spec and (self.loaded or self.life.state in ("starting", "draining")) else 0
        return held + self.life.standby_bytes

    @property
    def planned_bytes(self) -> int:
        """Memory that it will need, as far as known before its files are read."""
        return self.spec.need_bytes if self.spec else self.model.need_bytes

    def occupant(self, now_s: float, min_residency_s: float) -> Occupant:
        """As eviction sees it. A slot that is being changed counts as pinned."""
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
        """How long it has been unused; None while it is leased, waited for, pinned or not resident."""
        if self.loaded is None or self.pinned or self.leases or self.waiting:
            return None
        return now_s - max(self.loaded.since_s, self.demand.last_s or 0.0)

    def notify(self) -> None:
        """Wake all tasks that wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


class Slots:
    """All served models of this node. What is leaving has no name any more, and holds memory until it is gone."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._slots = [Slot(model) for model in models]
        self._leaving: list[Slot] = []

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._slots))

    def __contains__(self, slot: object) -> bool:
        return slot in self._slots

    def find(self, name: str) -> Slot | None:
        """The slot with a name."""
        return next((slot for slot in self._slots if name in slot.names), None)

    def named(self, name: str) -> Slot:
        """The slot with a name. Raises Refused when this node does not serve it."""
        if (slot := self.find(name)) is None:
            known = ", ".join(sorted(n for slot in self._slots for n in slot.names)) or "none"
            raise Refused(f"model {name}: not configured on this node; known: {known}", code="model_not_found")
        return slot

    def add(self, model: Model) -> None:
        """Serve one more model."""
        self._slots.append(Slot(model))

    def give_back(self, slot: Slot, configured: Mapping[str, Model]) -> None:
        """Leave a slot its own name; the names that it had taken over are served as configured again, from cold."""
        for name in slot.names[1:]:
            slot.names.remove(name)
            if name in configured:
                self.add(configured[name])

    def leave(self, slot: Slot) -> None:
        """Serve a slot's names no more."""
        if slot in self._slots:
            self._slots.remove(slot)
            self._leaving.append(slot)
            slot.notify()

    def gone(self, slot: Slot) -> None:
        """A slot that was leaving holds no memory any more."""
        self._leaving.remove(slot)

    def rename(self, slot: Slot, name: str) -> None:
        """Give a name to a slot and take it from the others; a slot without a name is removed."""
        for other in self:
            if other is not slot and name in other.names:
                other.names.remove(name)
                if not other.names:
                    self._slots.remove(other)
        if name not in slot.names:
            slot.names.append(name)

    def occupants(self, now_s: float, min_residency_s: float, excluding: Slot | None = None) -> list[Occupant]:
        """Everything that holds memory, as eviction sees it."""
        held = [one for one in (*self._slots, *self._leaving) if one.occupied_bytes and one is not excluding]
        return [one.occupant(now_s, min_residency_s) for one in held]


class Lease:
    """The right to use one loader for one request, until the end of the context, which calls ``ended``."""

    def __init__(self, loaded: Loaded, ended: Callable[[], None]) -> None:
        self.spec, self.process, self.version = loaded.spec, loaded.process, loaded.spec.version
        self._ended = ended
        # counted before the first await: eviction and drain see it at once
        self.process.in_flight += 1

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.in_flight -= 1
        self._ended()

    def generate(self, request: Ask, text: Text | None = None) -> AsyncGenerator[Answer, None]:
        """Answers to the request; see LoaderProcess.generate."""
        return self.process.generate(request, text)
