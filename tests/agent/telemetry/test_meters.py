"""Metered outlets: devices of every kind on real sockets, and their failures."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from typing import Any

import pytest
from aiohttp import encode_basic_auth, hdrs, web
from hypothesis import given
from hypothesis import strategies as st

from agent.config import KASA_KINDS, SNMP_NUMBERS, Meter, MeterKind
from agent.telemetry.meters import http, snmp
from agent.telemetry.meters.lookups import Lookups, Names
from agent.telemetry.meters.rack import RackMeters
from agent.telemetry.meters.snmp import Outlet
from scripts.seaweed import free_port

SECRETS = {"TOKEN": "token of home assistant", "PLUG": "plug password", "COMMUNITY": "rack"}


@contextlib.asynccontextmanager
async def plug(answer: Callable[[web.Request], web.StreamResponse | Any]) -> AsyncIterator[str]:
    """A device that answers every path with this handler."""

    async def handle(request: web.Request) -> web.StreamResponse:
        found = answer(request)
        if asyncio.iscoroutine(found):
            found = await found
        return found if isinstance(found, web.StreamResponse) else web.json_response(found)

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def pdu(
    objects: Mapping[str, int], community: str = "rack", *, refuses_missing: bool = False
) -> AsyncIterator[str]:
    """An SNMP agent on a real socket, by the same library; it reports missing objects as such, or refuses a request
    for one."""
    from pyasn1.codec.ber import decoder, encoder
    from pysnmp.proto.api import v2c

    def _value(number: int) -> Any:
        return v2c.Integer(number) if number < 1 << 31 else v2c.Gauge32(number)

    class Agent(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, address: Any) -> None:
            message, _ = decoder.decode(data, asn1Spec=v2c.Message())
            if bytes(v2c.apiMessage.get_community(message)) != community.encode():
                return  # as real ones do: no response
            asked = v2c.apiMessage.get_pdu(message)
            answer = v2c.apiMessage.get_response(message)
            found = [
                (oid, _value(objects[str(oid)]) if str(oid) in objects else v2c.NoSuchInstance(""))
                for oid, _ in v2c.apiPDU.get_varbinds(asked)
            ]
            if refuses_missing and any(str(oid) not in objects for oid, _ in found):
                v2c.apiPDU.set_error_status(v2c.apiMessage.get_pdu(answer), 2)  # noSuchName
            v2c.apiPDU.set_varbinds(v2c.apiMessage.get_pdu(answer), found)
            self.transport.sendto(encoder.encode(answer), address)

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Agent, local_addr=("127.0.0.1", 0))
    try:
        yield "127.0.0.1:{}".format(transport.get_extra_info("sockname")[1])
    finally:
        transport.close()


async def read(meter: Meter) -> tuple[float | None, str]:
    """Watts and problem after one poll."""
    rack = RackMeters([meter], SECRETS)
    try:
        await rack.poll()
        (state,) = rack.status()
        return state["watts"], state["problem"]
    finally:
        await rack.close()


def shelly(at: str, kind: MeterKind = "shelly", **more: Any) -> Meter:
    return Meter(name="one", kind=kind, at=at, nodes=("n1",), **more)


PLUGS: list[tuple[MeterKind, int, Any, str, float | None]] = [
    ("shelly", 0, {"id": 0, "apower": 47.11, "aenergy": {"total": 5.1}}, "/rpc/Switch.GetStatus?id=0", 47.1),
    ("shelly", 3, {"id": 3, "apower": 0.0}, "/rpc/Switch.GetStatus?id=3", 0.0),
    ("shelly_pm1", 0, {"apower": 9.5}, "/rpc/PM1.GetStatus?id=0", 9.5),
    ("shelly_em1", 1, {"act_power": 120.0}, "/rpc/EM1.GetStatus?id=1", 120.0),
    ("shelly_gen1", 1, {"meters": [{"power": 1}, {"power": 33.3, "is_valid": True}]}, "/status", 33.3),
    ("shelly_gen1", 0, {"meters": [{"power": 33.3, "is_valid": False}]}, "/status", None),
    ("shelly_gen1", 2, {"meters": [{"power": 33.3}]}, "/status", None),
    ("tasmota", 0, {"StatusSNS": {"ENERGY": {"Power": 12}}}, "/cm?cmnd=Status%208", 12.0),
    ("tasmota", 1, {"StatusSNS": {"ENERGY": {"Power": [5, 21]}}}, "/cm?cmnd=Status%208", 21.0),
    ("tasmota", 2, {"StatusSNS": {"ENERGY": {"Power": [5, 21]}}}, "/cm?cmnd=Status%208", None),
    ("tasmota", 0, {"StatusSNS": {"Time": "2018-07-26T22:22:05"}}, "/cm?cmnd=Status%208", None),
    ("shelly", 0, {"id": 0, "output": True}, "/rpc/Switch.GetStatus?id=0", None),
    ("shelly", 0, {"id": 0, "apower": -47.11}, "/rpc/Switch.GetStatus?id=0", None),
    ("shelly", 0, {"id": 0, "apower": None}, "/rpc/Switch.GetStatus?id=0", None),
    ("shelly", 0, {"id": 0, "apower": True}, "/rpc/Switch.GetStatus?id=0", None),
    ("shelly", 0, [1, 2], "/rpc/Switch.GetStatus?id=0", None),
]


@pytest.mark.parametrize(("kind", "channel", "said", "path", "expected"), PLUGS)
async def test_each_plug_kind_is_polled(
    kind: MeterKind, channel: int, said: Any, path: str, expected: float | None
) -> None:
    asked: list[str] = []

    def answer(request: web.Request) -> Any:
        asked.append(request.raw_path)
        return web.json_response(said)

    async with plug(answer) as at:
        watts, problem = await read(shelly(at, kind, channel=channel))
    assert asked == [path]
    assert watts == expected
    assert bool(problem) == (expected is None)


async def _never(request: web.Request) -> Any:
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda _: web.Response(status=500), "answered HTTP 500"),
        (lambda _: web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}), "answered HTTP 302"),
        (lambda _: web.Response(body=b"<html>"), "without a power reading"),
        (lambda _: web.Response(body=b'{"apower": 4'), "without a power reading"),
        (lambda _: web.Response(body=b'{"apower": 4, "x": "' + b"x" * (2 << 20) + b'"}'), "without a power reading"),
        (_never, "no answer within"),
    ],
)
async def test_a_plug_without_power_is_a_state_without_a_reading(
    monkeypatch: pytest.MonkeyPatch, answer: Any, why: str
) -> None:
    monkeypatch.setattr("agent.telemetry.meters.rack.TIMEOUT_S", 0.5)
    async with plug(answer) as at:
        watts, problem = await read(shelly(at))
    assert watts is None
    assert why in problem


async def test_an_unreachable_plug_is_reported() -> None:
    watts, problem = await read(shelly(f"http://127.0.0.1:{free_port()}"))
    assert (watts, problem) == (None, "unreachable (ClientConnectorError)")


async def test_authentication_per_device_and_reported_rejections() -> None:
    right = encode_basic_auth("admin", SECRETS["PLUG"])

    def basic(request: web.Request) -> Any:
        if request.headers.get(hdrs.AUTHORIZATION) != right:
            return web.Response(status=401)
        return {"StatusSNS": {"ENERGY": {"Power": 12}}}

    def digest(request: web.Request) -> Any:
        given = request.headers.get(hdrs.AUTHORIZATION, "")
        if not given.startswith("Digest ") or 'username="admin"' not in given or SECRETS["PLUG"] in given:
            challenge = 'Digest qop="auth", realm="shelly", nonce="abc", algorithm=SHA-256'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return {"apower": 30.0}

    async with plug(basic) as at:
        assert await read(shelly(at, "tasmota", secret="env:PLUG")) == (12.0, "")
        watts, problem = await read(shelly(at, "tasmota"))
        assert (watts, "credentials rejected (HTTP 401)" in problem) == (None, True)
    async with plug(digest) as at:
        assert await read(shelly(at, secret="env:PLUG")) == (30.0, "")
        watts, problem = await read(shelly(at, secret="env:NOT_SET"))
        assert watts is None
        assert "NOT_SET" in problem


RARITAN, APC = "1.3.6.1.4.1.13742.6", "1.3.6.1.4.1.318.1.1"
SENSOR = "1.3.6.1.2.1.99.1.1.1"
UNITS: list[tuple[MeterKind, tuple[int, ...], dict[str, int], float | None]] = [
    ("apc_device", (1,), {f"{APC}.26.4.3.1.5.1": 117}, 1170.0),
    ("apc_device", (1,), {f"{APC}.26.4.3.1.5.1": -1}, None),
    ("apc_legacy", (), {f"{APC}.12.1.16.0": 312}, 312.0),
    ("apc_outlet", (4,), {f"{APC}.26.9.4.3.1.7.4": 55}, 55.0),
    ("raritan_outlet", (1, 3), {f"{RARITAN}.5.4.3.1.4.1.3.5": 685, f"{RARITAN}.3.5.4.1.7.1.3.5": 1}, 68.5),
    ("raritan_outlet", (1, 3), {f"{RARITAN}.5.4.3.1.4.1.3.5": 685}, None),
    ("raritan_inlet", (1, 1), {f"{RARITAN}.5.2.3.1.4.1.1.5": 138, f"{RARITAN}.3.3.4.1.7.1.1.5": 0}, 138.0),
    ("servertech_cord", (1, 1), {"1.3.6.1.4.1.1718.4.1.3.3.1.3.1.1": 1701}, 1701.0),
    ("sensor", (7,), {f"{SENSOR}.{n}.7": v for n, v in ((4, 4230), (1, 6), (2, 8), (3, 1), (5, 1))}, 0.423),
    ("sensor", (7,), {f"{SENSOR}.{n}.7": v for n, v in ((4, 423), (1, 6), (2, 9), (3, 1), (5, 1))}, 42.3),
    ("sensor", (7,), {f"{SENSOR}.{n}.7": v for n, v in ((4, 143), (1, 6), (2, 9), (3, -2), (5, 1))}, 143.0),
    ("sensor", (7,), {f"{SENSOR}.{n}.7": v for n, v in ((4, 423), (1, 4), (2, 9), (3, 1), (5, 1))}, None),
    ("sensor", (7,), {f"{SENSOR}.{n}.7": v for n, v in ((4, 423), (1, 6), (2, 9), (3, 1), (5, 2))}, None),
]


@pytest.mark.parametrize(("kind", "numbers", "objects", "expected"), UNITS)
async def test_a_pdu_is_polled_by_snmp(
    kind: MeterKind, numbers: tuple[int, ...], objects: dict[str, int], expected: float | None
) -> None:
    assert snmp.watts(Outlet(kind=kind, numbers=numbers), objects) == (
        None if expected is None else pytest.approx(expected)
    )
    async with pdu(objects) as at:
        watts, problem = await read(shelly(at, kind, numbers=numbers, secret="env:COMMUNITY"))
    assert watts == (None if expected is None else round(expected, 1))
    assert bool(problem) == (expected is None)


async def test_a_wrong_snmp_community_is_reported() -> None:
    async with pdu({f"{APC}.12.1.16.0": 312}) as at:
        watts, problem = await read(shelly(at, "apc_legacy"))
    assert watts is None
    assert "check the community" in problem


@given(st.sampled_from(sorted(SNMP_NUMBERS)), st.data())
def test_no_snmp_values_give_an_impossible_power(kind: str, data: st.DataObject) -> None:
    outlet = Outlet(kind=kind, numbers=tuple(range(1, SNMP_NUMBERS[kind] + 1)))
    integers = st.integers(-(1 << 31), 1 << 32)
    values = {oid: data.draw(integers) for oid in snmp.oids(outlet) if data.draw(st.booleans())}
    found = snmp.watts(outlet, values)
    assert found is None or 0 <= found < snmp.MOST_W


async def test_a_window_has_mean_and_peak_power_energy_and_nodes() -> None:
    clock, power = [0.0], [10.0]
    async with plug(lambda _: {"apower": power[0]}) as at:
        shared = Meter(name="both", kind="shelly", at=at, nodes=("n1", "n2"))
        rack = RackMeters([shared], {}, clock=lambda: clock[0])
        for clock[0], power[0] in ((0.0, 10.0), (5.0, 40.0), (10.0, 20.0)):
            await rack.poll()
        clock[0] = 15.0
        (record,) = rack.drain()
    assert (record.meter, record.nodes) == ("both", ("n1", "n2"))
    assert (record.power_mw, record.power_max_mw) == (round(70 / 3 * 1000), 40_000)
    assert (record.energy_mj, record.covered_us) == (350_000, 15_000_000)
    clock[0] = 100.0
    await rack.poll()
    assert rack.status()[0]["problem"]
    rack.drain()
    clock[0] = 160.0
    assert rack.drain() == [], "what does not answer is not in the window"


async def test_outlets_of_one_device_are_polled_sequentially() -> None:
    now, most = 0, 0

    async def answer(_: web.Request) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return {"apower": 1.0}

    async with plug(answer) as at:
        meters = [Meter(name=f"o{n}", kind="shelly", at=at, nodes=(f"n{n}",), channel=n) for n in range(4)]
        rack = RackMeters(meters, {})
        await rack.poll()
    assert [state["watts"] for state in rack.status()] == [1.0] * 4
    assert most == 1


async def test_an_unresponsive_device_is_polled_once_and_blocks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.telemetry.meters.rack.TIMEOUT_S", 0.3)
    asked = 0

    async def silent(request: web.Request) -> Any:
        nonlocal asked
        asked += 1
        await asyncio.sleep(60)

    async with plug(silent) as dead, plug(lambda _: {"apower": 7.0}) as alive:
        meters = [Meter(name=f"dead {n}", kind="shelly", at=dead, nodes=("n",), channel=n) for n in range(6)]
        rack = RackMeters([*meters, Meter(name="alive", kind="shelly", at=alive, nodes=("m",))], {})
        began = time.monotonic()
        await rack.poll()
        assert time.monotonic() - began < 1.5
    assert asked == 1
    states = {state["meter"]: state for state in rack.status()}
    assert states["alive"]["watts"] == 7.0
    assert all("no answer" in states[f"dead {n}"]["problem"] for n in range(6))


async def test_an_unexpected_setting_affects_only_its_meter() -> None:
    async with pdu({f"{APC}.26.9.4.3.1.7.1": 143, f"{APC}.26.9.4.3.1.7.2": 207}) as at:
        environ = {"ONE": "rack", "TWO": "rack"}
        meters = [
            Meter(name=f"o{n}", kind="apc_outlet", at=at, numbers=(n,), nodes=(f"n{n}",), secret=f"env:{name}")
            for n, name in ((1, "ONE"), (2, "TWO"))
        ]
        rack = RackMeters(meters, environ)
        assert {state["problem"] for state in rack.status()} == {"no reading yet"}
        await rack.poll()
        assert [state["watts"] for state in rack.status()] == [143.0, 207.0]
        environ["ONE"] = "Gehäuse\u20ac"
        rack._secrets.clear()  # as a failed meter drops it
        await rack.poll()
        first, second = rack.status()
        assert first["watts"] is None
        assert "check the meter's settings" in first["problem"]
        assert (second["watts"], second["problem"]) == (207.0, "")
        environ["ONE"] = "rack"
        await rack.poll()
        assert [state["watts"] for state in rack.status()] == [143.0, 207.0]
        await rack.close()


async def test_a_slow_keychain_is_queried_once_and_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, over = list[str](), threading.Event()

    def slow(reference: str, environ: Mapping[str, str]) -> str:
        asked.append(reference)
        over.wait(30)
        return "geheim"

    monkeypatch.setattr("agent.telemetry.meters.rack.resolve", slow)
    monkeypatch.setattr("agent.telemetry.meters.rack.SECRET_S", 0.2)
    async with plug(lambda _: {"apower": 7.0}) as at:
        slow_one = Meter(name="m", kind="shelly", at=at, nodes=("n",), secret="op://a/b/c")
        rack = RackMeters([slow_one, Meter(name="open", kind="shelly", at=at, nodes=("o",))], {})
        for _ in range(3):
            polled = asyncio.create_task(rack.poll())
            longest, last = 0.0, time.monotonic()
            while not polled.done():
                await asyncio.sleep(0.01)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            assert longest < 0.15, "the loop went on"
        assert "secret lookup still pending" in rack.status()[0]["problem"]
        assert rack.status()[1]["watts"] == 7.0, "which is no fault of the device"
        over.set()
        await asyncio.sleep(0.1)  # it ends without a waiter
        for _ in range(3):
            await rack.poll()
        assert rack.status()[0]["watts"] == 7.0
        assert asked == ["op://a/b/c"], "once"


async def test_a_shared_secret_survives_another_meters_timeout() -> None:
    async with plug(lambda _: {"apower": 7.0}) as at:
        rack = RackMeters([Meter(name="m", kind="shelly", at=at, nodes=("n",), secret="env:PLUG")], SECRETS)
        real = rack._lookups.ask

        async def given_up(what: Hashable, question: Callable[[], Any]) -> Any:
            found = await real(what, question)
            rack._secrets.clear()  # as a failed meter with the same secret does
            return found

        rack._lookups.ask = given_up  # type: ignore[method-assign]
        await rack.poll()
        assert (rack.status()[0]["watts"], rack.problems) == (7.0, {})


async def test_an_unresponsive_name_server_blocks_no_agent_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, over, real = list[str](), threading.Event(), socket.getaddrinfo

    def silent(host: str, *more: Any, **others: Any) -> Any:
        if host.endswith(".test"):
            asked.append(host)
            over.wait(30)
        return real("127.0.0.1" if host.endswith(".test") else host, *more, **others)

    monkeypatch.setattr("agent.telemetry.meters.lookups.socket.getaddrinfo", silent)
    monkeypatch.setattr("agent.telemetry.meters.rack.TIMEOUT_S", 0.1)
    async with plug(lambda _: {"apower": 7.0}) as at, pdu({f"{APC}.12.1.16.0": 7}, "public") as unit_at:
        port, unit_port = at.rpartition(":")[2], unit_at.rpartition(":")[2]
        meters = [
            Meter(name=f"m{n}", kind="shelly", at=f"http://plug{n}.test:{port}", nodes=(f"n{n}",)) for n in range(40)
        ]
        unit = Meter(name="unit", kind="apc_legacy", at=f"unit.test:{unit_port}", nodes=("u",))
        rack = RackMeters([*meters, unit], {})
        for _ in range(3):
            await rack.poll()
            async with asyncio.timeout(1.0):
                assert await asyncio.to_thread(int, "7") == 7, "other work finds a thread"
        assert sorted(asked) == sorted([*(f"plug{n}.test" for n in range(40)), "unit.test"]), "each once"
        over.set()
        await asyncio.sleep(0.2)
        monkeypatch.setattr("agent.telemetry.meters.rack.TIMEOUT_S", 5.0)
        await rack.poll()
        assert {state["watts"] for state in rack.status()} == {7.0}
        await rack.close()


async def test_a_thread_start_failure_costs_one_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    lookups = Lookups()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError):
            await lookups.ask("x", lambda: 1)
    assert await lookups.ask("x", lambda: 2) == 2


async def test_a_link_local_address_keeps_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    name, number = socket.if_indextoname(1), 1
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, number))]
    monkeypatch.setattr("agent.telemetry.meters.lookups.socket.getaddrinfo", lambda *_, **__: found)
    (address,) = await Names(Lookups()).resolve("plug.local", 80, socket.AF_INET6)
    assert (address["host"], address["port"]) == (f"fe80::1%{name}", 80)


def test_every_meter_kind_has_a_reader() -> None:
    kinds = set(MeterKind.__args__)  # type: ignore[attr-defined]
    assert kinds == {*SNMP_NUMBERS, *http.PATHS, *KASA_KINDS, "home_assistant"}
    assert json.dumps(sorted(kinds))
