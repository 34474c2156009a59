"""A wrong rack name, in the aggregator's configuration or in a node's, is one sentence and mended by correcting it."""

import json
from pathlib import Path

import msgspec
import pytest

from aggregator import cli, load
from aggregator.calendar import utc_day
from aggregator.commands import rollup
from shared import bucket_rack, keys
from shared.batch import Batch
from shared.errors import Refused
from shared.store import list_all
from shared.store_dir import DirectoryStore
from tests.aggregator.test_rollup import CONFIG, put
from tests.builders import T0, batch, host


def config(folder: Path, rack: str) -> str:
    path = folder / f"{rack}.toml"
    bucket = json.dumps(str(folder / "bucket"))
    path.write_text(f'rack = "{rack}"\n[store]\nkind = "directory"\npath = {bucket}\n')
    return str(path)


def minutes(rack: str, *nodes: str, first: int = 0, count: int = 4) -> list[Batch]:
    return [batch([host()], node=node, rack=rack, minute=first + n) for node in nodes for n in range(count)]


def each(store: DirectoryStore, made: list[Batch], incarnation: int = 1) -> None:
    """One object for each batch, as a small rack writes them."""
    for one in made:
        put(store, msgspec.structs.replace(one, incarnation=incarnation))


def run(folder: Path, rack: str, *words: str) -> int:
    return cli.main([*(words or ("rollup",)), "--config", config(folder, rack)])


def quarantine(store: DirectoryStore) -> list[str]:
    return [one.key for one in list_all(store, "quarantine/")]


@pytest.mark.parametrize("words", [("rollup",), ("weekly", "--week", "2026-W47"), ("monthly", "--month", "2026-11")])
def test_a_file_that_names_another_rack_is_told_in_one_sentence_and_recovers_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    each(store, minutes("brk", "n1", "n2", "n3"))
    for _ in range(2):
        assert run(tmp_path, "office", *words) == 78
        (line,) = capsys.readouterr().err.splitlines()
        assert "rollup: all nodes write rack 'brk', aggregator.toml says 'office': set rack = 'brk' there" in line
        assert "12 objects" in line
    assert quarantine(store) == []
    assert not list_all(store, "report/")
    assert bucket_rack.told(store) == ""
    assert run(tmp_path, "brk", "rollup") == 0
    manifest = load.newest_manifest(store)
    assert (manifest.batches, manifest.quarantined_total) == (12, 0)
    assert bucket_rack.told(store) == "brk"


def test_a_name_that_becomes_wrong_later_settles_nothing_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    each(store, minutes("brk", "n1", "n2"))
    assert run(tmp_path, "brk") == 0
    store.delete(keys.RACK)  # an older version's bucket
    each(store, minutes("brk", "n1", "n2", first=10))
    assert run(tmp_path, "office") == 78
    assert "all nodes write rack 'brk'" in capsys.readouterr().err
    assert run(tmp_path, "brk") == 0
    assert load.newest_manifest(store).batches == 16


def test_a_bucket_that_says_whose_it_is_decides_which_of_the_two_names_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node that is off says nothing; the others' names are right, and no node is to be changed."""
    store = DirectoryStore(tmp_path / "bucket")
    each(store, minutes("brk", "n1", "n2", "off"))
    assert run(tmp_path, "brk") == 0
    for words in (("rollup",), ("weekly", "--week", "2026-W47"), ("monthly", "--month", "2026-11")):
        assert run(tmp_path, "office", *words) == 78, "also while nothing is new"
        assert "release/v1/rack.json" in capsys.readouterr().err
    each(store, minutes("brk", "n1", "n2", first=10))
    each(store, minutes("office", "stray"))
    assert run(tmp_path, "office") == 78
    said = capsys.readouterr().err
    assert "this bucket is that of rack 'brk' (release/v1/rack.json), aggregator.toml says 'office'" in said
    assert "n1" not in said
    assert not list_all(store, "report/")
    assert load.newest_manifest(store).batches == 12
    assert run(tmp_path, "brk") == 78, "the stray one is of another rack"
    assert load.newest_manifest(store).batches == 20
    store.delete(keys.RACK)
    each(store, minutes("office", "n1", "n2", "off", first=20), incarnation=2)
    assert run(tmp_path, "office") == 0, "a rack that was renamed"
    assert bucket_rack.told(store) == "office"


def test_one_node_of_another_rack_is_named_and_the_others_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    each(store, [*minutes("r", "n1", "n2"), *minutes("brk", "n9")])
    assert run(tmp_path, "r") == 78
    said = capsys.readouterr().err
    assert "rollup: n9 writes rack 'brk', this bucket is that of 'r'" in said
    assert "4 objects" in said
    assert load.newest_manifest(store).batches == 8
    assert run(tmp_path, "r", "weekly", "--week", "2026-W47") == 78
    assert list_all(store, "report/"), "the others' reports are published all the same"
    assert quarantine(store) == []
    # its configuration is corrected: another state folder, another incarnation
    each(store, minutes("r", "n9", first=10), incarnation=2)
    assert run(tmp_path, "r") == 0
    manifest = load.newest_manifest(store)
    assert (manifest.batches, manifest.quarantined_total, len(quarantine(store))) == (12, 4, 4)
    assert run(tmp_path, "r") == 0


def test_a_node_that_mixes_racks_waits_for_nobody(tmp_path: Path) -> None:
    """Objects of another rack among a node's own are set aside, wherever they stand."""
    store = DirectoryStore(tmp_path / "bucket")
    made = [*minutes("brk", "n1", count=1), *minutes("r", "n1", first=1), *minutes("brk", "n1", first=5, count=1)]
    each(store, made)
    manifest = rollup.run(CONFIG, store)
    assert (manifest.batches, manifest.quarantined_total, len(quarantine(store))) == (4, 2, 2)
    assert rollup.run(CONFIG, store).number == manifest.number


def test_several_processes_judge_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    each(store, [*minutes("brk", "n1", "n2"), *minutes("q", "n3")])
    monkeypatch.setattr("aggregator.raw.progress.PIECE_SEGMENTS", 2)
    with pytest.raises(Refused, match=r"all nodes write rack 'brk' and 'q', aggregator\.toml says 'r': correct"):
        rollup.run(CONFIG, store)
    each(store, minutes("r", "n1", first=20))
    faults: rollup.Faults = []
    manifest = rollup.run(CONFIG, store, faults=faults)
    assert (manifest.batches, manifest.quarantined_total) == (4, 4)
    assert [fault.code for fault in faults] == ["wrong_rack"]
    assert "n2, n3 write rack 'brk' and 'q'" in faults[0].message


@pytest.mark.parametrize("body", [b"\0", b"not a segment", b""], ids=["zeros", "text", "nothing"])
def test_a_rollup_that_counts_nothing_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str], body: bytes) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    for n in range(1, 8):
        store.put(f"raw/v1/node=n1/i0001/e00000001/{n:010d}-{n:010d}.mpz", body)
    status, lines = run(tmp_path, "r"), capsys.readouterr().err.splitlines()
    if not body:
        assert (status, lines) == (0, [])  # an interrupted write, which is no object
        return
    assert status == 78
    (line,) = [one for one in lines if one.startswith("mlxrack-aggregator:")]
    assert "nothing was counted, and all 7 new objects are in quarantine" in line
    assert "unseal segment" in line
    assert "raw/v1/node=n1/" in line
    assert len(lines) == 2, "and one line of the log, not one for each object"
    assert run(tmp_path, "r") == 0, "it was told once"


def test_alerts_of_another_racks_bucket_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    each(store, minutes("brk", "n1"))
    assert run(tmp_path, "office", "alert") == 78
    assert "all of rack 'brk', aggregator.toml says 'office'" in capsys.readouterr().err
    assert run(tmp_path, "brk", "alert") in (0, 1)


def test_a_bucket_says_whose_it_is_once_a_batch_was_counted(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    rollup.run(CONFIG, store)
    assert not list_all(store, "release/")
    each(store, minutes("r", "n1", count=1))
    rollup.run(CONFIG, store)
    assert bucket_rack.told(store) == "r"
    bucket_rack.tell(store, "office")
    assert bucket_rack.told(store) == "r", "the first to say so is right"
    store.put(keys.RACK, b"{")
    assert bucket_rack.told(store) == ""


def test_a_month_in_which_the_rack_was_renamed_says_how_much_of_it_is_not_counted(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    each(store, minutes("old", "n1"))
    each(store, minutes("office", "n1", first=4), incarnation=2)
    assert run(tmp_path, "office") == 0
    manifest = load.newest_manifest(store)
    assert sum(manifest.foreign.values()) == sum(manifest.aside.values()) == manifest.quarantined_total == 4
    assert set(manifest.foreign) == {utc_day(T0)}
    assert run(tmp_path, "office", "monthly", "--month", "2026-11") == 0
    report = load.newest_report(store, "monthly", "2026-11", "report", "json")
    assert report is not None
    told = json.loads(report.body)["telemetry"]
    assert (told["quarantined"], told["foreign"], told["undated"]) == (4, 4, 0)
    # a node that goes on under another name alone is named until it is corrected
    each(store, minutes("old", "n2"))
    assert run(tmp_path, "office") != 0
    assert load.newest_manifest(store).strangers == {"raw/v1/node=n2": "old"}
    assert run(tmp_path, "office", "monthly", "--month", "2026-11") == 78, "published, and the node is at fault"
    report = load.newest_report(store, "monthly", "2026-11", "report", "json")
    assert report is not None
    assert json.loads(report.body)["telemetry"]["strangers"] == {"n2": "old"}
    assert run(tmp_path, "office", "rollup", "--again") != 0
    assert sum(load.newest_manifest(store).foreign.values()) == 4, "counted once"
