"""What heartbeats tell of the rack's limits reaches them, from any version, and in time or not at all."""

import asyncio
from typing import Any, cast

import msgspec
import pytest

from agent.mesh.heartbeats import Heartbeats
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import Heartbeat, PeerTable
from agent.policy.limits.book import Book, Now
from agent.policy.limits.limit import Limit, Name
from agent.policy.limits.share import Share

LIMIT = Limit(Name("key:a", "day", "requests"), 10)


class Peer:
    """Answers every heartbeat after ``after_s`` of the test's clock."""

    def __init__(self, now: list[float], answer: Heartbeat, after_s: float) -> None:
        self.now, self.answer, self.after_s = now, answer, after_s

    async def heartbeat(self, *_: object) -> Heartbeat:
        self.now[0] += self.after_s
        return self.answer

    def drop(self, _: str) -> None:
        pass


@pytest.mark.parametrize(("after_s", "reached"), [(0.0, 1), (0.9, 1), (30.0, 0)])
async def test_shares_are_passed_on_unless_their_answer_is_old(after_s: float, reached: int) -> None:
    share = Share(owner="key:a", span="day", unit="requests", used=3)
    now, heard = [0.0], list[Any]()
    peer = Peer(now, Heartbeat(node="n2", rack="r", shares=(share,)), after_s)
    table = PeerTable([("n2", "http://n2")], beat_s=1.0, now=0.0)
    heartbeats = Heartbeats(
        *(table, cast(PeerClient, peer), lambda _: None),
        rack="r",
        beat_s=1.0,
        clock=lambda: now[0],
        slept=lambda: 0.0,
        on_shares=lambda node, shares: heard.append((node, shares)),
    )
    await heartbeats.tick()
    await asyncio.gather(*heartbeats._tasks)
    assert heard == [("n2", (share,))] * reached


def test_older_and_newer_versions_understand_each_other() -> None:
    share = Share(owner="key:a", span="fortnight", unit="joules", used=3)
    newer = msgspec.to_builtins(Heartbeat(node="n2", rack="r", shares=(share,)))
    newer["shares"][0]["of_tomorrow"] = 1
    told = msgspec.convert(newer, type=Heartbeat)
    book = Book("n1", Now(0.0, 1e9))
    book.become([LIMIT], ["n1", "n2"], Now(0.0, 1e9))
    book.heard("n2", told.shares, Now(1.0, 1e9 + 1))
    assert book.ledger(LIMIT, Now(1.0, 1e9 + 1)).left(1.0) == 5
    del newer["shares"]
    assert msgspec.convert(newer, type=Heartbeat).shares == ()
