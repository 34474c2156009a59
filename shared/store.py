"""The object store interface of both programs: eight calls and the guarantees of every backend.

One contract suite (tests/contracts) runs against every implementation. Calls block; the agent makes them in a thread.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

from shared.errors import NotFound, Refused

MOST_LISTED = 1_000_000
"""Objects that `list_all` holds in memory: 500 MB."""


class Listed(NamedTuple):
    """One entry of a listing. ``stored_ms`` is when the store last wrote it, 0 if it does not say."""

    key: str
    size: int
    etag: str
    stored_ms: int = 0


class Stored(NamedTuple):
    """An object's bytes and their etag when read."""

    body: bytes
    etag: str


class ObjectStore(Protocol):
    """Objects by key, with conditional writes.

    ``clock_skew_ms`` is this machine's clock minus the store's, from its last response; None if the store has none.

    An empty object is what an interrupted write leaves behind (SeaweedFS stores one when the writer dies before the
    body): `get` and `list_after` ignore it, `put_if_absent` overwrites it. Neither program means to write one.

    No call goes on for ever: its deadline counts from its beginning, however slowly bytes arrive, and grows with the
    bytes of a large object. Every call raises Retryable when the store does not respond or asks to wait, or when what
    answers cannot be a store (a proxy, a captive portal), AccessDenied when it rejects the
    credentials, and Refused when the request itself can never succeed.
    """

    @property
    def clock_skew_ms(self) -> int | None:
        """Accurate to a second, the resolution of the Date header."""

    def forget_clock(self) -> None:
        """This machine's clock was set: ``clock_skew_ms`` is None until the next response."""

    def put(self, key: str, body: bytes) -> str:
        """Write unconditionally; returns the etag."""

    def put_if_absent(self, key: str, body: bytes) -> str:
        """Write only if the key does not exist; returns the etag. Raises PreconditionFailed if it does."""

    def put_if_match(self, key: str, body: bytes, etag: str) -> str:
        """Replace only the object with this etag; returns the new one. Raises PreconditionFailed otherwise."""

    def get(self, key: str, most_bytes: int) -> Stored:
        """Read an object of at most ``most_bytes``. Raises NotFound, and Refused (code too_large) for a larger one, of
        which no more than that is read."""

    def get_part(self, key: str, start: int, length: int) -> bytes:
        """At most ``length`` bytes from offset ``start``; fewer at the end, none beyond it. Raises NotFound."""

    def put_file(self, key: str, file: BinaryIO) -> None:
        """Upload an open file of any size, from where it stands to its end, unconditionally. It is read once."""

    def list_after(self, prefix: str, after: str = "", limit: int = 1000) -> list[Listed]:
        """At most ``limit`` objects under ``prefix`` whose key comes after ``after``, in the store's order: by bytes,
        or folder by folder (SeaweedFS lists a/x before a-b/x). Within one folder the two are the same."""

    def delete(self, key: str) -> None:
        """Delete; no error if the key does not exist. Callers must not depend on success."""


def too_large(what: str, most_bytes: int) -> Refused:
    """The error for an object that exceeds its reader's bound."""
    return Refused(f"{what}: it has more than {most_bytes:,} bytes, the limit for this object", code="too_large")


def find(store: ObjectStore, key: str, most_bytes: int) -> Stored | None:
    """The object, or None if there is none. Raises Refused like `get`."""
    try:
        return store.get(key, most_bytes)
    except NotFound:
        return None


def each(store: ObjectStore, prefix: str, after: str = "") -> Iterator[Listed]:
    """Every object under ``prefix`` after ``after``; one page at a time is in memory."""
    while page := store.list_after(prefix, after):
        yield from page
        after = page[-1].key


def list_all(store: ObjectStore, prefix: str, after: str = "", most: int = MOST_LISTED) -> list[Listed]:
    """Every object under ``prefix`` after ``after``. Raises Refused for more than ``most``."""
    found: list[Listed] = []
    for one in each(store, prefix, after):
        if len(found) == most:
            raise Refused(f"list {prefix}: more than {most:,} objects; is another rack's data in this bucket?")
        found.append(one)
    return found
