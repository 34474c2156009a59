"""Every way in which a connection fails has its own sentence, whichever library reports it."""

import asyncio
import errno
import http.client
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import aiohttp
import botocore.exceptions
import pytest
import urllib3
import urllib3.exceptions

from shared import connection_errors
from shared.connection_errors import Kind, causes, kind_of, why
from shared.errors import Retryable
from shared.store_s3 import S3Store

KEY = "the url in peers.nodes"


@contextmanager
def listener(serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """A port that does ``serve`` to each connection; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    serve(connection)

        threading.Thread(target=run, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def closes(connection: socket.socket) -> None:
    connection.recv(4096)


def resets(connection: socket.socket) -> None:
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def speaks_ssh(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
    connection.recv(4096)


def says_nothing(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def by_aiohttp(url: str) -> BaseException:
    async def ask() -> None:
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            await answer.read()

    with pytest.raises((aiohttp.ClientError, TimeoutError, OSError)) as caught:
        asyncio.run(ask())
    return caught.value


def by_urllib3(url: str) -> BaseException:
    with urllib3.PoolManager(retries=False, timeout=2) as pool, pytest.raises(urllib3.exceptions.HTTPError) as caught:
        pool.request("GET", url)
    return caught.value


def by_urllib(url: str) -> BaseException:
    with pytest.raises((OSError, http.client.HTTPException)) as caught:
        urllib.request.urlopen(url, timeout=2)
    return caught.value


LIBRARIES = {"aiohttp": by_aiohttp, "urllib3": by_urllib3, "urllib": by_urllib}


@pytest.mark.parametrize("ask", LIBRARIES.values(), ids=LIBRARIES.keys())
def test_each_failure_of_a_real_connection_is_told_apart(ask: Callable[[str], BaseException]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert kind_of(ask(f"http://127.0.0.1:{taken.getsockname()[1]}")) is Kind.REFUSED
    assert kind_of(ask("http://nowhere.invalid:8470")) is Kind.NAME
    for serve, kind in ((closes, Kind.CLOSED), (resets, Kind.CLOSED), (speaks_ssh, Kind.NOT_HTTP)):
        with listener(serve) as at:
            assert kind_of(ask(f"http://{at}")) is kind, serve.__name__
    with listener(says_nothing) as at:
        assert kind_of(ask(f"http://{at}")) is Kind.SLOW
    with listener(speaks_ssh) as at:
        assert kind_of(ask(f"https://{at}")) is Kind.NOT_TLS


def certificate_error(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "no"
    return error


def wrapped(error: Exception) -> BaseException:
    """As botocore does: an error of urllib3's in an attribute."""
    return botocore.exceptions.SSLError(endpoint_url="https://s3.example.com", error=error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (certificate_error(62), Kind.CERTIFICATE_NAME),
        (certificate_error(64), Kind.CERTIFICATE_NAME),
        (certificate_error(18), Kind.CERTIFICATE_AUTHORITY),
        (certificate_error(20), Kind.CERTIFICATE_AUTHORITY),
        (certificate_error(10), Kind.CERTIFICATE_EXPIRED),
        (certificate_error(9), Kind.CERTIFICATE_EARLY),
        (ssl.SSLEOFError(8, "EOF"), Kind.CLOSED),
        (OSError(errno.EHOSTUNREACH, "no route"), Kind.UNREACHABLE),
        (OSError(errno.ENETUNREACH, "no network"), Kind.UNREACHABLE),
        (OSError(errno.EPERM, "no"), Kind.FORBIDDEN),
        (OSError(errno.EMFILE, "too many"), Kind.FILES),
        (TimeoutError(), Kind.SLOW),
        (ValueError("?"), Kind.OTHER),
    ],
)
def test_the_cause_counts_however_it_is_wrapped(error: Exception, kind: Kind) -> None:
    assert kind_of(error) is kind
    assert kind_of(wrapped(error)) is kind
    outer = RuntimeError()
    outer.__cause__ = error
    assert kind_of(outer) is kind


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_says_what_was_seen_and_what_to_do(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.connection_errors._kind", lambda _: kind)
    for url in ("https://mini-2.local:8470", "http://[fe80::1]/x", "", "http://[", "http://h:port"):
        said = why(OSError(), url, KEY)
        assert "{" not in said
        assert len(said) > 15
    assert "mini-2.local" in why(OSError(), "https://mini-2.local:8470", KEY) or kind is Kind.FILES


def test_a_circle_of_causes_ends() -> None:
    one, two = ValueError(), ValueError()
    one.__cause__, two.__cause__ = two, one
    assert len(list(causes(one))) == 2


def test_a_store_that_cannot_be_reached_says_why() -> None:
    def of(endpoint: str) -> str:
        store = S3Store(
            endpoint=endpoint, bucket="bucket", access_key="a", secret_key="b", attempts=1, read_timeout_s=1
        )
        with pytest.raises(Retryable) as caught:
            store.get("key", 100)
        return caught.value.message

    assert "no address is known for nowhere.invalid; correct store.endpoint" in of("http://nowhere.invalid:9000")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"nothing listens on {at}" in of(f"http://{at}")
    with listener(says_nothing) as at:
        assert f"{at} does not answer in time" in of(f"http://{at}")
    with listener(speaks_ssh) as at:
        assert "http:// that store.endpoint should say" in of(f"https://{at}")


def test_a_ca_that_is_not_known_leads_to_the_key_that_names_one() -> None:
    error = certificate_error(20)
    assert why(error, "https://s", "store.endpoint", ca="store.ca").endswith(
        "set store.ca to the file of that CA's certificate"
    )
    assert why(error, "https://s", "the url").endswith("not known here; add it")


@pytest.mark.parametrize(
    ("on_mac", "number", "told"),
    [(True, errno.EHOSTUNREACH, True), (True, errno.ENETUNREACH, False), (False, errno.EHOSTUNREACH, False)],
)
def test_no_route_on_a_mac_may_be_local_network_privacy(
    monkeypatch: pytest.MonkeyPatch, on_mac: bool, number: int, told: bool
) -> None:
    monkeypatch.setattr(connection_errors, "ON_MAC", on_mac)
    said = why(wrapped(OSError(number, "x")), "http://mini-2.local:8470", KEY)
    assert said.startswith(f"{connection_errors.NO_ROUTE} mini-2.local; check its address")
    assert ("Local Network privacy (macOS 15 and newer)" in said) is told
