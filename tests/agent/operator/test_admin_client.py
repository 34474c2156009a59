"""The admin token is sent to the agent that made it and to nobody else, whoever listens on its port by now."""

import asyncio
import contextlib
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from agent import daemon
from agent.api import wire
from agent.api.app import build
from agent.api.context import Context
from agent.config import AgentConfig, Live, Node
from agent.mesh.signing import listener_proof
from agent.operator.admin_client import PORT_NAME, AdminClient
from shared.errors import RackError, Retryable

TOKEN = "5ecret" * 8


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "admin.token").write_text(TOKEN + "\n")
    return tmp_path


def client_of(state: Path, port: int) -> AdminClient:
    (state / PORT_NAME).write_text(str(port))
    return AdminClient(AgentConfig(node=Node(id="n1", rack="r")), state)


@contextlib.asynccontextmanager
async def agent(token: str) -> AsyncIterator[int]:
    """The real routes of an agent, on a port of loopback."""
    parts: dict[str, Any] = dict.fromkeys(Context.__struct_fields__)
    parts["boundary"] = SimpleNamespace(taints=None, allowances=None)
    parts |= {"live": Live(AgentConfig(node=Node(id="n1", rack="r"))), "admin_token": token}
    runner = wire.Runner(build(Context(**parts)))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server: Any = site._server
        yield server.sockets[0].getsockname()[1]
    finally:
        await runner.cleanup()


class Impostor:
    """Listens where an agent has been; ``answers`` gets each request's bytes. Everything received is kept."""

    def __init__(self, answers: Callable[[bytes], bytes]) -> None:
        self.received, self._answers = b"", answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    while piece := connection.recv(65536):
                        self.received += piece
                        if not (answer := self._answers(piece)):
                            break
                        connection.sendall(answer)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


@contextlib.contextmanager
def impostor(answers: Callable[[bytes], bytes]) -> Iterator[Impostor]:
    made = Impostor(answers)
    try:
        yield made
    finally:
        made.close()


async def asked(state: Path, port: int, path: str = "/admin/v1/status") -> dict[str, Any]:
    """What the command line gets, from a thread of its own."""
    return await asyncio.to_thread(lambda: client_of(state, port)._call("GET", path, None, 20))


def http(body: bytes, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), more, body)


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "a web server": lambda _: http(b"<html>hello</html>"),
    "an empty object": lambda _: http(b"{}"),
    "another proof": lambda _: http(b'{"proof": "%s"}' % (b"0" * 64)),
    "no text": lambda _: http(b'{"proof": null}'),
    "a list": lambda _: http(b"[1]"),
    "the nonce as proof": lambda raw: http(b'{"proof": "%s"}' % raw.split(b"/proof/")[-1][:32]),
    "closes": lambda _: b"",
    "closes after its answer": lambda _: http(b"{}", b"Connection: close\r\n"),
    "no HTTP": lambda _: b"SSH-2.0-OpenSSH_9.9\r\n",
    "ten megabytes": lambda _: http(b"x" * 10_000_000),
    "a redirect": lambda _: b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS.keys())
def test_who_only_listens_there_gets_no_token(state: Path, answers: Callable[[bytes], bytes]) -> None:
    with impostor(answers) as stranger:
        client = client_of(state, stranger.port)
        for call in (client.status, lambda: client.order("unload", model="m"), lambda: client.why("req_1")):
            with pytest.raises(Retryable, match=r"is not this agent|is not an mlxrack agent|cannot be asked"):
                call()
        assert b"/admin/v1/proof/" in stranger.received
        assert TOKEN.encode() not in stranger.received
        assert b"Authorization" not in stranger.received


async def test_the_agent_is_recognised(state: Path) -> None:
    async with agent(TOKEN) as port:
        assert await asked(state, port, "/health") == {"status": "ok", "node": "n1"}
    async with agent("another token" * 4) as port:
        with pytest.raises(Retryable, match=r"does not know .*admin.token, so it is not this agent"):
            await asked(state, port)


async def test_who_passes_the_nonce_on_to_the_agent_gets_no_token(state: Path) -> None:
    """The agent runs elsewhere; the proof is for the address at which it was asked."""
    async with agent(TOKEN) as port:

        def passed_on(raw: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                upstream.sendall(raw)
                return upstream.recv(65536)

        with impostor(passed_on) as stranger:
            with pytest.raises(Retryable, match="is not this agent"):
                await asked(state, stranger.port)
            assert TOKEN.encode() not in stranger.received


async def test_a_second_connection_is_not_trusted_for_the_first(state: Path) -> None:
    """The right answer and then `Connection: close`: the token would go over a new connection, to anybody."""
    with impostor(lambda _: b"") as stranger:
        port = stranger.port

        def right(raw: bytes) -> bytes:
            nonce = raw.split(b"/proof/")[1][:32].decode()
            proof = listener_proof(TOKEN, nonce, ("127.0.0.1", port))
            return http(b'{"proof": "%s"}' % proof.encode(), b"Connection: close\r\n")

        stranger._answers = right
        with pytest.raises(RackError):
            await asked(state, port)
        assert TOKEN.encode() not in stranger.received


@pytest.mark.parametrize("nonce", ["", "x" * 32, "0" * 31, "0" * 65, "A" * 32, "0" * 32 + "%0a"])
async def test_only_a_nonce_is_answered(state: Path, nonce: str) -> None:
    async with agent(TOKEN) as port:
        with pytest.raises(RackError):
            await asked(state, port, f"/admin/v1/proof/{nonce}")


@pytest.mark.parametrize(("left", "right"), [("127.0.0.1", "::ffff:127.0.0.1"), ("fe80::1%en0", "fe80::1%en1")])
def test_an_address_is_the_same_from_both_ends(left: str, right: str) -> None:
    assert listener_proof(TOKEN, "0" * 32, (left, 1)) == listener_proof(TOKEN, "0" * 32, (right, 1))
    assert listener_proof(TOKEN, "0" * 32, (left, 1)) != listener_proof(TOKEN, "0" * 32, (left, 2))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0o644),
        lambda path: path.chmod(0o620),
        lambda path: path.write_text("guess"),
        lambda path: path.write_bytes(b"\xff" * 64),
        lambda path: path.rename(path.parent / "real").chmod(0o600) or path.symlink_to("real"),
        lambda path: (
            subprocess.run(["mkfifo", "-m", "600", path.with_suffix(".p")], check=True)
            and path.with_suffix(".p").replace(path)
        ),
    ],
)
def test_a_token_that_others_could_have_read_is_replaced(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    path = tmp_path / "admin.token"
    first = daemon.token(tmp_path, path.name)
    assert daemon.token(tmp_path, path.name) == first
    spoil(path)
    made = daemon.token(tmp_path, path.name)
    assert made != first
    assert (len(first), len(made), path.lstat().st_mode) == (64, 64, 0o100600)
    assert daemon.token(tmp_path, path.name) == made
