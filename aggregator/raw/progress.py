"""How far a run has come through its backlog: what is next, what has been settled, what could not be read. Pure.

A folder's cursor passes only what was read without a gap. An object that cannot be read makes its node wait, and nobody
else; after SKIP_AFTER_MS it is passed over.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from aggregator.manifest import Unread

PIECE_SEGMENTS = 12_000
"""Segments per commit: about a minute of work."""
PIECE_BYTES, MOST_BYTES = 256 << 20, 16 << 20
"""Limits of a piece and of a segment as stored; agents write at most 256 KiB per segment. Each piece writes its days'
tables again, so that after an outage few pieces cost less; what they unpack to has its own limit."""
WITNESSES = 4
"""Of each kind."""
SKIP_AFTER_MS = 3 * 86_400_000
"""A weekend and a working day: time for somebody to repair the store. Raw segments are kept for a week at least."""


class Pending(NamedTuple):
    """A segment that no commit has counted. ``folder`` names its cursor; None for a foreign object, whose key may sort
    anywhere and must not advance a cursor."""

    key: str
    folder: str | None
    size: int = 0


class Outcome(NamedTuple):
    """Result for one object: number of valid batches, and the reason for its quarantine, or "". ``unread`` says why it
    could not be read at all; ``rack`` names the other rack that every batch in it is of, ``misplaced`` is set once that
    is settled. ``day`` is the UTC day of what is not counted, "" if that is not known."""

    key: str
    batches: int
    unknown_records: int
    reason: str
    unread: str = ""
    rack: str = ""
    day: str = ""
    misplaced: bool = False


class Progress:
    """The backlog of one run, oldest first. ``known`` are the objects that earlier runs could not read."""

    def __init__(self, pending: Sequence[Pending], known: Mapping[str, Unread], now_ms: int) -> None:
        self._rest, self._known, self._now_ms = list(pending), known, now_ms
        self._order: dict[str, list[Pending]] = {}
        for one in pending:
            if one.folder is not None:
                self._order.setdefault(one.folder, []).append(one)
        self._at = dict.fromkeys(self._order, 0)
        self._read: dict[str, Outcome] = {}
        self._parts = 1
        self.unread: dict[str, Unread] = {}
        self.foreign: dict[str, Outcome] = {}
        self.bad: dict[str, str] = {}
        self._ours: set[str] = set()
        self.done = self.counted = 0

    def piece(self) -> list[Pending]:
        """What to read next, bounded in segments and bytes; at least one segment while there are any."""
        piece: list[Pending] = []
        size = 0
        for one in self._rest:
            if piece and (len(piece) * self._parts >= PIECE_SEGMENTS or (size + one.size) * self._parts > PIECE_BYTES):
                break
            piece.append(one)
            size += min(one.size, MOST_BYTES)
        return piece

    def too_much(self, piece: Sequence[Pending]) -> bool:
        """A piece was too much for the disk: the next is smaller. False if it cannot be."""
        if len(piece) <= 1:
            return False
        self._parts = max(2 * self._parts, PIECE_SEGMENTS // max(1, len(piece) // 2))
        return True

    def read(self, piece: Sequence[Pending], outcomes: Iterable[Outcome]) -> tuple[dict[str, str], list[Outcome]]:
        """Note what was read of a piece: the cursors that advance, and what is settled by that."""
        found = {one.key: self._passed_over(one) for one in outcomes}
        waiting = {node_of(key) for key, one in found.items() if one.unread}
        self.unread |= {key: self._since(key, one.unread) for key, one in found.items() if one.unread}
        self.foreign |= {key: one for key, one in found.items() if one.rack}
        good = {key: one for key, one in found.items() if not one.unread and not one.rack}
        self._read |= good
        self._ours |= {node_of(key) for key, one in good.items() if one.batches}
        self.bad |= {key: one.reason for key, one in good.items() if one.reason}
        self.counted += sum(one.batches for one in good.values())
        self.done += len(good)
        # a share also stops before what cannot be read, and that says nothing about its size
        stopped = not waiting and any(one.key not in found for one in piece)
        self._parts = min(PIECE_SEGMENTS, 2 * self._parts) if stopped else max(1, self._parts // 2)
        self._rest = list(self._still_wanted(found))
        foreign = [self._read.pop(one.key) for one in piece if one.folder is None and one.key in self._read]
        cursors, settled = self._advanced()
        return cursors, [*foreign, *settled]

    def misplaced(self) -> list[Outcome]:
        """Objects of another rack from nodes that also wrote batches of this one: what is left of an earlier
        configuration. Those of nodes that wrote nothing else are not settled, since the name that is wrong may be that
        in the aggregator's configuration."""
        return [one for key, one in self.foreign.items() if node_of(key) in self._ours]

    def settle(self, some: Sequence[Outcome]) -> tuple[dict[str, str], list[Outcome]]:
        """Have these objects of another rack settled after all, as bad ones: like `read`."""
        for one in some:
            self._read[one.key] = self.foreign.pop(one.key)._replace(rack="", misplaced=True)
            self.bad[one.key] = one.reason
        return self._advanced()

    def strangers(self, cursors: Mapping[str, str]) -> tuple[dict[str, str], bool]:
        """Nodes all of whose new objects are of another rack, with its name, and whether those are all nodes of the
        bucket."""
        racks = {node_of(key): one.rack for key, one in self.foreign.items()}
        others = (self._ours | {node_of(folder) for folder in cursors}) - racks.keys()
        return racks, not others

    def witnesses(self, outcomes: Sequence[Outcome], cursors: Mapping[str, str]) -> list[str]:
        """What to ask the store for, to know whether it gives out anything."""
        tried = {one.key for one in outcomes}
        good = [one.key for one in outcomes if not one.unread]
        return witnesses(good, cursors, [one.key for one in self._rest if one.key not in tried])

    def _still_wanted(self, found: Mapping[str, Outcome]) -> Iterator[Pending]:
        """What is neither read nor behind an unreadable object of its node."""
        behind: set[str] = set()
        for one in self._rest:
            if one.key in found and found[one.key].unread:
                behind.add(node_of(one.key))
            elif one.key not in found and node_of(one.key) not in behind:
                yield one

    def _advanced(self) -> tuple[dict[str, str], list[Outcome]]:
        cursors: dict[str, str] = {}
        settled: list[Outcome] = []
        for folder, order in self._order.items():
            while (at := self._at[folder]) < len(order) and order[at].key in self._read:
                settled.append(self._read.pop(order[at].key))
                cursors[folder], self._at[folder] = order[at].key, at + 1
        return cursors, settled

    def _since(self, key: str, reason: str) -> Unread:
        known = self._known.get(key)
        return Unread(reason=reason, since_ms=known.since_ms if known else self._now_ms)

    def _passed_over(self, one: Outcome) -> Outcome:
        """An object that could not be read for days is settled like a bad one."""
        if not one.unread or self._now_ms - self._since(one.key, one.unread).since_ms < SKIP_AFTER_MS:
            return one
        days = SKIP_AFTER_MS // 86_400_000
        return Outcome(one.key, 0, 0, f"{one.key}: passed over; unreadable for {days} days ({one.unread})")


def witnesses(good: Sequence[str], cursors: Mapping[str, str], untried: Sequence[str]) -> list[str]:
    """A few objects by which a store that is down differs from one that has lost some: the last one that could be read,
    some that earlier runs read, some that nobody has asked for."""
    return [*good[-1:], *_spread(sorted(cursors.values())), *_spread(untried)]


def _spread(all_of_them: Sequence[str]) -> Sequence[str]:
    return all_of_them[:: -(-len(all_of_them) // WITNESSES) or 1]


def node_of(key: str) -> str:
    """The part of a key that tells whose it is: two levels below raw/ or urgent/."""
    return "/".join(key.split("/")[:3])


def advanced(read: Iterable[Pending]) -> dict[str, str]:
    """The cursors advanced past these segments, which are in the order of the store's listing."""
    return {one.folder: one.key for one in read if one.folder is not None}
