"""The object store as both programs see it: eight calls, with the promises each backend must keep.

One contract suite (tests/contracts) runs on every implementation. Calls block; the agent makes them in a thread.
"""

from pathlib import Path
from typing import NamedTuple, Protocol


class Listed(NamedTuple):
    """One line of a listing."""

    key: str
    size: int
    etag: str


class Stored(NamedTuple):
    """An object's bytes and the etag they had when they were read."""

    body: bytes
    etag: str


class ObjectStore(Protocol):
    """Objects by key, with conditional writes.

    ``clock_skew_ms`` is this machine's clock less the store's, as its last answer told; None where it tells none.

    An object without content is what a write leaves that was cut off before its body (SeaweedFS stores one when the
    writer dies between the two): `get` and `list_after` do not see it, `put_if_absent` writes over it. Nobody here
    writes one on purpose.

    Every call raises Retryable when the store does not answer or asks to wait, AccessDenied when it refuses the
    credentials, and Refused when the request itself can never succeed.
    """

    @property
    def clock_skew_ms(self) -> int | None:
        """Within a second: that is what an answer's date tells."""
        ...

    def forget_clock(self) -> None:
        """This machine's clock was set: ``clock_skew_ms`` is None until the next answer."""
        ...

    def put(self, key: str, body: bytes) -> str:
        """Write, whatever was there; returns the etag."""
        ...

    def put_if_absent(self, key: str, body: bytes) -> str:
        """Write only if nothing is there; returns the etag. Raises PreconditionFailed when something is."""
        ...

    def put_if_match(self, key: str, body: bytes, etag: str) -> str:
        """Write only over the object with this etag; returns the new one. Raises PreconditionFailed otherwise."""
        ...

    def get(self, key: str) -> Stored:
        """Read. Raises NotFound."""
        ...

    def get_part(self, key: str, start: int, length: int) -> bytes:
        """At most ``length`` bytes from ``start`` on; fewer at the end, none beyond it. Raises NotFound."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Write a file of any size, whatever was there."""
        ...

    def list_after(self, prefix: str, after: str = "", limit: int = 1000) -> list[Listed]:
        """At most ``limit`` objects under ``prefix`` whose key sorts (by bytes) after ``after``, in order."""
        ...

    def delete(self, key: str) -> None:
        """Remove; no error when there is nothing. Nothing may depend on it having worked."""
        ...


def list_all(store: ObjectStore, prefix: str, after: str = "") -> list[Listed]:
    """Every object under ``prefix`` after ``after``, page by page."""
    found: list[Listed] = []
    while True:
        page = store.list_after(prefix, after)
        if not page:
            return found
        found += page
        after = page[-1].key
