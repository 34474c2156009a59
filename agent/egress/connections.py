"""Connections to providers. Nothing is resolved or opened before a request is sent, a connection carries one request
(an answer too many cannot be taken for another request's), and the address that was checked is the one that is
connected to. No redirects, cookies, compression, proxies or credentials of the environment."""

import socket
import ssl
from collections.abc import Callable, Sequence
from typing import NamedTuple

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from agent.policy.addresses import Category, Misplaced, is_number, unfit
from agent.tasks import Lookups

CONNECT_S = 10.0
"""For the name, the connection and TLS together."""


class Endpoint(NamedTuple):
    """One address of a host, as text, and the port."""

    family: socket.AddressFamily
    host: str
    port: int


def addresses(host: str, port: int) -> list[Endpoint]:
    """What the system's resolver says. Blocks. Raises OSError."""
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # as text, a link-local address keeps its interface
    return [Endpoint(family, socket.getnameinfo(at, numeric)[0], port) for family, _, _, _, at in found]


def trust() -> ssl.SSLContext:
    """The system's certificates. No keys of TLS go to a file, whatever the environment says. Blocks."""
    context = ssl.create_default_context()
    context.keylog_filename = None  # type: ignore[assignment]
    return context


class Reach(NamedTuple):
    """How hosts are reached, and what is trusted. No configuration leads to another one than ``SYSTEM``; tests have
    their own, which map the hosts of providers to this machine."""

    addresses: Callable[[str, int], Sequence[Endpoint]] = addresses
    unfit: Callable[[str, Category], str] = unfit
    trust: Callable[[], ssl.SSLContext] = trust


SYSTEM = Reach()


class Connections:
    """The sessions to both categories of places; none is opened before it is used."""

    def __init__(self, reach: Reach, lookups: Lookups) -> None:
        self._reach, self._lookups = reach, lookups
        self._sessions: dict[Category, aiohttp.ClientSession] = {}

    async def session(self, category: Category) -> aiohttp.ClientSession:
        """The session for a category."""
        if category not in self._sessions:
            # reads the system's certificates
            context = await self._lookups.ask("trust", self._reach.trust)
            if category not in self._sessions:  # another request may have been here meanwhile
                self._sessions[category] = self._opened(category, context)
        return self._sessions[category]

    async def close(self) -> None:
        """Close all connections."""
        sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            await session.close()

    def _opened(self, category: Category, context: ssl.SSLContext) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=_Names(self._reach, self._lookups, category),
            use_dns_cache=False,
            ssl=context,
            limit=0,
            force_close=True,
            socket_factory=_Sockets(self._reach, category),
        )
        return aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_S),
        )


class _Names(AbstractResolver):
    """Resolves at each connection; one address that does not fit refuses the host."""

    def __init__(self, reach: Reach, lookups: Lookups, category: Category) -> None:
        self._reach, self._lookups, self._category = reach, lookups, category

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Its addresses. Raises OSError, Misplaced for a host with one of another category."""
        if is_number(host):
            raise Misplaced("its url must name the host, or give its address in the usual form")
        found = await self._lookups.ask((host, port), lambda: list(self._reach.addresses(host, port)))
        why = [why for one in found if (why := self._reach.unfit(one.host, self._category))]
        if why or not found:
            raise Misplaced(why[0] if why else "its host has no address")
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(hostname=host, host=one.host, port=one.port, family=one.family, proto=0, flags=flags)
            for one in found
        ]

    async def close(self) -> None:
        """Nothing to release."""


class _Sockets:
    """Makes the socket of each connection, from the address that it will connect to: the last place where it can be
    refused, and the only one that addresses written in a URL pass."""

    def __init__(self, reach: Reach, category: Category) -> None:
        self._reach, self._category = reach, category

    def __call__(self, info: "aiohttp.AddrInfoType") -> socket.socket:
        family, kind, protocol, _, address = info
        if why := self._reach.unfit(str(address[0]), self._category):
            raise Misplaced(why)
        return socket.socket(family, kind, protocol)
