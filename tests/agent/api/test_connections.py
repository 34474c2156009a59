"""The listener in one process: TLS handshakes that do not end, no descriptor left, connections cut at any moment."""

import asyncio
import contextlib
import datetime
import errno
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from agent.api import connections
from agent.api.connection_limits import Caps, Table
from agent.api.connections import Listener
from agent.api.wire import Runner
from agent.config import AgentConfig, Limits, Listen, Live, Node
from shared.errors import Halt


async def until(done: Callable[[], Any], limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not done():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def listening(caps: Caps, tls: ssl.SSLContext | None = None, **limits: float) -> AsyncIterator[Listener]:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()

    async def unsent(request: web.Request) -> web.Response:
        assert request.transport is not None
        return web.Response(text=str(request.transport.get_write_buffer_limits()[1]))

    app.router.add_get("/", hello)
    app.router.add_get("/unsent", unsent)
    config = AgentConfig(node=Node(id="n", rack="r"), listen=Listen(port=0), limits=Limits(**limits))  # type: ignore[arg-type]
    runner = Runner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    listener = Listener(runner, Live(config), Table(caps), tls)
    await listener.start()
    try:
        yield listener
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def connected(listener: Listener) -> Any:
    with socket.create_connection(("127.0.0.1", listener.port), timeout=30) as one:
        one.setblocking(False)
        yield one


def is_closed(one: socket.socket) -> bool:
    try:
        return one.recv(1 << 16) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


async def answers(listener: Listener) -> bool:
    async with ClientSession() as session, session.get(f"http://127.0.0.1:{listener.port}/") as answer:
        return answer.status == 200


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    file: Path = tmp_path_factory.mktemp("tls") / "both.pem"
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


async def test_a_handshake_counts_as_headers(tls: ssl.SSLContext) -> None:
    caps = Caps(total=8, per_address=8, spare=2)
    async with listening(caps, tls, header_s=1.0) as listener, ClientSession() as session:
        url = f"https://127.0.0.1:{listener.port}/"
        async with session.get(url, ssl=False) as answer:
            assert await answer.text() == "hello"
        with connected(listener) as silent, connected(listener) as half, connected(listener) as plain:
            half.send(b"\x16\x03\x01\x02\x00\x01\x00")  # the begin of a ClientHello
            plain.send(b"GET / HTTP/1.1\r\n\r\n")
            await until(lambda: is_closed(plain))
            await until(lambda: is_closed(silent))
            await until(lambda: is_closed(half))
        await until(lambda: len(listener.table) <= 1)


async def test_a_connection_that_says_nothing_costs_little_with_tls_too(tls: ssl.SSLContext) -> None:
    count = 24
    caps = Caps(total=64, per_address=64, spare=2)
    async with listening(caps, tls) as listener, ClientSession() as session:
        async with session.get(f"https://127.0.0.1:{listener.port}/unsent", ssl=False) as answer:
            assert int(await answer.text()) <= 64 << 10, "nor one that does not read"
        with contextlib.ExitStack() as stack:
            tracemalloc.start()
            stack.callback(tracemalloc.stop)
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(count):
                stack.enter_context(connected(listener))
            await until(lambda: len(listener.table) >= count)
            await asyncio.sleep(0.2)
            assert (tracemalloc.get_traced_memory()[0] - before) / count < 100 << 10


async def test_one_in_a_handshake_is_closed_for_another(tls: ssl.SSLContext) -> None:
    async with listening(Caps(total=2, per_address=2, spare=0), tls) as listener, ClientSession() as session:
        with connected(listener) as first, connected(listener):
            await until(lambda: len(listener.table) == 2)
            async with session.get(f"https://127.0.0.1:{listener.port}/", ssl=False) as answer:
                assert answer.status == 200
            await until(lambda: is_closed(first))
            assert len(listener.table) == 2


async def test_without_a_descriptor_the_least_connection_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, complaints = asyncio.get_running_loop(), list[dict[str, Any]]()
    real, failures = loop.sock_accept, iter(range(5))

    async def accept(listening: socket.socket) -> Any:
        accepted = await real(listening)
        if len(listener.table) and next(failures, None) is not None:
            accepted[0].close()
            raise OSError(errno.EMFILE, "Too many open files")
        return accepted

    log = type("Log", (), {"warning": lambda _, event, **fields: complaints.append({"event": event, **fields})})()
    monkeypatch.setattr(connections, "log", log)
    monkeypatch.setattr(loop, "sock_accept", accept)
    async with listening(Caps(total=8, per_address=8, spare=2)) as listener, ClientSession() as session:
        with connected(listener) as idle:
            await until(lambda: len(listener.table) == 1)
            for _ in range(5):
                with contextlib.suppress(OSError), connected(listener):
                    await until(lambda: is_closed(idle) or not len(listener.table))
            await until(lambda: is_closed(idle))
        async with session.get(f"http://127.0.0.1:{listener.port}/") as answer:
            assert answer.status == 200
    assert [one["event"] for one in complaints] == ["accept_failed"], "once a minute"


async def test_one_that_was_reset_while_it_waited_has_no_address_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, nobody = asyncio.get_running_loop(), list[socket.socket]()
    real = loop.sock_accept

    async def accept(listening: socket.socket) -> Any:
        accepted, peer = await real(listening)
        if len(nobody) == 3:
            return accepted, peer
        nobody.append(accepted)
        return accepted, [None, (), ""][len(nobody) - 1]

    monkeypatch.setattr(loop, "sock_accept", accept)
    async with listening(Caps(total=8, per_address=8, spare=2)) as listener:
        for _ in range(3):
            with connected(listener) as one:
                await until(lambda one=one: is_closed(one))  # type: ignore[misc]
        assert await answers(listener)
        assert [one.fileno() for one in nobody] == [-1] * 3


async def test_a_bug_in_one_turn_of_a_loop_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(Caps(total=8, per_address=8, spare=2), header_s=0.2) as listener:

        def once(name: str, owner: Any) -> None:
            real, failures = getattr(owner, name), iter([KeyError("a"), TypeError("b")])

            def fails(*given: Any, **named: Any) -> Any:
                if (failure := next(failures, None)) is not None:
                    raise failure
                return real(*given, **named)

            monkeypatch.setattr(owner, name, fails)

        once("_admit", listener)
        once("overdue", listener.table)
        with capture_logs() as logged:
            for _ in range(2):
                with connected(listener) as one:
                    await until(lambda one=one: is_closed(one))  # type: ignore[misc]
            assert await answers(listener)
            with connected(listener) as silent:
                await until(lambda: is_closed(silent))
        assert {one["what"] for one in logged} == {"accept", "sweep"}
        assert len(logged) == 2, "once a minute each"


async def test_connections_cut_before_they_begin_leave_no_socket_behind() -> None:
    async with listening(Caps(total=1, per_address=1, spare=0)) as listener:
        pairs = [socket.socketpair() for _ in range(6)]
        for _, theirs in pairs:
            listener._admit(theirs, "a")  # each takes the place of the one before it, which has not begun
        for ours, _ in pairs[:-1]:
            ours.setblocking(False)
            await until(lambda ours=ours: is_closed(ours))  # type: ignore[misc]
        assert (len(listener.table), listener.table.counts.dropped) == (1, 5)
        assert [theirs.fileno() for _, theirs in pairs[:-1]] == [-1] * 5
        for ours, _ in pairs:
            ours.close()


async def test_many_connections_of_one_proxy_are_kept() -> None:
    async with listening(Caps(total=8, per_address=2, spare=2)) as listener, contextlib.AsyncExitStack() as stack:
        many = [stack.enter_context(connected(listener)) for _ in range(6)]
        await until(lambda: len(listener.table) == 6)
        assert not any(is_closed(one) for one in many)


async def test_headers_have_a_bound_in_all() -> None:
    line = b"X-Filler: " + b"y" * 4000 + b"\r\n"
    async with listening(Caps(total=8, per_address=8, spare=2), header_s=300) as listener:
        with connected(listener) as growing:
            for part in (b"GET / HTTP/1.1\r\n", *[line] * 30):
                with contextlib.suppress(OSError):  # it has been closed
                    await asyncio.get_running_loop().sock_sendall(growing, part)
                await asyncio.sleep(0)
            await until(lambda: is_closed(growing))
        large, url = {"X-Filler": "y" * 8000}, f"http://127.0.0.1:{listener.port}/"
        async with ClientSession() as session, session.get(url, headers=large) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("failure", "words", "code"),
    [
        (OSError(errno.EADDRINUSE, "x"), "address already in use; stop the other program", "port_in_use"),
        (OSError(errno.EACCES, "x"), "choose a higher listen.port", "cannot_listen"),
        (OSError(errno.EADDRNOTAVAIL, "x"), "no interface of this machine has this address; correct", "cannot_listen"),
        (OSError(errno.EMFILE, "x"), "too many open files; raise the limit", "cannot_listen"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; correct listen.host or", "cannot_listen"),
        (socket.gaierror(-2, "x"), "the name cannot be resolved; correct listen.host", "cannot_listen"),
    ],
)
async def test_each_reason_not_to_listen_has_its_own_advice(
    monkeypatch: pytest.MonkeyPatch, failure: OSError, words: str, code: str
) -> None:
    def fail(*_: object, **__: object) -> socket.socket:
        raise failure

    monkeypatch.setattr("agent.api.connections.socket.create_server", fail)
    with pytest.raises(Halt) as caught:
        async with listening(Caps(total=1, per_address=1, spare=0)):
            pass
    assert words in caught.value.message
    assert caught.value.code == code
