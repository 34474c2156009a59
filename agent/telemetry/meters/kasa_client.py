"""TP-Link's Kasa and Tapo plugs over python-kasa, of the extra ``kasa``: it is imported only where such a plug is
configured, and works in its own thread and event loop. A plug stays connected between polls, and is connected anew
after a failure."""

import asyncio
import contextlib
import logging
from typing import Any

from agent.telemetry.meters.answer import Power, says_no, watts, without
from agent.telemetry.meters.aside import Aside
from agent.telemetry.meters.http import MOST_W
from agent.telemetry.meters.snmp_client import NoAnswer
from agent.telemetry.sensors.reading import Failure

MISSING = "python-kasa is not installed: `python -m pip install 'mlxrack[kasa]'` into the agent's environment"


class KasaClient:
    """Connected plugs. Must be closed."""

    def __init__(self) -> None:
        self._aside = Aside("kasa")
        self._plugs: dict[tuple[str, str], asyncio.Task[Any]] = {}

    async def get(self, kind: str, at: str, user: str, password: str, channel: int) -> Power:
        """Watts of an outlet, ``channel`` of a strip. Raises Failure, NoAnswer when the plug does not answer."""
        return await self._aside.run(self._get(kind, at, user, password, channel))

    async def close(self) -> None:
        """Close the connections, and end the thread."""
        await self._aside.close(self._end)

    async def _get(self, kind: str, at: str, user: str, password: str, channel: int) -> Power:
        kasa = library()
        key = (kind, at)
        if (task := self._plugs.get(key)) is None:
            task = self._plugs[key] = asyncio.ensure_future(_connect(kind, at, user, password))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            new = True
        else:
            new = not task.done()
        try:
            plug = await asyncio.shield(task)  # a slow first connection goes on until the next poll
            if not new:
                await plug.update()
            return reading(plug, channel, kasa.Module.Energy)
        except BaseException as error:  # noqa: BLE001  # raised again, in words
            if task.done():
                await self._drop(key)
            raise _failure(kasa, error) from None

    async def _end(self) -> None:
        for key in list(self._plugs):
            await self._drop(key)

    async def _drop(self, key: tuple[str, str]) -> None:
        task = self._plugs.pop(key)
        task.cancel()
        if task.done() and not task.cancelled() and task.exception() is None:
            with contextlib.suppress(Exception):
                await task.result().disconnect()


def library() -> Any:
    """python-kasa. Raises Failure when it is not installed."""
    try:
        import kasa
    except ImportError:
        raise Failure(MISSING) from None
    logging.getLogger("kasa").setLevel(logging.CRITICAL)  # its messages may quote what was sent
    return kasa


def reading(plug: Any, channel: int, module: Any) -> Power:
    """Watts of a plug that was just updated. None with its own error code."""
    outlets = list(plug.children) or [plug]
    if channel >= len(outlets):
        return without(f"it has no outlet {channel}; the first is 0")
    energy = outlets[channel].modules.get(module)
    if energy is None:
        return says_no("this plug has no meter")
    try:
        code = dict(energy.status).get("err_code")
    except Exception as error:  # noqa: BLE001  # the library's, of an update that its meter answered with an error
        return says_no(f"its meter reports an error ({type(error).__name__})")
    if code:
        return says_no(f"error code {code}")
    return watts(energy.current_consumption, MOST_W, "its power")


async def _connect(kind: str, at: str, user: str, password: str) -> Any:
    """A plug, updated. Older Tapo firmware speaks AES where newer speaks KLAP."""
    from kasa import AuthenticationError, Credentials, Device, DeviceConfig, KasaException
    from kasa import DeviceConnectionParameters as Parameters
    from kasa import DeviceEncryptionType as Encryption
    from kasa import DeviceFamily as Family

    host, _, port = at.rpartition(":") if ":" in at else (at, "", "")
    ways = {"kasa": [(Family.IotSmartPlugSwitch, Encryption.Xor)]}.get(
        kind, [(Family.SmartTapoPlug, Encryption.Klap), (Family.SmartTapoPlug, Encryption.Aes)]
    )
    for last, (family, encryption) in ((n == len(ways) - 1, way) for n, way in enumerate(ways)):
        config = DeviceConfig(
            host=host,
            timeout=3,
            port_override=int(port) if port else None,
            credentials=Credentials(user, password) if kind == "tapo" else None,
            connection_type=Parameters(family, encryption, 2 if kind == "tapo" else None),
        )
        try:
            return await Device.connect(config=config)
        except KasaException as error:
            if last or isinstance(error, AuthenticationError | TimeoutError):
                raise
    raise AssertionError("unreachable")


def _failure(kasa: Any, error: BaseException) -> BaseException:
    """What to raise. The library's messages may quote what was sent."""
    if isinstance(error, kasa.AuthenticationError):
        return Failure("credentials rejected; check user and secret, and that the plug allows third-party clients")
    if isinstance(error, TimeoutError):
        return NoAnswer("timeout: no answer")
    if isinstance(error, kasa.DeviceError) and error.error_code:
        return Failure(f"answers with error code {int(error.error_code)}")
    if isinstance(error, kasa.KasaException):
        return NoAnswer("no answer as of such a plug; check at and kind")
    return error
