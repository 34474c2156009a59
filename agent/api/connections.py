"""The listener: it accepts connections itself, so that one costs nothing but its descriptor before it is admitted, and
closes those whose time is over. What is admitted and closed is decided in agent/api/connection_limits.py."""

import asyncio
import contextlib
import errno
import resource
import socket
import ssl
import time
from asyncio import sslproto
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import web

from agent.api.connection_limits import Caps, Connection, Phase, Table, caps_within, client_of, descriptors_for
from agent.config import AgentConfig, Live
from shared.errors import Halt
from shared.log_repeats import Repeats
from shared.logs import get_logger

BACKLOG = 512
SWEEP_S = 1.0
ACCEPT_RETRY_S = 0.1
TLS_BUFFER_BYTES = 16 << 10
"""A TLS record's most."""
_REMEDIES = {
    errno.EADDRINUSE: ("address already in use", "stop the other program or change listen.port"),
    errno.EACCES: ("not permitted", "ports below 1024 need privileges; choose a higher listen.port"),
    errno.EPERM: ("not permitted", "ports below 1024 need privileges; choose a higher listen.port"),
    errno.EADDRNOTAVAIL: ("no interface of this machine has this address", "correct listen.host"),
    errno.EAFNOSUPPORT: ("this machine does not have this kind of address", "correct listen.host"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many open files on this machine", "end other programs"),
}

log = get_logger("agent.api")


class Tracked:
    """A connection as its protocol reports on it."""

    def __init__(self, table: Table, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self._table, self._connection, self._loop = table, connection, loop

    def opened(self, transport: asyncio.BaseTransport) -> None:
        """It is ready to read, TLS included."""
        assert isinstance(transport, asyncio.Transport)
        self._connection.cut, self._connection.unsent = transport.abort, transport.get_write_buffer_size

    def lost(self) -> None:
        """It is closed."""
        self._table.leave(self._connection)

    def enters(self, phase: Phase) -> None:
        """A request of it begins or has ended."""
        self._table.move(self._connection, phase, self._loop.time())

    def proved(self) -> None:
        """Its client has shown who it is."""
        if not self._connection.known:
            self._table.move(self._connection, "busy", self._loop.time(), known=True)

    def serves(self, path: str) -> bool:
        """Whether a request for this path is answered now."""
        return self._table.serves(path)

    def stalled(self) -> None:
        """The client does not read as fast as it is written to."""
        self._table.stalled(self._connection, self._loop.time())

    def reads(self) -> None:
        """The client has read nearly everything."""
        self._table.reads(self._connection, self._loop.time())


class Listener(web.BaseSite):
    """Accepts connections on the configured address, for a runner whose server makes protocols with a ``tracked``. With
    ``tls`` the handshake must be done within ``limits.header_s``, too."""

    def __init__(self, runner: web.AppRunner, live: Live, table: Table, tls: ssl.SSLContext | None) -> None:
        super().__init__(runner, ssl_context=tls)
        if tls is not None:
            # asyncio makes this buffer for each connection before its handshake: 256 KiB for one that says nothing
            sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES
        self._live, self.table = live, table
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._complaints = Repeats()

    @property
    def name(self) -> str:
        """Its URL."""
        return f"{'https' if self._ssl_context else 'http'}://{self._live.now.listen.host}:{self.port}"

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Bind and accept. Raises Halt with a remedy when the address cannot be bound."""
        await super().start()
        host, port = self._live.now.listen.host, self._live.now.listen.port
        try:
            self._sockets = await _bound(host, port)
        except OSError as error:
            raise _cannot_listen(host, port, error) from None
        for listening in self._sockets:
            self._begin(self._turns("accept", partial(self._accept, listening)))
        self._begin(self._turns("sweep", self._sweep))

    async def stop(self) -> None:
        """Accept no more; connections stay with the runner."""
        await super().stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listening in self._sockets:
            listening.close()

    def _begin(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _turns(self, what: str, turn: Callable[[], Awaitable[None]]) -> None:
        """A loop that no bug in one turn ends: without it nobody would be served until a restart."""
        while True:
            try:
                await turn()
            except Exception:
                if (repeated := self._complaints.take(what, time.monotonic())) is not None:
                    log.error("listener_failed", what=what, repeated=repeated, exc_info=True)
                await asyncio.sleep(ACCEPT_RETRY_S)

    async def _accept(self, listening: socket.socket) -> None:
        try:
            accepted, peer = await asyncio.get_running_loop().sock_accept(listening)
        except ConnectionError:
            return  # it was closed while it waited
        except OSError as error:
            self._exhausted(error)
            await asyncio.sleep(ACCEPT_RETRY_S)
            return
        if not peer:  # macOS names nobody for one that was reset while it waited
            accepted.close()
            return
        try:
            self._admit(accepted, client_of(str(peer[0]), *peer[3:], proxies=self._live.now.listen.trusted_proxies))
        except BaseException:
            accepted.close()
            raise
        # others have their turn while many connect at once
        await asyncio.sleep(0)

    def _exhausted(self, error: OSError) -> None:
        """No descriptor is left: something else took those that are kept for it. The least of ours makes room."""
        if (repeated := self._complaints.take("exhausted", time.monotonic())) is not None:
            log.warning("accept_failed", reason=error.strerror, open=len(self.table), repeated=repeated)
        if (rival := self.table.first_to_close(asyncio.get_running_loop().time())) is not None:
            self.table.counts.dropped += 1
            self._close(rival)

    def _admit(self, accepted: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        connection, rival = self.table.enter(address, loop.time())
        if rival is not None:
            rival.cut()
        if connection is None:
            accepted.close()
            return
        made: list[Any] = []
        task = self._begin(self._serve(accepted, connection, made))
        connection.cut = task.cancel
        task.add_done_callback(lambda _: self._served(accepted, connection, made))

    async def _serve(self, accepted: socket.socket, connection: Connection, made: list[Any]) -> None:
        """Hand a connection to a new protocol, which is then in ``made``, after the TLS handshake if there is one."""
        loop, server = asyncio.get_running_loop(), self._runner.server
        assert server is not None

        def protocol() -> Any:
            made.append(server())
            made[0].tracked = Tracked(self.table, connection, loop)
            return made[0]

        limit_s = self._live.now.limits.header_s if self._ssl_context else None
        # one that speaks no TLS, or has gone
        with contextlib.suppress(OSError):
            await loop.connect_accepted_socket(protocol, accepted, ssl=self._ssl_context, ssl_handshake_timeout=limit_s)

    def _served(self, accepted: socket.socket, connection: Connection, made: list[Any]) -> None:
        """What is left of a connection that did not come about. A task that is cancelled before it runs has made no
        protocol, and with it no transport, which would close the socket."""
        if not made:
            accepted.close()
        if not made or made[0].transport is None:
            self.table.leave(connection)

    def _close(self, connection: Connection) -> None:
        self.table.leave(connection)
        connection.cut()

    async def _sweep(self) -> None:
        """Close connections whose time is over."""
        loop, limits = asyncio.get_running_loop(), self._live.now.limits
        await asyncio.sleep(min(SWEEP_S, limits.header_s / 4))
        late = self.table.overdue(loop.time(), header_s=limits.header_s, idle_s=limits.idle_s)
        for connection in late + self.table.unread(loop.time(), limits.token_gap_s):
            self.table.counts.overdue += 1
            self._close(connection)


def table_for(live: Live) -> Table:
    """The table of a node's connections, with caps that leave open files for its other work."""
    table = Table(_caps(live.now))

    def take(config: AgentConfig) -> None:
        table.caps = _caps(config)

    live.follow(take)
    return table


def _caps(config: AgentConfig) -> Caps:
    """Raises the process's soft limit of open files as far as the caps need it and the hard limit allows."""
    limits, models, peers = config.limits, len(config.models), len(config.peers.nodes)
    descriptors = _raised(descriptors_for(limits.connections, models=models, peers=peers))
    caps = caps_within(descriptors, limits.connections, limits.connections_per_address, models=models, peers=peers)
    if caps.total < limits.connections:
        log.warning("fewer_connections", connections=caps.total, configured=limits.connections, open_files=descriptors)
    return caps


def _raised(wanted: int) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
        except (ValueError, OSError):  # the system's own limit is lower
            return soft
    return soft


async def _bound(host: str, port: int) -> list[socket.socket]:
    """A listening socket for each address of the host."""
    loop = asyncio.get_running_loop()
    flags = socket.AI_PASSIVE
    found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((one[0], one[4]) for one in found):
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
            sockets[-1].setblocking(False)
    except BaseException:
        for one in sockets:
            one.close()
        raise
    return sockets


def _cannot_listen(host: str, port: int, error: OSError) -> Halt:
    if isinstance(error, socket.gaierror):
        why, remedy = "the name cannot be resolved", "correct listen.host"
    else:
        seen = (error.strerror or type(error).__name__).partition(" (while")[0]
        why, remedy = _REMEDIES.get(error.errno or 0, (seen, "correct listen.host or listen.port"))
    code = "port_in_use" if error.errno == errno.EADDRINUSE else "cannot_listen"
    return Halt(f"listen on {host}:{port}: {why}; {remedy}", code=code)
