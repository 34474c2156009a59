"""State, configuration, desired state and bucket that version 0.1 left, under this tree.

``tests/fixtures/rack-0.1.tar.gz`` was written by the agent and the aggregator of 0.1: a node that follows generation 1
with one model unloaded by an operator, killed with four batches in its spool; two uploaded segments and the tables of
one rollup. It is never written again: what a later version cannot read fails here.
"""

import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.telemetry.sensors.host import hardware_id
from aggregator import load
from aggregator.calendar import between
from scripts.seaweed import free_port
from shared.batch import unseal
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.rack.harness import Agent, until

FIXTURE = Path(__file__).parents[1] / "fixtures/rack-0.1.tar.gz"
SERVED = "1b8613376e5b92b1"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    one = Agent(tmp_path, "n1", free_port())
    (tmp_path / "state").rename(one.state)
    (tmp_path / "agent.toml").rename(one.config)
    words = {"@FOLDER@/state": str(one.state), "@FOLDER@": str(tmp_path), "@PORT@": str(one.port)}
    for path in (one.config, tmp_path / "aggregator.toml", one.state / "spool/identity.json"):
        text = path.read_text()
        for word, value in {**words, "@HARDWARE@": hardware_id()}.items():
            text = text.replace(word, value)
        path.write_text(text)
    yield one
    if one.process is not None and one.process.poll() is None:
        one.kill()


def aggregate(folder: Path, *verb: str) -> None:
    script = str(Path(sys.executable).with_name("mlxrack-aggregator"))
    command = [script, *verb, "--config", str(folder / "aggregator.toml")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def sealed_since(store: DirectoryStore) -> bool:
    """Whether a batch of the new epoch is in the bucket. Batches are uploaded in order, so those of 0.1 are, too."""
    return any("/e00000002/" in item.key for item in list_all(store, "raw/"))


def test_an_agent_continues_where_0_1_was_killed(agent: Agent, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    before = {item.key for item in list_all(store, "raw/")}
    agent.start()
    agent.ready()
    status = agent.status()
    models = {m["model"]: m for m in status["models"]}
    assert (models["m"]["version"], models["m"]["pinned"]) == (SERVED, True)
    assert models["b"]["state"] == "cold", "an operator unloaded it"
    assert (status["epoch"], status["desired"]["generation"], status["desired"]["state"]) == (2, 1, "drifted")
    assert agent.chat().status == 200
    assert agent.admin("POST", "seal").status == 200
    until(lambda: sealed_since(store), "everything is uploaded")
    assert agent.stop() == 0
    batches = [
        batch
        for item in list_all(store, "raw/")
        if item.key.endswith(".mpz")
        for batch in unseal(store.get(item.key, 1 << 30).body)
    ]
    named = sorted((batch.epoch, batch.seq) for batch in batches)
    assert [seq for epoch, seq in named if epoch == 1] == list(range(1, 9)), "each once, in order"
    assert named[-1][0] == 2
    assert before < {item.key for item in list_all(store, "raw/")}
    assert msgspec.json.decode((agent.state / "spool/identity.json").read_bytes())["clean"] is True


def test_an_aggregator_reads_the_tables_and_adds_to_them(agent: Agent, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    window = load.window(store, between("2026-11-26", "2026-11-26", "UTC"))
    old = sum(s.requests for s in window.served)
    assert old == 8, "as 0.1 counted them"
    agent.start()
    assert agent.admin("POST", "seal").status == 200
    until(lambda: sealed_since(store), "everything is uploaded")
    agent.stop()
    aggregate(tmp_path, "rollup")
    aggregate(tmp_path, "weekly", "--week", "2026-W48")
    window = load.window(store, between("2026-11-26", "2026-11-26", "UTC"))
    assert sum(s.requests for s in window.served) == old + 3, "those that waited in the spool"
    assert list_all(store, "report/v1/weekly/2026-W48/")
