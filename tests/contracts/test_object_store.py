"""One suite for every ObjectStore: a directory, and a real S3 server."""

import io
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from scripts.seaweed import SeaweedFS, free_port
from scripts.tcp_gate import TcpGate
from shared.errors import AccessDenied, Halt, NotFound, PreconditionFailed, Refused, Retryable
from shared.store import ObjectStore, list_all
from shared.store_dir import DirectoryStore
from shared.store_s3 import S3Store, _translated


@pytest.fixture(params=["directory", "s3", "s3 with prefix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "directory":
        return DirectoryStore(tmp_path / "bucket")
    server: SeaweedFS = request.getfixturevalue("seaweed")
    bucket = "c" + request.node.name.encode().hex()[-40:]
    made = server.store(bucket, prefix="racks/one" if "prefix" in request.param else "")
    made.create_bucket()
    return made


def test_a_put_object_is_read_back(store: ObjectStore) -> None:
    etag = store.put("a/b c+%/ü.bin", b"\x00\xffbody")
    got = store.get("a/b c+%/ü.bin", 1 << 30)
    assert (b"\x00\xffbody", etag) == got


PAGES = {
    "models/v1/files/v/chat_template.jinja": b"<!-- a template -->{{ x }}",
    "models/v1/files/v/README.txt": b"<p>hello</p>",
    "quarantine/v1/raw/v1/node=n1/x": b"<html><body>Sign in</body></html>",
    "report/v1/weekly/2026-W47/cost-r1.html": b"<!doctype html><title>Cost</title>",
    "report/v1/weekly/2026-W47/cost-r1.md": b"<b>x</b>",
    "inventory/v1/x.xml": b'<?xml version="1.0"?><a/>',
    "no extension": b" \n<TABLE>",
}


@pytest.mark.parametrize("key", PAGES)
def test_an_object_may_look_like_a_page(store: ObjectStore, key: str) -> None:
    store.put(key, PAGES[key])
    assert store.get(key, 1 << 30).body == PAGES[key]
    assert store.get_part(key, 0, 3) == PAGES[key][:3]
    store.put_file(key, io.BytesIO(PAGES[key]))
    assert store.get(key, 1 << 30).body == PAGES[key]
    if isinstance(store, S3Store):  # written by somebody else, without a type
        more = {"Bucket": store._bucket, "Key": store._prefix + key}
        store._client.put_object(Body=PAGES[key], **more)
        assert store.get(key, 1 << 30).body == PAGES[key]
        store.put(key, PAGES[key])
        given = store._client.head_object(**more)["ContentType"]
        assert given == "application/octet-stream" or Path(key).suffix, "SeaweedFS goes by the name first"


def test_a_partial_write_counts_as_absent(store: ObjectStore) -> None:
    """An empty object: SeaweedFS stores one when a writer is killed between header and body."""
    for number in range(5):
        store.put(f"cut/{number}", b"" if number != 3 else b"whole")
    with pytest.raises(NotFound):
        store.get("cut/1", 1 << 30)
    assert [one.key for one in store.list_after("cut/", limit=1)] == ["cut/3"]
    assert [one.key for one in list_all(store, "cut/")] == ["cut/3"]
    store.put_if_absent("cut/1", b"again")
    assert store.get("cut/1", 1 << 30).body == b"again"
    with pytest.raises(PreconditionFailed):
        store.put_if_absent("cut/1", b"and again")
    wins = []
    for body in (b"one", b"two"):
        try:
            wins.append(store.put_if_absent("cut/2", body))
        except PreconditionFailed:
            continue
    assert len(wins) == 1


def test_a_missing_object_is_not_found(store: ObjectStore) -> None:
    with pytest.raises(NotFound):
        store.get("nothing", 1 << 30)


def test_put_if_absent_writes_once(store: ObjectStore) -> None:
    store.put_if_absent("once", b"first")
    with pytest.raises(PreconditionFailed):
        store.put_if_absent("once", b"second")
    assert store.get("once", 1 << 30).body == b"first"


def test_put_if_match_replaces_the_version_read(store: ObjectStore) -> None:
    etag = store.put("state", b"1")
    newer = store.put_if_match("state", b"2", etag)
    with pytest.raises(PreconditionFailed):
        store.put_if_match("state", b"3", etag)
    assert (b"2", newer) == store.get("state", 1 << 30)
    with pytest.raises(PreconditionFailed):
        store.put_if_match("missing", b"x", etag)


def test_one_of_many_writers_wins(store: ObjectStore) -> None:
    wins, start = list[int](), threading.Barrier(6)

    def write(number: int) -> None:
        start.wait()
        try:
            store.put_if_absent("race", str(number).encode())
            wins.append(number)
        except PreconditionFailed:
            pass

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert str(wins[0]).encode() == store.get("race", 1 << 30).body


def test_listing_continues_after_a_key_in_byte_order(store: ObjectStore) -> None:
    for key in ("p/b", "p/a0", "p/a/x", "q/z", "p/Z"):
        store.put(key, key.encode())
    assert [o.key for o in store.list_after("p/")] == ["p/Z", "p/a/x", "p/a0", "p/b"]
    assert [o.key for o in store.list_after("p/", after="p/a/x")] == ["p/a0", "p/b"]
    assert [o.key for o in store.list_after("p/", limit=1)] == ["p/Z"]
    assert store.list_after("p/", after="p/b") == []
    assert store.list_after("none/") == []
    (listed,) = store.list_after("q/")
    assert (3, store.get("q/z", 1 << 30).etag) == (listed.size, listed.etag)


EXTENDED = ["a-1/x", "a-1/y", "a.b/x", "a/x", "a/y/1", "a/y-2/1", "a/y.z", "a0/x", "a~/x", "b"]
"""Names of which one extends another, by a character before and after the slash."""


@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
def test_a_name_that_extends_another_is_listed_once(store: ObjectStore, limit: int) -> None:
    for key in EXTENDED:
        store.put(f"e/{key}", key.encode())
    found, after = list[str](), ""
    while page := store.list_after("e/", after, limit):
        found += [one.key for one in page]
        after = page[-1].key
        assert len(found) <= len(EXTENDED)
    assert sorted(found) == sorted(f"e/{key}" for key in EXTENDED)
    for n, key in enumerate(found):
        assert [one.key for one in store.list_after("e/", key)] == found[n + 1 :]
    assert {one.key for one in list_all(store, "e/a")} == {key for key in found if key.startswith("e/a")}
    assert {one.key for one in list_all(store, "e/a/")} == {"e/a/x", "e/a/y/1", "e/a/y-2/1", "e/a/y.z"}


def test_list_pages_are_complete(store: ObjectStore) -> None:
    keys = [f"many/{n:04d}" for n in range(25)]
    for key in keys:
        store.put(key, b"x")
    found, after = [], ""
    while page := store.list_after("many/", after, limit=10):
        found += [o.key for o in page]
        after = page[-1].key
    assert keys == found == [o.key for o in list_all(store, "many/")]


def test_deleting_a_missing_object_is_not_an_error(store: ObjectStore) -> None:
    store.put("gone", b"x")
    store.delete("gone")
    store.delete("gone")
    with pytest.raises(NotFound):
        store.get("gone", 1 << 30)


@pytest.mark.parametrize("key", ["", "x" * 1100, "nul\0"])
def test_an_invalid_key_is_rejected(store: ObjectStore, key: str) -> None:
    with pytest.raises(Refused):
        store.put(key, b"x")


# the directory store only


@pytest.mark.parametrize("key", ["../out", "/abs", "a//b", "a/../b", ".", "a/", ".mlxrack-lock"])
def test_no_key_escapes_the_directory(tmp_path: Path, key: str) -> None:
    with pytest.raises(Refused):
        DirectoryStore(tmp_path / "bucket").put(key, b"x")


def test_a_key_that_is_a_prefix_folder_is_rejected(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    store.put("a/b", b"x")
    with pytest.raises(Refused, match="another key is a folder"):
        store.put_if_absent("a/b/c", b"x")


# S3 only: credentials and the network


def s3(server: SeaweedFS, **change: str) -> S3Store:
    access_key, secret_key = server.ADMIN
    values = {"endpoint": server.endpoint, "bucket": "creds", "access_key": access_key, "secret_key": secret_key}
    return S3Store(**{**values, **change}, attempts=1, connect_timeout_s=1, read_timeout_s=2, call_s=20)


@pytest.mark.parametrize("change", [{"secret_key": "wrong"}, {"access_key": "nobody"}])
@pytest.mark.parametrize(
    "call", [lambda s: s.put_if_absent("k", b"x"), lambda s: s.list_after("raw/")], ids=["put", "list"]
)
def test_refused_credentials_say_what_to_check(
    seaweed: SeaweedFS, change: dict[str, str], call: Callable[[S3Store], object]
) -> None:
    s3(seaweed).create_bucket()
    with pytest.raises(AccessDenied, match=r"check store\.access_key") as caught:
        call(s3(seaweed, **change))
    assert "wrong" not in caught.value.message


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchBucket", AccessDenied),
        (404, "NoSuchKey", NotFound),
        (412, "PreconditionFailed", PreconditionFailed),
        (409, "ConditionalRequestConflict", PreconditionFailed),
        (401, "Unauthorized", AccessDenied),
        (403, "RequestTimeTooSkewed", Halt),
        (429, "TooManyRequests", Retryable),
        (503, "SlowDown", Retryable),
        (500, "InternalError", Retryable),
        (400, "EntityTooLarge", Refused),
        (400, "RequestTimeout", Retryable),
        (405, "MethodNotAllowed", Halt),
        (301, "PermanentRedirect", Halt),
        (501, "NotImplemented", Retryable),
    ],
)
def test_every_store_response_maps_to_one_error(status: int, code: str, kind: type[Exception]) -> None:
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]
    assert kind is type(_translated("put", "k", error))


@pytest.mark.parametrize("status", [301, 400, 403, 405, 413, 429, 500, 503])
@pytest.mark.parametrize(
    "code", ["a\x1b[31mred", "a\nforged: line", "x" * 65, "<b>x</b>", "[x](http://evil)", "a\u202eb", "a b", "é", "a\n"]
)
def test_a_code_that_is_none_is_not_printed(status: int, code: str) -> None:
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]
    said = str(_translated("put", "k", error))
    assert code not in said
    assert said.isprintable()
    assert said.isascii()


@pytest.mark.parametrize(
    ("given", "expected"),
    [("7", 7.0), ("", None), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None), ("9" * 9, None)],
)
def test_retry_after_of_the_store_is_kept(given: str, expected: float | None) -> None:
    metadata = {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": given} if given else {}}
    error = ClientError({"Error": {"Code": "SlowDown"}, "ResponseMetadata": metadata}, "PutObject")  # type: ignore[typeddict-item]
    found = _translated("put", "k", error)
    assert isinstance(found, Retryable)
    assert found.retry_after_s == expected


def test_a_node_credential_reaches_only_its_own_prefix(seaweed: SeaweedFS) -> None:
    s3(seaweed, bucket="scoped").create_bucket()
    node = s3(seaweed, bucket="scoped", access_key="n1", secret_key="n1secretn1secret")
    node.put_if_absent("raw/v1/node=n1/i0001/claim", b"me")
    assert node.get("raw/v1/node=n1/i0001/claim", 1 << 30).body == b"me"
    for forbidden in ("raw/v1/node=n2/i0001/claim", "manifest/v1/0000000001.json"):
        with pytest.raises(AccessDenied):
            node.put_if_absent(forbidden, b"x")


def test_an_unreachable_store_is_retryable_and_recovers(seaweed: SeaweedFS) -> None:
    gate = TcpGate(seaweed.port)
    store = s3(seaweed, endpoint=f"http://127.0.0.1:{gate.port}")
    store.create_bucket()
    gate.shut()
    with pytest.raises(Retryable, match="does not respond"):
        store.put("k", b"x")
    gate.open()
    store.put("k", b"x")
    with pytest.raises(Retryable):
        s3(seaweed, endpoint=f"http://127.0.0.1:{free_port()}").get("k", 1 << 30)
    gate.shut()


def test_clock_skew_comes_from_responses_and_resets_on_clock_changes(seaweed: SeaweedFS) -> None:
    store = seaweed.store("clock")
    assert store.clock_skew_ms is None
    store.create_bucket()
    assert store.clock_skew_ms is not None
    assert abs(store.clock_skew_ms) < 5_000
    store.forget_clock()
    assert store.clock_skew_ms is None
    with pytest.raises(NotFound):
        store.get("nothing", 1 << 30)
    assert store.clock_skew_ms is not None, "a refusal is an answer, too"


def test_ranges_of_an_object(store: ObjectStore) -> None:
    store.put("whole", bytes(range(100)))
    assert store.get_part("whole", 10, 5) == bytes(range(10, 15))
    assert store.get_part("whole", 95, 50) == bytes(range(95, 100))
    assert store.get_part("whole", 100, 5) == b""
    assert store.get_part("whole", 0, 0) == b""
    with pytest.raises(NotFound):
        store.get_part("nothing", 0, 5)


def test_files_of_any_size_round_trip(store: ObjectStore, tmp_path: Path) -> None:
    large = tmp_path / "large file"
    large.write_bytes(bytes(range(256)) * (20 << 12))  # above the size from which S3 clients use multipart uploads
    with large.open("rb") as file:
        store.put_file("models/large", file)
    assert store.get("models/large", 1 << 30).body == large.read_bytes()
    store.put_file("models/large", io.BytesIO(b"small now"))
    assert store.get("models/large", 1 << 30).body == b"small now"
    assert [one.key for one in list_all(store, "models/")] == ["models/large"]
