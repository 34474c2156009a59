"""An aggregator killed repeatedly at random times leaves the same bytes as an undisturbed one."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.seaweed import SeaweedFS
from shared import keys
from shared.batch import Batch, seal
from shared.ids import NodeId
from shared.store import ObjectStore, list_all
from tests.made_rack import HOUR_MS, MadeModel, MadeRack, batches

KILLS = int(os.environ.get("MLXRACK_AGGREGATOR_KILLS", "6"))
SINCE_MS = 1_793_577_600_000
"""2026-11-02 00:00 UTC, a Monday."""
RACK = MadeRack(
    seed=3,
    nodes=("n1", "n2", "n3"),
    models=(MadeModel(name="chat", per_hour=60), MadeModel(name="code", per_hour=30, prompt_tok=4000)),
    since_ms=SINCE_MS,
    window_ms=600_000,
    faults=3.0,
    skewed=("n3",),
    metered=("n1",),
    budget_bytes=10 * 10**9,  # one of the two models at a time: there are evictions
)
DAYS = 5
LEASE = "state/v1/lease-rollup.json"


def put(store: ObjectStore, made: list[Batch]) -> None:
    for begin in range(0, len(made), 3):
        group = [one for one in made[begin : begin + 3] if one.epoch == made[begin].epoch]
        for part in (group, [one for one in made[begin : begin + 3] if one not in group]):
            if part:
                first, last = part[0], part[-1]
                key = keys.RawKey(NodeId(first.node), first.incarnation, first.epoch, first.seq, last.seq)
                store.put(keys.batch_key(key), seal(part))


def config(folder: Path, endpoint: str, bucket: str) -> Path:
    for name, secret in zip(("access", "secret"), SeaweedFS.ADMIN, strict=True):
        (folder / name).write_text(secret)
        (folder / name).chmod(0o600)
    path = folder / f"{bucket}.toml"
    priced = "".join(f'[[nodes]]\nid = "{node}"\nprice = 1999\n' for node in RACK.nodes)
    path.write_text(
        'rack = "r"\ntimezone = "Europe/Berlin"\n'
        f'[store]\nkind = "s3"\nendpoint = "{endpoint}"\nbucket = "{bucket}"\n'
        f"access_key = {json.dumps(f'file:{folder}/access')}\nsecret_key = {json.dumps(f'file:{folder}/secret')}\n"
        f"{priced}"
    )
    return path


def started(path: Path, *words: str) -> "subprocess.Popen[bytes]":
    program = [sys.executable, "-P", "-m", "aggregator", *words, "--config", str(path)]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(path: Path, *words: str) -> None:
    process = started(path, *words)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err.decode()[-2000:]


def contents(store: ObjectStore) -> dict[str, bytes]:
    prefixes = (*keys.TABLE_PREFIXES, "report/")
    return {one.key: store.get(one.key, 1 << 30).body for prefix in prefixes for one in list_all(store, prefix)}


@pytest.mark.timeout(900 + 6 * KILLS)
def test_kills_at_any_time_change_nothing(tmp_path: Path, seaweed: SeaweedFS) -> None:
    everything = {node: list(batches(RACK, node, SINCE_MS + DAYS * 24 * HOUR_MS)) for node in RACK.nodes}
    plain, killed = seaweed.store("plain"), seaweed.store("killed")
    for store in (plain, killed):
        store.create_bucket()
    for node in RACK.nodes:
        put(plain, everything[node])
    undisturbed = config(tmp_path, seaweed.endpoint, "plain")
    began = time.monotonic()
    finished(undisturbed, "weekly", "--week", "2026-W45")
    whole_s = time.monotonic() - began
    disturbed = config(tmp_path, seaweed.endpoint, "killed")
    dice, ended, kills, typical_s = random.Random(KILLS), 0, 0, whole_s
    queues = {node: list(made) for node, made in everything.items()}
    while kills < KILLS:
        for node, queue in queues.items():
            share = max(3, len(everything[node]) // KILLS // 3 * 3)
            put(killed, queue[:share])
            queues[node] = queue[share:]
        killed.delete(LEASE)  # a killed run holds its lease for minutes; the test does not wait for it
        process, began = started(disturbed, "rollup"), time.monotonic()
        try:
            process.wait(dice.uniform(0.1, 1.0) * typical_s)
            ended, typical_s = ended + 1, time.monotonic() - began
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills, typical_s = kills + 1, typical_s * 1.05
        finally:
            if process.stderr is not None:
                process.stderr.close()
    for queue in queues.values():
        put(killed, queue)
    killed.delete(LEASE)
    finished(disturbed, "weekly", "--week", "2026-W45")
    one, other = contents(plain), contents(killed)
    print(f"\n{kills} kills, {ended} runs that ended by themselves; {len(one)} tables and reports, all equal")
    assert one.keys() == other.keys()
    assert [key for key in one if one[key] != other[key]] == []
