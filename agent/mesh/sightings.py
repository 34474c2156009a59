"""Who was seen under which node id: two agents with one id are told apart by their marks. Pure.

A mark is of an agent's hardware and state folder, so that it survives a restart. A node id that changes hands once has
a new machine; one that changes back and forth is used twice at the same time. This node's own id is used twice as soon
as anybody else shows it, or a peer says that it sees two.
"""

from collections.abc import Collection

import msgspec

TWICE_S = 60.0
"""How long a change back counts, and how long it is told after the last one."""
TOLD_EVERY_S = 600.0
MOST_MARK = 40


class Twice(msgspec.Struct, frozen=True, kw_only=True):
    """A node id that two agents use, by their marks; ``by`` is the peer that sees them, "" for this node."""

    node: str
    one: str
    other: str
    by: str = ""


def mark_of(hardware: str, spool_id: str) -> str:
    """The mark of an agent: eight digits of its hardware's hash, eight of its state folder's id."""
    return f"{hardware[:8]}-{spool_id[:8]}"


def is_mark(text: str) -> bool:
    """Whether a text that a peer sent may be kept and shown."""
    return 0 < len(text) <= MOST_MARK and text.isascii() and text.replace("-", "").isalnum()


def sentence(found: Twice, me: str) -> str:
    """What `status` and the log say."""
    whose = "this node's id" if found.node == me else "node id"
    seen = f"{found.by} sees two agents" if found.by else f"two agents ({found.one} and {found.other})"
    verb = "under" if found.by else "use"
    return f"{seen} {verb} {whose} {found.node!r}: each machine needs its own node.id (docs/runbooks.md#node-id-clash)"


class Sightings:
    """``now`` is a monotonic clock in seconds, passed by the caller."""

    def __init__(self, me: str, mine: str) -> None:
        self.me, self.mine = me, mine
        self._seen: dict[str, dict[str, float]] = {}
        self._twice: dict[tuple[str, str], tuple[Twice, float]] = {}
        self._told: dict[tuple[str, str], float] = {}

    def saw(self, node: str, mark: str, now: float) -> None:
        """An agent proved that it knows the rack secret, under this id."""
        if not is_mark(mark):
            return
        if node == self.me:
            if mark != self.mine:
                self._note(Twice(node=node, one=self.mine, other=mark), now)
            return
        seen = self._seen.setdefault(node, {})
        latest = max(seen, key=lambda one: seen[one], default=mark)
        if latest != mark and mark in seen and now - seen[mark] <= TWICE_S:
            one, other = sorted((latest, mark))
            self._note(Twice(node=node, one=one, other=other), now)
        seen[mark] = now
        for old in [one for one, at in seen.items() if now - at > TWICE_S]:
            del seen[old]

    def heard(self, by: str, twice: Collection[str], now: float) -> None:
        """A peer says which ids it sees twice; this node's own is news here."""
        if self.me in twice:
            self._note(Twice(node=self.me, one=self.mine, other="", by=by), now)

    def twice(self, now: float) -> list[Twice]:
        """Ids that are used twice now."""
        return [found for found, at in self._twice.values() if now - at <= TWICE_S]

    def news(self, now: float) -> list[Twice]:
        """Of those the ones to tell: at first, and again from time to time."""
        found = []
        for key, (one, at) in self._twice.items():
            if now - at <= TWICE_S and now - self._told.get(key, -TOLD_EVERY_S) >= TOLD_EVERY_S:
                self._told[key] = now
                found.append(one)
        return found

    def _note(self, found: Twice, now: float) -> None:
        self._twice[found.node, found.by] = (found, now)
