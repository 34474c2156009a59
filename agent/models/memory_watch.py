"""Measures once a second what the loaders hold, and performs what memory_guard.py decides."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agent.config import Live
from agent.models import memory_guard as guard
from agent.models.slot import Loaded
from agent.models.slot_view import held_by
from shared.logs import get_logger
from shared.records import Event, MemoryPressed

log = get_logger("agent.memory")


class MemoryWatch:
    """``loaded`` returns every loader of the node; ``evict_idle`` evicts the idle model whose absence costs least."""

    def __init__(
        self,
        live: Live,
        *,
        loaded: Callable[[], Sequence[Loaded]],
        evict_idle: Callable[[], None],
        emit: Callable[[Event], None],
        wall_ms: Callable[[], int],
    ) -> None:
        self._live, self._loaded, self._evict_idle, self._emit = live, loaded, evict_idle, emit
        self._wall_ms = wall_ms
        self._state = guard.GuardState()

    @property
    def refusing(self) -> bool:
        """Whether memory pressure is so high that new requests are rejected."""
        return self._state.refusing

    @property
    def level(self) -> str:
        """calm, soft or hard."""
        return self._state.level

    @property
    def view(self) -> dict[str, object]:
        """For the status."""
        return {"level": self._state.level, "held_bytes": self._state.held_bytes, "refusing": self._state.refusing}

    def on_loaded(self, loaded: Loaded) -> Awaitable[None] | None:
        """Bring a new loader to the current level; None when that is calm."""
        return loaded.process.relieve("soft") if self._state.level != "calm" else None

    async def read(self, budget_bytes: int) -> None:
        """Read, decide, act."""
        before, held = self._state, [held_by(one) for one in self._loaded()]
        shares = self._live.now.memory
        self._state, actions = guard.step(before, held, budget_bytes, soft=shares.soft, hard=shares.hard)
        if before.level != self._state.level:
            event = MemoryPressed(
                t_ms=self._wall_ms(),
                level=self._state.level,
                held_bytes=self._state.held_bytes,
                budget_bytes=budget_bytes,
            )
            self._emit(event)
            log.warning("memory_pressed", pressure=event.level, held_bytes=event.held_bytes, budget=budget_bytes)
        for action in actions:
            await self._relieve(action)

    async def _relieve(self, action: guard.Action) -> None:
        levels: dict[str, Any] = {"ease": "calm", "press": "soft", "drop_caches": "hard"}
        if action in levels:
            for one in self._loaded():
                await one.process.relieve(levels[action])
        elif action == "evict_idle":
            self._evict_idle()
