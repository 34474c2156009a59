"""What is in a made node's memory: a model is loaded when it is asked for, and another one leaves only where its room
is needed. Nothing is evicted while memory is free."""

import random
from collections import deque
from collections.abc import Mapping

from shared.records import Event, ModelEvicted, ModelLoaded, ModelMissed, Resident
from tests.made_loader import Loader
from tests.made_machine import HOUR_MS

HOLD_MS = 180_000
"""A model that was loaded stays for this long while it is asked for."""


class _Held:
    """A model's life in memory."""

    def __init__(self) -> None:
        self.ready_ms = self.last_ms = self.gone_ms = -1
        self.load_us = 0
        self.asked: deque[tuple[int, int]] = deque()

    def last_hour(self, now_ms: int) -> int:
        """Requests of the last hour."""
        while self.asked and self.asked[0][0] <= now_ms - HOUR_MS:
            self.asked.popleft()
        return sum(count for _, count in self.asked)


class Memory:
    """A node's models. ``budget_bytes`` bounds the sum of what those in memory need."""

    def __init__(self, budget_bytes: int, dice: random.Random) -> None:
        self._budget, self._dice = budget_bytes, dice
        self._all: dict[str, _Held] = {}
        self._resident: dict[str, Loader] = {}

    @property
    def held_bytes(self) -> int:
        """What the models in memory need."""
        return sum(loader.model.need_bytes for loader in self._resident.values())

    def holds(self, name: str) -> bool:
        """Whether a model is in memory."""
        return name in self._resident

    def admit(self, loader: Loader, at_ms: int) -> None:
        """Put a model into memory at the node's beginning, if there is room."""
        held = self._all.setdefault(loader.name, _Held())
        if self.held_bytes + loader.model.need_bytes <= self._budget:
            self._resident[loader.name] = loader
            held.ready_ms = held.last_ms = at_ms

    def started(self, at_ms: int) -> list[Event]:
        """The agent starts and loads what it had."""
        found: list[Event] = []
        for loader in self._resident.values():
            event = self.loaded(loader, at_ms + 4_000)
            self._all[loader.name].ready_ms = loader.available_ms
            found.append(event)
        return found

    def loaded(self, loader: Loader, at_ms: int) -> ModelLoaded:
        """A model is read from disk from ``at_ms`` on, at 1.5 to 3 GB/s."""
        rate = self._dice.uniform(1.5, 3.0) * 1e9
        load_us = int(loader.model.weights_bytes / rate * 1e6) + 900_000
        loader.available_ms = at_ms + load_us // 1000
        self._all[loader.name].load_us = load_us
        return ModelLoaded(
            t_ms=loader.available_ms,
            model=loader.name,
            version=loader.version,
            load_us=load_us,
            need_bytes=loader.model.need_bytes,
            footprint_bytes=int(loader.model.weights_bytes * 1.04) + 350_000_000,
        )

    def make_room(
        self, loaders: Mapping[str, Loader], wanted: Mapping[str, int], now_ms: int, events: list[Event]
    ) -> None:
        """Load what is asked for and not there; others leave for it."""
        for name, loader in loaders.items():
            if not (wanted[name] or loader.waiting):
                continue
            if name not in self._resident:
                self._load(loader, wanted, now_ms, events)
            if name in self._resident:
                self._all[name].last_ms = now_ms
            else:
                loader.available_ms = now_ms + HOUR_MS
            if wanted[name]:
                self._all[name].asked.append((now_ms, wanted[name]))

    def _load(self, loader: Loader, wanted: Mapping[str, int], now_ms: int, events: list[Event]) -> None:
        victims = self._victims(loader, wanted, now_ms)
        if victims is None:
            return
        for victim in victims:
            events.append(self._evicted(victim, loader.name, now_ms))
            del self._resident[victim.name]
            victim.available_ms = now_ms + HOUR_MS
        held = self._all[loader.name]
        if held.gone_ms >= 0:
            after_us = (now_ms - held.gone_ms) * 1000
            events.append(
                ModelMissed(t_ms=now_ms, model=loader.name, version=loader.version, reason="memory", after_us=after_us)
            )
        self._resident[loader.name] = loader
        events.append(self.loaded(loader, now_ms + 50))
        held.ready_ms = loader.available_ms

    def _victims(self, loader: Loader, wanted: Mapping[str, int], now_ms: int) -> list[Loader] | None:
        """Who leaves: those that were asked for least. None while those in the way are busy."""
        free = self._budget - self.held_bytes
        going: list[Loader] = []
        order = sorted(
            self._resident.values(), key=lambda o: (bool(wanted[o.name]), self._all[o.name].last_hour(now_ms))
        )
        for other in order:
            if free >= loader.model.need_bytes:
                break
            busy = wanted[other.name] or other.waiting
            if other.model.pinned or (busy and now_ms - self._all[other.name].ready_ms < HOLD_MS):
                continue
            going.append(other)
            free += other.model.need_bytes
        return going if free >= loader.model.need_bytes else None

    def _evicted(self, victim: Loader, for_model: str, now_ms: int) -> ModelEvicted:
        held = self._all[victim.name]
        held.gone_ms = now_ms
        return ModelEvicted(
            t_ms=now_ms,
            model=victim.name,
            version=victim.version,
            reason="memory",
            for_model=for_model,
            bytes=victim.model.need_bytes,
            age_us=max(0, now_ms - held.ready_ms) * 1000,
            requests_last_hour=held.last_hour(now_ms),
            idle_us=max(0, now_ms - held.last_ms) * 1000,
            reload_us=held.load_us or int(victim.model.weights_bytes / 2.2e9 * 1e6) + 900_000,
        )

    def residents(self, loaders: Mapping[str, Loader]) -> list[Resident]:
        """Records of what is in memory at the end of a window."""
        return [
            Resident(
                model=name,
                version=loader.version,
                state="ready",
                pinned=loader.model.pinned,
                need_bytes=loader.model.need_bytes,
                footprint_bytes=int(0.9 * loader.model.need_bytes),
                restarts=loader.restarts,
            )
            for name, loader in loaders.items()
            if name in self._resident
        ]
