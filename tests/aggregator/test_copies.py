"""Copies of a bucket: every prefix has a decision, a restore mixes nothing, and an apply can be undone."""

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aggregator import cli, lease, publish
from aggregator.commands import apply, restore, rollup, sync
from aggregator.commands.ended import NothingToPublish
from aggregator.commands.sync import COPY, MARKER
from aggregator.placement import PlacementReport
from shared import bucket_rack, desired, keys
from shared.desired import Assignment, DesiredState
from shared.errors import Refused, Retryable
from shared.records import Record
from shared.store import Listed, ObjectStore, list_all
from shared.store_dir import DirectoryStore
from tests.aggregator.test_bucket import CONFIG, directory, minute, put
from tests.builders import batch, engine, host, resident, served

ROOT = Path(__file__).parents[2]
MOST = 1 << 30


def contents(store: ObjectStore) -> dict[str, bytes]:
    """Everything but what belongs to one place alone."""
    found = (one.key for one in list_all(store, ""))
    return {key: store.get(key, MOST).body for key in found if not key.startswith(sync.OWN)}


# every prefix


def strings() -> Iterator[str]:
    """Every text of the product's code."""
    for name in ("agent", "aggregator", "shared"):
        for path in (ROOT / name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_prefix_has_a_decision() -> None:
    assert set(sync.RULES) == set(keys.PREFIXES), "a new prefix: does a copy need it?"
    assert list(sync.RULES)[-1] == "manifest/", "what makes a copy whole comes last"
    documented = re.findall(r"^\| `([a-z]+/)v1/", (ROOT / "docs/bucket.md").read_text(), re.MULTILINE)
    used = {found[1] for text in strings() if (found := re.match(r"([a-z]+/)v\d+/", text))} - {"admin/", "peer/"}
    assert len(documented) > 10
    assert len(used) > 8
    for prefix in {*documented, *used}:
        assert prefix in keys.PREFIXES, prefix


def test_an_object_under_every_prefix_is_copied_and_restored(tmp_path: Path) -> None:
    here, there, back = (DirectoryStore(tmp_path / name) for name in ("here", "there", "back"))
    for n, prefix in enumerate(keys.PREFIXES):
        here.put(f"{prefix}v1/some/object", b"%d" % n)
    for key in ("desired/v1/history/x.json", "models/v1/manifest/m/v.json", "models/v1/files/v/w", keys.ALERT_STATE):
        here.put(key, b"{}")
    for own in sync.OWN:
        here.put(own + ("rollup.json" if own.endswith("-") else ""), b'{"rack": "r", "began_ms": 1, "finished_ms": 1}')
    sync.run(here, there, "r", models=True)
    assert contents(there) == contents(here)
    assert not [one for one in list_all(there, "state/") if "lease" in one.key], "a copied lease is held by nobody"
    restore.run(there, back, "r", models=True)
    assert contents(back) == contents(here)
    assert sync.run(here, there, "r", models=True).written == 0
    without = DirectoryStore(tmp_path / "without")
    sync.run(here, without, "r", raw=False)
    missing = contents(here).keys() - contents(without).keys()
    assert {key.split("/")[0] for key in missing} == {"raw", "models"}


def test_an_object_larger_than_memory_is_copied_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "PART_BYTES", 1000)
    here, there = DirectoryStore(tmp_path / "here"), DirectoryStore(tmp_path / "there")
    for size in (999, 1000, 1001, 5000, 5001):
        here.put(f"models/v1/files/v/{size}", os.urandom(size))
        here.put(f"raw/v1/{size}", os.urandom(size))
        here.put(f"day/v1/{size}", os.urandom(size))
    there.put("raw/v1/5000", b"x")
    done = sync.run(here, there, "r", models=True)
    assert done.clashes == ["raw/v1/5000"]
    assert {**contents(there), "raw/v1/5000": b""} == {**contents(here), "raw/v1/5000": b""}
    here.put("day/v1/5000", os.urandom(5000))
    assert sync.run(here, there, "r", models=True).written == 1


def test_a_manifest_and_a_model_are_written_after_what_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = DirectoryStore(tmp_path / "here"), DirectoryStore(tmp_path / "there")
    put(here, minute(0))
    rollup.run(CONFIG, here)
    here.put("models/v1/files/v/w", b"w")
    here.put(keys.model_manifest_key("m", "v"), b"{}")
    here.put(keys.DESIRED, b"{}")
    order, copy = list[str](), sync._copy

    def noted(source: ObjectStore, target: ObjectStore, one: Listed) -> tuple[int, bool]:
        order.append(one.key)
        return copy(source, target, one)

    monkeypatch.setattr(sync, "_copy", noted)
    sync.run(here, there, "r", models=True)
    assert order[-1] == keys.manifest_key(1)
    first, second, third = (
        order.index(k) for k in ("models/v1/files/v/w", "models/v1/manifest/m/v.json", keys.DESIRED)
    )
    assert first < second < third


# conflicts


def made(tmp_path: Path) -> tuple[DirectoryStore, DirectoryStore]:
    """A bucket that was rolled up, and a copy of it."""
    here, there = DirectoryStore(tmp_path / "here"), DirectoryStore(tmp_path / "there")
    for n in range(3):
        put(here, minute(n))
    rollup.run(CONFIG, here)
    sync.run(here, there, "r")
    return here, there


def test_a_target_that_is_not_this_rack_s_copy_is_refused(tmp_path: Path) -> None:
    here, there = made(tmp_path)
    with pytest.raises(Refused, match="holds the copy of rack r, this one is q"):
        sync.run(here, there, "q")
    other = DirectoryStore(tmp_path / "other")
    put(other, minute(0))
    rollup.run(CONFIG, other)
    with pytest.raises(Refused, match="are the two interchanged"):
        sync.run(here, other, "r")
    assert contents(other).keys() & contents(here).keys()
    assert not list_all(other, "state/v1/copy")


@pytest.mark.parametrize("key", ["raw/v1/node=n1/i0001/claim", "desired/v1/desired.json", "report/x", "stray.txt"])
def test_a_bucket_that_is_not_empty_is_refused_unless_forced(key: str, tmp_path: Path) -> None:
    _, there = made(tmp_path)
    back = DirectoryStore(tmp_path / "back")
    back.put(key, b"x")
    with pytest.raises(Refused, match="the bucket is not empty"):
        restore.run(there, back, "r")
    assert [one.key for one in list_all(back, "")] == [key], "nothing was written"
    assert not restore.run(there, back, "r", force=True).clashes
    assert rollup.run(CONFIG, back).batches == 3


def test_leases_and_alert_state_are_no_content(tmp_path: Path) -> None:
    _, there = made(tmp_path)
    back = DirectoryStore(tmp_path / "back")
    for key in ("state/v1/lease-alert.json", keys.ALERT_STATE):
        back.put(key, b"{}")
    assert restore.run(there, back, "r").written > 10


def test_another_rack_s_bucket_or_copy_is_refused_unless_forced(tmp_path: Path) -> None:
    _, there = made(tmp_path)
    back = DirectoryStore(tmp_path / "back")
    with pytest.raises(Refused, match="that is a copy of rack r, this aggregator's is q"):
        restore.run(there, back, "q")
    there.delete(COPY)
    with pytest.raises(Refused, match="that is a copy of rack r, this aggregator's is q"):
        restore.run(there, back, "q")  # by its segments
    put(back, batch([served()], rack="q"))
    with pytest.raises(Refused, match="the bucket belongs to rack q, not to r"):
        restore.run(there, back, "r")
    assert len(list_all(back, "")) == 1
    told = DirectoryStore(tmp_path / "told")
    bucket_rack.tell(told, "q")
    with pytest.raises(Refused, match="the bucket belongs to rack q, not to r"):
        restore.run(there, told, "r")


def test_what_is_said_about_a_claim_may_change_and_the_claim_may_not(tmp_path: Path) -> None:
    here, there = made(tmp_path)
    for key in (keys.grant_key("n1", 1), keys.contest_key("n1", 1), keys.claim_key("n1", 1)):
        here.put(key, b"one")
    assert sync.run(here, there, "r").written == 3
    for key in (keys.grant_key("n1", 1), keys.contest_key("n1", 1), keys.claim_key("n1", 1)):
        here.put(key, b"two")
    done = sync.run(here, there, "r")
    assert (done.written, done.clashes) == (2, [keys.claim_key("n1", 1)])


def test_a_claim_that_an_upgraded_agent_completed_is_no_conflict(tmp_path: Path) -> None:
    """Neither in the copy, nor in the bucket that the copy is restored to."""
    here, there = made(tmp_path)
    claim, spool = keys.claim_key("n1", 1), "5f0c" * 8
    whole = msgspec.json.encode({"spool_id": spool, "hardware": "a" * 16, "rack": "r"})
    here.put(claim, spool.encode())
    assert not sync.run(here, there, "r").clashes
    old = DirectoryStore(tmp_path / "old")
    shutil.copytree(tmp_path / "there", tmp_path / "old", dirs_exist_ok=True)
    here.put(claim, whole)
    assert not sync.run(here, there, "r").clashes
    assert there.get(claim, MOST).body == whole
    back = DirectoryStore(tmp_path / "back")
    back.put(claim, whole)
    assert not restore.run(old, back, "r", force=True).clashes
    assert back.get(claim, MOST).body == whole, "what the agent said since"


def test_the_copy_of_a_bucket_that_was_lost_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cron goes on: agents fill the next bucket, it is rolled up, and synced over the only copy."""
    _, there = made(tmp_path)
    before = {one.key: one.etag for one in list_all(there, "")}
    config, copy = str(directory(tmp_path)), tmp_path / "copy.toml"
    copy.write_text(f'[store]\nkind = "directory"\npath = "{tmp_path}/there"\n')
    words = ["sync", "--to", str(copy), "--config", config]
    bucket = DirectoryStore(tmp_path / "bucket")
    for _ in range(2):
        assert cli.main(words) == 1
        assert "was lost, replaced or is older than its copy: bring it back with" in capsys.readouterr().err
        assert {one.key: one.etag for one in list_all(there, "")} == before
        put(bucket, minute(9))
        assert cli.main(["rollup", "--config", config]) == 0
    for one in list_all(bucket, ""):
        if one.key.split("/")[0] in ("manifest", "minute", "hour", "day"):
            bucket.delete(one.key)
    assert cli.main(["restore", "--from", str(copy), "--force", "--config", config]) == 0
    assert cli.main(["rollup", "--config", config]) == 0
    assert cli.main(words) == 0
    assert rollup.run(CONFIG, there).batches == 4


def test_a_copy_that_never_became_whole_is_refused_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = made(tmp_path)
    half, back = DirectoryStore(tmp_path / "half"), DirectoryStore(tmp_path / "back")

    def killed(*_: object) -> tuple[int, bool]:
        raise KeyboardInterrupt

    monkeypatch.setattr(sync, "_copy", killed)
    with pytest.raises(KeyboardInterrupt):
        sync.run(here, half, "r")
    monkeypatch.undo()
    with pytest.raises(Refused, match="it is not whole"):
        restore.run(half, back, "r")
    assert list_all(back, "") == []
    restore.run(half, back, "r", force=True)
    with pytest.raises(Refused, match="there is no copy in that store"):
        restore.run(DirectoryStore(tmp_path / "nothing"), DirectoryStore(tmp_path / "back2"), "r")


def test_a_bucket_with_commits_of_its_own_is_not_mixed_with_a_copy(tmp_path: Path) -> None:
    _, there = made(tmp_path)
    back = DirectoryStore(tmp_path / "back")
    put(back, minute(9))
    rollup.run(CONFIG, back)
    before = contents(back)
    with pytest.raises(Refused, match="commits of its own, made since the copy; delete manifest/"):
        restore.run(there, back, "r", force=True)
    assert contents(back) == before
    for one in list_all(back, ""):
        if one.key.split("/")[0] in ("manifest", "minute", "hour", "day"):
            back.delete(one.key)
    restore.run(there, back, "r", force=True)
    assert rollup.run(CONFIG, back).batches == 4, "what came since is counted once, and so is what was there"


def test_a_conflict_is_told_and_the_bucket_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, there = made(tmp_path)
    config = directory(tmp_path)
    back = DirectoryStore(tmp_path / "bucket")
    first = list_all(there, "raw/")[0].key
    claim = keys.claim_key("n1", 1)
    there.put(claim, b"spool-1")
    back.put(claim, b"spool-2")
    back.put(first, b"another")
    copy = tmp_path / "copy.toml"
    copy.write_text(f'[store]\nkind = "directory"\npath = "{tmp_path}/there"\n')
    words = ["restore", "--from", str(copy), "--force", "--config", str(config)]
    assert cli.main(words) == 1
    told = capsys.readouterr()
    assert "it is not finished" in told.out
    assert f"restore {first}: the bucket holds another one" in told.err
    assert f"restore {claim}: the bucket holds another one" in told.err, "of the same size, and not the same"
    assert not list_all(back, "manifest/")
    for verb in (
        ["rollup"],
        ["weekly"],
        ["monthly"],
        ["alert"],
        ["prune"],
        ["list"],
        ["apply"],
        ["sync", "--to", str(copy)],
    ):
        assert cli.main([*verb, "--config", str(config)]) == os.EX_TEMPFAIL, verb
        assert "is being restored since" in capsys.readouterr().err
    for key in (first, claim):
        back.delete(key)
    assert cli.main(words) == 0
    assert cli.main(["rollup", "--config", str(config)]) == 0
    capsys.readouterr()
    assert cli.main(words[:3] + words[4:]) == 1
    assert "is not empty" in capsys.readouterr().err, "a finished restore is not begun again"


def test_an_interrupted_restore_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = made(tmp_path)
    back = DirectoryStore(tmp_path / "back")
    copy, copied = sync._copy, list[str]()

    def mortal(source: ObjectStore, target: ObjectStore, one: Listed) -> tuple[int, bool]:
        if len(copied) > 8:
            raise KeyboardInterrupt
        copied.append(one.key)
        return copy(source, target, one)

    monkeypatch.setattr(sync, "_copy", mortal)
    for _ in range(20):
        copied.clear()
        try:
            done = restore.run(there, back, "r")
            break
        except KeyboardInterrupt:
            back.delete("state/v1/lease-rollup.json")
            with pytest.raises(Retryable, match="is being restored"):
                restore.check_whole(back)
            assert not list_all(back, "manifest/")
            with pytest.raises(Refused, match="is a copy of rack r"):
                restore.run(there, back, "q")
    assert not done.clashes
    assert contents(back) == contents(here)
    restore.check_whole(back)


def test_a_restore_that_another_run_keeps_from_beginning_leaves_no_mark(tmp_path: Path) -> None:
    """Only a restore could take it away again, and every other verb would wait for that."""
    _, there = made(tmp_path)
    back = DirectoryStore(tmp_path / "back")
    with lease.held(back, "rollup"), pytest.raises(Retryable, match="holds the lease"):
        restore.run(there, back, "r", force=True)
    restore.check_whole(back)


def test_a_dry_run_writes_nothing_and_missing_versions_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = made(tmp_path)
    one = Assignment(model="m", source="m", version="v9")
    here.put(keys.DESIRED, desired.encode(DesiredState(generation=3, nodes={"n1": (one,)})))
    here.put(keys.model_manifest_key("m", "v9"), b"{}")
    sync.run(here, there, "r", models=True)
    config, copy = str(directory(tmp_path)), tmp_path / "copy.toml"
    copy.write_text(f'[store]\nkind = "directory"\npath = "{tmp_path}/there"\n')
    words = ["restore", "--from", str(copy), "--config", config]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "would be restored" in capsys.readouterr().out
    assert list_all(DirectoryStore(tmp_path / "bucket"), "") == []
    assert cli.main(words) == 0
    told = capsys.readouterr()
    assert "restored from" in told.out
    assert "versions that are not in the bucket: m@v9" in told.err
    copy.write_text(f'[store]\nkind = "directory"\npath = "{tmp_path}/here/../bucket"\n')
    for verb in ("restore", "sync"):
        assert cli.main([verb, "--from" if verb == "restore" else "--to", str(copy), "--config", config]) == 1
        assert "is the bucket of aggregator.toml itself" in capsys.readouterr().err


# apply and its undo


@pytest.fixture(scope="module")
def proposal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with a proposal of two steps."""
    folder = tmp_path_factory.mktemp("proposal")
    store = DirectoryStore(folder / "bucket")
    for n in range(10):
        hot: list[Record] = [host(throttled=0.2), engine("b", version="vb"), served("b", version="vb")]
        put(store, batch([*hot, *(resident(m, version=f"v{m}") for m in ("a", "b"))], minute=2870 + n))
        put(store, batch([host()], node="n2", minute=2870 + n))
    for name in ("a", "b"):
        store.put(keys.model_manifest_key(name, f"v{name}"), b"{}")
    assert cli.main(["weekly", "--week", "2026-W47", "--quiet", "--config", str(directory(folder))]) == 0
    return folder / "bucket"


@pytest.fixture
def proposed(proposal: Path, tmp_path: Path) -> tuple[str, DirectoryStore]:
    """The same for one test alone."""
    shutil.copytree(proposal, tmp_path / "bucket")
    return str(directory(tmp_path)), DirectoryStore(tmp_path / "bucket")


def now(store: ObjectStore) -> DesiredState:
    return desired.parse(store.get(keys.DESIRED, MOST).body)


def nodes(state: DesiredState) -> dict[str, list[str]]:
    return {node: [one.model for one in given] for node, given in state.nodes.items()}


def by_hand(store: ObjectStore, generation: int, **given: tuple[str, ...]) -> None:
    """What an operator publishes."""
    made = {n: tuple(Assignment(model=m, source=m, version=f"v{m}") for m in models) for n, models in given.items()}
    store.put(keys.DESIRED, desired.encode(DesiredState(generation=generation, note="by hand", nodes=made)))


def test_the_first_apply_is_undone_to_what_the_nodes_served(
    proposed: tuple[str, DirectoryStore], capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = proposed
    assert cli.main(["apply", "--undo", "--config", config]) == 1
    assert "nothing was applied" in capsys.readouterr().err
    assert cli.main(["apply", "--week", "2026-W47", "--config", config]) == 0
    assert nodes(now(store)) == {"n1": ["b"], "n2": ["a"]}
    assert cli.main(["apply", "--undo", "--dry-run", "--config", config]) == 0
    assert "generation 2 would be published" in capsys.readouterr().out
    assert now(store).generation == 1
    assert cli.main(["apply", "--undo", "--config", config]) == 0
    assert "generation 2 published: the state before generation 1" in capsys.readouterr().out
    assert (now(store).generation, nodes(now(store))) == (2, {"n1": ["a", "b"], "n2": []})
    assert now(store).rack == "r", "another rack's nodes must not follow it either"
    assert cli.main(["apply", "--undo", "--config", config]) == 1
    assert "is not from apply" in capsys.readouterr().err, "there was nothing before"
    assert cli.main(["apply", "--week", "2026-W47", "--config", config]) == 0
    assert (now(store).generation, nodes(now(store))) == (3, {"n1": ["b"], "n2": ["a"]})


def test_another_racks_state_is_neither_written_over_nor_undone(
    proposed: tuple[str, DirectoryStore], capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = proposed
    assert cli.main(["apply", "--week", "2026-W47", "--config", config]) == 0
    Path(config).write_text(Path(config).read_text().replace('rack = "r"', 'rack = "q"'))
    for words in (["--undo"], ["--week", "2026-W47"]):
        assert cli.main(["apply", *words, "--config", config]) == os.EX_CONFIG
        assert "is that of rack 'r', aggregator.toml says 'q'" in capsys.readouterr().err
    assert (now(store).generation, now(store).rack) == (1, "r")


def test_undo_goes_back_once_more_each_time_and_never_over_what_was_published_by_hand(
    proposed: tuple[str, DirectoryStore], capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = proposed
    by_hand(store, 7, n1=("a", "b"), n2=())
    original = now(store).nodes
    for steps in (["--steps", "1"], []):
        assert cli.main(["apply", "--week", "2026-W47", *steps, "--config", config]) == 0, steps
    assert (now(store).generation, nodes(now(store))) == (9, {"n1": ["b"], "n2": ["a"]})
    assert cli.main(["apply", "--undo", "--config", config]) == 0
    assert (now(store).generation, nodes(now(store))) == (10, {"n1": ["a", "b"], "n2": ["a"]})
    assert cli.main(["apply", "--undo", "--config", config]) == 0
    assert (now(store).generation, now(store).nodes) == (11, original)
    capsys.readouterr()
    assert cli.main(["apply", "--undo", "--config", config]) == 1
    assert "generation 11 is not from apply" in capsys.readouterr().err
    assert cli.main(["apply", "--week", "2026-W47", "--config", config]) == 0
    by_hand(store, 13, n1=("b",), n2=("a", "b"))
    assert cli.main(["apply", "--undo", "--config", config]) == 1
    assert "was published by hand" in capsys.readouterr().err
    assert now(store).generation == 13


def test_of_two_writers_one_gives_up_and_the_other_can_be_undone(
    proposed: tuple[str, DirectoryStore], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = proposed
    by_hand(store, 4, n1=("a", "b"), n2=())
    replace = publish.replace

    def late(*args: Any) -> None:
        monkeypatch.setattr(publish, "replace", replace)
        assert cli.main(["apply", "--week", "2026-W47", "--steps", "1", "--config", config]) == 0
        replace(*args)

    monkeypatch.setattr(publish, "replace", late)
    assert cli.main(["apply", "--week", "2026-W47", "--config", config]) == os.EX_TEMPFAIL
    assert (now(store).generation, nodes(now(store))) == (5, {"n1": ["a", "b"], "n2": ["a"]})
    assert cli.main(["apply", "--undo", "--config", config]) == 0
    assert nodes(now(store)) == {"n1": ["a", "b"], "n2": []}
    capsys.readouterr()


def test_what_changes_nothing_is_not_published(
    proposed: tuple[str, DirectoryStore], capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = proposed
    assert cli.main(["apply", "--week", "2026-W47", "--quiet", "--config", config]) == 0
    assert capsys.readouterr() == ("", "")
    body = store.get(keys.DESIRED, MOST).body
    for more in ([], ["--dry-run"]):
        assert cli.main(["apply", "--week", "2026-W47", *more, "--config", config]) == os.EX_NOINPUT
        assert "generation 1 already holds what the placement of 2026-W47 asks for" in capsys.readouterr().err
    empty = PlacementReport(period="2026-W01", rebalance=False, nodes=(), placed=(), moves=(), notes=())
    store.put(keys.report_key("weekly", "2026-W01", "placement", 1, "json"), msgspec.json.encode(empty))
    assert cli.main(["apply", "--week", "2026-W01", "--config", config]) == os.EX_NOINPUT
    assert "no node was there at the end of 2026-W01" in capsys.readouterr().err
    found = apply.proposal(store, "2026-W47")
    running = msgspec.structs.replace(found, period="2026-W46", so_far_until_ms=1_795_219_200_000)
    store.put(keys.report_key("weekly", "2026-W46", "placement", 1, "json"), msgspec.json.encode(running))
    store.delete(keys.DESIRED)
    assert cli.main(["apply", "--week", "2026-W46", "--dry-run", "--config", config]) == 0
    assert "steps of 2026-W46, so far until 2026-11-21 00:00 (UTC)" in capsys.readouterr().out
    store.put(keys.DESIRED, body)
    still = msgspec.structs.replace(found, moves=())
    with pytest.raises(NothingToPublish, match="has no steps"):
        apply.run(CONFIG, store, still, None, dry_run=False)
    assert store.get(keys.DESIRED, MOST).body == body
    assert cli.main(["apply", "--undo", "--week", "2026-W47", "--config", config]) == 1
    assert "takes neither --week" in capsys.readouterr().err


@pytest.mark.parametrize("raw", [b"", b"{}", b"[[[", b'{"before": {"generation": 1, "nodes": {"../x": 7}}}'])
def test_a_record_that_is_none_is_a_sentence(
    raw: bytes, proposed: tuple[str, DirectoryStore], capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = proposed
    assert cli.main(["apply", "--week", "2026-W47", "--config", config]) == 0
    (record,) = list_all(store, keys.DESIRED_HISTORY)
    assert json.loads(store.get(record.key, MOST).body)["before"]["nodes"]["n1"][0]["model"] == "a"
    store.put(record.key, raw)
    assert cli.main(["apply", "--undo", "--config", config]) == 1
    assert "apply --undo: " in capsys.readouterr().err
    assert now(store).generation == 1


def test_markers_are_in_the_place_of_states() -> None:
    assert all(one.startswith("state/v1/") for one in (*sync.OWN, MARKER))
