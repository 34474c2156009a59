"""Poisoned requests beside valid ones: only the bad ones fail, each with a reason.

``MLXRACK_FUZZ`` is how many random requests are sent (``make fuzz`` sends 20,000).
"""

import http.client
import json
import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rack.harness import Agent, Answer, rack, until
from tests.tiny_model import TEMPLATE, write_tiny_model

FUZZ = int(os.environ.get("MLXRACK_FUZZ", "1000"))
RAISING = "{% if messages[0]['content'] == 'RAISE' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
STREAMS = 4

pytestmark = pytest.mark.timeout(900 + FUZZ // 20)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("poison")
    write_tiny_model(folder / "model", seed=6, template=RAISING, config={"max_position_embeddings": 2048})
    with rack(folder, [{"name": "m", "path": str(folder / "model"), "rows": 8, "cache_bytes": 4 << 20}]) as (one,):
        yield one


def post(agent: Agent, body: dict[str, Any] | bytes, path: str = "/v1/chat/completions") -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return agent.request("POST", path, raw, {"Content-Type": "application/json"}, timeout=60)


def chat(content: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": content}], **more}


def stream(number: int) -> dict[str, Any]:
    return chat(f"stream {number}", stream=True, temperature=0.8, seed=number, max_tokens=400)


def text_of(answer: Answer) -> str:
    events = [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for event in events for c in json.loads(event)["choices"])


def leave_early(agent: Agent) -> int:
    """A client that closes its connection in the middle of a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(stream(99)).encode())
    answer = connection.getresponse()
    answer.read(200)
    connection.close()
    return answer.status


def poisons(agent: Agent) -> list[tuple[str, int, Any]]:
    """(kind, expected status, sender)."""
    deep = '{"type": "object", "properties": {"a": ' * 300 + "{}" + "}}" * 300
    schema = {"type": "json_schema", "json_schema": {"name": "x"}}

    def with_schema(found: Any) -> dict[str, Any]:
        return chat(response_format={**schema, "json_schema": {"name": "x", "schema": found}})

    said = json.loads(post(agent, chat("earlier", temperature=0, max_tokens=20)).body)["choices"][0]["message"][
        "content"
    ]
    continued = {"model": "m", "prompt": f"<|user|>earlier\n<|assistant|>{said}", "max_tokens": 4, "temperature": 0}
    return [
        ("template raises", 400, lambda: post(agent, chat("RAISE"))),
        ("prompt and answer of before", 200, lambda: post(agent, continued, "/v1/completions")),
        ("the same again", 200, lambda: post(agent, continued, "/v1/completions")),
        ("schema of no type", 400, lambda: post(agent, with_schema({"type": "objekt"}))),
        ("schema that refers to nothing", 400, lambda: post(agent, with_schema({"$ref": "#/nowhere"}))),
        ("endless schema", 0, lambda: post(agent, with_schema({"$ref": "#"}))),
        ("schema 300 deep", 0, lambda: post(agent, with_schema(json.loads(deep)))),
        ("pattern of no end", 0, lambda: post(agent, with_schema({"type": "string", "pattern": "(a{1,999}){1,999}"}))),
        ("not a number", 400, lambda: post(agent, b'{"model": "m", "messages": [], "temperature": NaN}')),
        ("bias on no token", 400, lambda: post(agent, chat(logit_bias={"999999": 1}))),
        ("bias against everything", 200, lambda: post(agent, chat(logit_bias={str(n): -100 for n in range(258)}))),
        ("ten megabytes", 400, lambda: post(agent, chat("x" * (9 << 20)))),
        ("over the body's limit", 413, lambda: post(agent, chat("x" * (11 << 20)))),
        ("no tokens", 400, lambda: post(agent, chat(max_tokens=0))),
        ("more tokens than fit", 200, lambda: post(agent, chat(max_tokens=100_000))),
        ("empty text", 200, lambda: post(agent, {"model": "m", "prompt": "", "max_tokens": 3}, "/v1/completions")),
        (
            "half a character",
            0,
            lambda: post(agent, b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}'),
        ),
        ("no dice at all", 200, lambda: post(agent, chat(temperature=2, top_p=0))),
        ("sixteen answers", 200, lambda: post(agent, chat(n=16, temperature=2, max_tokens=3))),
        ("gone in the middle", 200, lambda: leave_early(agent)),
    ]


def test_poisoned_requests_affect_no_other_request(agent: Agent) -> None:
    alone = {n: text_of(post(agent, stream(n))) for n in range(STREAMS)}
    assert all(alone.values())
    harm = poisons(agent)
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: together.__setitem__(n, text_of(post(agent, stream(n)))))
        for n in range(STREAMS)
    ]
    for thread in threads:
        thread.start()
    for kind, due, send in harm:
        answer = send()
        status = answer if isinstance(answer, int) else answer.status
        assert status in ((due,) if due else (200, 400)), f"{kind}: {status} {getattr(answer, 'body', b'')[:200]!r}"
        if isinstance(answer, Answer) and status >= 400:
            assert answer.json["error"]["message"], kind
    for thread in threads:
        thread.join()
    assert together == alone
    assert agent.get("/health").status == agent.get("/live").status == agent.get("/ready").status == 200
    assert agent.status()["models"][0]["restarts"] == 0


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2.5,
    1e308,
    "",
    "x",
    "auto",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
    {"type": "x"},
]
FIELDS = [
    *("messages", "model", "n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature"),
    *("top_p", "stop", "seed", "logprobs", "top_logprobs", "frequency_penalty", "presence_penalty", "logit_bias"),
    *("response_format", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "chat_template_kwargs"),
    *("timings", "user", "metadata", "echo", "suffix", "best_of", "prompt", "input", "encoding_format", "dimensions"),
    *("functions", "function_call", "modalities", "audio", "prediction", "verbosity", "wibble"),
]
PATHS = ("/v1/chat/completions", "/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def random_request(dice: random.Random) -> tuple[str, bytes]:
    """Mostly a valid request with a few fields mutated; sometimes bytes that are not a request."""
    path = dice.choice(PATHS)
    sound: dict[str, Any] = chat()
    if path == "/v1/completions":
        sound = {"model": "m", "prompt": "go"}
    elif path == "/v1/embeddings":
        sound = {"model": "m", "input": "x"}
    body = {**sound, **({"max_tokens": dice.randint(1, 6)} if path != "/v1/embeddings" else {})}
    for name in dice.sample(FIELDS, dice.randint(0, 3)):
        body[name] = dice.choice(VALUES)
    raw = json.dumps(body).encode()
    if dice.random() < 0.1:
        at = dice.randrange(len(raw))
        raw = raw[:at] + bytes([dice.randrange(256)]) + raw[at + dice.randint(0, 3) :]
    return path, raw


def test_random_requests_are_answered_or_rejected_with_a_reason(agent: Agent) -> None:
    dice = random.Random(FUZZ)
    work = [random_request(dice) for _ in range(FUZZ)]
    strange: list[str] = []
    statuses: dict[int, int] = {}

    def send(part: list[tuple[str, bytes]]) -> None:
        for path, raw in part:
            answer = post(agent, raw, path)
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            told = answer.status == 200 or (400 <= answer.status < 500 and answer.json["error"]["code"])
            if not told:
                strange.append(f"{answer.status} {path} {raw!r} {answer.body[:200]!r}")

    threads = [threading.Thread(target=send, args=(work[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not strange
    assert sum(statuses.values()) == FUZZ
    assert statuses.get(200, 0) > FUZZ // 10, "many are sound"
    assert post(agent, chat()).status == 200
    until(lambda: agent.status()["models"][0]["in_flight"] == 0, "nothing is left in flight")
    assert agent.status()["models"][0]["restarts"] == 0
