"""Multiplexed frames on one connection: ordered, batched, bounded, and failures stay isolated."""

import asyncio

import pytest

from agent.wire import frame_writer
from agent.wire.frame_writer import FrameWriter


class Wire:
    """A connection that accepts messages on command."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.free = asyncio.Event()
        self.free.set()
        self.broken = False

    async def send(self, message: bytes) -> None:
        await self.free.wait()
        if self.broken:
            raise ConnectionResetError
        self.sent.append(message)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_simultaneous_frames_are_sent_as_one_message_in_order() -> None:
    wire = Wire()
    writer = FrameWriter(wire.send)
    for number in range(5):
        await writer.put(b"%d" % number)
    await settled()
    await writer.put(b"5")
    await settled()
    assert wire.sent == [b"01234", b"5"]
    await writer.end()


async def test_writers_wait_under_backpressure_and_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_writer, "MOST_WAITING", 10)
    monkeypatch.setattr(frame_writer, "MESSAGE_BYTES", 8)
    wire = Wire()
    writer = FrameWriter(wire.send)
    wire.free.clear()
    await writer.put(b"a" * 6)
    waits = [asyncio.create_task(writer.put(letter * 6)) for letter in (b"b", b"c", b"d")]
    await settled()
    assert [task.done() for task in waits] == [False, False, False]
    waits[1].cancel()
    wire.free.set()
    await asyncio.gather(*waits, return_exceptions=True)
    assert waits[1].cancelled()
    await settled()
    assert b"".join(wire.sent) == b"a" * 6 + b"b" * 6 + b"c" * 6 + b"d" * 6, "what was put is whole, whoever left"
    assert max(len(message) for message in wire.sent) <= 8
    await writer.end()


async def test_a_broken_connection_releases_all_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_writer, "MOST_WAITING", 4)
    wire = Wire()
    writer = FrameWriter(wire.send)
    wire.free.clear()
    waits = [asyncio.create_task(writer.put(b"x" * 6)) for _ in range(3)]
    await settled()
    wire.broken = True
    wire.free.set()
    found = await asyncio.gather(*waits, return_exceptions=True)
    assert all(isinstance(one, ConnectionResetError) for one in found)
    with pytest.raises(ConnectionResetError):
        await writer.put(b"y")
    with pytest.raises(ConnectionResetError):
        writer.put_now(b"y")
    await writer.end()
    await writer.end()


async def test_closing_releases_waiting_writers() -> None:
    wire = Wire()
    wire.free.clear()
    writer = FrameWriter(wire.send)
    wait = asyncio.create_task(writer.put(b"x" * (2 << 20)))
    await settled()
    assert not wait.done()
    writer.abort()
    with pytest.raises(ConnectionResetError):
        await wait
    assert writer.lost
