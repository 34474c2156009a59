"""Providers for tests, behind real sockets: OpenAI's, Anthropic's and Ollama's streams as their documentation shows
them, and every way in which a provider can fail, hang or lie. Written by hand.

A ``FakeProvider`` counts ``connections`` and keeps ``requests``; ``script`` is what it does to the requests, one after
another, the last one for ever. ``reach_of`` makes an Egress find it under the name of any provider.
"""

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agent.egress.connections import Endpoint, Reach
from agent.policy.addresses import Category, unfit
from shared.transport import Tls

HOSTS = ("api.openai.com", "api.anthropic.com", "openrouter.ai")


class Request(NamedTuple):
    """A request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Its body."""
        return json.loads(self.body)


Step = Callable[["FakeProvider", asyncio.StreamWriter], Coroutine[Any, Any, None]]


class FakeProvider:
    """Listens on loopback, with TLS if it has a certificate."""

    def __init__(self, *script: Step, tls: Tls | None = None) -> None:
        self.script = list(script)
        self.requests: list[Request] = []
        self.asked = dict[asyncio.StreamWriter, Request]()
        """What is answered on a connection."""
        self.connections = 0
        self.hung_up = asyncio.Event()
        """Set when a client closes its connection before its answer is complete."""
        self.port = 0
        self._tls = tls
        self._tasks, self._writers = set[asyncio.Task[Any]](), list[asyncio.StreamWriter]()

    @property
    def url(self) -> str:
        """Where an OpenAI-compatible client finds it."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> "FakeProvider":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.append(writer)
        self.connections += 1
        try:
            if self._tls is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self._tls.certificate, self._tls.key)
                await writer.start_tls(context)
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            self.hung_up.set()
        finally:
            with contextlib.suppress(OSError, ssl.SSLError):
                writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _read(reader)
        self.requests.append(request)
        self.asked[writer] = request
        step = self.script[0] if len(self.script) == 1 else self.script.pop(0)
        gone, answer = asyncio.ensure_future(reader.read(1)), asyncio.ensure_future(step(self, writer))
        done, _ = await asyncio.wait((gone, answer), return_when=asyncio.FIRST_COMPLETED)
        if answer not in done:
            self.hung_up.set()
        for one in (gone, answer):
            one.cancel()
        found = await asyncio.gather(gone, answer, return_exceptions=True)
        if isinstance(found[1], Exception):
            raise found[1]


async def _read(reader: asyncio.StreamReader) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode().rstrip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


def reach_of(providers: Mapping[str, FakeProvider], trust: Callable[[], ssl.SSLContext]) -> Reach:
    """Reaches hosts at the providers of these names, and no other host at all. The addresses of hosts outside are not
    judged, because they are of this machine."""

    def addresses(host: str, port: int) -> Sequence[Endpoint]:
        if host in providers:
            return [Endpoint(socket.AF_INET, "127.0.0.1", providers[host].port)]
        raise socket.gaierror(socket.EAI_NONAME, "no such host")

    def judged(address: str, category: Category) -> str:
        return "" if category == "outside" and address == "127.0.0.1" else unfit(address, category)

    return Reach(addresses=addresses, unfit=judged, trust=trust)


def certificates(folder: Path, hosts: Sequence[str] = HOSTS) -> tuple[dict[str, Tls], Callable[[], ssl.SSLContext]]:
    """A certificate for each host, and a client's context that trusts them."""
    from tests.rack.tls_rack import Authority

    authority = Authority(folder / "ca")
    return {host: authority.issue(f"n{n}", host=host) for n, host in enumerate(hosts)}, authority.clients


# ---- what it does ----


async def _write(writer: asyncio.StreamWriter, *pieces: bytes) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Status\r\n{lines}\r\n".encode()


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def status(code: int, body: Any = b"", **headers: str) -> Step:
    """An answer with a status, and a body as bytes or as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named = {"Content-Type": "application/json", "Content-Length": str(len(raw)), "Connection": "close", **named}

    async def step(_: FakeProvider, writer: asyncio.StreamWriter) -> None:
        await _write(writer, _head(code, named), raw)

    return step


def stream(events: Sequence[bytes], *, end: bool = True, then: Step | None = None, **headers: str) -> Step:
    """An event stream, an event at a time; without ``end`` it breaks off."""
    named = {"Content-Type": "text/event-stream; charset=utf-8", "Transfer-Encoding": "chunked", "Connection": "close"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}

    async def step(provider: FakeProvider, writer: asyncio.StreamWriter) -> None:
        await _write(writer, _head(200, named), *map(_chunk, events))
        if then is not None:
            await then(provider, writer)
        if end:
            await _write(writer, b"0\r\n\r\n")

    return step


async def hang(_: FakeProvider, __: asyncio.StreamWriter) -> None:
    """Says nothing, for ever."""
    await asyncio.Event().wait()


async def close(_: FakeProvider, writer: asyncio.StreamWriter) -> None:
    """Closes the connection without an answer."""
    writer.close()


async def dribble(_: FakeProvider, writer: asyncio.StreamWriter) -> None:
    """Keeps a stream alive for ever, and says nothing in it."""
    while True:
        await _write(writer, _chunk(b": still here\n\n"))
        await asyncio.sleep(0.01)


async def flood(_: FakeProvider, writer: asyncio.StreamWriter) -> None:
    """One line that never ends."""
    while True:
        await _write(writer, _chunk(b"data: " + b"x" * (64 << 10)))


async def headers_without_end(_: FakeProvider, writer: asyncio.StreamWriter) -> None:
    """A header that never ends."""
    await _write(writer, b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        await _write(writer, b"y" * (64 << 10))


def raw(data: bytes) -> Step:
    """These bytes."""

    async def step(_: FakeProvider, writer: asyncio.StreamWriter) -> None:
        await _write(writer, data)

    return step


# ---- OpenAI's stream ----


def data(value: Any) -> bytes:
    """One event without a name."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def chunk(delta: Any = None, finish: str | None = None, **more: Any) -> bytes:
    """A chat completion chunk."""
    choice = {"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": finish}
    about = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000, "model": "m", "usage": None}
    return data({**about, "system_fingerprint": "fp_1", "choices": [choice], **more})


def usage(prompt: Any = 9, completion: Any = 3, cached: Any = 0, reasoning: Any = 0) -> bytes:
    """The last chunk of a stream whose usage was asked for."""
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning, "audio_tokens": 0},
    }
    return chunk(choices=[], usage=counts)


DONE = data(b"[DONE]")


def call_chunk(index: int, *, call_id: str = "", name: str = "", arguments: str = "") -> bytes:
    """A piece of a call."""
    function = {**({"name": name} if name else {}), "arguments": arguments}
    return chunk(
        {
            "tool_calls": [
                {"index": index, **({"id": call_id, "type": "function"} if call_id else {}), "function": function}
            ]
        }
    )


def openai_chat(*texts: str, finish: str = "stop") -> list[bytes]:
    """A conversation's answer in OpenAI's stream."""
    pieces = [chunk({"content": text}) for text in texts]
    return [chunk({"role": "assistant", "content": "", "refusal": None}), *pieces, chunk(finish=finish), usage(), DONE]


def openai_calls(*calls: tuple[str, str, str], finish: str = "tool_calls") -> list[bytes]:
    """Parallel calls, as (id, name, arguments), each argument in pieces of three characters."""
    found = [chunk({"role": "assistant", "content": None})]
    for n, (call_id, name, arguments) in enumerate(calls):
        found.append(call_chunk(n, call_id=call_id, name=name))
        found += [call_chunk(n, arguments=arguments[at : at + 3]) for at in range(0, len(arguments), 3)]
    return [*found, chunk(finish=finish), usage(), DONE]


# ---- Anthropic's stream ----


def named(kind: str, **fields: Any) -> bytes:
    """One event with a name, which its data repeats."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def message_start(**usage: Any) -> bytes:
    """Begins a message."""
    counts = {"input_tokens": 25, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1}
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "claude",
        "stop_reason": None,
    }
    return named("message_start", message={**message, "usage": {**counts, **usage}})


def message_end(stop: str = "end_turn", **usage: Any) -> list[bytes]:
    """Ends a message."""
    delta = {"stop_reason": stop, "stop_sequence": None}
    return [named("message_delta", delta=delta, usage={"output_tokens": 15, **usage}), named("message_stop")]


def block(place: int, start: Mapping[str, Any], *deltas: Mapping[str, Any]) -> list[bytes]:
    """A content block."""
    return [
        named("content_block_start", index=place, content_block=dict(start)),
        *(named("content_block_delta", index=place, delta=dict(delta)) for delta in deltas),
        named("content_block_stop", index=place),
    ]


def text_block(place: int, *texts: str) -> list[bytes]:
    """A block of text."""
    return block(place, {"type": "text", "text": ""}, *({"type": "text_delta", "text": one} for one in texts))


def call_block(place: int, call_id: str, name: str, *parts: str) -> list[bytes]:
    """A block of a call."""
    start = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
    return block(place, start, *({"type": "input_json_delta", "partial_json": part} for part in ("", *parts)))


def anthropic_chat(*texts: str, stop: str = "end_turn") -> list[bytes]:
    """A conversation's answer in Anthropic's stream."""
    return [message_start(), *text_block(0, *texts)[:1], named("ping"), *text_block(0, *texts)[1:], *message_end(stop)]


def bomb(megabytes: int) -> Step:
    """A small compressed body that is large when it is not."""
    packed = gzip.compress(b"data: " + b"0" * (megabytes << 20))
    headers = {"Content-Type": "text/event-stream", "Content-Encoding": "gzip", "Content-Length": str(len(packed))}
    return raw(_head(200, headers) + packed)


@contextlib.asynccontextmanager
async def posing(folder: Path, *script: Step) -> AsyncIterator[tuple[dict[str, FakeProvider], Reach]]:
    """A provider of each name in ``HOSTS``, and the reach to them."""
    tls, trust = certificates(folder)
    async with contextlib.AsyncExitStack() as stack:
        found = {host: await stack.enter_async_context(FakeProvider(*script, tls=tls[host])) for host in HOSTS}
        yield found, reach_of(found, trust)
