"""A real agent follows the desired state in the bucket: it fetches, swaps, loads, unloads, and reports drift."""

import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from agent.config import Model
from agent.files.model_pull import push
from agent.files.modelstore import ModelStore
from shared.batch import unseal
from shared.desired import Assignment, DesiredPeer, DesiredState, encode
from shared.keys import DESIRED
from shared.records import DesiredObserved
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.rack.harness import Agent, model, rack, until
from tests.rack.test_swaps import Streams, order

FAST = "[desired]\nfollow_s = 0.3\n[memory]\nmin_residency_s = 0\n"


def version_of(path: str, tmp_path: Path) -> str:
    """The version of a fake model with this path."""
    store = ModelStore(tmp_path / "memo", tmp_path / "nowhere")
    return store.describe(Model(name="x", engine="fake", path=path)).version


def assign(name: str, source: str, tmp_path: Path, **more: Any) -> Assignment:
    return Assignment(model=name, source=source, version=version_of(source, tmp_path), **more)


def publish(tmp_path: Path, generation: int, *assignments: Assignment, node: str = "n1") -> None:
    bucket = DirectoryStore(tmp_path / "bucket")
    bucket.put(DESIRED, encode(DesiredState(generation=generation, nodes={node: assignments})))


def desired(agent: Agent) -> Any:
    return agent.status()["desired"]


def served(agent: Agent) -> dict[str, str]:
    return {m["model"]: m["version"] for m in agent.status()["models"] if m["version"]}


def follows(agent: Agent, generation: int, state: str = "converged") -> None:
    seen: list[Any] = []

    def there() -> bool:
        seen.append(desired(agent))
        return (seen[-1]["generation"], seen[-1]["state"]) == (generation, state)

    try:
        until(there, f"generation {generation} is {state}")
    except AssertionError as error:
        raise AssertionError(f"{error}; now {seen[-1]}") from None


def test_a_node_follows_generation_by_generation_under_load(tmp_path: Path) -> None:
    models = [model(fake_step_s=0.005), model("b", fake_step_s=0.005)]
    with rack(tmp_path, models, extra=FAST) as (agent,):
        until(lambda: len(served(agent)) == 2, "what is configured is served")
        assert desired(agent)["generation"] == 0
        first = served(agent)
        with Streams(agent, 4) as streams:
            publish(tmp_path, 1, assign("m", "weights-2", tmp_path, pinned=True))
            follows(agent, 1)
            now = served(agent)
            assert list(now) == ["m"], "b is not assigned and has left"
            assert now["m"] == version_of("weights-2", tmp_path) != first["m"]
            assert agent.status()["models"][0]["pinned"]
            publish(tmp_path, 2, assign("m", "weights-3", tmp_path), assign("b", "weights-2", tmp_path))
            follows(agent, 2)
            assert served(agent)["b"] == version_of("weights-2", tmp_path)
        assert not streams.faults, streams.faults[:3]
        assert len(streams.versions) >= 2
        publish(tmp_path, 3, node="another")
        until(lambda: desired(agent)["generation"] == 3, "it looks")
        assert len(served(agent)) == 2, "a node that is not named is left alone"


def test_a_local_order_holds_until_the_next_generation_and_is_drift(tmp_path: Path) -> None:
    models = [model(), model("b", preload=False)]
    with rack(tmp_path, models, extra=FAST) as (agent,):
        publish(tmp_path, 1, assign("m", "plain-weights", tmp_path))
        follows(agent, 1)
        answer = order(agent, "swap", model="m", new="b")
        assert answer.json.get("outcome") == "flipped", answer.body
        follows(agent, 1, "drifted")
        (sentence,) = desired(agent)["drift"]
        assert sentence.endswith("(ordered on this node)")
        assert agent.stop() == 0
        agent.start().ready()
        follows(agent, 1, "drifted")
        publish(tmp_path, 2, assign("m", "plain-weights", tmp_path))
        follows(agent, 2)
        assert served(agent)["m"] == version_of("plain-weights", tmp_path)
        agent.admin("POST", "seal")
        bucket = DirectoryStore(tmp_path / "bucket")
        keys = [one.key for one in list_all(bucket, "raw/") if not one.key.endswith("/claim")]
        records = [
            record for key in keys for batch in unseal(bucket.get(key, 1 << 30).body) for record in batch.records
        ]
        found = [record for record in records if isinstance(record, DesiredObserved)]
        assert ("drifted", 1) in {(r.state, r.generation) for r in found}
        assert (found[-1].state, found[-1].generation) == ("converged", 2)


def test_a_node_keeps_serving_without_the_bucket(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], extra=FAST) as (agent,):
        publish(tmp_path, 4, assign("m", "weights-9", tmp_path))
        follows(agent, 4)
        assert agent.stop() == 0
        (tmp_path / "bucket").rename(tmp_path / "away")
        (tmp_path / "bucket").write_text("no folder")
        agent.start().ready()
        assert served(agent) == {"m": version_of("weights-9", tmp_path)}, "and did not begin with the configured one"
        until(lambda: desired(agent)["state"] == "failed", "the reason is shown")
        assert desired(agent)["reason"]
        (tmp_path / "bucket").unlink()
        (tmp_path / "away").rename(tmp_path / "bucket")
        publish(tmp_path, 3, assign("m", "plain-weights", tmp_path))
        until(lambda: "is older than 4" in desired(agent)["reason"], "an older generation is refused")
        assert served(agent) == {"m": version_of("weights-9", tmp_path)}


def test_an_assigned_model_is_fetched_from_the_bucket_and_swapped_in(tmp_path: Path, tiny_model: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        shutil.copytree(tiny_model, folder)
    (second / "generation_config.json").write_text('{"eos_token_id": 257}')
    real = [{"name": "m", "path": str(first), "plan_context_tok": 128}]
    with rack(tmp_path, real, extra=FAST) as (agent,):
        until(lambda: len(served(agent)) == 1, "the configured one is served")
        bucket = DirectoryStore(tmp_path / "bucket")
        pushed = push(second, ModelStore(tmp_path / "memo", tmp_path / "none"), bucket, "tiny")
        assert pushed.version != served(agent)["m"]
        wanted = Assignment(model="m", source="tiny", version=pushed.version)
        publish(tmp_path, 1, msgspec.structs.replace(wanted, version="0" * 16))
        until(lambda: "the bucket does not hold it" in desired(agent)["reason"], "what cannot be had is said")
        assert agent.chat(max_tokens=3).status == 200
        publish(tmp_path, 2, wanted)
        follows(agent, 2)
        assert served(agent) == {"m": pushed.version}
        assert agent.chat(max_tokens=3).headers["X-Mlxrack-Version"] == pushed.version
        assert (agent.state / "models" / "tiny" / pushed.version / "mlxrack-manifest.json").exists()


def test_nothing_is_unloaded_while_its_replacement_is_unavailable(tmp_path: Path) -> None:
    with rack(tmp_path, [model(), model("k")], extra=FAST) as (agent,):
        until(lambda: len(served(agent)) == 2, "what is configured is served")
        before = served(agent)
        publish(tmp_path, 1, Assignment(model="new", source="nothing", version="0" * 16))
        until(lambda: "the bucket does not hold it" in desired(agent)["reason"], "the first reason is the one shown")
        assert desired(agent)["state"] == "failed"
        time.sleep(1.0)
        assert served(agent) == before
        assert agent.chat().status == 200
        publish(tmp_path, 2, assign("k", "plain-weights", tmp_path))
        follows(agent, 2)
        assert list(served(agent)) == ["k"]


def test_a_model_that_moves_stays_until_it_is_served_there(tmp_path: Path) -> None:
    """Another node is assigned the model and does not have it yet."""
    with rack(tmp_path, [model(), model("k")], extra=FAST) as (agent,):
        until(lambda: len(served(agent)) == 2, "what is configured is served")
        moved = DesiredState(
            generation=1,
            nodes={"n1": (assign("k", "plain-weights", tmp_path),), "n2": (assign("m", "plain-weights", tmp_path),)},
        )
        DirectoryStore(tmp_path / "bucket").put(DESIRED, encode(moved))
        follows(agent, 1, "drifted")
        assert desired(agent)["drift"] == ["m is resident but not assigned"]
        assert agent.chat().status == 200


def test_an_evicted_model_is_not_reloaded_without_demand(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], extra=FAST) as (agent,):
        publish(tmp_path, 1, assign("m", "plain-weights", tmp_path, keep_alive_s=0.5))
        follows(agent, 1)
        until(lambda: not served(agent), "nobody asks, so it leaves")
        time.sleep(1.5)
        assert not served(agent)
        assert desired(agent)["state"] == "converged"
        assert agent.chat().status == 200, "and comes when somebody does"


def test_an_unloaded_model_stays_unloaded_after_a_restart(tmp_path: Path) -> None:
    with rack(tmp_path, [model(), model("k")], extra=FAST) as (agent,):
        publish(tmp_path, 1, assign("m", "plain-weights", tmp_path), assign("k", "plain-weights", tmp_path))
        follows(agent, 1)
        assert order(agent, "unload", model="m").status == 200
        follows(agent, 1, "drifted")
        assert agent.stop() == 0
        agent.start().ready()
        follows(agent, 1, "drifted")
        assert list(served(agent)) == ["k"]
        publish(tmp_path, 2, assign("m", "plain-weights", tmp_path), assign("k", "plain-weights", tmp_path))
        follows(agent, 2)
        assert sorted(served(agent)) == ["k", "m"]


def test_the_desired_state_names_the_nodes_of_the_rack(tmp_path: Path) -> None:
    """A third node joins and one of agent.toml leaves, without a change to any configuration."""
    with rack(tmp_path, [model()], [model()], [model("special")], extra=FAST) as (first, second, third):
        bucket = DirectoryStore(tmp_path / "bucket")

        def say(generation: int, *agents: Agent) -> None:
            peers = tuple(DesiredPeer(id=a.node, url=f"http://127.0.0.1:{a.port}") for a in agents)
            bucket.put(DESIRED, encode(DesiredState(generation=generation, peers=peers)))

        def peers_of(agent: Agent) -> dict[str, str]:
            return {p["node"]: p["state"] for p in agent.status()["peers"]}

        say(1, first, second)
        until(lambda: peers_of(first) == {"n2": "up"}, "the third is no peer any more")
        assert first.admin("GET", "limits").json["nodes"] == ["n1", "n2"], "and limits are divided between these"
        assert first.chat(model="special").status == 404
        say(2, first, second, third)
        until(lambda: peers_of(first) == {"n2": "up", "n3": "up"}, "it has joined")
        assert first.admin("GET", "limits").json["nodes"] == ["n1", "n2", "n3"]
        assert first.chat(model="special").headers["X-Mlxrack-Node"] == "n3"
        evil = (DesiredPeer(id="n2", url="http://evil.example"), DesiredPeer(id="n9", url="http://127.0.0.1:9"))
        bucket.put(DESIRED, encode(DesiredState(generation=3, peers=evil)))
        until(lambda: peers_of(first) == {"n2": "up"}, "what is not allowed is not followed")
        assert [line.partition(":")[0] for line in desired(first)["drift"]] == [
            "peer n2 at evil.example is not followed",
            "peer n9 at 127.0.0.1 is not followed",
        ]
        assert desired(first)["state"] == "drifted"
        bucket.put(DESIRED, encode(DesiredState(generation=4)))
        until(lambda: set(peers_of(second)) == {"n1", "n3"}, "the configuration's again")


def test_a_peer_that_the_desired_state_calls_by_plain_http_is_a_warning(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], [model()], extra=FAST, start=False) as (first, _):
        text = first.config.read_text().replace("[listen]\n", "[listen]\ninsecure_http = true\n")
        first.config.write_text(text.replace("[peers]\n", '[peers]\nallowed = ["192.0.2.0/24"]\n'))
        first.start().ready()
        assert first.status()["warnings"] == []
        peers = (DesiredPeer(id="n7", url="http://192.0.2.7:1"),)
        DirectoryStore(tmp_path / "bucket").put(DESIRED, encode(DesiredState(generation=1, peers=peers)))
        until(lambda: [p["node"] for p in first.status()["peers"]] == ["n7"], "it is followed")
        (warning,) = first.status()["warnings"]
        assert warning.startswith("requests to n7 use plain HTTP")
        assert "plain_http" in (first.state / "logs/agent.jsonl").read_text()
