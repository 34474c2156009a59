"""A model folder that a stranger has packed: nothing from outside it is read, copied or uploaded, and nothing hangs."""

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import Model
from agent.files import model_folder
from agent.files.model_folder import ModelFolder
from agent.files.model_pull import BucketSource, FolderSource, Write, pull, push, snapshot_of
from agent.files.modelstore import PARTIAL, ModelStore
from shared.catalog import Manifest, ModelFile, check_manifest
from shared.errors import RackError, Refused
from shared.regular_file import read_file
from shared.store import list_all
from shared.store_dir import DirectoryStore

SECRET = b"TOP-SECRET-RACK-KEY"


@pytest.fixture
def world(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with a model and, beside it, secrets; as an archive could unpack it."""
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "secrets").mkdir()
    for name in ("rack.secret", "config.json", "token"):
        (tmp_path / "secrets" / name).write_bytes(SECRET)
        (tmp_path / "secrets" / name).chmod(0o600)
    (tmp_path / "model" / ".git").mkdir()
    (tmp_path / "model" / ".git" / "config").write_bytes(SECRET)
    return tmp_path


def store_of(world: Path) -> ModelStore:
    return ModelStore(world / "memo.json", world / "store")


def described(world: Path) -> str:
    return store_of(world).describe(msgspec.convert({"name": "m", "path": str(world / "model")}, Model)).version


def replaced(make: Callable[[Path, Path], object], name: str = "LICENSE.txt") -> Callable[[Path], object]:
    """Put something else into the place of a file; it is given the path and the folder of secrets."""

    def run(world: Path) -> None:
        path = world / "model" / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        make(path, world / "secrets")

    return run


def piped_behind(path: Path) -> None:
    """A link to a FIFO of the folder."""
    path.symlink_to("pipe")
    os.mkfifo(path.parent / "pipe")


def bound(path: Path, _: Path) -> None:
    """A socket; the path of one must be short."""
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{path.name}" if os.path.isdir("/proc/self/fd") else str(path))
    os.close(here)


PACKED = {
    "a link to a secret": replaced(lambda path, secrets: path.symlink_to(secrets / "rack.secret")),
    "a relative link": replaced(lambda path, _: path.symlink_to("../secrets/rack.secret")),
    "config.json itself": replaced(lambda path, secrets: path.symlink_to(secrets / "config.json"), "config.json"),
    "weights": replaced(lambda path, secrets: path.symlink_to(secrets / "token"), "model.safetensors"),
    "recorded answers": replaced(lambda path, secrets: path.symlink_to(secrets / "token"), "mlxrack-probes.json"),
    "a manifest": replaced(lambda path, secrets: path.symlink_to(secrets / "token"), "mlxrack-manifest.json"),
    "a link to a link": lambda world: (
        (world / "model" / "inner").symlink_to(world / "secrets" / "token"),
        (world / "model" / "LICENSE.txt").symlink_to("inner"),
    ),
    "a folder that is a link": lambda world: (world / "model" / "1_Pooling").symlink_to(world / "secrets"),
    "a folder in a folder": replaced(lambda path, secrets: path.symlink_to(secrets), "a/b"),
    "credentials of the clone": replaced(lambda path, _: path.symlink_to(".git/config")),
    "a device": replaced(lambda path, _: path.symlink_to("/dev/zero"), "tokenizer.json"),
    "a file of /proc": replaced(lambda path, _: path.symlink_to("/proc/self/environ")),
    "a loop": replaced(lambda path, _: path.symlink_to(path.name)),
    "a link to nothing": replaced(lambda path, _: path.symlink_to("gone.txt")),
    "a FIFO": replaced(lambda path, _: os.mkfifo(path), "config.json"),
    "a FIFO as manifest": replaced(lambda path, _: os.mkfifo(path), "mlxrack-manifest.json"),
    "a FIFO as recorded answers": replaced(lambda path, _: os.mkfifo(path), "mlxrack-probes.json"),
    "a FIFO behind a link": replaced(lambda path, _: piped_behind(path), "vocab.txt"),
    "a socket": replaced(bound, "vocab.json"),
}


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED.keys())
@pytest.mark.timeout(60)
def test_what_leads_out_of_the_folder_or_is_no_file_is_refused(world: Path, pack: Callable[[Path], object]) -> None:
    """By every reader: the daemon, the loader, `pull` and `push`; nothing of it reaches store or bucket."""
    pack(world)
    store, bucket = store_of(world), DirectoryStore(world / "bucket")
    said = set()
    for attempt in (
        lambda: described(world),
        lambda: ModelFolder(world / "model", "model m").check(),
        lambda: pull(FolderSource(store, world / "model"), store, "m"),
        lambda: push(world / "model", store, bucket, "m"),
    ):
        try:
            attempt()
        except Refused as error:
            said.add(error.message)
    assert said, "somebody refuses it"
    assert all(str(world) in one or "config.json" in one or "is a" in one or "cannot be" in one for one in said), said
    for body in (path.read_bytes() for top in ("store", "bucket") for path in _files(world / top)):
        assert SECRET not in body


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_refusal_names_file_and_target(world: Path) -> None:
    PACKED["a link to a secret"](world)
    with pytest.raises(
        Refused, match=rf"model m: LICENSE.txt is a link to '{world}/secrets/rack.secret', which is not"
    ):
        described(world)


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_private_file_with_two_names_is_not_copied(world: Path, mode: int) -> None:
    secret = world / "secrets" / "rack.secret"
    secret.chmod(mode)
    os.link(secret, world / "model" / "LICENSE.txt")
    with pytest.raises(Refused, match=r"LICENSE.txt is private \(mode 6.0\) and has 2 names"):
        push(world / "model", store_of(world), DirectoryStore(world / "bucket"), "m")
    with pytest.raises(Refused, match="has 2 names"):
        FolderSource(store_of(world), world / "model")
    secret.chmod(0o644)
    push(world / "model", store_of(world), DirectoryStore(world / "bucket"), "m")


def test_links_within_the_folder_are_followed(world: Path) -> None:
    version = described(world)
    (world / "model" / "config.json").rename(world / "model" / "real.cfg")
    (world / "model" / "config.json").symlink_to("real.cfg")
    assert described(world) == version
    (world / "elsewhere").symlink_to(world / "model")
    store = store_of(world)
    assert store.describe(msgspec.convert({"name": "m", "path": str(world / "elsewhere")}, Model)).version == version


def cached(world: Path, name: str = "models--org--tiny") -> Path:
    """A Hugging Face cache folder with the model."""
    cache = world / "hub" / name
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for path in (world / "model").iterdir():
        if path.is_file():
            shutil.copy(path, cache / "blobs" / f"b{path.name}")
            (snapshot / path.name).symlink_to(f"../../blobs/b{path.name}")
    return cache


def test_a_cache_folder_may_use_its_own_blobs_alone(world: Path) -> None:
    cache, version = cached(world), described(world)
    store = store_of(world)
    assert pull(FolderSource(store, cache), store, "m").version == version
    other = world / "hub" / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_bytes(SECRET)
    link = cache / "snapshots" / "abc123" / "LICENSE.txt"
    link.symlink_to("../../../models--org--private/blobs/x")
    with pytest.raises(Refused, match=r"LICENSE.txt is a link to .*models--org--private"):
        FolderSource(store, cache)
    link.unlink()
    (cache / "blobs" / "secret").symlink_to(world / "secrets" / "rack.secret")
    link.symlink_to("../../blobs/secret")
    with pytest.raises(Refused, match=r"rack.secret', which is not in"):
        FolderSource(store, cache)


def test_only_a_cache_folder_has_blobs(world: Path) -> None:
    with pytest.raises(Refused, match="is a link to"):
        FolderSource(store_of(world), cached(world, "data"))


@pytest.mark.parametrize("main", [b"../../../secrets", b"/etc", b"", b"..", b"nothing", b"\xff\xfe", b"x" * 200])
def test_a_cache_folder_names_one_of_its_own_snapshots(world: Path, main: bytes) -> None:
    cache = cached(world)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_bytes(main)
    assert snapshot_of(cache) == cache / "snapshots" / "abc123"
    (cache / "snapshots" / "def").symlink_to(world / "secrets")
    shutil.rmtree(cache / "refs")
    assert snapshot_of(cache) == cache / "snapshots" / "abc123", "a link is no snapshot"


def test_a_link_that_is_put_there_between_check_and_use_is_not_followed(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's owner swaps file and link as fast as the system allows; also exactly between look-up and open."""
    (world / "model" / "LICENSE.txt").write_bytes(b"fine")
    folder, real = ModelFolder(world / "model", "m"), model_folder._opened_beneath

    def swapped(root: Path, target: Path) -> int:
        target.unlink()
        target.symlink_to(world / "secrets" / "rack.secret")
        return real(root, target)

    monkeypatch.setattr(model_folder, "_opened_beneath", swapped)
    with pytest.raises(Refused, match="cannot be opened as a file of this folder"):
        folder.open("LICENSE.txt")
    monkeypatch.undo()
    done = threading.Event()
    threading.Thread(target=_swaps, args=(world, done)).start()
    try:
        for _ in range(2_000):
            try:
                assert folder.read("LICENSE.txt") in (b"", b"fine")
            except (Refused, OSError):
                continue
    finally:
        done.set()


def _swaps(world: Path, done: threading.Event) -> None:
    path, aside = world / "model" / "LICENSE.txt", world / "model" / "aside"
    while not done.is_set():
        aside.symlink_to(world / "secrets" / "rack.secret")
        os.replace(aside, path)
        aside.write_bytes(b"fine")
        os.replace(aside, path)


def test_a_folder_that_becomes_a_link_is_not_followed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "model" / "1_Pooling").mkdir()
    (world / "model" / "1_Pooling" / "config.json").write_bytes(b"{}")
    folder, real = ModelFolder(world / "model", "m"), model_folder._opened_beneath

    def swapped(root: Path, target: Path) -> int:
        shutil.rmtree(target.parent)
        target.parent.symlink_to(world / "secrets")
        return real(root, target)

    monkeypatch.setattr(model_folder, "_opened_beneath", swapped)
    with pytest.raises(Refused, match="cannot be opened as a file of this folder"):
        folder.open("1_Pooling/config.json")


class Growing(FolderSource):
    """A folder whose files are appended to while they are copied."""

    def copy(self, file: ModelFile, start: int, write: Write) -> None:
        def and_grow(piece: bytes) -> None:
            write(piece)
            with (self._folder.path / file.name).open("ab") as grown:
                grown.write(piece)

        super().copy(file, start, and_grow)


@pytest.mark.timeout(60)
def test_a_file_that_grows_as_it_is_read_ends_the_pull(world: Path) -> None:
    store = store_of(world)
    with pytest.raises(Refused, match="has more than"):
        pull(Growing(store, world / "model"), store, "m")
    assert not store.installed()


def test_a_file_that_changes_during_the_push_leaves_nothing_in_the_bucket(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bucket = store_of(world), DirectoryStore(world / "bucket")
    real = store.manifest

    def and_changed(name: str, folder: Path) -> Manifest:
        made = real(name, folder)
        for path in (world / "model").glob("*.json"):
            path.write_bytes(path.read_bytes().replace(b"{", b"[", 1))
        return made

    monkeypatch.setattr(store, "manifest", and_changed)
    with pytest.raises(Refused, match=r"push: .* was changed meanwhile"):
        push(world / "model", store, bucket, "m")
    assert not list_all(bucket, "models/")


def test_a_pull_writes_to_nowhere_that_a_link_leads(world: Path) -> None:
    """Who can write into the store's folder of partial downloads does not get the puller's files overwritten."""
    store = store_of(world)
    source = FolderSource(store, world / "model")
    partial = store.folder / PARTIAL / f"m@{described(world)}"
    partial.mkdir(parents=True)
    for name in ("config.json", "mlxrack-manifest.tmp", "mlxrack-manifest.json"):
        (partial / name).symlink_to(world / "secrets" / "token")
    Path(f"{partial}.lock").symlink_to(world / "secrets" / "token")
    with pytest.raises(Refused):
        pull(source, store, "m")
    Path(f"{partial}.lock").unlink()
    installed = pull(source, store, "m")
    assert (world / "secrets" / "token").read_bytes() == SECRET
    assert not any(path.is_symlink() for path in store.place("m", installed.version).iterdir())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_pulled_model_is_readable_whatever_the_umask(world: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = store_of(world)
        place = store.place("m", pull(FolderSource(store, world / "model"), store, "m").version)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o644}
    assert {folder.stat().st_mode & 0o777 for folder in (place, place.parent, store.folder)} == {0o755}


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("config.json", "CONFIG.json"), "duplicate file"),
        (("a.json", "A.json/b.txt"), "duplicate file"),
        (("x/a.json", "X/A.json"), "duplicate file"),
        (("config.json\0.txt",), "not a model file"),
        (("cönfig.json",), "not a model file"),
        (("a/" * 3 + "b.json",), "not a model file"),
        (("x" * 300 + ".json",), "not a model file"),
        (("con\nfig.json",), "not a model file"),
    ],
)
def test_names_that_a_file_system_takes_for_one_are_refused(names: tuple[str, ...], why: str) -> None:
    files = tuple(ModelFile(name=name, size=1, sha256="0" * 64) for name in ("model.safetensors", *names))
    with pytest.raises(Refused, match=why):
        check_manifest(Manifest(files=files), "pull m")


@pytest.mark.parametrize("sha256", ["", "0" * 63, "\x1b[2J" + "0" * 60, "Z" * 64])
def test_a_hash_is_a_hash(sha256: str) -> None:
    files = (ModelFile(name="model.safetensors", size=1, sha256=sha256),)
    with pytest.raises(Refused, match="without a SHA-256"):
        check_manifest(Manifest(files=files), "pull m")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["..", ".", "secrets", "rack.secret", "model", "token", "a", ".git", "/"]), max_size=6))
def test_no_path_leads_out(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    world = tmp_path_factory.mktemp("w")
    for name in ("model", "secrets", "model/a", "model/.git"):
        (world / name).mkdir()
        (world / name / "token").write_bytes(b"inside" if name in ("model", "model/a") else SECRET)
    target = "/".join(steps)
    (world / "model" / "x.txt").symlink_to(target or "token")
    for name in ("x.txt", target):
        try:
            seen = ModelFolder(world / "model", "m").read(name or "token")
        except (RackError, OSError):
            continue
        assert seen == b"inside"


def test_recorded_answers_that_an_operator_names_may_lie_anywhere_but_are_a_file(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    assert read_file(tmp_path / "link", 10) == b"x"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            read_file(path, 10)
    (tmp_path / "real").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="more than"):
        read_file(tmp_path / "real", 10)


def test_a_pushed_model_is_what_was_hashed(world: Path) -> None:
    store, bucket = store_of(world), DirectoryStore(world / "bucket")
    pushed = push(world / "model", store, bucket, "m")
    other = ModelStore(world / "memo2.json", world / "other")
    assert pull(BucketSource(bucket, "m"), other, "m") == pushed
