"""The policy file of real agents: in force at the start, changed while they run, and different on two nodes."""

import json
import os
from pathlib import Path

from scripts.seaweed import free_port
from tests.rack.harness import Agent, end, model, rack, until, write_config
from tests.rack.test_reload import cli, logged, refused, reload

GOOD = 'version = "{}"\n[[keys]]\nid = "*"\nrequests_per_minute = 1000\n'


def named(folder: Path, name: str = "policy.toml") -> str:
    return f"[policy]\npath = {json.dumps(str(folder / name))}\n"


def warnings(agent: Agent) -> str:
    return " ".join(agent.status()["warnings"])


def test_a_policy_is_put_in_force_kept_and_told(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD.format("one"))
    with rack(tmp_path, [model()], [model()], extra=named(tmp_path)) as (first, second):
        assert first.status()["policy"]["version"] == "one"
        until(lambda: [p["policy"] for p in first.status()["peers"]] == [first.status()["policy"]["digest"]], "told")
        assert "policy" not in warnings(first)
        # it changes under requests
        path.write_text(GOOD.format("two"))
        for agent in (first, second):
            until(lambda agent=agent: agent.status()["policy"]["version"] == "two", "it is in force")  # type: ignore[misc]
            assert agent.chat().status == 200
        # wrong: the last good one stays, and a reload says why
        path.write_text(GOOD.format("three") + "wrong = 1\n")
        until(lambda: "wrong: unknown key" in warnings(first), "the problem is told")
        assert first.status()["policy"]["version"] == "two"
        assert first.chat().status == 200
        assert "the policy file, keys[0].wrong: unknown key" in refused(first)
        assert len(logged(first, "policy_not_in_force")) == 1
        assert f"policy two ({first.status()['policy']['digest']})" in cli(first, "status").stdout
        shown = cli(first, "policy")
        assert shown.returncode == 0
        assert "version two (" in shown.stdout
        assert "wrong: unknown key" in shown.stdout
        # and nodes that differ are named
        path.unlink()
        other = tmp_path / "other.toml"
        other.write_text(GOOD.format("other"))
        second.config.write_text(second.config.read_text().replace("policy.toml", "other.toml"))
        assert any("policy: two (" in one and "-> other (" in one for one in reload(second)["changed"])
        until(lambda: "other nodes differ: n2" in warnings(first), "the difference is told")
        assert "other nodes differ: n1" in warnings(second)
        seen = cli(second, "policy", "explain", "--key", "web", "--model", "m").stdout
        assert "in force: version other (" in seen
        assert "1. the rack: m" in seen


def test_a_start_with_an_invalid_policy_says_everything_that_is_wrong(tmp_path: Path) -> None:
    agent = Agent(tmp_path, "n1", free_port())
    write_config(agent, [], [model()], named(tmp_path))
    (tmp_path / "policy.toml").write_text('version = ""\n[[keys]]\nid = "a b"\n')
    try:
        agent.start(wait=False)
        assert agent.process is not None
        assert agent.process.wait(120) == os.EX_CONFIG
        said = agent.output()
        assert "2 problems" in said
        assert "keys[0].id: 'a b'" in said
        assert "Traceback" not in said
    finally:
        end([agent])
