"""Client for the other nodes: heartbeats over HTTP, and one connection to each for the requests that it serves. Both
are signed with the rack secret, and so are the responses. Never retries; the caller decides."""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec

from agent.mesh.node_names import server_name
from agent.mesh.peer_link import HEARTBEAT_S, PeerLink
from agent.mesh.peers import Heartbeat
from agent.mesh.signing import ANSWER_HEADER, BODY, NODE_HEADER, RackKeys, body_hash, mismatch
from agent.mesh.tls_errors import tls_reason
from agent.wire.frames import MAX_FRAME_BYTES
from shared import connection_errors
from shared.errors import RackError, Refused, Retryable
from shared.keys import is_name

if TYPE_CHECKING:
    from agent.mesh.tls import NodeTls

CONNECT_TIMEOUT_S = 2.0
MAX_BEAT_BYTES = 1 << 20
MAX_POST_BYTES = 4 << 20
"""The most that a peer's answer to a request of our own may hold."""
_MAX_ERROR_BYTES = 8 << 10

_WHY = {
    "not_a_peer": "rejected the signature; peers.secret must be the same on all nodes",
    "protocol_mismatch": "incompatible protocol version; upgrade the older of the two nodes",
    "no_certificate": "accepts only nodes with a certificate of the rack; check this node's [tls]",
    "wrong_certificate": "rejected this node's certificate: it names another node or rack",
    "clock_skew": "rejected the signature because of clock skew; synchronize both clocks to the same source",
    "wrong_host": "serves its own machine only, and under other names; set listen.host and listen.names there",
    "unknown_url": "has no such route; the url in peers.nodes ends with the port, without /v1",
    "connections_full": "has too many open connections (limits.connections there)",
}
_KEY = "the url in peers.nodes"
_NO_AGENT = f"is not an mlxrack agent; correct {_KEY}: http(s)://HOST:PORT, without /v1"


class PeerClient:
    """One HTTP session for all peers. ``keys`` are the rack's; ``node`` is this node's id; with ``tls`` a peer must
    show its own certificate before anything is sent to it. ``accepts`` tells the marks of the keys that a peer accepts,
    as far as known; ``mark`` is this agent's, told with each heartbeat."""

    def __init__(
        self,
        keys: RackKeys,
        node: str,
        *,
        tls: "NodeTls | None" = None,
        accepts: Callable[[str], Sequence[str] | None] = lambda _: None,
        mark: str = "",
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._keys, self._tls, self._accepts = keys, tls, accepts
        self._node, self._wall_ms = node, wall_ms
        self._beat = f"/peer/v1/beat?agent={mark}" if mark else "/peer/v1/beat"
        self._born = secrets.token_hex(8) + "."
        self._count = itertools.count()
        self._session: aiohttp.ClientSession | None = None
        self._links: dict[str, PeerLink] = {}
        self._retired: set[PeerLink] = set()
        self._connecting: dict[str, asyncio.Task[PeerLink]] = {}

    async def heartbeat(self, node: str, url: str, timeout_s: float) -> Heartbeat:
        """The peer's answer to a heartbeat. Raises Retryable when it does not answer in time, Refused when it is not
        the expected node."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        nonce = self._nonce()
        try:
            headers = self._headers(node, self._beat, nonce)
            get = self._opened().get
            async with get(f"{url}{self._beat}", headers=headers, timeout=timeout, **self._expected(node)) as answer:
                # the first byte of a page is a number in MessagePack
                if answer.status != 200 or answer.content_type.startswith("text/"):
                    raise await self._refusal(node, url, answer)
                body = await _read(answer, MAX_BEAT_BYTES)
                signature = answer.headers.get(ANSWER_HEADER, "")
            heartbeat = msgspec.msgpack.decode(body, type=Heartbeat)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Retryable(f"peer {url}: {_silence(url, error)}") from None
        except msgspec.ValidationError as error:
            raise Refused(f"peer {url}: invalid heartbeat ({error}); upgrade the older of the two") from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise Refused(f"peer {url}: not a heartbeat; what answered {_NO_AGENT}") from None
        if unlike := mismatch(heartbeat.protocol, heartbeat.oldest):
            raise Refused(f"peer {url}: {unlike}", code="protocol_mismatch")
        if self._keys.answered_with(signature, nonce, heartbeat.node, body) is None:
            raise Refused(f"peer {url}: response not signed with peers.secret", code="not_a_peer")
        if heartbeat.node != node:
            raise Refused(f"peer {url}: {another_node(heartbeat.node, node, self._node)}", code="wrong_node")
        return heartbeat

    async def post(self, node: str, url: str, path: str, body: bytes, timeout_s: float) -> bytes:
        """The peer's answer to a request with a body; both are signed. Raises Retryable when it does not answer in
        time, Refused for anything but a peer's answer."""
        timeout, nonce = aiohttp.ClientTimeout(total=timeout_s), self._nonce()
        path = f"{path}?{BODY}={body_hash(body)}"
        try:
            headers = self._headers(node, path, nonce, "POST")
            post = self._opened().post
            async with post(f"{url}{path}", data=body, headers=headers, timeout=timeout, **self._expected(node)) as got:
                if got.status != 200:
                    raise await self._refusal(node, url, got)
                answer = await _read(got, MAX_POST_BYTES)
                signature = got.headers.get(ANSWER_HEADER, "")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Retryable(f"peer {url}: {_silence(url, error)}") from None
        if self._keys.answered_with(signature, nonce, node, answer) is None:
            raise Refused(f"peer {url}: response not signed with peers.secret", code="not_a_peer")
        return answer

    async def link(self, node: str, url: str) -> PeerLink:
        """The open connection to a peer. Raises Retryable (code worker_lost) when none can be opened."""
        link = self._links.get(node)
        if link is not None and (link.url != url or self._is_outdated(link)):
            self.retire(node)
            link = None
        if link is None or not link.alive:
            link = await self._linked(node, url)
        return link

    def _is_outdated(self, link: PeerLink) -> bool:
        """Whether it was opened with another key than the newest one that both nodes have."""
        newest = self._keys.newest
        return link.key is not newest and newest is not None and newest.mark in (self._accepts(link.node) or ())

    def retire(self, node: str) -> None:
        """Open no more requests on the connection to a peer; it closes when those that are open have ended."""
        if (link := self._links.pop(node, None)) is not None:
            self._retired = {one for one in (*self._retired, link) if one.alive}
            link.retire()

    def drop(self, node: str) -> None:
        """Abort the connections to a peer that is gone; requests that wait on them fail at once."""
        for link in [self._links.pop(node, None), *(one for one in self._retired if one.node == node)]:
            if link is not None:
                link.abort()

    async def close(self) -> None:
        """Close all connections."""
        for task in list(self._connecting.values()):
            task.cancel()
        await asyncio.gather(*(link.close() for link in (*self._links.values(), *self._retired)))
        if self._session is not None:
            await self._session.close()

    async def _linked(self, node: str, url: str) -> PeerLink:
        """The connection to a peer, opened by the first caller that needs it; concurrent callers share the outcome.
        Raises Retryable."""
        if (task := self._connecting.get(node)) is None:
            task = self._connecting[node] = asyncio.create_task(self._opened_link(node, url))
            # waiting callers get its outcome; when none is left, its exception must still be read
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            task.add_done_callback(lambda _: self._connecting.pop(node, None))
        return await asyncio.shield(task)

    async def _opened_link(self, node: str, url: str) -> PeerLink:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                link = self._links[node] = await self._connected(node, url)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Retryable(f"peer {node}: unreachable ({_silence(url, error)})", code="worker_lost") from None
        except Refused as error:
            raise Retryable(error.message, code="worker_lost") from None
        return link

    async def _connected(self, node: str, url: str) -> PeerLink:
        nonce = self._nonce()
        headers = self._headers(node, "/peer/v1/link", nonce)
        socket = await self._opened().ws_connect(
            f"{url}/peer/v1/link",
            headers=headers,
            max_msg_size=MAX_FRAME_BYTES,
            heartbeat=HEARTBEAT_S,
            **self._expected(node),
        )
        link = PeerLink(node, url, socket)
        try:
            signature, _, challenge = str((await socket.receive()).data).partition(" ")
            if (key := self._keys.answered_with(signature, nonce, node)) is None:
                raise Refused(f"peer {url}: response not signed with peers.secret", code="not_a_peer")
            await socket.send_str(key.proof(challenge, self._node))
        except BaseException:
            link.abort()
            raise
        link.read(key)
        return link

    async def _refusal(self, node: str, url: str, answer: aiohttp.ClientResponse) -> RackError:
        """The error for a response other than 200, in our own words."""
        code = await _code(answer)
        if code == "wrong_node":
            found = answer.headers.get(NODE_HEADER, "")
            found = found if is_name(found) else ""
            return Refused(f"peer {url}: {another_node(found, node, self._node)}", code=code)
        if code in _WHY:
            return Refused(f"peer {url}: {_WHY[code]}", code=code)
        ours = "X-Mlxrack-Request-Id" in answer.headers
        seen = f"answered {answer.status}" if ours else no_agent(answer.status, answer.content_type)
        return Retryable(f"peer {url}: {seen}", code="worker_lost")

    def _nonce(self) -> str:
        """Unique: within this process by a counter, across processes by its random prefix."""
        return f"{self._born}{next(self._count):x}"

    def _headers(self, to: str, path: str, nonce: str, method: str = "GET") -> dict[str, str]:
        t_ms = self._wall_ms()
        signed = self._keys.header(node=self._node, to=to, method=method, path=path, body=b"", t_ms=t_ms, nonce=nonce)
        return {"Authorization": signed}

    def _expected(self, node: str) -> dict[str, Any]:
        """How TLS verifies that a peer is ``node``. A node with TLS has no http:// URLs, on which it has no effect."""
        return {"ssl": self._tls.calls, "server_hostname": server_name(node)} if self._tls is not None else {}

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_request_redirect.append(_redirected)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trace_configs=[trace],
            )
        return self._session


def _silence(url: str, error: BaseException) -> str:
    """Why a heartbeat was not answered."""
    if reason := tls_reason(error):
        return reason
    if isinstance(error, aiohttp.ServerDisconnectedError) and url.startswith("https:"):
        return "closes the connection after the handshake; its log says why it refuses this node (tls_refused)"
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return f"answered {error.status}"
    return connection_errors.why(error, url, _KEY)


async def _redirected(*_: object) -> None:
    raise Refused(f"a peer never redirects; what answered {_NO_AGENT}", code="not_a_peer")


def another_node(found: str, expected: str, me: str) -> str:
    """What is said of a url at which another node than ``expected`` answers; ``found`` is "" if it is not known."""
    if found == me:
        return f"this url leads back to this node itself ({me!r}), not to {expected!r}; correct it in peers.nodes"
    who = f"node {found!r}" if found else "another node"
    return f"{who} answers at this url, which peers.nodes calls {expected!r}; correct the id or the url there"


def no_agent(status: int, kind: str) -> str:
    """What is said of an answer that no agent gives. ``kind`` is its content type."""
    if "html" in kind.lower():
        return f"a web page answers there (HTTP {status}), of a proxy or another program: it {_NO_AGENT}"
    return f"what answers there (HTTP {status}) {_NO_AGENT}"


async def _code(answer: aiohttp.ClientResponse) -> str:
    """The code of an agent's error; "" for anybody else's."""
    with contextlib.suppress(msgspec.DecodeError, TypeError, KeyError, AttributeError, UnicodeDecodeError):
        return str(msgspec.json.decode(await _read(answer, _MAX_ERROR_BYTES))["error"]["code"])
    return ""


async def _read(answer: aiohttp.ClientResponse, most: int) -> bytes:
    body = b""
    # one read returns what one segment brought, not the whole body
    while len(body) < most and (chunk := await answer.content.read(most)):
        body += chunk
    return body
