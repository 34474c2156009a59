"""Apple's powermetrics, which needs root: power of CPU, GPU and neural engine, and the thermal pressure.

It prints property lists separated by a NUL that arrives only with the next sample, so a document is complete at its
last line. Energies are millijoules of the interval, powers milliwatts; ``elapsed_ns`` is the interval's actual
length.
"""

import os
import plistlib
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from agent.telemetry.sensors.child import FIRST_S, Child
from agent.telemetry.sensors.reading import MAX_OUTPUT_BYTES, Failure, number, text_of
from agent.telemetry.sensors.source import Guarded
from agent.telemetry.sensors.throttle import LEVELS

ARGV = (
    "/usr/bin/powermetrics",
    *("-f", "plist"),
    *("-i", "5000"),
    *("-n", "-1"),
    *("--samplers", "cpu_power,gpu_power,thermal"),
    *("-b", "1"),
)
FRESH_S = 15.0
MOST_MW = 1_000_000.0
_END = b"</plist>"
MOST_NS = 1e15
MOST_ROUNDED = 0.98
"""Of a sum, to allow for parts that are rounded."""
_TYPED = re.compile(rb"<(real|integer|date|data)\s*(?:/>|>([^<]*)(?:</(real|integer|date|data)\s*>)?)")
"""A value that the property list's parser converts, and refuses the whole document for. Its end may be missing."""
_NUMBER = re.compile(rb"[ \t\r\n]*[+-]?\d{1,30}(?:\.\d{1,30})?(?:[eE][+-]?\d{1,3})?[ \t\r\n]*")
_COUNT = re.compile(rb"[ \t\r\n]*[+-]?\d{1,30}[ \t\r\n]*")
_HEADER = re.compile(r"^\*\*\* (?:Sampled|Summary) system activity .*\(([^()\n]*)ms elapsed\) \*\*\*$", re.MULTILINE)
_WATTS = re.compile(r"^(CPU|GPU|ANE|Combined) Power(?: \([^)\n]*\))?: (\d+(?:\.\d+)?) mW[ \t]*\n", re.MULTILINE)
_PRESSURE = re.compile(r"^Current pressure level: (\w+)[ \t]*\n", re.MULTILINE)


class Powermetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One interval, ``elapsed_ns`` 0 where its length is unknown; None for missing values. ``soc_mw`` is CPU, GPU and
    neural engine together."""

    elapsed_ns: int
    cpu_mw: float | None = None
    gpu_mw: float | None = None
    ane_mw: float | None = None
    soc_mw: float | None = None
    level: int | None = None


class Documents:
    """Splits a stream of property lists that may be chunked anywhere."""

    def __init__(self) -> None:
        self._kept = b""

    def feed(self, chunk: bytes) -> list[Powermetrics]:
        """The samples that ``chunk`` completes. Anything but a property list is skipped, as is one without an end."""
        self._kept += chunk
        found = []
        while (end := self._kept.find(_END)) >= 0:
            document, self._kept = self._kept[: end + len(_END)], self._kept[end + len(_END) :]
            if (sample := parse_document(document)) is not None:
                found.append(sample)
        if len(self._kept) > MAX_OUTPUT_BYTES:
            self._kept = b""
        return found


def parse_document(raw: bytes) -> Powermetrics | None:
    """One property list; None for anything else."""
    raw = raw.strip(b"\0 \r\n\t")
    if not raw.startswith((b"<?xml", b"<plist")) or len(raw) > MAX_OUTPUT_BYTES:
        return None
    try:
        tree = plistlib.loads(_TYPED.sub(_readable, raw), fmt=plistlib.FMT_XML)
    except Exception:  # noqa: BLE001  # an XML parser may raise anything for garbage
        return None
    if not isinstance(tree, dict):
        return None
    if "elapsed_ns" not in tree:
        return None
    elapsed_ns = round(number(tree["elapsed_ns"], MOST_NS) or 0)
    processor, gpu = _table(tree, "processor"), _table(tree, "gpu")
    cpu, ane = _power(processor, "cpu", elapsed_ns), _power(processor, "ane", elapsed_ns)
    if (graphics := _power(processor, "gpu", elapsed_ns)) is None:
        graphics = _power(gpu, "gpu", elapsed_ns)
    return Powermetrics(
        elapsed_ns=elapsed_ns,
        cpu_mw=cpu,
        gpu_mw=graphics,
        ane_mw=ane,
        soc_mw=_sum(number(processor.get("combined_power"), MOST_MW), cpu, graphics, ane),
        level=level_of(str(tree.get("thermal_pressure", ""))),
    )


def parse_text(raw: bytes) -> list[Powermetrics]:
    """The samples of the human-readable format. Only complete lines count; tables without a header are one sample of
    unknown length."""
    text = text_of(raw)
    if not (heads := list(_HEADER.finditer(text))):
        whole = _block("0", text)
        return [whole] if whole.cpu_mw is not None or whole.gpu_mw is not None else []
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [_block(head[1], text[head.end() : end]) for head, end in zip(heads, ends, strict=True)]


def level_of(name: str) -> int | None:
    """A level by its name; None for an unknown one."""
    name = name.strip().lower()
    return LEVELS.index(name) if name in LEVELS else None


class PowermetricsStream:
    """powermetrics as a child process; ``last`` is its newest sample while fresh. It runs only as root."""

    def __init__(self, child: Child, clock: Callable[[], float] = time.monotonic) -> None:
        self._child, self._clock = child, clock
        self._lock = threading.Lock()
        self._documents = Documents()
        self._last: tuple[float, Powermetrics] | None = None
        self._has_spoken = False
        self.guard = Guarded("powermetrics", clock)

    @classmethod
    def if_allowed(cls, platform: str = sys.platform) -> "PowermetricsStream | None":
        """A stream where it can run (macOS, root), else None."""
        return cls(Child(ARGV)) if platform == "darwin" and os.geteuid() == 0 else None

    def last(self) -> Powermetrics | None:
        """The newest sample, None when the last few intervals had none."""
        with self._lock:
            self.guard.call(self._heard)
            return self._fresh()

    def _heard(self) -> Powermetrics | None:
        """The newest sample; None while the first may still come. Raises Failure when powermetrics exited or prints
        none."""
        try:
            said = self._child.read()
        except Failure:
            self._has_spoken = False
            raise
        for sample in self._documents.feed(said):
            self._has_spoken, self._last = True, (self._clock(), sample)
        if not self._has_spoken and self._clock() - self._child.started_s > FIRST_S:
            self._child.close()
            raise Failure(f"powermetrics: no sample within {FIRST_S:g} s of its start")
        return self._fresh()

    def _fresh(self) -> Powermetrics | None:
        return None if self._last is None or self._clock() - self._last[0] > FRESH_S else self._last[1]

    def close(self) -> None:
        """Kill the child."""
        self._child.close()


def _block(elapsed_ms: str, text: str) -> Powermetrics:
    known = re.fullmatch(r"\d+(?:\.\d+)?", elapsed_ms)
    elapsed_ns = (number(float(elapsed_ms) * 1e6, MOST_NS) if known else None) or 0
    watts: dict[str, float | None] = {}
    for name, value in _WATTS.findall(text):
        # GPU power is printed twice; the first is in the same table as the others
        watts.setdefault(name, number(float(value), MOST_MW))
    pressure = _PRESSURE.search(text)
    return Powermetrics(
        elapsed_ns=round(elapsed_ns),
        cpu_mw=watts.get("CPU"),
        gpu_mw=watts.get("GPU"),
        ane_mw=watts.get("ANE"),
        soc_mw=_sum(watts.get("Combined"), watts.get("CPU"), watts.get("GPU"), watts.get("ANE")),
        level=level_of(pressure[1]) if pressure else None,
    )


def _readable(match: re.Match[bytes]) -> bytes:
    """A value that a property list may hold as it is; else as a text, so that only this one is lost: `nan(0x8)`."""
    kind, value, end = match.groups(b"")
    good = {b"real": _NUMBER, b"integer": _COUNT}.get(kind)
    return match[0] if good is not None and end == kind and good.fullmatch(value) else b"<string/>"


def _sum(combined: float | None, *parts: float | None) -> float | None:
    """Sum of all three parts; macOS before 13 does not print it, and a sum below its parts is none. A CPU power of
    exactly 0 means that it is not measured (as in macOS 27), and then the sum is None."""
    if parts[0] == 0:
        return None
    known = [part for part in parts if part is not None]
    if combined is not None and combined >= MOST_ROUNDED * sum(known):
        return combined
    return sum(known) if len(known) == len(parts) else None


def _table(tree: dict[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _power(table: dict[str, Any], name: str, elapsed_ns: int) -> float | None:
    if (power := number(table.get(f"{name}_power"), MOST_MW)) is not None:
        return power
    energy_mj = number(table.get(f"{name}_energy"), MOST_MW)
    return None if energy_mj is None or not elapsed_ns else number(energy_mj * 1e9 / elapsed_ns, MOST_MW)
