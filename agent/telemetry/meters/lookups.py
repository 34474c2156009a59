"""Slow system calls (keychain, name server), each in its own daemon thread, and at most one at a time per subject: a
call that hangs must neither occupy the threads that the agent's other work needs, nor keep the agent from
exiting."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Hashable
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult


class Lookups:
    """Lookups in progress."""

    def __init__(self) -> None:
        self._asked: dict[Hashable, asyncio.Future[Any]] = {}

    async def ask(self, what: Hashable, question: Callable[[], Any]) -> Any:
        """The result of ``question``, or of the pending one for the same ``what``. Raises what it raises."""
        if (answer := self._asked.get(what)) is None:
            loop = asyncio.get_running_loop()
            answer = loop.create_future()
            threading.Thread(target=_answer, args=(loop, answer, question), daemon=True, name="lookup").start()
            self._asked[what] = answer
            answer.add_done_callback(lambda done: (self._asked.pop(what, None), done.exception()))
        return await asyncio.shield(answer)


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


def _answer(loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[Any]", question: Callable[[], Any]) -> None:
    try:
        found, error = question(), None
    except Exception as raised:  # noqa: BLE001  # raised again in the caller
        found, error = None, raised
    with contextlib.suppress(RuntimeError):  # the agent has exited meanwhile
        if error is None:
            loop.call_soon_threadsafe(answer.set_result, found)
        else:
            loop.call_soon_threadsafe(answer.set_exception, error)
