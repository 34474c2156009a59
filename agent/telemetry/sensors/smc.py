"""Temperatures, fans and system power of Apple Silicon from the System Management Controller, without root.

Apple documents no key and publishes no "package temperature"; this follows the answers of real machines. Keys are
discovered by prefix at the start, since they differ between chips. Many are offsets, not temperatures, and a CPU
cluster that sleeps returns a placeholder for all of its sensors (exactly 40.0, or values near 0): see ``is_valid``.
"""

import contextlib
import ctypes
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint8, c_uint16, c_uint32, c_void_p

import msgspec

from agent.telemetry.sensors.reading import MOST_RPM, MOST_W, Failure
from agent.telemetry.sensors.system_library import LIBRARY, functions

IOKIT = "/System/Library/Frameworks/IOKit.framework/IOKit"
_MISSING = "SMC: IOKit is not available ({})"
SERVICE = "AppleSMC"
ENDPOINT = "AppleSMCKeysEndpoint"
ASLEEP_C = 40.0
"""Placeholder value of a sleeping cluster's sensors on the M4; on the M2 they are between 0 and 9."""
_ON_THE_CHIP = re.compile(r"T[pegaf]..|TCM[zb]")
"""Sensors of CPU and GPU: performance, efficiency and graphics cores (Tp, Te, Tg), efficiency cores of the M5 (Ta),
performance and graphics cores of the M3 (Tf), mean and maximum of the CPU's die (TCMb, TCMz). Others are not read."""
_PCORES, _GPU = ("Tp", "Tf0", "Tf4"), ("Tg", "Tf1", "Tf2")
_WANTED = re.compile(rf"{_ON_THE_CHIP.pattern}|F[0-9]Ac|PSTR")

_NUMBER = re.compile(r"(?:flt|ioft|fpe2|fp[0-9a-f]{2}|sp[0-9a-f]{2}|[us]i(?:8|16|32|64)|flag)\s*$")
"""Types of keys that are numbers."""


# ---- decoding ----


def decode(kind: str, raw: bytes) -> float | None:
    """A key's value by its type; None for an unknown type or size. ``flt`` is a little-endian float, ``ioft`` 48.16
    bits of fixed point, little-endian; ``fpe2`` (14.2 bits) and the unsigned integers are big-endian."""
    name = kind.strip()
    sizes = {"flt": 4, "ioft": 8, "fpe2": 2, "ui8": 1, "ui16": 2, "ui32": 4}
    if len(raw) != sizes.get(name):
        return None
    if name == "flt":
        (value,) = struct.unpack("<f", raw)
        return float(value) if math.isfinite(value) else None
    if name == "ioft":
        return int.from_bytes(raw, "little", signed=True) / 65_536
    return int.from_bytes(raw, "big") / (4 if name == "fpe2" else 1)


def is_valid(celsius: float) -> bool:
    """Whether this can be the temperature of an active part: offsets are near 0, placeholders exactly 40.0."""
    return 15.0 < celsius < 120.0 and celsius != ASLEEP_C


class Temperatures(msgspec.Struct, frozen=True, kw_only=True):
    """Degrees Celsius, each the hottest of its kind; None where no sensor is valid. ``sensors`` counts those used."""

    pcore_c: float | None
    package_c: float | None
    gpu_c: float | None
    pcore_asleep: bool
    sensors: int


def temperatures(values: Mapping[str, float]) -> Temperatures:
    """Temperatures from values by key. ``package_c`` is the hottest valid sensor of CPU and GPU, so it is never below
    one of them: a definition of this module, not an Apple sensor. P-cores are asleep when all of their sensors are
    placeholders."""
    valid = {key: value for key, value in values.items() if _ON_THE_CHIP.fullmatch(key) and is_valid(value)}
    pcore_c = _hottest(valid, _PCORES)
    cores = [value for key, value in values.items() if key.startswith(_PCORES)]
    return Temperatures(
        pcore_c=pcore_c,
        package_c=_hottest(valid, ("T",)),
        gpu_c=_hottest(valid, _GPU),
        pcore_asleep=bool(cores) and pcore_c is None and (bool(valid) or ASLEEP_C in cores),
        sensors=len(valid),
    )


def fans_rpm(values: Mapping[str, float]) -> tuple[int, ...]:
    """Revolutions per minute of each fan, in order; 0 is a fan that is stopped, () means no fan."""
    found = [value for key, value in sorted(values.items()) if re.fullmatch(r"F[0-9]Ac", key)]
    return tuple(round(value) for value in found if 0 <= value <= MOST_RPM)


def system_power_w(values: Mapping[str, float]) -> float | None:
    """PSTR, the whole system's power in watts; None for implausible values."""
    watts = values.get("PSTR")
    return watts if watts is not None and 0.0 < watts < MOST_W else None


def wanted(keys: Iterable[str]) -> list[str]:
    """The subset of a machine's keys that is read."""
    return [key for key in keys if _WANTED.fullmatch(key)]


def _hottest(values: Mapping[str, float], prefixes: tuple[str, ...]) -> float | None:
    return max((value for key, value in values.items() if key.startswith(prefixes)), default=None)


# ---- reading ----


class _Version(ctypes.Structure):
    _fields_ = [*((name, c_uint8) for name in ("major", "minor", "build", "reserved")), ("release", c_uint16)]


class _Limits(ctypes.Structure):
    _fields_ = [("version", c_uint16), ("length", c_uint16), ("cpu", c_uint32), ("gpu", c_uint32), ("memory", c_uint32)]


class _Info(ctypes.Structure):
    _fields_ = [("size", c_uint32), ("kind", c_uint32), ("attributes", c_uint8)]


class KeyData(ctypes.Structure):
    """Request and response of the controller: 80 bytes."""

    _fields_ = [
        ("key", c_uint32),
        ("version", _Version),
        ("limits", _Limits),
        ("info", _Info),
        *((name, c_uint8) for name in ("result", "status", "command")),
        ("index", c_uint32),
        ("bytes", c_uint8 * 32),
    ]


SELECTOR = 2
READ_KEY = 5
KEY_BY_INDEX = 8
KEY_INFO = 9
NOT_FOUND = 132
MOST_KEYS = 10_000


class Smc:
    """An open connection to the controller. Raises Failure when it cannot be opened. Must be closed."""

    def __init__(self, iokit: str = IOKIT, libsystem: str = LIBRARY) -> None:
        self._lib = functions(
            iokit,
            _MISSING,
            IOServiceMatching=(c_void_p, c_char_p),
            IOServiceGetMatchingServices=(c_int, c_uint32, c_void_p, c_void_p),
            IOIteratorNext=(c_uint32, c_uint32),
            IORegistryEntryGetName=(c_int, c_uint32, c_char_p),
            IOServiceOpen=(c_int, c_uint32, c_uint32, c_uint32, c_void_p),
            IOServiceClose=(c_int, c_uint32),
            IOObjectRelease=(c_int, c_uint32),
            IOConnectCallStructMethod=(c_int, c_uint32, c_uint32, c_void_p, c_size_t, c_void_p, c_void_p),
        )
        try:
            task = c_uint32.in_dll(functions(libsystem, _MISSING), "mach_task_self_").value
        except ValueError as error:
            raise Failure(_MISSING.format(type(error).__name__)) from None
        self._connection = self._opened(task)
        self._kinds: dict[str, tuple[int, int]] = {}
        try:
            self.keys = tuple(wanted(self._all_keys()))
        except BaseException:
            self.close()
            raise

    def values(self) -> dict[str, float]:
        """Values of all wanted keys that are readable now. Raises Failure when none is."""
        found, why = {}, "SMC: no key is readable"
        for key in self.keys:
            try:
                value = self._value(key)
            except Failure as error:
                why = str(error)  # some keys exist but are not readable
                continue
            if value is not None:
                found[key] = value
        if not found:
            raise Failure(why)
        return found

    def dump(self) -> Iterator[tuple[str, str, str]]:
        """Every key, its type, and its value's bytes in hexadecimal where that is a number of a temperature, a fan or a
        power: others may name the machine."""
        for key in self._all_keys():
            try:
                size, kind = self._kind(key)
                raw = self._bytes(key) if key[0] in "TFP" and size <= 8 and _NUMBER.match(_name_of(kind)) else b""
            except (Failure, KeyError, UnicodeEncodeError) as error:
                yield key, "", f"! {error}"
            else:
                yield key, _name_of(kind), (raw or b"").hex()

    def close(self) -> None:
        """Close the connection."""
        if self._connection:
            self._lib.IOServiceClose(self._connection)
            self._connection = 0

    def _opened(self, task: int) -> int:
        iterator = c_uint32(0)
        matching = self._lib.IOServiceMatching(SERVICE.encode())
        if self._lib.IOServiceGetMatchingServices(0, matching, byref(iterator)) != 0 or not iterator.value:
            raise Failure(f"SMC: service {SERVICE} not found")
        try:
            while service := self._lib.IOIteratorNext(iterator):
                try:
                    if self._name(service) == ENDPOINT:
                        return self._connected(service, task)
                finally:
                    self._lib.IOObjectRelease(service)
        finally:
            self._lib.IOObjectRelease(iterator)
        raise Failure(f"SMC: {ENDPOINT} not found")

    def _name(self, service: int) -> str:
        buffer = ctypes.create_string_buffer(128)
        return "" if self._lib.IORegistryEntryGetName(service, buffer) != 0 else buffer.value.decode("ascii", "replace")

    def _connected(self, service: int, task: int) -> int:
        connection = c_uint32(0)
        if (status := self._lib.IOServiceOpen(service, task, 0, byref(connection))) != 0:
            raise Failure(f"SMC: open failed (0x{status & 0xFFFFFFFF:08x})")
        return connection.value

    def _call(self, data: KeyData) -> KeyData | None:
        """One exchange; None for a key that does not exist. Raises Failure."""
        answer, size = KeyData(), c_size_t(ctypes.sizeof(KeyData))
        status = self._lib.IOConnectCallStructMethod(
            self._connection, SELECTOR, byref(data), ctypes.sizeof(data), byref(answer), byref(size)
        )
        if status != 0:
            raise Failure(f"SMC: call failed (0x{status & 0xFFFFFFFF:08x})")
        if size.value != ctypes.sizeof(KeyData):
            raise Failure(f"SMC: answered {size.value} bytes instead of {ctypes.sizeof(KeyData)}")
        if answer.result == NOT_FOUND:
            return None
        if answer.result != 0:
            raise Failure(f"SMC: request refused (result {answer.result})")
        return answer

    def _value(self, key: str) -> float | None:
        try:
            raw = self._bytes(key)
        except KeyError:
            return None
        return None if raw is None else decode(_name_of(self._kinds[key][1]), raw)

    def _bytes(self, key: str) -> bytes | None:
        """A value; None for one that is not there or longer than an answer. Raises Failure, or KeyError for an unknown
        key."""
        size, _ = self._kind(key)
        data = KeyData(key=_number(key), command=READ_KEY)
        data.info.size = size
        answer = self._call(data)
        return None if answer is None or size > 32 else bytes(answer.bytes)[:size]

    def _kind(self, key: str) -> tuple[int, int]:
        """Size and type of a key's value, which never change. Raises KeyError for an unknown key."""
        if key not in self._kinds:
            if (answer := self._call(KeyData(key=_number(key), command=KEY_INFO))) is None:
                raise KeyError(key)
            self._kinds[key] = (answer.info.size, answer.info.kind)
        return self._kinds[key]

    def _all_keys(self) -> list[str]:
        count = self._value("#KEY")
        if count is None or not 0 < count <= MOST_KEYS:
            raise Failure("SMC: the number of keys (#KEY) is not readable")
        found = []
        for index in range(int(count)):
            with contextlib.suppress(Failure):
                if (answer := self._call(KeyData(command=KEY_BY_INDEX, index=index))) is not None:
                    found.append(_name_of(answer.key))
        return found


def _number(key: str) -> int:
    return int.from_bytes(key.encode("ascii"), "big")


def _name_of(number: int) -> str:
    return number.to_bytes(4, "big").decode("ascii", "replace")
