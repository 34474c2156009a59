"""Reloads of models that requests are on their way to, that an operator has ordered, that the desired state assigns."""

import re
import shutil
import struct
from pathlib import Path

from shared.desired import DesiredPeer, DesiredState, encode
from shared.keys import DESIRED
from shared.store_dir import DirectoryStore
from tests.rack.harness import Agent, model, rack, until
from tests.rack.steady import Steady
from tests.rack.test_desired import FAST, assign, follows, publish, served, version_of
from tests.rack.test_orders import standing
from tests.rack.test_reload import WIDE, changed, cli, edit, keys_of, refused, reload, secret_of, secret_rack, settled
from tests.rack.test_swaps import order


def names(agent: Agent) -> dict[str, str]:
    """The version in memory, by name."""
    return {name: one["version"] for one in agent.status()["models"] for name in one["names"]}


def without(agent: Agent, name: str) -> str:
    """agent.toml without a model; as it was."""
    before = agent.config.read_text()
    agent.config.write_text(re.sub(rf'\[\[models\]\]\nname = "{name}"\n([^\[].*\n)*', "", before))
    assert agent.config.read_text() != before
    return before


def told(agent: Agent) -> list[str]:
    notes = [note for note in reload(agent)["notes"] if note.startswith("models: ")]
    assert settled(agent) == {}
    return notes


def test_a_model_that_leaves_one_node_is_asked_for_at_the_others(tmp_path: Path) -> None:
    """For a heartbeat its peers still send requests, and some wait there already."""
    with (
        rack(tmp_path, [model()], [model()], [], extra=WIDE) as agents,
        Steady([agent.port for agent in agents], rate=40) as clients,
    ):
        for agent in (agents[0], agents[1]) * 2:
            before = without(agent, "m")
            assert changed(agent) == ["models: - m"]
            clients.more(10)
            agent.config.write_text(before)
            assert changed(agent) == ["models: + m"]
            assert settled(agent) == {}
            until(lambda one=agent: all(_offers(other, one) for other in agents if other is not one), "peers see it")  # type: ignore[misc]
    assert clients.faults == []


def _offers(agent: Agent, other: Agent) -> bool:
    (peer,) = [one for one in agent.status()["peers"] if one["node"] == other.node]
    return "m" in str(peer["models"])


def test_an_order_keeps_what_was_ordered_and_nothing_else(tmp_path: Path) -> None:
    with rack(tmp_path, [model(), model("u"), model("k")], extra=FAST) as (agent,):
        until(lambda: len(served(agent)) == 3, "all are there")
        assert order(agent, "pin", model="m", pinned="yes").status == 200
        assert order(agent, "unload", model="u").status == 200
        edit(agent, "weights of m", "other weights of m")
        edit(agent, "weights of u", "other weights of u")
        assert told(agent) == [f"models: what an operator ordered for {name} stays" for name in "mu"]
        new = {name: version_of(f"other weights of {name}", tmp_path) for name in "mu"}
        now = names(agent)
        assert (now["m"], now["u"]) == (new["m"], ""), "files were not ordered"
        assert [one["pinned"] for one in agent.status()["models"]] == [True, False, False]
        assert agent.chat(model="u").headers["X-Mlxrack-Version"] == new["u"]
        edit(agent, 'path = "other weights of m"\n', "")
        edit(agent, 'name = "m"\nengine = "fake"', f'name = "m"\npath = "{tmp_path}/none"')
        assert f"model m: no such folder: {tmp_path}/none" in refused(agent), "it would be loaded, so it is looked for"


def test_a_model_with_an_order_leaves_and_returns_with_its_table(tmp_path: Path) -> None:
    with rack(tmp_path, [model(), model("k")], extra=FAST) as (agent,):
        until(lambda: len(served(agent)) == 2, "all are there")
        assert order(agent, "pin", model="m", pinned="yes").status == 200
        before = without(agent, "m")
        assert told(agent) == ["models: m is not configured any more; what was ordered for it waits until it is"]
        assert list(names(agent)) == ["k"]
        assert agent.chat().status == 404
        assert "not configured any more" in standing(agent)["m"]["note"]
        agent.config.write_text(before)
        assert told(agent) == ["models: what an operator ordered for m stays"]
        assert {one["model"]: one["pinned"] for one in agent.status()["models"]} == {"m": True, "k": False}
        assert agent.chat().status == 200


def test_of_a_swap_either_table_may_leave_and_return(tmp_path: Path) -> None:
    own, other = (version_of(f"weights of {name}", tmp_path) for name in "fg")
    with rack(tmp_path, [model("f"), model("g", preload=False)], extra=FAST) as (agent,):
        assert order(agent, "swap", model="f", new="g").status == 200
        before = without(agent, "g")
        assert told(agent) == ["models: what an operator ordered for g stays"]
        assert names(agent) == {"f": other, "g": other}
        agent.config.write_text(before)
        edit(agent, "preload = false", "preload = false\nrows = 3")
        told(agent)
        assert names(agent) == {"f": other, "g": other}
        without(agent, "f")
        assert told(agent) == ["models: f is not configured any more; what was ordered for it waits until it is"]
        assert names(agent) == {"g": other}
        assert agent.chat(model="f").status == 404
        agent.config.write_text(before)
        (said,) = (note for note in told(agent) if " f " in note)
        assert "own files until the next start" in said
        assert names(agent) == {"f": own, "g": other}
        assert "serves f now, and g from the next start on" in str(agent.status()["models"])
        assert agent.stop() == 0
        agent.start().ready()
        assert names(agent) == {"f": other, "g": other}


def test_what_the_desired_state_does_not_say_is_as_agent_toml_says(tmp_path: Path) -> None:
    with rack(tmp_path, [model(), model("b", preload=False)], extra=FAST) as (agent,):
        publish(tmp_path, 1, assign("m", "weights-2", tmp_path, rows=2))
        follows(agent, 1)
        (pid,) = [one["pid"] for one in agent.status()["models"] if one["model"] == "m"]
        edit(agent, 'path = "weights of m"\n', 'path = "weights-9"\nrows = 3\n')
        assert told(agent) == ["models: what the desired state says of m stays"]
        assert agent.status()["models"][0]["pid"] == pid, "all of that is said there"
        edit(agent, "rows = 3\n", "rows = 3\nmax_tokens = 7\nkeep_alive_s = 900\n")
        told(agent)
        now = agent.status()["models"][0]
        assert now["pid"] != pid
        assert (now["version"], now["keep_alive_s"]) == (version_of("weights-2", tmp_path), 900)
        assert agent.stop() == 0
        agent.start().ready()
        edit(agent, "keep_alive_s = 900", "keep_alive_s = 901")
        told(agent)
        assert agent.status()["models"][0]["keep_alive_s"] == 901
        assert order(agent, "swap", model="m", new="b").status == order(agent, "swap", model="m", new="m").status == 200
        assert names(agent)["m"] == now["version"], "what is assigned is its own, not what agent.toml has"


def test_one_that_failed_and_has_vanished_does_not_keep_a_key_in_force(tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "none"}')
    header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with rack(tmp_path, [model()], extra=keys_of("one", "two")) as (agent,):
        before = agent.config.read_text()
        agent.config.write_text(f'{before}[[models]]\nname = "torn"\npath = "{folder}"\nneed_bytes = 9\n')
        assert changed(agent) == ["models: + torn"]
        assert "torn" in settled(agent)
        shutil.rmtree(folder)
        edit(agent, keys_of("one", "two"), keys_of("two"))
        assert changed(agent) == ["keys: client has another key", "models: torn is tried again"]
        assert agent.chat(headers={"Authorization": "Bearer one"}).status == 401
        assert "no such folder" in settled(agent)["torn"]
        edit(agent, f'path = "{folder}"', f'path = "{folder} 2"')
        assert f"no such folder: {folder} 2" in refused(agent), "what is changed has to be there"


def test_a_rotation_that_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    with secret_rack(tmp_path, running=1) as (agent, *_):
        good, secret = agent.config.read_text(), secret_of(agent)
        edit(agent, "sample_s = 1", "sample_s = 2")
        ended = cli(agent, "secrets", "rotate")
        assert ended.returncode != 0
        assert "telemetry.sample_s needs a restart" in ended.stderr
        agent.config.write_text(good)
        same = secret.with_name("copied.secret")
        shutil.copy(secret, same)
        for given in (secret, same):
            ended = cli(agent, "secrets", "rotate", "--with", str(given))
            assert ended.returncode == 1
            assert f"{given} holds the secret that this node has already" in ended.stderr
        assert agent.config.read_text() == good
        assert sorted(secret.parent.iterdir()) == sorted([secret, same])


def test_peers_that_the_desired_state_names_are_said_to_be_its_own(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], [model()], [], extra=FAST) as agents:
        table = f'[[peers.nodes]]\nid = "n3"\nurl = "http://127.0.0.1:{agents[2].port}"\n'
        edit(agents[0], table, "")
        said = reload(agents[0])
        assert said["changed"] == ["peers.nodes: - n3"]
        assert not [note for note in said["notes"] if note.startswith("peers.nodes")]
        peers = (DesiredPeer(id="n2", url=f"http://127.0.0.1:{agents[1].port}"),)
        DirectoryStore(tmp_path / "bucket").put(DESIRED, encode(DesiredState(generation=1, nodes={}, peers=peers)))
        until(lambda: agents[0].status()["desired"]["generation"] == 1, "it looks")
        edit(agents[0], "[[models]]", table + "[[models]]")
        said = reload(agents[0])
        assert said["changed"] == ["peers.nodes: + n3"]
        assert "peers.nodes: the desired state names the peers" in str(said["notes"])
        assert [peer["node"] for peer in agents[0].status()["peers"]] == ["n2"]
