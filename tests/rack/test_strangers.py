"""Connections of strangers: half-open, slow, silent, many. Clients with a key and peers are served all the while."""

import contextlib
import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rack.harness import Agent, model, rack, until

KEY = "k" * 43
KEYS = f'[[keys]]\nid = "office"\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n'
BEARER = {"Authorization": f"Bearer {KEY}"}
HALF = b"GET /health HTTP/1.1\r\nHos"
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextlib.contextmanager
def connections(agent: Agent, count: int, greeting: bytes = b"") -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", agent.port), timeout=60))
            with contextlib.suppress(OSError):  # the node may have closed it already
                one.sendall(greeting)
            found.append(one)
        yield found


def is_closed(connection: socket.socket) -> bool:
    """Whether the node has closed it, after whatever it has sent before."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def until_closed(connection: socket.socket, meanwhile: Callable[[], object] = lambda: None) -> None:
    def closed() -> bool:
        meanwhile()
        return is_closed(connection)

    until(closed, "the node closes the connection", 60)


def log_bytes(agent: Agent) -> int:
    files = list(agent.folder.rglob("agent.jsonl*"))
    assert files, "the agent writes a log"
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("greeting", [b"", HALF, WHOLE], ids=["silent", "half open", "idle"])
def test_more_connections_than_open_files_keep_nobody_out(tmp_path: Path, greeting: bytes) -> None:
    with rack(tmp_path, [model()], [model()], extra=KEYS, start=False) as agents:
        for agent in agents:
            agent.open_files = 256
            agent.start()
        first, second = agents
        for agent in agents:
            agent.ready()
            until(lambda agent=agent: agent.status()["peers"][0]["state"] == "up", "peers are up")  # type: ignore[misc]
        before = log_bytes(first)
        with connections(first, 100, greeting), connections(first, 300, greeting):
            for _ in range(5):
                assert first.chat(headers=BEARER).status == 200
                assert first.get("/health").status == 200
                assert second.status()["peers"][0]["state"] == "up"
            kept = first.status()["connections"]
            assert kept["dropped"] >= 200
            assert kept["open"] <= kept["limit"] <= 256 - 48
        assert first.status()["models"][0]["restarts"] == 0
        assert log_bytes(first) - before < 1 << 20


def test_headers_that_do_not_come_and_idle_connections_are_closed(tmp_path: Path) -> None:
    extra = "[limits]\nheader_s = 1.0\nidle_s = 1.5\n"
    with rack(tmp_path, [model()], extra=extra) as (agent,):

        def drip() -> None:
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                dripping.sendall(b"x")

        with connections(agent, 1) as (silent,), connections(agent, 1, HALF) as (half,):
            until_closed(silent)
            until_closed(half)
        with connections(agent, 1, b"GET /health HTTP/1.1\r\nX-Slow: ") as (dripping,):
            until_closed(dripping, drip)
        with connections(agent, 1, WHOLE) as (idle,), connections(agent, 1, WHOLE + HALF) as (second,):
            until_closed(idle)
            until_closed(second)
        assert agent.status()["connections"]["overdue"] >= 3
        slow = agent.chat(max_tokens=200, headers={"Connection": "close"})
        assert slow.status == 200


def test_a_request_that_takes_longer_than_headers_may_is_answered(tmp_path: Path) -> None:
    extra = "[limits]\nheader_s = 0.5\nidle_s = 0.5\n"
    with rack(tmp_path, [model(fake_step_s=0.1)], extra=extra) as (agent,):
        assert agent.chat(max_tokens=30).json["usage"]["completion_tokens"] == 30


def test_ten_thousand_requests_whose_answers_are_not_read(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], extra=f"{KEYS}[limits]\ntoken_gap_s = 1.0\n") as (agent,), socket.socket() as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.connect(("127.0.0.1", agent.port))
        greedy.settimeout(1.0)
        before = log_bytes(agent)
        with contextlib.suppress(OSError):  # the node stops reading
            greedy.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10_000)
        until(lambda: agent.status()["connections"]["overdue"] == 1, "the connection is closed")
        assert agent.chat(headers=BEARER).status == 200
        assert log_bytes(agent) - before < 64 << 10, "refusals of strangers are counted, not written"


def test_refusals_of_strangers_are_counted_and_not_all_written(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], extra=KEYS) as (agent,):
        before = log_bytes(agent)
        for path in (b"/v1/models", b"/v1/chat/completions", b"/%d"):
            asked = b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for _ in range(400))
            with connections(agent, 1, asked) as (one,):
                found = b""
                while found.count(b"HTTP/1.1 4") < 400:
                    found += one.recv(1 << 16)
        assert log_bytes(agent) - before < 3 * 40 * 200
        for _ in range(50):
            assert agent.request("POST", "/v1/chat/completions", b"{}", BEARER).status == 400
        assert log_bytes(agent) - before > 50 * 100, "those of a key are all written"


def test_links_without_credentials_are_refused_and_hold_nothing(tmp_path: Path) -> None:
    upgrade = (
        b"GET /peer/v1/link HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with rack(tmp_path, [model()], extra=f"{KEYS}[limits]\nidle_s = 1.0\n") as (agent,):
        with connections(agent, 20, upgrade) as many:
            assert {one.recv(12) for one in many} == {b"HTTP/1.1 403"}
            for one in many:
                until_closed(one)
        with connections(agent, 1, b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n") as (headers,):
            assert headers.recv(12).endswith(b" 400")
        assert agent.chat(headers=BEARER).status == 200


def test_beyond_the_limit_clients_are_told_and_peers_are_served(tmp_path: Path) -> None:
    limits = "[limits]\nconnections = 16\nconnections_per_address = 16\nin_flight_per_model = 64\n"
    with rack(tmp_path, [model(fake_step_s=0.05, rows=32)], extra=limits) as (agent,):
        body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":4000,"stream":true}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        with connections(agent, 12, head + body) as streams:
            until(lambda: agent.status()["in_flight"] == 12, "twelve streams run")
            refused = agent.chat()
            assert (refused.status, refused.json["error"]["code"]) == (503, "connections_full")
            assert int(refused.headers["Retry-After"]) > 0
            assert agent.get("/health").status == 200
            assert not any(is_closed(one) for one in streams)
        until(lambda: agent.chat().status == 200, "places are free again")
        counted = agent.get("/metrics").body.decode()
        (line,) = [one for one in counted.splitlines() if one.startswith('mlxrack_requests_total{model="",')]
        assert line.startswith('mlxrack_requests_total{model="",outcome="refused"}'), "who was turned away counts"
