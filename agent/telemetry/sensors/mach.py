"""Statistics of the Mach host, whose structures grow with macOS: HOST_VM_INFO64 had 38 words in macOS 14, has 62 in 26
and 104 in 27. Unprivileged.
"""

from ctypes import byref, c_int, c_size_t, c_uint, c_uint32, c_void_p

from agent.telemetry.sensors.reading import Failure
from agent.telemetry.sensors.system_library import LIBRARY, functions

MIG_ARRAY_TOO_LARGE = -307
"""The kernel's structure is larger than the count that was passed; it gives back its own count."""
MOST_WORDS = 1024
_MOST_TRIES = 3


class MachHost:
    """The host's port. Raises Failure where the functions do not exist."""

    def __init__(self, library: str = LIBRARY) -> None:
        statistics = (c_int, c_uint32, c_int, c_void_p, c_void_p)
        self._lib = functions(
            library,
            "host_statistics64: {}",
            mach_host_self=(c_uint32,),
            host_page_size=(c_int, c_uint32, c_void_p),
            host_statistics=statistics,
            host_statistics64=statistics,
        )
        self._port = self._lib.mach_host_self()

    def page_size(self) -> int:
        """Bytes of the pages that the host counts. Raises Failure."""
        size = c_size_t(0)
        if self._lib.host_page_size(self._port, byref(size)) != 0 or size.value not in (4096, 16384):
            raise Failure("host_page_size: no valid page size")
        return size.value

    def words(self, function: str, flavor: int, least: int) -> bytes:
        """A structure of ``least`` words of 32 bits, and behind them what this release of macOS added.

        The kernel is told ``least``, and when it wants more, the number that it named: it takes the whole room for an
        error of the caller and logs it as a likely memory corruption. Raises Failure."""
        room, asked, status = (c_uint32 * MOST_WORDS)(), least, 0
        for _ in range(_MOST_TRIES):
            count = c_uint(asked)
            status = getattr(self._lib, function)(self._port, flavor, byref(room), byref(count))
            if status != MIG_ARRAY_TOO_LARGE or not asked < count.value <= MOST_WORDS:
                break
            asked = count.value
        if status != 0:
            raise Failure(f"{function}: kern_return {status} for {asked} words")
        return bytes(room)[: count.value * 4]
