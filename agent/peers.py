"""What is known of the other nodes: observations in, a view out. Level-triggered, so recovery needs no step by hand.

A peer is *suspect* when its last answer is older than one and a half beats and *down* after three and a half, or at
once for new work when a request to it could not connect.
"""

from collections.abc import Iterable

import msgspec

from agent.routing import ModelView, NodeView

SUSPECT_BEATS = 1.5
DOWN_BEATS = 3.5


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says of itself once a second."""

    protocol: int = 1
    node: str
    rack: str
    draining: bool = False
    models: tuple[ModelView, ...] = ()
    t_ms: int = 0


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """A peer was declared down (``up`` false) or came back; ``for_s`` since its last answer, or since it went."""

    node: str
    up: bool
    for_s: float


class _Known(msgspec.Struct, kw_only=True):
    url: str
    beat: Beat | None = None
    last_s: float
    refused_s: float | None = None
    sent: int = 0
    down: bool = False
    down_since_s: float = 0.0


class PeerTable:
    """Peers by node id. ``now`` is a monotonic clock in seconds, given by the caller."""

    def __init__(self, urls: Iterable[tuple[str, str]], *, beat_s: float, now: float) -> None:
        self._beat_s = beat_s
        self._peers = {node: _Known(url=url, last_s=now) for node, url in urls}

    def urls(self) -> list[tuple[str, str]]:
        """(node, url) of every peer."""
        return [(node, known.url) for node, known in self._peers.items()]

    def heard(self, node: str, beat: Beat, now: float) -> None:
        """A peer answered; what was sent since its last beat is now in its own count."""
        known = self._peers[node]
        known.beat, known.last_s, known.refused_s, known.sent = beat, now, None, 0

    def refused(self, node: str, now: float) -> None:
        """A request could not connect, or broke: no new work until the peer answers a beat."""
        if node in self._peers:
            self._peers[node].refused_s = now

    def sent(self, node: str) -> None:
        """A request was forwarded; counts as load until the next beat."""
        if node in self._peers:
            self._peers[node].sent += 1

    def changes(self, now: float) -> list[Changed]:
        """Peers that went down or came back since the last call."""
        found = []
        for node, known in self._peers.items():
            silent_s = now - known.last_s
            is_down = silent_s > DOWN_BEATS * self._beat_s
            if is_down and not known.down and known.beat is not None:
                known.down, known.down_since_s = True, known.last_s
                found.append(Changed(node=node, up=False, for_s=silent_s))
            elif known.down and not is_down:
                known.down = False
                found.append(Changed(node=node, up=True, for_s=now - known.down_since_s))
        return found

    def view(self, now: float) -> tuple[NodeView, ...]:
        """Every peer as routing sees it."""
        return tuple(self._view(node, known, now) for node, known in sorted(self._peers.items()))

    def _view(self, node: str, known: _Known, now: float) -> NodeView:
        beat = known.beat
        if beat is None:
            # just after the start nobody knows what a peer serves
            fresh = now - known.last_s <= DOWN_BEATS * self._beat_s
            return NodeView(node=node, url=known.url, state="unknown" if fresh else "down")
        models = tuple(msgspec.structs.replace(m, in_flight=m.in_flight + known.sent) for m in beat.models)
        return NodeView(node=node, url=known.url, state=self._state(known, now), draining=beat.draining, models=models)

    def _state(self, known: _Known, now: float) -> str:
        silent_s = now - known.last_s
        if known.refused_s is not None or silent_s > DOWN_BEATS * self._beat_s:
            return "down"
        return "suspect" if silent_s > SUSPECT_BEATS * self._beat_s else "up"
