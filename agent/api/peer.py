"""Endpoints for other nodes of the rack only. Requests are signed (agent/mesh/signing.py), and so are responses."""

import asyncio
import contextlib
import hmac
import secrets
import time
from typing import Any

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from agent.api.context import CONTEXT, LINKS, Context, proved
from agent.gateway.taints import Taints
from agent.mesh.node_names import wrong_certificate
from agent.mesh.peer_link import HEARTBEAT_S
from agent.mesh.signing import ANSWER_HEADER, BODY, Key, NotAPeer, Signed, body_hash
from agent.wire.frame_writer import FrameWriter
from agent.wire.frames import (
    MAX_FRAME_BYTES,
    Accepted,
    Answer,
    Ask,
    Cancel,
    Decoder,
    Done,
    Embed,
    Failed,
    Generate,
    Together,
    encode,
)
from shared.errors import RackError, Refused, Retryable
from shared.logs import get_logger

PROOF_S = 5.0
"""A new connection must authenticate within this time."""
CLOSE_S = 1.0
"""A peer must acknowledge the close of its connection within this time."""
TAINTS: web.AppKey[Taints] = web.AppKey("taints", Taints)
MAX_POST_BYTES = 1 << 20
"""The most that the body of a peer's request may hold."""
_MSGPACK = "application/x-msgpack"

log = get_logger("agent.api")


async def heartbeat(request: web.Request) -> web.Response:
    """Answer a heartbeat: what this node offers now."""
    signed, key = _signed(request)
    context = request.app[CONTEXT]
    context.status.met(signed.node, request.query.get("agent", ""))
    body = msgspec.msgpack.encode(context.status.heartbeat())
    signature = key.answer(signed.nonce, context.config.node.id, body)
    return web.Response(body=body, content_type=_MSGPACK, headers={ANSWER_HEADER: signature})


async def taints(request: web.Request) -> web.Response:
    """A peer tells which messages were in SENSITIVE requests, or asks."""
    signed, key = _signed(request)
    if (held := request.app.get(TAINTS)) is None:
        raise web.HTTPNotFound
    body = await _posted(request)
    answer = await held.answered(signed.node, body)
    signature = key.answer(signed.nonce, request.app[CONTEXT].config.node.id, answer)
    return web.Response(body=answer, content_type=_MSGPACK, headers={ANSWER_HEADER: signature})


async def link(request: web.Request) -> web.StreamResponse:
    """A peer's connection: both sides authenticate in their first messages, then requests of the peer's clients
    arrive as frames, and answers go back. They are never forwarded again, so a request cannot loop."""
    signed, key = _signed(request)
    context = request.app[CONTEXT]
    socket = web.WebSocketResponse(compress=False, max_msg_size=MAX_FRAME_BYTES, timeout=CLOSE_S, heartbeat=HEARTBEAT_S)
    await socket.prepare(request)
    challenge = secrets.token_hex(16)
    await socket.send_str(f"{key.answer(signed.nonce, context.config.node.id)} {challenge}")
    if not await _proved(key, socket, challenge, signed.node):
        return socket
    open_links = request.app[LINKS]
    open_links.add(socket)
    works = _Works(context, socket, signed.node, key)
    try:
        await works.take()
    finally:
        open_links.discard(socket)
        await works.end()
    return socket


async def close_links(app: web.Application) -> None:
    """On shutdown: tell peers at once that this node is going away."""
    closing = (one.close(code=WSCloseCode.GOING_AWAY) for one in set(app[LINKS]))
    with contextlib.suppress(TimeoutError):  # one that no longer reads cannot be told
        async with asyncio.timeout(2 * CLOSE_S):
            await asyncio.gather(*closing, return_exceptions=True)


async def _proved(key: Key, socket: web.WebSocketResponse, challenge: str, node: str) -> bool:
    """Whether the connected node is the one that signed, now and not in a replay."""
    with contextlib.suppress(TimeoutError):
        reply = await socket.receive(timeout=PROOF_S)
        if reply.type is WSMsgType.TEXT and key.is_proof(reply.data, challenge, node):
            return True
    await socket.close(code=WSCloseCode.POLICY_VIOLATION)
    return False


class _Works:
    """The requests of one connection, each in its own task."""

    def __init__(self, context: Context, socket: web.WebSocketResponse, gateway: str, key: Key) -> None:
        self._context, self._socket, self._key = context, socket, key
        self._writer = FrameWriter(socket.send_bytes)
        self._gateway = gateway
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def take(self) -> None:
        """Serve until the connection ends."""
        decoder = Decoder()
        with contextlib.suppress(Refused):  # invalid frames: not a peer
            async for message in self._socket:
                if message.type is not WSMsgType.BINARY:
                    break
                for frame in decoder.feed(message.data):
                    if isinstance(frame, Generate | Embed):
                        self._begin(frame)
                    elif isinstance(frame, Cancel) and frame.id in self._tasks:
                        self._tasks[frame.id].cancel()

    async def end(self) -> None:
        """Cancel all requests: their answers cannot be delivered."""
        self._writer.abort()  # before anything is waited for, because this may be cancelled
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._writer.end()

    def _begin(self, ask: Ask) -> None:
        if ask.id in self._tasks:  # what was begun before could no longer be cancelled
            raise Refused("two open requests with one id")
        task = asyncio.create_task(self._worked(ask))
        self._tasks[ask.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(ask.id, None))

    async def _worked(self, ask: Ask) -> None:
        began, seen = time.monotonic(), dict[str, Any](outcome="cancelled")
        try:
            await self._answered(ask, seen)
            seen["outcome"] = "ok"
        except RackError as error:
            seen["outcome"] = error.code
            with contextlib.suppress(ConnectionError, RuntimeError):
                await self._writer.put(encode(_failed(ask.id, error)))
        except (ConnectionError, RuntimeError):
            seen["outcome"] = "gateway_gone"
        except Exception:  # a bug: its type and location go to the log, nothing to the peer
            log.error("peer_request_failed", request=ask.request_id, exc_info=True)
            with contextlib.suppress(ConnectionError, RuntimeError):
                failed = Failed(id=ask.id, code="engine_failed", message="internal error", retryable=True)
                await self._writer.put(encode(failed))
        finally:
            ms = round((time.monotonic() - began) * 1000, 1)
            log.info("peer_request", request=ask.request_id, gateway=self._gateway, model=ask.model, ms=ms, **seen)

    async def _answered(self, ask: Ask, seen: dict[str, Any]) -> None:
        if ask.door == self._context.config.node.id:
            raise Refused("forwarding loop: this node sent the request; check its peers' urls", code="loop")
        if self._key not in self._context.keys:
            # its other requests go on; a node of the rack opens another one
            raise Retryable("this connection was opened with a secret that counts no more", code="not_ready")
        together = Together() if isinstance(ask, Generate) and ask.whole else None
        async with contextlib.aclosing(self._context.dispatch.work(ask)) as answers:
            async for answer in answers:
                if isinstance(answer, Accepted):
                    seen.update(version=answer.version, prompt_tok=answer.prompt_tok, cached_tok=answer.cached_tok)
                elif isinstance(answer, Done):
                    seen.update(completion_tok=answer.completion_tok, finish=answer.finish)
                due = together.put(answer, time.monotonic()) if together is not None else (answer,)
                if due:
                    await self._writer.put(b"".join([_named(ask.id, one) for one in due]))


def _named(number: int, answer: Answer) -> bytes:
    """An answer under the id that the peer chose for its request."""
    return encode(msgspec.structs.replace(answer, id=number))


async def _posted(request: web.Request) -> bytes:
    """The body of a peer's request, whose hash is in the path that the peer signed: who cannot sign sends nothing that
    is read. Raises Refused."""
    body = b""
    try:
        async with asyncio.timeout(PROOF_S):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > MAX_POST_BYTES:
                    raise Refused("the body of a peer's request is too large", code="body_too_large")
    except TimeoutError:
        raise Refused(f"no complete body within {PROOF_S:g} s", code="body_timeout") from None
    if not hmac.compare_digest(body_hash(body).encode(), request.query.get(BODY, "").encode("ascii", "replace")):
        raise NotAPeer("the body is not the one that was signed")
    return body


def _signed(request: web.Request) -> tuple[Signed, Key]:
    """The authenticated sender, and the key that both have. Raises NotAPeer."""
    context = request.app[CONTEXT]
    if not context.keys:
        raise NotAPeer("peer requests are refused: this node has no peers.secret")
    now_ms = time.time_ns() // 1_000_000
    header = request.headers.get("Authorization", "")
    signed, key = context.keys.check(
        header, me=context.config.node.id, method=request.method, path=request.path_qs, body=b"", now_ms=now_ms
    )
    _check_certificate(request, signed.node)
    if not context.nonces.take(signed.nonce, now_ms):
        raise NotAPeer("replayed request: its signature was already used")
    proved(request)
    return signed, key


def _check_certificate(request: web.Request, node: str) -> None:
    """With mutual TLS, require the certificate of the node that signed; it is verified already, in this handshake and
    not in one before: what a session that is resumed shows may have expired or been replaced since. Raises NotAPeer."""
    context = request.app[CONTEXT]
    if not context.config.tls.ca:
        return
    shaken = request.get_extra_info("ssl_object")
    if shaken is None or shaken.session_reused:
        raise NotAPeer(f"{node}: resumes a TLS session; nodes shake hands anew", code="wrong_certificate")
    shown = request.get_extra_info("peercert")
    if why := wrong_certificate(shown, context.config.node.rack, node):
        code = "wrong_certificate" if shown else "no_certificate"
        raise NotAPeer(f"{node}: {why}", code=code)


def _failed(number: int, error: RackError) -> Failed:
    return Failed(
        id=number, code=error.code, message=error.message, param=error.param, retryable=isinstance(error, Retryable)
    )
