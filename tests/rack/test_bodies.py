"""Bodies that cost more than they look like: bombs, unfinished ones, more than a key may hold, odd framing."""

import json
import os
import socket
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.agent.api.test_bodies import distinct_keys, repeated
from tests.rack.harness import Agent, Answer, model, rack, until
from tests.rack.test_strangers import BEARER, KEYS, connections

ABUSE = os.environ.get("MLXRACK_ABUSE") == "1"
LARGE = 9_900_000
CHAT = "/v1/chat/completions"
ASKED = b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":2}'
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(ASKED), ASKED)


def chat_of(field: str, value: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":2,"%s":%s}' % (field.encode(), value)


def bombs(size: int) -> dict[str, tuple[str, bytes]]:
    """(path, body) of each kind."""
    tool = b'[{"type":"function","function":{"name":"f","parameters":%s}}]'
    return {
        "messages of lists": (CHAT, chat_of("messages", repeated("[]", size))),
        "messages of objects": (CHAT, chat_of("messages", repeated('{"a":{}}', size))),
        "unknown keys": (CHAT, distinct_keys(size)),
        "unknown field": (CHAT, chat_of("wibble", repeated("[{}]", size))),
        "metadata": (CHAT, chat_of("metadata", distinct_keys(size))),
        "stop": (CHAT, chat_of("stop", repeated('"ab"', size))),
        "logit_bias": (CHAT, chat_of("logit_bias", distinct_keys(size, "{}"))),
        "tools": (CHAT, chat_of("tools", tool % repeated("{}", size, "[]"))),
        "response_format": (
            CHAT,
            chat_of("response_format", b'{"type":"json_schema","schema":%s}' % distinct_keys(size)),
        ),
        "template arguments": (CHAT, chat_of("chat_template_kwargs", distinct_keys(size))),
        "the same key": (CHAT, b"{" + b",".join([b'"messages":[[]]'] * (size // 16)) + b"}"),
        "escapes": (CHAT, chat_of("stop", repeated('"\\ud83d\\ude00"', size))),
        "prompts": ("/v1/completions", b'{"model":"m","prompt":%s}' % repeated('"ab"', size)),
        "inputs": ("/v1/embeddings", b'{"model":"m","input":%s}' % repeated("[1]", size)),
        "numbers": ("/v1/embeddings", b'{"model":"m","input":%s}' % repeated("1", size)),
        "depth": (CHAT, chat_of("metadata", b"[" * size)),
        "one number": (CHAT, chat_of("seed", b"9" * size)),
    }


def peak_mb(agent: Agent) -> float:
    """The most memory that the agent's process has had."""
    assert agent.process is not None
    text = Path(f"/proc/{agent.process.pid}/status").read_text()
    return next(int(line.split()[1]) / 1000 for line in text.splitlines() if line.startswith("VmHWM"))


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    limits = "[limits]\nbody_bytes = 2000000\nbodies_per_key_bytes = 4000000\nbodies_bytes = 8000000\n"
    with rack(tmp_path, [model()], extra=limits) as (agent,):
        for name, (path, body) in bombs(600_000).items():
            answer = agent.request("POST", path, body)
            expected = (400, "invalid_json") if name == "one number" else (413, "body_too_large")
            assert (answer.status, answer.json["error"]["code"]) == expected, name
        assert agent.chat("x [1, 2], {} " * 10_000).status in (200, 400), "a text is no bomb"
        assert agent.chat().status == 200
        assert agent.status()["in_flight"] == 0


def test_a_compressed_bomb_is_counted_as_it_is_decoded(tmp_path: Path) -> None:
    limits = "[limits]\nbody_bytes = 2000000\nbodies_per_key_bytes = 4000000\n"
    with rack(tmp_path, [model()], extra=limits) as (agent,):
        for size, code in ((600_000, 413), (3_000_000, 413)):
            packed = zlib.compress(chat_of("messages", repeated("[]", size)))
            answer = agent.request("POST", CHAT, packed, {"Content-Encoding": "deflate"})
            assert (answer.status, answer.json["error"]["code"]) == (code, "body_too_large")


def test_bodies_beyond_a_key_s_budget_are_told_to_wait_and_other_keys_are_served(tmp_path: Path) -> None:
    second = KEYS.replace("office", "lab").replace(KEYS.split('"')[3], "0" * 64)
    limits = "[limits]\nbody_s = 1\nbody_bytes = 1000000\nbodies_per_key_bytes = 2000000\nbodies_bytes = 2000000\n"
    with rack(tmp_path, [model(fake_step_s=0.1)], extra=KEYS + second + limits) as (agent,):
        long = threading.Thread(
            target=lambda: agent.chat("x" * 900_000, headers=BEARER, max_tokens=10_000), daemon=True
        )
        long.start()
        until(lambda: agent.status()["models"][0]["in_flight"] == 1, "the budget is held")
        refused = agent.chat("x" * 250_000, headers=BEARER)
        assert (refused.status, refused.json["error"]["code"]) == (429, "key_bodies_full")
        assert int(refused.headers["Retry-After"]) > 0
        assert agent.chat(headers=BEARER, max_tokens=1).status == 200, "a small one has room"


def test_large_bodies_of_a_key_wait_for_each_other(tmp_path: Path) -> None:
    """Together they are eight times what a key may hold; each is answered, and none is told to come again."""
    limits = "[limits]\nbody_bytes = 1000000\nbodies_per_key_bytes = 2000000\nbodies_bytes = 2000000\n"
    with rack(tmp_path, [model(fake_step_s=0.01)], extra=KEYS + limits) as (agent,):
        with ThreadPoolExecutor(16) as pool:
            sent = [pool.submit(agent.chat, "x" * 500_000, headers=BEARER, max_tokens=3) for _ in range(16)]
        assert [one.result().status for one in sent] == [200] * 16


def test_a_key_s_requests_are_admitted_before_their_bodies_are_read(tmp_path: Path) -> None:
    extra = f"{KEYS}[limits]\nin_flight_per_key = 2\n"
    with rack(tmp_path, [model()], extra=extra) as (agent,):
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: %s\r\nContent-Length: 9000\r\n\r\n"
        unfinished = head % (CHAT.encode(), BEARER["Authorization"].encode())
        with connections(agent, 2, unfinished):
            until(lambda: agent.chat(headers=BEARER).status == 429, "two are being read")
            with connections(agent, 1, unfinished) as (third,):
                answer = third.recv(4096)
                assert answer.startswith(b"HTTP/1.1 429"), "before a byte of its body"
                assert b"key_queue_full" in answer
                assert b"Retry-After" in answer
        until(lambda: agent.chat(headers=BEARER).status == 200, "they are free again")


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ("Content-Encoding: gzip\r\nContent-Encoding: gzip\r\nContent-Length: 2", b"{}", 415),
        ("Content-Encoding: identity\r\nContent-Encoding: br\r\nContent-Length: 2", b"{}", 415),
        ("Content-Encoding: gzip, identity\r\nContent-Length: 2", b"{}", 415),
        ("Content-Length: 99999999", b"", 413),
        ("Content-Length: 99999999999999999999999", b"", 400),
        ("Content-Length: -1", b"", 400),
        ("Content-Length: +2", b"{}", 400),
        ("Content-Length: 2\r\nContent-Length: 3", b"{}", 400),
        ("Content-Length: 2\r\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked", b"zz\r\n{}\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked", b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked", b"2;" + b"x" * 100_000 + b"\r\n{}\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked, chunked", b"2\r\n{}\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: gzip", b"{}", 400),
        ("Transfer-Encoding: gzip, chunked", b"2\r\n{}\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: identity, chunked", CHUNKED, 400),
        ("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked", CHUNKED, 400),
        ("Transfer-Encoding: Chunked", CHUNKED, 200),
        ("Content-Encoding: GZIP\r\nContent-Length: 99", b"{}" + b" " * 97, 400),
        ("Content-Length: 0", b"", 400),
    ],
)
def test_odd_framing_is_an_error_of_the_client(odd: Agent, head: str, body: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", odd.port), timeout=60) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode() + body)
        answer = connection.recv(4096)
        assert int(answer.split()[1]) == status, answer
    assert odd.chat().status == 200


def test_a_body_that_is_not_compressed_as_it_says_is_no_fault_of_ours(tmp_path: Path) -> None:
    """Its client is told; the log, which is for faults, is not."""
    with rack(tmp_path, [model()]) as (agent,):
        for encoding in ("gzip", "GZIP", "deflate"):
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: {encoding}\r\nContent-Length: 99\r\n\r\n"
            )
            with socket.create_connection(("127.0.0.1", agent.port), timeout=60) as connection:
                connection.sendall(head.encode() + b"{}" + b" " * 97)
                assert connection.recv(4096).split()[1] == b"400"
                while connection.recv(4096):  # until it has done with the connection
                    pass
        agent.stop()
        said = "".join(path.read_text() for path in (agent.state / "logs").glob("*.jsonl"))
        assert said.count("\n") > 1
        assert "PayloadError" not in said
        assert "Unhandled" not in said


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with rack(tmp_path_factory.mktemp("odd"), [model()], extra="[limits]\nbody_s = 2.0\n") as (agent,):
        yield agent


@pytest.mark.skipif(not ABUSE, reason="long form: MLXRACK_ABUSE=1")
def test_the_memory_of_an_agent_under_bombs(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        print(f"\nat rest: {peak_mb(agent):.0f} MB")
        for name, (path, body) in bombs(LARGE).items():
            answers: list[Answer] = []

            def send(path: str = path, body: bytes = body, answers: list[Answer] = answers) -> None:
                answers.append(agent.request("POST", path, body))

            senders = [threading.Thread(target=send) for _ in range(8)]
            for one in senders:
                one.start()
            for one in senders:
                one.join()
            found = sorted({answer.status for answer in answers})
            print(f"8 x {len(body) / 1e6:.1f} MB of {name}: {found}, peak so far {peak_mb(agent):.0f} MB")
            assert not [status for status in found if status >= 500], json.dumps(found)
        assert peak_mb(agent) < 400
        assert agent.chat().status == 200
