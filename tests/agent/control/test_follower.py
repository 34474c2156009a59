"""What the follower says of a bucket that does not answer, and how long it may hold up an exit."""

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

from agent.config import AgentConfig, Node
from agent.control.follower import Follower
from shared.errors import Refused, Retryable
from shared.store import ObjectStore, Stored
from tests.contracts.hostile_store import HTML, hostile


class Bucket:
    """Raises what it is told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.waits: threading.Event | None = None

    def get(self, key: str, most_bytes: int) -> Stored:
        if self.waits is not None:
            self.waits.wait(60)
        if self.error is not None:
            raise self.error
        return Stored(b'{"schema": 1, "generation": 1}', "e")


def follower(bucket: object, folder: Path) -> Follower:
    config = AgentConfig(node=Node(id="n1", rack="r"))
    nothing: Any = None
    opened = lambda: cast(ObjectStore, bucket)  # noqa: E731
    return Follower(config, nothing, nothing, opened, folder / "desired.json", carried_by_peer=lambda _: False)


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
