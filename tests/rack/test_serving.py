"""Real agents and sockets: what clients and operators observe."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ParsedChatCompletionMessage

from agent.config import hash_key
from scripts.seaweed import SeaweedFS
from shared.batch import unseal
from shared.records import Served
from tests.rack.harness import SCRIPT, Agent, Answer, events_of, model, rack, until, write_config

Client = openai.OpenAI
STRICT = "[api]\nstrict = true\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def client(agent: Agent, **more: Any) -> Client:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{agent.port}/v1", api_key="none", max_retries=0, **more)


def ask(one: Client, content: str = "hello", **more: Any) -> Any:
    return one.chat.completions.create(model="m", messages=[{"role": "user", "content": content}], **more)


def test_the_official_client_works_with_and_without_streaming(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,), client(agent) as one:
        whole = ask(one, max_tokens=6, temperature=0)
        assert whole.usage.completion_tokens == 6
        assert whole.choices[0].finish_reason == "length"
        assert whole.system_fingerprint.startswith("fp_")
        chunks = list(ask(one, max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
        assert whole.choices[0].message.content == text
        assert len({chunk.id for chunk in chunks}) == 1
        assert sum(c.delta.role == "assistant" for chunk in chunks for c in chunk.choices) == 1
        assert chunks[-1].usage.completion_tokens == 6
        said = ParsedChatCompletionMessage[Any](role="assistant", content="x", parsed={"a": 1}, refusal=None)
        turns: Any = [{"role": "user", "content": "hi"}, said, {"role": "user", "content": "and?"}]
        assert one.chat.completions.create(model="m", messages=turns, max_tokens=2).choices[0].message.content
        assert [m.id for m in one.models.list()] == ["m"]
        assert one.models.retrieve("m").id == "m"
        with pytest.raises(openai.NotFoundError, match="known: m"):
            one.models.retrieve("other")


def test_several_answers_and_their_log_probabilities(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,), client(agent) as one:
        asked: dict[str, Any] = {
            "n": 3,
            "seed": 5,
            "max_tokens": 4,
            "temperature": 0.9,
            "logprobs": True,
            "top_logprobs": 1,
        }
        whole = ask(one, **asked)
        assert [c.index for c in whole.choices] == [0, 1, 2]
        assert len({c.message.content for c in whole.choices}) == 3, "each choice has dice of its own"
        assert whole.choices == ask(one, **asked).choices, "and the same ones again"
        assert whole.usage.completion_tokens == 12
        assert len(whole.choices[2].logprobs.content) == 4
        texts = ["", "", ""]
        for chunk in ask(one, **asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert [c.message.content for c in whole.choices] == texts
        agent.admin("POST", "seal")
        served = [r for r in reported(tmp_path) if r.outcome == "ok"]
        assert sum(r.requests for r in served) == 3, "three requests, whatever their choices"
        assert sum(r.completion_tok for r in served) == 36
        assert 3 * whole.usage.prompt_tokens == sum(r.prompt_tok for r in served)


def test_text_completions(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,), client(agent) as one:
        whole = one.completions.create(model="m", prompt=["a", "b"], n=2, max_tokens=3, logprobs=1, seed=1)
        assert [c.index for c in whole.choices] == [0, 1, 2, 3]
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert whole.choices[0].text == "".join(logprobs.tokens)
        plain = one.completions.create(model="m", prompt="a", max_tokens=3, temperature=0)
        pieces = list(one.completions.create(model="m", prompt="a", max_tokens=3, temperature=0, stream=True))
        assert plain.choices[0].text == "".join(p.choices[0].text for p in pieces)
        assert pieces[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="prompt"):
            one.completions.create(model="m", prompt=[1, 2])


def test_one_failed_choice_fails_the_request_once(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], extra=STRICT) as (agent,):
        for stream in (False, True):
            answer = agent.chat(n=3, max_tokens=99_999, stream=stream)
            assert (answer.status, answer.json["error"]["param"]) == (400, "max_tokens")
        assert agent.chat().status == 200
        body = {"model": "m", "prompt": ["x " * 8_150, "short"], "max_tokens": 60, "stream": True}
        answer = agent.request("POST", "/v1/completions", json.dumps(body).encode())
        assert answer.status == 400, "one prompt that is too long is seen before anything is sent"
        until(lambda: agent.status()["in_flight"] == 0, "everything is given up")


def test_unknown_fields_are_named_or_refused_as_configured(tmp_path: Path) -> None:
    more: dict[str, Any] = {"num_ctx": 4096, "wibble": 1, "top_k": 20, "repetition_penalty": 1.1, "max_tokens": 3}
    with rack(tmp_path, [model()], [model("k")]) as (agent, _), client(agent) as one:
        for stream in (False, True):
            for _ in range(2):
                answer = agent.chat(**more, stream=stream)
                assert (answer.status, answer.headers["X-Mlxrack-Ignored"]) == (200, "num_ctx, wibble")
        assert "X-Mlxrack-Ignored" not in agent.chat().headers
        parsed = one.chat.completions.with_raw_response.create(
            model="k", messages=[{"role": "user", "content": "x"}], extra_body={"keep_alive": "5m"}
        )
        assert parsed.headers["X-Mlxrack-Ignored"] == "keep_alive", "by a forwarding gateway, too"
        log = [json.loads(line) for file in tmp_path.rglob("agent.jsonl") for line in file.read_text().splitlines()]
        named = [field for line in log if line["event"] == "fields_ignored" for field in line["fields"]]
        assert sorted(named) == ["keep_alive", "num_ctx", "wibble"], "each once"
    with rack(tmp_path, [model()], extra='[api]\nunknown_fields = "refuse"\n') as (agent,):
        answer = agent.chat(**more)
        assert (answer.status, answer.json["error"]["param"]) == (400, "wibble")
        del more["wibble"]
        assert agent.chat(**more).headers["X-Mlxrack-Ignored"] == "num_ctx"


def test_every_response_carries_the_request_id_that_clients_read(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,), client(agent) as one:
        assert str(ask(one)._request_id).startswith("req_")
        with pytest.raises(openai.NotFoundError) as caught:
            one.models.retrieve("other")
        assert str(caught.value.request_id).startswith("req_")
        with pytest.raises(openai.NotFoundError, match="POST /v1/responses: no such route; the Responses API"):
            one.responses.create(model="m", input="x")
        with (
            Client(base_url=f"http://127.0.0.1:{agent.port}", api_key="x", max_retries=0) as short,
            pytest.raises(openai.NotFoundError, match=r"/chat/completions: no such route; did you mean /v1/chat"),
        ):
            ask(short)
        for answer in (agent.chat(stream=True), agent.get("/health"), agent.get("/nothing"), agent.get("/metrics")):
            assert answer.headers["x-request-id"] == answer.headers["X-Mlxrack-Request-Id"]
            assert answer.headers["Server"] == "mlxrack"


def test_headers_name_the_worker(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        answer = agent.chat()
        assert answer.headers["X-Mlxrack-Node"] == "n1"
        assert answer.headers["X-Mlxrack-Version"] in answer.json["system_fingerprint"]
        assert answer.headers["X-Mlxrack-Request-Id"].startswith("req_")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", b"{", 400, None),
        ("/v1/chat/completions", b'{"model": "m", "messages": "x"}', 400, "messages"),
        ("/v1/chat/completions", b'{"model": "x", "messages": [{"role": "user", "content": "x"}]}', 404, "model"),
        (
            "/v1/chat/completions",
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 99999}',
            400,
            "max_tokens",
        ),
        ("/v1/chat/completions", b"x" * 2000, 413, None),
        ("/v1/nothing", b"{}", 404, None),
        ("/v1/chat/completions/", b"{}", 404, None),
    ],
)
def test_bad_requests_get_a_clear_error(tmp_path: Path, path: str, body: bytes, status: int, param: str | None) -> None:
    with rack(tmp_path, [model()], extra=f"[limits]\nbody_bytes = 1000\n{STRICT}") as (agent,):
        answer = agent.request("POST", path, body)
        error = answer.json["error"]
        assert (status, param) == (answer.status, error["param"])
        assert error["message"]
        assert "Traceback" not in answer.body.decode()
        assert answer.headers["x-request-id"] == answer.headers["X-Mlxrack-Request-Id"]
        other = agent.get("/v1/chat/completions")
        assert (other.status, other.headers["Allow"]) == (405, "POST")
        assert "GET /v1/chat/completions: method not allowed; use POST" in other.json["error"]["message"]
        if status == 404 and not param:
            assert error["type"] == "not_found_error"
            assert f"POST {path}: no such route" in error["message"]
            assert "/v1/chat/completions" in error["message"]
        if status == 404 and param:
            assert "known: m" in error["message"]
        assert agent.chat().status == 200, "and the next request is served"


def test_api_keys_are_required_when_configured(tmp_path: Path) -> None:
    extra = f'[[keys]]\nid = "shop"\nsha256 = "{hash_key("right")}"\n'
    with rack(tmp_path, [model()], extra=extra) as (agent,):
        assert agent.chat().status == 401
        assert agent.chat(headers={"Authorization": "Bearer wrong"}).status == 401
        assert agent.get("/v1/models").status == 401
        assert agent.chat(headers={"Authorization": "Bearer right"}).status == 200
        assert agent.get("/health").status == 200
        agent.admin("POST", "seal")
        assert {"shop"} == {r.key_id for r in reported(tmp_path) if r.outcome == "ok"}


def test_admin_and_peer_calls_need_their_secrets(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        for path in ("status", "load", "swap", "seal"):
            method = "GET" if path == "status" else "POST"
            assert agent.request(method, f"/admin/v1/{path}", b"{}").status == 401
        assert agent.get("/peer/v1/beat", Authorization="Bearer guess").status == 403
        assert agent.get("/peer/v1/link").status == 403
        assert agent.admin("POST", "load", nonsense="x").status == 400
        assert agent.admin("POST", "load", model="x").status == 404
        assert (agent.state / "admin.token").stat().st_mode & 0o777 == 0o600


def test_any_node_is_a_gateway(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], [model("k")], []) as agents:
        for agent in agents:
            assert [agent.chat(model=name).headers["X-Mlxrack-Node"] for name in ("m", "k")] == ["n1", "n2"]
            streamed = agent.chat(stream=True)
            assert streamed.headers["X-Mlxrack-Node"] == "n1"
            assert events_of(streamed)[-1] == "[DONE]"
            assert {"m", "k"} == {m["id"] for m in agent.get("/v1/models").json["data"]}
        assert agents[2].chat(model="x").status == 404


def test_a_request_waits_for_a_model_a_peer_is_loading(tmp_path: Path) -> None:
    slow = model("slow", preload=False, fake_load_s=2.0)
    with rack(tmp_path, [], [model(), slow]) as (door, worker):
        loading = threading.Thread(target=lambda: worker.admin("POST", "load", model="slow"))
        loading.start()
        until(lambda: worker.status()["models"][1]["state"] == "starting", "it is being loaded")
        time.sleep(1.2)  # a heartbeat informs the gateway
        answer = door.chat(model="slow")
        loading.join()
        assert (answer.status, answer.headers["X-Mlxrack-Node"]) == (200, "n2")


def test_a_lost_peer_costs_no_request_and_recovers(tmp_path: Path) -> None:
    with rack(tmp_path, [model(fake_step_s=0.01)], [model(fake_step_s=0.01)]) as (door, victim):
        answers: list[Answer] = []
        over = threading.Event()

        def ask_on() -> None:
            while not over.is_set():
                answers.append(door.chat(max_tokens=30))

        threads = [threading.Thread(target=ask_on) for _ in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: len({a.headers.get("X-Mlxrack-Node") for a in answers}) == 2, "both nodes work")
        until(lambda: _lost_while_it_worked(victim, door, answers), "a kill meets a request that is on it")
        over.set()
        for thread in threads:
            thread.join()
        assert {200} == {a.status for a in answers}
        assert all(a.json["usage"]["completion_tokens"] == 30 for a in answers)
        door.admin("POST", "seal")
        retried = sum(r.retries for r in reported(tmp_path) if r.outcome == "ok")
        assert retried >= 1, "requests that were on it were tried again"


def _lost_while_it_worked(victim: Agent, door: Agent, answers: list[Answer]) -> bool:
    """Kill a node while it is used, and start it again; whether a request was on it, so that it was retried."""
    victim.kill()
    count = len(answers)
    until(lambda: len(answers) > count + 30, "more answers")
    until(lambda: door.status()["peers"][0]["state"] == "down", "it is known to be down")
    victim.start().ready()
    until(lambda: door.status()["peers"][0]["state"] == "up", "it is known to be back")
    return any("X-Mlxrack-Retries" in answer.headers for answer in answers)


def test_a_stream_whose_worker_is_lost_ends_with_an_error_event(tmp_path: Path) -> None:
    with rack(tmp_path, [], [model(fake_step_s=0.05)]) as (door, worker):
        result: list[Answer] = []
        thread = threading.Thread(target=lambda: result.append(door.chat(stream=True, max_tokens=400)))
        thread.start()
        until(lambda: worker.status()["models"][0]["in_flight"] == 1, "the stream runs")
        time.sleep(0.5)
        worker.kill()
        thread.join()
        last = events_of(result[0])[-1]
        assert last != "[DONE]"
        assert last["error"]["code"] == "worker_lost"


def test_a_killed_loader_is_restarted_and_shown_in_status(tmp_path: Path) -> None:
    with rack(tmp_path, [model(), model("k")]) as (agent,):
        until(lambda: all(one["pid"] for one in agent.status()["models"]), "both loaders run")
        first = agent.status()["models"][0]
        os.kill(first["pid"], signal.SIGKILL)
        assert agent.chat(model="k").status == 200, "other models answer meanwhile"
        assert agent.chat(model="m").status == 200, "and a request for it waits until it is back"
        now = agent.status()["models"][0]
        assert (now["restarts"], now["last_exit"]) == (1, "signal 9 (SIGKILL)")
        assert first["pid"] != now["pid"]
        run = subprocess.run([SCRIPT, "status", "--config", agent.config], capture_output=True, text=True, check=True)
        assert "last exit: signal 9 (SIGKILL)" in run.stdout


def test_sigterm_lets_requests_finish_and_exits_0(tmp_path: Path) -> None:
    with rack(tmp_path, [model(fake_step_s=0.05)]) as (agent,):
        answers: list[Answer] = []
        threads = [
            threading.Thread(target=lambda s=s: answers.append(agent.chat(max_tokens=30, stream=s)))
            for s in (True, False, True)
        ]
        for thread in threads:
            thread.start()
        until(lambda: agent.status()["in_flight"] == 3, "three requests run")
        pids = [m["pid"] for m in agent.status()["models"]]
        assert agent.stop() == 0
        for thread in threads:
            thread.join()
        assert [a.status for a in answers] == [200, 200, 200]
        assert all(events_of(a)[-1] == "[DONE]" for a in answers if a.body.startswith(b"data"))
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        served = reported(tmp_path)
        assert (sum(r.requests for r in served), sum(r.completion_tok for r in served)) == (3, 90)


def test_a_request_longer_than_the_drain_ends_with_an_error_and_the_agent_with_0(tmp_path: Path) -> None:
    with rack(tmp_path, [model(fake_step_s=0.05)], extra="[limits]\ndrain_s = 1.0\n") as (agent,):
        answers: list[Answer] = []
        thread = threading.Thread(target=lambda: answers.append(agent.chat(max_tokens=8000)))
        thread.start()
        until(lambda: agent.status()["in_flight"] == 1, "it runs")
        began = time.monotonic()
        assert agent.stop() == 0
        thread.join()
        assert time.monotonic() - began < 20
        assert answers[0].status in (502, 503)
        assert answers[0].json["error"]["message"]


@linux
def test_a_dead_agent_leaves_no_loader_behind(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        (pid,) = [m["pid"] for m in agent.status()["models"]]
        agent.kill()

        def gone() -> bool:
            status = Path(f"/proc/{pid}/status")
            return not status.exists() or "State:\tZ" in status.read_text()

        until(gone, "the loader ends by itself")


def test_a_port_in_use_is_a_clear_error(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], start=False) as (agent,), socket.socket() as taken:
        taken.bind(("127.0.0.1", agent.port))
        taken.listen()
        agent.start(wait=False)
        assert agent.process is not None
        assert agent.process.wait(timeout=180) == os.EX_UNAVAILABLE
        output = agent.output()
        assert "address already in use; stop the other program" in output
        assert "listen.port" in output
        assert "Traceback" not in output


def test_beyond_loopback_needs_keys(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], start=False) as (agent,):
        agent.config.write_text(agent.config.read_text().replace("[listen]", '[listen]\nhost = "0.0.0.0"'))
        agent.start(wait=False)
        assert agent.process is not None
        assert agent.process.wait(timeout=180) == os.EX_CONFIG
        assert "no [[keys]] entry exists" in agent.output()


def test_a_missing_model_fails_alone(tmp_path: Path) -> None:
    missing = {"name": "gone", "path": str(tmp_path / "no folder"), "need_bytes": 10}
    with rack(tmp_path, [model(), missing]) as (agent,):
        until(lambda: agent.status()["models"][1]["state"] == "failed", "it has failed")
        assert "no such folder" in agent.status()["models"][1]["reason"]
        assert agent.chat().status == 200
        answer = agent.chat(model="gone")
        assert (answer.status, answer.json["error"]["code"]) == (503, "no_capacity")
        assert int(answer.headers["Retry-After"]) >= 1


def test_corrupt_weights_fail_with_the_reason(tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    broken = tmp_path / "broken model"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"\x10" + b"\x00" * 200)
    with rack(tmp_path, [model(), {"name": "broken", "path": str(broken), "need_bytes": 10}]) as (agent,):
        until(lambda: agent.status()["models"][1]["state"] == "failed", "it has failed")
        assert "invalid safetensors header; fetch the model again" in agent.status()["models"][1]["reason"]
        assert agent.chat().status == 200


def test_refused_store_credentials_are_a_state_and_lose_nothing(tmp_path: Path, seaweed: SeaweedFS) -> None:
    with rack(tmp_path, [model()], start=False) as (agent,):
        write_config(agent, [], [model()])
        key = tmp_path / "key"
        key.write_text("nobody")
        key.chmod(0o600)
        text = agent.config.read_text().replace('kind = "directory"', 'kind = "s3"')
        reference = json.dumps(f"file:{key}")
        s3 = f'endpoint = "{seaweed.endpoint}"\nbucket = "probe-bucket"\n'
        s3 += f"access_key = {reference}\nsecret_key = {reference}\n"
        agent.config.write_text(text.replace("[store]\n", f"[store]\n{s3}"))
        agent.start().ready()
        assert agent.chat().status == 200
        until(lambda: agent.status()["push"]["state"] == "refused", "the refusal is known")
        push = agent.status()["push"]
        assert "rejected the credentials" in push["reason"]
        assert push["waiting_batches"] >= 1
        assert push["dropped_batches"] == 0


def test_a_full_queue_rejects_with_retry_after(tmp_path: Path) -> None:
    extra = "[limits]\nin_flight_per_model = 2\n"
    with rack(tmp_path, [model(fake_step_s=0.05)], extra=extra) as (agent,):
        threads = [threading.Thread(target=lambda: agent.chat(max_tokens=60)) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: agent.status()["in_flight"] == 2, "the queue is full")
        answer = agent.chat()
        ready = agent.get("/ready")
        for thread in threads:
            thread.join()
        assert (answer.status, answer.json["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert (ready.status, ready.json["reason"]) == (503, "saturated")
        assert (agent.chat().status, agent.get("/ready").status) == (200, 200)


def test_one_api_key_cannot_take_every_slot(tmp_path: Path) -> None:
    extra = "[limits]\nin_flight_per_key = 2\n" + "".join(
        f'[[keys]]\nid = "{name}"\nsha256 = "{hash_key(name)}"\n' for name in ("greedy", "modest")
    )
    with rack(tmp_path, [model(fake_step_s=0.05)], extra=extra) as (agent,):

        def post(key: str, max_tokens: int = 4) -> Answer:
            body = {"model": "m", "max_tokens": max_tokens, "messages": [{"role": "user", "content": "x"}]}
            return agent.request(
                "POST", "/v1/chat/completions", json.dumps(body).encode(), {"Authorization": f"Bearer {key}"}
            )

        threads = [threading.Thread(target=post, args=("greedy", 60)) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: agent.status()["in_flight"] == 2, "its places are taken")
        refused, served = post("greedy"), post("modest")
        for thread in threads:
            thread.join()
        assert (refused.status, refused.json["error"]["code"]) == (429, "key_queue_full")
        assert "Retry-After" in refused.headers
        assert served.status == 200


def test_the_watchdog_ends_a_stuck_loader_and_its_requests_are_answered(tmp_path: Path) -> None:
    extra = "[limits]\nprogress_s = 0.5\nstuck_s = 2.0\n"
    with rack(tmp_path, [model(fake_step_s=0.02)], extra=extra) as (agent,):
        assert agent.get("/live").status == 200
        first = agent.status()["models"][0]
        os.kill(first["pid"], signal.SIGSTOP)
        answers: list[Answer] = []
        asking = threading.Thread(target=lambda: answers.append(agent.chat(max_tokens=8)))
        asking.start()
        until(lambda: agent.get("/live").status == 503, "it is seen")
        assert agent.get("/live").json["stalled"] == ["m"]
        asking.join()
        assert answers[0].status == 200, "another loader has answered"
        now = agent.status()["models"][0]
        assert (now["restarts"], now["last_exit"]) == (1, "signal 9 (SIGKILL)")
        assert agent.get("/live").status == 200


def test_a_long_queued_request_is_not_taken_for_stalled(tmp_path: Path) -> None:
    extra = "[limits]\nfirst_token_s = 2.0\ntoken_gap_s = 2.0\n"
    with rack(tmp_path, [model(fake_step_s=0.1, rows=1)], [], extra=extra) as (agent, door):
        answers: list[Answer] = []
        asks = [threading.Thread(target=lambda: answers.append(door.chat(max_tokens=40))) for _ in range(2)]
        for ask in asks:
            ask.start()
        for ask in asks:
            ask.join()
        assert [answer.status for answer in answers] == [200, 200]
        assert not any("X-Mlxrack-Retries" in answer.headers for answer in answers)
        assert agent.status()["models"][0]["restarts"] == 0


def test_engine_counts_are_fresh_when_scraped(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        assert agent.chat(max_tokens=7).status == 200
        text = agent.get("/metrics").body.decode()
        assert 'mlxrack_engine_decode_tokens_total{model="m"} 7.0' in text
        assert 'mlxrack_loader_silent_seconds{model="m"} 0.0' in text
        assert agent.chat(max_tokens=5).status == 200
        assert 'mlxrack_engine_decode_tokens_total{model="m"} 12.0' in agent.get("/metrics").body.decode()


def test_a_client_disconnect_frees_the_engine(tmp_path: Path) -> None:
    with rack(tmp_path, [model(fake_step_s=0.02)], [model("k", fake_step_s=0.02)]) as (agent, peer):
        for name, stream in (("m", True), ("m", False), ("k", True), ("k", False)):
            body = json.dumps(
                {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4000, "stream": stream}
            ).encode()
            with socket.create_connection(("127.0.0.1", agent.port)) as link:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                link.sendall(head.encode() + body)
                where = agent if name == "m" else peer
                until(lambda where=where: where.status()["models"][0]["in_flight"] == 1, "it runs")  # type: ignore[misc]
            until(lambda where=where: where.status()["models"][0]["in_flight"] == 0, "it was given up")  # type: ignore[misc]
        until(lambda: agent.status()["in_flight"] == 0, "the door is free")


def test_metrics_are_prometheus_text(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        agent.chat()
        agent.chat(model="MARKER-of-a-stranger")
        text = agent.get("/metrics").body.decode()
        assert 'mlxrack_requests_total{model="m",outcome="ok"} 1.0' in text
        assert 'mlxrack_completion_tokens_total{model="m"} 5.0' in text
        assert 'mlxrack_model_ready{model="m"} 1.0' in text
        assert "MARKER" not in text


def test_a_swap_by_the_cli_under_load_loses_nothing(tmp_path: Path) -> None:
    models = [model(fake_step_s=0.01), model("b", fake_step_s=0.01, preload=False)]
    with rack(tmp_path, models) as (agent,):
        answers: list[Answer] = []
        over = threading.Event()

        def ask_on() -> None:
            while not over.is_set():
                answers.append(agent.chat(max_tokens=20, temperature=0))

        threads = [threading.Thread(target=ask_on) for _ in range(4)]
        for thread in threads:
            thread.start()
        command = [SCRIPT, "swap", "m", "b", "--json", "--config", str(agent.config)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        over.set()
        for thread in threads:
            thread.join()
        assert json.loads(run.stdout)["outcome"] == "flipped"
        assert {200} == {a.status for a in answers}
        by_version = {(a.headers["X-Mlxrack-Version"], a.json["choices"][0]["message"]["content"]) for a in answers}
        assert len(by_version) == len({version for version, _ in by_version}), "no answer mixes two models"
        wrong = subprocess.run([*command[:2], "m", "zzz", *command[4:]], capture_output=True, text=True, check=False)
        assert wrong.returncode == 1
        assert "zzz is not configured" in wrong.stderr


@linux
def test_the_daemon_never_imports_mlx(tmp_path: Path, tiny_model: Path) -> None:
    with rack(tmp_path, [{"name": "m", "path": str(tiny_model), "need_bytes": 10}]) as (agent,):
        assert agent.chat().status == 200
        assert agent.process is not None
        (loader,) = [m["pid"] for m in agent.status()["models"]]

        def maps(pid: int) -> str:
            return Path(f"/proc/{pid}/maps").read_text()

        assert "libmlx" in maps(loader)
        assert "libmlx" not in maps(agent.process.pid)


def reported(folder: Path) -> list[Served]:
    """Every ``Served`` record of the gateways in the bucket."""
    segments = (folder / "bucket").glob("raw/**/*.mpz")
    batches = {b.id: b for path in segments for b in unseal(path.read_bytes())}
    return [r for b in batches.values() for r in b.records if isinstance(r, Served)]
