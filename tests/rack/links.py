"""TCP relays on loopback, one for each direction between two nodes, that fail on command.

All run in one thread with its own event loop. A link is healthy, late (each chunk is delayed), reset (open connections
get an RST, new ones are cut at once), deaf (half-open: everything is accepted and nothing arrives), mute
(one-way: requests arrive, answers do not) or cut (each answer ends after a number of bytes).
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Mode = Literal["healthy", "late", "reset", "deaf", "mute", "cut"]


class Link:
    """One relay; ``port`` is where it listens."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.mode: Mode = "healthy"
        self.amount = 0.0
        self.open: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Begin to relay."""
        self.server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    def become(self, mode: Mode, amount: float) -> None:
        """Change the fault; open connections are affected, too."""
        self.mode, self.amount = mode, amount
        if mode == "reset":
            for writer in list(self.open):
                _reset(writer)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "reset":
            _reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _reset(writer)
            return
        self.open |= {writer, far_writer}
        there = asyncio.create_task(self._relay(reader, far_writer, answers=False))
        back = asyncio.create_task(self._relay(far_reader, writer, answers=True))
        for task in (there, back):
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        for one in (writer, far_writer):
            self.open.discard(one)
            one.close()

    async def _relay(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
        sent = 0
        with contextlib.suppress(OSError, RuntimeError):
            while chunk := await source.read(1 << 16):
                if self.mode == "late":
                    await asyncio.sleep(self.amount)
                while self.mode == "deaf" or (self.mode == "mute" and answers):
                    await asyncio.sleep(0.05)  # nothing is lost for good: TCP would retransmit it
                if self.mode == "cut" and answers and sent + len(chunk) > self.amount:
                    sink.write(chunk[: max(0, int(self.amount) - sent)])
                    await sink.drain()
                    return
                sink.write(chunk)
                sent += len(chunk)
                await sink.drain()


class Links:
    """All relays of a rack. Use as a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._links: dict[tuple[str, str], Link] = {}

    def __enter__(self) -> "Links":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def port(self, source: str, sink: str, target: int) -> int:
        """The port at which ``source`` reaches ``sink``, which listens on ``target``."""
        link = self._links.get((source, sink))
        if link is None:
            link = self._links[(source, sink)] = Link(target)
            self._do(link.listen())
        return link.port

    def set(self, mode: Mode, amount: float = 0.0, *, source: str = "", sink: str = "") -> None:
        """Change every link from ``source`` to ``sink``; "" is any."""
        for (begins, ends), link in self._links.items():
            if source in ("", begins) and sink in ("", ends):
                self._do(_call(link, mode, amount))

    async def _close(self) -> None:
        for link in self._links.values():
            if link.server is not None:
                link.server.close()
            for task in link.tasks:
                task.cancel()
            for writer in link.open:
                writer.close()
        await asyncio.sleep(0)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


async def _call(link: Link, mode: Mode, amount: float) -> None:
    link.become(mode, amount)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with an RST instead of a FIN."""
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
