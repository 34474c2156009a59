"""What the follower says of a bucket that does not answer, and how long it may hold up an exit."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any, cast

from agent.config import AgentConfig, Live, Node
from agent.control.follower import Follower
from shared.batch import MAX_ITEMS, Batch, decode, encode
from shared.desired import parse
from shared.errors import Refused, Retryable
from shared.store import ObjectStore, Stored
from tests.contracts.hostile_store import HTML, hostile


class Bucket:
    """Raises what it is told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.body = b'{"schema": 1, "generation": 1}'
        self.waits: threading.Event | None = None

    def get(self, key: str, most_bytes: int) -> Stored:
        if self.waits is not None:
            self.waits.wait(60)
        if self.error is not None:
            raise self.error
        return Stored(self.body, "e")


def follower(bucket: object, folder: Path) -> Follower:
    config = AgentConfig(node=Node(id="n1", rack="r"))
    nothing: Any = None
    opened = lambda: cast(ObjectStore, bucket)  # noqa: E731
    return Follower(Live(config), nothing, nothing, opened, folder / "desired.json", carried_by_peer=lambda _: False)


async def test_the_present_reason_is_shown_with_the_begin_of_the_trouble(tmp_path: Path) -> None:
    bucket = Bucket()
    follows = follower(bucket, tmp_path)
    assert follows.since_ms is None
    bucket.error = Retryable("503")
    await follows.tick()
    began = follows.since_ms
    bucket.error = Refused("too large")
    await follows.tick()
    assert (follows.observed().reason, follows.since_ms) == ("too large", began)
    assert began is not None
    bucket.error = None
    await follows.tick()
    assert follows.since_ms is None


async def test_a_page_in_the_buckets_place_is_the_reason_shown(tmp_path: Path) -> None:
    with hostile(lambda peer, method, target: peer.answer("200 OK", HTML, "Content-Type: text/html")) as store:
        follows = follower(store, tmp_path)
        await follows.tick()
    assert "not an S3 store" in follows.observed().reason
    assert follows.observed().state == "failed"


async def test_a_generation_beyond_reason_is_refused_and_a_mended_one_followed(tmp_path: Path) -> None:
    bucket = Bucket()
    follows = follower(bucket, tmp_path)
    for generation in (2**50, 10**30):
        bucket.body = b'{"generation": %d, "nodes": {}}' % generation
        await follows.tick()
        found = follows.observed()
        assert (found.generation, found.state) == (0, "failed")
        assert "generation" in found.reason
    bucket.body = b'{"generation": 7, "nodes": {}}'
    await follows.tick()
    assert (follows.observed().generation, follows.observed().reason) == (7, "")


async def test_whatever_is_observed_fits_in_a_batch(tmp_path: Path) -> None:
    bucket = Bucket()
    follows = follower(bucket, tmp_path)
    bucket.error = Refused("x" * 5000)
    await follows.tick()
    assert carried(follows)
    peers = [{"id": f"p{n}", "url": f"http://{'h' * 3000}{n}"} for n in range(MAX_ITEMS + 1)]
    bucket.error, bucket.body = None, json.dumps({"generation": 1, "peers": peers}).encode()
    await asyncio.to_thread(follows._adopted.adopt, parse(bucket.body))
    follows.tell_peers()
    assert len(follows._refused_peers) > MAX_ITEMS
    follows._reason = "y" * 5000
    assert carried(follows)


def carried(follows: Follower) -> bool:
    """Whether a batch with what is observed can be read again."""
    found = follows.observed()
    batch = Batch(rack="r", node="n1", epoch=1, seq=1, t_start_ms=1, t_end_ms=2, records=(found,))
    return decode(encode(batch)).records == (found,)


async def test_a_look_that_hangs_does_not_delay_the_exit(tmp_path: Path) -> None:
    bucket = Bucket()
    bucket.waits = threading.Event()
    follows = follower(bucket, tmp_path)
    looking = asyncio.create_task(follows.tick())
    try:
        while not follows.hangs:
            await asyncio.sleep(0.01)
        looking.cancel()
        await asyncio.wait([looking])
        assert follows.hangs, "the thread goes on, whoever waits for it"
    finally:
        bucket.waits.set()
    while follows.hangs:
        await asyncio.sleep(0.01)
