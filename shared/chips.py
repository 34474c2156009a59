"""Apple's chips and the Macs that carry them: memory, bandwidth, GPU, price and power. Pure; the one table for every
estimate, read from shared/chips.toml, where each value names its source.

Decode is bound by memory bandwidth, prefill by the GPU's arithmetic. A chip that is not in the table has no figures:
callers say that it is unknown, and ask for what they need by the name of its key.
"""

import functools
import importlib.resources
import re
import tomllib
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

UNCONFIRMED = "unconfirmed"
"""In place of a source: a value that nobody has published."""
DECODE_SHARE, PREFILL_SHARE = 0.8, 0.45
"""Shares that MLX reaches: of a chip's bandwidth in decode, of its GPU's peak in prefill."""
BITS_PER_WEIGHT = 4.5
"""4-bit quantisation in groups of 64 that share a scale and a bias."""
GIB = 1 << 30
_BRAND = re.compile(r"(?:Apple )?(M[1-9]\d?)(?: (Pro|Max|Ultra))?")
Kind = Literal["mini", "studio", "other"]


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a value is published."""

    name: str
    url: str


class Binned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory sizes (GB) that a chip is sold with at less bandwidth (GB/s) or with fewer GPU cores only."""

    memory_gb: tuple[int, ...]
    bandwidth_gb_s: float
    gpu_cores: int


class Chip(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chip. Bandwidth (GB/s), GPU cores and ``tflops`` (half-precision rate in prefill, matrix units included) are
    those of the full chip, ``memory_gb`` the sizes of all Macs with it. ``cites`` names the source of each."""

    name: str
    bandwidth_gb_s: float
    tflops: float
    memory_gb: tuple[int, ...] = ()
    gpu_cores: int = 0
    binned: tuple[Binned, ...] = ()
    cites: dict[str, str] = {}

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

    @property
    def mini_gb(self) -> tuple[int, ...]:
        """Memory sizes (GB) of a Mac mini with this chip; () where there is none."""
        return sizes(self, "mini")

    @property
    def unconfirmed(self) -> tuple[str, ...]:
        """Names of the figures that have no public source."""
        return tuple(sorted(name for name, source in self.cites.items() if source == UNCONFIRMED))

    def bandwidth(self, memory_gb: float) -> float:
        """Memory bandwidth in GB/s of this chip in a Mac with this much memory."""
        found = self._binned(memory_gb)
        return found.bandwidth_gb_s if found else self.bandwidth_gb_s

    def gpu_tflops(self, memory_gb: float) -> float:
        """``tflops`` of this chip in a Mac with this much memory: in proportion to its GPU cores."""
        found = self._binned(memory_gb)
        return self.tflops * found.gpu_cores / self.gpu_cores if found else self.tflops

    def decode_tok_s(self, memory_gb: float, active_bytes: float) -> float:
        """Expected tokens per second of one request with a short context: every active byte is read for each."""
        return decode_tok_s(self.bandwidth(memory_gb), active_bytes)

    def prefill_tok_s(self, memory_gb: float, active_params: float) -> float:
        """Expected prompt tokens per second: two operations for each active parameter."""
        return prefill_tok_s(self.gpu_tflops(memory_gb), active_params)

    def _binned(self, memory_gb: float) -> Binned | None:
        return next((one for one in self.binned if round(memory_gb) in one.memory_gb), None)


class Mac(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Mac by its model identifiers. ``price_usd`` is the US list price by memory size (GB) when it was announced;
    watts are those at the wall, ``busy_w`` the most that Apple measured. What nobody has published is missing."""

    models: tuple[str, ...]
    kind: Kind
    name: str
    chip: str
    memory_gb: tuple[int, ...]
    thunderbolt: int | None = None
    price_usd: dict[int, float] = {}
    idle_w: float | None = None
    busy_w: float | None = None
    cites: dict[str, str] = {}

    @property
    def title(self) -> str:
        """``Mac mini (2024), M4 Pro``."""
        return f"{self.name}, {self.chip}"

    def watts(self, busy: float) -> float | None:
        """Watts at the wall while it is busy for this share (0 to 1) of the time; None without public figures."""
        if self.idle_w is None or self.busy_w is None:
            return None
        return self.idle_w + (self.busy_w - self.idle_w) * min(1.0, max(0.0, busy))


class Identity(NamedTuple):
    """What a machine is by its own words. ``remarks`` say what is unknown, and where the words disagree."""

    mac: Mac | None
    chip: Chip | None
    memory_gb: int
    remarks: tuple[str, ...]

    @property
    def text(self) -> str:
        """One sentence: what the table expects of the machine, and the remarks."""
        return "; ".join(part for part in (self._figures(), *self.remarks) if part)

    def _figures(self) -> str:
        if self.chip is None:
            return ""
        title = self.mac.title if self.mac else self.chip.name
        unsure = f" ({UNCONFIRMED})" if "tflops" in self.chip.unconfirmed else ""
        gpu = f"{self.chip.gpu_tflops(self.memory_gb):.1f} TFLOPS{unsure}"
        speed = f"{self.chip.bandwidth(self.memory_gb):g} GB/s, {gpu}"
        return ", ".join(part for part in (f"{title}, {self.memory_gb} GB: {speed}", self._power()) if part)

    def _power(self) -> str:
        if self.mac is None or self.mac.kind == "other":
            return ""
        if self.mac.idle_w is None:
            return f"watts {UNCONFIRMED}"
        return f"{self.mac.idle_w:g} W idle, at most {self.mac.busy_w:g} W"


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sources: dict[str, Source]
    chips: tuple[Chip, ...]
    macs: tuple[Mac, ...]


@functools.cache
def _table() -> _Table:
    raw = importlib.resources.files("shared").joinpath("chips.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(raw), _Table, str_keys=True)


@functools.cache
def _by_name() -> dict[str, Chip]:
    return {chip.name: chip for chip in known()}


@functools.cache
def _by_model() -> dict[str, Mac]:
    return {model: mac for mac in macs() for model in mac.models}


def known() -> tuple[Chip, ...]:
    """Every chip of the table, by generation and tier."""
    return _table().chips


def macs() -> tuple[Mac, ...]:
    """Every Mac of the table: minis, Studios, others."""
    return _table().macs


def sources() -> dict[str, Source]:
    """Every source by its key in ``cites``."""
    return _table().sources


def find(brand: str) -> Chip | None:
    """The chip behind Apple's brand string ("Apple M4 Pro") or its short form ("M4 Pro"); None if it is unknown."""
    match = _BRAND.fullmatch(brand.strip())
    return _by_name().get(" ".join(part for part in match.groups() if part)) if match else None


def find_mac(model: str) -> Mac | None:
    """The Mac of a model identifier ("Mac16,11"); None if it is unknown."""
    return _by_model().get(model.strip())


def desktop(chip: Chip) -> Mac | None:
    """The mini or Studio with this chip; None where none was sold."""
    return next(iter(_desktops(chip)), None)


def sizes(chip: Chip, kind: str) -> tuple[int, ...]:
    """Memory sizes (GB) that Macs of a kind were sold with this chip; () where there are none."""
    return tuple(sorted({gb for mac in macs() if (mac.kind, mac.chip) == (kind, chip.name) for gb in mac.memory_gb}))


def decode_tok_s(bandwidth_gb_s: float, active_bytes: float) -> float:
    """Tokens per second of one row from the bandwidth (GB/s) and the bytes read for each token."""
    return DECODE_SHARE * bandwidth_gb_s * 1e9 / active_bytes


def prefill_tok_s(tflops: float, active_params: float) -> float:
    """Prompt tokens per second from the GPU's rate and the parameters that each token takes part in."""
    return PREFILL_SHARE * tflops * 1e12 / (2 * active_params)


def is_virtual(brand: str, model: str) -> bool:
    """Whether a machine is a virtual one. Some guests say the brand of their host's chip, as if it were theirs."""
    return "Virtual" in brand or "Virtual" in model


def unknown(brand: str, model: str = "") -> str:
    """Why there are no figures for a machine, as a clause."""
    if is_virtual(brand, model):
        return f"{(brand.strip() or model)[:60]!r} is a virtual machine, whose host's figures do not hold in it"
    return f"the chip table has no row for {brand[:60]!r}" if brand.strip() else "this machine names no chip"


def identify(model: str, brand: str, memory_bytes: int) -> Identity:
    """What a machine is: by its model identifier, the chip's brand string and its memory. The brand string wins where
    they disagree, which is said; without one the model identifier tells the chip."""
    memory_gb, mac = round(memory_bytes / GIB), find_mac(model)
    chip = None if is_virtual(brand, model) else find(brand)
    if chip is None and not brand.strip() and mac is not None:
        chip = find(mac.chip)
    remarks: list[str] = []
    if chip is None:
        remarks.append(unknown(brand, model))
    elif mac is None:
        remarks += [f"model {model[:40]!r} is not in the chip table"] if model.strip() else []
    elif mac.chip != chip.name:
        remarks.append(f"model {model[:40]} is a {mac.title}, but the chip calls itself {brand.strip()[:60]}")
        mac = None
    held = mac.memory_gb if mac is not None else chip.memory_gb if chip is not None else ()
    if held and not memory_gb:
        remarks.append("its memory is not known")
    elif held and memory_gb not in held:
        remarks.append(f"it was sold with {_listed(held)} GB, not {memory_gb}")
    return Identity(mac if chip is not None else None, chip, memory_gb, tuple(remarks))


def price(mac: Mac, memory_gb: float) -> tuple[float | None, str]:
    """The US list price with this much memory, and a sentence that says what it is; None without a public one."""
    found = mac.price_usd.get(round(memory_gb))
    if found is not None:
        return found, f"{mac.title}, {memory_gb:g} GB: US list price {found:,.0f} USD ({_cited(mac, 'price_usd')})"
    listed = ", ".join(f"{usd:,.0f} USD with {gb} GB" for gb, usd in mac.price_usd.items())
    return None, f"{mac.title}: no public list price with {memory_gb:g} GB" + (f" (it was {listed})" if listed else "")


def power(mac: Mac) -> str:
    """A sentence about its watts at the wall."""
    if mac.idle_w is None:
        return f"{mac.title}: watts {UNCONFIRMED}, no public figure"
    return f"{mac.title}: {mac.idle_w:g} W idle, at most {mac.busy_w:g} W ({_cited(mac, 'watts')})"


def _cited(row: Mac, field: str) -> str:
    source = sources().get(row.cites.get(field, UNCONFIRMED))
    return source.name if source else UNCONFIRMED


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


# ---- for people ----

HEAD = ("Chip", "GB/s", "GPU cores", "TFLOPS", "Memory, GB", "Mac", "Thunderbolt", "Idle / most", "List price, USD")
"""Columns of ``rows``."""


def rows(chips: Sequence[Chip]) -> list[tuple[str, ...]]:
    """The cells of a table: each chip in each mini and Studio, or alone where none was sold with it."""
    return [_row(chip, mac) for chip in chips for mac in (*_desktops(chip),) or (None,)]


def _desktops(chip: Chip) -> list[Mac]:
    return [mac for mac in macs() if mac.chip == chip.name and mac.kind != "other"]


def _row(chip: Chip, mac: Mac | None) -> tuple[str, ...]:
    less = [(f"{b.bandwidth_gb_s:g}", str(b.gpu_cores), f" ({_listed(b.memory_gb)} GB)") for b in chip.binned]
    mark = "?" if "tflops" in chip.unconfirmed else ""
    return (
        chip.name,
        ", ".join([f"{chip.bandwidth_gb_s:g}", *(f"{gb_s}{where}" for gb_s, _, where in less)]),
        ", ".join([str(chip.gpu_cores), *(f"{n}{where}" for _, n, where in less if int(n) != chip.gpu_cores)]),
        f"{chip.tflops:g}{mark}",
        _listed(mac.memory_gb if mac else chip.memory_gb),
        f"{mac.name}, {' or '.join(mac.models)}" if mac else "no mini or Studio",
        str(mac.thunderbolt) if mac else "-",
        "-" if mac is None else "?" if mac.idle_w is None else f"{mac.idle_w:g} / {mac.busy_w:g} W",
        ", ".join(f"{usd:,.0f} ({gb} GB)" for gb, usd in mac.price_usd.items()) if mac else "-",
    )


def cited(chips: Sequence[Chip]) -> list[tuple[str, str]]:
    """For each chip and Mac, as in ``rows``: its name, and each of its figures with the source."""
    found: list[Chip | Mac] = []
    for chip in chips:
        found += [chip, *_desktops(chip)]
    return [(one.name if isinstance(one, Chip) else one.title, _citations(one)) for one in found]


def _citations(row: Chip | Mac) -> str:
    fields: dict[str, list[str]] = {}
    for field, key in row.cites.items():
        fields.setdefault(key, []).append(field)
    named = sources()
    return "; ".join(
        f"{', '.join(names)}: {f'[{named[key].name}]({named[key].url})' if key in named else key}"
        for key, names in fields.items()
    )


def markdown() -> str:
    """The table and the sources of docs/hardware.md."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(known())]
    lines += ["", "| Chip or Mac | Figures and their sources |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {text} |" for name, text in cited(known()))])
