"""Power distribution units (PDUs) over SNMP: the objects to query, and their values in watts. Pure.

Units and scales differ by vendor and are taken from their MIBs: PowerNet-MIB (APC), PDU2-MIB (Raritan),
Sentry4-MIB (Server Technology), ENTITY-SENSOR-MIB (RFC 3433).
"""

from collections.abc import Mapping

import msgspec

MOST_W = 100_000.0
_APC = "1.3.6.1.4.1.318.1.1"
_RARITAN = "1.3.6.1.4.1.13742.6"
_SENTRY = "1.3.6.1.4.1.1718.4.1"
_SENSOR = "1.3.6.1.2.1.99.1.1.1"
ACTIVE_POWER = 5
_WATTS_UNIT = 6
_UNITS_SCALE = 9
_OK = 1


class Outlet(msgspec.Struct, frozen=True, kw_only=True):
    """One metered outlet, inlet, cord or sensor. ``scale`` is watts per unit where the MIB names none (APC outlets)."""

    kind: str
    numbers: tuple[int, ...] = ()
    scale: float = 1.0


def oids(outlet: Outlet) -> tuple[str, ...]:
    """The objects to query, the value first."""
    at = ".".join(str(number) for number in outlet.numbers)
    match outlet.kind:
        case "apc_device":
            return (f"{_APC}.26.4.3.1.5.{at}",)
        case "apc_legacy":
            return (f"{_APC}.12.1.16.0",)
        case "apc_outlet":
            return (f"{_APC}.26.9.4.3.1.7.{at}",)
        case "raritan_outlet":
            return (f"{_RARITAN}.5.4.3.1.4.{at}.{ACTIVE_POWER}", f"{_RARITAN}.3.5.4.1.7.{at}.{ACTIVE_POWER}")
        case "raritan_inlet":
            return (f"{_RARITAN}.5.2.3.1.4.{at}.{ACTIVE_POWER}", f"{_RARITAN}.3.3.4.1.7.{at}.{ACTIVE_POWER}")
        case "servertech_cord":
            return (f"{_SENTRY}.3.3.1.3.{at}",)
        case _:
            return tuple(f"{_SENSOR}.{column}.{at}" for column in (4, 1, 2, 3, 5))


def watts(outlet: Outlet, values: Mapping[str, int]) -> float | None:
    """Watts from the answer; None when a value is missing or reported as unsupported (-1)."""
    asked = oids(outlet)
    if any(oid not in values for oid in asked):
        return None
    value, *rest = (values[oid] for oid in asked)
    if value < 0:
        return None
    found = value * _factor(outlet, rest)
    return found if 0 <= found < MOST_W else None


def _factor(outlet: Outlet, rest: list[int]) -> float:
    """Watts per unit; negative when unknown."""
    if outlet.kind == "apc_device":
        return 10.0  # hundredths of a kilowatt
    if outlet.kind.startswith("raritan"):
        digits = rest[0]
        return 10.0**-digits if 0 <= digits <= 9 else -1.0
    if outlet.kind == "sensor":
        unit, scale, precision, status = rest
        known = unit == _WATTS_UNIT and status == _OK and 1 <= scale <= 17 and -8 <= precision <= 9
        # RFC 3433: 1 to 9 are decimal places; -8 to -1 give the number of accurate digits and do not scale
        return 10.0 ** (3 * (scale - _UNITS_SCALE) - max(0, precision)) if known else -1.0
    return outlet.scale
