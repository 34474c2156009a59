"""Real agents under one node id, in another rack's bucket, and after starts that failed."""

import json
import os
import socket
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from agent.telemetry.claims import Claim
from aggregator import alerts, load
from aggregator.calendar import between
from aggregator.commands import rollup
from aggregator.config import AggregatorConfig
from aggregator.fleet import JOIN_MS
from aggregator.window import Window, facts_of
from scripts.seaweed import free_port
from shared import keys
from shared.bucket import Store
from shared.desired import Assignment, DesiredState, encode
from shared.store_dir import DirectoryStore
from tests.builders import uptime_of
from tests.rack.harness import SCRIPT, Agent, end, model, rack, until, write_config

CONFIG = AggregatorConfig(rack="r", store=Store(path="x"))
DAY = timedelta(days=1)


def bucket(folder: Path) -> DirectoryStore:
    return DirectoryStore(folder / "bucket")


def window(folder: Path) -> Window:
    """Everything that was uploaded."""
    rollup.run(CONFIG, bucket(folder))
    first, last = (f"{datetime.now(UTC) + days:%Y-%m-%d}" for days in (-DAY, DAY))
    return load.window(bucket(folder), between(first, last, "UTC"))


def command(agent: Agent, *words: str) -> subprocess.CompletedProcess[str]:
    line = [SCRIPT, *words, "--config", str(agent.config)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def warned(agent: Agent, *words: str) -> bool:
    return any(all(word in one for word in words) for one in agent.status()["warnings"])


def sent(agent: Agent) -> bool:
    push = agent.status()["push"]
    return bool(push["sent_batches"] and push["state"] == "ok" and push["waiting_batches"] < 3)


def reason(agent: Agent) -> Any:
    return agent.status()["push"]["reason"]


def copy_of(first: Agent, other: Agent, folder: Path) -> Agent:
    """A second agent from the agent.toml of the first: another port and state folder, the same bucket and peers."""
    folder.mkdir()
    made = Agent(folder, first.node, free_port())
    write_config(made, [other], [model()])
    made.config.write_text(made.config.read_text().replace(str(folder / "bucket"), str(first.folder / "bucket")))
    return made


def test_two_agents_with_one_id_are_told_by_both_by_a_peer_and_by_an_alert(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], [model()]) as (first, other):
        until(lambda: sent(first), "the first one has the id")
        second = copy_of(first, other, tmp_path / "copy")
        try:
            second.start().ready()
            until(lambda: "was claimed by another agent after this one" in reason(first), "the first one is told")
            until(lambda: warned(second, "another agent uses node id 'n1', too"), "the second one is told")
            until(lambda: warned(other, "two agents", "use node id 'n1'"), "a peer says so")
            until(lambda: warned(first, "n2 sees two agents under this node's id"), "and tells them")
            assert [agent.chat().status for agent in (first, second, other)] == [200, 200, 200], "all serve"
            for agent in (first, second, other):
                assert "node_id_clash" in command(agent, "logs", "--level", "warning").stdout
            waiting = first.status()["push"]["waiting_batches"]
            assert waiting, "its batches are kept"
            shown = command(first, "claim")
            assert "held by another agent, on this machine, with another state folder (claim 2" in shown.stdout
            assert command(second, "status").stdout.count("another agent uses node id 'n1'") == 1

            def alerted() -> bool:
                batches = load.fresh(bucket(tmp_path), "r", {}).batches
                facts = [fact for batch in batches for fact in facts_of(batch)]
                now_ms = max(batch.t_end_ms for batch in batches)
                state = alerts.observe(alerts.AlertState(), facts, now_ms, CONFIG.alerts)
                found, _ = alerts.evaluate(state, now_ms, CONFIG.alerts)
                return any((f.code, f.subject) == ("node_id_clash", "n1") for f in found.firing)

            until(alerted, "the alert fires")
            taken = command(first, "claim", "take")
            assert "granted to this machine" in taken.stdout, taken.stderr
            until(lambda: sent(first), "what waited is uploaded")
            until(lambda: "was claimed by another agent after this one" in reason(second), "and now the other waits")
            assert first.status()["push"]["dropped_batches"] == 0
        finally:
            end([second])
        runs = [run for run in window(tmp_path).runs if run.node == "n1"]
        assert {run.incarnation for run in runs} == {1, 2}
        assert sum(run.missing for run in runs) == 0, "nothing is lost"


def test_a_new_machine_takes_the_id_of_a_dead_one(tmp_path: Path) -> None:
    dead = msgspec.json.encode(Claim(spool_id="dead", hardware="d" * 16, rack="r"))
    bucket(tmp_path).put(keys.claim_key("n1", 1), dead)
    with rack(tmp_path, [model()]) as (agent,):
        until(lambda: "claimed by other hardware (hardware dddddddd" in reason(agent), "it is refused")
        assert "`mlxrack-agent claim take`" in reason(agent)
        assert agent.chat().status == 200
        shown = json.loads(command(agent, "claim", "--json").stdout)
        assert (shown["here"], shown["held_by"]["hardware"]) == (False, "d" * 16)
        assert "another machine" in command(agent, "claim").stdout
        assert command(agent, "claim", "take").returncode == 0
        until(lambda: sent(agent), "what waited is uploaded", 400)
        assert "nothing to take; this agent holds it" in command(agent, "claim", "take").stdout
        assert "held by this agent (claim 2" in command(agent, "claim").stdout
    (run,) = window(tmp_path).runs
    assert (run.incarnation, run.first_seq, run.missing) == (2, 1, 0)


def test_the_bucket_of_another_rack_is_neither_followed_nor_written(tmp_path: Path) -> None:
    assigned = Assignment(model="m", source="elsewhere", version="0123456789abcdef")
    for named, told in (("office", ""), ("", "office")):
        folder = tmp_path / (named or "told")
        folder.mkdir()
        store = bucket(folder)
        store.put(keys.DESIRED, encode(DesiredState(rack=named, generation=1, nodes={"n1": (assigned,)})))
        if told:
            store.put(keys.RACK, b'{"rack": "office"}')
        with rack(folder, [model()], extra="[desired]\nfollow_s = 0.3\n") as (agent,):
            why = "this bucket is that of rack 'office', and this node is of rack 'r'"
            until(lambda: why in agent.status()["desired"]["reason"], "it says so")  # noqa: B023  # used at once
            assert agent.status()["desired"]["generation"] == 0, "and follows nothing"
            assert agent.chat().status == 200
            if told:
                until(lambda: why in reason(agent), "telemetry waits")  # noqa: B023  # used at once
                assert not store.list_after("raw/")


# starts that fail


def failing(agent: Agent, how: str) -> None:
    """One start that ends before it serves."""
    text = agent.config.read_text()
    if how == "port taken":
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", agent.port))
            taken.listen()
            assert started(agent) == os.EX_UNAVAILABLE
        return
    broken = {
        "secret others can read": '[peers]\nsecret = "file:{secret}"\n',
        "certificate missing": '[tls]\ncertificate = "{secret}"\nkey = "{secret}"\n',
        "setting unknown": "[limits]\nwibble = 1\n",
    }[how]
    secret = agent.folder / "secret"
    secret.write_text("x" * 40)
    secret.chmod(0o644)
    agent.config.write_text(text + broken.format(secret=secret))
    assert started(agent) == os.EX_CONFIG
    agent.config.write_text(text)


def started(agent: Agent) -> int:
    agent.start(wait=False)
    assert agent.process is not None
    status = agent.process.wait(timeout=120)
    assert agent.process.stdout is not None
    agent.process.stdout.close()
    return status


def served_for_a_window(agent: Agent) -> None:
    """A good start, until a batch of it is in the bucket."""
    agent.start().ready()
    epoch = agent.status()["epoch"]
    uploaded = f"{keys.raw_node_prefix(agent.node)}i0001/e{epoch:08d}/"
    until(lambda: bucket(agent.folder).list_after(uploaded, limit=1), "a batch of this run is uploaded")


def test_a_start_that_never_served_is_no_previous_run(tmp_path: Path) -> None:
    """Before the first good start, and between a stop and the next one; judged until the last report."""
    ways = ("port taken", "secret others can read", "certificate missing", "setting unknown")
    with rack(tmp_path, [model()], start=False) as (agent,):
        for how in ways:
            failing(agent, how)
        served_for_a_window(agent)
        found = window(tmp_path)
        report = uptime_of(found, found.span.since_ms)
        assert [node.down_s for node in (*report.nodes, report.rack)] == [0.0, 0.0]
        assert report.incidents == ()
        assert agent.stop() == 0
        stopped_s = time.monotonic()
        for how in ways:
            failing(agent, how)
        # a shorter gap is none
        until(lambda: time.monotonic() > stopped_s + 2 * JOIN_MS / 1000, "the gap is long enough to be one")
        served_for_a_window(agent)
    (incident,) = uptime_of(window(tmp_path), found.span.since_ms).incidents
    assert (incident.cause, incident.text) == ("stopped", "agent stopped by an operator")
