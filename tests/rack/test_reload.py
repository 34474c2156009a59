"""Reloads of real agents under requests: what changes is in force, and none fails; what is wrong changes nothing.

MLXRACK_DRILL_S is how many seconds each drill lasts, with 40 requests a second; without it each is done once, with few.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.config import hash_key
from agent.operator.cli_secrets import with_both, without_old
from scripts.seaweed import free_port
from tests.rack.harness import SCRIPT, Agent, end, model, rack, until, write_config
from tests.rack.steady import Steady
from tests.rack.tls_rack import Authority, tls_rack

DRILL_S = float(os.environ.get("MLXRACK_DRILL_S", "0"))
RATE, SOME = (40.0, 80) if DRILL_S else (20.0, 5)
"""Requests a second, and between two steps."""
WIDE = "[limits]\nin_flight_per_model = 2000\nin_flight_per_key = 2000\n"


def edit(agent: Agent, old: str, new: str) -> None:
    text = agent.config.read_text()
    assert old in text, old
    agent.config.write_text(text.replace(old, new))


def reload(agent: Agent) -> dict[str, Any]:
    """What changed."""
    answer = agent.admin("POST", "reload")
    assert answer.status == 200, answer.body
    return answer.json  # type: ignore[no-any-return]


def changed(agent: Agent) -> list[str]:
    return reload(agent)["changed"]  # type: ignore[no-any-return]


def refused(agent: Agent) -> str:
    answer = agent.admin("POST", "reload")
    assert answer.status == 409, answer.body
    return str(answer.json["error"]["message"])


def settled(agent: Agent) -> dict[str, str]:
    """The models that could not be changed, when none is being changed any more."""
    until(lambda: "changing" not in agent.status()["reload"]["models"].values(), "no model is being changed")
    return agent.status()["reload"]["models"]  # type: ignore[no-any-return]


def cli(agent: Agent, *verb: str) -> "subprocess.CompletedProcess[str]":
    command = [SCRIPT, *verb, "--config", str(agent.config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def logged(agent: Agent, event: str) -> list[dict[str, Any]]:
    lines = (agent.state / "logs/agent.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def all_up(agents: Sequence[Agent]) -> bool:
    return all(peer["state"] == "up" for agent in agents for peer in agent.status()["peers"])


def whole(agents: Sequence[Agent]) -> None:
    """Wait until every node sees every other; on a busy machine a heartbeat may be late."""
    until(lambda: all_up(agents), "the rack is whole")


def strangers(agents: Sequence[Agent]) -> list[str]:
    """Whenever a node took another for one that is not of its rack; one that was late or down is none."""
    reasons = [line["reason"] for agent in agents for line in logged(agent, "peer_problem")]
    return [reason for reason in reasons if re.search("secret|signature|signed|certificate|rejected", reason)]


def rounds() -> Iterator[int]:
    """At least one, and as long as a drill lasts."""
    began = time.monotonic()
    for number in itertools.count():
        yield number
        if time.monotonic() - began >= DRILL_S:
            return


# ---- what is right ----


def keys_of(*keys: str) -> str:
    return "".join(f'[[keys]]\nid = "client"\nsha256 = "{hash_key(key)}"\n' for key in keys)


def test_keys_limits_peers_and_models_change_without_a_lost_request(tmp_path: Path) -> None:
    first, second = keys_of("key 0"), keys_of("key 0", "key 1")
    models = [model(), model("spare", preload=False)]
    with rack(tmp_path, models, models, [], extra=WIDE + first) as agents:
        with Steady([a.port for a in agents], rate=RATE, key="key 0") as clients:
            for number in rounds():
                _a_key_is_replaced(agents, clients, f"key {number}", f"key {number + 1}")
                for agent in agents:
                    edit(agent, "in_flight_per_model = 2000", "in_flight_per_model = 1999\nrequest_s = 500")
                    assert changed(agent) == ["limits.in_flight_per_model 2000 -> 1999", "limits.request_s 600 -> 500"]
                    edit(agent, "in_flight_per_model = 1999\nrequest_s = 500", "in_flight_per_model = 2000")
                    reload(agent)
                _a_peer_leaves_and_comes_back(agents, clients)
                for agent in agents[:2]:
                    _models_change(agent, clients)
        assert clients.faults == []
        assert clients.answered > 3 * SOME
        assert second.count("sha256") == 2
        for agent in agents:
            assert agent.chat(headers={"Authorization": "Bearer key 0"}).status == 401, "it was taken away"
            assert agent.status()["reload"]["outcome"] == "changed"


def _a_key_is_replaced(agents: Sequence[Agent], clients: Steady, old: str, new: str) -> None:
    for agent in agents:
        edit(agent, keys_of(old), keys_of(old, new))
        assert changed(agent) == ["keys: client has 2 keys"]
    clients.more(SOME)
    clients.key = new
    clients.more(SOME + 2 * len(agents))  # those that were begun with the old one end
    for agent in agents:
        edit(agent, keys_of(old, new), keys_of(new))
        assert changed(agent) == ["keys: client has another key"]
    clients.more(SOME)


def _a_peer_leaves_and_comes_back(agents: Sequence[Agent], clients: Steady) -> None:
    """The gateway without models forgets one of the two that have one."""
    gateway, gone = agents[2], agents[1]
    before = gateway.config.read_text()
    table = f'[[peers.nodes]]\nid = "{gone.node}"\nurl = "http://127.0.0.1:{gone.port}"\n'
    edit(gateway, table, "")
    assert changed(gateway) == [f"peers.nodes: - {gone.node}"]
    assert [peer["node"] for peer in gateway.status()["peers"]] == [agents[0].node]
    clients.more(SOME)
    gateway.config.write_text(before)
    assert changed(gateway) == [f"peers.nodes: + {gone.node}"]
    whole([gateway])
    clients.more(SOME)


def _models_change(agent: Agent, clients: Steady) -> None:
    """Settings of the one that is asked for, another that comes, serves and goes."""
    before = agent.config.read_text()
    edit(agent, 'path = "weights of m"\n', 'path = "other weights of m"\nrows = 3\n')
    edit(agent, 'name = "spare"', 'name = "extra"')
    edit(agent, 'path = "weights of spare"\nneed_bytes = 10\npreload = false', 'path = "x"\nneed_bytes = 10')
    assert changed(agent) == ["models: + extra, - spare, m path, rows"]
    assert settled(agent) == {}
    status = {name: one for one in agent.status()["models"] for name in one["names"]}
    assert status["m"]["state"] == status["extra"]["state"] == "ready"
    assert "spare" not in status
    clients.more(SOME)
    agent.config.write_text(before)
    reload(agent)
    assert settled(agent) == {}
    clients.more(SOME)


# ---- the rack's secret ----


@contextmanager
def secret_rack(folder: Path, running: int = 3) -> Iterator[list[Agent]]:
    """Three agents with a secret in a file each, of which so many run; only the first two have the model."""
    agents = [Agent(folder, f"n{n}", free_port()) for n in (1, 2, 3)]
    for agent, models in zip(agents, ([model()], [model()], []), strict=True):
        secret = folder / f"{agent.node}/rack.secret"
        secret.parent.mkdir()
        secret.write_text("the first secret of the rack, 81c0e5\n")
        secret.chmod(0o600)
        write_config(agent, [a for a in agents if a is not agent], models, WIDE)
        edit(agent, "env:MLXRACK_TEST_SECRET", f"file:{secret}")
    try:
        for agent in agents[:running]:
            agent.start()
        for agent in agents[:running][:2]:
            agent.ready()
        if running == len(agents):
            whole(agents)
        yield agents
    finally:
        end(agents)


def secret_of(agent: Agent) -> Path:
    found = re.search(r'^secret = "file:(.*)"', agent.config.read_text(), re.MULTILINE)
    assert found is not None
    return Path(found[1])


def given(agent: Agent, value: str, number: int) -> None:
    """A node accepts a new secret beside its own."""
    old = secret_of(agent)
    new = old.with_name(f"rack.secret-{number}")
    new.write_text(value)
    new.chmod(0o600)
    agent.config.write_text(with_both(agent.config.read_text(), f"file:{old}", f"file:{new}"))
    assert changed(agent) == ["peers.secret: another reference", "peers.old_secret: set"]


def finished(agent: Agent) -> None:
    found = re.search(r'^old_secret = "(.*)"', agent.config.read_text(), re.MULTILINE)
    assert found is not None
    agent.config.write_text(without_old(agent.config.read_text(), found[1]))
    assert changed(agent) == ["peers.old_secret: removed"]


def needing(agent: Agent) -> list[str]:
    return [peer["node"] for peer in agent.status()["peers"] if peer["needs_old_secret"]]


def restarted(agent: Agent, agents: Sequence[Agent], clients: Steady) -> None:
    """As after a loss of power, while the other one serves."""
    agent.stop()
    clients.more(SOME)
    agent.start().ready()
    whole(agents)


def test_no_order_of_nodes_splits_the_rack_while_its_secret_is_replaced(tmp_path: Path) -> None:
    orders = list(itertools.permutations(range(3)))
    with secret_rack(tmp_path) as agents:
        gateway = agents[2]
        with Steady([gateway.port], rate=RATE) as clients:  # each of its requests goes to a peer
            for number in rounds():
                first, second = orders[number % 6], orders[(number // 6 + 3 * number + 4) % 6]
                done = list[Agent]()
                for agent in (agents[n] for n in first):
                    given(agent, f"secret {number} of the rack, 5ba1c07e62\n", number + 2)
                    done.append(agent)
                    clients.more(SOME)
                    whole(agents)
                    left = sorted(one.node for one in agents if one not in done)
                    until(lambda one=agent, left=left: needing(one) == left, "it knows who needs the old one")  # type: ignore[misc]
                    if len(done) == 1:
                        restarted(agents[number % 2], agents, clients)  # with one secret, or with two
                for agent in (agents[n] for n in second):
                    until(lambda one=agent: needing(one) == [], "none needs the old one")  # type: ignore[misc]
                    finished(agent)
                    clients.more(SOME)
                    whole(agents)
                    if agent is agents[second[1]]:
                        restarted(agents[(number + 1) % 2], agents, clients)
        assert clients.faults == []
        assert clients.answered >= 6 * SOME
        assert strangers(agents) == []


def test_the_command_walks_through_a_rotation_and_refuses_to_end_it_early(tmp_path: Path) -> None:
    with secret_rack(tmp_path) as agents:
        first, *others = agents
        begun = cli(first, "secrets", "rotate")
        assert begun.returncode == 0, begun.stderr
        new = secret_of(first)
        assert new.stat().st_mode & 0o777 == 0o600
        assert f"secrets rotate --with {new}" in begun.stdout
        assert new.read_text().strip() not in begun.stdout
        until(lambda: needing(first) == ["n2", "n3"], "it knows who needs the old one")
        refusal = cli(first, "secrets", "rotate", "--finish")
        assert refusal.returncode == 1
        assert "n2, n3 needs the old secret" in refusal.stderr
        assert "needs the old rack secret" in cli(first, "status").stdout
        for other in others:
            there = secret_of(other).with_name(new.name)
            shutil.copy(new, there)
            assert cli(other, "secrets", "rotate", "--with", str(there)).returncode == 0
        until(lambda: needing(first) == [], "all have it")
        shown = cli(first, "secrets")
        assert "accepts the new secret and the old one" in shown.stdout
        assert shown.stdout.count("the newest") == 2
        ended = cli(first, "secrets", "rotate", "--finish")
        assert ended.returncode == 0, ended.stderr
        for other in others:
            until(lambda one=other: needing(one) == [], "all have it")  # type: ignore[misc]
            finished(other)
        whole(agents)
        assert all(agent.status()["rack_secrets"] == 1 for agent in agents)
        others[0].kill()
        given(first, "secret 3 of the rack, 5ba1c07e62\n", 3)
        silent = cli(first, "secrets", "rotate", "--finish")
        assert silent.returncode == 1
        assert "n2" in silent.stderr, "one that is down may need it when it is back"


# ---- certificates ----


def test_certificates_and_the_ca_are_replaced_without_a_lost_request(tmp_path: Path) -> None:
    with tls_rack(tmp_path, [model()], [model()], [], extra=WIDE) as (old, agents):
        new = Authority(tmp_path / "new ca")
        bundle = tmp_path / "both.pem"
        bundle.write_bytes(old.ca.read_bytes() + new.ca.read_bytes())
        trusts = old.clients()
        trusts.load_verify_locations(new.ca)
        for agent in agents:
            agent.tls = trusts
        with Steady([a.port for a in agents], rate=RATE, tls=trusts) as clients:
            for agent in agents:
                edit(agent, str(old.ca), str(bundle))
                assert changed(agent) == [f"tls.ca {old.ca} -> {bundle}"]
                clients.more(SOME)
                whole(agents)
            for agent in reversed(agents):
                files, by_old = new.issue(agent.node), tmp_path / "tls"
                edit(agent, str(by_old / f"{agent.node}.pem"), files.certificate)
                edit(agent, str(by_old / f"{agent.node}.key"), files.key)
                assert len(changed(agent)) == 2
                clients.more(SOME)
                whole(agents)
            for agent in agents:
                edit(agent, str(bundle), str(new.ca))
                assert changed(agent) == [f"tls.ca {bundle} -> {new.ca}"]
                clients.more(SOME)
                whole(agents)
            for agent in agents:  # the same names, other files
                new.issue(agent.node)
                assert changed(agent) in (["tls: other certificates"], [])  # else it has seen it by itself
                clients.more(SOME)
        assert clients.faults == []
        whole(agents)
        assert strangers(agents) == []


# ---- what is wrong ----


def test_whatever_is_wrong_is_named_and_changes_nothing(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    with secret_rack(tmp_path, running=1) as (agent, *_):
        good, before = agent.config.read_text(), agent.status()
        loose = tmp_path / "loose.secret"
        loose.write_text("a secret that others can read, 8eb13f\n")
        loose.chmod(0o644)
        short = tmp_path / "short.secret"
        short.write_text("short\n")
        short.chmod(0o600)
        secret = f"file:{secret_of(agent)}"
        wrong = [
            ("[node", "[[node", "line 1|invalid|expected"),
            ("[limits]", "[limitz]", "limitz"),
            (secret, f"file:{tmp_path}/none", "none"),
            (secret, f"file:{loose}", "loose.secret"),
            (secret, f"file:{short}", "peers.secret"),
            (secret, "env:MLXRACK_NOT_SET", "MLXRACK_NOT_SET"),
            ('engine = "fake"\n', "", "m"),
            (f"port = {agent.port}", f"port = {agent.port + 1}", r"listen\.port needs a restart"),
            ("sample_s = 1", "sample_s = 2", r"telemetry\.sample_s needs a restart"),
            ('rack = "r"', 'rack = "other"', r"node\.rack needs a restart"),
        ]
        for old, new, words in wrong:
            edit(agent, old, new)
            edit(agent, "in_flight_per_key = 2000", "in_flight_per_key = 7")  # which is right, and not in force
            said = refused(agent)
            assert re.search(words, said), (new, said)
            assert "nothing was changed" in said
            assert "8eb13f" not in said
            assert agent.status()["reload"]["outcome"] == "refused"
            assert logged(agent, "config_not_reloaded")[-1]["reason"] in said
            agent.config.write_text(good)
        both = good.replace("[limits]", "[limitz]").replace('engine = "fake"', 'engine = "feke"')
        agent.config.write_text(both)
        assert refused(agent).startswith("2 problems"), "all at once"
        ended = cli(agent, "reload")
        assert ended.returncode == 78, "the file cannot be read by the command either"
        agent.config.write_text(good.replace("sample_s = 1", "sample_s = 2"))
        ended = cli(agent, "reload", "--json")
        assert ended.returncode == 78
        assert "telemetry.sample_s needs a restart; nothing was changed" in ended.stderr
        assert any("not in force" in one for one in agent.status()["warnings"])
        agent.config.write_text(good)
        assert json.loads(cli(agent, "reload", "--json").stdout) == {"changed": [], "notes": []}
        after = agent.status()
        assert after["warnings"] == before["warnings"]
        assert [one["pid"] for one in after["models"]] == [one["pid"] for one in before["models"]]
        assert authority.ca.exists()


def test_a_certificate_of_another_key_or_node_is_refused_and_the_ones_before_serve(tmp_path: Path) -> None:
    with tls_rack(tmp_path, [model()], []) as (authority, (agent, other)):
        good, mine = agent.config.read_text(), tmp_path / "tls/n1.pem"
        foreign = Authority(tmp_path / "foreign").issue("n1")
        for path, words in (
            (authority.issue("n9").certificate, "key"),
            (foreign.certificate, "key"),
            (str(tmp_path / "none.pem"), "none.pem"),
            (str(agent.config), "n1.toml"),
        ):
            edit(agent, str(mine), path)
            assert re.search(words, refused(agent))
            agent.config.write_text(good)
        assert changed(agent) == []
        alone = re.sub(r"\[peers\]\n(.*\n)*?(?=\[\[models)", "", good)
        agent.config.write_text(alone)
        assert changed(agent) == ["peers.secret: removed", "peers.nodes: - n2"]
        assert agent.status()["peers"] == []
        agent.config.write_text(good)
        assert changed(agent) == ["peers.secret: set", "peers.nodes: + n2"]
        whole([agent, other])
        assert agent.chat().status == other.chat().status == 200


def test_a_model_that_cannot_be_loaded_is_told_and_tried_again(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], extra="[memory]\nbudget_bytes = 4_000_000_000\n") as (agent,):
        edit(agent, "need_bytes = 10", "need_bytes = 5_000_000_000")
        assert changed(agent) == ["models: m need_bytes"]
        assert "memory budget" in settled(agent)["m"]
        assert agent.chat().status == 200, "it is served as before"
        assert any("model m is not as in agent.toml" in one for one in agent.status()["warnings"])
        ended = cli(agent, "reload", "--wait")
        assert ended.returncode == 1
        assert "changed models: m is tried again" in ended.stdout
        assert "could not be changed" in ended.stdout
        edit(agent, "budget_bytes = 4_000_000_000", "budget_bytes = 90_000_000_000")
        assert changed(agent) == ["memory.budget_bytes 4000000000 -> 90000000000", "models: m is tried again"]
        assert settled(agent) == {}
        assert agent.chat().status == 200


# ---- at any time ----


def test_storms_of_signals_and_requests_are_a_few_reloads(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], extra=WIDE) as (agent,):
        assert agent.process is not None
        with Steady([agent.port], rate=RATE) as clients:
            threads = [
                threading.Thread(target=lambda: answers.append(agent.admin("POST", "reload").status)) for _ in range(10)
            ]
            answers = list[int]()
            for number in range(50):
                edit(agent, f"rows = {number}\n" if number else "need_bytes = 10\n", f"rows = {number + 1}\n")
                agent.process.send_signal(signal.SIGHUP)
                if number % 5 == 0:
                    threads[number // 5].start()
                time.sleep(0.01)
            for thread in threads:
                thread.join()
            until(lambda: _rows(agent) == 50, "the newest is in force")
            assert settled(agent) == {}
            clients.more(SOME)
        assert set(answers) == {200}
        assert clients.faults == []
        assert agent.alive()
        assert 0 < len(logged(agent, "config_reloaded")) < 60


def _status_of_reload(agent: Agent) -> int:
    return agent.admin("POST", "reload").status


def _rows(agent: Agent) -> int:
    changes = " ".join(one for line in logged(agent, "config_reloaded") for one in line["changed"])
    reload(agent)
    return 50 if "rows" in changes and settled(agent) == {} and changed(agent) == [] else 0


def test_reloads_at_a_start_during_a_swap_and_at_the_end_do_no_harm(tmp_path: Path) -> None:
    slow: dict[str, Any] = {"fake_load_s": 0.5, "fake_step_s": 0.02}
    with rack(tmp_path, [model(**slow), model("n", preload=False, **slow)], start=False) as (agent,):
        agent.start(wait=False)
        assert agent.process is not None
        until(lambda: _takes_hangups(agent.process.pid), "its first import")  # type: ignore[union-attr]
        for _ in range(20):
            agent.process.send_signal(signal.SIGHUP)
            time.sleep(0.05)
        agent.ready()
        until(lambda: logged(agent, "config_reloaded"), "the signal is not lost")
        swapping = threading.Thread(target=lambda: agent.admin("POST", "swap", model="m", new="n"))
        swapping.start()
        until(lambda: any(not one["outcome"] for one in agent.status()["swaps"]), "a swap has begun")
        edit(agent, "need_bytes = 10\n", "need_bytes = 12\n")
        reload(agent)
        # a reload of the last signal may have found it before
        assert [one for line in logged(agent, "config_reloaded") for one in line["changed"]]
        swapping.join()
        assert settled(agent) == {}
        until(lambda: agent.chat().status == 200, "it serves")
        asking = threading.Thread(target=lambda: last.append(agent.chat(max_tokens=200).status))
        last = list[int]()
        asking.start()
        until(lambda: agent.status()["in_flight"], "a request is in flight")
        agent.process.send_signal(signal.SIGTERM)
        until(lambda: agent.admin("POST", "reload").status in (0, 503), "it stops")
        for _ in range(10):
            agent.process.send_signal(signal.SIGHUP)
        asking.join()
        assert last == [200]
        assert agent.process.wait(timeout=120) == 0


def _takes_hangups(pid: int) -> bool:
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) & 1 << (signal.SIGHUP - 1))


@pytest.mark.parametrize("order", ["swap", "unload", "pin"])
def test_what_an_operator_ordered_stays_and_is_said(tmp_path: Path, order: str) -> None:
    with rack(tmp_path, [model(), model("n", preload=False)]) as (agent,):
        assert agent.admin("POST", order, model="m", **({"new": "n"} if order == "swap" else {})).status == 200
        before = {name: one for one in agent.status()["models"] for name in one["names"]}["m"]
        edit(agent, 'path = "weights of m"', 'path = "new weights of m"')
        said = reload(agent)
        assert said["notes"] == ["models: what an operator ordered for m stays"]
        assert settled(agent) == {}
        after = {name: one for one in agent.status()["models"] for name in one["names"]}["m"]
        assert (after["state"], after["pinned"]) == (before["state"], before["pinned"])
        assert (after["version"] != before["version"]) is (order == "pin"), "a pin is no order about files"
