"""Misbehaving clients: slow, silent, huge, malformed. Each affects only itself, and nothing is echoed."""

import gzip
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.rack.harness import Agent, Answer, model, rack, until

MARK = "MARKSECRET"


def post(agent: Agent, body: dict[str, Any], path: str = "/v1/chat/completions") -> Answer:
    return agent.request("POST", path, json.dumps({"model": "m", **body}).encode())


def chat(content: str = "x", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}


def raw(agent: Agent, data: bytes, wait_s: float = 5.0) -> bytes:
    """The response to raw bytes on a new connection."""
    with socket.create_connection(("127.0.0.1", agent.port), timeout=wait_s) as connection:
        connection.sendall(data)
        found = b""
        try:
            while chunk := connection.recv(4096):
                found += chunk
        except TimeoutError:
            pass
        return found


@pytest.mark.parametrize(
    "data",
    [
        f"{MARK}\r\n\r\n",
        f"GET /{MARK} HTTP/9\r\n\r\n",
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MARK}\r\n\r\n",
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{MARK} header\r\n\r\n",
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: {MARK}\r\nContent-Length: 2\r\n\r\n{{}}",
        f"GET /{MARK * 1000} HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["no http", "version", "length", "header", "expectation", "long url"],
)
def test_an_invalid_request_gets_an_error_object_and_no_echo(tmp_path: Path, data: str) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        answer = raw(agent, data.encode(), 2.0)
        assert answer.split()[1].startswith(b"4")
        assert MARK.encode() not in answer
        assert b"X-Mlxrack-Request-Id: req_" in answer
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"].startswith("http_4")
        assert agent.chat().status == 200


def test_bodies_that_contradict_their_headers(tmp_path: Path) -> None:
    whole = json.dumps({"model": "m", **chat()}).encode()
    with rack(tmp_path, [model()], extra="[limits]\nbody_s = 1.0\n") as (agent,):

        def send(body: bytes, encoding: str) -> Answer:
            return agent.request("POST", "/v1/chat/completions", body, {"Content-Encoding": encoding})

        assert send(gzip.compress(whole), "gzip").status == 200
        answers = [send(whole, "gzip"), send(b"", "gzip"), send(whole, "br"), send(whole, "zstd")]
        assert [a.status // 100 for a in answers] == [4] * 4
        assert all(a.json["error"]["message"] for a in answers)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
        unfinished = raw(agent, head)
        assert unfinished.startswith(b"HTTP/1.1 408")
        assert agent.status()["in_flight"] == 0


def test_a_client_that_stops_reading_is_dropped_after_the_stall_timeout(tmp_path: Path) -> None:
    extra = "[limits]\ntoken_gap_s = 1.0\n"
    with rack(tmp_path, [model(fake_step_s=0.0)], extra=extra) as (agent,), socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", agent.port))
        body = json.dumps({"model": "m", **chat(stream=True, n=8, logprobs=True, max_tokens=6000)}).encode()
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: agent.status()["in_flight"] == 8, "it has its places")
        until(lambda: agent.status()["in_flight"] == 0, "they are free again")
        until(lambda: agent.status()["models"][0]["in_flight"] == 0, "in the loader too")


def test_n_beyond_the_limit_or_free_slots_is_rejected_with_its_reason(tmp_path: Path) -> None:
    with rack(tmp_path, [model(fake_step_s=0.02)], extra="[limits]\nin_flight_per_model = 4\n") as (agent,):
        never = post(agent, chat(n=5))
        assert (never.status, never.json["error"]["param"]) == (400, "n")
        first = threading.Thread(target=post, args=(agent, chat(n=2, max_tokens=60)))
        first.start()
        until(lambda: agent.status()["in_flight"] == 2, "two places are taken")
        full = post(agent, chat(n=3))
        assert agent.status()["in_flight"] == 2, "no part of it began"
        assert (full.status, full.json["error"]["code"]) == (429, "queue_full")
        assert post(agent, chat(n=2)).status == 200
        first.join()
        text = agent.get("/metrics").body.decode()
        assert 'mlxrack_requests_total{model="m",outcome="refused"} 2.0' in text
        assert 'outcome="cancelled"} 1.0' not in text


def test_the_watchdog_ends_a_loader_stuck_in_preparation(tmp_path: Path) -> None:
    extra = "[limits]\nprogress_s = 0.5\nstuck_s = 1.5\nload_wait_s = 10\n"
    with rack(tmp_path, [model()], extra=extra) as (agent,):
        hung = threading.Thread(target=post, args=(agent, chat("!hang")))
        hung.start()
        until(lambda: agent.get("/live").status == 503, "it is seen")
        until(lambda: agent.status()["models"][0]["restarts"] >= 1, "its loader is ended")
        hung.join()
        until(lambda: agent.get("/ready").status == 200, "another has come")
        assert agent.chat().status == 200


def test_a_large_request_is_forwarded_and_takes_no_peer_down(tmp_path: Path) -> None:
    with rack(tmp_path, [model("other")], [model()]) as (door, worker):
        large = chat("x " * ((5 << 20) - 64))  # as a frame it exceeds the limit of a client's body
        answer = post(door, large)
        assert (answer.status, post(worker, large).status) == (400, 400), "too long a prompt, not a lost worker"
        assert answer.json["error"]["code"] == "context_length_exceeded"
        assert [peer["state"] for peer in door.status()["peers"]] == ["up"]
        assert post(door, chat()).status == 200


def test_a_large_body_does_not_stop_heartbeats(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        answered = 0
        enum = '{"model": "m", "messages": [], "response_format": {"type": "json_schema", "json_schema": {"schema": '
        body = (enum + '{"enum": [' + ",".join(["[]"] * 3_000_000) + "]}}}}").encode()
        sending = threading.Thread(target=agent.request, args=("POST", "/v1/chat/completions", body))
        sending.start()
        while sending.is_alive():
            assert agent.get("/health").status == 200
            answered += 1
        assert answered >= 5, "others are answered while it is read"


def test_no_error_echoes_the_request(tmp_path: Path, tiny_model: Path) -> None:
    schemas = [
        {"type": MARK},
        {"$ref": f"#/{MARK}"},
        {"allOf": [{"const": MARK}, {"const": "b"}]},
        {"type": "array", "uniqueItems": True, "title": MARK},
        {"type": "string", "pattern": f"({MARK}"},
        {"type": "object", "required": MARK},
    ]
    with rack(tmp_path, [{"name": "m", "path": str(tiny_model), "rows": 2}]) as (agent,):
        asked = [
            chat(response_format={"type": "json_schema", "json_schema": {"name": MARK, "schema": one}})
            for one in schemas
        ]
        asked += [
            chat(logit_bias={"98765431": 1}),
            chat(chat_template_kwargs={"chat_template": MARK}),
            chat(chat_template_kwargs={"messages": MARK}),
            chat(chat_template_kwargs={"truncation": True, "max_length": 0}),
        ]
        for body in asked:
            answer = post(agent, body)
            assert answer.status == 400, body
            assert not [mark for mark in (MARK, "9876543") if mark in answer.body.decode()], answer.body
        assert agent.status()["models"][0]["restarts"] == 0
        log = b"".join(file.read_bytes() for file in tmp_path.rglob("agent.jsonl*"))
        assert b"invalid_value" in log
        assert MARK.encode() not in log
