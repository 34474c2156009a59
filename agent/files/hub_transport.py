"""Bounds on what the hub, or whatever answers in its place, may send: time by progress, and the size of its JSON."""

import time
from collections.abc import Callable, Iterator

import httpx2

ANSWER_S = 60.0
"""Time that an answer may take whatever its size."""
FLOOR_BYTES_S = 32 << 10
"""Pace at which bytes extend it, so that a large file takes as long as it needs."""
MOST_JSON_BYTES = 32 << 20
"""A listing of a hundred thousand files."""

AS_FILE = "identity"
"""The Accept-Encoding of requests for files, which are counted by their readers; every other answer is JSON."""


class Bounded(httpx2.BaseTransport):
    """Passes requests on to another transport and bounds the answers."""

    def __init__(self, inner: httpx2.BaseTransport, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner, self._clock = inner, clock

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        is_file = request.headers.get("Accept-Encoding") == AS_FILE
        if not is_file:
            request.headers["Accept-Encoding"] = "identity;q=1"  # kept when it is redirected
        response = self._inner.handle_request(request)
        if not is_file and response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise httpx2.RemoteProtocolError("a compressed answer, which nobody asked for", request=request)
        stream = response.stream
        assert isinstance(stream, httpx2.SyncByteStream)
        response.stream = _Stream(stream, request, None if is_file else MOST_JSON_BYTES, self._clock)
        return response

    def close(self) -> None:
        self._inner.close()


class _Stream(httpx2.SyncByteStream):
    def __init__(
        self, inner: httpx2.SyncByteStream, request: httpx2.Request, most: int | None, clock: Callable[[], float]
    ) -> None:
        self._inner, self._request, self._most, self._clock = inner, request, most, clock

    def __iter__(self) -> Iterator[bytes]:
        began_s, size = self._clock(), 0
        for piece in self._inner:
            size += len(piece)
            if self._most is not None and size > self._most:
                raise httpx2.RemoteProtocolError(f"more than {self._most} bytes", request=self._request)
            if self._clock() - began_s > ANSWER_S + size / FLOOR_BYTES_S:
                raise httpx2.ReadTimeout("the answer as a whole took too long", request=self._request)
            yield piece

    def close(self) -> None:
        self._inner.close()


def client() -> httpx2.Client:
    """The client that huggingface_hub makes for itself, within these bounds."""
    from huggingface_hub.utils._http import default_client_factory

    made = default_client_factory()
    # it may go through a proxy, which a transport of our own would pass by
    made._transport = Bounded(made._transport)
    made._mounts = {where: Bounded(inner) if inner else None for where, inner in made._mounts.items()}
    return made
