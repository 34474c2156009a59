"""The object store interface of both programs: eight calls and the guarantees of every backend.

One contract suite (tests/contracts) runs against every implementation. Calls block; the agent makes them in a thread.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

from shared.errors import NotFound


class Listed(NamedTuple):
    """One entry of a listing."""

    key: str
    size: int
    etag: str


class Stored(NamedTuple):
    """An object's bytes and their etag when read."""

    body: bytes
    etag: str


class ObjectStore(Protocol):
    """Objects by key, with conditional writes.

    ``clock_skew_ms`` is this machine's clock minus the store's, from its last response; None if the store has none.

    An empty object is what an interrupted write leaves behind (SeaweedFS stores one when the writer dies before the
    body): `get` and `list_after` ignore it, `put_if_absent` overwrites it. Neither program means to write one.

    Every call raises Retryable when the store does not respond or asks to wait, AccessDenied when it rejects the
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

    def get(self, key: str) -> Stored:
        """Read an object. Raises NotFound."""

    def get_part(self, key: str, start: int, length: int) -> bytes:
        """At most ``length`` bytes from offset ``start``; fewer at the end, none beyond it. Raises NotFound."""

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file of any size, unconditionally."""

    def list_after(self, prefix: str, after: str = "", limit: int = 1000) -> list[Listed]:
        """At most ``limit`` objects under ``prefix`` whose key sorts (by bytes) after ``after``, in order."""

    def delete(self, key: str) -> None:
        """Delete; no error if the key does not exist. Callers must not depend on success."""


def find(store: ObjectStore, key: str) -> Stored | None:
    """The object, or None if there is none."""
    try:
        return store.get(key)
    except NotFound:
        return None


def list_all(store: ObjectStore, prefix: str, after: str = "") -> list[Listed]:
    """Every object under ``prefix`` after ``after``, page by page."""
    found: list[Listed] = []
    while True:
        if not (page := store.list_after(prefix, after)):
            return found
        found += page
        after = page[-1].key
