"""Whatever answers in a store's place, a call ends with one of the store's errors, within its time and memory."""

import io
import itertools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import NotFound, Refused, Retryable
from shared.store import ObjectStore, each, list_all
from shared.store_dir import DirectoryStore
from shared.store_s3 import S3Store
from tests.contracts.hostile_store import HTML, Fault, Peer, hostile, listing

MOST = 1 << 20
CALL_S = 0.5


def put_file(store: ObjectStore) -> None:
    with Path(__file__).open("rb") as file:
        store.put_file("k", file)


CALLS: dict[str, Callable[[S3Store], object]] = {
    "get": lambda store: store.get("raw/k", MOST),
    "get_part": lambda store: store.get_part("raw/k", 5, 10),
    "put": lambda store: store.put("raw/k", b"x" * 1000),
    "put_if_absent": lambda store: store.put_if_absent("raw/k", b"x"),
    "put_if_match": lambda store: store.put_if_match("raw/k", b"x", "e"),
    "put_file": put_file,
    "list": lambda store: store.list_after("raw/"),
}
TAG = 'ETag: "abc"'


def redirect(status: str, there: str = "http://127.0.0.1:9/portal") -> Fault:
    return lambda peer, method, target: peer.answer(status, HTML, f"Location: {there}", "Content-Type: text/html")


def page(status: str, *headers: str) -> Fault:
    return lambda peer, method, target: peer.answer(status, HTML, "Content-Type: text/html", *headers)


def body(content: bytes, *headers: str, length: int | None = None) -> Fault:
    def fault(peer: Peer, method: str, target: str) -> None:
        peer.answer("200 OK", content, *headers, length=length)
        if length is not None:
            peer.sock.shutdown(socket.SHUT_RDWR)

    return fault


NOT_A_STORE: dict[str, Fault] = {
    "a page": page("200 OK"),
    "a page with an ETag": page("200 OK", TAG),
    "a page with a weak ETag": page("200 OK", f'ETag: W/"{"0" * 32}"'),
    "a page with a proxy's ETag": page("200 OK", 'ETag: "5f1b-62a3c0de"'),
    "a page of a portal in XHTML": body(HTML, TAG, "Content-Type: Application/XHTML+xml; charset=utf-8"),
    "nothing": body(b""),
    "no ETag": body(b"{}", "Content-Type: application/json"),
    "an empty ETag": body(b"{}", 'ETag: ""'),
    "301": redirect("301 Moved Permanently"),
    "302": redirect("302 Found"),
    "303": redirect("303 See Other"),
    "307": redirect("307 Temporary Redirect"),
    "308": redirect("308 Permanent Redirect", ""),
    "a page with 401": page("401 Unauthorized"),
    "a page with 403": page("403 Forbidden"),
    "a page with 404": page("404 Not Found"),
    "a page with 407": page("407 Proxy Authentication Required"),
    "a page with 511": page("511 Network Authentication Required"),
}


def refusals(store: S3Store) -> dict[str, str]:
    """What each call says."""
    found = {}
    for name, call in CALLS.items():
        with pytest.raises(Retryable) as caught:
            call(store)
        found[name] = caught.value.message
    return found


@pytest.mark.parametrize("fault", NOT_A_STORE)
def test_what_is_no_store_is_named_as_such(fault: str) -> None:
    with hostile(NOT_A_STORE[fault]) as store:
        for call, message in refusals(store).items():
            assert "not an S3 store; check store.endpoint" in message, (call, message)


def cut(answer: bytes) -> Fault:
    def fault(peer: Peer, method: str, target: str) -> None:
        peer.send(answer)
        peer.sock.shutdown(socket.SHUT_RDWR)

    return fault


BROKEN: dict[str, Fault] = {
    "cut in the head": cut(b"HTTP/1.1 200 O"),
    "closed": cut(b""),
    "no HTTP": cut(b"220 smtp.example ESMTP\r\n" * 3),
    "a length that is none": cut(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\nETag: x\r\n\r\nx"),
    "a million headers": cut(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1_000_000),
    "a header without end": cut(b"HTTP/1.1 200 OK\r\nA: " + b"b" * (32 << 20)),
    "a date that is none": cut(b"HTTP/1.1 200 OK\r\nDate: Thu, 99 Nov 99999999999 00:00:00 GMT\r\n\r\n"),
    "a busy store": page("503 Slow Down"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_answer_is_tried_again_later(fault: str) -> None:
    with hostile(BROKEN[fault]) as store:
        assert refusals(store).keys() == CALLS.keys()


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_drip_ends_with_the_call(where: str) -> None:
    head = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Range: bytes 5-14/100\r\nContent-Length: 10000\r\n\r\n'

    def fault(peer: Peer, method: str, target: str) -> None:
        if where == "body":
            peer.send(head)
        peer.drip(b"X" * 10_000 if where == "body" else head + b"X" * 10_000)

    with hostile(fault, call_s=CALL_S) as store:
        before = time.monotonic()
        assert refusals(store).keys() == CALLS.keys()
        assert time.monotonic() - before < 100, "one drip alone goes on for 500 s"


def test_a_reader_that_never_reads_ends_an_upload() -> None:
    def fault(peer: Peer, method: str, target: str) -> None:
        peer.ended.wait(60)

    with hostile(fault, call_s=CALL_S) as store, pytest.raises(Retryable):
        store.put("k", bytes(64 << 10))


@pytest.mark.parametrize("status", ["200 OK", "206 Partial Content", "400 Bad Request", "404 Not Found"])
def test_an_endless_answer_is_cut_off(status: str) -> None:
    sent = itertools.count()

    def fault(peer: Peer, method: str, target: str) -> None:
        peer.send(
            f"HTTP/1.1 {status}\r\n{TAG}\r\nContent-Range: bytes 5-9/10\r\nContent-Length: {1 << 40}\r\n\r\n".encode()
        )
        while not peer.ended.is_set():
            peer.send(bytes(1 << 20))
            next(sent)

    with hostile(fault) as store:
        for name in ("get", "get_part", "put", "list"):
            with pytest.raises((Retryable, Refused)):
                CALLS[name](store)
    assert next(sent) < 100, "in MiB: what four calls read at most, and what the sockets hold"


def test_a_truncated_body_is_no_object() -> None:
    with hostile(body(b"half", TAG, "Content-Range: bytes 5-14/100", length=100)) as store:
        for call in ("get", "get_part"):
            with pytest.raises(Retryable):
                CALLS[call](store)


def test_another_part_than_was_asked_for_is_not_taken() -> None:
    with hostile(body(b"0123456789" * 9, TAG)) as store, pytest.raises(Retryable, match="another part"):
        store.get_part("k", 5, 10)


@pytest.mark.parametrize(
    "answer",
    {
        "not XML": b"{}",
        "half of it": listing("raw/a")[:-20],
        "another document": b"<html><body/></html>",
        "not complete": listing("raw/a", head=""),
        "other keys": listing("raw/a", "report/b"),
        "out of order": listing("raw/b", "raw/a"),
        "in two orders": listing("raw/a-b/x", "raw/a/x", "raw/a-c/x"),
        "one twice": listing("raw/a", "raw/a"),
        "a size that is none": listing("raw/a", size="big"),
        "entities": b'<!DOCTYPE a [<!ENTITY b "x">]><ListBucketResult>&c;</ListBucketResult>',
        "no key": b"<L><IsTruncated>false</IsTruncated><Contents><Size>1</Size></Contents></L>",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_listing_that_is_none_is_not_believed(answer: tuple[str, bytes]) -> None:
    with hostile(body(answer[1])) as store, pytest.raises(Retryable, match="not an S3 store"):
        store.list_after("raw/")


@pytest.mark.parametrize("names", [("a-b/x", "a.b/x", "a/x"), ("a/x", "a-b/x", "a.b/x")])
def test_either_order_of_names_is_a_listing(names: tuple[str, ...]) -> None:
    with hostile(body(listing(*(f"raw/{name}" for name in names)))) as store:
        assert [one.key for one in store.list_after("raw/")] == [f"raw/{name}" for name in names]


def test_a_listing_that_never_advances_ends() -> None:
    with hostile(body(listing("raw/a"))) as store:
        assert [one.key for one in store.list_after("raw/")] == ["raw/a"]
        with pytest.raises(Retryable, match="in order"):
            list_all(store, "raw/")


def test_a_listing_that_always_advances_ends() -> None:
    numbers = itertools.count()

    def fault(size: str) -> Fault:
        return lambda peer, method, target: peer.answer(
            "200 OK", listing(*(f"raw/{next(numbers):09}" for _ in range(3)), size=size)
        )

    with hostile(fault("0")) as store, pytest.raises(Retryable, match="empty objects"):
        store.list_after("raw/")
    with hostile(fault("1")) as store:
        with pytest.raises(Refused, match="more than 50 objects"):
            list_all(store, "raw/", most=50)
        assert len(list(itertools.islice(each(store, "raw/"), 100))) == 100


def test_an_object_over_its_readers_bound_is_refused_unread(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "bucket")
    with (tmp_path / "bucket" / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Refused, match="more than 1,048,576 bytes") as caught:
        store.get("huge", MOST)
    assert caught.value.code == "too_large"
    assert store.get_part("huge", 1 << 39, 3) == b"\0\0\0"


def test_a_link_out_of_the_directory_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"secret")
    (tmp_path / "real").mkdir()
    (tmp_path / "bucket").symlink_to(tmp_path / "real")
    store = DirectoryStore(tmp_path / "bucket")
    store.put("a/inside", b"x")
    (tmp_path / "bucket/a/link").symlink_to(tmp_path / "secret")
    (tmp_path / "bucket/a/near").symlink_to(tmp_path / "bucket/a/inside")
    (tmp_path / "bucket/b").symlink_to(tmp_path / "outside")
    for call in (
        lambda key: store.get(key, MOST),
        lambda key: store.get_part(key, 0, 3),
        lambda key: store.put(key, b"y"),
        lambda key: store.put_if_absent(key, b"y"),
        lambda key: store.put_file(key, io.BytesIO(b"y")),
        lambda key: store.delete(key),
    ):
        for key in ("a/link", "b/x"):
            with pytest.raises(Refused, match="a link leads out"):
                call(key)
    assert (tmp_path / "secret").read_bytes() == (tmp_path / "outside/x").read_bytes() == b"secret"
    assert [one.key for one in list_all(store, "")] == ["a/inside", "a/near"]
    assert list_all(store, "b/") == []


def test_a_pipe_in_the_directory_makes_nobody_wait(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="not a regular file"):
        store.get("pipe", MOST)
    assert list_all(store, "") == []
    with pytest.raises(NotFound):
        store.get("nothing", MOST)
