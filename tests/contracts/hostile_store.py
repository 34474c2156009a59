"""What may answer in a store's place: one fault for every request, on loopback."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from shared.store_s3 import S3Store

HTML = b"<html><head><title>Sign in</title></head><body><p>Welcome to the guest network</p></body></html>"
Fault = Callable[["Peer", str, str], None]
"""Answers one request: the connection, the method and the request's target."""


class Peer(NamedTuple):
    """A client's connection."""

    sock: socket.socket
    ended: threading.Event

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self, status: str, body: bytes, *headers: str, length: int | None = None) -> None:
        """One response."""
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
        self.send("\r\n".join(lines).encode() + body)

    def drip(self, data: bytes, pause_s: float = 0.05) -> None:
        """Byte by byte, until the client has had enough."""
        for n in range(len(data)):
            self.send(data[n : n + 1])
            if self.ended.wait(pause_s):
                return


@contextmanager
def hostile(fault: Fault, *, call_s: float = 20.0) -> Iterator[S3Store]:
    """An S3 client of a server with this fault. ``call_s`` bounds its calls."""
    listener, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()
    threads: list[threading.Thread] = []
    open_ones: list[socket.socket] = []

    def serve() -> None:
        while not ended.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            open_ones.append(sock)
            threads.append(threading.Thread(target=_serve, args=(Peer(sock, ended), fault), daemon=True))
            threads[-1].start()

    accepting = threading.Thread(target=serve, daemon=True)
    accepting.start()
    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield S3Store(
            endpoint=endpoint, bucket="b", access_key="k", secret_key="s", read_timeout_s=20, call_s=call_s, attempts=1
        )
    finally:
        ended.set()
        for sock in (listener, *open_ones):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (accepting, *threads):
            thread.join(10)


def _serve(peer: Peer, fault: Fault) -> None:
    with peer.sock, peer.sock.makefile("rb") as file:
        try:
            while (line := file.readline()).strip():
                method, target, _ = line.decode().split(" ", 2)
                size = 0
                while (header := file.readline()).strip():
                    name, _, value = header.decode("latin-1").partition(":")
                    size = int(value) if name.lower() == "content-length" else size
                file.read(size)
                fault(peer, method, target)
        except (OSError, ValueError):
            pass


def listing(*keys: str, head: str = "<IsTruncated>true</IsTruncated>", size: str = "1") -> bytes:
    """A page of a listing."""
    entries = "".join(
        f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>&quot;e&quot;</ETag></Contents>" for key in keys
    )
    return f'<?xml version="1.0"?><ListBucketResult><Name>b</Name>{head}{entries}</ListBucketResult>'.encode()
