"""Apple's chips: memory sizes, memory bandwidth, GPU speed. Pure; one table for every estimate.

Decode is bound by memory bandwidth, prefill by the GPU's arithmetic. A chip that is not in the table has no figures:
callers say that it is unknown, or ask for its bandwidth.
"""

import re

import msgspec

MATRIX_GAIN = 3.3
"""Prefill of a GPU with matrix units over one without, of the same tier: the lowest of the ratios of 3.3 to 4.1 that
are published for M5 over M4."""
_BRAND = re.compile(r"(?:Apple )?(M[1-9]\d?)(?: (Pro|Max|Ultra))?")


class Chip(msgspec.Struct, frozen=True, kw_only=True):
    """A chip. Bandwidth is in GB/s. ``tflops`` is the GPU's half-precision rate in prefill, matrix units included.
    ``binned`` names memory sizes (GB) that are sold with fewer GPU cores only, and the bandwidth that those have.
    ``memory_gb`` are the sizes of all Macs with this chip, ``mini_gb`` those of a Mac mini."""

    name: str
    bandwidth_gb_s: float
    tflops: float
    memory_gb: tuple[int, ...]
    mini_gb: tuple[int, ...] = ()
    binned: dict[int, float] = {}

    @property
    def generation(self) -> int:
        """4 for an M4 Pro."""
        return int(self.name.split()[0][1:])

    @property
    def tier(self) -> str:
        """Pro, Max, Ultra, or "" for a base chip."""
        return self.name.partition(" ")[2]

    @property
    def matrix_units(self) -> bool:
        """Whether the GPU multiplies matrices in units of its own, which speeds up prefill and not decode."""
        return self.generation >= 5

    def bandwidth(self, memory_gb: float) -> float:
        """Memory bandwidth in GB/s of this chip in a Mac with this much memory."""
        return self.binned.get(round(memory_gb), self.bandwidth_gb_s)


def find(brand: str) -> Chip | None:
    """The chip behind Apple's brand string ("Apple M4 Pro") or its short form ("M4 Pro"); None if it is unknown."""
    match = _BRAND.fullmatch(brand.strip())
    return _CHIPS.get(" ".join(part for part in match.groups() if part)) if match else None


def known() -> tuple[Chip, ...]:
    """Every chip of the table, by generation and tier."""
    return tuple(_CHIPS.values())


def _chip(
    name: str,
    gb_s: float,
    tflops: float,
    memory_gb: tuple[int, ...],
    mini_gb: tuple[int, ...] = (),
    binned: dict[int, float] | None = None,
) -> tuple[str, Chip]:
    chip = Chip(
        name=name, bandwidth_gb_s=gb_s, tflops=tflops, memory_gb=memory_gb, mini_gb=mini_gb, binned=binned or {}
    )
    return name, chip


_CHIPS = dict(
    (
        _chip("M1", 68, 2.6, (8, 16), (8, 16)),
        _chip("M1 Pro", 200, 5.2, (16, 32)),
        _chip("M1 Max", 400, 10.4, (32, 64)),
        _chip("M1 Ultra", 800, 20.8, (64, 128)),
        _chip("M2", 100, 3.6, (8, 16, 24), (8, 16, 24)),
        _chip("M2 Pro", 200, 6.8, (16, 32), (16, 32)),
        _chip("M2 Max", 400, 13.5, (32, 64, 96)),
        _chip("M2 Ultra", 800, 27.2, (64, 128, 192)),
        _chip("M3", 100, 4.1, (8, 16, 24)),
        _chip("M3 Pro", 150, 7.4, (18, 36)),
        _chip("M3 Max", 400, 14.2, (36, 48, 64, 96, 128), (), {36: 300, 96: 300}),
        _chip("M3 Ultra", 819, 28.4, (96, 256, 512)),
        _chip("M4", 120, 4.3, (16, 24, 32), (16, 24, 32)),
        _chip("M4 Pro", 273, 8.5, (24, 48, 64), (24, 48, 64)),
        _chip("M4 Max", 546, 17.0, (36, 48, 64, 128), (), {36: 410}),
        _chip("M5", 153, 4.3 * MATRIX_GAIN, (16, 24, 32)),
        _chip("M5 Pro", 307, 8.5 * MATRIX_GAIN, (24, 48, 64), (24, 48, 64)),
        _chip("M5 Max", 614, 17.0 * MATRIX_GAIN, (36, 48, 64, 128), (), {36: 460}),
        _chip("M6", 170, 4.3 * MATRIX_GAIN, (16, 24, 32), (16, 24, 32)),
    )
)
