"""One run at a time, on whichever host cron started it: an object that names the holder and an expiry.

The lease only avoids duplicate work. Data are protected by the conditional writes in publish.py.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec

from aggregator.raw.cleaning import MOST_LABEL, text
from shared.errors import NotFound, PreconditionFailed, Retryable
from shared.keys import MOST_LEASE_BYTES
from shared.store import ObjectStore

TTL_S = 900
ALERT_TTL_S = 180
"""Short, so that a killed run does not suspend alerts for long."""
SKEW_S = 600
"""How far the clocks of two hosts may be apart. A lease that ends later than any run may ask for was written under a
wrong clock."""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """``holder`` is running; after ``until_ms`` any run may take over."""

    holder: str
    until_ms: int

    def is_held(self, now_ms: int, ttl_s: int) -> bool:
        """Whether a run holds it now."""
        return now_ms < self.until_ms <= now_ms + (ttl_s + SKEW_S) * 1000


@contextlib.contextmanager
def held(store: ObjectStore, verb: str) -> Iterator[None]:
    """Hold the lease of a verb. Raises Retryable (code busy) when another run holds it."""
    key = f"state/v1/lease-{verb}.json"
    etag = _take(store, key, verb)
    try:
        yield
    finally:
        released = msgspec.json.encode(Lease(holder="", until_ms=0))
        with contextlib.suppress(PreconditionFailed, Retryable):
            store.put_if_match(key, released, etag)


def _take(store: ObjectStore, key: str, verb: str) -> str:
    now_ms, ttl_s = time.time_ns() // 1_000_000, ALERT_TTL_S if verb == "alert" else TTL_S
    mine = msgspec.json.encode(Lease(holder=f"{socket.gethostname()}:{os.getpid()}", until_ms=now_ms + ttl_s * 1000))
    try:
        found = store.get(key, MOST_LEASE_BYTES)
    except NotFound:
        with contextlib.suppress(PreconditionFailed):
            return store.put_if_absent(key, mine)
        raise _busy(verb, "just started") from None
    try:
        lease = msgspec.json.decode(found.body, type=Lease)
    except (msgspec.DecodeError, RecursionError):
        lease = Lease(holder="", until_ms=0)  # an unreadable lease counts as free
    if lease.is_held(now_ms, ttl_s):
        end = datetime.fromtimestamp(lease.until_ms / 1000, UTC)
        raise _busy(verb, f"{text(lease.holder, MOST_LABEL)}, until {end:%Y-%m-%d %H:%M:%S} UTC at most")
    try:
        return store.put_if_match(key, mine, found.etag)
    except PreconditionFailed:
        raise _busy(verb, "just started") from None


def _busy(verb: str, holder: str) -> Retryable:
    return Retryable(f"{verb}: another run ({holder}) holds the lease", code="busy")
