"""Questions to the system that may take long, a keychain's and a name server's, each in a daemon thread of its own and
none twice at a time: what does not answer must neither take the threads that the agent's other work waits for, nor keep
the agent from ending."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Hashable
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult


class Lookups:
    """What is being asked."""

    def __init__(self) -> None:
        self._asked: dict[Hashable, asyncio.Future[Any]] = {}

    async def ask(self, what: Hashable, question: Callable[[], Any]) -> Any:
        """The answer to ``question``, or to the one about the same that is still open. Raises what it raises."""
        answer = self._asked.get(what)
        if answer is None:
            loop = asyncio.get_running_loop()
            answer = loop.create_future()
            threading.Thread(target=_answer, args=(loop, answer, question), daemon=True, name="lookup").start()
            self._asked[what] = answer
            answer.add_done_callback(lambda done: (self._asked.pop(what, None), done.exception()))
        return await asyncio.shield(answer)


class Names(AbstractResolver):
    """Names of devices."""

    def __init__(self, lookups: Lookups) -> None:
        self._lookups = lookups

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Its addresses. Raises OSError."""
        found = await self._lookups.ask((host, port, family), lambda: _addresses(host, port, family))
        return list(found)

    async def close(self) -> None:
        """Nothing is held."""


def _addresses(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    return [
        ResolveResult(
            hostname=host,
            # as text, an address of the link keeps the interface that it is of
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


def _answer(loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[Any]", question: Callable[[], Any]) -> None:
    try:
        found, error = question(), None
    except Exception as raised:  # noqa: BLE001  # it is raised where it was asked
        found, error = None, raised
    with contextlib.suppress(RuntimeError):  # the agent has ended meanwhile
        if error is None:
            loop.call_soon_threadsafe(answer.set_result, found)
        else:
            loop.call_soon_threadsafe(answer.set_exception, error)
