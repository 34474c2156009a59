"""HTTP to the other nodes: beats, and requests that a peer answers. Never retries; who calls decides."""

from collections.abc import AsyncGenerator

import aiohttp
import msgspec

from agent.frames import Accepted, Answer, Ask, Decoder, Done, Embedded, Failed, Tokens, encode
from agent.peers import Beat
from shared.errors import Refused, Retryable

CONNECT_TIMEOUT_S = 2.0
BEAT_TIMEOUT_S = 1.0
MAX_BEAT_BYTES = 1 << 20


class PeerClient:
    """One session to all peers. ``secret`` is the rack's; peers that do not know it are refused."""

    def __init__(self, secret: str) -> None:
        self._headers = {"Authorization": f"Bearer {secret}"}
        self._session: aiohttp.ClientSession | None = None

    async def beat(self, url: str) -> Beat:
        """What the peer says of itself. Raises Retryable when it does not answer, Refused when it is not one of us."""
        timeout = aiohttp.ClientTimeout(total=BEAT_TIMEOUT_S)
        try:
            async with self._opened().get(f"{url}/peer/v1/beat", headers=self._headers, timeout=timeout) as answer:
                if answer.status in (401, 403):
                    raise Refused(f"peer {url}: refuses the rack secret; peers.secret must be the same on all nodes")
                if answer.status != 200:
                    raise Retryable(f"peer {url}: answered {answer.status}")
                body = b""
                # one read gives what one segment brought, not the whole beat
                while len(body) < MAX_BEAT_BYTES and (chunk := await answer.content.read(MAX_BEAT_BYTES)):
                    body += chunk
            return msgspec.msgpack.decode(body, type=Beat)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Retryable(f"peer {url}: does not answer ({type(error).__name__})") from None
        except (msgspec.DecodeError, RecursionError):
            raise Refused(f"peer {url}: sent no beat of ours; is it an mlxrack agent of this version?") from None

    async def generate(self, url: str, request: Ask) -> AsyncGenerator[Answer, None]:
        """Have the peer answer. Raises Retryable (code worker_lost) when it breaks off, at any point."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        decoder, finished = Decoder(), False
        try:
            async with self._opened().post(
                f"{url}/peer/v1/generate", data=encode(request), headers=self._headers, timeout=timeout
            ) as answer:
                if answer.status == 413:
                    raise Refused("the request is too large to be forwarded", code="body_too_large")
                if answer.status != 200:
                    raise Retryable(f"peer {url}: answered {answer.status}", code="worker_lost")
                async for chunk in answer.content.iter_any():
                    for frame in decoder.feed(chunk):
                        if isinstance(frame, Accepted | Tokens | Embedded | Done | Failed):
                            finished = finished or isinstance(frame, Done | Failed)
                            yield frame
        except Refused as error:
            if error.code == "body_too_large":
                raise
            raise Retryable(f"peer {url}: broke off ({error.code})", code="worker_lost") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Retryable(f"peer {url}: broke off ({type(error).__name__})", code="worker_lost") from None
        if not finished:
            raise Retryable(f"peer {url}: broke off", code="worker_lost")

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        return self._session
