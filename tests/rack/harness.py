"""Several real agents on loopback, with the fake engine unless a test asks for a model."""

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.seaweed import free_port
from tests.rack.links import Links

SECRET = "the rack secret of the tests, 4f1c9ab07d"
SCRIPT = str(Path(sys.executable).parent / "mlxrack-agent")


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


class Agent:
    """One agent process."""

    def __init__(self, folder: Path, node: str, port: int) -> None:
        self.folder = folder
        self.node = node
        self.port = port
        self.address = "127.0.0.1"
        """Where tests reach it."""
        self.config = folder / f"{node}.toml"
        self.process: subprocess.Popen[str] | None = None
        self.secret = SECRET
        self.tls: ssl.SSLContext | None = None
        self.program = [SCRIPT]
        """What is started; its command is `run`."""
        self.open_files = 0
        """The limit of open files that it is started with; 0 for that of the tests."""
        self.program = [SCRIPT]
        """What is started; `tests.posing_agent` finds fake providers under the names of real ones."""

    @property
    def state(self) -> Path:
        """Its state folder."""
        return self.folder / node_folder(self.node)

    def start(self, *, wait: bool = True) -> "Agent":
        """Start it and wait until it answers."""
        environ = {**os.environ, "MLXRACK_TEST_SECRET": self.secret}
        command = [*self.program, "run", "--config", str(self.config)]
        if self.open_files:
            command = ["/bin/sh", "-c", f'ulimit -n {self.open_files}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        )
        if wait:
            until(lambda: self.alive() and self.get("/health").status == 200, f"{self.node} answers")
        return self

    def alive(self) -> bool:
        """Whether it runs; raises with its output when it ended."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.node} ended with {self.process.returncode}: {self.output()}")
        return True

    def output(self) -> str:
        """Its output; call it after the process has ended."""
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def ready(self) -> "Agent":
        """Wait until a model is loaded."""
        until(lambda: self.get("/ready").status == 200, f"{self.node} is ready")
        return self

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=40)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 240,
    ) -> Answer:
        """One HTTP request."""
        connection = (
            http.client.HTTPSConnection(self.address, self.port, timeout=timeout, context=self.tls)
            if self.tls is not None
            else http.client.HTTPConnection(self.address, self.port, timeout=timeout)
        )
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        except OSError:
            return Answer(0, {}, b"")
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        """GET."""
        return self.request("GET", path, headers=headers)

    def chat(self, content: str = "hello", *, headers: dict[str, str] | None = None, **more: Any) -> Answer:
        """A chat completion."""
        body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 5, **more}
        return self.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)

    def admin(self, method: str, verb: str, **body: str) -> Answer:
        """A call to the admin API with its token."""
        token = (self.state / "admin.token").read_text().strip()
        payload = json.dumps(body).encode() if method == "POST" else None
        return self.request(method, f"/admin/v1/{verb}", payload, {"Authorization": f"Bearer {token}"})

    def status(self) -> Any:
        """Its status."""
        return self.admin("GET", "status").json


def node_folder(node: str) -> str:
    """The folder of a node's state."""
    return f"state of {node}"


def model(name: str = "m", **more: Any) -> dict[str, Any]:
    """A [[models]] table with the fake engine."""
    return {"name": name, "engine": "fake", "path": f"weights of {name}", "need_bytes": 10, **more}


def write_config(
    agent: Agent,
    others: Sequence[Agent],
    models: Sequence[dict[str, Any]],
    extra: str = "",
    via: Callable[[Agent], int] = lambda other: other.port,
) -> None:
    """agent.toml for one node of a rack; ``via`` is the port at which it finds another."""
    text = (
        f'[node]\nid = "{agent.node}"\nrack = "r"\n[listen]\nport = {agent.port}\n'
        f"[paths]\nstate = {json.dumps(str(agent.state))}\n"
        f'[store]\nkind = "directory"\npath = {json.dumps(str(agent.folder / "bucket"))}\n'
    )
    if "[telemetry]" not in extra:
        text += "[telemetry]\nsample_s = 1\nupload_s = 1\n"
    if others:
        text += '[peers]\nsecret = "env:MLXRACK_TEST_SECRET"\n'
        text += "".join(f'[[peers.nodes]]\nid = "{o.node}"\nurl = "http://127.0.0.1:{via(o)}"\n' for o in others)
    if "[loader]" not in extra and any(table.get("engine") != "fake" for table in models):
        text += "[loader]\ncalibrate = false\n"  # the times of a crowded machine, for a minute of its CPU
    for table in models:
        text += "[[models]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items())
    agent.config.write_text(text + extra)


@contextlib.contextmanager
def rack(
    folder: Path, *models_of: Sequence[dict[str, Any]], extra: str = "", start: bool = True, links: Links | None = None
) -> Iterator[list[Agent]]:
    """One agent per list of models, all ready and peers of each other, over ``links`` where there are
    any."""
    agents = [Agent(folder, f"n{n}", free_port()) for n in range(1, len(models_of) + 1)]
    for agent, models in zip(agents, models_of, strict=True):
        others = [a for a in agents if a is not agent]
        if links is None:
            write_config(agent, others, models, extra)
        else:
            ports = {other.node: links.port(agent.node, other.node, other.port) for other in others}
            write_config(agent, others, models, extra, via=lambda other: ports[other.node])  # noqa: B023  # used at once
    try:
        if start:
            for agent in agents:
                agent.start()
            for agent, models in zip(agents, models_of, strict=True):
                if any(m.get("preload", True) for m in models):
                    agent.ready()
            for agent in agents:
                until(lambda agent=agent: all(p["state"] == "up" for p in agent.status()["peers"]), "peers are up")  # type: ignore[misc]
        yield agents
    finally:
        end(agents)


def end(agents: Sequence[Agent]) -> None:
    """End every process that still runs."""
    for agent in agents:
        if agent.process is not None and agent.process.poll() is None:
            agent.kill()
        elif agent.process is not None and agent.process.stdout is not None:
            agent.process.stdout.close()


def until(done: Callable[[], Any], what: str, limit_s: float = 180.0) -> None:
    """Poll until done."""
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s in vain until {what}"
        time.sleep(0.05)


def events_of(answer: Answer) -> list[Any]:
    """The JSON of a stream's events, [DONE] as a string."""
    lines = [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
