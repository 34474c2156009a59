"""What is known of the other nodes: observations in, a view out. Level-triggered, so recovery needs no manual step.

A peer that missed a heartbeat (it failed, or the last answer is older than almost 1.5 intervals) is *suspect*; after
three misses (or almost 3.5 intervals of silence) it is *down*. It is *lost*, and gets no requests before its next
heartbeat, when a request to it could not connect or broke. A node that was itself held up judges no peer by that time.
"""

from collections.abc import Iterable

import msgspec

from agent.mesh.signing import OLDEST, PROTOCOL
from agent.policy.limits.share import Share
from agent.process.prefixes import unpacked
from agent.views import Count, ModelView, NodeView, Sent

SUSPECT_BEATS = 1.45
DOWN_BEATS = 3.45
"""A little less than 1.5 and 3.5 intervals, which are the detection times that a rack promises."""
DOWN_MISSES = 3
HOPS = 4
"""Round trips of recent heartbeats that are kept; the shortest is the estimate."""
SKEW_WARNING_MS = 2_000
"""A clock that differs by more is reported."""
ASLEEP_S = 0.5
"""A tick that is late by this much means that this node, not its peers, was busy, stopped or asleep."""
_NEVER = float("inf")


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What a node holds, told with its heartbeats: how many marks, and a digest of them that does not depend on their
    order. ``loading``: it has not read its own yet."""

    marks: int
    digest: str
    loading: bool = False


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """What a node reports of itself once a second. ``epoch`` rises with every start of its agent. ``agent`` is its mark
    and ``twice`` are node ids that it sees used by two agents (agent/mesh/sightings.py). ``secrets`` are the marks of
    the rack secrets that it accepts, the newest first: none from a version that knows one secret only. ``policy`` is
    the digest of the policy that it decides by: none from a version without. ``taints`` are the marks of SENSITIVE
    messages that it holds: None from a version that keeps none. ``shares`` are its accounts of limits that hold for the
    whole rack (agent/policy/limits)."""

    protocol: int = PROTOCOL
    oldest: int = OLDEST
    node: str
    rack: str
    epoch: int = 0
    draining: bool = False
    models: tuple[ModelView, ...] = ()
    heat: Count = 0
    memory: str = "calm"
    t_ms: int = 0
    agent: str = ""
    twice: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    policy: str = ""
    taints: Held | None = None
    shares: tuple[Share, ...] = ()


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """A peer was declared down (``up`` false) or came back; ``for_s`` since its last answer, or since it was down."""

    node: str
    up: bool
    for_s: float


class _Known(msgspec.Struct, kw_only=True):
    url: str
    heartbeat: Heartbeat | None = None
    last_s: float
    hops_s: tuple[float, ...] = ()
    beats: int = 0
    misses: int = 0
    lost: bool = False
    sent: dict[str, Sent] = {}
    prefixes: dict[str, bytes] = {}
    hashes: dict[str, frozenset[int]] = {}
    down: bool = False
    down_since_s: float = 0.0


class PeerTable:
    """Peers by node id. ``now`` is a monotonic clock in seconds, passed by the caller."""

    def __init__(self, urls: Iterable[tuple[str, str]], *, beat_s: float, now: float) -> None:
        self._beat_s, self._tick_s = beat_s, now
        self._peers = {node: _Known(url=url, last_s=now) for node, url in urls}
        self._ticks = False
        self._view: tuple[NodeView, ...] = ()
        self._good_until_s = -_NEVER

    def urls(self) -> list[tuple[str, str]]:
        """(node, url) of every peer."""
        return [(node, known.url) for node, known in self._peers.items()]

    def accepts(self, node: str) -> tuple[str, ...] | None:
        """The marks of the rack secrets that a peer accepts, by its last heartbeat; None before the first."""
        known = self._peers.get(node)
        return known.heartbeat.secrets if known is not None and known.heartbeat is not None else None

    def policies(self, now: float) -> dict[str, str]:
        """The digest of the policy that each peer decides by, of those that are not down."""
        heard = {node: (known, known.heartbeat) for node, known in self._peers.items() if known.heartbeat is not None}
        return {node: beat.policy for node, (known, beat) in heard.items() if self._state(known, now) != "down"}

    def become(self, urls: Iterable[tuple[str, str]], now: float) -> list[str]:
        """Replace the peers; the state of those that stay is kept. Returns those that were removed or got a new url."""
        wanted = dict(urls)
        kept = {node: known for node, known in self._peers.items() if wanted.get(node) == known.url}
        gone = [node for node in self._peers if node not in kept]
        self._peers = {node: kept.get(node) or _Known(url=url, last_s=now) for node, url in wanted.items()}
        self._changed()
        return gone

    def heard(self, node: str, heartbeat: Heartbeat, now: float, *, hop_s: float = 0.0) -> bool:
        """A peer answered; what was sent since its last heartbeat is now in its own count. True when it was down or has
        restarted since."""
        if (known := self._peers.get(node)) is None:
            return False
        before = known.heartbeat
        away = self._state(known, now) == "down"
        anew = before is not None and before.epoch != heartbeat.epoch
        known.heartbeat, known.last_s, known.misses, known.lost, known.sent = heartbeat, now, 0, False, {}
        known.beats += 1
        # one late answer says little about the network, several do
        known.hops_s = (*known.hops_s[1 - HOPS :], hop_s)
        for model in heartbeat.models:
            if known.prefixes.get(model.name) != model.prefixes:
                known.prefixes[model.name] = model.prefixes
                known.hashes = {**known.hashes, model.name: unpacked(model.prefixes)}
        self._changed()
        return away or anew

    def missed(self, node: str, now: float) -> None:
        """A heartbeat was not answered."""
        if node in self._peers:
            self._peers[node].misses += 1
            self._changed()

    def lose(self, node: str) -> None:
        """A request could not connect, or broke: no more requests before the peer answers a heartbeat."""
        if node in self._peers:
            self._peers[node].lost = True
            self._changed()

    def unready(self, node: str, model: str) -> None:
        """A node rejected a request that its last heartbeat had offered to take: it is not ready until its next one."""
        if (known := self._peers.get(node)) is not None and known.heartbeat is not None:
            models = tuple(
                msgspec.structs.replace(one, ready=False, coming=True, versions=()) if one.name == model else one
                for one in known.heartbeat.models
            )
            known.heartbeat = msgspec.structs.replace(known.heartbeat, models=models)
            self._changed()

    def sent(self, node: str, model: str, prompt_tok: int) -> int:
        """A request was forwarded, and counts as load until the next heartbeat. Pass the result to ``ended``."""
        if (known := self._peers.get(node)) is None:
            return -1
        requests, tokens = known.sent.get(model, (0, 0))
        known.sent[model] = (requests + 1, tokens + prompt_tok)
        return known.beats

    def ended(self, node: str, model: str, prompt_tok: int, sent_at: int) -> None:
        """A forwarded request has ended: a node that has just become idle is known to be idle before it reports it."""
        if (known := self._peers.get(node)) is not None:
            requests, tokens = known.sent.get(model, (0, 0))
            # tokens of a request from before the heartbeat are in its count, or were done by then
            known.sent[model] = (requests - 1, tokens - prompt_tok if known.beats == sent_at else tokens)

    def sent_since_beat(self, model: str) -> dict[str, Sent]:
        """What each peer was sent for a model since its last heartbeat, less what has ended."""
        return {node: known.sent[model] for node, known in self._peers.items() if model in known.sent}

    def tick(self, now: float, every_s: float) -> float:
        """Call this every ``every_s``. A late call means that this node was busy, stopped or asleep: heartbeats missed
        in that time do not count against peers. Returns by how much it is late."""
        late_s = now - self._tick_s - every_s
        self._tick_s, self._ticks = now, True
        if late_s < ASLEEP_S:
            return 0.0
        for known in self._peers.values():
            known.last_s = min(now, known.last_s + late_s)
        self._changed()
        return late_s

    def changes(self, now: float) -> list[Changed]:
        """Peers that went down or came back since the last call."""
        found = []
        for node, known in self._peers.items():
            is_down = known.heartbeat is not None and self._state(known, now) == "down"
            if is_down and not known.down:
                known.down, known.down_since_s = True, known.last_s
                found.append(Changed(node=node, up=False, for_s=now - known.last_s))
            elif known.down and not is_down:
                known.down = False
                found.append(Changed(node=node, up=True, for_s=now - known.down_since_s))
        return found

    def view(self, now: float) -> tuple[NodeView, ...]:
        """Every peer as routing sees it."""
        if now >= self._good_until_s:
            self._view = tuple(self._view_of(node, known, now) for node, known in sorted(self._peers.items()))
            self._good_until_s = min((self._next_s(known, now) for known in self._peers.values()), default=_NEVER)
        return self._view

    def _view_of(self, node: str, known: _Known, now: float) -> NodeView:
        if (heartbeat := known.heartbeat) is None:
            # just after the start it is unknown what a peer serves
            fresh = known.misses < DOWN_MISSES and now - known.last_s <= DOWN_BEATS * self._beat_s
            return NodeView(node=node, url=known.url, state="unknown" if fresh else "down", heard=False)
        return NodeView(
            node=node,
            url=known.url,
            state=self._state(known, now),
            draining=heartbeat.draining,
            models=heartbeat.models,
            heat=heartbeat.heat,
            memory=heartbeat.memory,
            hop_s=min(known.hops_s, default=0.0),
            known=known.hashes,
        )

    def _state(self, known: _Known, now: float) -> str:
        if self._ticks:
            # a node that has just woken has not read the pending heartbeats, and must not judge by the time
            now = min(now, self._tick_s + ASLEEP_S)
        silent_s = now - known.last_s
        if known.misses >= DOWN_MISSES or silent_s > DOWN_BEATS * self._beat_s:
            return "down"
        if known.lost:
            return "lost"
        return "suspect" if known.misses or silent_s > SUSPECT_BEATS * self._beat_s else "up"

    def _next_s(self, known: _Known, now: float) -> float:
        """When a peer's state may change merely because time passes."""
        edges = [known.last_s + beats * self._beat_s for beats in (SUSPECT_BEATS, DOWN_BEATS)]
        # a little after the edge, where the comparison has turned
        return min((edge + 1e-6 for edge in edges if edge >= now), default=_NEVER)

    def _changed(self) -> None:
        self._good_until_s = -_NEVER


def of_another_rack(url: str, heartbeat: Heartbeat, rack: str) -> str:
    """What is said of a node that answers and belongs to another rack; "" when it belongs to this one."""
    if heartbeat.rack == rack:
        return ""
    return f"peer {url}: belongs to rack {heartbeat.rack!r}, this node to {rack!r}; correct node.rack or the url"


def skewed(url: str, heartbeat: Heartbeat, now_ms: int) -> str:
    """What is said of a peer whose clock differs from this node's; "" when it does not."""
    skew_ms = heartbeat.t_ms - now_ms
    if abs(skew_ms) <= SKEW_WARNING_MS:
        return ""
    return f"peer {url}: clock skew of {skew_ms / 1000:.1f} s; synchronize both clocks to the same source"
