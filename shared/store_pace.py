"""Bounds on one HTTP exchange with the store: its time, however slowly bytes drip, and the size of its answer.

A socket's own timeout starts anew with every byte; this deadline does not. It grows with the bytes that were moved, so
that a large file takes as long as it needs at a tolerable pace.
"""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from botocore.awsrequest import AWSHTTPConnection, AWSHTTPConnectionPool, AWSHTTPSConnection, AWSHTTPSConnectionPool

from shared.errors import Retryable

CALL_S = 20.0
"""Time that an exchange may take whatever its size."""
FLOOR_BYTES_S = 32 << 10
"""Pace at which bytes extend the deadline: a quarter of a megabit per second."""
MOST_ANSWER_BYTES = 8 << 20
"""Limit of any other answer than an object: a listing of 1,000 keys takes 4 MB at most."""
NOT_A_STORE = "what answered is not an S3 store; check store.endpoint, and for a proxy or captive portal"

_most_bytes: ContextVar[int] = ContextVar("most_bytes", default=MOST_ANSWER_BYTES)


@contextmanager
def answer_of(most_bytes: int) -> Iterator[None]:
    """Let answers in this block have ``most_bytes`` of body, or what any answer may have if that is more."""
    before = _most_bytes.set(max(MOST_ANSWER_BYTES, most_bytes + (1 << 20)))
    try:
        yield
    finally:
        _most_bytes.reset(before)


class _PacedSocket:
    """A connection's socket, for one exchange at a time."""

    def __init__(self, sock: Any, call_s: float) -> None:
        self._sock, self._call_s = sock, call_s
        self._patience_s: float | None = sock.gettimeout()
        self.begin()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def begin(self) -> None:
        """A new exchange begins."""
        self._until_s, self._left_bytes = time.monotonic() + self._call_s, _most_bytes.get()

    def settimeout(self, value: float | None) -> None:
        self._patience_s = value
        self._sock.settimeout(value)

    def sendall(self, data: bytes) -> None:
        self._until_s += len(data) / FLOOR_BYTES_S
        self._sock.settimeout(self._left_s())
        self._sock.sendall(data)

    def makefile(self, *_: object, **__: object) -> io.BufferedReader:
        """The answer's bytes."""
        return io.BufferedReader(_Paced(self, self._sock.makefile("rb", buffering=0)))

    def receive(self, raw: Any, buffer: Any) -> int:
        """Read once, for at most the time that is left."""
        left_s = self._left_s()
        self._sock.settimeout(left_s if self._patience_s is None else min(self._patience_s, left_s))
        count: int = raw.readinto(buffer) or 0
        self._until_s += count / FLOOR_BYTES_S
        self._left_bytes -= count
        if self._left_bytes < 0:
            raise Retryable(f"its answer has more bytes than any that was asked for: {NOT_A_STORE}")
        return count

    def _left_s(self) -> float:
        if (left_s := self._until_s - time.monotonic()) <= 0:
            raise TimeoutError("the exchange as a whole took too long")
        return left_s


class _Paced(io.RawIOBase):
    def __init__(self, sock: _PacedSocket, raw: Any) -> None:
        self._sock, self._raw = sock, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._sock.receive(self._raw, buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Pacing:
    """Mixin for botocore's connections."""

    sock: Any
    call_s = CALL_S

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self.sock = _PacedSocket(self.sock, self.call_s)

    def putrequest(self, *args: Any, **more: Any) -> None:
        if self.sock is not None:
            self.sock.begin()
        super().putrequest(*args, **more)  # type: ignore[misc]


class _Straight:
    """Mixin for botocore's pools: a store answers itself, so a redirect is an answer, and not followed."""

    def urlopen(self, *args: Any, **more: Any) -> Any:
        return super().urlopen(*args, **more, redirect=False)  # type: ignore[misc]


def pool_classes(call_s: float) -> dict[str, type]:
    """Connection pools for a botocore HTTP session, by scheme."""
    own = {"call_s": call_s}
    http = type("PacedConnection", (_Pacing, AWSHTTPConnection), own)
    https = type("PacedTlsConnection", (_Pacing, AWSHTTPSConnection), own)
    return {
        "http": type("PacedPool", (_Straight, AWSHTTPConnectionPool), {"ConnectionCls": http}),
        "https": type("PacedTlsPool", (_Straight, AWSHTTPSConnectionPool), {"ConnectionCls": https}),
    }
