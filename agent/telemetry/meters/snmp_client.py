"""Asks by SNMP v2c, through pysnmp in a thread and a loop of its own: the library reads files and decodes for long, and
the agent's loop must not wait for that. Only a rack that has such a device pays for it."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from agent.telemetry.sensors.reading import Failure

TRY_S = 1.0
TRIES = 3
PORT = 161


class NoAnswer(Failure):
    """The device says nothing at all."""


class SnmpClient:
    """Started by the first question. To be closed."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._engine: Any = None

    async def get(self, at: str, community: str, oids: Sequence[str]) -> dict[str, int]:
        """Integers by object identifier, those that exist. Raises Failure."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="snmp")
            self._thread.start()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._get(at, community, oids), self._loop))

    async def close(self) -> None:
        """End the thread."""
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._end(), loop))
        loop.call_soon_threadsafe(loop.stop)
        await asyncio.to_thread(self._thread.join)
        loop.close()

    async def _get(self, at: str, community: str, oids: Sequence[str]) -> dict[str, int]:
        from pysnmp.hlapi.v3arch import asyncio as hlapi

        host, _, port = at.rpartition(":") if ":" in at else (at, "", "")
        if self._engine is None:
            self._engine = hlapi.SnmpEngine()
        try:
            target = await hlapi.UdpTransportTarget.create((host, int(port or PORT)), timeout=TRY_S, retries=TRIES - 1)
        except Exception as error:  # noqa: BLE001  # its errors for names that do not resolve have no common base
            raise Failure(f"SNMP: {at} cannot be used ({type(error).__name__})") from None
        asked = [hlapi.ObjectType(hlapi.ObjectIdentity(oid)) for oid in oids]
        problem, status, _, found = await hlapi.get_cmd(
            self._engine, hlapi.CommunityData(community), target, hlapi.ContextData(), *asked, lookupMib=False
        )
        if problem:
            raise NoAnswer(f"SNMP: {problem}; is the community right, and may this node ask?")
        if status:
            raise Failure(f"SNMP: refused (error {int(status)})")
        return {str(oid): int(value) for oid, value in found if _is_number(value)}

    async def _end(self) -> None:
        if self._engine is not None:
            self._engine.close_dispatcher()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def _is_number(value: Any) -> bool:
    try:
        int(value)
    except (TypeError, ValueError, AttributeError):
        return False
    return True
