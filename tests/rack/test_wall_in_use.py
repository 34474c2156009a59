"""The wall as an operator and a client use it: a server on the premises takes what the rack has no place for."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from agent import cli
from tests.rack.harness import Agent, Answer, model, rack

KEYS = {"batch": "the key of batch", "old": "an old key", "few": "a key for other models"}
POLICY = """
version = "test"
[[keys]]
id = "batch"
tokens_per_minute = 100000
[keys.day]
requests = 3
[[keys]]
id = "old"
expires = "2026-01-31"
[[keys]]
id = "few"
models = ["another"]
[[providers]]
name = "office"
kind = "local"
url = "http://127.0.0.1:PORT/v1"
[[allow]]
provider = "office"
use = "theirs"
keys = ["batch"]
classes = ["ROUTINE"]
models = ["absent"]
"""


class Office(http.server.BaseHTTPRequestHandler):
    """A server like LM Studio: chat completions, streamed."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Four tokens of an answer to seven."""
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.endswith("/chat/completions"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        one = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "theirs"}
        told = [{"index": 0, "delta": {"content": "from the office"}, "finish_reason": None}]
        end = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        counts = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
        for more in ({"choices": told}, {"choices": end}, {"choices": [], "usage": counts}):
            self.wfile.write(f"data: {json.dumps({**one, **more})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


@contextlib.contextmanager
def office() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Office) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("wall")
    with office() as port:
        (folder / "policy.toml").write_text(POLICY.replace("PORT", str(port)))
        text = f'[policy]\npath = "{folder / "policy.toml"}"\n'
        for name, key in KEYS.items():
            text += f'[[keys]]\nid = "{name}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
        with rack(folder, [model()], extra=text) as (one,):
            yield one


def as_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[key]}"}


def ask(agent: Agent, **more: object) -> Answer:
    return agent.chat("hello", headers={**as_key("batch"), "X-Task-Class": "ROUTINE"}, **more)


def test_an_answer_from_elsewhere_counts_like_one_of_the_rack(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(agent, model="absent")
    assert (answer.status, answer.headers.get("X-Mlxrack-Provider")) == (200, "office"), answer.body
    assert "X-Mlxrack-Node" not in answer.headers
    assert (answer.json["usage"]["prompt_tokens"], answer.json["usage"]["completion_tokens"]) == (7, 4)
    assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
    used = {one["name"]: one["used"] for one in agent.get("/v1/usage", **as_key("batch")).json["limits"]}
    assert used == {"day.requests": 1, "tokens_per_minute": 11}
    streamed = ask(agent, model="absent", stream=True, stream_options={"include_usage": True})
    assert b'"completion_tokens":4' in streamed.body
    assert streamed.headers["x-ratelimit-limit-tokens"] == "100000"
    assert ask(agent).headers["X-Mlxrack-Place"] == "rack"
    refused = ask(agent)
    assert (refused.status, refused.json["error"]["code"]) == (429, "budget_exhausted")
    assert "x-ratelimit-remaining-tokens" in refused.headers, "what a client that waits has to know"

    other = agent.folder / "next.toml"
    other.write_text('version = "next"\n')
    for source in ([], ["--from", str(next(agent.state.glob("audit/*.jsonl")))]):
        words = ["policy", "replay", "--policy", str(other), "--json", *source, "--config", str(agent.config)]
        assert cli.main(words) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["requests"], found["unread"]) == (4, 0)
        places = {one["place"]: one["requests"] for one in found["before"]}
        assert places == {"premises office": 2, "rack": 1, "refused: budget_exhausted": 1}
        assert [(one["before"], one["after"]) for one in found["moves"]] == [("premises office", "rack")]


def test_a_key_sees_the_models_that_it_may_use(agent: Agent) -> None:
    def listed(key: str) -> list[str]:
        return [one["id"] for one in agent.get("/v1/models", **as_key(key)).json["data"]]

    assert (listed("batch"), listed("few")) == (["m"], [])
    one = agent.get("/v1/models/m", **as_key("few"))
    assert (one.status, one.json["error"]["code"]) == (403, "model_not_allowed")
    assert agent.get("/v1/models/m", **as_key("batch")).status == 200
    for path in ("/v1/models", "/v1/models/m"):
        over = agent.get(path, **as_key("old"))
        assert (over.status, over.json["error"]["code"]) == (401, "key_expired")
    for key, names in (("batch", ["m"]), ("few", []), ("old", None)):
        models = agent.get("/", Accept="application/json", **as_key(key)).json.get("models")
        assert (None if models is None else [each["id"] for each in models]) == names, key
