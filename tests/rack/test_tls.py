"""TLS between real nodes, with somebody in between; who is refused, and what the operator is told."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agent.mesh.node_names import server_name
from agent.mesh.signing import RackKeys
from agent.wire.frames import Generate, Message, encode
from scripts.seaweed import free_port
from shared.records import URGENT, CertificateExpires
from shared.transport import Tls
from tests.rack.harness import SCRIPT, SECRET, Agent, model, rack, until, write_config
from tests.rack.tap import Tap, flipped
from tests.rack.tls_rack import Authority, table, tls_rack, write_tls_config

LONG = os.environ.get("MLXRACK_ABUSE") == "1"
FRAMES = 10_000 if LONG else 300
LIVE = 100 if LONG else 3
MARK = "PATIENT-MILLER-HAS-X"
KEYS = RackKeys([SECRET])
_numbers = itertools.count()


def log_of(agent: Agent) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (agent.state / "logs/agent.jsonl").read_text().splitlines()]


def worked(agent: Agent) -> list[str]:
    """The requests of peers that a node has worked on."""
    return [line["request"] for line in log_of(agent) if line["event"] == "peer_request"]


def refusals(agent: Agent) -> set[str]:
    return {line["reason"] for line in log_of(agent) if line["event"] == "tls_refused"}


def evil() -> bytes:
    message = Message(role="user", content="injected")
    return encode(Generate(id=77, model="m", messages=(message,), max_tokens=3, door="n1", request_id="evil"))


def as_websocket(frame: bytes) -> bytes:
    """A client's binary message, as the finding injected it."""
    mask = b"\0\0\0\0"
    return b"\x82" + bytes([0x80 | 126]) + len(frame).to_bytes(2, "big") + mask + frame


def test_without_tls_somebody_in_between_reads_prompts_and_has_work_done(tmp_path: Path) -> None:
    """The control of the next test: its relay, its marker and its injected frame do work."""
    first, second = Agent(tmp_path, "n1", free_port()), Agent(tmp_path, "n2", free_port())
    with Tap(second.port) as tap:
        write_config(first, [second], [], via=lambda _: tap.port)
        write_config(second, [first], [model()])
        try:
            second.start().ready()
            first.start()
            until(lambda: first.chat(MARK).status == 200, "it is forwarded")
            assert _readable(tap, MARK)
            tap.inject = as_websocket(evil())
            until(lambda: first.chat().status and "evil" in worked(second), "the injected frame is worked on")
        finally:
            first.kill()
            second.kill()


def _readable(tap: Tap, text: str) -> bool:
    """Whether a text was sent. A client masks what it sends, and writes the mask before it."""
    for chunk in itertools.chain.from_iterable([*tap.sent, *tap.answered]):
        for at in range(min(len(chunk), 300)):
            mask, rest = chunk[at : at + 4], chunk[at + 4 :]
            masks = (mask * (len(rest) // 4 + 1))[: len(rest)]
            plain = int.from_bytes(rest) ^ int.from_bytes(masks)
            if text.encode() in plain.to_bytes(len(rest)) or text.encode() in chunk:
                return True
    return False


def test_somebody_between_two_nodes_reads_and_changes_nothing(tmp_path: Path) -> None:
    taps: list[Tap] = []

    def via(source: Agent, sink: Agent) -> int:
        if source.node != "n1":
            return sink.port
        taps.append(Tap(sink.port))
        return taps[0].port

    extra = "[limits]\ntoken_gap_s = 5\n"
    with tls_rack(tmp_path, [], [model(fake_step_s=0.0)], extra=extra, via=via) as (_, (first, second)):
        (tap,) = taps
        with tap:
            mine = {first.chat(f"{MARK} {n}").headers["X-Mlxrack-Request-Id"] for n in range(5)}
            recorded = tap.everything()
            assert len(recorded) > 2_000
            for secret in (MARK, SECRET, "Mlxrack v=", "/peer/v1", "Upgrade"):
                assert secret.encode() not in recorded, secret
            assert not _readable(tap, MARK)
            _replay(second.port, [b"".join(chunks) for chunks in tap.sent if len(chunks) > 2], FRAMES)
            for number in range(LIVE):
                before = tap.altered, tap.injected
                tap.alter, tap.inject = bool(number % 2), b"" if number % 2 else as_websocket(evil())
                until(lambda before=before: before != (tap.altered, tap.injected), "something was changed")  # type: ignore[misc]
                tap.alter, tap.inject = False, b""
                until(lambda: _peer(first)["state"] == "up", "another connection was made")
                until(lambda: first.chat(f"{MARK} again").status == 200, "requests are served")
            done = worked(second)
            assert mine <= set(done)
            asked = {line["request"] for line in log_of(first) if line.get("path") == "/v1/chat/completions"}
            assert set(done) <= asked, "nothing was worked on that this node did not ask for"
            assert second.chat().status == 200
            log = (second.state / "logs/agent.jsonl").read_text()
            assert len(log) < 1 << 20
            assert "Traceback" not in log


def _peer(agent: Agent) -> Any:
    return agent.status()["peers"][0]


def _replay(port: int, sessions: list[bytes], times: int) -> None:
    """Send recorded bytes again: as they were, changed by a bit, cut, doubled, or spliced with another connection's."""
    rng = random.Random(1)
    for number in range(times):
        data = rng.choice(sessions)
        how = number % 5
        if how == 1:
            data = flipped(data, rng)
        elif how == 2:
            data = data[: rng.randrange(len(data))]
        elif how == 3:
            data += data
        elif how == 4:
            other = rng.choice(sessions)
            data = data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                while chunk := connection.recv(1 << 16):
                    answer += chunk
            except ConnectionError:
                continue
        assert MARK.encode() not in answer
        assert b"HTTP/1.1" not in answer


# ---- with the rack's secret, and without the right certificate ----


def signed(node: str = "n2") -> dict[str, str]:
    t_ms, path = time.time_ns() // 1_000_000, "/peer/v1/beat"
    nonce = f"by-hand-{next(_numbers)}"
    return {"Authorization": KEYS.header(node=node, to="n1", method="GET", path=path, body=b"", t_ms=t_ms, nonce=nonce)}


async def call(agent: Agent, context: ssl.SSLContext, node: str = "n2") -> tuple[int, str]:
    """The status of a signed heartbeat, 0 for none, and what was said."""
    url = f"https://127.0.0.1:{agent.port}/peer/v1/beat"
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(url, headers=signed(node), ssl=context, server_hostname=server_name("n1")) as answer:
                return answer.status, "" if answer.status == 200 else (await answer.json())["error"]["message"]
        except (aiohttp.ClientError, OSError) as error:
            return 0, type(error).__name__


def caller(authority: Authority, own: Tls | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(authority.ca)
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context


def test_the_secret_alone_makes_nobody_a_peer(tmp_path: Path) -> None:
    with tls_rack(tmp_path, [model()]) as (authority, (agent,)):
        foreign = Authority(tmp_path / "foreign")
        self_signed = Tls(certificate=str(foreign.ca), key=str(foreign.ca.with_suffix(".key")))
        agent.stop()  # a node without peers has no rack secret; this one gets it
        other = Agent(tmp_path, "n2", free_port())
        write_tls_config(agent, [other], [model()], authority.issue("n1"))
        agent.start().ready()
        said = {
            "right": caller(authority, authority.issue("n2")),
            "none": caller(authority, None),
            "another node's": caller(authority, authority.issue("n3")),
            "another rack's": caller(authority, authority.issue("n2", name="q", rack="q")),
            "expired": caller(authority, authority.issue("n2", name="old", age_days=50, days=49)),
            "another CA's": caller(authority, foreign.issue("n2")),
            "self-signed": caller(authority, self_signed),
        }
        found = {which: asyncio.run(call(agent, context)) for which, context in said.items()}
        assert found["right"] == (200, "")
        assert found["none"][0] == 403
        assert "showed no certificate" in found["none"][1]
        assert found["another node's"][0] == 403
        assert "is that of mlxrack://r/n3, not of mlxrack://r/n2" in found["another node's"][1]
        assert found["another rack's"][0] == 403
        assert "is that of mlxrack://q/n2" in found["another rack's"][1]
        assert [found[which][0] for which in ("expired", "another CA's", "self-signed")] == [0, 0, 0]
        heard = " ".join(refusals(agent))
        for reason in ("has expired", "signed by another CA", "self-signed"):
            assert reason in heard
        assert agent.chat().status == 200, "clients need no certificate"


def test_a_session_that_is_resumed_shows_no_certificate_of_now(tmp_path: Path) -> None:
    """TLS 1.2 resumes sessions by an id, also without tickets: nobody shows or checks a certificate then."""
    with tls_rack(tmp_path, [model()]) as (authority, (agent,)):
        agent.stop()
        write_tls_config(agent, [Agent(tmp_path, "n2", free_port())], [model()], authority.issue("n1"))
        agent.start().ready()
        context = caller(authority, authority.issue("n2"))
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        request = "GET /peer/v1/beat HTTP/1.1\r\nHost: localhost\r\nAuthorization: {Authorization}\r\n\r\n"

        def beat(session: ssl.SSLSession | None) -> tuple[ssl.SSLSocket, bytes]:
            opened = socket.create_connection(("127.0.0.1", agent.port), timeout=60)
            shaken = context.wrap_socket(opened, server_hostname=server_name("n1"), session=session)
            shaken.sendall(request.format(**signed()).encode())
            return shaken, shaken.recv(12)

        first, answer = beat(None)
        with first:
            assert answer == b"HTTP/1.1 200", "a full handshake of TLS 1.2"
            again, answer = beat(first.session)
            with again:
                assert again.session_reused, "or this test shows nothing"
                assert answer == b"HTTP/1.1 403"
            more, answer = beat(None)
            with more:
                assert answer == b"HTTP/1.1 200"


def test_a_server_name_that_is_none_leaves_its_bytes_nowhere(tmp_path: Path) -> None:
    """Python fails to decode it before the listener is asked, and would write that to stderr each time."""
    with tls_rack(tmp_path, [model()]) as (_, (agent,)):
        out = ssl.MemoryBIO()
        begun = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname=f"{'x' * 40}.example")
        with contextlib.suppress(ssl.SSLWantReadError):
            begun.do_handshake()
        hello = out.read().replace(b"x" * 40, b"\xe4" * 20 + b"MARK" * 5)
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", agent.port), timeout=60) as one:
                one.sendall(hello)
                while one.recv(1 << 16):
                    pass
        assert agent.chat().status == 200
        assert agent.process is not None
        agent.process.terminate()
        said = agent.output()
        (line,) = [one for one in log_of(agent) if one["event"].startswith("unraisable")]
        assert line["error"] == "UnicodeDecodeError"
        everything = said + (agent.state / "logs/agent.jsonl").read_text()
        assert "MARK" not in everything
        assert "Exception ignored" not in everything


def test_a_node_with_an_unusable_certificate_says_so_and_a_peer_tells_why(tmp_path: Path) -> None:
    """n2 is configured with another node's certificate: it does not start; with an expired one it does, and both say
    why they do not talk."""
    with tls_rack(tmp_path, [model()], [model()]) as (authority, (first, second)):
        second.stop()
        authority.issue("n3", name="n2")
        second.start(wait=False)
        assert second.process is not None
        assert second.process.wait(60) == os.EX_CONFIG
        assert "its certificate is that of mlxrack://r/n3, not of mlxrack://r/n2" in second.output()
        second.stop()
        authority.issue("n2", age_days=50, days=49)
        second.tls = None  # its certificate has expired for clients, too: no answer is verified
        second.start(wait=False)
        until(lambda: "the certificate has expired" in _peer(first)["problem"], "the first knows why")
        status = _cli(second, "status")
        assert "warning: the listener certificate has expired" in status
        authority.issue("n2")
        until(lambda: _peer(first)["state"] == "up", "new files are read without a restart")
        assert "expired" not in _cli(second, "status")


def _cli(agent: Agent, *verb: str) -> str:
    run: list[str] = []

    def answered() -> bool:
        done = subprocess.run(
            [SCRIPT, *verb, "--config", str(agent.config)], capture_output=True, text=True, timeout=60, check=False
        )
        run[:] = [done.stdout]
        return done.returncode == 0

    until(answered, f"{verb[0]} works")
    return run[0]


def test_commands_verify_the_agent_they_talk_to(tmp_path: Path) -> None:
    """The admin token goes to nobody else, not even to another node of the rack on the same port."""
    with tls_rack(tmp_path, [model()], [model()]) as (_, (first, second)):
        assert "node n1 of rack r" in _cli(first, "status")
        first.kill()
        (first.state / "port").write_text(str(second.port))
        run = subprocess.run(
            [SCRIPT, "status", "--config", str(first.config)], capture_output=True, text=True, timeout=60, check=False
        )
        assert run.returncode == os.EX_TEMPFAIL
        assert "is not this agent: it shows another certificate" in run.stderr
        assert not [line for line in log_of(second) if line.get("path") == "/admin/v1/status" and line["status"] == 401]


def test_a_certificate_s_expiry_is_in_the_metrics_and_in_telemetry(tmp_path: Path) -> None:
    from shared.batch import unseal
    from shared.store import list_all
    from shared.store_dir import DirectoryStore

    with tls_rack(tmp_path, [model()]) as (_, (agent,)):
        text = agent.get("/metrics").body.decode()
        (ends,) = [line for line in text.splitlines() if 'timestamp_seconds{certificate="listener"}' in line]
        assert 99 < (float(ends.split()[-1]) - time.time()) / 86_400 < 101
        store = DirectoryStore(tmp_path / "bucket")

        def events() -> set[str]:
            segments = [item.key for item in list_all(store, "raw/") if item.key.endswith(".mpz")]
            batches = [batch for key in segments for batch in unseal(store.get(key, 16 << 20).body)]
            return {r.certificate for b in batches for r in b.records if isinstance(r, CertificateExpires)}

        until(lambda: events() == {"listener", "ca"}, "both are in the bucket")
        assert CertificateExpires in URGENT, "and copied at once, from the second start on"


# ---- tokens ----


@pytest.mark.parametrize("open_metrics", [False, True])
def test_metrics_need_a_token_wherever_there_are_keys(tmp_path: Path, open_metrics: bool) -> None:
    """On loopback, too: behind a proxy every client is a local one."""
    from agent.config import hash_key

    extra = f'[[keys]]\nid = "k"\nsha256 = "{hash_key("client")}"\n[api]\nopen_metrics = {str(open_metrics).lower()}\n'
    with rack(tmp_path, [model()], extra=extra) as (agent,):
        token, admin = ((agent.state / name).read_text().strip() for name in ("metrics.token", "admin.token"))
        assert (agent.state / "metrics.token").stat().st_mode & 0o777 == 0o600
        for path in ("/metrics", "/debug/rack"):
            for bearer, status in ((token, 200), (admin, 200), ("client", 401), ("", 401)):
                answer = agent.get(path, Authorization=f"Bearer {bearer}")
                assert answer.status == (200 if open_metrics else status), (path, bearer == token)
            proxied = agent.get(path, **{"X-Forwarded-For": "127.0.0.1"})
            assert proxied.status == (200 if open_metrics else 401)
        assert agent.admin("GET", "status").status == 200
        assert agent.request("GET", "/admin/v1/status", headers={"Authorization": f"Bearer {token}"}).status == 401


def test_a_weak_rack_secret_keeps_a_node_from_starting(tmp_path: Path) -> None:
    agent, other = Agent(tmp_path, "n1", free_port()), Agent(tmp_path, "n2", free_port())
    write_config(agent, [other], [])
    for weak in ("a", "short", "ab" * 20, "abcdefghijklmnopqrstuvwxyz0123456789"):
        agent.secret = weak
        environ = {**os.environ, "MLXRACK_TEST_SECRET": weak}
        run = subprocess.run(
            [SCRIPT, "check-config", "--config", str(agent.config)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (run.returncode, "new-secret" in run.stderr) == (os.EX_CONFIG, True)
        assert weak == "a" or weak not in run.stderr
    agent.start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(60) == os.EX_CONFIG
    assert "mlxrack-agent new-secret" in agent.output()
    agent.stop()


def test_tls_tables_are_written_as_they_are_read(tmp_path: Path) -> None:
    own = Authority(tmp_path).issue("n1")
    assert table(own).count("=") == 3
