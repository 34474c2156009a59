"""Names of devices, looked up in threads of their own."""

import socket

from aiohttp.abc import AbstractResolver, ResolveResult

from agent.tasks import Lookups

__all__ = ["Lookups", "Names"]


class Names(AbstractResolver):
    """Resolver of device names."""

    def __init__(self, lookups: Lookups) -> None:
        self._lookups = lookups

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Its addresses. Raises OSError."""
        return list(await self._lookups.ask((host, port, family), lambda: _addresses(host, port, family)))

    async def close(self) -> None:
        """Nothing to release."""


def _addresses(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    return [
        ResolveResult(
            hostname=host,
            # as text, a link-local address keeps its interface
            host=socket.getnameinfo(address, numeric)[0],
            port=port,
            family=kind,
            proto=protocol,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )
        for kind, _, protocol, _, address in socket.getaddrinfo(
            host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
    ]
