"""The GPU's recommended working set, queried from MLX in a short-lived process: the daemon never loads MLX."""

import asyncio
import sys
from collections.abc import Mapping, Sequence

import msgspec

from agent.process.loader_process import environment

TIMEOUT_S = 60.0
COMMAND = (sys.executable, "-P", "-m", "agent.loader", "--device")


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes are None where there is no GPU or it reports none; ``reason`` then explains why."""

    device: str = ""
    memory_bytes: int | None = None
    recommended_bytes: int | None = None
    reason: str = ""


async def ask(environ: Mapping[str, str], command: Sequence[str] = COMMAND) -> Device:
    """Query the device; never raises."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment(environ, 1),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        return Device(reason=f"cannot start a process ({error.strerror})")
    try:
        async with asyncio.timeout(TIMEOUT_S):
            said, _ = await process.communicate()
        device = msgspec.json.decode(said, type=Device)
    except TimeoutError:
        process.kill()
        await process.wait()
        return Device(reason=f"no answer within {TIMEOUT_S:.0f} s")
    except (msgspec.DecodeError, msgspec.ValidationError):
        return Device(reason=f"MLX returned no device information (exit status {process.returncode})")
    if device.recommended_bytes is None:
        return msgspec.structs.replace(device, reason="no GPU reports a recommended working set")
    return device


class Budget:
    """Bytes for all models of this node: configured, recommended by the GPU, or ``default``."""

    def __init__(self, configured: int, default: int) -> None:
        self._default, self._device, self._asked = default, Device(), False
        self.reason = ""
        self.configure(configured)

    def configure(self, configured: int) -> None:
        """Another budget is configured, or with 0 none."""
        self._configured = configured
        self.bytes, self.source = budget_bytes(configured, self._device, self._default)

    async def ask(self, environ: Mapping[str, str]) -> bool:
        """Ask the GPU, unless the budget is configured or it was asked before; whether it was asked."""
        if self._configured or self._asked:
            return False
        self._device, self._asked = await ask(environ), True
        self.reason = self._device.reason
        self.configure(self._configured)
        return True


def budget_bytes(configured: int, device: Device, default: int) -> tuple[int, str]:
    """The memory budget in bytes, and its source."""
    if configured:
        return configured, "configured"
    if device.recommended_bytes:
        return device.recommended_bytes, f"recommended for {device.device or 'the GPU'}"
    return default, "a share of the machine's memory"
