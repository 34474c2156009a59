"""Taints of several nodes in one process: what is known where, and when that counts as incomplete."""

import asyncio
import errno
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.config import AgentConfig, Live, Node, Taint
from agent.gateway import taint_peers
from agent.gateway.taints import Taints
from agent.mesh.peers import Heartbeat, PeerTable
from agent.mesh.signing import RackKeys
from agent.policy.taint import LOST
from agent.wire.frames import Message, ToolCall
from shared.errors import Refused, Retryable
from shared.records import TaintChanged

SECRET = "a rack secret of the tests, long enough"


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


class Site:
    """Nodes that reach each other by calls; ``cut`` are (from, to) that do not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 0.0
        self.nodes: dict[str, Made] = {}
        self.cut: set[tuple[str, str]] = set()
        self.hanging: set[str] = set()
        self.asked: list[tuple[str, str]] = []

    def add(self, *names: str, secret: str = SECRET, **more: Any) -> "list[Made]":
        made = [Made(self, name, secret, Taint(**more)) for name in names]
        self.nodes |= {one.name: one for one in made}
        for one in self.nodes.values():
            others = [(name, f"http://{name}") for name in self.nodes if name != one.name]
            one.table.become(others, self.now)
        for one in made:
            one.taints.start()
        return made

    def beat(self, s: float = 1.0) -> None:
        """Time passes, and every node hears every other that it can reach."""
        self.now += s
        for one in self.nodes.values():
            for other in self.nodes.values():
                if other is one:
                    continue
                if not other.runs or {(one.name, other.name), (other.name, one.name)} & self.cut:
                    one.table.missed(other.name, self.now)
                    continue
                held = None if other.older else other.taints.beat()
                heartbeat = Heartbeat(node=other.name, rack="r", taints=held)
                one.table.heard(other.name, heartbeat, self.now)
                one.taints.heard(other.name, heartbeat)
            one.taints._peers.tick()

    async def settle(self, done: Callable[[], object], what: str) -> None:
        """Beat until done."""
        for _ in range(600):
            if done():
                return
            self.beat()
            await asyncio.sleep(0.01)
        raise AssertionError(f"never: {what}: {[one.taints.view() for one in self.nodes.values()]}")

    async def ready(self) -> None:
        """Wait until every node knows everything."""
        await self.settle(lambda: all(one.taints.state == "ready" for one in self.nodes.values() if one.runs), "ready")


class Made:
    """One node. It is its own client: ``post`` calls the other's handler."""

    def __init__(self, site: Site, name: str, secret: str, taint: Taint) -> None:
        self.site, self.name, self.runs, self.older = site, name, True, False
        self.live = Live(AgentConfig(node=Node(id=name, rack="r"), taint=taint))
        self.table = PeerTable((), beat_s=1.0, now=site.now)
        self.events: list[Any] = []
        keys = RackKeys((secret,) if secret else ())
        client: Any = self
        folder = site.folder / name
        self.taints = Taints(
            folder, self.live, self.table, client, keys, self.events.append, clock=lambda: site.now, wall_ms=lambda: 1
        )

    async def post(self, node: str, url: str, path: str, body: bytes, timeout_s: float) -> bytes:
        assert (url, path) == (f"http://{node}", "/peer/v1/taints")
        self.site.asked.append((self.name, node))
        other = self.site.nodes[node]
        if node in self.site.hanging:
            await asyncio.sleep(timeout_s)
            raise Retryable(f"peer {url}: does not answer in time")
        if not other.runs or (self.name, node) in self.site.cut:
            raise Retryable(f"peer {url}: nothing listens there")
        return await other.taints.answered(self.name, body)

    async def stop(self) -> None:
        self.runs = False
        await self.taints.close()

    def sees(self, text: str) -> str | None:
        return self.taints.seen(user(text))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    yield made
    for one in made.nodes.values():
        if one.runs:
            await one.stop()


async def test_what_was_sensitive_at_one_node_is_so_at_every_other_once_it_is_added(site: Site) -> None:
    a, b, c = site.add("a", "b", "c")
    await site.ready()
    assert a.sees("my diagnosis") is None
    await a.taints.add(user("My diagnosis!"))
    assert [one.sees("my  diagnosis") for one in (a, b, c)] == ["taint"] * 3, "with no heartbeat in between"
    await b.taints.add_text("It is benign.")
    called = Message(role="assistant", content="", calls=(ToolCall(id="1", name="f", arguments='{"icd": "E11"}'),))
    await c.taints.add([called])
    assert [one.sees("it is benign") for one in (a, b, c)] == ["taint"] * 3
    assert [one.taints.seen([called]) for one in (a, b, c)] == ["taint"] * 3
    assert [one.sees("something else") for one in (a, b, c)] == [None] * 3
    assert await a.taints.look(user("my diagnosis")) == "taint"


async def test_long_conversations_are_looked_at_in_a_thread_with_the_same_result(site: Site) -> None:
    (a,) = site.add("a")
    await site.ready()
    long = "Ein langer Befund. " * 20_000
    assert await a.taints.look(user(long)) is None
    await a.taints.add(user(long))
    assert (a.sees(long), await a.taints.look(user(long.upper()))) == ("taint", "taint")
    assert await a.taints.look(user(long + "x")) is None
    many = [Message(role="user", content=str(n)) for n in range(1000)]
    assert await a.taints.look(many) is None
    a.taints.note(many[500:501])
    assert await a.taints.look(many) == "taint"


async def test_marks_outlive_the_node_that_made_them_and_a_lost_folder(site: Site, tmp_path: Path) -> None:
    a, b = site.add("a", "b")
    await site.ready()
    await a.taints.add(user("my diagnosis"))
    await a.stop()
    await b.stop()
    (again,) = site.add("b")
    assert again.sees("anything") == "taint_not_loaded", "before its file is read"
    await site.ready()
    assert again.sees("my diagnosis") == "taint", "from its own disk, a is down"
    assert again.sees("anything") is None
    (fresh,) = site.add("c")
    await site.ready()
    assert fresh.sees("my diagnosis") == "taint", "from b, which got it from a"
    for path in (tmp_path / "a/taints").iterdir():
        path.unlink()
    (returned,) = site.add("a")
    await asyncio.sleep(0.05)
    assert returned.sees("anything") == "taint_not_loaded"
    await site.ready()
    assert returned.sees("my diagnosis") == "taint"


async def test_a_node_that_was_away_fetches_before_it_counts_as_loaded(site: Site) -> None:
    a, b = site.add("a", "b")
    await site.ready()
    site.cut = {("a", "b"), ("b", "a")}
    for _ in range(5):
        site.beat()
    await a.taints.add(user("said at a"))
    await b.taints.add(user("said at b"))
    assert (a.sees("said at b"), b.sees("said at a")) == (None, None), "the gap that remains"
    site.cut.clear()
    a.table.heard("b", Heartbeat(node="b", rack="r"), site.now)
    assert a.sees("anything") == "taint_not_loaded", "b is back, and what it knows is not here yet"
    await site.ready()
    assert (a.sees("said at b"), b.sees("said at a")) == ("taint", "taint")
    assert a.sees("anything") is None


async def test_with_every_peer_a_peer_that_is_away_makes_everything_sensitive(site: Site) -> None:
    a, b = site.add("a", "b", every_peer=True)
    await site.ready()
    assert a.sees("anything") is None
    site.cut = {("a", "b")}
    site.beat()
    assert a.sees("anything") == "taint_not_loaded"
    for _ in range(5):
        site.beat()
    assert a.sees("anything") == b.sees("anything") == "taint_not_loaded"
    assert "b is away" in a.taints.view()["why"]
    a.live.replace(AgentConfig(node=Node(id="a", rack="r")))
    assert a.sees("anything") is None


async def test_a_peer_that_hangs_costs_a_second_once_and_catches_up(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taint_peers, "TOLD_S", 0.05)
    a, b, c = site.add("a", "b", "c")
    await site.ready()
    site.hanging = {"b"}
    site.asked.clear()
    await a.taints.add(user("one"))
    for n in range(5):
        await a.taints.add(user(f"more {n}"))
    assert site.asked.count(("a", "b")) == 1
    assert c.sees("more 4") == "taint"
    assert b.sees("one") is None
    site.beat()
    site.now += taint_peers.BEHIND_S
    site.beat()
    site.now += taint_peers.BEHIND_S
    site.hanging.clear()
    await site.settle(lambda: b.sees("one") == "taint", "b has fetched")
    await site.ready()


async def test_a_node_whose_peer_has_more_than_it_can_fetch_is_behind(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taint_peers, "TOLD_S", 0.05)
    monkeypatch.setattr(taint_peers, "COMPARED_S", 0.05)
    a, b = site.add("a", "b")
    await site.ready()
    site.cut = set()
    site.hanging = {"a", "b"}
    await a.taints.add(user("one"))
    site.beat(0.5)
    assert b.sees("anything") is None
    for _ in range(8):
        site.beat(0.5)
        await asyncio.sleep(0.06)
    assert b.sees("anything") == "taint_not_loaded"
    assert b.taints.view()["why"] == "those of a are not here yet: peer http://a: does not answer in time"
    assert b.taints.view()["state"] == "behind"
    site.hanging.clear()
    await site.ready()
    assert b.sees("one") == "taint"


async def test_beside_a_version_that_keeps_no_marks_everything_is_sensitive(site: Site) -> None:
    a, b = site.add("a", "b")
    b.older = True
    for _ in range(3):
        site.beat()
        await asyncio.sleep(0.02)
    assert a.sees("anything") == "taint_not_loaded"
    assert a.taints.view()["why"] == "b runs a version that keeps none; upgrade it"
    assert a.taints.warnings() == [], "not worth a word at a start"
    for _ in range(12):
        site.beat()
    assert a.taints.warnings()[0].startswith("marks of SENSITIVE messages are incomplete: b runs a version that keeps")
    assert a.taints.view()["peers"] == {"b": "older version"}
    with pytest.raises(Refused, match="nothing was cleared: b"):
        await a.taints.clear()
    b.older = False
    await site.ready()
    assert a.taints.warnings() == []


async def test_a_rotation_of_the_secret_forgets_nothing_also_for_a_node_that_joins_after_it(site: Site) -> None:
    a, b = site.add("a", "b")
    await site.ready()
    await a.taints.add(user("before the rotation"))
    for one in (a, b):
        await one.stop()
    a, b = site.add("a", "b", secret="another rack secret of the tests")
    (c,) = site.add("c", secret="another rack secret of the tests")
    await site.ready()
    assert [one.sees("before the rotation") for one in (a, b, c)] == ["taint"] * 3
    await c.taints.add(user("after it"))
    assert [one.sees("after it") for one in (a, b, c)] == ["taint"] * 3, "a and b take the key of c along"
    for one in (a, b, c):
        await one.stop()
    a, b, c = site.add("a", "b", "c", secret="a third rack secret of the tests")
    await site.ready()
    assert [one.sees("after it") for one in (a, b, c)] == ["taint"] * 3
    assert [one.sees("before the rotation") for one in (a, b, c)] == ["taint"] * 3


async def test_nodes_without_a_secret_have_keys_of_their_own_and_understand_each_other(site: Site) -> None:
    a, b = site.add("a", "b", secret="")
    await site.ready()
    await a.taints.add(user("at a"))
    await b.taints.add(user("at b"))
    assert (b.sees("at a"), a.sees("at b")) == ("taint", "taint")


async def test_a_full_set_makes_everything_sensitive_everywhere_and_is_cleared_everywhere(site: Site) -> None:
    a, b = site.add("a", "b")
    a.live.replace(AgentConfig(node=Node(id="a", rack="r"), taint=Taint(marks=3)))
    await site.ready()
    await a.taints.add(user("one"))
    await a.taints.add(user("two"))
    assert (a.sees("anything"), b.sees("anything")) == (None, None)
    await a.taints.add(user("three"))
    assert (a.sees("anything"), b.sees("anything")) == ("taint_full", None)
    await a.taints.add(user("four"), ["taint_full"])
    assert b.sees("anything") is None, "what counts as SENSITIVE only because a is full is not lost"
    await a.taints.add(user("five"), ("label", "taint_full"))
    assert (a.sees("anything"), b.sees("anything")) == ("taint_full", "taint_full"), "a could not keep it: nobody knows"
    a.live.replace(AgentConfig(node=Node(id="a", rack="r")))
    assert a.sees("anything") == "taint_full", "a larger limit does not bring it back"
    assert "full (taint.marks)" in b.taints.warnings()[0]
    assert await b.taints.clear() == 4
    for one in (a, b):
        assert (one.sees("one"), one.sees("anything"), one.taints.view()["marks"]) == (None, None, 0)
        assert TaintChanged(t_ms=1, state="cleared", marks=4) in one.events
    for _ in range(8):
        site.beat()
        await asyncio.sleep(0.01)
    assert (a.sees("one"), b.sees("one")) == (None, None), "nothing comes back"
    await b.taints.add(user("one"))
    assert a.sees("one") == "taint", "what is said again is SENSITIVE again"
    assert LOST not in a.taints._store.marks


async def test_clearing_needs_every_node_and_what_failed_comes_back(site: Site) -> None:
    a, b, c = site.add("a", "b", "c")
    await site.ready()
    await a.taints.add(user("one"))
    site.cut = {("a", "c")}
    for _ in range(5):
        site.beat()
    with pytest.raises(Refused, match=r"nothing was cleared: c cannot be asked.*take it out of peers\.nodes"):
        await a.taints.clear()
    assert a.sees("one") == "taint"
    site.cut.clear()
    site.beat()
    await site.ready()
    site.cut = {("a", "c")}  # and it is not noticed yet
    with pytest.raises(Refused, match=r"not cleared everywhere \(c: .*\); .* come back from there: run it again"):
        await a.taints.clear()
    site.cut.clear()
    await site.settle(lambda: b.sees("one") == "taint", "b has them again from c")
    await site.ready()
    await a.taints.clear()
    assert [one.sees("one") for one in (a, b, c)] == [None] * 3


async def test_a_disk_that_fails_makes_everything_sensitive_until_it_writes_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = site.add("a", "b")
    await site.ready()

    def full(marks: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(a.taints._store._file, "append", full)
        await a.taints.add(user("one"))
        assert (a.sees("one"), b.sees("one")) == ("taint_not_loaded", "taint")
        assert "not written to the disk of this node: No space left on device" in a.taints.warnings()[0]
        await site.settle(lambda: a.events, "it is reported")
    assert a.events[0] == TaintChanged(t_ms=1, state="unsaved", marks=1)
    await site.ready()
    assert a.sees("one") == "taint"
    await site.settle(lambda: len(a.events) == 2, "it is reported")
    assert a.events[1] == TaintChanged(t_ms=1, state="ready", marks=1)
    await a.stop()
    (again,) = site.add("a")
    await site.ready()
    assert again.sees("one") == "taint"


async def test_a_file_that_cannot_be_read_makes_everything_sensitive_and_marks_are_told_all_the_same(
    site: Site, tmp_path: Path
) -> None:
    (tmp_path / "a/taints").mkdir(parents=True)
    (tmp_path / "a/taints/marks").write_bytes(b"somebody else's file, and long")
    a, b = site.add("a", "b")
    await site.settle(lambda: a.taints.state == "unreadable" and b.taints.state == "ready", "read")
    assert (a.sees("anything"), b.sees("anything")) == ("taint_not_loaded", None)
    await a.taints.add(user("one"))
    assert b.sees("one") == "taint"
    assert "incomplete on this node: cannot be read" in a.taints.warnings()[0]
    await a.taints.clear()
    assert (a.sees("anything"), a.taints.state) == (None, "ready")


async def test_what_counts_only_for_missing_marks_is_marked_where_something_of_it_is_known(site: Site) -> None:
    """Else every upgrade would taint the system prompt that all clients use."""
    a, b = site.add("a", "b")
    await site.ready()
    await a.taints.add(user("my diagnosis"))
    b.older = True
    site.beat()
    assert a.sees("hello") == "taint_not_loaded"
    await a.taints.add(user("hello"), ["taint_not_loaded"])
    await a.taints.add([*user("my diagnosis"), *user("and the next turn")], ["taint_not_loaded"])
    b.older = False
    await site.ready()
    assert [a.sees(text) for text in ("hello", "and the next turn")] == [None, "taint"]


async def test_texts_that_everybody_sends_can_be_left_out_and_taken_back(site: Site) -> None:
    (a,) = site.add("a")
    await site.ready()
    shared = Message(role="system", content="You are the company's assistant.")
    a.taints.ignore(["you are the company's ASSISTANT"])
    await a.taints.add([shared, *user("my diagnosis")])
    assert a.taints.seen([shared, *user("hello")]) is None
    assert a.taints.seen([shared, *user("my diagnosis")]) == "taint"
    a.taints.ignore([])
    assert a.taints.seen([shared, *user("hello")]) == "taint"


async def test_adding_what_is_known_waits_for_what_is_on_its_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests with one message: the second must not answer before peers know it either."""
    a, b = site.add("a", "b")
    await site.ready()
    gate, reached = asyncio.Event(), asyncio.Event()
    post = Made.post

    async def slow(self: Made, *given: Any) -> bytes:
        reached.set()
        await gate.wait()
        return await post(self, *given)

    monkeypatch.setattr(Made, "post", slow)
    try:
        first = asyncio.create_task(a.taints.add(user("one")))
        await reached.wait()
        second = asyncio.create_task(a.taints.add(user("one")))
        await asyncio.sleep(0.02)
        while not a.taints._store._saving.idle:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        assert not first.done()
        assert not second.done()
    finally:
        gate.set()
    await asyncio.gather(first, second)
    assert b.sees("one") == "taint"


async def test_a_peer_s_nonsense_is_refused(site: Site) -> None:
    a, _ = site.add("a", "b")
    await site.ready()
    for body in (b"", b"\xc1", b"\x80", b"\x81\xa4what\xa4tell", b"\x91" * 5000):
        with pytest.raises(Refused, match="not a request about marks"):
            await a.taints.answered("b", body)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_nothing_that_was_added_is_unknown_once_nodes_are_ready(site: Site, seed: int) -> None:
    """Links break and heal, nodes stop and start with and without their folders, but never all that know a text."""
    draw = random.Random(seed)
    names = ["a", "b", "c", "d"]
    site.add(*names)
    await site.ready()
    said: list[str] = []
    for step in range(40):
        site.beat(draw.choice([0.5, 1.0]))
        up = [one for one in site.nodes.values() if one.runs]
        match draw.choice(["add", "add", "add", "cut", "heal", "stop", "start", "lose"]):
            case "add":
                said.append(f"text {seed} {step}")
                one = draw.choice(up)
                await one.taints.add(user(said[-1]))
                assert one.taints.state != "ready" or one.sees(said[-1]) == "taint"
            case "cut":
                site.cut.add(tuple(draw.sample(names, 2)))  # type: ignore[arg-type]
            case "heal":
                site.cut.clear()
            case "stop" if len(up) > 2:
                await draw.choice(up).stop()
            case "start" | "lose" as how:
                for one in [one for one in site.nodes.values() if not one.runs]:
                    if how == "lose" and not site.cut:
                        shutil.rmtree(site.folder / one.name, ignore_errors=True)
                    site.add(one.name)
        await asyncio.sleep(0.002)
    site.cut.clear()
    for one in [one for one in site.nodes.values() if not one.runs]:
        site.add(one.name)
    for _ in range(5):
        site.beat()
    await site.ready()
    assert len({one.taints.beat().digest for one in site.nodes.values()}) == 1
    for one in site.nodes.values():
        assert [text for text in said if one.sees(text) != "taint"] == []
        assert one.sees("another text") is None
