"""A meter that says "not available" gives no watts and a sentence, of every kind, over real sockets; and the kinds
beyond the first plugs and PDUs: three phases, Home Assistant, Kasa and Tapo, any PDU."""

import asyncio
import contextlib
import hashlib
import json
import secrets
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from agent import config_checks
from agent.config import SNMP_NUMBERS, AgentConfig, Meter, MeterKind, Node
from agent.operator import checks, doctor
from agent.telemetry.meters import home_assistant, http, kasa_client, snmp
from agent.telemetry.meters.rack import RackMeters
from agent.telemetry.meters.snmp import Outlet
from agent.telemetry.sensors.reading import Failure
from scripts.seaweed import free_port
from tests.agent.telemetry.test_meters import SECRETS, pdu, plug, read, shelly

SENSOR, RARITAN = "1.3.6.1.2.1.99.1.1.1", "1.3.6.1.4.1.13742.6"
APC, SENTRY3, SENTRY4 = "1.3.6.1.4.1.318.1.1", "1.3.6.1.4.1.1718.3.2", "1.3.6.1.4.1.1718.4.1"
EATON, CYBERPOWER, OTHER = "1.3.6.1.4.1.534.6.6.7", "1.3.6.1.4.1.3808.1.1.3", "1.3.6.1.4.1.28507.27.1"


def sensor(kind: int, scale: int, precision: int, value: int, status: int) -> dict[str, int]:
    return {f"{SENSOR}.{n}.7": v for n, v in ((1, kind), (2, scale), (3, precision), (4, value), (5, status))}


def raritan(value: int, digits: int, available: int, state: int, unit: int = 3) -> dict[str, int]:
    measured = {f"{RARITAN}.5.4.3.1.{n}.1.3.5": v for n, v in ((2, available), (3, state), (4, value))}
    return {**measured, f"{RARITAN}.3.5.4.1.6.1.3.5": unit, f"{RARITAN}.3.5.4.1.7.1.3.5": digits}


def three_phases(infeeds: Sequence[int], status: int = 1, load: int = 0, tower: int = 0) -> dict[str, int]:
    """Sentry3 without a total: one row per infeed, the neutral last and without power."""
    found = {f"{SENTRY3}.1.1.4.1": tower}
    for n, value in enumerate((*infeeds, -1), 1):
        found |= {f"{SENTRY3}.2.1.{c}.1.{n}": v for c, v in ((5, status), (6, load), (12, value))}
    return found


def outlet3(value: int, status: int = 1, load: int = 0) -> dict[str, int]:
    return {f"{SENTRY3}.3.1.{c}.1.1.7": v for c, v in ((5, status), (6, load), (14, value))}


def cord(value: int, status: int = 0, value_status: int = 0) -> dict[str, int]:
    return {f"{SENTRY4}.3.3.1.{c}.1.1": v for c, v in ((2, status), (3, value), (4, value_status))}


def eaton(value: int, communication: int = 0, internal: int = 0) -> dict[str, int]:
    return {f"{EATON}.6.5.1.3.0.4": value, f"{EATON}.1.2.1.30.0": communication, f"{EATON}.1.2.1.31.0": internal}


def apc_device(value: int, state: int) -> dict[str, int]:
    return {f"{APC}.26.4.3.1.5.1": value, f"{APC}.26.4.3.1.4.1": state}


PDUS: list[tuple[MeterKind, tuple[int, ...], dict[str, int], float | str]] = [
    ("sensor", (7,), sensor(6, 9, 0, 0, 2), "operational status 2"),
    ("sensor", (7,), sensor(6, 9, 0, 0, 3), "operational status 3"),
    ("sensor", (7,), sensor(8, 9, 0, 0, 1), "type 8"),
    ("sensor", (7,), sensor(6, 0, 0, 0, 1), "no scale"),
    ("sensor", (7,), sensor(6, 9, 10, 0, 1), "no scale"),
    ("sensor", (7,), sensor(6, 8, 4, 1_000_000_000, 1), "beyond what it can measure"),
    ("sensor", (7,), sensor(6, 8, 3, 1_000_000_000, 1), "beyond what it can measure"),
    ("sensor", (7,), sensor(6, 8, 4, -1_000_000_000, 1), "not measured"),
    ("sensor", (7,), sensor(6, 9, 0, 0, 1), 0.0),
    ("sensor", (7,), sensor(6, 9, 3, 61_500, 1), 61.5),
    ("raritan_outlet", (1, 3), raritan(0, 0, 2, -1), "availability 2"),
    ("raritan_outlet", (1, 3), raritan(0, 0, 1, -1), "state -1"),
    ("raritan_outlet", (1, 3), raritan(0, 0, 1, 14), "state 14"),
    ("raritan_outlet", (1, 3), raritan(0, 12, 1, 4), "no scale"),
    ("raritan_outlet", (1, 3), raritan(71, 0, 1, 4, unit=4), "unit 4"),
    ("raritan_outlet", (1, 3), raritan(0, 0, 1, 4), 0.0),
    ("raritan_outlet", (1, 3), raritan(715, 1, 1, 5), 71.5),
    ("apc_device", (1,), apc_device(0, 5), "load state 5"),
    ("apc_device", (1,), apc_device(12, 2), 120.0),
    ("apc_legacy", (), {f"{APC}.12.1.16.0": 0, f"{APC}.12.2.3.1.1.2.1": 14}, "computes no power"),
    ("apc_legacy", (), {f"{APC}.12.1.16.0": 0, f"{APC}.12.2.3.1.1.2.1": 0}, 0.0),
    ("apc_outlet", (4,), {f"{APC}.26.9.4.3.1.7.4": -1}, "not supported"),
    ("servertech_cord", (1, 1), cord(0, status=10), "status 10"),
    ("servertech_cord", (1, 1), cord(0, value_status=9), "status 9"),
    ("servertech_cord", (1, 1), cord(1701, value_status=16), 1701.0),
    ("servertech_outlet", (1, 1, 4), {f"{SENTRY4}.8.3.1.7.1.1.4": 44}, 44.0),
    ("servertech_outlet", (1, 1, 4), {f"{SENTRY4}.8.3.1.7.1.1.4": 0, f"{SENTRY4}.8.3.1.8.1.1.4": 5}, "status 5"),
    ("sentry3_phases", (1,), three_phases((147, 53, 78)), 278.0),
    ("sentry3_phases", (1,), three_phases((147, 53, -1)), "not measured"),
    ("sentry3_phases", (1,), three_phases((147, 53)), "not measured"),
    ("sentry3_phases", (1,), three_phases((0, 0, 0), tower=1), "tower status 1"),
    ("sentry3_infeed", (1, 2), three_phases((147, 53, 78)), 53.0),
    ("sentry3_infeed", (1, 4), three_phases((147, 53, 78)), "not measured"),
    ("sentry3_infeed", (1, 2), three_phases((0, 0, 0), status=6), "status 6"),
    ("sentry3_infeed", (1, 2), three_phases((0, 0, 0), load=6), "load status 6"),
    ("sentry3_tower", (1,), {f"{SENTRY3}.1.1.11.1": 1240, f"{SENTRY3}.1.1.4.1": 0}, 1240.0),
    ("sentry3_tower", (1,), three_phases((147, 53, 78)), "no such object"),
    ("sentry3_outlet", (1, 1, 7), outlet3(61), 61.0),
    ("sentry3_outlet", (1, 1, 7), outlet3(0, load=1), 0.0),
    ("sentry3_outlet", (1, 1, 7), outlet3(0, load=2), "load status 2"),
    ("sentry3_outlet", (1, 1, 7), outlet3(-1), "not measured"),
    ("eaton_outlet", (0, 4), eaton(83), 83.0),
    ("eaton_outlet", (0, 4), eaton(0, communication=1), "communication status 1"),
    ("eaton_outlet", (0, 4), eaton(0, internal=1), "internal status 1"),
    ("eaton_input", (0, 1), {f"{EATON}.3.5.1.4.0.1": 1450}, 1450.0),
    ("eaton_input", (0, 1), {f"{EATON}.3.5.1.4.0.1": -1}, "not measured"),
    ("cyberpower_outlet", (3,), {f"{CYBERPOWER}.3.5.1.1.8.3": 37}, 37.0),
    ("cyberpower_load", (1,), {f"{CYBERPOWER}.2.3.1.1.7.1": 370}, 370.0),
    ("cyberpower_load", (1,), {f"{CYBERPOWER}.2.3.1.1.7.1": 2**32 - 1}, "beyond what it can measure"),
]


async def read_all(cases: Sequence[tuple[dict[str, Any], dict[str, int]]]) -> list[tuple[float | None, str]]:
    """Watts and problem of each meter at a PDU of its own, by one client."""
    async with contextlib.AsyncExitStack() as stack:
        ats = [await stack.enter_async_context(pdu(objects)) for _, objects in cases]
        meters = [
            Meter(name=f"m{n}", at=at, nodes=("n",), secret="env:COMMUNITY", **keys)
            for n, (at, (keys, _)) in enumerate(zip(ats, cases, strict=True))
        ]
        rack = RackMeters(meters, SECRETS)
        await rack.poll()
        await rack.close()
        return [(told["watts"], told["problem"]) for told in rack.status()]


def is_right(watts: float | None, problem: str, expected: float | str) -> bool:
    if isinstance(expected, float):
        return (watts, problem) == (expected, "")
    return watts is None and expected in problem and problem.startswith("answers")


async def test_a_pdu_says_watts_or_why_there_are_none() -> None:
    told = await read_all([({"kind": kind, "numbers": numbers}, objects) for kind, numbers, objects, _ in PDUS])
    assert [(case, one) for case, one in zip(PDUS, told, strict=True) if not is_right(*one, case[3])] == []


GENERIC: list[tuple[dict[str, Any], dict[str, int], float | str]] = [
    ({}, {f"{OTHER}.4": 73}, 73.0),
    ({"oid": f".{OTHER}.4", "unit": "kW", "scale": 0.01}, {f"{OTHER}.4": 12}, 120.0),
    ({"unit": "mW"}, {f"{OTHER}.4": 61_500}, 61.5),
    ({}, {f"{OTHER}.5": 73}, "no such object"),
    ({}, {f"{OTHER}.4": -1}, "not measured"),
    ({}, {f"{OTHER}.4": 2**31 - 1}, "beyond what it can measure"),
    ({"unit": "kW"}, {f"{OTHER}.4": 1000}, "no possible power"),
    ({"status_oid": f"{OTHER}.2", "status_ok": (1, 3)}, {f"{OTHER}.4": 73, f"{OTHER}.2": 3}, 73.0),
    ({"status_oid": f"{OTHER}.2", "status_ok": (1, 3)}, {f"{OTHER}.4": 0, f"{OTHER}.2": 2}, "status 2"),
    ({"status_oid": f"{OTHER}.2", "status_ok": (1, 3)}, {f"{OTHER}.4": 0}, "tells no status"),
]


async def test_any_pdu_is_read_by_oid_unit_scale_and_status() -> None:
    told = await read_all([({"kind": "snmp", "oid": f"{OTHER}.4", **keys}, objects) for keys, objects, _ in GENERIC])
    assert [(case, one) for case, one in zip(GENERIC, told, strict=True) if not is_right(*one, case[2])] == []


async def test_a_device_that_refuses_a_request_for_one_missing_object_is_asked_for_the_rest() -> None:
    objects = {f"{EATON}.6.5.1.3.0.4": 83}
    async with pdu(objects, refuses_missing=True) as at:
        assert await read(shelly(at, "eaton_outlet", numbers=(0, 4), secret="env:COMMUNITY")) == (83.0, "")
        watts, problem = await read(shelly(at, "eaton_outlet", numbers=(0, 5), secret="env:COMMUNITY"))
    assert (watts, "request refused" in problem) == (None, True)


def _is_other(right: frozenset[int], told: int) -> bool:
    return told not in right


@given(st.sampled_from(sorted(SNMP_NUMBERS)), st.data())
def test_whatever_a_status_column_says_that_is_not_known_as_right_gives_no_watts(
    kind: str, data: st.DataObject
) -> None:
    """The value itself is a good one: what is beside it decides."""
    numbers = tuple(range(1, SNMP_NUMBERS[kind] + 1))
    outlet = Outlet(kind=kind, numbers=numbers, oid=f"{OTHER}.4", status_oid=f"{OTHER}.2", status_ok=(1,))
    for part in snmp.parts(outlet):
        values = {one.oid: 50 for one in snmp.parts(outlet)}
        values |= {oid: 1 for one in snmp.parts(outlet) for oid in one.exponents}
        values |= {check.oid: min(check.right) for one in snmp.parts(outlet) for check in one.checks}
        assert snmp.watts(outlet, values) is not None
        for check in part.checks:
            told = data.draw(st.integers(-(1 << 31), 1 << 31).filter(partial(_is_other, check.right)))
            assert snmp.watts(outlet, {**values, check.oid: told}) is None


EM = {"id": 0, "a_act_power": 100.5, "b_act_power": 20.0, "c_act_power": 0.0, "total_act_power": 120.5}
EMETERS = {
    "emeters": [{"power": 100.5, "is_valid": True}, {"power": 20, "is_valid": True}, {"power": 0, "is_valid": True}]
}
PLUGS: list[tuple[MeterKind, dict[str, Any], Any, float | str]] = [
    ("shelly", {}, {"apower": 0.0, "errors": ["power_meter_failure"]}, "errors power_meter_failure"),
    ("shelly", {}, {"apower": 0.0, "errors": ["overpower"]}, "errors overpower"),
    ("shelly", {}, {"apower": 0.0, "errors": []}, 0.0),
    ("shelly", {}, {"apower": 12.5, "errors": None}, 12.5),
    ("shelly", {}, {"apower": None}, "missing or null"),
    ("shelly", {}, {"output": True}, "missing or null"),
    ("shelly", {}, {"apower": -47.1}, "negative"),
    ("shelly_pm1", {}, {"apower": 0.0, "errors": ["out_of_range:power"]}, "errors out_of_range"),
    ("shelly_em1", {}, {"act_power": 0.0, "errors": ["power_meter_failure"]}, "errors power_meter_failure"),
    ("shelly_em1", {}, {"act_power": 0.0, "errors": ["no_load"]}, 0.0),
    ("shelly_em1", {}, {"act_power": 44.0, "errors": [{"odd": 1}]}, "errors"),
    ("shelly_em", {}, EM, 120.5),
    ("shelly_em", {"phases": ("a", "c")}, EM, 100.5),
    ("shelly_em", {"phases": ("b",)}, {**EM, "a_errors": ["out_of_range:current"]}, 20.0),
    ("shelly_em", {}, {**EM, "a_errors": ["out_of_range:current"]}, "errors out_of_range:current"),
    ("shelly_em", {}, {**EM, "errors": ["ct_type_not_set"]}, "errors ct_type_not_set"),
    ("shelly_em", {}, {**EM, "errors": ["phase_sequence"]}, 120.5),
    ("shelly_em", {}, {**EM, "b_act_power": None}, "phase b"),
    ("shelly_em", {}, {**EM, "b_act_power": -20.0, "total_act_power": 80.5}, "phase b is negative"),
    ("shelly_gen1", {}, {"meters": [{"power": 0.0, "is_valid": False}]}, "is_valid is false"),
    ("shelly_gen1", {}, {"meters": [{"power": 0, "is_valid": True}], "relays": [{"overpower": True}]}, "overpower"),
    ("shelly_gen1", {}, {"meters": [{"power": 9, "overpower": 16.0, "is_valid": True}]}, 9.0),
    ("shelly_gen1", {}, EMETERS, "no meters[0]"),
    ("shelly_gen1_em", {"channel": 1}, EMETERS, 20.0),
    ("shelly_gen1_em", {"phases": ("a", "b", "c")}, EMETERS, 120.5),
    ("shelly_gen1_em", {"phases": ("a", "b", "c")}, {"emeters": EMETERS["emeters"][:2]}, "no emeters[2]"),
    ("shelly_gen1_em", {}, {"emeters": [{"power": 0, "is_valid": False}]}, "is_valid is false"),
    ("tasmota", {}, {"StatusSNS": {"Time": "2018-07-26T22:22:05"}}, "no energy sensor"),
    ("tasmota", {}, {"StatusSNS": {"ENERGY": {"Power": None}}}, "missing or null"),
    ("tasmota", {}, {"WARNING": "Need user=<username>&password=<password>"}, "wants a password"),
]


@pytest.mark.parametrize(("kind", "keys", "said", "expected"), PLUGS)
async def test_a_plug_says_watts_or_why_there_are_none(
    kind: MeterKind, keys: dict[str, Any], said: Any, expected: float | str
) -> None:
    async with plug(lambda _: web.json_response(said)) as at:
        watts, problem = await read(shelly(at, kind, secret="env:PLUG", **keys))
    assert watts == (expected if isinstance(expected, float) else None)
    assert problem == "" if isinstance(expected, float) else str(expected) in problem
    assert SECRETS["PLUG"] not in problem


NOW = "Fri, 27 Nov 2026 01:00:00 GMT"


def state(value: str, unit: str | None = "W", reported: str | None = "2026-11-27T00:59:30.1+00:00", **more: Any) -> Any:
    attributes = {} if unit is None else {"unit_of_measurement": unit}
    return {"entity_id": "sensor.plug", "state": value, "attributes": attributes, "last_updated": reported, **more}


STATES: list[tuple[Any, float | str]] = [
    (state("61.5"), 61.5),
    (state("0"), 0.0),
    (state("0.0615", "kW"), 61.5),
    (state("6.15e1"), 61.5),
    (state("unavailable"), "says unavailable"),
    (state("unknown"), "says unknown"),
    (state(""), "says nothing"),
    (state("on", "W"), "has no number"),
    (state("nan"), "has no number"),
    (state("12.5", "kWh"), "is an energy (kWh)"),
    (state("12.5", "Wh"), "is an energy (Wh)"),
    (state("12.5", "VA"), "unit is VA"),
    (state("21.5", "°C"), "no power"),
    (state("12.5", None), "no unit_of_measurement"),
    (state("-3"), "negative"),
    (state("61.5", reported="2026-11-27T00:40:00+00:00"), "last reported 1200 s ago"),
    (state("61.5", reported="2026-11-27T00:40:00+00:00", last_reported="2026-11-27T00:59:58+00:00"), 61.5),
    (state("61.5", reported=None), "no time"),
    (state("61.5", reported="2026-11-27T00:59:30"), "no time"),
    ({"message": "Entity not found."}, "no state"),
]


@pytest.mark.parametrize(("said", "expected"), STATES)
async def test_home_assistant_says_watts_or_why_there_are_none(said: Any, expected: float | str) -> None:
    asked: list[tuple[str, str]] = []

    def answer(request: web.Request) -> web.Response:
        asked.append((request.path, request.headers.get("Authorization", "")))
        return web.json_response(said, headers={"Date": NOW})

    async with plug(answer) as at:
        watts, problem = await read(shelly(at, "home_assistant", entity="sensor.plug", secret="env:TOKEN"))
    assert asked == [("/api/states/sensor.plug", f"Bearer {SECRETS['TOKEN']}")]
    assert watts == (expected if isinstance(expected, float) else None)
    assert problem == "" if isinstance(expected, float) else str(expected) in problem


@pytest.mark.parametrize("kind", ["home_assistant", *http.PATHS])
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (web.Response(status=401), "credentials rejected (HTTP 401)"),
        (web.Response(status=403), "credentials rejected (HTTP 403)"),
        (web.Response(status=404), "check kind, channel and entity"),
        (web.Response(status=302, headers={"Location": "http://127.0.0.1:1/login"}), "answered HTTP 302"),
        (web.Response(body=b"\n <!DOCTYPE html><title>Login</title>"), "a web page, such as a login page"),
        (web.Response(body=b'{"apower": 4'), "neither complete nor JSON"),
        (web.Response(body=b'{"apower": 4, "x": "' + b"x" * (2 << 20) + b'"}'), "over 1 MiB"),
        (web.Response(body=b""), "neither complete nor JSON"),
    ],
)
async def test_answers_that_are_none_are_told_in_a_sentence_without_the_secret(
    kind: MeterKind, answer: web.Response, why: str
) -> None:
    body = answer.body

    def again(_: web.Request) -> web.Response:
        return web.Response(status=answer.status, headers={**answer.headers}, body=body)

    async with plug(again) as at:
        watts, problem = await read(shelly(at, kind, entity="sensor.plug", secret="env:TOKEN"))
    assert watts is None
    assert why in problem
    assert SECRETS["TOKEN"] not in problem


# ---- Kasa and Tapo, through python-kasa ----


@contextlib.asynccontextmanager
async def kasa(realtime: Mapping[str, Any] | None, outlets: int = 0, features: str = "TIM:ENE") -> AsyncIterator[str]:
    """A Kasa plug or strip of the older kind: JSON, scrambled, over TCP."""
    children = [{"id": f"0{n}", "alias": f"o{n}", "state": 1, "on_time": 1} for n in range(outlets)]
    system = {
        "sw_ver": "1.0.6",
        "hw_ver": "1.0",
        "model": "HS110(EU)",
        "deviceId": "80",
        "alias": "plug",
        "err_code": 0,
        "feature": features,
        "mic_type": "IOT.SMARTPLUGSWITCH",
        "mac": "00:00:00:00:00:00",
        "relay_state": 1,
        **({"children": children, "child_num": outlets} if outlets else {}),
    }

    def one(module: str, method: str, child: str) -> Any:
        if (module, method) == ("system", "get_sysinfo"):
            return system
        if module == "time":
            now = {"year": 2026, "month": 11, "mday": 27, "hour": 1, "min": 0, "sec": 0}
            return {"index": 39, "err_code": 0} if method == "get_timezone" else {**now, "err_code": 0}
        if (module, method) == ("emeter", "get_realtime") and realtime is not None:
            return {**realtime, **({"power_mw": realtime["power_mw"] + 1000 * int(child)} if child else {})}
        if module == "emeter" and realtime is not None:
            return {"day_list": [], "month_list": [], "err_code": 0}
        return {"err_code": -1, "err_msg": "module not support"}

    def scramble(data: bytes, decode: bool) -> bytes:
        key, found = 171, bytearray()
        for byte in data:
            found.append(key ^ byte)
            key = byte if decode else found[-1]
        return bytes(found)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (size,) = struct.unpack(">I", await reader.readexactly(4))
                asked = json.loads(scramble(await reader.readexactly(size), decode=True))
                child = asked.pop("context", {}).get("child_ids", [""])[0][-1:]
                said = {m: {method: one(m, method, child) for method in methods} for m, methods in asked.items()}
                body = scramble(json.dumps(said).encode(), decode=False)
                writer.write(struct.pack(">I", len(body)) + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def realtime(**keys: Any) -> dict[str, Any]:
    return {"voltage_mv": 230000, "current_ma": 270, "power_mw": 61500, "total_wh": 12, "err_code": 0, **keys}


@pytest.mark.parametrize(
    ("said", "outlets", "channel", "features", "expected"),
    [
        (realtime(), 0, 0, "TIM:ENE", 61.5),
        (realtime(power_mw=0), 0, 0, "TIM:ENE", 0.0),
        ({"voltage": 230.1, "current": 0.2, "power": 47.1, "total": 1.5, "err_code": 0}, 0, 0, "TIM:ENE", 47.1),
        (realtime(), 3, 2, "TIM:ENE", 63.5),
        (realtime(), 3, 3, "TIM:ENE", "no outlet 3"),
        (realtime(power_mw=0, err_code=-10), 0, 0, "TIM:ENE", "error code -10"),
        ({"err_code": 0}, 0, 0, "TIM:ENE", "missing or null"),
        (None, 0, 0, "TIM", "no meter"),
    ],
)
async def test_kasa_plugs_and_strips_say_watts_or_why_there_are_none(
    said: Any, outlets: int, channel: int, features: str, expected: float | str
) -> None:
    async with kasa(said, outlets, features) as at:
        rack = RackMeters([shelly(at, "kasa", channel=channel)], SECRETS)
        for _ in range(2):  # the second poll uses the first one's connection
            await rack.poll()
            (told,) = rack.status()
            assert told["watts"] == (expected if isinstance(expected, float) else None), told
            assert told["problem"] == "" if isinstance(expected, float) else str(expected) in told["problem"]
        await rack.close()


@contextlib.asynccontextmanager
async def tapo(answers: Mapping[str, Any], password: str = SECRETS["PLUG"]) -> AsyncIterator[str]:
    """A Tapo plug that speaks KLAP: two handshakes, then encrypted requests."""
    sha = hashlib.sha256
    owner = sha(hashlib.sha1(b"me@example.com").digest() + hashlib.sha1(password.encode()).digest()).digest()
    seeds: list[bytes] = [b"", secrets.token_bytes(16)]

    def derived(name: bytes) -> bytes:
        return sha(name + seeds[0] + seeds[1] + owner).digest()

    async def handshake1(request: web.Request) -> web.Response:
        seeds[0] = await request.read()
        found = web.Response(body=seeds[1] + sha(seeds[0] + seeds[1] + owner).digest())
        found.set_cookie("TP_SESSIONID", "5")
        return found

    async def handshake2(request: web.Request) -> web.Response:
        right = await request.read() == sha(seeds[1] + seeds[0] + owner).digest()
        return web.Response(status=200 if right else 403)

    def answered(request: Mapping[str, Any]) -> dict[str, Any]:
        method = request["method"]
        if method == "multipleRequest":
            parts = [{"method": one["method"], **answered(one)} for one in request["params"]["requests"]]
            return {"result": {"responses": parts}, "error_code": 0}
        found = answers.get(method, -1)
        return {"error_code": found} if isinstance(found, int) else {"result": found, "error_code": 0}

    async def ask(request: web.Request) -> web.Response:
        sequence = struct.pack(">i", int(request.query["seq"]))
        cipher = Cipher(algorithms.AES(derived(b"lsk")[:16]), modes.CBC(derived(b"iv")[:12] + sequence))
        decryptor, unpadder = cipher.decryptor(), padding.PKCS7(128).unpadder()
        plain = decryptor.update((await request.read())[32:]) + decryptor.finalize()
        said = answered(json.loads(unpadder.update(plain) + unpadder.finalize()))
        encryptor, padder = cipher.encryptor(), padding.PKCS7(128).padder()
        padded = padder.update(json.dumps(said).encode()) + padder.finalize()
        secret = encryptor.update(padded) + encryptor.finalize()
        return web.Response(body=sha(derived(b"ldk")[:28] + sequence + secret).digest() + secret)

    app = web.Application()
    app.router.add_post("/app/handshake1", handshake1)
    app.router.add_post("/app/handshake2", handshake2)
    app.router.add_post("/app/request", ask)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await runner.cleanup()


INFO = {"device_id": "80", "model": "P110", "type": "SMART.TAPOPLUG", "fw_ver": "1.2.3", "hw_ver": "1.0"}
INFO |= {"mac": "00-00-00-00-00-00", "nickname": "cGx1Zw==", "device_on": True}  # type: ignore[dict-item]
PARTS = {"component_list": [{"id": "device", "ver_code": 2}, {"id": "energy_monitoring", "ver_code": 1}]}
P110 = {"component_nego": PARTS, "get_device_info": INFO}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({**P110, "get_energy_usage": {"current_power": 61500, "today_energy": 5, "month_energy": 9}}, 61.5),
        ({**P110, "get_energy_usage": {"current_power": 0, "today_energy": 5, "month_energy": 9}}, 0.0),
        ({**P110, "get_energy_usage": {"today_energy": 5, "month_energy": 9}}, "missing or null"),
        ({**P110, "get_energy_usage": -1002}, "its meter reports an error"),
        ({**P110, "component_nego": {"component_list": PARTS["component_list"][:1]}}, "no meter"),
    ],
)
async def test_tapo_plugs_say_watts_or_why_there_are_none(answers: Any, expected: float | str) -> None:
    async with tapo(answers) as at:
        watts, problem = await read(shelly(at, "tapo", user="me@example.com", secret="env:PLUG"))
    assert watts == (expected if isinstance(expected, float) else None), problem
    assert problem == "" if isinstance(expected, float) else str(expected) in problem


async def test_a_wrong_tapo_password_and_a_silent_or_other_device_are_told_without_the_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with tapo(P110, password="another") as at:
        watts, problem = await read(shelly(at, "tapo", user="me@example.com", secret="env:PLUG"))
    assert (watts, "credentials rejected" in problem) == (None, True)
    kinds: tuple[MeterKind, ...] = ("tapo", "kasa")
    for kind in kinds:
        at = f"127.0.0.1:{free_port()}"
        watts, problem = await read(shelly(at, kind, user="me@example.com", secret="env:PLUG"))
        assert watts is None
        assert "check at and kind" in problem or "timeout" in problem
        assert SECRETS["PLUG"] not in problem
    monkeypatch.setattr(kasa_client, "library", lambda: (_ for _ in ()).throw(Failure(kasa_client.MISSING)))
    watts, problem = await read(shelly(at, "tapo", user="me@example.com", secret="env:PLUG"))
    assert (watts, "pip install 'mlxrack[kasa]'" in problem) == (None, True)


@given(st.binary(max_size=200), st.floats(0, 2e9), st.sampled_from(sorted(http.PATHS)), st.integers(0, 3))
def test_no_bytes_give_an_impossible_power(raw: bytes, now_s: float, kind: str, channel: int) -> None:
    for found in (http.parse(kind, raw, channel), home_assistant.power(raw, now_s, 600.0)):
        assert not isinstance(found, float) or 0 <= found < http.MOST_W


BASE = {"name": "m", "at": "10.0.0.9", "nodes": ("n",)}
PLUG = {**BASE, "at": "http://10.0.0.9"}
GENERIC_OID = {"kind": "snmp", "oid": f"{OTHER}.4"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({**BASE, **GENERIC_OID}, ""),
        ({**BASE, **GENERIC_OID, "oid": f".{OTHER}.4", "status_oid": "1.3.6.1.4.1.9", "status_ok": (1,)}, ""),
        ({**BASE, "kind": "snmp"}, "meters[0].oid: is required"),
        ({**BASE, "kind": "snmp", "oid": "SNMPv2-SMI::enterprises.5"}, "meters[0].oid: is required in numbers"),
        ({**BASE, **GENERIC_OID, "status_oid": "1.3.6.1.4.1.9"}, "meters[0].status_ok: and status_oid"),
        ({**BASE, **GENERIC_OID, "status_ok": (1,)}, "meters[0].status_ok: and status_oid"),
        ({**BASE, **GENERIC_OID, "status_oid": "x", "status_ok": (1,)}, "meters[0].status_oid: must be in numbers"),
        ({**BASE, **GENERIC_OID, "numbers": (1,)}, "meters[0].numbers: snmp needs 0"),
        ({**BASE, "kind": "sentry3_outlet", "numbers": (1, 1)}, "meters[0].numbers: sentry3_outlet needs 3, got 2"),
        ({**BASE, "kind": "eaton_outlet", "numbers": (0, 1), "unit": "kW"}, "meters[0].unit: is for snmp only"),
        ({**PLUG, "kind": "shelly", "phases": ("a",)}, "meters[0].phases: is for shelly_em and shelly_gen1_em only"),
        ({**PLUG, "kind": "shelly_em", "phases": ("a", "a")}, "meters[0].phases: names a phase twice"),
        ({**PLUG, "kind": "shelly", "entity": "sensor.x"}, "meters[0].entity: is for home_assistant only"),
        ({**PLUG, "kind": "home_assistant", "entity": "sensor.x", "secret": "env:T"}, ""),
        ({**PLUG, "kind": "home_assistant", "secret": "env:T"}, "meters[0].entity: is required"),
        ({**PLUG, "kind": "home_assistant", "entity": "../config", "secret": "env:T"}, "meters[0].entity: is required"),
        ({**PLUG, "kind": "home_assistant", "entity": "sensor.x"}, "meters[0].secret: is required"),
        ({**BASE, "kind": "home_assistant", "entity": "sensor.x", "secret": "env:T"}, "meters[0].at: must begin with"),
        ({**BASE, "kind": "kasa"}, ""),
        ({**PLUG, "kind": "kasa"}, "meters[0].at: must be an address for kasa, like 10.0.0.9"),
        ({**BASE, "kind": "tapo", "user": "me@example.com", "secret": "env:T"}, ""),
        ({**BASE, "kind": "tapo", "secret": "env:T"}, "meters[0].user: is required"),
        ({**BASE, "kind": "tapo", "user": "me@example.com"}, "meters[0].secret: is required"),
        ({**BASE, "kind": "tapo", "user": "me@example.com", "secret": "hunter2"}, "meters[0].secret: is a literal"),
    ],
)
def test_keys_of_a_meter_that_its_kind_cannot_use_are_named(keys: dict[str, Any], expected: str) -> None:
    found = config_checks._check_meters([Meter(**keys)])
    assert [one[: len(expected)] for one in found] == ([expected] if expected else [])
    assert "hunter2" not in "".join(found)


async def test_doctor_has_a_line_for_each_meter() -> None:
    objects = {**three_phases((147, 53, 78)), **sensor(6, 9, 0, 0, 2)}
    async with pdu(objects) as at:
        meters = [
            Meter(name="whole", kind="sentry3_phases", at=at, numbers=(1,), nodes=("n1", "n2"), secret="env:COMMUNITY"),
            Meter(name="gone", kind="sensor", at=at, numbers=(7,), nodes=("n3",), secret="env:COMMUNITY"),
        ]
        rack = RackMeters(meters, SECRETS)
        await rack.poll()
        polled = rack.status()
        await rack.close()
    whole, gone = checks.meters(polled, [])
    assert whole == checks.Finding("meter whole", "ok", "278 W for n1, n2")
    assert (gone.what, gone.verdict, gone.key) == ("meter gone", "warning", "meters[1]")
    assert "says no power: operational status 2" in gone.seen
    (_, known) = checks.meters(polled, [{"meter": "gone", "nodes": ["n3"], "watts": 7.0, "problem": ""}])
    assert (known.verdict, known.seen) == ("ok", "7 W for n3 (as seen by the running agent)")


async def test_doctor_prints_its_lines_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """A line of the log among them would break its JSON."""
    meter = shelly(f"http://127.0.0.1:{free_port()}")
    node = Node(id="n1", rack="r")
    (polled,) = await doctor._polled(AgentConfig(node=node, meters=(meter,)), {})
    assert "unreachable" in polled["problem"]
    assert capfd.readouterr() == ("", "")
