"""HTTP smart plugs: Shelly of the first and later generations, Tasmota. Pure: parses their answers into watts.

A plug without a meter omits the value; a negative value means reversed wiring or a plug that feeds power in. Neither
is a node's consumption, so neither is a reading.
"""

from typing import Any

from agent.telemetry.sensors.reading import json_object, number

MOST_W = 20_000.0
PATHS = {
    "shelly": "/rpc/Switch.GetStatus?id={channel}",
    "shelly_pm1": "/rpc/PM1.GetStatus?id={channel}",
    "shelly_em1": "/rpc/EM1.GetStatus?id={channel}",
    "shelly_gen1": "/status",
    "tasmota": "/cm?cmnd=Status%208",
}
"""Path of the power reading, by kind."""


def parse_shelly(raw: bytes) -> float | None:
    """``apower`` (or ``act_power`` of an energy meter) of a component's status, generation 2 and later."""
    tree = json_object(raw)
    return number(tree.get("apower", tree.get("act_power")), MOST_W)


def parse_shelly_gen1(raw: bytes, channel: int) -> float | None:
    """``meters[channel].power`` of /status; None where ``is_valid`` is false."""
    meter = _at(json_object(raw).get("meters"), channel)
    if not isinstance(meter, dict) or meter.get("is_valid") is False:
        return None
    return number(meter.get("power"), MOST_W)


def parse_tasmota(raw: bytes, channel: int) -> float | None:
    """``StatusSNS.ENERGY.Power``; firmware for several outlets returns a list."""
    status = json_object(raw).get("StatusSNS")
    energy = status.get("ENERGY") if isinstance(status, dict) else None
    power = energy.get("Power") if isinstance(energy, dict) else None
    if isinstance(power, list):
        return number(_at(power, channel), MOST_W)
    return number(power, MOST_W) if channel == 0 else None


def parse(kind: str, raw: bytes, channel: int) -> float | None:
    """Parse an answer by the kind of plug."""
    if kind == "tasmota":
        return parse_tasmota(raw, channel)
    return parse_shelly_gen1(raw, channel) if kind == "shelly_gen1" else parse_shelly(raw)


def _at(found: Any, index: int) -> Any:
    return found[index] if isinstance(found, list) and 0 <= index < len(found) else None
