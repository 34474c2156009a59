"""The ten racks and their edges: their raw is the same each time, and reports of all of them can be made."""

import os
import time
from pathlib import Path

import pytest

from aggregator import cli
from aggregator.config import Node
from shared.batch import unseal
from shared.keys import parse_batch_key
from shared.records import EngineWindow, HostSample, Served
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.aggregator.ten_racks import RACKS, TEN, Made, at, write
from tests.made_rack import DAY_MS, HOUR_MS

WHOLE = os.environ.get("MLXRACK_RACKS") == "1"
NOTHING = 66
QUICK = ("empty month", "one node")
"""What the suite makes reports of, since a day of telemetry takes a fifth of a second; with MLXRACK_RACKS=1 all."""
REPORTED = tuple(RACKS) if WHOLE else QUICK


def made_reports(made: Made, folder: Path) -> dict[str, int]:
    """The exit codes of rollup and of each period's reports, by the command line that an operator uses."""
    config = ["--quiet", "--config", str(write(made, folder).config)]
    found = {"rollup": cli.main(["rollup", *config])}
    found |= {name: cli.main(["weekly", "--week", name, *config]) for name in made.weeks}
    return found | {name: cli.main(["monthly", "--month", name, *config]) for name in made.months}


@pytest.mark.parametrize("name", REPORTED)
@pytest.mark.timeout(300)
def test_reports_of_every_rack_can_be_made(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RACKS[name]
    if "retired =" in made.toml and "retired" not in Node.__struct_fields__:
        pytest.skip("this aggregator does not know the key `retired`")
    monkeypatch.setattr(time, "time_ns", lambda: made.now_ms * 1_000_000)
    codes = made_reports(made, tmp_path)
    wanted = dict.fromkeys(("rollup", *made.weeks, *made.months), 0) | dict.fromkeys(made.nothing, NOTHING)
    assert codes == wanted


@pytest.mark.parametrize("name", sorted({*REPORTED, "50 nodes", "clock ahead"}))
def test_raw_is_the_same_each_time_and_as_agents_write_it(name: str, tmp_path: Path) -> None:
    made = RACKS[name]
    one, other = (write(made, tmp_path / part) for part in ("one", "other"))
    store, again = DirectoryStore(one.bucket), DirectoryStore(other.bucket)
    keys = [listed.key for listed in list_all(store, "")]
    assert keys == [listed.key for listed in list_all(again, "")]
    read = dict.fromkeys(made.rack.nodes, 0)
    for key in keys:
        body = store.get(key, 1 << 24).body
        assert body == again.get(key, 1 << 24).body
        if not key.startswith("raw/"):
            continue
        raw, batches = parse_batch_key(key), unseal(body)
        assert (raw.first_seq, raw.last_seq) == (batches[0].seq, batches[-1].seq)
        assert {b.node for b in batches} == {raw.node}
        read[raw.node] += len(batches)
    assert read == {node: len(mine) for node, mine in made.batches.items()}
    assert ("annotations/v1/incidents.toml" in keys) == bool(made.annotations)


def sums(made: Made, since_ms: int, until_ms: int) -> dict[str, int]:
    """Requests by outcome between two times."""
    found: dict[str, int] = {}
    for mine in made.batches.values():
        for batch in mine:
            if not since_ms <= batch.t_start_ms < until_ms:
                continue
            for one in batch.records:
                if isinstance(one, Served):
                    what = f"{one.outcome} {one.finish}".strip()
                    found[what] = found.get(what, 0) + one.requests
    return found


def test_each_of_the_ten_is_what_its_name_says() -> None:
    october = at("2026-10-01"), at("2026-11-01")
    assert list(TEN) == [
        *("normal", "dark", "half silent", "retired", "renamed", "shared version", "swapped version"),
        *("negative saving", "zero traffic", "50 nodes"),
    ]
    day = sums(TEN["dark"], at("2026-10-20"), at("2026-10-21"))
    answered = day["ok stop"] + day["ok length"]
    assert 0.8 * answered < day["refused capacity"] < 1.25 * answered
    assert not sums(TEN["dark"], at("2026-10-14T08:00"), at("2026-10-15T20:00"))
    assert not sums(TEN["zero traffic"], *october)
    silent = TEN["half silent"].batches
    told = {node: sum(b.t_end_ms - b.t_start_ms for b in mine) / (35 * DAY_MS) for node, mine in silent.items()}
    assert all(told[node] > 0.9 for node in ("n1", "n2"))
    assert all(0.4 < told[node] < 0.5 for node in ("n3", "n4"))
    assert max(b.t_end_ms for b in TEN["retired"].batches["n4"]) <= at("2026-10-11") + HOUR_MS
    names = {b.rack for mine in TEN["renamed"].batches.values() for b in mine}
    assert names == {"office", "ten"}
    assert 'rack = "ten"' in TEN["renamed"].toml
    assert len(TEN["50 nodes"].rack.nodes) == 50
    assert len({m.name for m in TEN["50 nodes"].rack.models}) == 40


def test_shared_and_swapped_versions_are_in_the_records() -> None:
    def seen(name: str) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        records = [r for mine in RACKS[name].batches.values() for b in mine for r in b.records]
        served = {(r.model, r.version) for r in records if isinstance(r, Served) and r.worker}
        return served, {(r.model, r.version) for r in records if isinstance(r, EngineWindow)}

    served, engines = seen("shared version")
    assert {name for name, _ in served} == {"chat", "sum"}
    assert {name for name, _ in engines} == {"chat"}
    assert {version for _, version in served} == {version for _, version in engines}
    served, engines = seen("shared version, two loaders")
    assert served == engines
    first = {version for name, version in engines if name == "chat"}
    assert first & {version for name, version in engines if name == "sum"}
    served, engines = seen("swapped version")
    assert len([1 for name, _ in served if name == "code"]) == 2
    assert served == engines


def test_a_gateway_reports_what_others_computed() -> None:
    records = [r for b in TEN["swapped version"].batches["n1"] for r in b.records if isinstance(r, Served)]
    assert {r.worker for r in records if r.key_id == "etl"} == {"", "n3", "n4"}
    others = TEN["swapped version"].batches["n4"]
    assert not any(isinstance(r, Served) for b in others for r in b.records), "n4 serves extract alone"


def test_ninety_percent_of_the_dear_rack_is_idle() -> None:
    busy = length = 0
    for mine in TEN["negative saving"].batches.values():
        for batch in mine:
            length += batch.t_end_ms - batch.t_start_ms
            for one in batch.records:
                if isinstance(one, EngineWindow):
                    busy += one.busy_prefill_us + one.busy_decode_us
    assert 0.05 < busy / 1000 / length < 0.12


def test_edges_lie_where_they_should() -> None:
    offsets = {b.clock_skew_ms for b in RACKS["clock ahead"].batches["n2"]}
    assert min(o or 0 for o in offsets) >= 600_000
    assert max(o or 0 for o in offsets) <= 660_000
    assert len(offsets) > 3
    zone = "Asia/Kolkata"
    for midnight in (at("2026-10-01", zone), at("2026-10-03", zone), at("2026-10-03", "UTC")):
        across = [b for b in RACKS["across midnight"].batches["n1"] if b.t_start_ms < midnight < b.t_end_ms]
        assert len(across) == 1
    hosts = [r for b in RACKS["one node"].batches["only"] for r in b.records if isinstance(r, HostSample)]
    assert all(h.thermal_known_us for h in hosts)
    answered = sums(RACKS["all refused"], 0, at("2027-01-01"))
    assert set(answered) == {"refused capacity"}
