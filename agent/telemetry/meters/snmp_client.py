"""SNMP v2c client over pysnmp, in its own thread and event loop, which is started only where such a device is
configured."""

from collections.abc import Sequence
from typing import Any

from agent.telemetry.meters.aside import Aside
from agent.telemetry.sensors.reading import Failure

TRY_S = 1.0
TRIES = 3
PORT = 161


class NoAnswer(Failure):
    """The device does not answer."""


class Rejected(Failure):
    """The device refuses the request."""


class SnmpClient:
    """Started by the first query. Must be closed."""

    def __init__(self) -> None:
        self._aside = Aside("snmp")
        self._engine: Any = None

    async def get(self, at: str, community: str, oids: Sequence[str]) -> dict[str, int]:
        """Integer values by object identifier, for those that exist. Raises Failure."""
        return await self._aside.run(self._get(at, community, oids))

    async def close(self) -> None:
        """End the thread."""
        await self._aside.close(self._end)

    async def _get(self, at: str, community: str, oids: Sequence[str]) -> dict[str, int]:
        from pysnmp.hlapi.v3arch import asyncio as hlapi

        host, _, port = at.rpartition(":") if ":" in at else (at, "", "")
        if self._engine is None:
            self._engine = hlapi.SnmpEngine()
        try:
            target = await hlapi.UdpTransportTarget.create((host, int(port or PORT)), timeout=TRY_S, retries=TRIES - 1)
        except Exception as error:  # noqa: BLE001  # its errors for unresolvable names have no common base
            raise Failure(f"SNMP: invalid or unresolvable address {at} ({type(error).__name__})") from None
        asked = [hlapi.ObjectType(hlapi.ObjectIdentity(oid)) for oid in oids]
        problem, status, _, found = await hlapi.get_cmd(
            self._engine, hlapi.CommunityData(community), target, hlapi.ContextData(), *asked, lookupMib=False
        )
        if problem:
            raise NoAnswer(f"SNMP: {problem}; check the community and the device's access list")
        if status:
            raise Rejected(f"SNMP: request refused (error {int(status)})")
        return {str(oid): int(value) for oid, value in found if _is_number(value)}

    async def _end(self) -> None:
        if self._engine is not None:
            self._engine.close_dispatcher()


def _is_number(value: Any) -> bool:
    try:
        int(value)
    except (TypeError, ValueError, AttributeError):
        return False
    return True
