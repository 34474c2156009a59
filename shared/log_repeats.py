"""Which of many alike log lines are written. Pure: the time is an argument, and what is kept is bounded."""

from collections.abc import Hashable

import msgspec

EVERY_S = 60.0
MOST_KINDS = 256
"""Kinds of lines that are told apart at a time; all further ones count as one."""
_OTHER = ("other kinds of lines",)
_NEVER = float("inf")


class _Seen(msgspec.Struct):
    until_s: float
    left: int
    repeated: int = 0


class Repeats:
    """Of each kind ``burst`` lines are written in ``every_s``; the others are counted."""

    def __init__(self, *, burst: int = 1, every_s: float = EVERY_S) -> None:
        self._burst, self._every_s = burst, every_s
        self._seen: dict[Hashable, _Seen] = {}
        self.next_s = _NEVER
        """When counts of lines that were not written may be told."""

    def take(self, kind: Hashable, now_s: float) -> int | None:
        """None for a line that is not written; else how many of its kind were not written before it."""
        if kind not in self._seen and len(self._seen) >= MOST_KINDS:
            self._forget(now_s)
            kind = kind if len(self._seen) < MOST_KINDS else _OTHER
        seen = self._seen.get(kind)
        if seen is not None and now_s < seen.until_s:
            if seen.left:
                seen.left -= 1
                return 0
            seen.repeated += 1
            self.next_s = min(self.next_s, seen.until_s)
            return None
        self._seen[kind] = _Seen(now_s + self._every_s, self._burst - 1)
        return seen.repeated if seen is not None else 0

    def due(self, now_s: float) -> list[tuple[Hashable, int]]:
        """Kinds whose time is over with lines that were not written, and how many; each is told once."""
        # copies: whatever the garbage collector ends meanwhile may have a line of its own
        every = dict(self._seen).items()
        found = [(kind, seen.repeated) for kind, seen in every if seen.repeated and now_s >= seen.until_s]
        self._forget(now_s)
        self.next_s = min((seen.until_s for _, seen in every if seen.repeated and now_s < seen.until_s), default=_NEVER)
        return found

    def _forget(self, now_s: float) -> None:
        self._seen = {kind: seen for kind, seen in dict(self._seen).items() if now_s < seen.until_s}
