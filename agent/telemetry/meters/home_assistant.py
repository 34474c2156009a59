"""Home Assistant's REST API: the state of one entity as watts. Pure."""

import re
from datetime import datetime
from typing import Any

from agent.telemetry.meters.answer import Power, says_no, watts, without
from agent.telemetry.meters.http import MOST_W, unreadable
from agent.telemetry.sensors.reading import json_object

PATH = "/api/states/{entity}"
UNITS = {"mW": 1e-3, "W": 1.0, "kW": 1e3, "MW": 1e6}
_UNKNOWN = ("unavailable", "unknown", "none", "")
_NUMBER = re.compile(r"-?\d{1,12}(\.\d{1,12})?([eE][+-]?\d{1,2})?")


def power(raw: bytes, now_s: float, age_s: float) -> Power:
    """Watts of an entity's state. ``now_s`` is Home Assistant's clock (Unix seconds); a state that was last reported
    more than ``age_s`` before is none."""
    if unread := unreadable(raw):
        return unread
    tree = json_object(raw)
    state, attributes = tree.get("state"), tree.get("attributes")
    if not isinstance(state, str):
        return without("no state of an entity; check at")
    if state.strip().lower() in _UNKNOWN:
        return says_no(f"Home Assistant says {state.strip().lower() or 'nothing'} for this entity")
    unit = attributes.get("unit_of_measurement") if isinstance(attributes, dict) else None
    if unit not in UNITS:
        return without(_not_power(unit))
    if not _NUMBER.fullmatch(state):
        return without("the state has no number; use a sensor of power")
    if old := _too_old(tree, now_s, age_s):
        return says_no(old)
    return watts(float(state) * UNITS[unit], MOST_W, "the state")


def _not_power(unit: Any) -> str:
    if isinstance(unit, str) and unit.endswith("h"):
        return f"this entity is an energy ({unit[:8]}); use the sensor of the plug's power, in W"
    if not isinstance(unit, str) or not unit:
        return "this entity has no unit_of_measurement; use a sensor of power, in W or kW"
    return f"this entity's unit is {unit[:8]}, no power; use a sensor in W or kW"


def _too_old(tree: dict[str, Any], now_s: float, age_s: float) -> str:
    """Why a state is no longer one; "" when it is. Reports of an unchanged value count where they are told (2024.4)."""
    told = [_seconds(tree.get(key)) for key in ("last_reported", "last_updated")]
    known = [one for one in told if one is not None]
    if not known:
        return "the state has no time (last_updated)"
    if (age := now_s - max(known)) > age_s:
        return f"last reported {age:.0f} s ago, and age_s allows {age_s:g}; is the plug reachable?"
    return ""


def _seconds(text: Any) -> float | None:
    try:
        found = datetime.fromisoformat(text)
        return found.timestamp() if found.tzinfo is not None else None
    except (TypeError, ValueError, OverflowError):
        return None
