"""Somebody between two nodes: a TCP relay that records everything, and may alter it or add to it."""

import contextlib
import random
import socket
import threading

Recorded = dict[str, list[bytes]]


class Tap:
    """Relays connections to ``target`` on loopback. ``sent`` and ``answered`` are what went there and back, by
    connection; ``alter`` flips a bit in every chunk to the target, ``inject`` goes before the next one."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.sent: list[list[bytes]] = []
        self.answered: list[list[bytes]] = []
        self.alter = False
        self.inject = b""
        self.altered = self.injected = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a blocked accept() would keep it listening
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in list(self._open):
            _end(one)

    def everything(self) -> bytes:
        """All recorded bytes, one connection and direction after the other."""
        return b"\n".join(b"".join(chunks) for chunks in [*self.sent, *self.answered])

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=10)
            except OSError:
                _end(near)
                continue
            far.settimeout(None)
            self._open |= {near, far}
            for source, sink, kept in ((near, far, self.sent), (far, near, self.answered)):
                chunks = list[bytes]()
                kept.append(chunks)
                threading.Thread(target=self._pump, args=(source, sink, chunks, kept), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, chunks: list[bytes], kept: list[list[bytes]]) -> None:
        rng = random.Random(len(kept))
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                chunks.append(data)
                if kept is self.sent and self.inject and len(chunks) > 3:
                    sink.sendall(self.inject)
                    self.injected += 1
                if kept is self.sent and self.alter and len(chunks) > 3:
                    data = flipped(data, rng)
                    self.altered += 1
                sink.sendall(data)
        for one in (source, sink):
            _end(one)


def flipped(data: bytes, rng: random.Random) -> bytes:
    """The same bytes with one bit changed."""
    at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
