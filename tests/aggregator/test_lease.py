"""Which lease keeps a run from starting, and what is said of it."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.lease import ALERT_TTL_S, SKEW_S, TTL_S, Lease, held
from shared.errors import Retryable
from shared.store_dir import DirectoryStore

DAY_MS = 86_400_000


def left(folder: Path, verb: str, holder: str, until_ms: int) -> DirectoryStore:
    """A bucket with the lease of a run that was killed."""
    store = DirectoryStore(folder)
    store.put(f"state/v1/lease-{verb}.json", json.dumps({"holder": holder, "until_ms": until_ms}).encode())
    return store


@pytest.mark.parametrize("verb", ["rollup", "alert"])
@pytest.mark.parametrize("ahead_ms", [DAY_MS, 365 * DAY_MS, 2**62, 2**63, 10**28, -1, -DAY_MS])
def test_a_lease_that_no_run_can_have_taken_now_is_free(tmp_path: Path, verb: str, ahead_ms: int) -> None:
    store = left(tmp_path, verb, "host:1", time.time_ns() // 1_000_000 + ahead_ms)
    with held(store, verb):
        pass


@pytest.mark.parametrize(("verb", "ttl_s"), [("rollup", TTL_S), ("alert", ALERT_TTL_S)])
def test_a_lease_of_a_host_whose_clock_is_minutes_ahead_holds(tmp_path: Path, verb: str, ttl_s: int) -> None:
    until_ms = time.time_ns() // 1_000_000 + (ttl_s + SKEW_S // 2) * 1000
    store = left(tmp_path, verb, "h\n\x1b[31m\u202e" + "x" * 200, until_ms)
    with pytest.raises(Retryable) as caught, held(store, verb):
        pass
    assert caught.value.code == "busy"
    assert caught.value.message.isprintable()
    assert time.strftime("until %Y-%m-%d %H:%M:%S UTC", time.gmtime(until_ms // 1000)) in caught.value.message
    assert len(caught.value.message) < 250


@given(st.integers(0, 2**50), st.integers(-(2**60), 2**60), st.sampled_from((TTL_S, ALERT_TTL_S)))
def test_no_lease_holds_for_longer_than_a_run_may_ask_for(now_ms: int, until_ms: int, ttl_s: int) -> None:
    lease = Lease(holder="h", until_ms=until_ms)
    assert not lease.is_held(until_ms, ttl_s)
    assert lease.is_held(now_ms, ttl_s) == (0 < until_ms - now_ms <= (ttl_s + SKEW_S) * 1000)
    assert lease.is_held(until_ms - ttl_s * 1000, ttl_s)
