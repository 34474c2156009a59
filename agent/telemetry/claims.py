"""The claim of one agent on its node id, in the bucket: two machines with one id are told apart before either writes.

Claims of a node are numbered, each is written once (put if absent), and the newest holds the id. A spool may follow the
newest claim where nobody can be wronged: there is none, it is its own, it is of the same hardware (a state folder that
was lost, or moved), of hardware unknown, or an operator granted it (`mlxrack-agent claim take`). Else the agent goes
on serving and keeps its batches. Who does not get the id says so beside the claim, so that its holder knows, too.
"""

import time
from collections.abc import Callable

import msgspec

from agent.telemetry.spool_identity import Identity
from shared import bucket_rack, keys
from shared.errors import AccessDenied, Halt, PreconditionFailed, Refused, Retryable
from shared.logs import get_logger
from shared.records import NodeIdClash
from shared.store import ObjectStore, Stored, find

UNKNOWN = "unknown"
CONTEST_S = 900.0
"""An agent that contests a claim says so at each try, every five minutes at most: after this time it is gone."""
TOLD_EVERY_S = 600.0
MOST_CLAIMS = 10_000

log = get_logger("agent.telemetry.claims")


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """Who claims an id. The first versions wrote the spool's id alone."""

    spool_id: str
    hardware: str = UNKNOWN
    rack: str = ""


class Contest(msgspec.Struct, frozen=True, kw_only=True):
    """Who uses an id that another claim holds; ``t_ms`` changes with each try."""

    spool_id: str
    hardware: str
    t_ms: int


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """Who may claim next: a spool, or, where it has none yet, a machine."""

    to: str


def parse(raw: bytes) -> Claim:
    """A stored claim; one that nobody understands is nobody's."""
    try:
        return msgspec.json.decode(raw, type=Claim)
    except (msgspec.DecodeError, RecursionError):
        return Claim(spool_id=raw.decode(errors="replace"))


def why_not(holder: Claim | None, me: Identity, granted_to: str = "") -> str:
    """Why a spool may not claim its id after ``holder``; "" if it may. Pure."""
    if holder is None or holder.spool_id == me.spool_id or granted_to in (me.spool_id, me.hardware):
        return ""
    if holder.rack not in ("", me.rack):
        return (
            f"node id {me.node!r} in this bucket is of rack {holder.rack!r}, and this node is of rack {me.rack!r}: "
            "give each rack a bucket or a prefix of its own ([store])"
        )
    seen = f"(hardware {_short(holder.hardware)}, this machine is {_short(me.hardware)})"
    if me.claim is not None or me.incarnation is not None:
        late = f"node id {me.node!r} was claimed by another agent after this one {seen}"
        return f"{late}: give one of the two its own node.id; {_TAKE}"
    if UNKNOWN in (holder.hardware, me.hardware) or holder.hardware == me.hardware:
        return ""
    return f"node id {me.node!r} is claimed by other hardware {seen}: give this machine its own node.id; {_TAKE}"


_TAKE = "if this machine replaces that one, run `mlxrack-agent claim take` here. It serves meanwhile, and batches wait"


def contested(node: str, contest: Contest) -> str:
    """What the holder of a claim says of another agent that uses its id. Pure."""
    return (
        f"another agent uses node id {node!r}, too (hardware {_short(contest.hardware)}): its telemetry waits until it "
        "has its own node.id"
    )


def _short(hardware: str) -> str:
    return hardware[:8]


class Claims:
    """The claim of one spool. ``keep`` stores its number. Blocking, for one thread at a time."""

    def __init__(
        self, identity: Identity, keep: Callable[[int], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._me, self._keep, self._clock = identity, keep, clock
        self._verified = False
        self._seen_etag: str | None = None
        self._contested_s: float | None = None
        self._told_s: float | None = None
        self._other = ""
        self.problem = ""

    def hold(self, store: ObjectStore) -> None:
        """Make sure that the id is this spool's, and note who else uses it. Raises Halt (identity_clash, other_rack)
        with what to do, and whatever the store raises."""
        bucket_rack.check(bucket_rack.told(store), self._me.rack)
        newest, holder = self._newest(store, self._verified_claim(store) or 0)
        if holder is None or holder.spool_id != self._me.spool_id:
            newest = self._follow(store, newest, holder)
        if newest != self._me.claim:
            self._keep(newest)
        self._look_for_others(store, newest)

    def news(self) -> NodeIdClash | None:
        """That the id is used twice, for alerts: at first, and every ten minutes while it lasts."""
        now = self._clock()
        if not self.problem or (self._told_s is not None and now - self._told_s < TOLD_EVERY_S):
            return None
        self._told_s = now
        t_ms = time.time_ns() // 1_000_000
        return NodeIdClash(t_ms=t_ms, peer=self._me.node, one=_short(self._me.hardware), other=self._other)

    def forget(self) -> None:
        """The store may be another one from now on."""
        self._verified = False

    def _verified_claim(self, store: ObjectStore) -> int | None:
        """The number of this spool's claim; once per store it is compared with the bucket, which may be new, or another
        one, where another agent may have that number. A claim that an older version wrote is completed."""
        number = self._me.claim or self._me.incarnation
        if number is None or self._verified:
            return number
        key, body = keys.claim_key(self._me.node, number), self._body()
        try:
            store.put_if_absent(key, body)
            self._verified = True
        except PreconditionFailed:
            stored = _found(store, key)
            self._verified = stored is not None and parse(stored.body).spool_id == self._me.spool_id
            if stored is not None and stored.body == self._me.spool_id.encode():
                store.put_if_match(key, body, stored.etag)
        return number

    def _newest(self, store: ObjectStore, number: int) -> tuple[int, Claim | None]:
        """The number of the newest claim from ``number`` on, and the claim; 0 and None without any."""
        holder: Claim | None = None
        if number and self._verified and number == self._me.claim:
            holder = Claim(spool_id=self._me.spool_id)
        elif number:
            holder = self._claim(store, number)
        while number < MOST_CLAIMS and (later := self._claim(store, number + 1)) is not None:
            number, holder = number + 1, later
        return number, holder

    def _claim(self, store: ObjectStore, number: int) -> Claim | None:
        stored = _found(store, keys.claim_key(self._me.node, number))
        return parse(stored.body) if stored is not None else None

    def _follow(self, store: ObjectStore, newest: int, holder: Claim | None) -> int:
        """Claim the id after the newest claim. Raises Halt where that is not this spool's to do."""
        granted = _found(store, keys.grant_key(self._me.node, newest)) if holder is not None else None
        if why := why_not(holder, self._me, _granted_to(granted)):
            contest = Contest(spool_id=self._me.spool_id, hardware=self._me.hardware, t_ms=time.time_ns() // 1_000_000)
            store.put(keys.contest_key(self._me.node, newest), msgspec.json.encode(contest))
            self._say(why, holder.hardware if holder is not None else "")
            raise Halt(why, code="identity_clash")
        try:
            store.put_if_absent(keys.claim_key(self._me.node, newest + 1), self._body())
        except PreconditionFailed:
            why = f"node id {self._me.node!r}: another agent claims it at this moment"
            raise Retryable(why, code="identity_clash") from None
        self._verified = True
        return newest + 1

    def _look_for_others(self, store: ObjectStore, number: int) -> None:
        """Whether somebody contests this claim now. What was there at the first look may be long over."""
        stored = _found(store, keys.contest_key(self._me.node, number))
        before, self._seen_etag = self._seen_etag, stored.etag if stored is not None else ""
        if stored is not None and before is not None and before != stored.etag:
            try:
                contest = msgspec.json.decode(stored.body, type=Contest)
            except (msgspec.DecodeError, RecursionError):
                return
            self._contested_s = self._clock()
            self._say(contested(self._me.node, contest), contest.hardware)
        elif self._contested_s is None or self._clock() - self._contested_s > CONTEST_S:
            self._say("")

    def _say(self, problem: str, other: str = "") -> None:
        if problem and problem != self.problem:
            log.warning("node_id_clash", reason=problem)
        self.problem, self._other = problem, _short(other)

    def _body(self) -> bytes:
        claim = Claim(spool_id=self._me.spool_id, hardware=self._me.hardware, rack=self._me.rack)
        return msgspec.json.encode(claim)


def _granted_to(stored: Stored | None) -> str:
    try:
        return msgspec.json.decode(stored.body, type=Grant).to if stored is not None else ""
    except (msgspec.DecodeError, RecursionError):
        return ""


def _found(store: ObjectStore, key: str) -> Stored | None:
    """An object that need not be there. A store may deny what is not there to who may not list; that credentials are
    wrong shows at the next write. What no agent writes (too large, no file) is there, and says nothing."""
    try:
        return find(store, key, keys.MOST_CLAIM_BYTES)
    except AccessDenied:
        return None
    except Refused:
        return Stored(b"", "")
