"""The memory guard: what is done when models hold more memory than planned. Pure; the pool performs it.

Three sources measure it: MLX (arrays in use and freed ones that it keeps), the system (the process's footprint) and our
own ledger (weights, KV cache, prompt cache). For each loader the largest counts. Actions escalate from one reading to
the next and are reversed with hysteresis, so that they do not flap.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

Level = Literal["calm", "soft", "hard"]
Action = Literal["ease", "press", "drop_caches", "evict_idle", "refuse", "accept"]
RELEASE = 0.05
"""Hysteresis: a level ends when memory in use is this share of the budget below the level's threshold."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What one loader holds, by source; None where a source has no value."""

    name: str
    engine_bytes: int | None = None
    footprint_bytes: int | None = None
    ledger_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """The largest of the three."""
        return max(self.engine_bytes or 0, self.footprint_bytes or 0, self.ledger_bytes)


class GuardState(msgspec.Struct, frozen=True, kw_only=True):
    """``steps`` counts consecutive readings at the hard level; while ``refusing``, new requests are rejected."""

    level: Level = "calm"
    steps: int = 0
    refusing: bool = False
    held_bytes: int = 0


def step(
    state: GuardState, held: Sequence[Held], budget_bytes: int, *, soft: float, hard: float
) -> tuple[GuardState, tuple[Action, ...]]:
    """The next state and what to do.

    1. Soft: engines pause admission and prefill in small chunks ("press"); calm reverses that ("ease").
    2. Hard, first reading: prompt caches are dropped; from the second on, each evicts the cheapest idle model; from the
       third on, new requests are rejected too, until the level ends ("accept").
    """
    used = sum(one.nbytes for one in held)
    level = _level(state.level, used / budget_bytes, soft, hard)
    steps = state.steps + 1 if level == "hard" else 0
    actions: list[Action] = []
    if (level == "calm") != (state.level == "calm"):
        actions.append("ease" if level == "calm" else "press")
    if steps == 1:
        actions.append("drop_caches")
    elif steps > 1:
        actions.append("evict_idle")
    refusing = steps > 2 or (state.refusing and level == "hard")
    if refusing != state.refusing:
        actions.append("refuse" if refusing else "accept")
    return GuardState(level=level, steps=steps, refusing=refusing, held_bytes=used), tuple(actions)


def _level(before: Level, share: float, soft: float, hard: float) -> Level:
    if share >= hard or (before == "hard" and share >= hard - RELEASE):
        return "hard"
    if share >= soft or (before != "calm" and share >= soft - RELEASE):
        return "soft"
    return "calm"
