"""Pulls are atomic: from folders, snapshots and the bucket, interrupted and resumed."""

import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.config import Model
from agent.files import model_pull
from agent.files.model_folder import ModelFolder
from agent.files.model_pull import BucketSource, FolderSource, Write, pull, push
from agent.files.modelstore import PARTIAL, ModelStore
from scripts.seaweed import SeaweedFS
from shared.catalog import MANIFEST_NAME, PROBES_NAME, Manifest, ModelFile
from shared.errors import Refused, Retryable
from shared.keys import model_file_key, model_manifest_key
from shared.store import ObjectStore
from shared.store_dir import DirectoryStore


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "made" / "tiny"
    shutil.copytree(tiny_model, copy)
    (copy / "README.md").write_text("not part of the model")
    (copy / "modeling_tiny.py").write_text("raise SystemExit('a model brings no programs')")
    return copy


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "memo.json", tmp_path / "store")


@pytest.fixture(params=["directory", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "directory":
        return DirectoryStore(tmp_path / "bucket")
    server: SeaweedFS = request.getfixturevalue("seaweed")
    made = server.store("m" + request.node.name.encode().hex()[-40:])
    made.create_bucket()
    return made


def model(path: str) -> Model:
    return msgspec.convert({"name": "m", "path": path}, Model)


def test_a_pulled_model_equals_its_source_folder(folder: Path, store: ModelStore) -> None:
    before = store.describe(model(str(folder)))
    seen: list[tuple[int, int]] = []
    installed = pull(
        FolderSource(store, folder), store, "tiny", progress=lambda done, total: seen.append((done, total))
    )
    spec = store.describe(model("store:tiny"))
    assert (installed.version, before.version) == (spec.version, spec.version)
    assert store.installed() == [msgspec.structs.replace(installed, size=store.installed()[0].size)]
    assert seen[-1] == (installed.size, installed.size)
    assert sorted(seen) == seen
    names = {p.name for p in Path(spec.path).iterdir()}
    assert MANIFEST_NAME in names
    assert not names & {"README.md", "modeling_tiny.py"}
    assert pull(FolderSource(store, folder), store, "tiny") == installed, "again costs nothing"
    assert store.describe(model(f"store:tiny@{installed.version}")).path == spec.path


def test_push_to_the_bucket_and_pull_back(folder: Path, store: ModelStore, bucket: ObjectStore, tmp_path: Path) -> None:
    (folder / PROBES_NAME).write_text('{"probes": [{"prompt": "hi", "answer": "x"}]}')
    pushed = push(folder, store, bucket, "tiny")
    assert pushed == push(folder, store, bucket, "tiny", again=True)
    other = ModelStore(tmp_path / "memo2", tmp_path / "other node")
    pulled = pull(BucketSource(bucket, "tiny"), other, "tiny")
    assert pulled == pushed
    spec = other.describe(model("store:tiny"))
    assert spec.version == pushed.version
    assert spec.probes[0].answer == "x", "recorded answers travel with their model"
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    second = push(folder, store, bucket, "tiny")
    with pytest.raises(Refused, match="2 versions"):
        BucketSource(bucket, "tiny")
    pull(BucketSource(bucket, "tiny", second.version), other, "tiny")
    with pytest.raises(Refused, match=r"2 versions of tiny.*store:tiny@VERSION"):
        other.describe(model("store:tiny"))
    other.remove("tiny", second.version)
    assert other.describe(model("store:tiny")).version == pushed.version
    with pytest.raises(Refused, match="not in the store"):
        other.remove("tiny", second.version)


def test_hugging_face_snapshots_are_accepted(folder: Path, store: ModelStore, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--tiny"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    direct = pull(FolderSource(store, folder), store, "a")
    assert pull(FolderSource(store, cache), store, "b").version == direct.version, "the only snapshot"
    assert pull(FolderSource(store, snapshot), store, "c").version == direct.version
    (cache / "snapshots" / "other").mkdir()
    with pytest.raises(Refused, match="2 snapshots"):
        FolderSource(store, cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    assert pull(FolderSource(store, cache), store, "d").version == direct.version
    assert not any(p.is_symlink() for p in store.place("d", direct.version).rglob("*")), "copies, not links"


class CutShort:
    """A source that fails after a number of bytes."""

    def __init__(self, inner: FolderSource, limit: int) -> None:
        self._inner, self._limit, self.read = inner, limit, 0
        self.manifest = inner.manifest

    def copy(self, file: ModelFile, start: int, write: Write) -> None:
        def limited(piece: bytes) -> None:
            kept = piece[: self._limit - self.read]
            self.read += len(kept)
            write(kept)
            if len(kept) < len(piece) or self.read >= self._limit:
                raise Retryable("the source is gone")

        if self.read >= self._limit:
            raise Retryable("the source is gone")
        self._inner.copy(file, start, limited)

    def companion(self, name: str) -> bytes | None:
        return None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_an_interrupted_pull_is_not_loadable_and_resumes(folder: Path, store: ModelStore, share: float) -> None:
    whole = FolderSource(store, folder)
    total = sum(file.size for file in whole.manifest.files)
    with pytest.raises(Retryable, match="gone"):
        pull(CutShort(whole, int(total * share)), store, "tiny")
    assert store.installed() == []
    with pytest.raises(Refused, match=r"nothing named tiny is in the store.*models pull"):
        store.describe(model("store:tiny"))
    rest = CutShort(whole, 1 << 40)
    pull(rest, store, "tiny")
    assert rest.read == total - int(total * share), "no byte is fetched twice"
    assert store.describe(model("store:tiny"))


def test_a_full_disk_keeps_existing_models(folder: Path, store: ModelStore) -> None:
    source = FolderSource(store, folder)
    version = pull(source, store, "elsewhere").version
    partial = store.folder / PARTIAL / f"tiny@{version}"
    full = "the disk is full; what was fetched is kept, nothing was installed"
    # a limit of this process stands in for the disk
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "model.safetensors").stat().st_size - 1, before[1]))
    try:
        with pytest.raises(Refused, match=full) as caught:
            pull(source, store, "tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == "disk_full"
    assert (partial / "config.json").exists()
    assert [one.name for one in store.installed()] == ["elsewhere"]
    assert pull(source, store, "tiny").version == version


def test_insufficient_space_is_reported_before_the_download(folder: Path, store: ModelStore) -> None:
    source = FolderSource(store, folder)
    with pytest.raises(Refused, match=r"MB more are needed and 1 MB are free .*free some"):
        pull(source, store, "tiny", free_bytes=lambda _: 1_000_000)
    size = pull(source, store, "other").size
    with pytest.raises(Refused, match=r"disk_bytes \(1 MB\); remove one with `mlxrack-agent models remove`"):
        pull(source, store, "tiny", disk_bytes=2 * size)
    assert [one.name for one in store.installed()] == ["other"]


def test_a_corrupt_download_is_detected_discarded_and_fetched_again(
    folder: Path, store: ModelStore, bucket: ObjectStore
) -> None:
    pushed = push(folder, store, bucket, "tiny")
    key = model_file_key(pushed.version, "model.safetensors")
    good = bucket.get(key, 1 << 30).body
    bucket.put(key, good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    with pytest.raises(Refused, match=r"sha256 of model.safetensors is \w+\.\., its manifest says") as caught:
        pull(BucketSource(bucket, "tiny"), store, "tiny")
    assert caught.value.code == "bad_hash"
    assert store.installed() == []
    push(folder, store, bucket, "tiny", again=True)
    assert pull(BucketSource(bucket, "tiny"), store, "tiny").version == pushed.version
    bucket.put(key, good[:500])
    store.remove("tiny", pushed.version)
    with pytest.raises(Refused, match="ends after 500 of"):
        pull(BucketSource(bucket, "tiny"), store, "tiny")


def manifest(*names: str) -> bytes:
    return msgspec.json.encode(Manifest(files=tuple(ModelFile(name=n, size=1, sha256="0" * 64) for n in names)))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"{", "is not a manifest"),
        (manifest("config.json", "a.safetensors"), "does not describe version"),
        (None, "the bucket does not hold it"),
    ],
)
def test_an_invalid_manifest_is_rejected(store: ModelStore, tmp_path: Path, body: bytes | None, why: str) -> None:
    bucket = DirectoryStore(tmp_path / "bucket")
    if body is not None:
        bucket.put(model_manifest_key("m", "v1"), body)
    with pytest.raises(Refused, match=why):
        BucketSource(bucket, "m", "v1")


@pytest.mark.parametrize(
    "name",
    ["../../evil.json", "/etc/passwd.txt", "a/../b.json", "run.py", ".hidden.json", "a/b/c/d.json", "x\\y.json", ""],
)
def test_a_manifest_cannot_write_outside_its_folder(store: ModelStore, tmp_path: Path, name: str) -> None:
    class Strange(FolderSource):
        def __init__(self) -> None:
            self._folder = ModelFolder(tmp_path, "m")
            self.manifest = msgspec.json.decode(manifest("a.safetensors", name), type=Manifest)

    with pytest.raises(Refused, match="which is not a model file"):
        pull(Strange(), store, "m")
    assert not store.folder.exists()


def test_concurrent_pulls_of_one_model_are_excluded(folder: Path, store: ModelStore) -> None:
    whole = FolderSource(store, folder)
    inside, go = threading.Event(), threading.Event()

    class Slow(CutShort):
        def copy(self, file: ModelFile, start: int, write: Write) -> None:
            inside.set()
            assert go.wait(10)
            super().copy(file, start, write)

    first = threading.Thread(target=lambda: pull(Slow(whole, 1 << 40), store, "tiny"))
    first.start()
    assert inside.wait(10)
    with pytest.raises(Retryable, match="is already being pulled"):
        pull(whole, store, "tiny")
    go.set()
    first.join()
    assert len(store.installed()) == 1


def test_weight_files_in_the_index_must_exist(folder: Path, store: ModelStore) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match=r"lacks 1 of its weights files \(model-00002-of-00002.safetensors\)"):
        FolderSource(store, folder)


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4_000), "not a safetensors file, or truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a safetensors file, or truncated"),
        (lambda f: os.truncate(f / "model.safetensors", 100), "not a safetensors file, or truncated"),
        (lambda f: os.truncate(f / "model.safetensors", 100_000), "truncated"),
    ],
)
def test_invalid_weights_are_reported_before_a_load(
    folder: Path, store: ModelStore, break_it: Callable[[Path], object], why: str
) -> None:
    break_it(folder)
    with pytest.raises(Refused, match=f"file model.safetensors: it is.*{why}"):
        store.describe(model(str(folder)))


def test_the_bucket_is_read_in_ranges(folder: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_pull, "PIECE_BYTES", 10_000)
    bucket = DirectoryStore(store.folder.parent / "bucket")
    pushed = push(folder, store, bucket, "tiny")
    assert pull(BucketSource(bucket, "tiny"), store, "tiny") == pushed


def test_pulling_again_repairs_a_damaged_installed_model(folder: Path, store: ModelStore) -> None:
    installed = pull(FolderSource(store, folder), store, "tiny")
    weights = store.place("tiny", installed.version) / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(weights, (1, 1))
    with pytest.raises(Refused, match=r"is corrupt .*fetch the model again"):
        store.describe(model("store:tiny"))
    source = CutShort(FolderSource(store, folder), 1 << 40)
    assert pull(source, store, "tiny") == installed
    assert source.read == len(raw), "only the damaged file is fetched"
    assert store.describe(model("store:tiny")).version == installed.version


def test_partial_pulls_are_listed_counted_and_removed(folder: Path, store: ModelStore) -> None:
    whole = FolderSource(store, folder)
    with pytest.raises(Retryable):
        pull(CutShort(whole, 200_000), store, "tiny")
    (left,) = store.partials()
    assert (left.name, left.size) == ("tiny", 200_000)
    total = sum(file.size for file in whole.manifest.files)
    with pytest.raises(Refused, match="beside 0 MB of other models"):
        pull(whole, store, "other", disk_bytes=total + 100_000)
    pull(whole, store, "tiny", disk_bytes=total)
    store.remove("tiny", left.version)
    with pytest.raises(Retryable):
        pull(CutShort(whole, 200_000), store, "tiny")
    store.remove("tiny", left.version)
    assert store.partials() == []
