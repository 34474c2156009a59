"""The aggregator over a real bucket: batches rolled up once, bad objects quarantined, clear errors."""

import json
import os
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aggregator import cli, lease, load
from aggregator.calendar import month
from aggregator.commands import monthly, prune, rollup, sync, weekly
from aggregator.commands.ended import NothingToPublish
from aggregator.config import AggregatorConfig
from scripts.seaweed import SeaweedFS
from shared import keys
from shared.batch import Batch, encode, seal
from shared.bucket import Store
from shared.errors import Retryable
from shared.ids import NodeId
from shared.records import Record
from shared.store import Listed, ObjectStore, list_all
from shared.store_dir import DirectoryStore
from tests.builders import batch, engine, host, resident, served

CONFIG = AggregatorConfig(rack="r", store=Store(path="x"))


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "directory":
        return DirectoryStore(tmp_path / "bucket")
    server: SeaweedFS = request.getfixturevalue("seaweed")
    made = server.store("a" + request.node.name.encode().hex()[-40:])
    made.create_bucket()
    return made


def put(store: ObjectStore, *batches: Batch) -> str:
    first, last = batches[0], batches[-1]
    key = keys.batch_key(keys.RawKey(NodeId(first.node), first.incarnation, first.epoch, first.seq, last.seq))
    store.put(key, seal(batches))
    return key


def rows(store: ObjectStore) -> tuple[int, int]:
    """Requests and batches in the rolled-up month."""
    found = load.window(store, month("2026-11", "UTC"))
    return sum(s.requests for s in found.served), found.batches


def minute(n: int, node: str = "n1") -> Batch:
    return batch([served(requests=n + 1), engine(), resident(), host()], node=node, minute=n)


def test_pushed_batches_are_counted_once(store: ObjectStore) -> None:
    put(store, minute(0), minute(1))
    assert rollup.run(CONFIG, store).batches == 2
    put(store, minute(2))
    assert rollup.run(CONFIG, store).batches == 3
    assert rollup.run(CONFIG, store).number == 2, "nothing new, no commit"
    assert rows(store) == (6, 3)


def test_overlapping_segments_and_repeated_runs_change_nothing(store: ObjectStore) -> None:
    put(store, minute(0), minute(1))
    rollup.run(CONFIG, store)
    before = {o.key: store.get(o.key, 1 << 30).body for o in list_all(store, "minute/")}
    put(store, minute(0), minute(1), minute(2))
    rollup.run(CONFIG, store)
    assert rows(store) == (6, 3)
    store.delete(keys.manifest_key(1))
    store.delete(keys.manifest_key(2))
    rollup.run(CONFIG, store)
    assert rows(store) == (6, 3), "rolled up again from the start"
    assert before.keys() == {o.key for o in list_all(store, "minute/")}


EXTENDED = ("mini", "mini-2", "mini.local", "mini0", "zed")
"""Nodes of which one's name extends another's: stores list them in different orders."""


def test_a_node_whose_name_extends_another_s_is_counted(store: ObjectStore) -> None:
    for n in range(2):
        for node in EXTENDED:
            put(store, minute(n, node))
            store.put(f"raw/v1/node={node}/~foreign", b"x")
        # what is foreign is looked at, and quarantined, by every run
        made = rollup.run(CONFIG, store)
        assert made.batches == (n + 1) * len(EXTENDED)
    assert {folder.split("/")[2] for folder in made.cursors} == {f"node={node}" for node in EXTENDED}
    assert len(load.fresh(store, "r", {}).batches) == 2 * len(EXTENDED)
    late = prune.run(CONFIG, store, datetime(2027, 12, 1, tzinfo=UTC), dry_run=True)
    assert late.raw == 2 * len(EXTENDED)


def test_stores_of_different_orders_are_compared(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in EXTENDED:
        put(store, minute(0, node))
    there = DirectoryStore(tmp_path / "there")
    assert sync.run(store, there).written == len(EXTENDED)
    put(store, minute(1, "mini"))
    compared, copy = list[str](), sync._copy

    def counted(source: ObjectStore, target: ObjectStore, one: Listed) -> tuple[int, bool]:
        compared.append(one.key)
        return copy(source, target, one)

    monkeypatch.setattr(sync, "_copy", counted)
    done = sync.run(store, there)
    assert (done.written, done.present, done.clashes) == (1, len(EXTENDED), [])
    assert len(compared) == 1, "what is there is not fetched again"


def test_a_run_interrupted_before_its_commit_is_repeated_safely(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, minute(0), minute(1))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aggregator.publish.commit", killed)
    with pytest.raises(KeyboardInterrupt):
        rollup.run(CONFIG, store)
    monkeypatch.undo()
    rollup.run(CONFIG, store)
    assert rows(store) == (3, 2)


def test_concurrent_aggregators_lose_nothing(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from aggregator import publish

    put(store, minute(0))
    commit = publish.commit

    def slow(*args: object) -> None:
        monkeypatch.setattr("aggregator.publish.commit", commit)
        rollup.run(CONFIG, store)
        commit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("aggregator.publish.commit", slow)
    with pytest.raises(Retryable, match="another aggregator committed first"):
        rollup.run(CONFIG, store)
    assert rollup.run(CONFIG, store).batches == 1
    assert rows(store) == (1, 1)


def test_bad_objects_are_quarantined_and_the_rest_is_rolled_up(store: ObjectStore) -> None:
    good = put(store, minute(0))
    whole = store.get(good, 1 << 30).body
    bad = {
        "raw/v1/node=n1/i0001/e00000001/0000000002-0000000002.mpz": whole[:-5],
        "raw/v1/node=n1/i0001/e00000001/0000000003-0000000003.mpz": b"not a segment",
        "raw/v1/node=n1/i0001/e00000001/0000000004-0000000004.mpz": seal([minute(8)]),
        "raw/v1/node=n1/i0001/e00000001/0000000005-0000000005.mpz": seal([batch(rack="other", seq=5)]),
        "raw/v1/node=n1/hello.txt": b"hello",
        "raw/v1/stray.bin": b"stray",
        "raw/v1/node=evil/i0001/e00000001/0000000001-0000000001.mpz": b"\0",
    }
    for key, body in bad.items():
        store.put(key, body)
    put(store, minute(6))
    manifest = rollup.run(CONFIG, store)
    assert set(bad) == {q.key for q in manifest.quarantined}
    assert all(q.reason for q in manifest.quarantined)
    assert rows(store) == (8, 2)
    for key, body in bad.items():
        assert body == store.get(keys.quarantine_key(key), 1 << 30).body, "byte for byte"
    assert manifest == rollup.run(CONFIG, store), "set aside once"


def test_an_unknown_schema_waits_in_quarantine(store: ObjectStore) -> None:
    import msgpack
    import zstandard

    tree = msgpack.unpackb(encode(minute(0)))
    body = zstandard.compress(msgpack.packb({**tree, "v": 2}))
    store.put("raw/v1/node=n1/i0001/e00000001/0000000001-0000000001.mpz", body)
    (bad,) = rollup.run(CONFIG, store).quarantined
    assert "unsupported schema version 2; upgrade" in bad.reason


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_and_split_give_the_same_bytes(tmp_path: Path, seed: int) -> None:
    made = [minute(n, node) for n in range(6) for node in ("n1", "n2")]
    plain, mixed = DirectoryStore(tmp_path / "plain"), DirectoryStore(tmp_path / "mixed")
    for one in made:
        put(plain, one)
    rollup.run(CONFIG, plain)
    dice = random.Random(seed)
    for node in ("n1", "n2"):
        mine = [b for b in made if b.node == node]
        while mine:
            cut = dice.randint(1, len(mine))
            put(mixed, *mine[:cut])
            mine = mine[cut - 1 if dice.random() < 0.3 and cut > 1 else cut :]
            if dice.random() < 0.5:
                rollup.run(CONFIG, mixed)
    rollup.run(CONFIG, mixed)
    for prefix in keys.TABLE_PREFIXES:
        listed = [o.key for o in list_all(plain, prefix)]
        assert listed == [o.key for o in list_all(mixed, prefix)]
        for key in listed:
            assert plain.get(key, 1 << 30).body == mixed.get(key, 1 << 30).body, key


def test_an_empty_bucket_has_no_reports_and_a_node_has_all(store: ObjectStore) -> None:
    assert rollup.run(CONFIG, store).number == 0
    for cadence, period in ((weekly, "2026-W47"), (monthly, "2026-11")):
        with pytest.raises(NothingToPublish, match=f"no node reported anything in {period}"):
            cadence.run(CONFIG, store, period)
    assert not list_all(store, "report/")
    put(store, minute(0))
    rollup.run(CONFIG, store)
    assert len(weekly.run(CONFIG, store, "2026-W47")) == 20, "six artifacts in three forms, and two CSVs"
    _, key = monthly.run(CONFIG, store, "2026-11")
    assert store.get(key, 1 << 30).body.startswith(b"%PDF")


def test_an_unchanged_report_is_not_rewritten(store: ObjectStore) -> None:
    put(store, minute(0))
    rollup.run(CONFIG, store)
    first = weekly.run(CONFIG, store, "2026-W47")
    assert first == weekly.run(CONFIG, store, "2026-W47")
    put(store, minute(1))
    rollup.run(CONFIG, store)
    second = weekly.run(CONFIG, store, "2026-W47")
    assert any("cost-r2.json" in key for key in second)


def test_runs_exclude_each_other(store: ObjectStore) -> None:
    with lease.held(store, "rollup"):
        with pytest.raises(Retryable, match=r"another run \(.+\) holds the lease"), lease.held(store, "rollup"):
            pass
        with lease.held(store, "alert"):
            pass
    with lease.held(store, "rollup"):
        pass


# the command line


def config_file(tmp_path: Path, store: str) -> Path:
    path = tmp_path / "aggregator.toml"
    path.write_text(f'rack = "r"\n{store}')
    return path


def directory(tmp_path: Path) -> Path:
    return config_file(tmp_path, f'[store]\nkind = "directory"\npath = "{tmp_path}/bucket"\n')


def test_quiet_verbs_print_nothing_on_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(directory(tmp_path))
    put(DirectoryStore(tmp_path / "bucket"), minute(0))
    for verb in (
        ["rollup"],
        ["weekly", "--week", "2026-W47"],
        ["monthly", "--month", "2026-11"],
        ["weekly"],
        ["monthly"],
    ):
        program = [sys.executable, "-P", "-m", "aggregator", *verb, "--quiet", "--config", config]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("", ""), verb
        # a new rack has no last month: nothing that cron has to hear of
        assert done.returncode in ((0, os.EX_NOINPUT) if len(verb) == 1 else (0,)), verb
    assert cli.main(["rollup", "--json", "--config", config]) == 0
    assert json.loads(capsys.readouterr().out)["batches"] == 1


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (["weekly", "--week", "47"], 1, "give it as 2026-W47"),
        (["monthly", "--month", "2026-13"], 1, "give it as 2026-11"),
    ],
)
def test_an_invalid_period_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, why: str
) -> None:
    assert status == cli.main([*words, "--config", str(directory(tmp_path))])
    assert why in capsys.readouterr().err


def test_refused_credentials_exit_77(
    tmp_path: Path, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCESS", "nobody")
    monkeypatch.setenv("SECRET", "wrongsecret")
    store = (
        f'[store]\nkind = "s3"\nendpoint = "{seaweed.endpoint}"\nbucket = "probe-bucket"\n'
        'access_key = "env:ACCESS"\nsecret_key = "env:SECRET"\n'
    )
    assert cli.main(["rollup", "--config", str(config_file(tmp_path, store))]) == os.EX_NOPERM
    err = capsys.readouterr().err
    assert "rejected the credentials" in err
    assert "wrongsecret" not in err
    monkeypatch.delenv("SECRET")
    assert cli.main(["rollup", "--config", str(config_file(tmp_path, store))]) == os.EX_CONFIG
    assert "secret env:SECRET: the environment variable is not set" in capsys.readouterr().err


def test_a_run_that_overlaps_exits_75(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lease.held(DirectoryStore(tmp_path / "bucket"), "rollup"):
        assert cli.main(["rollup", "--config", str(directory(tmp_path))]) == os.EX_TEMPFAIL
    assert ") holds the lease" in capsys.readouterr().err


def test_a_bad_configuration_exits_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["alert", "--config", str(config_file(tmp_path, "[store]\nkind = 5\n"))]) == os.EX_CONFIG
    assert "store.kind" in capsys.readouterr().err


def test_a_proposal_is_applied_once_it_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, store = str(directory(tmp_path)), DirectoryStore(tmp_path / "bucket")
    for n in range(10):
        hot: list[Record] = [
            host(throttled=0.2),
            resident("a", version="va"),
            resident("b", version="vb"),
            engine("b", version="vb"),
        ]
        put(store, batch([*hot, served("b", version="vb")], minute=2870 + n))
        put(store, batch([host()], node="n2", minute=2870 + n))
    for name in ("a", "b"):
        store.put(keys.model_manifest_key(name, f"v{name}"), b"{}")
    assert cli.main(["weekly", "--week", "2026-W47", "--config", config]) == 0
    assert cli.main(["apply", "--week", "2026-W47", "--dry-run", "--config", config]) == 0
    assert "generation 1 would be published: 2 of 2 steps" in capsys.readouterr().out
    assert not list_all(store, "desired/")
    assert cli.main(["apply", "--week", "2026-W47", "--config", config]) == 0
    desired = json.loads(store.get(keys.DESIRED, 1 << 30).body)
    assert {node: [a["model"] for a in given] for node, given in desired["nodes"].items()} == {"n1": ["b"], "n2": ["a"]}
    assert cli.main(["apply", "--week", "2026-W47", "--steps", "x", "--config", config]) == 1
    assert "like 1,2" in capsys.readouterr().err
    assert cli.main(["apply", "--week", "2026-W40", "--config", config]) == 1
    assert "no placement published for 2026-W40" in capsys.readouterr().err


def test_any_range_of_days_is_reported_and_incomplete_ranges_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(directory(tmp_path))
    put(DirectoryStore(tmp_path / "bucket"), minute(0))
    words = ["weekly", "--since", "2026-11-20", "--until", "2026-11-21", "--json", "--config", config]
    assert cli.main(words) == 0
    published = json.loads(capsys.readouterr().out)["published"]
    assert "report/v1/weekly/2026-11-20--2026-11-21/cost-r1.html" in published
    assert cli.main(["weekly", "--since", "2026-11-20", "--config", config]) == 1
    assert "--since and --until together" in capsys.readouterr().err


def test_sync_and_prune_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, store = str(directory(tmp_path)), DirectoryStore(tmp_path / "bucket")
    put(store, minute(0))
    target = tmp_path / "target.toml"
    target.write_text(f'[store]\nkind = "directory"\npath = "{tmp_path}/copy"\n')
    assert cli.main(["sync", "--to", str(target), "--json", "--config", config]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 1
    copy = DirectoryStore(tmp_path / "copy")
    key = list_all(store, "raw/")[0].key
    copy.put(key, b"another")
    assert cli.main(["sync", "--to", str(target), "--config", config]) == 1
    assert "source and target differ; neither was changed" in capsys.readouterr().err
    target.write_text("[store]\npath = 5\n")
    assert cli.main(["sync", "--to", str(target), "--config", config]) == os.EX_CONFIG
    capsys.readouterr()
    assert cli.main(["prune", "--dry-run", "--config", config]) == 0
    assert "would be deleted" in capsys.readouterr().out


def test_plan_and_economics_need_no_bucket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    intake, inventory = tmp_path / "intake.toml", tmp_path / "inventory.toml"
    intake.write_text(
        '[[models]]\nname = "chat"\nweights_gb = 4.5\nkv_kib_per_tok = 144\n'
        '[[workloads]]\nmodel = "chat"\nqps = 0.05\nprompt_tok = 400\nanswer_tok = 100\n'
    )
    inventory.write_text('[[nodes]]\nid = "mini-1"\nchip = "M4"\nmemory_gb = 32\n')
    page = tmp_path / "plan.html"
    words = ["plan", "--intake", str(intake), "--inventory", str(inventory)]
    assert cli.main([*words, "--html", str(page)]) == 0
    assert "load chat on mini-1" in capsys.readouterr().out
    assert page.read_bytes().startswith(b"<!doctype html>")
    inventory.write_text('[[nodes]]\nid = "mini-1"\nchip = "M4"\nmemory_gb = 16\nbudget_gb = 2\n')
    assert cli.main([*words, "--json"]) == 1, "what does not fit is an error for scripts"
    assert "Not enough memory for 1 x chat" in json.loads(capsys.readouterr().out)["short"][0]
    assert cli.main(["plan", "--intake", str(tmp_path / "no"), "--inventory", str(inventory)]) == 1
    assert "No such file" in capsys.readouterr().err
    assert cli.main(["economics", "--api-spend", "12000", "--nodes", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["break_even"] == 4
    assert cli.main(["economics", "--api-spend", "-1", "--nodes", "4"]) == 1


def test_uncounted_objects_are_mentioned_in_the_report(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    put(store, minute(0))
    store.put("raw/v1/node=n1/i0001/e00000001/0000000002-0000000002.mpz", b"half a fi")
    rollup.run(CONFIG, store)
    weekly.run(CONFIG, store, "2026-W47")
    page = store.get("report/v1/weekly/2026-W47/uptime-r1.md", 1 << 30).body.decode()
    assert "1 object in quarantine/ does not tell of which day" in page


def test_the_cron_file_names_verbs_that_exist() -> None:
    text = Path("scripts/aggregator.cron").read_text()
    for verb in ("alert", "rollup", "weekly", "monthly"):
        assert f'"$RACK {verb} --quiet"' in text
        with pytest.raises(SystemExit) as caught:
            cli.main([verb, "--help"])
        assert caught.value.code == 0
