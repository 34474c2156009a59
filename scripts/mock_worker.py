"""A worker without a model, to measure and test gateways: plain ``/v1/chat/completions`` for any proxy, and the peer's
side of mlxrack's own protocol, signed as a node of the rack.

It can misbehave as real workers do: reject requests, answer 5xx, disconnect after a 200, send an error frame or an
invalid frame, stall, or run ten times as slowly.
"""

import argparse
import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from aiohttp import web

from agent.mesh.peers import Heartbeat
from agent.mesh.signing import ANSWER_HEADER, PROTOCOL, Key
from agent.views import ModelView
from agent.wire.frames import (
    MAX_FRAME_BYTES,
    Accepted,
    Answer,
    Cancel,
    Decoder,
    Done,
    Failed,
    Generate,
    Together,
    Tokens,
    encode,
)

MODES = ("well", "refuses", "fails", "5xx", "breaks", "error", "garbage", "stalls", "slow")
"""How it handles requests."""
NOT_A_PEER = ("silent", "unsigned", "newer", "older", "noise", "senseless")
"""How it answers heartbeats."""


class MockWorker:
    """Answers ``words`` words, one each ``gap_s``. ``mode`` is its behaviour; it may change at any time."""

    def __init__(self, node: str, rack: str, secret: str, *, words: int = 16, gap_s: float = 0.0) -> None:
        self.node, self.rack, self._key = node, rack, Key(secret)
        self.words, self.gap_s = words, gap_s
        self.mode = "well"
        self.context_tok = self.port = self.began = self.ended = self.now = self.most = 0
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        """Listen on loopback."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/peer/v1/beat", self._beat)
        app.router.add_get("/peer/v1/link", self._link)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
        await self._runner.setup()
        site: Any = web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=tls)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close everything."""
        if self._runner is not None:
            await self._runner.cleanup()

    # ---- for any proxy ----

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        words = min(self.words, body.get("max_tokens") or self.words)
        head = {"id": "chatcmpl-1", "created": 1, "model": body["model"], "system_fingerprint": "fp_mock"}
        usage = {"prompt_tokens": 9, "completion_tokens": words, "total_tokens": 9 + words}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "word " * words}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            tree = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            return web.Response(body=msgspec.json.encode(tree), content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(words + 1):
            delta = {"role": "assistant", "content": ""} if number == 0 else {"content": "word "}
            finish = "stop" if number == words else None
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            event = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")
            if self.gap_s:
                await asyncio.sleep(self.gap_s)
        await response.write(b"data: [DONE]\n\n")
        return response

    # ---- as a peer ----

    async def _beat(self, request: web.Request) -> web.Response:
        nonce = _nonce(request)
        if self.mode == "silent":
            await asyncio.sleep(3600)
        if self.mode == "noise":
            return web.Response(body=b"\xc1 not a heartbeat", headers={ANSWER_HEADER: "00"})
        view = ModelView(
            name="m",
            version="mock",
            ready=True,
            versions=("mock",),
            in_flight=self.now,
            gap_us=int(self.gap_s * 1e6),
            context_tok=self.context_tok,
            rows=0 if self.mode == "senseless" else 8,
        )
        heartbeat = Heartbeat(node=self.node, rack=self.rack, epoch=1, models=(view,), t_ms=time.time_ns() // 1_000_000)
        if self.mode == "newer":
            heartbeat = msgspec.structs.replace(heartbeat, protocol=PROTOCOL + 2, oldest=PROTOCOL + 1)
        if self.mode == "older":
            heartbeat = msgspec.structs.replace(heartbeat, protocol=PROTOCOL - 1, oldest=PROTOCOL - 1)
        body = msgspec.msgpack.encode(heartbeat)
        key = Key("of another rack") if self.mode == "unsigned" else self._key
        return web.Response(body=body, headers={ANSWER_HEADER: key.answer(nonce, self.node, body)})

    async def _link(self, request: web.Request) -> web.StreamResponse:
        if self.mode == "5xx":
            return web.json_response({"error": {"message": "x", "code": "internal"}}, status=500)
        socket = web.WebSocketResponse(compress=False, max_msg_size=MAX_FRAME_BYTES)
        await socket.prepare(request)
        await socket.send_str(f"{self._key.answer(_nonce(request), self.node)} by-the-mock")
        await socket.receive_str()  # the proof, which a mock accepts unchecked
        tasks: dict[int, asyncio.Task[None]] = {}
        decoder = Decoder()
        try:
            async for message in socket:
                for frame in decoder.feed(message.data):
                    if isinstance(frame, Generate):
                        tasks[frame.id] = asyncio.create_task(self._answer(request, socket, frame))
                        tasks[frame.id].add_done_callback(lambda _, number=frame.id: tasks.pop(number, None))  # type: ignore[misc]
                    elif isinstance(frame, Cancel) and frame.id in tasks:
                        tasks[frame.id].cancel()
        finally:
            for task in list(tasks.values()):
                task.cancel()
        return socket

    async def _answer(self, request: web.Request, socket: web.WebSocketResponse, asked: Generate) -> None:
        self.began += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.mode == "5xx" and request.transport is not None:
                request.transport.abort()
                return
            # as an agent does: frames of a non-streamed answer are sent together
            together = Together() if asked.whole else None
            async for piece in self._pieces(asked):
                due = together.put(piece, time.monotonic()) if together is not None else (piece,)
                if due:
                    named = (msgspec.structs.replace(one, id=asked.id) for one in due)
                    await socket.send_bytes(b"".join(encode(one) for one in named))
            if self.mode == "garbage":
                await socket.send_bytes(b"\xc1\xc1\xc1")
            if self.mode == "breaks" and request.transport is not None:
                request.transport.abort()
        except (ConnectionError, RuntimeError):
            pass
        finally:
            self.now -= 1
            self.ended += 1

    async def _pieces(self, asked: Generate) -> AsyncIterator[Answer]:
        words = min(self.words, asked.max_tokens or self.words)
        if self.mode == "refuses":
            yield Failed(id=1, code="context_length_exceeded", message="too long", param="max_tokens")
            return
        if self.mode == "fails":
            yield Failed(id=1, code="engine_failed", message="the engine cannot continue this request")
            return
        yield Accepted(id=1, prompt_tok=9, cached_tok=0, version="mock", node=self.node)
        for number in range(len(asked.made), words):
            if number == words // 2:
                if self.mode in ("breaks", "garbage"):
                    return
                if self.mode == "error":
                    yield Failed(id=1, code="engine_failed", message="the engine failed", retryable=True)
                    return
                if self.mode == "stalls":
                    await asyncio.sleep(3600)
            if self.gap_s:
                await asyncio.sleep(self.gap_s * (10 if self.mode == "slow" else 1))
            yield Tokens(id=1, text="word ", count=1, ids=(number,))
        yield Done(id=1, finish="stop", prompt_tok=9, cached_tok=0, completion_tok=words)


def _nonce(request: web.Request) -> str:
    header = request.headers.get("Authorization", "")
    return next((part[6:] for part in header.split(",") if part.startswith("nonce=")), "")


async def _serve(args: argparse.Namespace) -> None:
    worker = MockWorker(args.node, args.rack, args.secret, words=args.words, gap_s=args.gap_s)
    await worker.start(args.port)
    if args.tls:  # a second port, for a gateway with TLS
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(f"{args.tls}.pem", f"{args.tls}.key")
        await MockWorker(args.node, args.rack, args.secret, words=args.words, gap_s=args.gap_s).start(
            args.tls_port, tls
        )
    print(worker.port, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--node", default="mock")
    parser.add_argument("--rack", default="r")
    parser.add_argument("--secret", default="the rack secret of the tests, 4f1c9ab07d")
    parser.add_argument("--tls", default="", help="certificate and key, without .pem and .key")
    parser.add_argument("--tls-port", type=int, default=0)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--gap-s", type=float, default=0.0)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
