"""The connection between two nodes, by hand: authentication, multiplexing, and what ends it."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from agent.mesh.signing import Key, RackKeys
from agent.wire.frames import Accepted, Cancel, Decoder, Done, Failed, Frame, Generate, Message, Tokens, encode
from tests.rack.harness import SECRET, Agent, model, rack, until

KEY = Key(SECRET)
_numbers = itertools.count()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with rack(tmp_path, [model(fake_step_s=0.01)], []) as (first, second):
        second.kill()
        yield first


def signed(secret: str = SECRET, *, nonce: str = "", t_ms: int | None = None, to: str = "n1") -> dict[str, str]:
    t_ms = time.time_ns() // 1_000_000 if t_ms is None else t_ms
    nonce = nonce or f"by-hand-{next(_numbers)}"
    asked = RackKeys([secret]).header
    header = asked(node="n2", to=to, method="GET", path="/peer/v1/link", body=b"", t_ms=t_ms, nonce=nonce)
    return {"Authorization": header}


@contextlib.asynccontextmanager
async def linked(agent: Agent) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    url = f"http://127.0.0.1:{agent.port}/peer/v1/link"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=signed()) as socket:
        await socket.send_str(KEY.proof(str((await socket.receive()).data).partition(" ")[2], "n2"))
        yield socket


async def status_of(agent: Agent, headers: dict[str, str]) -> int:
    async with aiohttp.ClientSession() as session:
        try:
            async with session.ws_connect(f"http://127.0.0.1:{agent.port}/peer/v1/link", headers=headers):
                return 101
        except aiohttp.WSServerHandshakeError as error:
            return error.status


def ask(number: int, *, tokens: int = 5, door: str = "n2", content: str = "hello") -> Generate:
    message = Message(role="user", content=content)
    return Generate(id=number, model="m", messages=(message,), max_tokens=tokens, temperature=0.0, door=door)


async def heard(socket: aiohttp.ClientWebSocketResponse, ends: int) -> list[Frame]:
    """Frames until this many answers have ended."""
    decoder, found = Decoder(), list[Frame]()
    while sum(isinstance(one, Done | Failed) for one in found) < ends:
        found += decoder.feed((await socket.receive(10)).data)
    return found


async def test_only_nodes_of_the_rack_connect_and_only_once(agent: Agent) -> None:
    assert await status_of(agent, {}) == 403
    assert await status_of(agent, {"Authorization": f"Bearer {SECRET}"}) == 403
    assert await status_of(agent, signed("another")) == 403
    assert await status_of(agent, signed(t_ms=1)) == 403
    assert await status_of(agent, signed(to="n2")) == 403, "meant for another node"
    once = signed()
    assert await status_of(agent, once) == 101
    assert await status_of(agent, once) == 403, "a signature is good once"


@pytest.mark.parametrize("said", ["0" * 64, KEY.proof("another number", "n2"), b"", None])
async def test_a_peer_that_cannot_sign_a_fresh_nonce_is_disconnected(agent: Agent, said: str | bytes | None) -> None:
    url = f"http://127.0.0.1:{agent.port}/peer/v1/link"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=signed()) as socket:
        await socket.receive()
        if said is not None:  # otherwise it sends nothing at all
            await (socket.send_str(said) if isinstance(said, str) else socket.send_bytes(encode(ask(1))))
        message = await socket.receive(10)
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.POLICY_VIOLATION)


async def test_answers_of_many_requests_are_multiplexed(agent: Agent) -> None:
    async with linked(agent) as socket:
        for number in (7, 8, 9):
            await socket.send_bytes(encode(ask(number, tokens=number, content=f"ask {number}")))
        found = await heard(socket, 3)
        for number in (7, 8, 9):
            mine = [one for one in found if getattr(one, "id", 0) == number]
            assert isinstance(mine[0], Accepted)
            assert isinstance(mine[-1], Done)
            assert sum(one.count for one in mine if isinstance(one, Tokens)) == number


async def test_a_cancelled_request_and_a_closed_connection_stop_the_engine(agent: Agent) -> None:
    async with linked(agent) as socket:
        for number in (1, 2):
            await socket.send_bytes(encode(ask(number, tokens=4000)))
        await asyncio.to_thread(until, lambda: agent.status()["models"][0]["in_flight"] == 2, "both run")
        await socket.send_bytes(encode(Cancel(id=1)) + encode(Cancel(id=99)))
        await asyncio.to_thread(until, lambda: agent.status()["models"][0]["in_flight"] == 1, "one was cancelled")
    await asyncio.to_thread(until, lambda: agent.status()["models"][0]["in_flight"] == 0, "the other went with it")


async def test_a_second_request_with_an_open_id_ends_the_connection_and_both(agent: Agent) -> None:
    async with linked(agent) as socket:
        await socket.send_bytes(encode(ask(1, tokens=4000)))
        await asyncio.to_thread(until, lambda: agent.status()["models"][0]["in_flight"] == 1, "it runs")
        await socket.send_bytes(encode(ask(1, tokens=4000)))
        async with asyncio.timeout(30):  # less than the first one takes
            while (await socket.receive()).type is aiohttp.WSMsgType.BINARY:
                pass
    await asyncio.to_thread(until, lambda: agent.status()["models"][0]["in_flight"] == 0, "neither is left")


async def test_a_looping_request_is_rejected(agent: Agent) -> None:
    async with linked(agent) as socket:
        await socket.send_bytes(encode(ask(1, door="n1")))
        (failed,) = await heard(socket, 1)
        assert isinstance(failed, Failed)
        assert (failed.code, failed.retryable) == ("loop", False)


@pytest.mark.parametrize(
    "noise", [b"\xc1\xc1", b"\x81\xa1f\xa7unknown", b"", "text"], ids=["bytes", "frame", "", "text"]
)
async def test_an_invalid_frame_ends_only_its_connection(agent: Agent, noise: bytes | str) -> None:
    async with linked(agent) as socket:
        await (socket.send_bytes(noise) if isinstance(noise, bytes) else socket.send_str(noise))
        if noise:
            message = await socket.receive(10)
            assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
        else:
            await socket.send_bytes(encode(ask(1)))
            assert isinstance((await heard(socket, 1))[-1], Done)
    answer = await asyncio.to_thread(agent.chat)
    assert answer.status == 200
