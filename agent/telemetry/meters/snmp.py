"""Power distribution units (PDUs) over SNMP: the objects to query, and their values in watts. Pure.

Units and scales differ by vendor and are taken from their MIBs: PowerNet-MIB (APC), PDU2-MIB (Raritan), Sentry3-MIB and
Sentry4-MIB (Server Technology), EATON-EPDU-MIB, CPS-MIB (CyberPower), ENTITY-SENSOR-MIB (RFC 3433). Beside the value
stand columns that say whether it is one: they are asked too, and honoured where the device has them.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from agent.config import Meter
from agent.telemetry.meters.answer import NoPower, Power, known, says_no, total, without

MOST_W = 100_000.0
_APC = "1.3.6.1.4.1.318.1.1"
_RARITAN = "1.3.6.1.4.1.13742.6"
_SENTRY3 = "1.3.6.1.4.1.1718.3.2"
_SENTRY4 = "1.3.6.1.4.1.1718.4.1"
_EATON = "1.3.6.1.4.1.534.6.6.7"
_CYBERPOWER = "1.3.6.1.4.1.3808.1.1.3"
_SENSOR = "1.3.6.1.2.1.99.1.1.1"
ACTIVE_POWER = 5
UNITS = {"mW": 1e-3, "W": 1.0, "kW": 1e3}
"""Units of the generic kind, in watts."""
_OVERFLOW = frozenset({10**9, 2**31 - 1, 2**32 - 1})
"""Marks of values beyond what a column can hold: RFC 3433's, and all ones."""
_WATTS_UNIT, _UNITS_SCALE = 6, 9

_SENTRY3_LOAD = frozenset({0, 1, 3, 4, 5})  # not reading, readError, noComm
_SENTRY3_ON = frozenset({0, 1, 2, 3, 4, 5, 8, 9})  # not noComm, reading
_SENTRY4_STATUS = frozenset({0, 12, 13, 14, 15, 16, 17, 18, 19, 20})  # measured: normal, tripped, alarms, limits
_RARITAN_STATE = frozenset({2, 3, 4, 5, 6, 12, 13})  # normal and beyond a threshold
_APC_LOAD = frozenset({1, 2, 3, 4})  # 5 is notSupported


class Outlet(msgspec.Struct, frozen=True, kw_only=True):
    """One metered outlet, inlet, cord or sensor. ``scale`` is watts per unit where the MIB names none (APC outlets),
    and multiplies ``unit`` of the generic kind, whose value is at ``oid`` and counts while ``status_oid`` has one of
    ``status_ok``."""

    kind: str
    numbers: tuple[int, ...] = ()
    scale: float = 1.0
    oid: str = ""
    unit: str = "W"
    status_oid: str = ""
    status_ok: tuple[int, ...] = ()


class Check(NamedTuple):
    """A column that must have one of ``right``; ``required`` if the value is none without it."""

    oid: str
    what: str
    right: frozenset[int]
    required: bool = False


class Part(NamedTuple):
    """A value, the columns beside it, and watts per unit; without ``factor`` the columns ``exponents`` say how many
    decimal places (Raritan), or scale and precision (RFC 3433)."""

    oid: str
    checks: tuple[Check, ...] = ()
    factor: float | None = 1.0
    exponents: tuple[str, ...] = ()


def of_meter(meter: Meter) -> Outlet:
    """What a configured meter asks for."""
    keys = msgspec.structs.fields(Outlet)
    return Outlet(**{key.name: getattr(meter, key.name) for key in keys})


def oids(outlet: Outlet) -> tuple[str, ...]:
    """The objects to query, the value first."""
    extra = (_APC_CURRENT,) if outlet.kind == "apc_legacy" else ()
    return tuple(dict.fromkeys((*_named(outlet, required=False), *extra)))


def needed(outlet: Outlet) -> tuple[str, ...]:
    """Those without which there is no power, the value first."""
    return tuple(dict.fromkeys(_named(outlet, required=True)))


def _named(outlet: Outlet, *, required: bool) -> Iterator[str]:
    for part in parts(outlet):
        yield from (part.oid, *part.exponents)
        yield from (check.oid for check in part.checks if check.required or not required)


def power(outlet: Outlet, values: Mapping[str, int]) -> Power:
    """Watts from the answer, or why there are none."""
    if outlet.kind == "apc_legacy" and values.get(_APC_VALUE) == 0 and values.get(_APC_CURRENT, 0) > 0:
        return says_no("0 W beside a current: this model computes no power")
    found = total(_watts(part, values) for part in parts(outlet))
    if isinstance(found, NoPower) or 0 <= found < MOST_W:
        return found
    return without("no possible power; check scale")


def watts(outlet: Outlet, values: Mapping[str, int]) -> float | None:
    """Watts from the answer; None without."""
    return known(power(outlet, values))


_APC_VALUE = f"{_APC}.12.1.16.0"
_APC_CURRENT = f"{_APC}.12.2.3.1.1.2.1"


def parts(outlet: Outlet) -> Iterator[Part]:
    """What is added up to the outlet's power."""
    at = ".".join(str(number) for number in outlet.numbers)
    match outlet.kind:
        case "apc_device":
            state = Check(f"{_APC}.26.4.3.1.4.{at}", "load state", _APC_LOAD)
            yield Part(f"{_APC}.26.4.3.1.5.{at}", (state,), 10.0)  # hundredths of a kilowatt
        case "apc_legacy":
            yield Part(_APC_VALUE)
        case "apc_outlet":
            state = Check(f"{_APC}.26.9.4.3.1.5.{at}", "load state", _APC_LOAD)
            yield Part(f"{_APC}.26.9.4.3.1.7.{at}", (state,), outlet.scale)
        case "raritan_outlet":
            yield _raritan("5.4.3.1", "3.5.4.1", at)
        case "raritan_inlet":
            yield _raritan("5.2.3.1", "3.3.4.1", at)
        case "servertech_cord":
            yield _sentry4("3.3.1", at, 3, 4)
        case "servertech_outlet":
            yield _sentry4("8.3.1", at, 7, 8)
        case "sentry3_tower":
            yield Part(f"{_SENTRY3}.1.1.11.{at}", (_sentry3_tower(at),))
        case "sentry3_infeed":
            yield _sentry3(2, 12, at)
        case "sentry3_phases":
            yield from (_sentry3(2, 12, f"{at}.{infeed}") for infeed in (1, 2, 3))
        case "sentry3_outlet":
            yield _sentry3(3, 14, at)
        case "eaton_outlet":
            yield Part(f"{_EATON}.6.5.1.3.{at}", _eaton(outlet.numbers))
        case "eaton_input":
            yield Part(f"{_EATON}.3.5.1.4.{at}", _eaton(outlet.numbers))
        case "cyberpower_outlet":
            yield Part(f"{_CYBERPOWER}.3.5.1.1.8.{at}")
        case "cyberpower_load":
            yield Part(f"{_CYBERPOWER}.2.3.1.1.7.{at}")
        case "snmp":
            yield _generic(outlet)
        case _:
            yield _sensor(at)


def _raritan(measured: str, described: str, at: str) -> Part:
    column, kind = f"{_RARITAN}.{measured}", f"{_RARITAN}.{described}"
    checks = (
        Check(f"{column}.2.{at}.{ACTIVE_POWER}", "availability", frozenset({1})),
        Check(f"{column}.3.{at}.{ACTIVE_POWER}", "state", _RARITAN_STATE),
        Check(f"{kind}.6.{at}.{ACTIVE_POWER}", "unit", frozenset({3})),
    )
    return Part(f"{column}.4.{at}.{ACTIVE_POWER}", checks, None, (f"{kind}.7.{at}.{ACTIVE_POWER}",))


def _sentry4(table: str, at: str, value: int, status: int) -> Part:
    checks = tuple(Check(f"{_SENTRY4}.{table}.{n}.{at}", "status", _SENTRY4_STATUS) for n in (2, status))
    return Part(f"{_SENTRY4}.{table}.{value}.{at}", checks)


def _sentry3_tower(tower: str) -> Check:
    return Check(f"{_SENTRY3}.1.1.4.{tower}", "tower status", frozenset({0, 2, 3, 4, 5}))  # not noComm


def _sentry3(table: int, value: int, at: str) -> Part:
    column = f"{_SENTRY3}.{table}.1"
    checks = (
        _sentry3_tower(at.partition(".")[0]),
        Check(f"{column}.5.{at}", "status", _SENTRY3_ON),
        Check(f"{column}.6.{at}", "load status", _SENTRY3_LOAD),
    )
    return Part(f"{column}.{value}.{at}", checks)


def _eaton(numbers: tuple[int, ...]) -> tuple[Check, ...]:
    unit, good = numbers[0] if numbers else 0, frozenset({0})
    return (
        Check(f"{_EATON}.1.2.1.30.{unit}", "communication status", good),
        Check(f"{_EATON}.1.2.1.31.{unit}", "internal status", good),
    )


def _generic(outlet: Outlet) -> Part:
    right = frozenset(outlet.status_ok)
    checks = (Check(outlet.status_oid.lstrip("."), "status", right, True),) if outlet.status_oid else ()
    return Part(outlet.oid.lstrip("."), checks, UNITS.get(outlet.unit, 1.0) * outlet.scale)


def _sensor(at: str) -> Part:
    checks = (
        Check(f"{_SENSOR}.1.{at}", "type", frozenset({_WATTS_UNIT}), True),
        Check(f"{_SENSOR}.5.{at}", "operational status", frozenset({1}), True),
    )
    return Part(f"{_SENSOR}.4.{at}", checks, None, (f"{_SENSOR}.2.{at}", f"{_SENSOR}.3.{at}"))


def _watts(part: Part, values: Mapping[str, int]) -> Power:
    value = values.get(part.oid)
    if value is None:
        return without("the device has no such object; check kind, numbers, and that this outlet is metered")
    for check in part.checks:
        state = values.get(check.oid)
        if state is None and check.required:
            return without(f"the device tells no {check.what}; check kind and numbers")
        if state is not None and state not in check.right:
            return says_no(f"{check.what} {state}")
    if value < 0:
        return says_no(f"value {value}: not supported, or not measured")
    if value in _OVERFLOW:
        return says_no(f"value {value}: beyond what it can measure")
    factor = part.factor if part.factor is not None else _factor([values.get(oid) for oid in part.exponents])
    return factor if isinstance(factor, NoPower) else value * factor


def _factor(exponents: list[int | None]) -> Power:
    """Watts per unit of a value that says so itself: by decimal places, or by scale and precision."""
    match exponents:
        case [int(digits)] if 0 <= digits <= 9:
            return 10.0**-digits
        case [int(scale), int(precision)] if 1 <= scale <= 17 and -8 <= precision <= 9:
            # RFC 3433: 1 to 9 are decimal places; -8 to -1 give the number of accurate digits and do not scale
            return 10.0 ** (3 * (scale - _UNITS_SCALE) - max(0, precision))
        case _:
            return without("it tells no scale; check kind and numbers")
