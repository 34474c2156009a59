"""macOS virtual memory: host_statistics64, else the output of `vm_stat`. Unprivileged.

``used`` is Activity Monitor's "memory used", by its parts: program memory that cannot be reclaimed (internal minus
purgeable pages), wired memory, and what the compressor occupies. Cached files do not count.
"""

import ctypes
import re
import struct
from collections.abc import Mapping, Sequence
from ctypes import c_uint32, c_uint64

import msgspec

from agent.telemetry.sensors.mach import MachHost
from agent.telemetry.sensors.reading import Failure, known, text_of
from agent.telemetry.sensors.system_library import LIBRARY

HOST_VM_INFO64 = 4
_FREE = re.compile(r"^System-wide memory free percentage: (\d{1,3})%[ \t]*\n", re.MULTILINE)
_LINE = re.compile(r'^"?([^":\n]+)"?:[ \t]+(\d{1,19})\.[ \t]*\n', re.MULTILINE)
_HEADER = re.compile(r"^Mach Virtual Memory Statistics: \(page size of (\d{4,6}) bytes\)[ \t]*\n")
_LABELS = {
    "internal": "Anonymous pages",
    "purgeable": "Pages purgeable",
    "wired": "Pages wired down",
    "compressor": "Pages occupied by compressor",
    "swapins": "Swapins",
    "swapouts": "Swapouts",
}


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """Current bytes, and bytes swapped out and in since boot."""

    wired_bytes: int
    compressor_bytes: int
    app_bytes: int
    swapped_in_bytes: int | None = None
    swapped_out_bytes: int | None = None

    @property
    def used_bytes(self) -> int:
        """App, wired and compressor together."""
        return self.app_bytes + self.wired_bytes + self.compressor_bytes


def parse_vm_stat(raw: bytes) -> Vm | None:
    """Parse `vm_stat`; None when the header names no page size or a part is missing. Unknown labels and truncated lines
    are ignored."""
    text = text_of(raw)
    if (header := _HEADER.match(text)) is None:
        return None
    size, pages = int(header[1]), {label.strip(): int(count) for label, count in _LINE.findall(text)}
    if size not in (4096, 16384):
        return None
    return _vm({name: pages[label] for name, label in _LABELS.items() if label in pages}, size)


def parse_memory_pressure(raw: bytes) -> int | None:
    """The free percentage of `memory_pressure -Q`."""
    match = _FREE.search(text_of(raw))
    return int(match[1]) if match and int(match[1]) <= 100 else None


def _vm(pages: Mapping[str, int], size: int) -> Vm | None:
    if not {"internal", "purgeable", "wired", "compressor"} <= pages.keys():
        return None
    if max(pages[name] for name in ("internal", "wired", "compressor")) * size > 1 << 44:
        return None  # no Mac has 16 TiB
    swapped = {name: pages[name] * size if name in pages else None for name in ("swapins", "swapouts")}
    return Vm(
        wired_bytes=pages["wired"] * size,
        compressor_bytes=pages["compressor"] * size,
        app_bytes=max(0, pages["internal"] - pages["purgeable"]) * size,
        swapped_in_bytes=swapped["swapins"],
        swapped_out_bytes=swapped["swapouts"],
    )


class Statistics(ctypes.Structure):
    """struct vm_statistics64 of <mach/vm_statistics.h> as in macOS 14; counts are pages. Later releases add fields at
    the end."""

    _fields_ = [
        *((name, c_uint32) for name in ("free", "active", "inactive", "wired")),
        *((name, c_uint64) for name in ("zero_fill", "reactivations", "pageins", "pageouts", "faults")),
        *((name, c_uint64) for name in ("cow_faults", "lookups", "hits", "purges")),
        *((name, c_uint32) for name in ("purgeable", "speculative")),
        *((name, c_uint64) for name in ("decompressions", "compressions", "swapins", "swapouts")),
        *((name, c_uint32) for name in ("compressor", "throttled", "external", "internal")),
        ("uncompressed", c_uint64),
    ]


COUNT = ctypes.sizeof(Statistics) // 4


def of_words(words: Sequence[int], page_size: int) -> Vm | None:
    """Memory from the words of host_statistics64, of which newer systems have more; None for too few and for
    implausible ones."""
    if len(words) < COUNT - 2 or page_size not in (4096, 16384):  # the last field is newer than the rest
        return None
    raw = struct.pack(f"={len(words)}I", *words).ljust(ctypes.sizeof(Statistics), b"\0")
    statistics = Statistics.from_buffer_copy(raw)
    return _vm({name: int(getattr(statistics, name)) for name in _LABELS}, page_size)


class HostStatistics:
    """host_statistics64(HOST_VM_INFO64). Raises Failure where it does not exist."""

    def __init__(self, library: str = LIBRARY) -> None:
        self._host = MachHost(library)
        self._page_bytes = self._host.page_size()

    def read(self) -> Vm:
        """Current memory. Raises Failure."""
        raw = self._host.words("host_statistics64", HOST_VM_INFO64, COUNT)
        if len(raw) < (COUNT - 2) * 4:  # the last field is newer than the rest
            raise Failure(f"host_statistics64: {len(raw) // 4} words, expected {COUNT}")
        words = struct.unpack(f"={len(raw) // 4}I", raw)
        return known(of_words(words, self._page_bytes), "host_statistics64: implausible values")
