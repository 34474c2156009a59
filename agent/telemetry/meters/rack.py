"""Polls the rack's metered outlets, one request at a time per device, and returns each window's records.

A meter that does not answer is a state, never a value; its last reading holds for a few seconds and no longer.
"""

import asyncio
import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from agent.config import KASA_KINDS, SNMP_NUMBERS, Meter
from agent.telemetry.gauge import Gauge
from agent.telemetry.meters import home_assistant, http, snmp
from agent.telemetry.meters.answer import NoPower, Power
from agent.telemetry.meters.kasa_client import KasaClient
from agent.telemetry.meters.lookups import Lookups, Names
from agent.telemetry.meters.snmp_client import NoAnswer, Rejected, SnmpClient
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
    """``meters`` of the configuration. Call ``poll`` every few seconds, ``drain`` at a window's end."""

    def __init__(
        self,
        meters: Sequence[Meter],
        environ: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
        logs: bool = True,
    ) -> None:
        self._meters = tuple(meters)
        self._environ, self._clock, self._logs = environ, clock, logs
        self._gauges = {meter.name: Gauge() for meter in meters}
        self._last: dict[str, float] = {}
        self._energy_mj: dict[str, int] = {}
        self.problems: dict[str, str] = {}
        self._snmp = SnmpClient()
        self._kasa = KasaClient()
        self._lookups = Lookups()
        self._names = Names(self._lookups)
        self._secrets: dict[str, str] = {}

    async def poll(self) -> None:
        """Poll every device; meters that share an address in turn, since plugs accept few connections."""
        devices: dict[str, list[Meter]] = {}
        for meter in self._meters:
            devices.setdefault(meter.at, []).append(meter)
        await asyncio.gather(*(self._ask_all(meters) for meters in devices.values()))

    def drain(self) -> list[OutletReading]:
        """Readings since the last call."""
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
        """Every meter for display."""
        return [
            {
                "meter": meter.name,
                "nodes": list(meter.nodes),
                "watts": self._last.get(meter.name),
                "joules": self._energy_mj.get(meter.name, 0) / 1000,
                "problem": self.problems.get(meter.name, "" if meter.name in self._last else "no reading yet"),
            }
            for meter in self._meters
        ]

    async def _ask_all(self, meters: Sequence[Meter]) -> None:
        silent = ""
        for meter in meters:
            if silent:
                self._failed(meter, silent)  # the whole device is silent: do not wait for each of its outlets
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
                silent = f"timeout: no answer within {TIMEOUT_S:g} s"
                self._failed(meter, silent)
            except (aiohttp.ClientError, OSError) as error:
                silent = f"unreachable ({type(error).__name__})"
                self._failed(meter, silent)
            except Exception as error:  # noqa: BLE001  # one meter's settings must not stop the others
                self._failed(meter, f"poll failed ({type(error).__name__}); check the meter's settings")
            else:
                self._gauges[meter.name].add(self._clock(), watts)
                self._last[meter.name] = round(watts, 1)
                if self.problems.pop(meter.name, ""):
                    log.info("meter_back", meter=meter.name)

    async def _ask(self, meter: Meter) -> float:
        """Watts. Raises Failure with why there are none, and what the network raises."""
        found = await self._power(meter)
        if isinstance(found, NoPower):
            raise Failure(found.why)
        return found

    async def _power(self, meter: Meter) -> Power:
        if meter.kind in SNMP_NUMBERS:
            return await self._by_snmp(meter)
        if meter.kind in KASA_KINDS:
            password = await self._secret(meter)
            at = await self._address(meter.at)
            return await self._kasa.get(meter.kind, at, meter.user, password, meter.channel)
        body, now_s = await self._http(meter)
        if len(body) > MAX_OUTPUT_BYTES:
            return NoPower(f"answers without a power reading: over {MAX_OUTPUT_BYTES >> 20} MiB; check at and kind")
        if meter.kind == "home_assistant":
            return home_assistant.power(body, now_s, meter.age_s)
        return http.power(meter.kind, body, meter.channel, meter.phases)

    async def _by_snmp(self, meter: Meter) -> Power:
        outlet = snmp.of_meter(meter)
        community = await self._secret(meter) or "public"
        at, asked, needed = await self._address(meter.at), snmp.oids(outlet), snmp.needed(outlet)
        try:
            values = await self._snmp.get(at, community, asked)
        except Rejected:
            if asked == needed:
                raise
            values = await self._snmp.get(at, community, needed)  # a device that refuses all for one that is missing
        return snmp.power(outlet, values)

    async def _http(self, meter: Meter) -> tuple[bytes, float]:
        """The body of the device's answer, and the time (Unix seconds) by its clock, else by this machine's. Raises
        Failure."""
        path = _path(meter)
        password = await self._secret(meter)
        middlewares: tuple[Any, ...] = ()
        headers = {}
        if meter.kind == "home_assistant":
            headers["Authorization"] = f"Bearer {password}"
        elif password and meter.kind in ("tasmota", "shelly_gen1", "shelly_gen1_em"):
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
                raise Failure(f"credentials rejected (HTTP {answer.status}); check the meter's user and secret")
            if answer.status != 200:
                hint = "; check kind, channel and entity" if answer.status == 404 else ""
                raise Failure(f"answered HTTP {answer.status}{hint}")
            body = b""
            while len(body) <= MAX_OUTPUT_BYTES and (piece := await answer.content.read(1 << 16)):
                body += piece
            return body, _time_s(answer.headers.get("Date", ""))

    async def _secret(self, meter: Meter) -> str:
        """Resolved once, and again after the meter has failed: it may have been changed. Raises Failure while the
        lookup is pending; its result is used by the next poll."""
        if not meter.secret:
            return ""
        if (known := self._secrets.get(meter.secret)) is not None:
            return known
        try:
            async with asyncio.timeout(SECRET_S):
                return str(await self._lookups.ask(meter.secret, lambda: self._look_up(meter.secret)))
        except TimeoutError:
            raise Failure("secret lookup still pending (keychain or command)") from None

    def _look_up(self, reference: str) -> str:
        found = self._secrets[reference] = resolve(reference, self._environ)
        return found

    async def _address(self, at: str) -> str:
        """Numeric address of a device, resolved if given as a name. Raises OSError."""
        host, colon, port = at.rpartition(":") if ":" in at else (at, "", "")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            host = (await self._names.resolve(host))[0]["host"]
        return f"{host}{colon}{port}"

    def _failed(self, meter: Meter, why: str) -> None:
        self._secrets.pop(meter.secret, None)
        self._gauges[meter.name].add(self._clock(), None)
        self._last.pop(meter.name, None)
        if self._logs and self.problems.get(meter.name) != why:
            log.warning("meter_failed", meter=meter.name, reason=why)
        self.problems[meter.name] = why

    async def close(self) -> None:
        """Close the sockets."""
        await self._snmp.close()
        await self._kasa.close()


def _path(meter: Meter) -> str:
    if meter.kind == "home_assistant":
        return home_assistant.PATH.format(entity=meter.entity)
    return http.PATHS[meter.kind].format(channel=meter.channel)


def _time_s(date: str) -> float:
    """The time that a device tells, which is also that of what it reports; this machine's when it tells none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return time.time()
