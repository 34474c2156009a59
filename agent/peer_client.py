"""HTTP to the other nodes: beats, and requests that a peer answers. Every request is signed with the rack secret, and
every answer has to be. Never retries; who calls decides."""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Callable

import aiohttp
import msgspec

from agent.frames import Accepted, Answer, Ask, Decoder, Done, Embedded, Failed, Tokens, encode
from agent.peers import Beat
from agent.signing import ANSWER_HEADER, Key, mismatch
from shared.errors import RackError, Refused, Retryable

CONNECT_TIMEOUT_S = 2.0
MAX_BEAT_BYTES = 1 << 20
_MAX_ERROR_BYTES = 8 << 10
_READ_BYTES = 1 << 16

_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
_ENDS = (Done, Failed)
_ANSWERS = (Accepted, Tokens, Embedded, Done, Failed)

_WHY = {
    "not_a_peer": "refuses the rack secret; peers.secret must be the same on all nodes",
    "protocol_mismatch": "does not speak this node's protocol; update the older of the two",
    "clock_skew": "refuses a signature whose clock is so far from its own; set both clocks by the same source",
}


class PeerClient:
    """One session to all peers. ``secret`` is the rack's; ``node`` is who asks."""

    def __init__(
        self, secret: str, node: str, *, wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    ) -> None:
        self._key = Key(secret)
        self._node = node
        self._wall_ms = wall_ms
        self._born = secrets.token_hex(8) + "."
        self._count = itertools.count()
        self._session: aiohttp.ClientSession | None = None
        self._open: dict[str, set[aiohttp.ClientResponse]] = {}
        self._waiting: dict[str, dict[asyncio.Task[object], bool]] = {}

    async def beat(self, node: str, url: str, timeout_s: float) -> Beat:
        """What the peer says of itself. Raises Retryable when it does not answer in time, Refused when it is not who it
        should be."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        nonce = self._nonce()
        try:
            headers = self._headers("GET", "/peer/v1/beat", b"", nonce)
            async with self._opened().get(f"{url}/peer/v1/beat", headers=headers, timeout=timeout) as answer:
                if answer.status != 200:
                    raise await _refusal(url, answer)
                body = await _read(answer, MAX_BEAT_BYTES)
                signature = answer.headers.get(ANSWER_HEADER, "")
            beat = msgspec.msgpack.decode(body, type=Beat)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Retryable(f"peer {url}: does not answer ({type(error).__name__})") from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise Refused(f"peer {url}: sent no beat of ours; is it an mlxrack agent of this version?") from None
        if why := mismatch(beat.protocol, beat.oldest):
            raise Refused(f"peer {url}: {why}", code="protocol_mismatch")
        if not self._key.is_answer(signature, nonce, beat.node, body):
            raise Refused(f"peer {url}: its answer is not signed by this rack", code="not_a_peer")
        if beat.node != node:
            raise Refused(f"peer {url}: says it is {beat.node!r}, and the configuration calls it {node!r}")
        return beat

    async def generate(self, node: str, url: str, request: Ask) -> AsyncGenerator[Answer, None]:
        """Have the peer answer. Raises Retryable (code worker_lost) when it breaks off, at any point."""
        decoder, finished = Decoder(), False
        try:
            answer = await self._begun(node, url, encode(request))
            opened = self._open.setdefault(node, set())
            opened.add(answer)
            try:
                while chunk := await answer.content.read(_READ_BYTES):
                    for frame in decoder.feed(chunk):
                        if isinstance(frame, _ANSWERS):
                            finished = finished or isinstance(frame, _ENDS)
                            yield frame
            finally:
                opened.discard(answer)
                # one that is read to its end goes back to the pool; any other is cut, and its work with it
                answer.release() if finished and answer.content.is_eof() else answer.close()
        except Refused as error:
            if error.code == "body_too_large":
                raise
            raise Retryable(f"peer {node}: broke off ({error.code})", code="worker_lost") from None
        except (aiohttp.ClientError, OSError) as error:
            # a TimeoutError of the connection is an OSError; one of who asks comes as a cancellation
            raise Retryable(f"peer {node}: broke off ({type(error).__name__})", code="worker_lost") from None
        if not finished:
            raise Retryable(f"peer {node}: broke off", code="worker_lost")

    def drop(self, node: str) -> None:
        """Cut what is open to a peer that is gone; whoever waits there hears it at once."""
        for answer in list(self._open.get(node, ())):
            answer.close()
        waiting = self._waiting.get(node, {})
        for task in waiting:
            waiting[task] = True
            task.cancel()

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def _begun(self, node: str, url: str, body: bytes) -> aiohttp.ClientResponse:
        """The answer once its head is there, or a Retryable when the peer is given up meanwhile."""
        task = asyncio.current_task()
        assert task is not None
        waiting = self._waiting.setdefault(node, {})
        waiting[task] = False
        try:
            return await self._posted(node, url, body)
        except asyncio.CancelledError:
            if waiting[task] and task.uncancel() <= 0:
                raise Retryable(f"peer {node}: is gone", code="worker_lost") from None
            raise
        finally:
            del waiting[task]

    async def _posted(self, node: str, url: str, body: bytes) -> aiohttp.ClientResponse:
        """An answer that is a node's of this rack; to be released or closed. Raises RackError."""
        nonce = self._nonce()
        headers = self._headers("POST", "/peer/v1/generate", body, nonce)
        answer = await self._opened().post(f"{url}/peer/v1/generate", data=body, headers=headers, timeout=_NO_TIMEOUT)
        try:
            if answer.status == 413:
                raise Refused("the request is too large to be forwarded", code="body_too_large")
            if answer.status != 200:
                raise await _refusal(url, answer)
            if not self._key.is_answer(answer.headers.get(ANSWER_HEADER, ""), nonce, node):
                raise Refused(f"peer {url}: its answer is not signed by this rack", code="not_a_peer")
        except BaseException:
            answer.close()
            raise
        return answer

    def _nonce(self) -> str:
        """Never used before: by this process because it counts, by another because of its random beginning."""
        return f"{self._born}{next(self._count):x}"

    def _headers(self, method: str, path: str, body: bytes, nonce: str) -> dict[str, str]:
        return {
            "Authorization": self._key.header(
                node=self._node, method=method, path=path, body=body, t_ms=self._wall_ms(), nonce=nonce
            )
        }

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            self._session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session


async def _refusal(url: str, answer: aiohttp.ClientResponse) -> RackError:
    """What an answer other than 200 means, in our own words."""
    code = ""
    with contextlib.suppress(msgspec.DecodeError, TypeError, KeyError, AttributeError, UnicodeDecodeError):
        code = str(msgspec.json.decode(await _read(answer, _MAX_ERROR_BYTES))["error"]["code"])
    if code in _WHY:
        return Refused(f"peer {url}: {_WHY[code]}", code=code)
    return Retryable(f"peer {url}: answered {answer.status}", code="worker_lost")


async def _read(answer: aiohttp.ClientResponse, most: int) -> bytes:
    body = b""
    # one read gives what one segment brought, not the whole
    while len(body) < most and (chunk := await answer.content.read(most)):
        body += chunk
    return body
