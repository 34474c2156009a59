"""The restore drill: a bucket with real telemetry is copied, lost and brought back, with kills in between."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from scripts.seaweed import SeaweedFS
from shared import keys
from shared.batch import unseal
from shared.desired import Assignment
from shared.records import Served
from shared.store import ObjectStore, list_all
from shared.store_dir import DirectoryStore
from tests.made_rack import HOUR_MS, MadeModel, MadeRack, batches
from tests.rack.harness import Agent, model, rack, until
from tests.rack.test_aggregator_kills import put
from tests.rack.test_desired import FAST, follows, served, version_of
from tests.rack.test_desired import publish as publish_desired

FULL = bool(os.environ.get("MLXRACK_DRILL"))
DAYS, KILLS, REQUESTS = (28, 10, 400) if FULL else (3, 1, 12)
SINCE_MS = 1_793_577_600_000
"""2026-11-02 00:00 UTC, a Monday."""
WEEK = "2026-W45"
NODES = tuple(f"old-{n}" for n in range(1, 9 if FULL else 3))
OLD = MadeRack(
    seed=5,
    nodes=NODES,
    models=(MadeModel(name="chat", per_hour=60), MadeModel(name="code", per_hour=30)),
    since_ms=SINCE_MS,
    window_ms=300_000 if FULL else 1_800_000,
    faults=2.0,
)
LEASE = "state/v1/lease-rollup.json"
MOST = 1 << 30


def toml(folder: Path, name: str, table: str, *, rack_name: str = "r") -> Path:
    """aggregator.toml with this [store], or the file of a copy."""
    path = folder / f"{name}.toml"
    prices = "".join(f'[[nodes]]\nid = "{node}"\nprice = 1999\n' for node in NODES)
    path.write_text(f'rack = "{rack_name}"\ntimezone = "Europe/Berlin"\n{table}{prices}' if rack_name else table)
    return path


def folder_table(path: Path) -> str:
    return f'[store]\nkind = "directory"\npath = {json.dumps(str(path))}\n'


def started(*words: str, config: Path) -> "subprocess.Popen[str]":
    program = [sys.executable, "-P", "-m", "aggregator", *words, "--config", str(config)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*words: str, config: Path, status: int = 0) -> str:
    """A command's output; it has to end with this status."""
    process = started(*words, config=config)
    out, err = process.communicate(timeout=900)
    assert process.returncode == status, (words, process.returncode, out[-500:], err[-2000:])
    return out + err


def killed_and_repeated(*words: str, config: Path, target: Callable[[], ObjectStore], seed: int) -> int:
    """SIGKILL a command once it has written something, KILLS times, then let it end; returns how often it was killed
    before its end."""
    dice, kills = random.Random(seed), 0
    for _ in range(KILLS):
        before = len(list_all(target(), ""))
        process = started(*words, config=config)
        wanted = before + dice.randint(2, 60)
        while process.poll() is None and len(list_all(target(), "")) < wanted:
            time.sleep(0.005)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate(timeout=60)
        target().delete(LEASE)  # a killed run holds its lease for minutes; the test does not wait for it
    return kills


def contents(store: ObjectStore, *prefixes: str) -> dict[str, bytes]:
    return {one.key: store.get(one.key, MOST).body for prefix in prefixes for one in list_all(store, prefix)}


def answered(store: ObjectStore) -> int:
    """Requests that the agents of the test have uploaded, each counted once."""
    seen: dict[tuple[str, int, int, int], int] = {}
    for key in (one.key for one in list_all(store, keys.RAW_PREFIX)):
        if "/node=n" in key and not keys.is_claim(key):
            for batch in unseal(store.get(key, MOST).body):
                mine = [r.requests for r in batch.records if isinstance(r, Served) and r.outcome == "ok"]
                seen[batch.node, batch.incarnation, batch.epoch, batch.seq] = sum(mine)
    return sum(seen.values())


def in_tables(bucket: Path) -> tuple[int, int, int]:
    """Requests answered by the agents in the minute tables, their batches, and how many of those are there once."""

    def rows(table: str, what: str) -> Any:
        files = f"{bucket}/minute/v1/table={table}/*/part.parquet"
        query = f"SELECT {what} FROM read_parquet('{files}', hive_partitioning=false) WHERE node LIKE 'n_'"
        with duckdb.connect() as db:
            return db.execute(query + (" AND outcome = 'ok'" if table == "served" else "")).fetchall()[0]

    (requests,) = rows("served", "coalesce(sum(requests), 0)")
    count, once = rows("batch", "count(*), count(DISTINCT (node, incarnation, epoch, seq))")
    return int(requests), int(count), int(once)


def ask(agents: list[Agent], count: int) -> int:
    """Requests, of which all have to be answered."""
    for n in range(count):
        assert agents[n % len(agents)].chat(f"question {n}").status == 200
    return count


@pytest.mark.timeout(4000 if FULL else 600)
def test_a_lost_bucket_is_brought_back_and_the_rack_goes_on(tmp_path: Path, seaweed: SeaweedFS) -> None:
    bucket, lost = tmp_path / "bucket", tmp_path / "lost"
    seaweed.store("drill").create_bucket()
    copy = toml(tmp_path, "copy", seaweed.table(tmp_path, "drill"), rack_name="")
    live, gone = toml(tmp_path, "live", folder_table(bucket)), toml(tmp_path, "gone", folder_table(lost))
    store = DirectoryStore(bucket)
    for node in NODES:
        put(store, list(batches(OLD, node, SINCE_MS + DAYS * 24 * HOUR_MS)))
    for key, body in (("annotations/v1/incidents.toml", b"# none\n"), ("inventory/v1/rack.toml", b"# two\n")):
        store.put(key, body)
    with rack(tmp_path, [model()], [model()], extra=FAST) as agents:
        assigned = Assignment(model="m", source="weights-2", version=version_of("weights-2", tmp_path))
        publish_desired(tmp_path, 1, assigned)
        follows(agents[0], 1)
        asked = ask(agents, REQUESTS)
        until(lambda: answered(store) == asked, "every request is in the bucket")
        run("weekly", "--week", WEEK, config=live)
        run("monthly", "--month", "2026-11", config=live)
        run("alert", config=live)

        # the store is away: agents keep what they have; the copy is of what was in it
        bucket.rename(lost)
        kills = killed_and_repeated(
            "sync", "--models", "--to", str(copy), config=gone, target=lambda: seaweed.store("drill"), seed=1
        )
        said = run("sync", "--models", "--to", str(copy), config=gone)
        before = contents(DirectoryStore(lost), *keys.PREFIXES)
        asked += ask(agents, REQUESTS)
        shutil.rmtree(lost)

        # a bucket is empty again; agents may already have begun to upload into it
        back = ["restore", "--models", "--from", str(copy), "--force"]
        kills += killed_and_repeated(*back, config=live, target=lambda: DirectoryStore(bucket), seed=2)
        if not contents(store, "manifest/"):
            assert "is being restored" in run("rollup", config=live, status=os.EX_TEMPFAIL)
        said += run(*back, config=live)
        after = contents(store, *keys.PREFIXES)
        kept = {key for key in before if "lease-" not in key}
        assert {key for key in kept if after.get(key) != before[key]} == set(), "byte for byte"
        if not FULL:
            assert kills, "nothing was killed in the middle"

        # the rack goes on: nothing is lost or counted twice, reports are the same, orders are followed
        asked += ask(agents, REQUESTS)
        until(lambda: answered(store) == asked, "the agents have uploaded what they kept")
        run("rollup", config=live)
        requests, count, once = in_tables(bucket)
        assert requests == asked
        assert count == once
        assert "revision 1" in run("weekly", "--week", WEEK, config=live)
        reports = f"report/v1/weekly/{WEEK}/"
        assert contents(store, reports) == {key: body for key, body in before.items() if key.startswith(reports)}
        assert {r["node"] for r in _claims(store)} == {"n1", "n2"}
        assert served(agents[0]) == {"m": assigned.version}
        publish_desired(
            tmp_path, 2, Assignment(model="m", source="weights-3", version=version_of("weights-3", tmp_path))
        )
        follows(agents[0], 2)
    print(f"\n{len(before)} objects copied and restored, {kills} kills, {asked} requests counted once\n{said}")


def _claims(store: ObjectStore) -> list[dict[str, str]]:
    """One claim per agent: none began a new incarnation."""
    found = [one.key.split("/") for one in list_all(store, keys.RAW_PREFIX) if keys.is_claim(one.key)]
    assert all(parts[3] == "i0001" for parts in found)
    return [{"node": parts[2].removeprefix("node=")} for parts in found]
