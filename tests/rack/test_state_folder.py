"""A real agent's state is its user's alone, and its admin token goes to nobody else."""

import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from tests.rack.harness import SCRIPT, Agent, model, rack, until


def open_to_others(folder: Path) -> list[str]:
    paths = [folder, *folder.rglob("*")]
    return [f"{path} {path.lstat().st_mode & 0o777:o}" for path in paths if path.lstat().st_mode & 0o077]


def command(agent: Agent, *words: str) -> subprocess.CompletedProcess[str]:
    line = [SCRIPT, *words, "--config", str(agent.config)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def test_all_that_an_agent_writes_is_private_and_what_was_open_is_corrected(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with rack(tmp_path, [model()]) as (agent,):
            assert agent.chat().status == 200
            until(lambda: agent.status()["push"]["sent_batches"], "a batch was written and sent")
            assert command(agent, "models", "list").returncode == 0
            names = {path.name for path in agent.state.rglob("*")}
            assert {"admin.token", "port", "agent.jsonl", "identity.json", "lock"} <= names
            assert open_to_others(agent.state) == []
            token = (agent.state / "admin.token").read_text()
            second = command(agent, "run")
            assert "in use by another agent; stop that one" in second.stderr
            assert second.returncode == os.EX_UNAVAILABLE
            assert int((agent.state / "port").read_text()) == agent.port, "nor is the first one's port forgotten"
            agent.kill()
            for path in (agent.state, *agent.state.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            found = command(agent, "doctor").stdout
            assert "has mode 755 and" in found
            agent.start()
            assert open_to_others(agent.state) == []
            assert (agent.state / "admin.token").read_text() != token, "others may have read it"
            assert command(agent, "status").returncode == 0
            assert "this user's alone" in command(agent, "doctor").stdout
    finally:
        os.umask(before)


def test_the_port_of_a_killed_agent_is_nobodys(tmp_path: Path) -> None:
    """Another program listens there by now; it sees no token."""
    seen: list[str] = []

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.path} {self.headers}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"proof": "x"}')

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with rack(tmp_path, [model()]) as (agent,):
        token = (agent.state / "admin.token").read_text().strip()
        agent.kill()
        server = HTTPServer(("127.0.0.1", agent.port), Stranger)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            for words in (["status"], ["unload", "m"], ["seal"], ["models", "list"]):
                run = command(agent, *words)
                assert "is not this agent" in run.stderr
        finally:
            server.shutdown()
            server.server_close()
    assert len(seen) >= 4
    assert all(one.startswith(("/admin/v1/proof", "/health ")) and token not in one for one in seen)
