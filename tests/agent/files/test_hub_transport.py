"""What the hub may send: no more JSON than a listing has, nothing compressed, and no drip."""

import itertools
from collections.abc import Iterator

import httpx2
import pytest

from agent.files import hub_transport
from agent.files.hub import Hub
from agent.files.hub_transport import ANSWER_S, AS_FILE, FLOOR_BYTES_S, MOST_JSON_BYTES, Bounded

JSON: dict[str, str] = {}
FILE = {"Accept-Encoding": AS_FILE}


class Endless(httpx2.SyncByteStream):
    def __init__(self, piece: bytes) -> None:
        self.piece, self.sent = piece, 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.sent += len(self.piece)
            yield self.piece


def client(stream: httpx2.SyncByteStream, tick_s: float = 0.0, encoding: str = "") -> httpx2.Client:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/api/moved":
            return httpx2.Response(307, headers={"Location": "/elsewhere"})
        return httpx2.Response(200, stream=stream, headers={"Content-Encoding": encoding} if encoding else {})

    now = itertools.count()
    clock = lambda: next(now) * tick_s  # noqa: E731
    return httpx2.Client(transport=Bounded(httpx2.MockTransport(answer), clock), follow_redirects=True)


@pytest.mark.parametrize("path", ["/api/models/org/m", "/api/moved", "/anything"])
def test_json_without_end_is_cut_off(path: str) -> None:
    stream = Endless(bytes(1 << 20))
    with client(stream) as one, pytest.raises(httpx2.RemoteProtocolError, match="more than"):
        one.get(f"http://hub{path}")
    assert stream.sent <= MOST_JSON_BYTES + (1 << 20)


def test_a_compressed_answer_is_not_unpacked() -> None:
    stream = Endless(b"x")
    with client(stream, encoding="gzip") as one, pytest.raises(httpx2.RemoteProtocolError):
        one.get("http://hub/api/models/org/m")
    assert stream.sent == 0


@pytest.mark.parametrize("headers", [JSON, FILE])
def test_a_drip_ends(headers: dict[str, str]) -> None:
    stream = Endless(b"x")
    with client(stream, tick_s=1.0) as one, pytest.raises(httpx2.ReadTimeout):
        one.get("http://hub/org/m/resolve/main/f", headers=headers)
    assert stream.sent < 2 * ANSWER_S


def test_a_large_file_takes_its_time() -> None:
    stream = Endless(bytes(2 * FLOOR_BYTES_S))
    with client(stream, tick_s=1.0) as one, one.stream("GET", "http://hub/f", headers=FILE) as answer:
        pieces = answer.iter_raw()
        for _ in range(2_000):
            next(pieces)
    assert stream.sent > 2 * MOST_JSON_BYTES


def test_the_hubs_client_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import get_session

    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
    Hub({"HF_ENDPOINT": "http://127.0.0.1:9"}, token="t")
    assert isinstance(get_session()._transport, hub_transport.Bounded)
