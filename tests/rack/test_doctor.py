"""doctor in a real rack: it asks every peer, the store and the running agent, and says what answered."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from scripts.seaweed import free_port
from tests.rack.harness import SCRIPT, SECRET, Agent, end, model, until, write_config
from tests.rack.tls_rack import Authority, tls_rack


class Page(BaseHTTPRequestHandler):
    """A proxy or another program: a web page for everything."""

    def do_GET(self) -> None:
        body = b"<html>hello</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def web_page() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class At:
    """Where a peer is said to be."""

    def __init__(self, node: str, port: int) -> None:
        self.node, self.port = node, port


def doctor(agent: Agent, *options: str, secret: str | None = SECRET) -> tuple[int, list[dict[str, Any]], str]:
    environ = {name: value for name, value in os.environ.items() if name != "MLXRACK_TEST_SECRET"}
    if secret is not None:
        environ["MLXRACK_TEST_SECRET"] = secret
    command = [SCRIPT, "doctor", "--config", str(agent.config), "--json", *options]
    run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert run.stdout.startswith("["), run.stderr
    return run.returncode, json.loads(run.stdout), run.stdout


def of(found: list[dict[str, Any]], what: str) -> tuple[str, str]:
    (one,) = [each for each in found if each["what"] == what]
    return one["verdict"], one["seen"]


def test_doctor_asks_every_peer_and_resolves_secrets_as_the_running_agent(tmp_path: Path) -> None:
    agents = [Agent(tmp_path, f"n{n}", free_port()) for n in (1, 2, 3)]
    first, second, stranger = agents
    silent = free_port()
    with web_page() as page:
        others = [
            second,
            At("n4", silent),
            At("n5", page),
            At("n6", second.port),
            At("n7", first.port),
            At("n3", stranger.port),
        ]
        write_config(first, others, [model(), model("big", need_bytes=10**15)], "[memory]\nbudget_bytes = 1000\n")  # type: ignore[arg-type]
        url = 'id = "n6"\nurl = "http://{}:'
        text = first.config.read_text().replace(url.format("127.0.0.1"), url.format("localhost"))
        first.config.write_text(text)
        write_config(second, [first], [model()])
        write_config(stranger, [first], [])
        stranger.secret = "another secret, 8b1d04f6aa93c57e"
        try:
            for agent in agents:
                agent.start()
            first.ready()
            second.ready()
            status, found, text = doctor(first)
            assert status == 1
            assert of(found, "peer n2")[0] == "ok"
            assert of(found, "peer n2")[1].endswith("models that answer there: m")
            for peer, words in {
                "n3": "peers.secret must be the same on all nodes",
                "n4": f"nothing listens on 127.0.0.1:{silent}",
                "n5": "not an mlxrack agent",
                "n6": "node 'n2' answers at this url, which peers.nodes calls 'n6'",
                "n7": "this url leads back to this node itself",
            }.items():
                seen = [one for one in found if one["what"] == f"peer {peer}" and one["verdict"] == "problem"]
                assert any(words in one["seen"] for one in seen), (peer, seen)
            assert of(found, "model big")[0] == "problem"
            assert "it can never be loaded" in of(found, "model big")[1]
            assert "this agent is running" in of(found, "listen")[1]
            assert not [one for one in found if "on a Mac" in one["what"]], "only what this machine can show"

            # `status` and the log say the same, with a name and where a warning is looked for
            problems = {one["node"]: one["problem"] for one in first.status()["peers"]}
            assert "node 'n2' answers" in problems["n6"]
            assert "leads back to this node itself" in problems["n7"]
            command = [SCRIPT, "logs", "--config", str(first.config), "--level", "warning"]
            logged = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
            assert "peer_problem" in logged
            assert "node 'n2' answers" in logged

            # a shell without the secret: the running agent has it, and tells that it has, not what it is
            status, found, text = doctor(first, secret=None)
            assert "peers.secret: usable (as seen by the running agent)" in of(found, "secrets")[1]
            assert "(as seen by the running agent)" in of(found, "peer n4")[1]
            assert SECRET not in text
            assert first.admin("GET", "secrets").json == {"env:MLXRACK_TEST_SECRET": ""}
            assert first.request("GET", "/admin/v1/secrets").status == 401
            first.kill()
            status, found, text = doctor(first, "--mac", secret=None)
            assert len([one for one in found if one["what"].startswith("on a Mac: ")]) >= 10, "when asked"
            assert of(found, "secret peers.secret")[0] == "problem"
            assert "is not set (as seen by this shell)" in of(found, "secret peers.secret")[1]
            assert of(found, "peers")[0] == "problem"
        finally:
            end(agents)


def test_a_command_that_meets_another_rack_s_agent_says_so(tmp_path: Path) -> None:
    """The port of this configuration is another agent's; or no agent's at all."""
    there, here = Agent(tmp_path, "n1", free_port()), Agent(tmp_path, "n2", 0)
    write_config(there, [], [])
    here.port = there.port
    write_config(here, [], [])
    here.state.mkdir(mode=0o700)
    (here.state / "admin.token").write_text("0" * 64)

    def said() -> str:
        command = [SCRIPT, "status", "--config", str(here.config)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == os.EX_UNAVAILABLE, run.stderr
        return run.stderr

    try:
        there.start()
        assert "is that of node 'n1', not of 'n2'" in said()
    finally:
        end([there])
    with web_page() as page:
        (here.state / "port").write_text(str(page))
        assert "is not an mlxrack agent: it answers with a web page" in said()


def test_probes_are_not_in_the_log(tmp_path: Path) -> None:
    probes = ("/ready", "/live", "/health", "/metrics")
    agent = Agent(tmp_path, "n1", free_port())
    write_config(agent, [], [])
    try:
        agent.start()
        for path in probes:
            assert agent.get(path).status in (200, 503)
        assert agent.get("/v1/models").status == 200
        log = agent.state / "logs/agent.jsonl"
        until(lambda: '"/v1/models"' in log.read_text(), "the request is logged")
        assert not [path for path in probes if f'"{path}"' in log.read_text()]
    finally:
        end([agent])


def test_run_says_the_url_when_a_model_answers_and_why_when_none_does(tmp_path: Path) -> None:
    agent = Agent(tmp_path, "n1", free_port())

    def said(*models: dict[str, Any]) -> str:
        write_config(agent, [], models)
        agent.start(wait=False)
        assert agent.process is not None
        assert agent.process.stdout is not None
        lines = []
        for line in agent.process.stdout:
            lines.append(line)
            if "URL:" in line or "no model answers" in line:
                break
        agent.stop()
        return "".join(lines)

    try:
        good = said(model(fake_load_s=1.0), {"name": "dead", "path": "/no/such/folder"})
        assert good.index("m: ready after") < good.index(f"URL: http://127.0.0.1:{agent.port}/v1 (m answers")
        dead = said({"name": "dead", "path": "/no/such/folder"})
        assert "dead: failed: no such folder: /no/such/folder" in dead
        assert "URL" not in dead
        assert "no model answers: neither models nor peers are configured" in said()
    finally:
        end([agent])


def test_over_tls_peers_are_asked_with_certificates_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    with tls_rack(tmp_path, [model()], [model()]) as (authority, (first, second)):
        _, found, _ = doctor(first)
        assert (of(found, "peer n2")[0], of(found, "tls")[0]) == ("ok", "ok"), found
        second.stop()
        text = second.config.read_text()
        other = Authority(tmp_path / "other").issue("n2")
        own = authority.issue("n2")
        for mine, theirs in zip(
            (own.certificate, own.key, own.ca), (other.certificate, other.key, other.ca), strict=True
        ):
            text = text.replace(mine, theirs)
        second.config.write_text(text)
        second.tls = None
        second.start(wait=False)
        until(lambda: "signed by another CA" in first.status()["peers"][0]["problem"], "the agent sees it")
        assert "signed by another CA" in of(doctor(first)[1], "peer n2")[1]
        plain = first.config.read_text().replace(f"https://127.0.0.1:{second.port}", f"http://127.0.0.1:{second.port}")
        first.config.write_text(plain.replace("[listen]\n", "[listen]\ninsecure_http = true\n"))
        assert of(doctor(first)[1], "peer n2")[0] == "problem"
