"""Which connections a node keeps: who is admitted, who is closed for another, whose time is over. Pure: the time is an
argument, and whoever holds the sockets does what is decided here."""

from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, Literal

import msgspec

from shared.hosts import is_loopback, within

Phase = Literal["greeting", "unread", "idle", "busy"]
"""No complete request yet; a client without credentials that does not read what it asked for; between two requests;
in a request."""
Queue = Literal["unknown", "idle", "busy"]
"""Those whose client has not proved who it is, whatever they do; those of known clients."""

OWN_DESCRIPTORS = 48
"""Files of a node without models and peers: logs, spool, pipes, threads' sockets, uploads."""
DESCRIPTORS_PER_MODEL = 6
DESCRIPTORS_PER_PEER = 3
MOST_SPARE = 32
UNREAD_STEP_BYTES = 16 << 10
"""A client that reads takes at least this much of an answer in each interval."""
GREETING_S = 2.0
"""So long an honest client needs at most until its request has come; a younger connection is spared where that harms
nobody more."""
_INTERNAL = ("/peer/", "/admin/", "/health", "/live", "/ready", "/metrics")


class Caps(msgspec.Struct, frozen=True, kw_only=True):
    """How many connections may be open, in all and of one address. The last ``spare`` that are in a request are for
    peers and operators."""

    total: int
    per_address: int
    spare: int


class Connection(msgspec.Struct, eq=False):
    """One connection. ``known`` once its client has proved who it is (on a node without keys: has used the API);
    ``cut`` ends it at once; ``unsent`` tells the bytes that wait for its client to read."""

    address: str
    since_s: float
    phase: Phase = "greeting"
    known: bool = False
    cut: Callable[[], Any] = lambda: None
    unsent: Callable[[], int] = lambda: 0

    @property
    def queue(self) -> Queue:
        """Connections of one queue are closed in its order. Unknown ones stay where they came: what they ask without
        credentials must not put them behind those who come later."""
        if not self.known:
            return "unknown"
        return "busy" if self.phase == "busy" else "idle"

    def is_new(self, now_s: float) -> bool:
        """Whether its first request may well be under way."""
        return self.phase == "greeting" and now_s - self.since_s < GREETING_S


class Counts(msgspec.Struct):
    """What happened to connections since the start."""

    dropped: int = 0
    refused: int = 0
    overdue: int = 0


def descriptors_for(connections: int, *, models: int, peers: int) -> int:
    """The open files of a node with so many connections."""
    return connections + OWN_DESCRIPTORS + DESCRIPTORS_PER_MODEL * models + DESCRIPTORS_PER_PEER * peers


def caps_within(descriptors: int, wanted: int, per_address: int, *, models: int, peers: int) -> Caps:
    """The connections that fit into a process's open files beside those that it needs itself; at least a quarter of
    them."""
    own = descriptors_for(0, models=models, peers=peers)
    total = max(1, min(wanted, max(descriptors - own, descriptors // 4)))
    spare = min(MOST_SPARE, total // 4)
    return Caps(total=total, per_address=min(per_address, total), spare=spare)


def client_of(address: str, scope: int = 0, *, proxies: Sequence[str] = ()) -> str:
    """What counts as one client address: an IPv4 address, also one written in IPv6; of IPv6 the network of 64 bits, of
    which a machine may choose any; of link-local ones the interface, whose number is ``scope``. "" where many clients
    have one address: those that are trusted to pass on others' requests, and this machine's own."""
    if is_loopback(address) or within(address, proxies):
        return ""
    bare, _, zone = address.partition("%")
    try:
        parsed = ip_address(bare)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    network = str(ip_network((parsed, 64), strict=False))
    return f"{network}%{zone or scope}" if parsed.is_link_local else network


class Table:
    """All open connections, in the order in which they would be closed for another: unknown ones, the first to come
    first; then idle ones of known clients, the longest idle first. None is closed in a request."""

    def __init__(self, caps: Caps) -> None:
        self.caps, self.counts = caps, Counts()
        # a queue is a dict, for its order and for leaving it anywhere
        self._queues: dict[Queue, dict[Connection, None]] = {"unknown": {}, "idle": {}, "busy": {}}
        self._by_address: dict[str, dict[Connection, None]] = {}
        self._paused: dict[Connection, tuple[int, float]] = {}
        self._requests = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def enter(self, address: str, now_s: float) -> tuple[Connection | None, Connection | None]:
        """The connection, None if it must be refused; and the one that is to be closed for it, which has left. For
        the address "" the cap of all connections alone holds."""
        own = self._by_address.get(address, {})
        full, rival = False, None
        if address and len(own) >= self.caps.per_address:
            full, rival = True, _first(own, now_s)
        elif len(self) >= self.caps.total:
            full, rival = True, self.first_to_close(now_s)
        if full and rival is None:
            self.counts.refused += 1
            return None, None
        if rival is not None:
            self.leave(rival)
            self.counts.dropped += 1
        connection = Connection(address, now_s)
        self._queues[connection.queue][connection] = None
        self._by_address.setdefault(address, {})[connection] = None
        return connection, rival

    def first_to_close(self, now_s: float) -> Connection | None:
        """The connection that would be closed next; None when all are in a request. A quarter of the places is for
        unknown ones, so that known clients who keep theirs leave one to who is about to show a key."""
        unknowns = self._queues["unknown"]
        oldest = next((one for one in unknowns if one.phase != "busy"), None)
        idle = next(iter(self._queues["idle"]), None)
        if oldest is None or (oldest.is_new(now_s) and len(unknowns) < self.caps.total // 4):
            return idle or oldest
        return oldest

    def move(self, connection: Connection, phase: Phase, now_s: float, *, known: bool = False) -> None:
        """The connection enters a phase; it stays known."""
        if connection not in (before := self._queues[connection.queue]):
            return  # it has left
        self._requests += (phase == "busy") - (connection.phase == "busy")
        connection.phase, connection.known, connection.since_s = phase, connection.known or known, now_s
        if connection.known:
            del before[connection]
            self._queues[connection.queue][connection] = None

    def leave(self, connection: Connection) -> None:
        """The connection is closed; repeated calls do nothing."""
        if self._queues[connection.queue].pop(connection, connection) is None:
            self._requests -= connection.phase == "busy"
        self._paused.pop(connection, None)
        if (own := self._by_address.get(connection.address)) is not None:
            own.pop(connection, None)
            if not own:
                del self._by_address[connection.address]

    def serves(self, path: str) -> bool:
        """Whether a request that has begun is answered: the last places are for those of peers and operators."""
        return self._requests <= self.caps.total - self.caps.spare or path.startswith(_INTERNAL)

    def state(self) -> dict[str, int]:
        """For ``status``: how many are open, the caps, and what was done to keep them."""
        caps = {"open": len(self), "limit": self.caps.total, "per_address": self.caps.per_address}
        return caps | msgspec.structs.asdict(self.counts)

    # ---- clients that do not read ----

    def stalled(self, connection: Connection, now_s: float) -> None:
        """The client does not read as fast as it is written to."""
        self._paused[connection] = connection.unsent(), now_s
        if connection.phase == "busy" and not connection.known:
            self.move(connection, "unread", now_s)

    def reads(self, connection: Connection, now_s: float) -> None:
        """The client has read nearly everything."""
        if self._paused.pop(connection, None) is not None and connection.phase == "unread":
            self.move(connection, "busy", now_s)

    def unread(self, now_s: float, limit_s: float) -> list[Connection]:
        """Connections whose client has read nearly nothing for ``limit_s``."""
        return [one for one in list(self._paused) if self._is_unread(one, now_s, limit_s)]

    def _is_unread(self, connection: Connection, now_s: float, limit_s: float) -> bool:
        before, since_s = self._paused[connection]
        if before - (unsent := connection.unsent()) >= UNREAD_STEP_BYTES:
            self._paused[connection] = unsent, now_s
            return False
        return now_s - since_s >= limit_s

    # ---- time ----

    def overdue(self, now_s: float, *, header_s: float, idle_s: float) -> list[Connection]:
        """Connections whose headers, or next request, have not come in time."""
        limits = {"greeting": header_s, "idle": idle_s}
        waiting = (*self._queues["unknown"], *self._queues["idle"])
        return [one for one in waiting if one.phase in limits and now_s - one.since_s >= limits[one.phase]]


def _first(own: Iterable[Connection], now_s: float) -> Connection | None:
    """Of one address's connections, which are in the order in which they came, the one that is closed first. It shares
    the address with those it is closed for, so even a known one gives way to a request that may be under way."""
    closable = (one for one in own if one.phase != "busy")
    return min(closable, key=lambda one: (one.is_new(now_s), one.known, one.since_s * one.known), default=None)
