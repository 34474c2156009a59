"""Which prompt a loader prepares next: the highest rank first, fair between API keys, and within a key the small ones
first. Pure.

A loader prepares one prompt after the other, as they arrive. So little is sent ahead to it: at most one large prompt,
and a few small ones that may be next.
"""

from dataclasses import dataclass, field

from agent.wire.frames import Ask, Embed
from agent.wire.priority import NEUTRAL, STARVED, Priority, Turns

AHEAD_BYTES = 256 << 10
"""Prompts sent ahead of their preparation, the largest not counted."""
WAITING_BYTES = 512 << 20
"""Prompts that may wait for one loader; beyond this, the largest of the key that holds most of the lowest rank is
refused."""
_EACH_BYTES = 1 << 10
"""What any prompt costs, however short."""


def size_bytes(ask: Ask) -> int:
    """What the preparation of a request costs, as the size of its texts."""
    if isinstance(ask, Embed):
        return _EACH_BYTES + sum(map(len, ask.inputs))
    turns = sum(
        len(one.content) + len(one.reasoning) + sum(len(call.arguments) for call in one.calls) for one in ask.messages
    )
    beside = len(ask.prompt or "") + len(ask.schema or "") + len(ask.template_args or "")
    return _EACH_BYTES + turns + beside + sum(map(len, ask.tools)) + len(ask.made)


@dataclass
class _Key:
    rank: int
    served: float
    """Bytes prepared for this key, counted from where the others were when it began to wait."""
    waiting: dict[int, tuple[float, int]] = field(default_factory=dict)
    """By request: its place among those of the key, and its size."""
    bytes: int = 0
    """Of those that wait."""

    @property
    def first(self) -> int:
        if len(self.waiting) == 1:
            return next(iter(self.waiting))
        return min(self.waiting, key=lambda number: (self.waiting[number][0], number))


class PreparationLine:
    """Requests that wait to be sent to a loader, and those sent that it has not prepared. Those of the highest rank are
    served first. Of them a key that has had less is served first; within a key a request is placed by its size plus
    what the key has had before it came, so a large one is passed by small ones for a while only."""

    def __init__(self, ahead_bytes: int = AHEAD_BYTES, waiting_bytes: int = WAITING_BYTES) -> None:
        self._ahead_bytes, self._waiting_bytes = ahead_bytes, waiting_bytes
        self._keys: dict[tuple[int, str], _Key] = {}
        """By rank and name."""
        self._turns = Turns()
        self._sent: dict[int, int] = {}
        self._key_of: dict[int, _Key] = {}
        """Of each request that was not sent yet."""
        self._bytes = 0
        self._now: dict[int, float] = {}
        """By rank: what each key that waits has had at least."""

    @property
    def waiting(self) -> list[int]:
        """Requests that were not sent yet."""
        return list(self._key_of)

    def add(self, number: int, name: str, size: int, priority: Priority = NEUTRAL, now_s: float = 0.0) -> list[int]:
        """Queue a request of a key; returns those that are refused, because too much waits."""
        rank = priority.rank
        begun = self._now.get(rank, 0.0)
        key = self._key_of[number] = self._keys.setdefault((rank, name), _Key(rank, begun))
        key.waiting[number] = (max(key.served, begun) + size, size)
        self._turns.arrive(number, priority, now_s)
        key.bytes += size
        self._bytes += size
        refused: list[int] = []
        while self._bytes > self._waiting_bytes:
            lowest = min(one.rank for one in self._key_of.values())
            greedy = max((one for one in self._keys.values() if one.rank == lowest), key=lambda one: one.bytes)
            refused.append(max(greedy.waiting, key=lambda one: (greedy.waiting[one][1], one)))
            self._take(refused[-1])
            self._turns.leave(refused[-1])
        return refused

    def next(self, now_s: float = 0.0) -> int | None:
        """The request to send now, None while it has to wait."""
        if not self._key_of:
            return None
        number = self._first(now_s)
        key = self._key_of[number]
        ready, begun = self._ready(key.rank), self._now.get(key.rank, 0.0)
        size = key.waiting[number][1]
        ahead = [*self._sent.values(), size]
        if self._sent and sum(ahead) - max(ahead) > self._ahead_bytes:
            return None
        self._sent[number] = self._take(number)
        self._turns.take(number, now_s)
        # what others have had meanwhile is not saved up
        self._now[key.rank] = begun = min(max(one.served, begun) for one in ready)
        key.served = max(key.served, begun) + size
        return number

    def _ready(self, rank: int) -> list[_Key]:
        return [key for key in self._keys.values() if key.rank == rank and key.waiting]

    def _first(self, now_s: float) -> int:
        """The request whose turn it is."""
        rank = next(iter(self._key_of.values())).rank
        if self._turns.mixed:
            rank = max(one.rank for one in self._key_of.values())
            starved = [one for one in self._key_of if self._turns.rank(one, now_s) == STARVED]
            if starved:
                return starved[0]
        ready, begun = self._ready(rank), self._now.get(rank, 0.0)
        key = ready[0]
        if len(ready) > 1:
            key = min(ready, key=lambda one: (max(one.served, begun) + one.waiting[one.first][1], one.first))
        return key.first

    def leave(self, number: int) -> None:
        """A request was prepared, or nobody wants it any more."""
        self._sent.pop(number, None)
        self._turns.leave(number)
        if number in self._key_of:
            self._take(number)
        if not self._sent and not self._key_of:
            self._keys.clear()

    def _take(self, number: int) -> int:
        """A request waits no longer; its size."""
        key = self._key_of.pop(number)
        _, size = key.waiting.pop(number)
        key.bytes -= size
        self._bytes -= size
        return size
