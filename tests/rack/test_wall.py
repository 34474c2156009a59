"""The wall at real agents: a server that poses as every provider sees what the policy lets out, redacted, and nothing
else.

`MLXRACK_WALL=10000` sends that many SENSITIVE requests in each state instead of a few."""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fake_providers import HOSTS, FakeProvider, certificates, openai_chat, stream
from tests.posing_agent import VARIABLE
from tests.rack.harness import Agent, Answer, events_of, model, rack, until

REQUESTS = int(os.environ.get("MLXRACK_WALL", "60"))
KEYS = {"alice": "alice's key", "bob": "bob's key", "hr": "the key of personnel"}
MAIL, CARD, IBAN = "erika.mustermann@firma-beispiel.de", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00"
POLICY = """
version = "test"
[[keys]]
id = "hr"
sensitive = true
[[providers]]
name = "openai"
kind = "openai"
secret = "env:MLXRACK_TEST_PROVIDER_KEY"
usd_per_mtok_in = "1"
usd_per_mtok_out = "2"
[[allow]]
provider = "openai"
use = "gpt-5-mini"
keys = ["alice", "hr"]
classes = ["ROUTINE"]
models = ["m"]
"""


class Providers:
    """Fake providers under the names of all real ones; each repeats the last message that it was sent."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        served, self._trust = certificates(folder)
        self.all = {host: FakeProvider(_repeat, tls=served[host]) for host in HOSTS}
        self.ca = str(next(folder.rglob("ca.pem")))

    def __enter__(self) -> "Providers":
        self._thread.start()
        for one in self.all.values():
            asyncio.run_coroutine_threadsafe(one.__aenter__(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.all.values():
            asyncio.run_coroutine_threadsafe(one.__aexit__(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> int:
        return sum(one.connections for one in self.all.values())

    @property
    def bodies(self) -> list[str]:
        return [request.body.decode() for one in self.all.values() for request in one.requests]


async def _repeat(provider: FakeProvider, writer: asyncio.StreamWriter) -> None:
    said = provider.asked[writer].json["messages"][-1]["content"]
    pieces = [said[at : at + 7] for at in range(0, len(said), 7)]
    await stream(openai_chat(*pieces))(provider, writer)


@pytest.fixture
def providers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Providers]:
    folder = tmp_path / "providers"
    folder.mkdir()
    with Providers(folder) as found:
        described = {"ports": {host: one.port for host, one in found.all.items()}, "ca": found.ca}
        monkeypatch.setenv(VARIABLE, json.dumps(described))
        monkeypatch.setenv("MLXRACK_TEST_PROVIDER_KEY", "sk-of-the-test")
        yield found


@contextlib.contextmanager
def gateway(folder: Path, *models: dict[str, Any], policy: str = POLICY, extra: str = "") -> Iterator[Agent]:
    """One agent that finds the fake providers, with a policy ("" for none)."""
    text = extra
    if policy:
        (folder / "policy.toml").write_text(policy)
        text += f"[policy]\npath = {json.dumps(str(folder / 'policy.toml'))}\n"
    for name, key in KEYS.items():
        text += f'[[keys]]\nid = "{name}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
    with rack(folder, list(models), extra=text, start=False) as (agent,):
        agent.program = [sys.executable, "-m", "tests.posing_agent"]
        agent.start()
        if models:
            agent.ready()
        if policy:
            until(lambda: "nothing leaves" not in str(agent.status()["warnings"]), "it analyses")
        yield agent


def ask(agent: Agent, text: str, *, key: str = "alice", task_class: str = "ROUTINE", **more: Any) -> Answer:
    headers = {"Authorization": f"Bearer {KEYS[key]}"} | ({"X-Task-Class": task_class} if task_class else {})
    return agent.chat(text, headers=headers, **more)


def said(answer: Answer) -> str:
    return str(answer.json["choices"][0]["message"]["content"])


def test_without_a_policy_nothing_leaves_when_the_rack_cannot_serve(tmp_path: Path, providers: Providers) -> None:
    with gateway(tmp_path, policy="") as agent:
        for task_class in ("ROUTINE", "REASONING", "ORCHESTRATION", "SENSITIVE", ""):
            assert ask(agent, "hello", task_class=task_class).status in (404, 503)
        assert providers.connections == 0


def test_only_what_a_key_was_allowed_leaves_redacted_and_comes_back_whole(tmp_path: Path, providers: Providers) -> None:
    text = f"Write to {MAIL} that card {CARD} and account {IBAN} are closed."
    with gateway(tmp_path) as agent:
        answer = ask(agent, text)
        assert (answer.status, answer.headers.get("X-Mlxrack-Place")) == (200, "outside"), answer.body
        assert (answer.headers["X-Mlxrack-Provider"], answer.json["model"]) == ("openai", "gpt-5-mini")
        assert said(answer) == text, "the placeholders are restored"
        streamed = ask(agent, text, stream=True)
        pieces = [one["choices"][0]["delta"].get("content") or "" for one in events_of(streamed)[:-1] if one["choices"]]
        assert "".join(pieces) == text
        assert len(providers.bodies) == 2
        for body in providers.bodies:
            for value in (MAIL, CARD, CARD.replace(" ", ""), IBAN, IBAN.replace(" ", ""), "Mustermann", KEYS["alice"]):
                assert value.lower() not in body.lower()
        seen = providers.connections
        # another key, another class, a guess, a key that is SENSITIVE, what only the rack can do
        assert ask(agent, "hello", key="bob").status in (404, 503)
        assert ask(agent, "hello", task_class="REASONING").status in (404, 503)
        assert ask(agent, "hello", task_class="").status in (404, 503)
        assert ask(agent, "hello", key="hr").status in (404, 503)
        assert ask(agent, "hello", logprobs=True).status in (404, 503)
        assert ask(agent, "hello", model="another").status in (404, 503)
        # a message that was in a SENSITIVE request stays, whoever sends it
        assert ask(agent, "the diagnosis of Mr Miller", task_class="ROUTINE, SENSITIVE").status in (404, 503)
        assert ask(agent, "The diagnosis  of Mr Miller").status in (404, 503)
        assert providers.connections == seen
        told = [
            json.loads(line) for file in agent.state.glob("audit/*.jsonl") for line in file.read_text().splitlines()
        ]
        ended = [line for line in told if line.get("kind") == "ended"]
        assert ended[0]["answered"]["category"] == "outside"
        assert ended[0]["redacted"] == {"email": 1, "card": 1, "iban": 1}
        assert ended[0]["fallback"] == "no_replica"
        assert ended[0]["cost_micro"] > 0
        assert {line["facts"]["key_id"] for line in ended} == {"alice", "bob", "hr"}


def test_a_full_rack_overflows_and_an_idle_one_does_not(tmp_path: Path, providers: Providers) -> None:
    limits = "[limits]\nin_flight_per_model = 1\n"
    with gateway(tmp_path, model(fake_step_s=0.02), extra=limits) as agent, ThreadPoolExecutor(4) as pool:
        assert ask(agent, "one").headers["X-Mlxrack-Place"] == "rack"
        assert providers.connections == 0
        long = [pool.submit(ask, agent, "long", max_tokens=400) for _ in range(4)]
        until(lambda: providers.connections > 0, "some of them leave")
        places = [one.result().headers.get("X-Mlxrack-Place", "") for one in long]
        assert sorted(set(places)) == ["outside", "rack"]
        served = agent.status()
        assert served["boundary"]["providers"][0]["provider"] == "openai"


def test_the_content_filter_holds_for_every_answer_of_the_rack(tmp_path: Path, providers: Providers) -> None:
    words = '[content]\npatterns = ["queue|rack|node|drain"]\n'
    with gateway(tmp_path, model(), policy=words) as agent:
        answer = ask(agent, "x", max_tokens=60)
        assert "[withheld]" in said(answer)
        assert answer.json["choices"][0]["finish_reason"] == "content_filter"
        streamed = ask(agent, "x", max_tokens=60, stream=True)
        for body in (answer.body, streamed.body):
            assert not any(word in body for word in (b"queue", b" rack", b" node ", b"drain"))


def shape(rng: random.Random, number: int) -> dict[str, Any]:
    """A request's fields, of any shape that the API takes."""
    more: dict[str, Any] = {"stream": rng.random() < 0.3, "max_tokens": rng.choice((1, 5))}
    if rng.random() < 0.3:
        more["tools"] = [{"type": "function", "function": {"name": f"f{number}", "parameters": {"type": "object"}}}]
    if rng.random() < 0.2:
        more["response_format"] = {"type": "json_object"}
    if rng.random() < 0.3:
        more["metadata"] = {"task_class": "SENSITIVE"}
    return more


@pytest.mark.parametrize("state", ["nothing serves", "full", "killed"])
def test_nothing_sensitive_leaves_in_any_state(tmp_path: Path, providers: Providers, state: str) -> None:
    rng, limits = random.Random(state), "[limits]\nin_flight_per_model = 1\nload_wait_s = 1\n"
    models = [] if state == "nothing serves" else [model(fake_step_s=0.01)]
    with gateway(tmp_path, *models, extra=limits) as agent, ThreadPoolExecutor(8) as pool:

        def send(number: int) -> int:
            fields = shape(rng, number)
            declared = rng.choice(("SENSITIVE", "ROUTINE, SENSITIVE", "sensitive"))
            key = rng.choice(("alice", "hr"))
            task_class = "ROUTINE" if key == "hr" or "metadata" in fields else declared
            answer = ask(agent, f"case {number} of {MAIL}", key=key, task_class=task_class, **fields)
            if answer.status == 400:
                bad.append(answer.body)
            return answer.status

        def kill() -> None:
            for one in agent.status()["models"]:
                with contextlib.suppress(ProcessLookupError):
                    if one.get("pid"):
                        os.kill(one["pid"], 9)

        bad: list[bytes] = []
        found: list[int] = []
        for at in range(0, REQUESTS, 20):
            waiting = [pool.submit(send, number) for number in range(at, min(REQUESTS, at + 20))]
            if state == "killed":
                kill()
            found += [one.result() for one in waiting]
        assert providers.connections == 0
        assert set(found) <= {200, 404, 429, 502, 503}, bad[:3]
        assert len(found) == REQUESTS
        assert ask(agent, "something else").status in (200, 502, 503), "and it still works"


def test_a_marker_in_any_field_is_in_no_file(tmp_path: Path, providers: Providers) -> None:
    fields: dict[str, Any] = {
        "user": "MARKER-user",
        "metadata": {"a": "MARKER-meta", "task_class": "ROUTINE"},
        "stop": ["MARKER-stop"],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "MARKER-name",
                    "description": "MARKER-described",
                    "parameters": {"type": "object", "properties": {"MARKER-key": {"enum": ["MARKER-enum"]}}},
                },
            }
        ],
        "MARKER-field": 1,
    }
    with gateway(tmp_path, model()) as agent:
        for task_class in ("ROUTINE", "SENSITIVE", "MARKER-class"):
            ask(agent, "MARKER-text", task_class=task_class, **fields)
        ask(agent, "MARKER-text", model="MARKER-model", **fields)
        ask(agent, "MARKER-text", temperature="MARKER-value", **fields)
        agent.get("/v1/models/MARKER-path", Authorization="Bearer MARKER-bearer")
        agent.admin("POST", "seal")
        files = [path for path in tmp_path.rglob("*") if path.is_file() and "providers" not in path.parts]
        assert len(files) > 10
        assert [path for path in files if b"MARKER" in path.read_bytes()] == []
