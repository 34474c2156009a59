"""Egress against providers behind real sockets: what is sent, what comes back, and what a provider that fails costs."""

import asyncio
import json
import socket
import ssl
import threading
import tracemalloc
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from agent.egress import connections, exchange, failures
from agent.egress.connections import Reach
from agent.egress.credentials import Credentials
from agent.egress.exchange import Exchange, Limits
from agent.egress.providers import Egress
from agent.policy.outgoing import Called, Outgoing, Piece, Turn
from agent.policy.redaction import Redacted
from agent.policy.rules import Provider, Rules
from shared.errors import Halt, RackError, Refused, Retryable
from tests import posing_agent
from tests.agent.egress.made import ENVIRON, KEY, PROMPT, answered, egress, failed, outgoing, provider, rules, sealed
from tests.fake_providers import (
    FakeProvider,
    Step,
    bomb,
    call_block,
    chunk,
    close,
    data,
    dribble,
    flood,
    hang,
    headers_without_end,
    message_end,
    message_start,
    openai_calls,
    openai_chat,
    posing,
    raw,
    status,
    stream,
)

TOOL = '{"name":"weather","description":"d","parameters":{"type":"object","properties":{"city":{"type":"string"}}}}'


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "UNTOLD_PAUSE_S", 0.0)


async def local(script: list[Step], sent: Outgoing | None = None, **more: Any) -> tuple[FakeProvider, Any]:
    """What a server on the premises, which is no Ollama, makes of a request: its answer, or its error."""
    async with FakeProvider(status(404), *script) as server:
        out = egress(provider("local", url=server.url, **more))
        try:
            found: Any = await answered(out, sealed(sent, category="premises"))
        except RackError as error:
            found = error
        finally:
            await out.close()
    server.requests = [one for one in server.requests if one.path != "/api/show"]
    return server, found


# ---- the three APIs, with TLS and the vendors' own names ----


async def test_openai_with_tools_and_parallel_calls(tmp_path: Path) -> None:
    calls = (("call_a", "weather", '{"city": "Köln"}'), ("call_b", "weather", '{"city": "Bonn"}'))
    earlier = Turn(role="assistant", content="", calls=(Called(id="c1", name="weather", arguments="{}"),))
    turns = (Turn(role="system", content="s"), Turn(role="user", content="u"), earlier)
    result = Turn(role="tool", content="sunny", call_id="c1")
    sent = outgoing(*turns, result, tools=(TOOL,), must_call="", one_call=True, stop=("\n\n",), seed=7, temperature=0.5)
    async with posing(tmp_path, stream(openai_calls(*calls))) as (fakes, reach):
        out = egress(provider("openai"), reach=reach)
        _, _, found, end = await answered(out, sealed(sent))
        await out.close()
    assert [(one.id, one.name, one.arguments) for one in found] == list(calls)
    assert (end.finish, end.prompt_tok, end.completion_tok) == ("tool_calls", 9, 3)
    (request,) = fakes["api.openai.com"].requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["accept-encoding"] == "identity"
    assert "cookie" not in request.headers
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert request.json == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 4096,
        "temperature": 0.5,
        "seed": 7,
        "stop": ["\n\n"],
        "tools": [{"type": "function", "function": json.loads(TOOL)}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "store": False,
    }
    assert sum(fake.connections for fake in fakes.values()) == 1


async def test_anthropic_with_tools(tmp_path: Path) -> None:
    answer = [message_start(), *call_block(0, "toolu_1", "weather", '{"city":', '"Köln"}'), *message_end("tool_use")]
    earlier = [Called(id=f"functions.weather:{n}", name="weather", arguments='{"city": "x"}') for n in (0, 1)]
    turns = (
        Turn(role="system", content="one"),
        Turn(role="user", content="u"),
        Turn(role="assistant", content="I look", calls=tuple(earlier)),
        *(Turn(role="tool", content=f"r{n}", call_id=one.id) for n, one in enumerate(earlier)),
        Turn(role="user", content="and now?"),
        Turn(role="system", content="two"),
    )
    model = "claude-opus-4-5"
    sent = outgoing(*turns, model=model, tools=(TOOL,), must_call="weather", temperature=1.5, seed=3, max_tokens=99)
    async with posing(tmp_path, stream(answer)) as (fakes, reach):
        out = egress(provider("anthropic"), reach=reach, model=model)
        _, _, (call,), end = await answered(out, sealed(sent))
        await out.close()
    assert (call.id, call.name, json.loads(call.arguments), end.finish) == (
        *("toolu_1", "weather", {"city": "Köln"}),
        "tool_calls",
    )
    (request,) = fakes["api.anthropic.com"].requests
    assert (request.path, request.headers["x-api-key"]) == ("/v1/messages", KEY)
    assert request.headers["anthropic-version"] == "2023-06-01"
    assert "authorization" not in request.headers
    body = request.json
    assert (body["system"], body["max_tokens"], body["temperature"]) == ("one\n\ntwo", 99, 1.0)
    assert "seed" not in body
    assert body["tool_choice"] == {"type": "tool", "name": "weather"}
    assert body["tools"][0]["input_schema"] == json.loads(TOOL)["parameters"]
    user, assistant, results = body["messages"]
    assert user == {"role": "user", "content": [{"type": "text", "text": "u"}]}
    used = [block["id"] for block in assistant["content"][1:]]
    assert [block.get("tool_use_id") for block in results["content"]] == [*used, None], "results stand together"
    assert all(name.replace("_", "").isalnum() for name in used)


async def test_openrouter(tmp_path: Path) -> None:
    comment = b": OPENROUTER PROCESSING\n\n"
    async with posing(tmp_path, stream([comment, *openai_chat("Hel", "lo")])) as (fakes, reach):
        out = egress(provider("openrouter"), reach=reach)
        text, *_ = await answered(out, sealed(outgoing(reasoning_effort="low")))
        await out.close()
    (request,) = fakes["openrouter.ai"].requests
    assert (text, request.path) == ("Hello", "/api/v1/chat/completions")
    assert request.json["reasoning"] == {"effort": "low"}
    assert request.json["provider"] == {"data_collection": "deny"}


async def test_pieces_arrive_as_they_are_sent() -> None:
    sent, heard = asyncio.Event(), asyncio.Event()

    async def waits(_: FakeProvider, __: asyncio.StreamWriter) -> None:
        sent.set()
        await heard.wait()

    first, *rest = openai_chat("a", "b")[1:]
    both = stream([first], end=False, then=waits)

    async def step(provider: FakeProvider, writer: asyncio.StreamWriter) -> None:
        await both(provider, writer)
        for event in rest:
            writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        writer.write(b"0\r\n\r\n")

    async with FakeProvider(status(404), step) as server, asyncio.timeout(60):
        out = egress(provider("local", url=server.url))
        async with aclosing(out.send(sealed(category="premises"))) as pieces:
            assert await anext(pieces) == Piece(text="a")
            heard.set()
            assert await anext(pieces) == Piece(text="b")
        await out.close()


# ---- closed by default ----


@pytest.mark.parametrize("sent", [outgoing(), "text", None, {"messages": []}, Turn(role="user", content="x"), b""])
async def test_nothing_but_what_redaction_made_is_sent(sent: Any) -> None:
    with pytest.raises(TypeError, match="redaction"):
        egress(provider()).send(sent)


def test_nobody_else_makes_one() -> None:
    kept: dict[str, Any] = {"provider": "p", "outgoing": outgoing(), "counts": {}, "originals": {}}
    with pytest.raises(TypeError):
        Redacted(object(), category="outside", **kept)

    class Forged:
        provider, category, outgoing = "p", "outside", outgoing()

    forged: Any = Forged()
    with pytest.raises(TypeError):
        egress(provider()).send(forged)


@pytest.mark.parametrize(
    ("policy", "request_of", "code"),
    [
        (Rules(), sealed(), "provider_not_allowed"),
        (rules(provider()), sealed(name="other"), "provider_not_allowed"),
        (rules(provider()), sealed(category="premises"), "provider_not_allowed"),
        (Rules(providers=(provider(),)), sealed(), "provider_not_allowed"),
        (rules(provider()), sealed(outgoing(model="another")), "provider_not_allowed"),
        (rules(provider("local", url="http://8.8.8.8/v1")), sealed(category="premises"), "provider_setup"),
        (rules(provider("local", url="http://0x7f.1/v1")), sealed(category="premises"), "provider_setup"),
        (rules(provider("compatible", url="https://10.0.0.1/v1")), sealed(), "provider_setup"),
        (rules(provider("compatible", url="https://user:word@example.com/v1")), sealed(), "provider_setup"),
    ],
)
async def test_what_the_policy_does_not_have_opens_no_socket(
    policy: Rules, request_of: Redacted, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a socket or a name")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket, "socket", refused)
    out = Egress(lambda: policy, ENVIRON)
    with pytest.raises(RackError) as caught:
        out.send(request_of)
    assert caught.value.code == code
    assert out.status() is not None
    await out.close()


@pytest.mark.parametrize("kind", ["openai", "anthropic", "openrouter"])
async def test_without_a_key_nobody_is_asked(kind: str, tmp_path: Path) -> None:
    async with posing(tmp_path, hang) as (fakes, reach):
        for secret in ("env:MISSING", "", f"file:{tmp_path}/none"):
            out = egress(provider(kind, secret=secret), reach=reach)
            error = await failed(out, sealed())
            assert error.code == "provider_setup"
            await out.close()
        assert [fake.connections for fake in fakes.values()] == [0, 0, 0]


async def test_a_model_that_is_computed_elsewhere_is_refused_by_name_and_by_its_server() -> None:
    shown = {"license": "l", "remote_host": "https://ollama.com:443", "remote_model": "gpt-oss:120b"}
    async with FakeProvider(status(200, shown)) as server:
        for model in ("gpt-oss:120b-cloud", "kimi-k2:cloud", "x-CLOUD:latest"):
            out = egress(provider("local", url=server.url), model=model)
            with pytest.raises(Halt, match="computed by its vendor"):
                out.send(sealed(outgoing(model=model), category="premises"))
        assert server.connections == 0
        out = egress(provider("local", url=server.url))
        error = await failed(out, sealed(category="premises"))
        assert (error.code, "vendor" in error.message) == ("provider_setup", True)
        assert [one.path for one in server.requests] == ["/api/show"]
        assert PROMPT not in str(server.requests)
        await out.close()


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        (status(200, {"details": {}}), True),
        (status(404, b"404 page not found"), True),
        (status(200, {"error": "Unexpected endpoint or method."}), True),
        (status(500, b""), False),
        (status(200, b'{"remote_'), False),
        (close, False),
    ],
)
async def test_a_server_that_does_not_say_is_not_sent_the_request(answer: Step, asked: bool) -> None:
    async with FakeProvider(answer, stream(openai_chat("x"))) as server:
        out = egress(provider("local", url=server.url))
        if asked:
            for _ in (1, 2):
                await answered(out, sealed(category="premises"))
        else:
            assert isinstance(await failed(out, sealed(category="premises")), Retryable)
        paths = [one.path for one in server.requests]
        assert paths == ["/api/show"] + ["/v1/chat/completions"] * (2 if asked else 0)
        await out.close()


# ---- where a name leads ----


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("local", ["8.8.8.8"]),
        ("local", ["127.0.0.1", "8.8.8.8"]),
        ("local", ["100.64.0.1"]),
        ("local", ["0.0.0.0"]),
        ("local", ["::ffff:8.8.8.8"]),
        ("compatible", ["127.0.0.1"]),
        ("compatible", ["8.8.8.8", "192.168.1.1"]),
        ("compatible", ["fd00::1"]),
        ("compatible", []),
    ],
)
async def test_a_name_that_leads_elsewhere_is_not_connected_to(kind: str, found: list[str]) -> None:
    made = list[str]()

    def resolved(host: str, port: int) -> list[connections.Endpoint]:
        made.append(host)
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [connections.Endpoint(family[":" in one], one, port) for one in found]

    async with FakeProvider(hang) as server:
        scheme = "http" if kind == "local" else "https"
        one = provider(kind, url=f"{scheme}://somewhere.example:{server.port}/v1")
        out = egress(one, reach=Reach(addresses=resolved))
        error = await failed(out, sealed(category=one.category))
        assert isinstance(error, Halt)
        assert error.code == "provider_setup"
        assert (server.connections, made) == (0, ["somewhere.example"])
        await out.close()


async def test_the_address_that_was_checked_is_the_one_that_is_connected_to() -> None:
    """A name server that answers otherwise the second time (DNS rebinding) is asked once for each connection."""
    async with FakeProvider(status(404), stream(openai_chat("x"))) as server:
        answers = iter([*["127.0.0.1"] * 2, "8.8.8.8"])

        def resolved(host: str, port: int) -> list[connections.Endpoint]:
            return [connections.Endpoint(socket.AF_INET, next(answers), port)]

        out = egress(provider("local", url=f"http://ollama.lan:{server.port}/v1"), reach=Reach(addresses=resolved))
        assert (await answered(out, sealed(category="premises")))[0] == "x"
        assert isinstance(await failed(out, sealed(category="premises")), Halt)
        assert len(server.requests) == 2
        await out.close()


async def test_the_last_place_is_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that only the connection knows: nothing before it refuses one that is written in a URL."""
    monkeypatch.setattr("agent.egress.providers.unfit_url", lambda *_: "")
    out = egress(provider("compatible", url="https://127.0.0.1:9/v1"))
    error = await failed(out, sealed())
    assert isinstance(error, Halt)
    assert "not a public address" in error.message
    await out.close()


async def test_a_certificate_that_is_not_trusted_ends_it(tmp_path: Path) -> None:
    async with posing(tmp_path, stream(openai_chat("x"))) as (fakes, reach):
        out = egress(provider("openai"), reach=Reach(addresses=reach.addresses, unfit=reach.unfit))
        error = await failed(out, sealed())
        assert isinstance(error, Halt)
        assert "CA that is not known" in error.message
        other = reach._replace(addresses=lambda _, port: reach.addresses("api.anthropic.com", port))
        wrong = egress(provider("openai"), reach=other)
        error = await failed(wrong, sealed())
        assert isinstance(error, Halt)
        assert "not made for api.openai.com" in error.message
        assert [fake.requests for fake in fakes.values()] == [[], [], []]
        await out.close()
        await wrong.close()


# ---- providers that fail, hang and lie ----

BAD = {"message": f"bad: {PROMPT} {KEY}", "type": "invalid_request_error", "code": None}
TOO_LONG = {"message": PROMPT, "type": "invalid_request_error", "code": "context_length_exceeded"}
NO_MONEY = {"message": "m", "type": "insufficient_quota", "code": "insufficient_quota"}


@pytest.mark.parametrize(
    ("answer", "kind", "code", "asked"),
    [
        (status(400, {"error": BAD}), Refused, "provider_refused", 1),
        (status(400, {"error": TOO_LONG}), Refused, "context_length_exceeded", 1),
        (status(413, b"too large"), Refused, "provider_refused", 1),
        (status(422, {"detail": [{"input": PROMPT}]}), Refused, "provider_refused", 1),
        (status(401, {"error": {**BAD, "code": "invalid_api_key"}}), Halt, "provider_setup", 1),
        (status(403, {"type": "error", "error": {"type": "permission_error"}}), Halt, "provider_setup", 1),
        (status(402, {"error": {"code": 402, "message": PROMPT}}), Halt, "provider_setup", 1),
        (status(404, {"error": {"type": "not_found_error"}}), Halt, "provider_setup", 1),
        (status(429, {"error": NO_MONEY}), Halt, "provider_setup", 1),
        (status(429, {"error": {"type": "rate_limit_error"}}, Retry_After="0"), Retryable, "provider_busy", 2),
        (status(429, {"error": {"type": PROMPT}}, Retry_After="40"), Retryable, "provider_busy", 1),
        (status(529, {"type": "error", "error": {"type": "overloaded_error"}}), Retryable, "provider_busy", 2),
        (status(500, b"<html>" + PROMPT.encode()), Retryable, "provider_failed", 2),
        (status(503, b"", Retry_After="Thu, 01 Jan 1970 00:00:00 GMT"), Retryable, "provider_busy", 2),
        (status(408, b""), Retryable, "provider_timeout", 1),
        (status(302, b"", Location="http://127.0.0.1:1/"), Halt, "provider_setup", 1),
        (status(307, b"", Location="/v1/elsewhere"), Halt, "provider_setup", 1),
        (status(204), Retryable, "provider_failed", 2),
        (close, Retryable, "provider_failed", 2),
        (raw(b"SSH-2.0-OpenSSH_9.9\r\n"), Retryable, "provider_failed", 2),
        (headers_without_end, Retryable, "provider_failed", 2),
        (status(200, b"<html>log in</html>", Content_Type="text/html"), Halt, "provider_setup", 1),
        (status(200, {"choices": [{"message": {"content": PROMPT}}]}), Retryable, "provider_failed", 1),
        (bomb(64), Retryable, "provider_failed", 1),
        (stream(openai_chat("x"), Content_Encoding="br"), Retryable, "provider_failed", 1),
        (stream([chunk({"content": "x"})], end=False, then=close), Retryable, "provider_failed", 1),
        (stream([chunk({"content": "x"})]), Retryable, "provider_failed", 1),
        (stream([data({"error": {"message": PROMPT, "type": "server_error"}})]), Retryable, "provider_failed", 1),
        (stream([data({"error": {"code": PROMPT, "type": "rate_limit_error"}})]), Retryable, "provider_failed", 1),
        (stream([data({"error": {"type": "overloaded_error"}})]), Retryable, "provider_busy", 1),
        (stream([data(b"{]")]), Retryable, "provider_failed", 1),
        (stream([], end=False, then=flood), Retryable, "provider_failed", 1),
    ],
)
async def test_a_provider_that_fails_or_lies_costs_a_clear_error(
    answer: Step, kind: type[RackError], code: str, asked: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tracemalloc.start()
    try:
        server, error = await local([answer], secret="env:API_KEY")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(error, kind), error
    assert error.code == code
    assert len(server.requests) == asked, "at most one other attempt, on another connection"
    logged = "".join(capsys.readouterr())
    assert ("provider_failed" in logged) == (kind is not Refused)
    said = f"{error.message} {error!r} {error.__context__!r} {error.__cause__!r} {logged}"
    assert PROMPT not in said
    assert KEY not in said
    assert peak < 32 << 20


SAYS = stream([chunk({"content": "x"})], end=False, then=hang)


@pytest.mark.parametrize(
    ("answer", "what", "limits"),
    [
        (hang, "first token", {"first_token_s": 0.4}),
        (stream([], end=False, then=hang), "first token", {"first_token_s": 0.4}),
        (stream([chunk({"role": "assistant"})] * 3, end=False, then=hang), "first token", {"first_token_s": 0.4}),
        (stream([], end=False, then=dribble), "first token", {"first_token_s": 0.4}),
        (SAYS, "next piece", {}),
        (stream([chunk({"content": "x"})], end=False, then=dribble), "complete answer", {"request_s": 1.5}),
        (SAYS, "complete answer", {"request_s": 0.4, "first_token_s": 30.0}),
    ],
)
async def test_a_provider_that_hangs_is_given_up(
    answer: Step, what: str, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "GAP_S", 0.4 if what == "next piece" else 30)
    server, error = await local([answer], **limits)
    assert (error.code, what in error.message) == ("provider_timeout", True), error.message
    assert len(server.requests) <= 1, "what took all the time is not tried again"


async def early_hints(_: FakeProvider, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 500)
        await writer.drain()


async def test_hints_without_end_are_not_an_answer() -> None:
    _, error = await local([early_hints], first_token_s=0.4)
    assert error.code == "provider_timeout"


@pytest.mark.parametrize("where", ["name", "connection", "key"])
async def test_what_hangs_before_a_request_is_sent_is_given_up(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECT_S", 0.4)
    go = threading.Event()

    def waits(*_: object) -> Any:
        go.wait(60)
        raise OSError("late")

    async with FakeProvider(hang) as silent, posing(tmp_path, hang) as (_, reach):
        if where == "connection":  # accepts, and never speaks TLS
            reach = reach._replace(
                addresses=lambda *_: [connections.Endpoint(socket.AF_INET, "127.0.0.1", silent.port)]
            )
        elif where == "name":
            reach = reach._replace(addresses=waits)
        else:
            monkeypatch.setattr("agent.egress.providers.Credentials", lambda e, clock: Credentials(e, look_up=waits))
        out = egress(provider("openai", first_token_s=30 if where != "key" else 0.4), reach=reach)
        error = await failed(out, sealed())
        assert error.code == ("provider_setup" if where == "key" else "provider_timeout"), error.message
        go.set()
        await out.close()


async def test_a_client_that_reads_slowly_costs_the_provider_nothing() -> None:
    """What a client takes to read is not the provider's time: it must not close a provider for everybody."""
    go = asyncio.Event()
    first, *rest = openai_chat("a", "b")[1:]

    body = b"".join([first, *rest])
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def step(provider: FakeProvider, writer: asyncio.StreamWriter) -> None:
        await raw(head + first)(provider, writer)
        await go.wait()
        await raw(b"".join(rest))(provider, writer)

    async with FakeProvider(status(404), step) as server:
        out = egress(provider("local", url=server.url, request_s=1.5))
        async with aclosing(out.send(sealed(category="premises"))) as pieces:
            assert await anext(pieces) == Piece(text="a")
            await asyncio.sleep(1.6)
            go.set()
            assert await anext(pieces) == Piece(text="b")
        assert out.status()[0]["problem"] == ""
        await out.close()


async def test_a_provider_that_never_pauses_meets_its_limit() -> None:
    class Ready:
        content: Any = None

        async def readany(self) -> bytes:
            return b"data: {}\n\n"

    response: Any = Ready()
    response.content = response
    loop = asyncio.get_running_loop()
    over = Limits(provider("local", url="http://127.0.0.1:1/v1", first_token_s=5), loop.time() - 5)
    with pytest.raises(Retryable, match="first token"):
        await Exchange(Any, Any).read(response, provider(), over)  # type: ignore[arg-type]


def test_no_keys_of_tls_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    context = connections.trust()
    assert context.keylog_filename is None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


async def test_a_request_is_tried_once_more_on_another_connection() -> None:
    server, found = await local([status(500), stream(openai_chat("x"))])
    assert (found[0], server.connections, len(server.requests)) == ("x", 3, 2)
    assert server.requests[0].body == server.requests[1].body


async def test_an_answer_that_has_begun_is_never_asked_for_again() -> None:
    server, error = await local([stream([chunk({"content": "x"})], end=False, then=close), stream(openai_chat("y"))])
    assert (error.code, len(server.requests)) == ("provider_failed", 1)


async def test_what_follows_the_end_is_not_read() -> None:
    _, found = await local([stream([*openai_chat("x"), b"data: {]\n\n"], end=False, then=hang)])
    assert found[0] == "x"


async def test_an_answer_too_many_is_nobodys() -> None:
    """Bytes after an answer would be the next request's answer, if it had the same connection."""
    body = b"".join(openai_chat("mine"))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
    stolen = head.replace(b"%d" % len(body), b"9") + b"data: {}\n"
    async with FakeProvider(status(404), raw(head + body + stolen)) as server:
        out = egress(provider("local", url=server.url))
        for _ in range(2):
            assert (await answered(out, sealed(category="premises")))[0] == "mine"
        assert server.connections == 3
        await out.close()


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_closes_the_connection(begun: bool) -> None:
    events = [chunk({"content": "x"})] if begun else []
    async with FakeProvider(status(404), stream(events, end=False, then=hang)) as server, asyncio.timeout(60):
        out = egress(provider("local", url=server.url))
        pieces = out.send(sealed(category="premises"))
        reading = asyncio.ensure_future(anext(pieces))
        while len(server.requests) < 2:
            await asyncio.sleep(0.01)
        if begun:
            assert await reading == Piece(text="x")
        else:
            reading.cancel()
            await asyncio.wait([reading])
        await pieces.aclose()
        await server.hung_up.wait()
        assert out.rest_s("p") == 0, "who leaves says nothing of the provider"
        await out.close()


async def test_a_client_that_leaves_closes_the_connection_with_tls_too(tmp_path: Path) -> None:
    async with posing(tmp_path, stream([chunk({"content": "x"})], end=False, then=hang)) as (fakes, reach):
        out = egress(provider("openai"), reach=reach)
        pieces = out.send(sealed())
        assert await anext(pieces) == Piece(text="x")
        await pieces.aclose()
        async with asyncio.timeout(60):
            await fakes["api.openai.com"].hung_up.wait()
        await out.close()


async def test_many_at_once_have_their_own_answers(tmp_path: Path) -> None:
    async def echoes(provider: FakeProvider, writer: asyncio.StreamWriter) -> None:
        mine = provider.asked[writer].json["messages"][0]["content"]
        await stream(openai_chat(mine[:2], mine[2:]))(provider, writer)

    async with posing(tmp_path, echoes) as (fakes, reach):
        out = egress(provider("openai"), reach=reach)
        texts = [f"request {n}" for n in range(30)]
        sent = [sealed(outgoing(Turn(role="user", content=text))) for text in texts]
        found = await asyncio.gather(*(answered(out, one) for one in sent))
        assert sorted(one[0] for one in found) == sorted(texts)
        assert fakes["api.openai.com"].connections == 30
        await out.close()


async def test_a_large_request_is_sent_whole_by_a_name_that_the_system_resolves() -> None:
    large = "ä" * (3 << 20)
    async with FakeProvider(status(404), stream(openai_chat("x"))) as server:
        out = egress(provider("local", url=f"http://localhost:{server.port}/v1"))
        sent = sealed(outgoing(Turn(role="user", content=large)), category="premises")
        assert (await answered(out, sent))[0] == "x"
        assert server.requests[-1].json["messages"][0]["content"] == large
        assert server.requests[-1].headers["content-length"] == str(len(server.requests[-1].body))
        await out.close()


@pytest.mark.parametrize("broken", [outgoing(Turn(role="user", content="\ud800marker")), outgoing(tools=("{marker",))])
async def test_what_cannot_be_written_is_refused_without_quoting_it(broken: Outgoing) -> None:
    with pytest.raises(Refused) as caught:
        egress(provider()).send(sealed(broken))
    error = caught.value
    assert "marker" not in f"{error} {error.__context__!r} {error.__cause__!r}"


async def test_the_fake_speaks_what_the_official_client_reads() -> None:
    """So that what is tested against it is what OpenAI sends."""
    import openai

    call = ("call_a", "weather", '{"city": "Köln"}')
    tools: Any = [{"type": "function", "function": json.loads(TOOL)}]
    asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "u"}]}
    asked["stream_options"] = {"include_usage": True}
    async with (
        FakeProvider(stream(openai_chat("Hel", "lo")), stream(openai_calls(call))) as server,
        openai.AsyncOpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        async with client.chat.completions.stream(**asked) as first:
            done = await first.get_final_completion()
        assert (done.choices[0].message.content, done.usage and done.usage.prompt_tokens) == ("Hello", 9)
        async with client.chat.completions.stream(**asked, tools=tools) as second:
            done = await second.get_final_completion()
        made = [one.function for one in done.choices[0].message.tool_calls or ()]
        assert [(one.name, json.loads(one.arguments)) for one in made] == [("weather", {"city": "Köln"})]


async def test_another_program_with_the_same_names_is_for_tests_alone(tmp_path: Path) -> None:
    """`tests.posing_agent` maps names in a process of its own; here, what it maps them with."""
    async with posing(tmp_path, stream(openai_chat("x"))) as (fakes, _):
        described = {"ports": {host: fake.port for host, fake in fakes.items()}, "ca": str(tmp_path / "ca" / "ca.pem")}
        out = egress(provider("openai"), reach=posing_agent.posing(json.dumps(described)))
        assert (await answered(out, sealed()))[0] == "x"
        await out.close()


# ---- the breaker ----


async def test_a_provider_that_fails_is_left_alone_and_tried_again() -> None:
    now = [100.0]
    async with FakeProvider(status(404), *[status(500)] * 6, stream(openai_chat("x"))) as server:
        out = egress(provider("local", url=server.url), clock=lambda: now[0])
        for _ in range(3):
            assert (await failed(out, sealed(category="premises"))).code == "provider_failed"
        asked = server.connections
        error = await failed(out, sealed(category="premises"))
        assert isinstance(error, Retryable)
        assert (error.code, error.retry_after_s) == ("provider_busy", 5.0)
        assert server.connections == asked, "nobody was asked"
        (shown,) = out.status()
        assert (shown["rests_s"], "HTTP 500" in shown["problem"]) == (5.0, True)
        now[0] += 5
        assert (await answered(out, sealed(category="premises")))[0] == "x"
        assert (out.rest_s("p"), out.status()[0]["problem"]) == (0, "")
        await out.close()


async def test_bad_requests_say_nothing_of_the_provider() -> None:
    async with FakeProvider(status(404), status(400, {"error": BAD})) as server:
        out = egress(provider("local", url=server.url))
        for _ in range(20):
            assert (await failed(out, sealed(category="premises"))).code == "provider_refused"
        assert out.rest_s("p") == 0
        await out.close()


async def test_a_provider_that_says_when_to_come_back_is_not_asked_before() -> None:
    async with FakeProvider(status(404), status(429, b"", Retry_After="3600")) as server:
        out = egress(provider("local", url=server.url))
        error = await failed(out, sealed(category="premises"))
        assert isinstance(error, Retryable)
        assert error.retry_after_s == 3600
        assert 100 < out.rest_s("p") <= 120, "and cannot keep itself from being asked for hours"
        assert (await failed(out, sealed(category="premises"))).code == "provider_busy"
        assert len(server.requests) == 2
        await out.close()


# ---- keys ----


async def test_a_key_that_was_renewed_is_found_at_the_first_401() -> None:
    keys = {"API_KEY": "old"}
    policy: list[Provider] = []
    async with FakeProvider(status(404), stream(openai_chat("x")), status(401), stream(openai_chat("y"))) as server:
        policy.append(provider("local", url=server.url, secret="env:API_KEY"))
        out = Egress(lambda: rules(*policy), keys)
        assert (await answered(out, sealed(category="premises")))[0] == "x"
        keys["API_KEY"] = "new"
        assert (await answered(out, sealed(category="premises")))[0] == "y"
        used = [one.headers["authorization"] for one in server.requests[1:]]
        assert used == ["Bearer old", "Bearer old", "Bearer new"]
        await out.close()


async def test_no_proxy_and_nothing_else_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeProvider(hang) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        server, found = await local([stream(openai_chat("x"))])
        assert (found[0], proxy.connections) == ("x", 0)
    assert ENVIRON["OTHER"] not in str(server.requests)


# ---- caps ----


async def test_a_cap_without_a_price_refuses(tmp_path: Path) -> None:
    async with posing(tmp_path, stream(openai_chat("x"))) as (fakes, reach):
        out = egress(provider("openai", usd_per_day="5"), reach=reach)
        error = await failed(out, sealed())
        assert isinstance(error, Halt)
        assert "usd_per_mtok_in" in error.message
        assert fakes["api.openai.com"].connections == 0
        stated = egress(provider("openai", usd_per_day="5", usd_per_mtok_in="1", usd_per_mtok_out="2"), reach=reach)
        assert (await answered(stated, sealed()))[0] == "x"
        listed = egress(provider("openai", usd_per_month="5"), reach=reach, model="gpt-4o")
        assert (await answered(listed, sealed(outgoing(model="gpt-4o"))))[0] == "x"
        for one in (out, stated, listed):
            await one.close()
