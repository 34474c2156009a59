"""Content taint at a gateway: whether a request contains what was in a SENSITIVE one, here or at any other node.

What cannot be known counts as SENSITIVE: while this node's marks are being read or cannot be, while it is full, and
while marks that a peer has may be missing here."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from agent.config import Live
from agent.gateway.taint_file import FOLDER
from agent.gateway.taint_peers import TOLD_S, Question, Reply, TaintPeers, answer
from agent.gateway.taint_store import TaintStore
from agent.mesh.peer_client import PeerClient
from agent.mesh.peers import Heartbeat, Held, PeerTable
from agent.mesh.signing import RackKeys
from agent.policy.facts import UNSURE, Reason
from agent.policy.taint import forms, mark, marks_of, normal
from agent.wire.frames import Message
from shared.errors import Refused
from shared.logs import get_logger
from shared.records import Event, TaintChanged

State = Literal["ready", "loading", "unreadable", "unsaved", "full", "behind"]
TICK_S = 0.5
GRACE_S = 10.0
"""Marks of peers that are missing for longer are worth a warning."""
_LONG_CHARS = 128 << 10
_LONG_TURNS = 256
"""A conversation beyond these is read in a thread."""
_SAY = {
    "loading": "being read",
    "unreadable": "incomplete on this node",
    "unsaved": "not written to the disk of this node",
    "full": "full (taint.marks)",
    "behind": "incomplete",
}

log = get_logger("agent.taints")


class Taints:
    """The marks of SENSITIVE messages, in ``state`` / taints. ``keys`` are the rack's; ``emit`` takes events."""

    def __init__(
        self,
        state: Path,
        live: Live,
        table: PeerTable,
        client: PeerClient,
        keys: RackKeys,
        emit: Callable[[Event], None] = lambda _: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._live, self._emit, self._wall_ms = live, emit, wall_ms
        self._store = TaintStore(state / FOLDER, lambda: keys.taint_key, lambda: live.now.taint.marks)
        self._peers = TaintPeers(self._store, table, client, clock=clock)
        self._common: Collection[bytes] = frozenset()
        self._told: State = "loading"
        self._reported: State = "ready"
        self._clock, self._since_s = clock, clock()
        self._task: asyncio.Task[None] | None = None

    # ---- of requests ----

    def seen(self, messages: Sequence[Message]) -> Reason | None:
        """Why a conversation is SENSITIVE; None when nothing of it was in a SENSITIVE request. Blocks as long as its
        text takes to read: for what a client may send, use ``look``."""
        if (reason := self._incomplete()) or not len(self._store.marks):
            return reason
        return "taint" if self._holds(forms(messages)) else None

    async def look(self, messages: Sequence[Message]) -> Reason | None:
        """As ``seen``, but a long conversation is read in a thread."""
        if not _is_long(messages) or self._incomplete() or not len(self._store.marks):
            return self.seen(messages)
        found = await _marked(messages, self._store.keys, self._common)
        return self._incomplete() or ("taint" if any(one in self._store.marks for one in found) else None)

    async def add(self, messages: Sequence[Message], reasons: Collection[Reason] = ()) -> None:
        """Mark what a SENSITIVE request or its answer says, here and at every peer. Returns when that is on the drive
        and acknowledged, or after about a second: call it before the first byte of an answer, and again with the
        answer before its last. ``reasons`` are why it is SENSITIVE: where that is only that marks are incomplete, it
        is marked if something of it is known, so that an upgrade or a full set does not taint everything for good."""
        await self._store.loaded.wait()
        if reasons and UNSURE.issuperset(reasons):
            known = await _marked(messages, self._store.keys)
            if not any(one in self._store.marks for one in known):
                return
        fresh = await self._store.take_many(await _marked(messages, self._store.keys[:1]), own=True)
        if waiting := self._tell(fresh):
            await asyncio.wait(waiting, timeout=TOLD_S)

    async def add_text(self, text: str, reasons: Collection[Reason] = ()) -> None:
        """Mark the text of an answer; one with reasoning or calls is a message for ``add``."""
        await self.add((Message(role="assistant", content=text),), reasons)

    def note(self, messages: Sequence[Message]) -> None:
        """As ``add``, without waiting: for an answer whose client has left in the middle of it."""
        if self._store.loaded.is_set():
            self._tell(self._store.take(_marks(messages, self._store.keys[:1]), own=True))

    def ignore(self, texts: Iterable[str]) -> None:
        """Texts that taint nothing although they were in SENSITIVE requests, like a system prompt that all clients
        use. They are marked all the same, so this can be taken back."""
        self._common = frozenset(map(normal, texts))

    # ---- state ----

    @property
    def state(self) -> State:
        """Whether what was seen anywhere is known here; anything but ready makes every request SENSITIVE."""
        store = self._store
        if not store.loaded.is_set():
            return "loading"
        if store.problem:
            return "unreadable"
        if store.full:
            return "full"
        if store.unsaved:
            return "unsaved"
        return "behind" if self._peers.problem(every_peer=self._live.now.taint.every_peer) else "ready"

    def view(self) -> dict[str, Any]:
        """For display: the state and why, the number of marks, how it stands with each peer."""
        state = self.state
        marks = {"marks": len(self._store.marks), "most": self._live.now.taint.marks}
        return {
            "state": state,
            "why": self._why(state),
            **marks,
            "keys": len(self._store.keys),
            "peers": self._peers.view(),
        }

    def warnings(self) -> list[str]:
        """A sentence while every request counts as SENSITIVE; none for what a start takes, or a peer's return."""
        state = self.state
        if state in ("ready", "loading") or (state == "behind" and self._clock() - self._since_s < GRACE_S):
            return []
        why = self._why(state)
        seen = f"marks of SENSITIVE messages are {_SAY[state]}{': ' if why else ''}{why}"
        return [f"{seen}; every request counts as SENSITIVE; see `mlxrack-agent help sensitive`"]

    def start(self) -> None:
        """Read what was known, in the background, and keep it."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Write what is due."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._peers.close()
        await self._store.close()

    # ---- of peers ----

    def beat(self) -> Held:
        """What this node tells in its heartbeats."""
        return self._store.held()

    def heard(self, node: str, heartbeat: Heartbeat) -> None:
        """A peer's heartbeat has come."""
        self._peers.heard(node, heartbeat)

    async def answered(self, node: str, body: bytes) -> bytes:
        """The answer to a peer's signed request. Raises Refused."""
        try:
            question = msgspec.msgpack.decode(body, type=Question)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise Refused("not a request about marks; upgrade the older of the two nodes") from None
        if question.what == "forget":
            await self._forget(node)
            return msgspec.msgpack.encode(Reply())
        return msgspec.msgpack.encode(answer(self._store, question))

    async def clear(self) -> int:
        """An operator's order: forget every mark on every node; returns how many were here. Raises Refused when a node
        cannot be asked."""
        self._peers.quiet()
        await self._peers.forget()
        return await self._forget("")

    async def _forget(self, by: str) -> int:
        self._peers.quiet()
        try:
            count = await self._store.clear()
        except OSError as error:
            raise Refused(f"the marks cannot be cleared: {error.strerror or error}", code="disk_full") from None
        log.warning("taints_cleared", marks=count, by=by or "an operator of this node")
        self._emit(TaintChanged(t_ms=self._wall_ms(), state="cleared", marks=count))
        return count

    # ---- inside ----

    def _incomplete(self) -> Reason | None:
        state = self.state
        return None if state == "ready" else "taint_full" if state == "full" else "taint_not_loaded"

    def _why(self, state: State) -> str:
        if state == "behind":
            return self._peers.problem(every_peer=self._live.now.taint.every_peer)
        return {"unreadable": self._store.problem, "unsaved": self._store.unsaved}.get(state, "")

    def _holds(self, found: Iterable[bytes]) -> bool:
        marks, keys, common = self._store.marks, self._store.keys, self._common
        return any(mark(key, one) in marks for one in found if one not in common for key in keys)

    def _tell(self, fresh: Sequence[bytes]) -> list[asyncio.Future[None]]:
        """Returns what to wait for: also for what others have added and is still on its way."""
        return [*self._store.saved(), *self._peers.tell(fresh)]

    async def _run(self) -> None:
        await self._store.load()
        while True:
            self._peers.tick()
            if self._store.unsaved:
                self._store.saved()  # the disk may have room again
            self._say()
            await asyncio.sleep(TICK_S)

    def _say(self) -> None:
        """Report another state, once; a start and a peer's return are no events."""
        if (state := self.state) == self._told:
            return
        self._told, self._since_s = state, self._clock()
        write = log.info if state in ("ready", "behind") else log.warning
        write("taints", state=state, reason=self._why(state), marks=len(self._store.marks))
        if state not in ("behind", self._reported):
            self._reported = state
            self._emit(TaintChanged(t_ms=self._wall_ms(), state=state, marks=len(self._store.marks)))


def _marks(messages: Sequence[Message], keys: Sequence[bytes], but: Collection[bytes] = ()) -> list[bytes]:
    return list(marks_of(keys, (one for one in forms(messages) if one not in but)))


async def _marked(messages: Sequence[Message], keys: Sequence[bytes], but: Collection[bytes] = ()) -> list[bytes]:
    """In a thread where the conversation is long."""
    return await asyncio.to_thread(_marks, messages, keys, but) if _is_long(messages) else _marks(messages, keys, but)


def _is_long(messages: Sequence[Message]) -> bool:
    return len(messages) > _LONG_TURNS or sum(_chars(one) for one in messages) > _LONG_CHARS


def _chars(one: Message) -> int:
    return len(one.content) + len(one.reasoning) + sum(len(call.arguments) for call in one.calls)
