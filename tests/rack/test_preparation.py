"""Prompts that are large, slow or fatal: what they do to others, and what others do not do to them.

``MLXRACK_ABUSE=1`` runs the long forms: a prefill of minutes, and 48 prompts of five megabytes with the latencies of
another key.
"""

import http.client
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from agent.config import hash_key
from tests.rack.harness import Agent, Answer, model, rack, until

LONG = "MLXRACK_ABUSE" in os.environ
LARGE = "x " * (5 << 19)
PREFILL_S = 180.0 if LONG else 4.5
WORDS = 4500
FIRST_TOKEN_S = 2.0

pytestmark = pytest.mark.timeout(1800)


def chat(content: str, **more: Any) -> bytes:
    message = {"role": "user", "content": content}
    return json.dumps({"model": "m", "messages": [message], "max_tokens": 4, **more}).encode()


def post(agent: Agent, body: bytes, key: str = "") -> Answer:
    return agent.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"} if key else {})


def test_a_first_token_is_waited_for_while_its_prompt_is_computed(tmp_path: Path) -> None:
    """Neither ``first_token_s`` nor ``request_s`` cuts it, and a stream is kept alive, also for OpenAI's client."""
    extra = f"[limits]\nfirst_token_s = {FIRST_TOKEN_S}\nrequest_s = 3\n[api]\nkeepalive_s = 1\n"
    with rack(tmp_path, [], [model(fake_prefill_tps=WORDS / PREFILL_S)], extra=extra) as (door, worker):
        until(lambda: door.chat("x", max_tokens=1).status == 200, "the gateway has found the worker")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{door.port}/v1", api_key="none", max_retries=0)
        raw: list[Answer] = []
        asking = threading.Thread(target=lambda: raw.append(post(door, chat("word " * WORDS, stream=True))))
        asking.start()
        with client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "other " * WORDS}], max_tokens=4, stream=True
        ) as stream:
            number = stream.response.headers["X-Mlxrack-Request-Id"]
            said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        asking.join()
        assert len(said.split()) == 4
        assert raw[0].status == 200
        comments, _, events = raw[0].body.decode().partition("data: ")
        assert comments.count(": keep-alive\n\n") >= 2
        assert ": keep-alive" not in events
        assert events.endswith("data: [DONE]\n\n")
        for one in (number, raw[0].headers["X-Mlxrack-Request-Id"]):
            (part,) = door.get(f"/debug/decision/{one}").json["parts"]
            steps = [step["what"] for step in part["steps"] if step["what"] != "waits"]
            assert steps == ["sent", "ended"], "neither cut nor begun again"
        assert worker.status()["models"][0]["restarts"] == 0


def test_a_loader_that_hangs_while_it_computes_a_prompt_is_given_up_and_replaced(tmp_path: Path) -> None:
    extra = f"[limits]\nfirst_token_s = {FIRST_TOKEN_S}\nstuck_s = 4\n[api]\nkeepalive_s = 1\n"
    worker = model(fake_prefill_tps=500.0)
    with rack(tmp_path, [], [worker], [worker], extra=extra) as (door, *workers):
        until(lambda: door.chat("x", max_tokens=1).status == 200, "the gateway has found a worker")
        answers: list[Answer] = []
        asking = threading.Thread(target=lambda: answers.append(post(door, chat("word " * 2000, stream=True))))
        asking.start()
        until(lambda: any(agent.status()["models"][0]["in_flight"] for agent in workers), "it is at a worker")
        hung = next(agent for agent in workers if agent.status()["models"][0]["in_flight"])
        os.kill(hung.status()["models"][0]["pid"], signal.SIGSTOP)
        asking.join()
        assert answers[0].status == 200
        assert answers[0].body.endswith(b"data: [DONE]\n\n")
        until(lambda: hung.status()["models"][0]["restarts"] == 1, "its loader is replaced, though nobody waits for it")
        until(lambda: hung.get("/ready").status == 200, "another has come")


def test_an_error_after_the_stream_was_kept_alive_is_an_event(tmp_path: Path) -> None:
    with rack(tmp_path, [model(fake_prefill_tps=200.0)], extra="[api]\nkeepalive_s = 0.5\n") as (agent,):
        connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=600)
        connection.request("POST", "/v1/chat/completions", chat("word " * 7000, stream=True))
        response = connection.getresponse()
        assert response.status == 200, "with the first comment"
        assert response.headers["X-Mlxrack-Node"] == "n1"
        os.kill(agent.status()["models"][0]["pid"], signal.SIGABRT)  # as a GPU without memory does
        events = [line for line in response.read().decode().split("\n") if line.startswith("data: ")]
        connection.close()
        assert [json.loads(line[6:])["error"]["code"] for line in events] == ["suspect_request"]


@pytest.mark.parametrize(("content", "ends"), [("!crash", 2), ("!raise", 2), ("!hang", 1)])
def test_a_request_that_ends_its_loader_ends_no_other(tmp_path: Path, content: str, ends: int) -> None:
    """It fails with a reason, at once where that is certain, else after the second loader, and is tried nowhere again;
    what waited behind it is answered, and what else is served."""
    extra = "[limits]\nprogress_s = 0.5\nstuck_s = 2\n"
    with rack(tmp_path, [model(), model("k", fake_step_s=0.02)], [model()], [], extra=extra) as agents:
        door = agents[2]
        for name in ("m", "k"):
            until(lambda name=name: door.chat("x", model=name).status == 200, "the gateway has found it")  # type: ignore[misc]
        found: dict[str, Answer] = {}

        def ask(name: str, body: bytes) -> threading.Thread:
            thread = threading.Thread(target=lambda: found.__setitem__(name, post(door, body)))
            thread.start()
            return thread

        threads = [ask("k", chat("go on", model="k", max_tokens=200)), ask("fatal", chat(content))]
        until(lambda: any(a.status()["models"][0]["in_flight"] for a in agents[:2]) or "fatal" in found, "it is there")
        threads += [ask(f"behind {n}", chat(f"hello {n}")) for n in range(4)]
        for thread in threads:
            thread.join()
        fatal = found.pop("fatal")
        assert (fatal.status, fatal.json["error"]["code"]) == (500, "suspect_request")
        assert fatal.headers["x-should-retry"] == "false"
        assert "shorten or simplify" in fatal.json["error"]["message"]
        assert {name: answer.status for name, answer in found.items()} == dict.fromkeys(found, 200)
        until(lambda: sum(a.status()["models"][0]["restarts"] for a in agents[:2]) == ends, "its loaders were ended")
        assert agents[0].status()["models"][1]["restarts"] == 0
        until(lambda: all(a.get("/ready").status == 200 for a in agents[:2]), "all are ready again")
        assert sum(a.status()["models"][0]["restarts"] for a in agents[:2]) == ends


def keys(*names: str) -> str:
    return "".join(f'[[keys]]\nid = "{name}"\nsha256 = "{hash_key(name)}"\n' for name in names)


def test_large_prompts_of_one_key_end_no_loader_and_leave_another_key_its_turn(tmp_path: Path) -> None:
    count = 48 if LONG else 6
    with rack(tmp_path, [model(rows=4, fake_step_s=0.01)], extra="[limits]\nstuck_s = 60\n" + keys("a", "b")) as (
        agent,
    ):
        body, refused = chat(LARGE), list[Answer]()
        threads = [
            threading.Thread(target=lambda: refused.append(post(agent, body, "a")), daemon=True) for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        until(lambda: agent.status()["in_flight"] or refused, "some have come")
        while any(thread.is_alive() for thread in threads):
            assert post(agent, chat("hi"), "b").status == 200
        assert [answer.status for answer in refused] == [400] * count
        assert {answer.json["error"]["code"] for answer in refused} == {"context_length_exceeded"}
        assert agent.status()["models"][0]["restarts"] == 0
        assert agent.get("/live").status == 200


@pytest.mark.skipif(not LONG, reason="the long form, with MLXRACK_ABUSE=1")
def test_large_prompts_leave_another_keys_latency_alone(tmp_path: Path) -> None:
    with rack(tmp_path, [model(rows=4, fake_step_s=0.01)], extra=keys("a", "b")) as (agent,):
        body = chat(LARGE)
        usual: list[float] = []
        disturbed: list[float] = []
        for _ in range(4):
            usual += ttfts(agent, 60)
            threads = [threading.Thread(target=post, args=(agent, body, "a")) for _ in range(48)]
            for thread in threads:
                thread.start()
            until(lambda: agent.status()["in_flight"], "some have come")
            disturbed += ttfts(agent, 60)
            for thread in threads:
                thread.join()
        before, during = (sorted(one)[int(0.95 * len(one))] for one in (usual, disturbed))
        ratio = during / before
        print(f"TTFT p95 of another key: {before * 1e3:.1f} ms alone, {during * 1e3:.1f} ms beside, {ratio:.2f}x")
        assert agent.status()["models"][0]["restarts"] == 0


def ttfts(agent: Agent, count: int) -> list[float]:
    """Seconds to the first byte of short streams, one after the other."""
    found = []
    for number in range(count):
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=240)
        headers = {"Authorization": "Bearer b"}
        connection.request("POST", "/v1/chat/completions", chat(f"hi {number}", stream=True), headers)
        response = connection.getresponse()
        response.read(1)
        found.append(time.monotonic() - began)
        response.read()
        connection.close()
    return found
