"""Reads the rack's metered outlets, each device by one request at a time, and gives each window's records.

A meter that does not answer is a state, never a number; what it said last holds for a few seconds and no longer.
"""

import asyncio
import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp

from agent.config import SNMP_NUMBERS, Meter
from agent.telemetry.gauge import Gauge
from agent.telemetry.meters import http, snmp
from agent.telemetry.meters.lookups import Lookups, Names
from agent.telemetry.meters.snmp_client import NoAnswer, SnmpClient
from agent.telemetry.sensors.reading import MAX_OUTPUT_BYTES, Failure
from shared.errors import RackError
from shared.logs import get_logger
from shared.records import OutletReading
from shared.secrets import resolve

TIMEOUT_S = 4.0
SECRET_S = 2.0
POLL_S = 5.0

log = get_logger("agent.telemetry.meters")


class RackMeters:
    """``meters`` of the configuration. ``poll`` is to be called every few seconds, ``drain`` at a window's end."""

    def __init__(
        self, meters: Sequence[Meter], environ: Mapping[str, str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._meters = tuple(meters)
        self._environ = environ
        self._clock = clock
        self._gauges = {meter.name: Gauge() for meter in meters}
        self._last: dict[str, float] = {}
        self._energy_mj: dict[str, int] = {}
        self.problems: dict[str, str] = {}
        self._snmp = SnmpClient()
        self._lookups = Lookups()
        self._names = Names(self._lookups)
        self._secrets: dict[str, str] = {}

    async def poll(self) -> None:
        """Ask every device; those that share an address one after another, since plugs take few connections."""
        devices: dict[str, list[Meter]] = {}
        for meter in self._meters:
            devices.setdefault(meter.at, []).append(meter)
        await asyncio.gather(*(self._ask_all(meters) for meters in devices.values()))

    def drain(self) -> list[OutletReading]:
        """What was read since the last call."""
        now, found = self._clock(), []
        for meter in self._meters:
            seen = self._gauges[meter.name].close(now)
            if seen is not None and seen.covered_s > 0:
                energy_mj = round(seen.mean * seen.covered_s * 1000)
                self._energy_mj[meter.name] = self._energy_mj.get(meter.name, 0) + energy_mj
                found.append(
                    OutletReading(
                        meter=meter.name,
                        nodes=meter.nodes,
                        power_mw=round(seen.mean * 1000),
                        power_max_mw=round(seen.most * 1000),
                        energy_mj=energy_mj,
                        covered_us=round(seen.covered_s * 1e6),
                    )
                )
        return found

    def status(self) -> list[dict[str, Any]]:
        """Every meter for people."""
        return [
            {
                "meter": meter.name,
                "nodes": list(meter.nodes),
                "watts": self._last.get(meter.name),
                "joules": self._energy_mj.get(meter.name, 0) / 1000,
                "problem": self.problems.get(meter.name, "" if meter.name in self._last else "has not answered yet"),
            }
            for meter in self._meters
        ]

    async def _ask_all(self, meters: Sequence[Meter]) -> None:
        silent = ""
        for meter in meters:
            if silent:
                self._failed(meter, silent)  # the device, not the outlet: the others need not wait for it, too
                continue
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    watts = await self._ask(meter)
            except NoAnswer as error:
                silent = str(error)
                self._failed(meter, silent)
            except (Failure, RackError) as error:
                self._failed(meter, str(error))
            except TimeoutError:
                silent = f"no answer within {TIMEOUT_S:g} s"
                self._failed(meter, silent)
            except (aiohttp.ClientError, OSError) as error:
                silent = f"cannot be reached ({type(error).__name__})"
                self._failed(meter, silent)
            except Exception as error:  # noqa: BLE001  # whatever one makes of a setting, the others go on
                self._failed(meter, f"cannot be asked ({type(error).__name__}); are its settings right?")
            else:
                self._gauges[meter.name].add(self._clock(), watts)
                self._last[meter.name] = round(watts, 1)
                if self.problems.pop(meter.name, ""):
                    log.info("meter_back", meter=meter.name)

    async def _ask(self, meter: Meter) -> float:
        if meter.kind in SNMP_NUMBERS:
            outlet = snmp.Outlet(kind=meter.kind, numbers=meter.numbers, scale=meter.scale)
            community = await self._secret(meter) or "public"
            at = await self._address(meter.at)
            watts = snmp.watts(outlet, await self._snmp.get(at, community, snmp.oids(outlet)))
        else:
            watts = http.parse(meter.kind, await self._http(meter), meter.channel)
        if watts is None:
            raise Failure("answers, and says no power for this outlet; has it a meter, and is it the right number?")
        return watts

    async def _http(self, meter: Meter) -> bytes:
        """The device's answer. Raises Failure."""
        path = http.PATHS[meter.kind].format(channel=meter.channel)
        password = await self._secret(meter)
        middlewares: tuple[Any, ...] = ()
        headers = {}
        if password and meter.kind in ("tasmota", "shelly_gen1"):
            headers["Authorization"] = aiohttp.encode_basic_auth(meter.user, password)
        elif password:
            middlewares = (aiohttp.DigestAuthMiddleware(meter.user, password),)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=self._names), headers=headers, middlewares=middlewares
            ) as session,
            session.get(meter.at.rstrip("/") + path, allow_redirects=False) as answer,
        ):
            if answer.status in (401, 403):
                raise Failure("refuses the credentials; see its user and secret")
            if answer.status != 200:
                raise Failure(f"answered {answer.status}")
            body = b""
            while len(body) <= MAX_OUTPUT_BYTES and (piece := await answer.content.read(1 << 16)):
                body += piece
            return body

    async def _secret(self, meter: Meter) -> str:
        """Looked up once, and again after the meter has failed: it may have been changed.

        Raises Failure while that goes on; what is found then is there for the next question.
        """
        if not meter.secret:
            return ""
        known = self._secrets.get(meter.secret)
        if known is not None:
            return known
        try:
            async with asyncio.timeout(SECRET_S):
                return str(await self._lookups.ask(meter.secret, lambda: self._look_up(meter.secret)))
        except TimeoutError:
            raise Failure("its secret is still being looked up") from None

    def _look_up(self, reference: str) -> str:
        found = self._secrets[reference] = resolve(reference, self._environ)
        return found

    async def _address(self, at: str) -> str:
        """The numeric address of a device that is named. Raises OSError."""
        host, colon, port = at.rpartition(":") if ":" in at else (at, "", "")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            host = (await self._names.resolve(host))[0]["host"]
        return f"{host}{colon}{port}"

    def _failed(self, meter: Meter, why: str) -> None:
        self._secrets.pop(meter.secret, None)
        self._gauges[meter.name].gone(self._clock())
        self._last.pop(meter.name, None)
        if self.problems.get(meter.name) != why:
            log.warning("meter_failed", meter=meter.name, reason=why)
        self.problems[meter.name] = why

    async def close(self) -> None:
        """Give the sockets back."""
        await self._snmp.close()
