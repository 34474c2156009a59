"""What a chip should reach with a model, and whether it does. Pure.

The expectation is calculated from the table of chips: decode reads every weight once for each step, prefill computes
two operations per weight and token. Of a mixture of experts fewer are read, so that it is never called slow for that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shared.chips import BITS_PER_WEIGHT, Chip

BESIDE_S = 0.0025
"""What a decode step takes beside reading weights: it starts hundreds of kernels. Without it each Ultra and each small
model would be called slow (a 7B model's steps take 4 to 6 ms longer on healthy ones, llama.cpp discussion 4167)."""
SLOW = 0.7
"""Share of what is expected below which a node is called slow."""


def expected(chip: Chip | None, memory_gb: float, weights_bytes: int) -> dict[str, float]:
    """Tokens per second that a chip should reach, in prefill and in one answer; {} for a chip that is not known."""
    if chip is None or weights_bytes <= 0:
        return {}
    # weights of more bits are fewer for their size
    return {
        "prefill_tps": round(chip.prefill_tok_s(memory_gb, weights_bytes * 8 / BITS_PER_WEIGHT), 1),
        "decode_tps": round(1 / (1 / chip.decode_tok_s(memory_gb, weights_bytes) + BESIDE_S), 1),
    }


def warning(model: str, figures: Mapping[str, Any], hopes: Mapping[str, float], chip: str, seen: Sequence[str]) -> str:
    """The sentence about a model that is slower here than its chip allows; "" where it is not. ``seen`` are causes that
    show now."""
    if not hopes or figures.get("decode_tps", 0.0) >= SLOW * hopes["decode_tps"]:
        return ""
    below = 1 - figures["decode_tps"] / hopes["decode_tps"]
    why = "; ".join(seen) or (
        "nothing shows why now: look for heat while it was timed (fan, dust, place on the shelf), for the low power "
        "mode (`pmset -g` says lowpowermode or powermode), and for swapping (other programs' memory)"
    )
    return (
        f"{model}: {figures['decode_tps']:g} tokens/s measured here for one answer, {below:.0%} below the "
        f"{hopes['decode_tps']:g} that {chip} should reach; {why}; it is timed again with another version, or when "
        "step_times.json is removed from the state folder and the agent started"
    )


def causes(heat: str, throttled_ppm: int | None, swapped_bytes: int | None) -> list[str]:
    """What slows a machine down now, in words."""
    found = []
    if heat not in ("", "nominal") or throttled_ppm:
        level = f"thermal level {heat}" if heat not in ("", "nominal") else "throttled within the last minutes"
        found.append(f"it is hot ({level}): see to its fan and its place")
    if swapped_bytes:
        found.append("it swaps memory out: give it fewer or smaller models, or end other programs")
    return found
