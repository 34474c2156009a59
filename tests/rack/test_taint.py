"""SENSITIVE content at real agents: known at every gateway, over kills, rotations and upgrades, and nowhere on disk."""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.mesh.peers import Heartbeat
from agent.mesh.signing import RackKeys, body_hash
from agent.process.prefixes import unpacked
from scripts.seaweed import free_port
from tests.rack.harness import SECRET, Agent, Answer, end, events_of, model, until, write_config
from tests.rack.taint_agent import OLDER

SENSITIVE = {"X-Task-Class": "ROUTINE, SENSITIVE"}
LONG = "This belongs to the file of the patient and to nobody else. " * 6
"""A block of the disk cache, and one of prefixes."""
DECODED = 'mlxrack_engine_decode_tokens_total{model="m"}'


class WithTaints(Agent):
    """The agent of tests/rack/taint_agent.py; ``older`` one is that of a version without taints."""

    older = False

    def start(self, *, wait: bool = True) -> "Agent":
        older = {OLDER: "1"} if self.older else {}
        environ = {**older, "MLXRACK_TEST_SECRET": self.secret, "PATH": "/usr/bin:/bin", "HOME": str(self.folder)}
        command = [sys.executable, "-m", "tests.rack.taint_agent", "run", "--config", str(self.config)]
        self.process = subprocess.Popen(
            *(command,),
            env=environ,
            cwd=Path(__file__).parents[2],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        if wait:
            until(lambda: self.alive() and self.get("/health").status == 200, f"{self.node} answers")
        return self

    def taint(self) -> Any:
        """What `mlxrack-agent taint` shows."""
        return self.admin("GET", "taint").json

    def knows_all(self) -> "WithTaints":
        """Wait until its marks are complete."""
        until(lambda: self.taint()["state"] == "ready", f"{self.node} has all marks")
        return self

    def why(self, text: str, **more: Any) -> str:
        """Why a request with this text is SENSITIVE; "" when it is not."""
        return reason(self.chat(text, **more))

    def prefixes(self, of: Agent) -> int:
        """How many hashes of prefixes a node tells this one in a heartbeat."""
        keys = RackKeys((self.secret,))
        t_ms = time.time_ns() // 1_000_000
        header = keys.header(
            node=self.node,
            to=of.node,
            method="GET",
            path="/peer/v1/beat",
            body=b"",
            t_ms=t_ms,
            nonce=secrets.token_hex(8),
        )
        raw = of.get("/peer/v1/beat", Authorization=header).body
        return sum(len(unpacked(m.prefixes)) for m in msgspec.msgpack.decode(raw, type=Heartbeat).models)


def reason(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    return answer.headers["X-Test-Sensitive"]


def nodes(folder: Path, *models_of: Sequence[dict[str, Any]], extra: str = "") -> list[WithTaints]:
    """Agents that are configured, not started."""
    agents = [WithTaints(folder, f"n{n}", free_port()) for n in range(1, len(models_of) + 1)]
    for agent, models in zip(agents, models_of, strict=True):
        write_config(agent, [other for other in agents if other is not agent], models, extra)
    return agents


def command(agent: Agent, *arguments: str) -> subprocess.CompletedProcess[str]:
    """mlxrack-agent."""
    return subprocess.run(
        [sys.executable, "-m", "agent", *arguments, "--config", str(agent.config)],
        env={"MLXRACK_TEST_SECRET": agent.secret, "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[list[WithTaints]]:
    """Three nodes; one of them has a real model, with a disk cache."""
    folder = tmp_path_factory.mktemp("rack")
    (folder / "secret").write_text("a secret of at least thirty-two characters")
    (folder / "secret").chmod(0o600)
    real = {"name": "far", "path": str(tiny_model), "rows": 2, "disk_cache_bytes": 64 << 20, "need_bytes": 10}
    fake = model(fake_cache_tok=100_000)
    extra = f'[disk_cache]\nsecret = "file:{folder / "secret"}"\n'
    made = nodes(folder, [fake], [fake], [fake, real], extra=extra)
    try:
        for agent in made:
            agent.start(wait=False)
        for agent in made:
            until(lambda agent=agent: agent.get("/health").status == 200, "it answers")  # type: ignore[misc]
            until(lambda agent=agent: agent.get("/ready").status == 200, "it is ready")  # type: ignore[misc]
        for agent in made:
            agent.knows_all()
        until(lambda: "far" in str(made[0].get("/v1/models").body), "n1 knows of the far model")
        yield made
    finally:
        end(made)


def test_a_sensitive_conversation_is_known_at_every_gateway_with_its_answer(agents: list[WithTaints]) -> None:
    n1, n2, n3 = agents
    assert n1.why("The diagnosis is E11.") == "", "nothing was SENSITIVE before"
    answer = n1.chat("The diagnosis is E11.", headers=SENSITIVE)
    assert reason(answer) == "label"
    said = answer.json["choices"][0]["message"]["content"]
    assert [one.why("**the diagnosis** is\u00a0E11") for one in agents] == ["taint"] * 3
    assert [one.why(f"{said.upper()}\n") for one in agents] == ["taint"] * 3
    assert [one.why("What time is it?") for one in agents] == [""] * 3
    streamed = n2.chat("Streamed, and secret.", headers=SENSITIVE, stream=True)
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events_of(streamed)[:-1]]
    assert n3.why("".join(pieces)) == "taint"
    parts = [{"type": "text", "text": "Streamed, "}, {"type": "text", "text": "and secret."}]
    history = [{"role": "user", "content": parts}, {"role": "user", "content": "Go on."}]
    assert n3.why("", messages=history) == "taint"
    assert n1.why("Go on.") == "taint", "what came with it is tainted, too"
    assert n1.taint()["peers"] == {"n2": "same", "n3": "same"}


def test_nothing_of_a_private_request_is_on_disk_or_in_a_heartbeat(agents: list[WithTaints]) -> None:
    """Forwarded to a node with a disk cache; the same text without the label does leave both."""
    n1, _, n3 = agents
    marker = f"MARKER{secrets.token_hex(8)}"
    cache = n3.state / "prompts"
    before = n1.prefixes(n3)
    until(lambda: list(cache.rglob("*.kv")), "the block of the engine's own first prompt")

    def asked(text: str, **more: Any) -> Answer:
        answer = n1.chat(text, model="far", max_tokens=4, **more)
        assert (answer.status, answer.headers.get("X-Mlxrack-Node")) == (200, "n3"), answer.body
        return answer

    assert reason(asked(f"{marker} {LONG}", headers=SENSITIVE)) == "label"
    assert reason(asked(f"{marker} {LONG}", stream=True)) == "taint"
    assert reason(n1.chat(f"{marker} {LONG}", max_tokens=4)) == "taint"
    assert n1.prefixes(n3) == before
    assert reason(asked(f"nothing of it {LONG}")) == ""
    until(lambda: n1.prefixes(n3) > before, "hashes of a request that is not private")
    until(lambda: len(list(cache.rglob("*.kv"))) > 1, "its block is on disk")
    assert reason(asked(f"{marker} {LONG}")) == "taint"
    assert n3.admin("POST", "unload", model="far").status == 200, "all blocks that wait are written"
    assert len(list(cache.rglob("*.kv"))) == 2, "the engine's, and that of the one that is not private"
    for agent in agents:
        agent.admin("POST", "seal")
    leaked = [path for path in n1.folder.rglob("*") if path.is_file() and marker.encode() in path.read_bytes()]
    assert leaked == []
    status = [agent.admin("GET", "status").body + agent.get("/debug/rack").body for agent in agents]
    assert not [body for body in status if marker.encode() in body]


def test_only_peers_are_answered_and_only_what_they_signed(agents: list[WithTaints]) -> None:
    n1, _, n3 = agents
    body = msgspec.msgpack.encode({"what": "compare"})

    def asked(secret: str, signed: bytes, sent: bytes, *, to: str = "n3", path: str = "/peer/v1/taints") -> int:
        path = f"{path}?body={body_hash(signed)}"
        t_ms, nonce = time.time_ns() // 1_000_000, secrets.token_hex(8)
        more = {"method": "POST", "path": path, "body": b"", "t_ms": t_ms, "nonce": nonce}
        header = {"Authorization": RackKeys((secret,)).header(node="n1", to=to, **more)}  # type: ignore[arg-type]
        statuses = [n3.request("POST", path, sent, header).status for _ in range(2)]
        assert statuses[1] == 403, "a replay"
        return statuses[0]

    assert asked(n1.secret, body, body) == 200
    assert asked(n1.secret, body, msgspec.msgpack.encode({"what": "forget"})) == 403
    assert asked("a secret that this rack does not have, 32", body, body) == 403
    assert asked(n1.secret, body, body, to="n2") == 403
    assert asked(n1.secret, b"\xc1", b"\xc1") == 400
    huge = bytes(2 << 20)
    assert asked(n1.secret, huge, huge) in (413, 0)
    assert n3.request("POST", "/peer/v1/taints", body).status == 403
    assert n3.request("GET", "/admin/v1/taint").status == 401
    assert n3.request("POST", "/admin/v1/taint/clear").status == 401


def test_no_answer_is_kept_whole(agents: list[WithTaints]) -> None:
    """There is no cache of answers: the same request is computed again; only the states of its prompt are kept."""
    n1, n2, n3 = agents

    def decoded_tok() -> float:
        """By the engines' own count."""
        for agent in agents:
            assert agent.admin("POST", "seal").status == 200
        lines = [line for agent in agents for line in agent.get("/metrics").body.decode().splitlines()]
        return sum(float(line.split()[-1]) for line in lines if line.startswith(DECODED))

    for headers in ({}, SENSITIVE):
        before = decoded_tok()
        for agent in (n1, n2, n3, n1):
            assert agent.chat("Say it again.", headers=headers, temperature=0, seed=1).status == 200
        assert decoded_tok() - before == 4 * 5


def test_marks_outlive_kills_and_their_node_and_are_cleared_by_an_operator_everywhere(agents: list[WithTaints]) -> None:
    n1, n2, n3 = agents
    n1.chat("Last words of n1.", headers=SENSITIVE, stream=True)
    n1.kill()
    n2.kill()
    n2.start()
    until(lambda: n2.taint()["peers"]["n1"] == "down", "n1 is down")
    n2.knows_all()
    assert n2.why("Last words of n1.") == "taint"
    assert n2.why("What time is it?") == ""
    refused = n2.admin("POST", "taint/clear")
    assert refused.status == 409
    assert b"nothing was cleared: n1 cannot be asked" in refused.body
    for path in (n1.state / "taints").iterdir():
        path.unlink()
    n1.start()
    n1.knows_all()
    assert n1.why("Last words of n1.") == "taint", "from its peers"
    until(lambda: all(one.taint()["peers"] == {o.node: "same" for o in agents if o is not one} for one in agents), "up")
    shown = command(n3, "taint")
    assert shown.returncode == 0
    assert " marks, ready" in shown.stdout
    assert "n1    same" in shown.stdout
    assert "confirm with --yes" in command(n3, "taint", "clear").stderr
    assert n3.why("Last words of n1.") == "taint"
    cleared = command(n3, "taint", "clear", "--yes")
    assert cleared.stdout.endswith("marks cleared on every node\n"), cleared.stderr
    assert [one.taint()["marks"] for one in agents] == [0, 0, 0]
    assert any("taints_cleared" in path.read_text() for path in n1.state.rglob("agent.jsonl"))


def test_one_node_keeps_its_marks_over_a_kill_at_the_first_byte_and_a_new_secret(tmp_path: Path) -> None:
    (alone,) = nodes(tmp_path, [model()], extra="[taint]\nmarks = 6\n")
    try:
        alone.start()
        alone.ready()
        alone.knows_all()
        connection_text = "Killed in the middle."
        body = {"model": "m", "messages": [{"role": "user", "content": connection_text}], "stream": True}
        alone.request("POST", "/v1/chat/completions", json.dumps({**body, "max_tokens": 1}).encode(), SENSITIVE)
        alone.kill()
        alone.start()
        alone.ready()
        alone.knows_all()
        assert alone.why(connection_text) == "taint"
        for n in range(6):
            alone.chat(f"text {n}", headers=SENSITIVE)
        assert alone.why("What time is it?") == "taint_full"
        assert "every request counts as SENSITIVE" in str(alone.status()["warnings"])
        assert "full (taint.marks)" in str(alone.status()["warnings"])
    finally:
        end([alone])


def test_beside_an_agent_without_taints_every_request_is_sensitive_until_it_is_upgraded(tmp_path: Path) -> None:
    new, old = nodes(tmp_path, [model()], [model()])
    old.older = True
    new.secret = old.secret = SECRET
    try:
        for one in (new, old):
            one.start()
        new.ready()
        until(lambda: new.taint()["peers"] == {"n2": "older version"}, "it is known")
        assert new.why("What time is it?") == "taint_not_loaded"
        assert new.taint()["why"] == "n2 runs a version that keeps none; upgrade it"
        old.stop()
        old.older = False
        old.start()
        new.knows_all()
        assert new.why("What time is it?") == ""
    finally:
        end([new, old])
