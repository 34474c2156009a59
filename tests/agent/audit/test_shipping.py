"""Closed files in the bucket: each once, whatever breaks off, and what was changed here afterwards is named."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from agent.audit import chain, disk, shipping
from agent.audit.disk import Segment
from agent.audit.entry import Allowed, Answered, Entry
from agent.audit.log import AuditLog
from agent.audit.shipping import Shipper, in_bucket, to_prune, unpacked
from agent.policy.facts import Facts
from aggregator.commands import sync
from scripts.seaweed import SeaweedFS
from shared import keys
from shared.errors import AccessDenied, Halt, Refused, Retryable
from shared.ids import NodeId
from shared.store import ObjectStore, list_all
from shared.store_dir import DirectoryStore

NODE = "n1"


class Failing:
    """A store whose next calls fail, or whose answers are lost."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.errors: list[Exception] = []
        self.lose = False
        self.puts = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def put_if_absent(self, key: str, body: bytes) -> str:
        self.puts += 1
        if self.errors:
            raise self.errors.pop(0)
        etag = self._store.put_if_absent(key, body)
        if self.lose:
            self.lose = False
            raise Retryable("the answer was lost")
        return etag


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "directory":
        yield DirectoryStore(tmp_path / "bucket")
        return
    server: SeaweedFS = request.getfixturevalue("seaweed")
    client = server.store(f"audit-{tmp_path.name.lower().replace('_', '-')[-40:].strip('-')}")
    client.create_bucket()
    yield client


def entry(n: int) -> Entry:
    return Entry(
        kind="ended",
        t_ms=1_793_000_000_000 + n,
        request=f"req_{n:024x}",
        node=NODE,
        facts=Facts(key_id="team", model="chat"),
        places=(Allowed(category="rack"),),
        answered=Answered(category="rack", node=NODE, model="chat"),
        outcome="ok",
        cost_micro=n,
        currency="USD",
    )


def logged(folder: Path) -> AuditLog:
    return AuditLog(folder, node=NODE, known=lambda of, name: name in (NODE, "team", "chat"))


def written(folder: Path, *sizes: int) -> AuditLog:
    """A log with files of so many entries, and one that is written to."""
    log, numbers = logged(folder), itertools.count(1)
    for size in sizes:
        for n in itertools.islice(numbers, size):
            log.write(entry(n))
        log.rotate()
    return log


def shipper(folder: Path, store: object) -> Shipper:
    return Shipper(folder, NODE, lambda: store, pace=lambda _: None, random_01=lambda: 0.0)  # type: ignore[arg-type,return-value]


def shipped(store: ObjectStore) -> list[str]:
    return [one.key for one in list_all(store, keys.AUDIT_PREFIX)]


def test_closed_files_are_shipped_once_and_say_what_is_here(tmp_path: Path, store: ObjectStore) -> None:
    folder = tmp_path / "audit"
    log = written(folder, 3, 2)
    one = shipper(folder, store)
    assert one.drain(disk.segments(folder)) == 2
    assert one.problem == one.finding == ""
    assert one.waiting == 0
    name = f"audit/v1/node=n1/c{log.status()['chain']}"
    assert shipped(store) == [
        f"{name}/000000000001-000000000004.jsonl.zst",
        f"{name}/000000000005-000000000007.jsonl.zst",
    ]
    assert one.drain(disk.segments(folder)) == 0
    there = dict(shipping.fetched(store, in_bucket(store, NODE)[log.status()["chain"]]))
    here = dict(disk.contents(folder))
    assert all(here[name] == body for name, body in there.items())
    assert chain.verify(there.items()).fault is None
    log.write(entry(9))
    log.rotate()
    again = shipper(folder, Failing(store))
    assert again.drain(disk.segments(folder)) == 1, "a restart knows what is there"
    (folder / disk.SHIPPED).unlink()
    assert shipper(folder, store).drain(disk.segments(folder)) == 3, "without the note it asks again"
    assert len(shipped(store)) == 3


def test_a_lost_answer_and_an_outage_cost_nothing(tmp_path: Path, store: ObjectStore) -> None:
    folder, now = tmp_path / "audit", [0.0]
    log, flaky = written(folder, 2, 2), Failing(store)
    one = Shipper(folder, NODE, lambda: flaky, clock=lambda: now[0], pace=lambda _: None, random_01=lambda: 1.0)  # type: ignore[arg-type,return-value]
    flaky.errors = [Retryable("the store does not respond")]
    assert one.drain(disk.segments(folder)) == 0
    assert (one.problem, one.waiting) == ("the store does not respond", 2)
    assert one.drain(disk.segments(folder)) == 0
    assert flaky.puts == 1, "it backs off"
    now[0] = 10.0
    flaky.lose = True
    assert one.drain(disk.segments(folder)) == 0
    assert one.drain(disk.segments(folder), force=True) == 2
    assert (one.problem, one.finding) == ("", "")
    assert len(shipped(store)) == 2
    assert log.ok


@pytest.mark.parametrize("error", [Halt("no"), AccessDenied("rejected"), OSError(5, "Input/output error")])
def test_a_refusal_is_a_problem_and_is_tried_again(tmp_path: Path, error: Exception) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    folder, flaky = tmp_path / "audit", Failing(store)
    written(folder, 1)
    flaky.errors = [error]
    one = shipper(folder, flaky)
    assert one.drain(disk.segments(folder)) == 0
    assert one.problem
    assert ("audit/v1/node=n1/" in one.problem) == isinstance(error, AccessDenied)
    assert one.drain(disk.segments(folder), force=True) == 1
    assert one.problem == ""


def test_a_file_that_was_changed_after_it_was_shipped_is_named(tmp_path: Path, store: ObjectStore) -> None:
    folder = tmp_path / "audit"
    log = written(folder, 3, 2)
    shipper(folder, store).drain(disk.segments(folder))
    path = disk.segments(folder)[0].path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"ok"', b'"failed"'), *lines[3:]]))
    there = dict(shipping.fetched(store, in_bucket(store, NODE)[log.status()["chain"]]))
    fault = chain.compare(path.name, path.read_bytes(), there[path.name])
    assert fault == chain.Fault(path.name, 3, "differs from what was shipped to the bucket")
    (folder / disk.SHIPPED).unlink()
    one = shipper(folder, store)
    assert one.drain(disk.segments(folder)) == 2
    assert "differs from the file on this disk" in one.finding
    assert dict(shipping.fetched(store, in_bucket(store, NODE)[log.status()["chain"]])) == there, "the older one stays"


def test_an_unfinished_line_is_not_shipped_and_a_damaged_file_is_said(tmp_path: Path) -> None:
    store, folder = DirectoryStore(tmp_path / "bucket"), tmp_path / "audit"
    written(folder, 3)
    first = disk.segments(folder)[0].path
    whole = first.read_bytes()
    first.write_bytes(whole + b'{"seq":9,')
    one = shipper(folder, store)
    assert one.drain(disk.segments(folder)) == 1
    assert unpacked(store.get(shipped(store)[0], keys.MOST_AUDIT_BYTES).body) == whole
    first.write_bytes(b"x\n" + whole)
    other = shipper(folder, DirectoryStore(tmp_path / "other"))
    (folder / disk.SHIPPED).unlink()
    other = shipper(folder, DirectoryStore(tmp_path / "other"))
    other.drain(disk.segments(folder))
    assert "audit verify" in other.finding


@pytest.mark.parametrize("body", [b"", b"not zstd", b"\x28\xb5\x2f\xfd\x00"])
def test_an_object_that_cannot_be_unpacked_is_a_fault(tmp_path: Path, body: bytes) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    key = keys.AuditKey(NodeId(NODE), "0" * 16, 1, 2)
    store.put(keys.audit_key(key), body or b"\0")
    assert list(shipping.fetched(store, [key])) == [("000000000001.jsonl", b"\n")]
    fault = chain.verify(shipping.fetched(store, [key]), alone=False).fault
    assert fault is not None
    assert fault.line == 1
    written(tmp_path / "audit", 2, 1)
    one = shipper(tmp_path / "audit", store)
    real = one._node, disk.newest(tmp_path / "audit").chain
    store.put(keys.audit_key(keys.AuditKey(*real, 1, 3)), body or b"\0")
    assert one.drain(disk.segments(tmp_path / "audit")) == 2, "what somebody put there holds up nothing"
    assert "differs" in one.finding
    whole = zstandard.ZstdCompressor().compress(b"a line\n" * 99)
    assert unpacked(whole) == b"a line\n" * 99
    for broken in (whole[:-1], whole[: len(whole) // 2], whole + b"x"):
        with pytest.raises(Refused):
            unpacked(broken)
    bomb = zstandard.ZstdCompressor().compress(bytes(shipping.MOST_FILE_BYTES + 1))
    with pytest.raises(Refused, match="unpacks to more"):
        unpacked(bomb)


def test_a_copy_of_the_bucket_has_it(tmp_path: Path) -> None:
    source, target, folder = DirectoryStore(tmp_path / "bucket"), DirectoryStore(tmp_path / "copy"), tmp_path / "audit"
    written(folder, 3, 1)
    shipper(folder, source).drain(disk.segments(folder))
    assert sync.run(source, target, "r").clashes == []
    assert shipped(target) == shipped(source) != []
    source.put(shipped(source)[0], b"forged, and longer than it was, by a credential that may replace objects" * 9)
    assert sync.run(source, target, "r").clashes == [shipped(source)[0]]


def test_duckdb_reads_it_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "audit"
    written(folder, 30, 12)
    shipper(folder, DirectoryStore(tmp_path / "bucket")).drain(disk.segments(folder))
    page = Path(__file__).parents[3].joinpath("docs/audit.md").read_text()
    sql = page.partition("```sql\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "bucket")
    with duckdb.connect() as db:
        assert db.execute(sql).fetchall() == [("team", "ROUTINE", "rack", 42, sum(range(43)) / 1e6)]


def segment(first: int, size: int, age_days: float) -> Segment:
    return Segment(Path(f"{first:012d}.jsonl"), first, size, int((100 - age_days) * 86_400_000))


NOW_MS = 100 * 86_400_000


@pytest.mark.parametrize(
    ("ages", "shipped_seq", "keep_days", "keep_bytes", "gone"),
    [
        ([9, 5, 1, 0], 99, 30, 1000, 0),
        ([9, 5, 1, 0], 99, 4, 1000, 2),
        ([9, 5, 1, 0], 19, 4, 1000, 1),
        ([9, 5, 1, 0], 0, 4, 1000, 0),
        ([9, 5, 1, 0], 99, 30, 250, 2),
        ([9, 5, 1, 0], 0, 30, 250, 0),
        ([9, 5, 1, 0], 0, 30, 150, 1),
        ([9, 9, 9, 9], 99, 1, 1, 3),
        ([9], 99, 1, 1, 0),
        ([], 99, 1, 1, 0),
    ],
)
def test_what_is_pruned(ages: list[float], shipped_seq: int, keep_days: int, keep_bytes: int, gone: int) -> None:
    found = [segment(10 + 10 * n, 100, age) for n, age in enumerate(ages)]
    keep = {"keep_days": keep_days, "keep_bytes": keep_bytes}
    assert to_prune(found, NOW_MS, shipped_seq=shipped_seq, **keep) == gone


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 60))),
    st.integers(0, 500),
    st.integers(1, 40),
    st.integers(1, 400),
)
def test_what_is_not_shipped_is_pruned_only_beyond_twice_the_limit(
    sizes: list[tuple[int, float]], shipped_seq: int, keep_days: int, keep_bytes: int
) -> None:
    found = [segment(1 + 10 * n, size, age) for n, (size, age) in enumerate(sizes)]
    gone = to_prune(found, NOW_MS, keep_days=keep_days, keep_bytes=keep_bytes, shipped_seq=shipped_seq)
    assert gone <= max(0, len(found) - 1)
    left = sum(one.size for one in found[gone:])
    assert left <= 2 * keep_bytes or gone == max(0, len(found) - 1), "bounded, but for the file that is written to"
    before_last = sum(one.size for one in found[max(0, gone - 1) :])
    if gone and found[gone].first - 1 > shipped_seq:
        assert before_last > 2 * keep_bytes


def test_the_note_of_what_was_shipped_is_readable(tmp_path: Path) -> None:
    written(tmp_path / "audit", 2)
    shipper(tmp_path / "audit", DirectoryStore(tmp_path / "bucket")).drain(disk.segments(tmp_path / "audit"))
    assert json.loads((tmp_path / "audit" / disk.SHIPPED).read_bytes())["seq"] == 3
    (tmp_path / "audit" / disk.SHIPPED).write_bytes(b"\xff{")
    assert shipping.shipped(tmp_path / "audit").seq == 0
