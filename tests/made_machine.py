"""What a made node can do: speed of a model by bandwidth and arithmetic, heat by work and room, names of versions.

Figures are those of shared/chips.py, so a made rack is never faster than the machine it claims to be: every decode step
reads all weights once for all of its rows, and the KV cache of each row.
"""

import functools
import hashlib
import math
import random
from typing import NamedTuple

from shared import chips
from shared.memory_plan import default_budget_bytes
from shared.records import Hardware

MODEL, MEMORY_GB = "Mac16,11", 64
"""What every node is: the largest mini of its year."""
BUDGET_BYTES = default_budget_bytes(MEMORY_GB * chips.GIB)
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
THROTTLE_C, CALM_C = 96.5, 91.0
"""The chip slows down from the first on, until it is below the second."""
_SETTLES_MS = 120_000
"""Time constant of a mini's temperature."""
_COARSE_MS = 600_000
_MAC = chips.find_mac(MODEL)
assert _MAC is not None
MAC = _MAC
_CHIP = chips.find(MAC.chip)
assert _CHIP is not None
CHIP = _CHIP
HARDWARE = Hardware(model=MODEL, chip=f"Apple {MAC.chip}", memory_bytes=MEMORY_GB * chips.GIB, cores=(10, 4))
BANDWIDTH = CHIP.bandwidth(MEMORY_GB) * 1e9
"""Bytes per second that the memory moves at most."""


def list_price() -> float:
    """US dollars for one node."""
    return chips.price(MAC, MEMORY_GB)[0] or 0.0


def version(name: str, number: int = 1) -> str:
    """The ``number``-th version of a model, as the agent names them: 16 hex digits."""
    return hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:16]


def boot(node: str, number: int) -> str:
    """The id of a machine's ``number``-th boot."""
    text = hashlib.sha256(f"boot {node} {number}".encode()).hexdigest()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:32]}".upper()


def prefill_us(params: float) -> float:
    """Microseconds per prompt token of a model in which each token takes part in this many parameters."""
    return 1e6 / CHIP.prefill_tok_s(MEMORY_GB, params)


def step_us(weights_bytes: int, row_bytes: float, rows: float) -> float:
    """Microseconds of a decode step: the weights once, and the KV cache of each row."""
    return 1e6 / CHIP.decode_tok_s(MEMORY_GB, weights_bytes + rows * row_bytes)


def least_gap_us(weights_bytes: int) -> float:
    """No token follows another sooner: the time to read all weights once at full bandwidth."""
    return weights_bytes / BANDWIDTH * 1e6


class Air(NamedTuple):
    """The room of a node: ``intake_c`` on average, and how likely a day is to be hot."""

    seed: str
    intake_c: float
    hot: float

    def at(self, t_ms: int) -> float:
        """Degrees of the intake: warmest in the afternoon, more so on a hot day."""
        warm = _warmer(self.seed, self.hot, t_ms // DAY_MS)
        day = max(0.0, math.cos((t_ms / HOUR_MS % 24 - 14.5) / 24 * 2 * math.pi))
        return self.intake_c + 1.5 * day + (warm * (0.3 + 0.7 * day) if warm > 0 else warm)


@functools.lru_cache(4096)
def _warmer(seed: str, hot: float, day: int) -> float:
    """By how much a day is warmer than others."""
    dice = random.Random(f"{seed} {day}")
    return dice.gauss(0, 0.7) + (dice.uniform(8, 12) if dice.random() < hot else 0.0)


class Heat:
    """The temperature of one chip: it follows the work of the last minutes and the air around."""

    def __init__(self, air: Air) -> None:
        self._air = air
        self.celsius = air.intake_c + 14
        self.throttled = False

    def slowdown(self) -> float:
        """By how much everything takes longer now."""
        return 1.35 if self.throttled else 1.0

    def work(self, start_ms: int, end_ms: int, duty: float) -> float:
        """A window with this share of work: its mean temperature. A long window has busy minutes and quiet ones, of
        which the former make the peak."""
        length = end_ms - start_ms
        peak = min(1.0, 2.2 * duty) if length >= _COARSE_MS else duty
        target = self._air.at(start_ms) + 13 + 57 * peak**0.8
        begun = self.celsius
        self.celsius = target + (begun - target) * math.exp(-length / _SETTLES_MS)
        self.throttled = self.celsius > (CALM_C if self.throttled else THROTTLE_C)
        self.celsius = min(self.celsius, 100.5)  # it slows down to stay below
        return min(self.celsius, self._air.at(start_ms) + 13 + 57 * duty**0.8 if length >= _COARSE_MS else begun)
