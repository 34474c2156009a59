"""The HTTP application over a scripted worker: headers, warnings, and answers to what is not served."""

import contextlib
import gzip
import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession, web
from yarl import URL

from agent.api import wire
from agent.api.app import build
from agent.api.context import Context
from agent.config import AgentConfig, Live, Node
from agent.gateway.call import Call
from agent.wire.frames import Accepted, Answer, Done, Embedded, Generate, Tokens
from tests.made_wall import made_boundary

UNMET = "tools[0].function.parameters: uniqueItems at /properties/a"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
CHAT = "/v1/chat/completions"


class Worker:
    """A dispatch whose every answer is the same; ``ignored`` and ``unmet`` as in its frames."""

    ignored: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()

    @contextlib.contextmanager
    def reading(self, key_id: str) -> Iterator[None]:
        """Admit everything."""
        yield

    @contextlib.contextmanager
    def enter(self, calls: Sequence[Call]) -> Iterator[None]:
        """Admit everything."""
        yield

    async def answer(self, call: Call) -> AsyncGenerator[Answer, None]:
        """One token, or one vector."""
        frames: list[Answer] = [Accepted(id=1, prompt_tok=2, cached_tok=0, version="v", ignored=self.ignored)]
        frames += [
            Tokens(id=1, text="a", count=1) if isinstance(call.ask, Generate) else Embedded(id=1, vectors=(b"",))
        ]
        frames += [Done(id=1, finish="stop", prompt_tok=2, cached_tok=0, completion_tok=1, unmet=self.unmet)]
        for frame in frames:
            call.note(frame, 0.0)
            yield frame


class Client:
    """A client of the application as it is really served."""

    def __init__(self, session: ClientSession, port: int) -> None:
        self._session, self._port = session, port

    async def ask(self, method: str, path: str, **more: Any) -> ClientResponse:
        """A response, read; the path is sent as it is."""
        url = URL(f"http://127.0.0.1:{self._port}{path}", encoded=True)
        async with self._session.request(method, url, **more) as response:
            await response.read()
        return response

    async def chat(self, **more: Any) -> ClientResponse:
        """A chat completion."""
        return await self.ask("POST", CHAT, json={**ASKED, **more})


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
async def client(worker: Worker, tmp_path: Path) -> AsyncIterator[Client]:
    parts: dict[str, Any] = dict.fromkeys(Context.__struct_fields__)
    parts |= {"live": Live(AgentConfig(node=Node(id="n1", rack="r"))), "dispatch": worker, "admin_token": "t"}
    parts["boundary"] = made_boundary(tmp_path)
    runner = wire.Runner(build(Context(**parts)))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with ClientSession() as session:
            yield Client(session, runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def events(response: ClientResponse) -> list[Any]:
    lines = (await response.text()).splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_ignored_is_named_beside_what_the_parser_did(
    client: Client, worker: Worker, stream: bool
) -> None:
    assert "X-Mlxrack-Ignored" not in (await client.chat(stream=stream)).headers
    worker.ignored = ("max_tokens", "evil\r\nSet-Cookie: x")
    answer = await client.chat(stream=stream, wibble=1, n=2)
    assert answer.headers["X-Mlxrack-Ignored"] == "wibble, max_tokens, evil??Set-Cookie??x"
    vectors = await client.ask("POST", "/v1/embeddings", json={"model": "m", "input": "x", "num_ctx": 1})
    assert vectors.headers["X-Mlxrack-Ignored"].startswith("num_ctx, max_tokens")


async def test_what_an_answer_violates_of_a_schema_is_a_warning(client: Client, worker: Worker) -> None:
    assert "warnings" not in await (await client.chat()).json()
    assert not [one for one in await events(await client.chat(stream=True)) if "warnings" in one]
    worker.unmet = (UNMET,)
    assert (await (await client.chat(n=2)).json())["warnings"] == [UNMET]
    found = await events(await client.chat(stream=True, n=2, timings=True, stream_options={"include_usage": True}))
    warned = [one for one in found if "warnings" in one]
    assert [one["warnings"] for one in warned] == [[UNMET], [UNMET]]
    assert [one["choices"][0]["finish_reason"] for one in warned] == ["stop", "stop"]
    assert all("timings" in one for one in warned)


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/chat/completions", "did you mean /v1/chat/completions?"),
        ("POST", "/v1/chat/completions/", "did you mean /v1/chat/completions?"),
        ("POST", "/v1/v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("POST", "//v1//chat/completions", "did you mean /v1/chat/completions?"),
        ("POST", "/V1/Chat/Completions", "did you mean /v1/chat/completions?"),
        ("POST", "/openai/deployments/x/chat/completions", "did you mean /v1/chat/completions?"),
        ("POST", "/v1/engines/x/completions", "did you mean /v1/completions?"),
        ("POST", "/api/v1/embeddings", "did you mean /v1/embeddings?"),
        ("GET", "/models", "did you mean /v1/models?"),
        ("GET", "/v1/models/", "did you mean /v1/models?"),
        ("GET", "/models/m", "did you mean /v1/models/NAME?"),
        ("POST", "/v1", "this is the base URL"),
        ("GET", "/v1/", "this is the base URL"),
        ("POST", "/v1/responses", "the Responses API is not served"),
        ("GET", "/v1/responses/resp_1/input_items", "the Responses API is not served"),
        ("POST", "/responses", "the Responses API is not served"),
        ("POST", "/v1/messages", "Anthropic's API is not served"),
        ("POST", "/v1/messages/count_tokens", "Anthropic's API is not served"),
        ("POST", "/api/chat", "Ollama's API is not served"),
        ("GET", "/api/tags", "Ollama's API is not served"),
        ("POST", "/v1/images/generations", "text only"),
        ("POST", "/v1/audio/transcriptions", "text only"),
        ("POST", "/v1/moderations", "not part of this service"),
        ("POST", "/v1/files", "not part of this service"),
        ("POST", "/completion", "other servers' own routes"),
        ("POST", "/v1/v1/v1/embeddings", "did you mean /v1/embeddings?"),
        ("GET", "/v1/v1/models", "did you mean /v1/models?"),
        ("GET", "/docs", "see / and /openapi.json"),
        ("GET", "/index.html", "see / and /openapi.json"),
        ("GET", "/v1/openapi.json", "see / and /openapi.json"),
        ("GET", "/healthz", "did you mean /health"),
        ("GET", "/v1/health", "did you mean /health"),
        ("GET", "/readyz", "/ready"),
        ("GET", "/wp-admin.php", "check the base URL"),
    ],
)
async def test_a_path_that_is_not_served_is_named_with_what_was_meant(
    client: Client, method: str, path: str, words: str
) -> None:
    answer = await client.ask(method, path)
    error = (await answer.json())["error"]
    assert (answer.status, error["type"], error["code"]) == (404, "not_found_error", "unknown_url")
    assert error["message"].startswith(f"{method} {path}: no such route; ")
    assert words in error["message"]
    assert "/v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models" in error["message"]
    assert "/admin" not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("GET", CHAT, "use POST"),
        ("DELETE", CHAT, "use POST"),
        ("POST", "/v1/models", "use GET"),
        ("PUT", "/openapi.json", "use GET"),
        ("POST", "/", "use GET,HEAD; clients send to /v1/chat/completions: clients take the base URL"),
    ],
)
async def test_a_method_that_is_not_served_is_answered_with_those_that_are(
    client: Client, method: str, path: str, words: str
) -> None:
    answer = await client.ask(method, path)
    error = (await answer.json())["error"]
    assert (answer.status, error["type"], error["code"]) == (405, "invalid_request_error", "http_405")
    assert error["message"].startswith(f"{method} {path}: method not allowed; ")
    assert words in error["message"]
    assert answer.headers["Allow"] in error["message"]


async def test_a_path_is_bounded_and_sanitized(client: Client) -> None:
    message = (await (await client.ask("GET", "/" + "x" * 900 + "<script>")).json())["error"]["message"]
    assert ("x" * 95 + "..." in message, len(message) < 400) == (True, True)
    escaped = await client.ask("GET", "/a%22%3Cb%3E%C3%A9%0D%0Ac")
    assert (await escaped.json())["error"]["message"].startswith("GET /a??b????c: no such route")


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/health", "/nothing", "/peer/v1/beat", "/admin/v1/status"])
async def test_every_response_is_signed(client: Client, path: str) -> None:
    answer = await client.ask("DELETE", path)
    assert answer.headers["x-request-id"] == answer.headers["X-Mlxrack-Request-Id"]
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["Server"] == "mlxrack"
    if answer.status == 405:
        message = (await answer.json())["error"]["message"]
        assert message == f"DELETE {path}: method not allowed; use {answer.headers['Allow']}"
    expecting = await client.ask("POST", CHAT, data=b"{}", headers={"Expect": "wonders"})
    assert (expecting.status, expecting.headers["x-request-id"][:4]) == (417, "req_")


@pytest.mark.parametrize("encoding", ["br", "zstd", "xyz", "x-gzip", "gzip, gzip", "BR"])
async def test_an_encoding_that_is_not_supported_is_a_415_that_names_those_that_are(
    client: Client, encoding: str
) -> None:
    for path in (CHAT, "/v1/completions", "/v1/embeddings"):
        answer = await client.ask("POST", path, data=b"{}", headers={"Content-Encoding": encoding})
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (415, "unsupported_encoding")
        assert "send gzip or deflate, or none" in error["message"]
        assert answer.headers["Accept-Encoding"] == "gzip, deflate"
        assert answer.headers["x-request-id"].startswith("req_")


async def test_a_compressed_body_is_read(client: Client) -> None:
    plain = json.dumps(ASKED).encode()
    bodies = {"gzip": gzip.compress(plain), "GZIP": gzip.compress(plain), "deflate": zlib.compress(plain)}
    for encoding, body in {**bodies, "identity": plain, "": plain}.items():
        answer = await client.ask("POST", CHAT, data=body, headers={"Content-Encoding": encoding})
        assert answer.status == 200
    wrong = await client.ask("POST", CHAT, data=plain, headers={"Content-Encoding": "deflate"})
    assert wrong.status == 400
