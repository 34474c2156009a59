"""HTTP smart plugs and energy meters: Shelly of the first and later generations, Tasmota. Pure: parses their answers
into watts.

A plug without a meter omits the value; a negative value means reversed wiring or a plug that feeds power in; ``errors``
and ``is_valid`` say that a number beside them, often 0, was not measured. These are left out.
"""

from collections.abc import Sequence
from typing import Any

from agent.telemetry.meters.answer import NoPower, Power, known, says_no, total, watts, without
from agent.telemetry.sensors.reading import json_object

MOST_W = 20_000.0
PATHS = {
    "shelly": "/rpc/Switch.GetStatus?id={channel}",
    "shelly_pm1": "/rpc/PM1.GetStatus?id={channel}",
    "shelly_em1": "/rpc/EM1.GetStatus?id={channel}",
    "shelly_em": "/rpc/EM.GetStatus?id={channel}",
    "shelly_gen1": "/status",
    "shelly_gen1_em": "/status",
    "tasmota": "/cm?cmnd=Status%208",
}
"""Path of the power reading, by kind."""
PHASES = ("a", "b", "c")
_MEASURES = ("no_load", "phase_sequence")
"""Errors of Shelly beside which the power is right; a protection that has switched off, and any other, is told."""


def power(kind: str, raw: bytes, channel: int, phases: Sequence[str] = ()) -> Power:
    """Watts of an answer by the kind of plug; ``phases`` are those of a three-phase meter that count, () for all."""
    if unread := unreadable(raw):
        return unread
    tree = json_object(raw)
    match kind:
        case "tasmota":
            return _tasmota(tree, channel)
        case "shelly_gen1":
            return _gen1_meter(tree, "meters", channel)
        case "shelly_gen1_em":
            numbers = [PHASES.index(phase) for phase in phases] or [channel]
            return total(_gen1_meter(tree, "emeters", number) for number in numbers)
        case "shelly_em":
            return _three_phases(tree, phases)
        case _:
            return _errors(tree.get("errors")) or watts(tree.get("apower", tree.get("act_power")), MOST_W, "its power")


def parse(kind: str, raw: bytes, channel: int) -> float | None:
    """Watts of an answer, None without."""
    return known(power(kind, raw, channel))


def parse_shelly(raw: bytes) -> float | None:
    """``apower`` (or ``act_power`` of an energy meter) of a component's status, generation 2 and later."""
    return parse("shelly", raw, 0)


def parse_shelly_gen1(raw: bytes, channel: int) -> float | None:
    """``meters[channel].power`` of /status; None where ``is_valid`` is false."""
    return parse("shelly_gen1", raw, channel)


def parse_tasmota(raw: bytes, channel: int) -> float | None:
    """``StatusSNS.ENERGY.Power``; firmware for several outlets returns a list."""
    return parse("tasmota", raw, channel)


def unreadable(raw: bytes) -> NoPower | None:
    """Why an answer cannot be read; None when it is a JSON object."""
    if raw.lstrip()[:1] == b"<":
        return without("a web page, such as a login page; check at, kind, user and secret")
    return None if json_object(raw) else without("neither complete nor JSON; check at and kind")


def _errors(found: Any) -> NoPower | None:
    """What a Shelly's list of errors says of the power beside it."""
    if not isinstance(found, list):
        return None
    told = [str(one)[:40] for one in found if one not in _MEASURES]
    return says_no(f"errors {', '.join(told)}") if told else None


def _three_phases(tree: dict[str, Any], phases: Sequence[str]) -> Power:
    """An EM component, which has phases a, b, c. A negative phase, which its total would hide, is told."""
    if error := _errors(tree.get("errors")):
        return error
    return total(
        _errors(tree.get(f"{p}_errors")) or watts(tree.get(f"{p}_act_power"), MOST_W, f"phase {p}")
        for p in phases or PHASES
    )


def _gen1_meter(tree: dict[str, Any], meters: str, channel: int) -> Power:
    meter = _at(tree.get(meters), channel)
    if not isinstance(meter, dict):
        return without(f"no {meters}[{channel}]; check channel and kind")
    if meter.get("is_valid") is False:
        return says_no("is_valid is false")
    relay = _at(tree.get("relays"), channel)
    if meters == "meters" and isinstance(relay, dict) and relay.get("overpower") is True:
        return says_no("overpower")
    return watts(meter.get("power"), MOST_W, f"{meters}[{channel}]")


def _tasmota(tree: dict[str, Any], channel: int) -> Power:
    if "WARNING" in tree:
        return without("it wants a password; check user and secret")
    status = tree.get("StatusSNS")
    energy = status.get("ENERGY") if isinstance(status, dict) else None
    if not isinstance(energy, dict):
        return says_no("it has no energy sensor")
    found = energy.get("Power")
    if not isinstance(found, list):
        found = found if channel == 0 else None
    return watts(_at(found, channel) if isinstance(found, list) else found, MOST_W, f"outlet {channel}")


def _at(found: Any, index: int) -> Any:
    return found[index] if isinstance(found, list) and 0 <= index < len(found) else None
