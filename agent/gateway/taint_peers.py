"""Marks of SENSITIVE messages between the nodes of a rack: told to every peer at once, and compared with what peers say
in their heartbeats, so that whoever missed some fetches them, from anybody who has them."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from agent.gateway.taint_store import Grouped, TaintStore
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import Heartbeat, PeerTable
from agent.policy.taint import BUCKETS, MARK_BYTES, name_of, split
from shared.errors import RackError, Refused

PATH = "/peer/v1/taints"
TOLD_S = 1.0
"""A peer must acknowledge marks within this time; it fetches them otherwise."""
COMPARED_S = 10.0
BEHIND_S = 3.0
"""Marks that a peer has had for so long and that could not be fetched make this node's incomplete."""
QUIET_S = 5.0
"""After the marks were cleared nothing is fetched for so long: a peer may not have cleared its own yet."""
_AT_ONCE = 16
"""Buckets in one answer: a quarter of a megabyte where a million marks are held."""
_IN_ONE = 4096
"""Marks in one message."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """To a peer: take these marks; what are the digests of yours; give those of these buckets; forget all. ``names``
    are of the keys that the sender knows, ``keys`` those that the receiver lacked."""

    what: Literal["take", "compare", "give", "forget"]
    marks: bytes = b""
    names: tuple[bytes, ...] = ()
    keys: tuple[bytes, ...] = ()
    buckets: tuple[int, ...] = ()


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """``lacks``: nothing was taken, because a key is not known here. ``keys`` are those that the sender lacks."""

    marks: bytes = b""
    digests: bytes = b""
    keys: tuple[bytes, ...] = ()
    lacks: bool = False


class _Peer:
    """One peer as far as marks go. ``fetched``: all that it held was fetched, since it was last down. ``seen`` is the
    digest of what was fetched last; ``unlike_s`` since when it holds something else; ``silent`` from a message that it
    did not acknowledge to its next heartbeat; ``older``: its version keeps no marks."""

    def __init__(self) -> None:
        self.fetched = self.silent = self.older = False
        self.seen = self.why = ""
        self.unlike_s: float | None = None
        self.due: list[bytes] = []
        self.telling: Grouped
        self.fetching: asyncio.Task[None] | None = None


class TaintPeers:
    """The marks of the other nodes. ``store`` is ours; ``forget`` is called when a peer tells us to forget all."""

    def __init__(
        self, store: TaintStore, table: PeerTable, client: PeerClient, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._table, self._client, self._clock = store, table, client, clock
        self._peers: dict[str, _Peer] = {}
        self._quiet_until_s = 0.0

    def problem(self, *, every_peer: bool) -> str:
        """Why marks of other nodes may be missing here; "" when none are. With ``every_peer`` a peer that is away is a
        reason, too."""
        now = self._clock()
        for view in self._table.view(now):
            peer = self._peer(view.node)
            if view.state == "down":
                if every_peer:
                    return f"{view.node} is away (taint.every_peer)"
            elif every_peer and view.state != "up":
                return f"{view.node} does not answer (taint.every_peer)"
            elif peer.older:
                return f"{view.node} runs a version that keeps none; upgrade it"
            elif not peer.fetched or (peer.unlike_s is not None and now - peer.unlike_s > BEHIND_S):
                return f"those of {view.node} are not here yet{peer.why}"
        return ""

    def tell(self, marks: Sequence[bytes]) -> list[asyncio.Future[None]]:
        """Send marks to every peer that can be reached; returns what to wait for until they have acknowledged these,
        and all that were on their way already."""
        told = []
        for view in self._table.view(self._clock()):
            peer = self._peer(view.node)
            if view.state == "down" or peer.silent or peer.older:
                continue  # it fetches them when it answers again
            peer.due += marks
            if marks or not peer.telling.idle:
                told.append(peer.telling.due())
        return told

    def heard(self, node: str, heartbeat: Heartbeat) -> None:
        """A peer told what it holds."""
        peer, held = self._peer(node), heartbeat.taints
        peer.silent, peer.older = False, held is None
        if held is None or held.loading or not self._store.loaded.is_set() or self._store.full:
            return
        now, mine = self._clock(), self._store.held()
        if now < self._quiet_until_s:
            return
        if held.digest in (mine.digest, peer.seen):
            peer.fetched, peer.unlike_s, peer.why = True, None, ""
            return
        peer.unlike_s = peer.unlike_s or now
        if peer.fetching is None:
            peer.fetching = asyncio.create_task(self._fetch(node, peer))

    def tick(self) -> None:
        """A peer that is down may know more when it is back."""
        for view in self._table.view(self._clock()):
            if view.state == "down":
                peer = self._peer(view.node)
                peer.fetched, peer.seen, peer.unlike_s = False, "", None

    def quiet(self) -> None:
        """Fetch nothing for a while, because all nodes are about to forget."""
        self._quiet_until_s = self._clock() + QUIET_S
        for peer in self._peers.values():
            peer.seen, peer.unlike_s, peer.due = "", None, []
            if peer.fetching is not None:
                peer.fetching.cancel()

    async def forget(self) -> None:
        """Have every peer forget its marks. Raises Refused, before any does, when one cannot be asked."""
        views = self._table.view(self._clock())
        away = [view.node for view in views if view.state != "up" or self._peer(view.node).older]
        if away:
            why = f"{', '.join(away)} cannot be asked, and would bring the marks back; start it, or take it out of"
            raise Refused(f"nothing was cleared: {why} peers.nodes", code="conflict")
        asked = (self._ask(view.node, Question(what="forget"), COMPARED_S) for view in views)
        failed = [
            f"{view.node}: {found.message if isinstance(found, RackError) else type(found).__name__}"
            for view, found in zip(views, await asyncio.gather(*asked, return_exceptions=True), strict=True)
            if isinstance(found, BaseException)
        ]
        if failed:
            raise Refused(f"not cleared everywhere ({'; '.join(failed)}); the marks come back from there: run it again")

    def view(self) -> dict[str, str]:
        """By node, how it stands with its marks, for display."""
        return {view.node: self._word(view.state, self._peer(view.node)) for view in self._table.view(self._clock())}

    async def close(self) -> None:
        """End what is under way."""
        for peer in self._peers.values():
            if peer.fetching is not None:
                peer.fetching.cancel()
            await peer.telling.end()

    def _word(self, state: str, peer: _Peer) -> str:
        if state == "down":
            return "down"
        if peer.older:
            return "older version"
        return "behind" if peer.unlike_s is not None and not peer.fetched else "same" if peer.fetched else "unknown"

    def _peer(self, node: str) -> _Peer:
        if (peer := self._peers.get(node)) is None:
            peer = self._peers[node] = _Peer()
            peer.telling = Grouped(lambda: self._told(node, peer))
        return peer

    async def _told(self, node: str, peer: _Peer) -> None:
        """Send a peer what is due."""
        names = tuple(map(name_of, self._store.keys))
        while peer.due:
            batch, peer.due = peer.due[:_IN_ONE], peer.due[_IN_ONE:]
            question = Question(what="take", marks=b"".join(batch), names=names)
            try:
                if (await self._ask(node, question, TOLD_S)).lacks:
                    await self._ask(node, msgspec.structs.replace(question, keys=self._store.keys), TOLD_S)
            except RackError:
                peer.silent, peer.due = True, []
                return

    async def _fetch(self, node: str, peer: _Peer) -> None:
        """Get what a peer has and this node lacks."""
        try:
            names = tuple(map(name_of, self._store.keys))
            reply = await self._ask(node, Question(what="compare", names=names), COMPARED_S)
            self._store.learn(reply.keys)
            self._store.saved()
            unlike = self._store.marks.differing(reply.digests)
            for at in range(0, len(unlike), _AT_ONCE):
                wanted = tuple(unlike[at : at + _AT_ONCE])
                given = await self._ask(node, Question(what="give", buckets=wanted), COMPARED_S)
                await self._store.take_many(split(given.marks))
                self._store.saved()
            peer.seen, peer.fetched, peer.unlike_s, peer.why = _total(reply.digests), True, None, ""
        except RackError as error:
            peer.why = f": {error.message}"
        finally:
            peer.fetching = None

    async def _ask(self, node: str, question: Question, timeout_s: float) -> Reply:
        url = dict(self._table.urls()).get(node, "")
        raw = await self._client.post(node, url, PATH, msgspec.msgpack.encode(question), timeout_s)
        try:
            return msgspec.msgpack.decode(raw, type=Reply)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise Refused(f"peer {url}: not an answer about marks; upgrade the older of the two") from None


def answer(store: TaintStore, question: Question) -> Reply:
    """What this node replies to a peer; forgetting is the caller's."""
    own = {name_of(key): key for key in store.keys}
    store.learn(question.keys)
    if question.what == "take":
        known = set(map(name_of, store.keys))
        if not known.issuperset(question.names):
            return Reply(lacks=True)
        store.take(split(question.marks))
        store.saved()
        return Reply()
    if question.what == "compare":
        keys = tuple(key for name, key in own.items() if name not in question.names)
        return Reply(digests=store.marks.digests(), keys=keys)
    wanted = sorted(set(question.buckets) & set(range(BUCKETS)))[:_AT_ONCE]
    return Reply(marks=b"".join(map(store.marks.bucket, wanted)))


def _total(digests: bytes) -> str:
    found = 0
    for one in split(digests):
        found ^= int.from_bytes(one, "big")
    return f"{found:0{2 * MARK_BYTES}x}"
