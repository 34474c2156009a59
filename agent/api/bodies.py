"""How much memory bodies may take: what a body weighs before it is decoded, and the budget of all that are in flight.
Pure.

A few bytes of JSON become an object of a hundred, so a body's length says little about what decoding costs. Its
punctuation outside strings tells how many objects there will be at most, for the price of a scan.
"""

import re
from collections import Counter
from collections.abc import Iterator

from shared.errors import RackError, Refused, Retryable

LIGHT_BYTES = 16 << 10
"""Bodies up to here are not weighed: at worst they decode to half a megabyte."""
TEXT_TWICE = 2
"""A body of text takes its length twice: as it came, and decoded."""
LIST_BYTES, OBJECT_BYTES, KEY_BYTES, STRING_BYTES, VALUE_BYTES = 80, 208, 128, 64, 40
"""What one costs at most beside its text (CPython 3.11 to 3.13; tests/agent/api/test_bodies.py measures it)."""
RETRY_S = 2.0
READ_BYTES_S, AT_ONCE_BYTES = 8 << 20, 16 << 20
"""How fast bodies of one key are read, and how much of them at once: two million tokens a second. Reading, weighing
and decoding take CPU time that the answers of other keys need."""
MOST_WAIT_S = 10.0
"""For how long a key that sent too much is slowed down at most."""
_OTHER_THAN_MARKS = bytes(sorted(set(range(256)) - set(b'"[{,:')))
_STRING = re.compile(rb'"[^"]*"')
_WIDE = re.compile(rb"[\xf0-\xff]|\\u[dD][89aAbB]")
_WIDER_THAN_LATIN = re.compile(rb"[\xc4-\xff]|\\u")
_WIDEST = 4
"""Bytes that a character takes at most."""
_PIECE = 64 << 10


def weight(body: bytes, enough: int) -> int:
    """An upper bound of the memory, in bytes, of a JSON body with what it decodes to; at least ``enough`` when it is
    surely more than that."""
    if len(body) <= LIGHT_BYTES:
        return len(body) * (1 + _WIDEST)
    text = len(body) * _char_bytes(body)
    marks = b"".join(_marks(piece) for piece in _pieces(body))
    strings = marks.count(b'"') // 2 * STRING_BYTES
    if (so_far := len(body) + text + strings) >= enough:
        return so_far
    found = _outside_strings(marks)
    return (
        so_far
        + found["["] * LIST_BYTES
        + found["{"] * OBJECT_BYTES
        + found[":"] * KEY_BYTES
        + (found[","] + 1) * VALUE_BYTES
    )


def _pieces(body: bytes) -> Iterator[bytes]:
    """A body in pieces, between which other threads have their turn; no escape is cut in two."""
    begin = 0
    while begin < len(body):
        end = begin + _PIECE
        while body[end - 1 : end] == b"\\":
            end += 1
        yield body[begin:end]
        begin = end


def _marks(piece: bytes) -> bytes:
    """The punctuation of a piece; of what is in strings, all but the quotes that are escaped."""
    return piece.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHER_THAN_MARKS)


def _char_bytes(body: bytes) -> int:
    """A string takes as many bytes for each character as its widest one needs."""
    if body.isascii() and b"\\u" not in body:
        return 1
    return _WIDEST if _WIDE.search(body) else 2 if _WIDER_THAN_LATIN.search(body) else 1


def _outside_strings(marks: bytes) -> Counter[str]:
    """How often each mark is outside a string; in pieces, between which other threads have their turn."""
    found: Counter[str] = Counter()
    inside = False
    for at in range(0, len(marks), _PIECE):
        piece = marks[at : at + _PIECE]
        ends_inside = inside ^ (piece.count(b'"') % 2 == 1)
        plain = _STRING.sub(b"", b'"' * inside + piece + b'"' * ends_inside)
        inside = ends_inside
        found.update({mark: plain.count(mark.encode()) for mark in "[{,:"})
    return found


class Held:
    """What one request holds of the budget, until the end of its context."""

    def __init__(self, bodies: "Bodies", key_id: str) -> None:
        self._bodies, self._key_id, self.bytes = bodies, key_id, 0

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.release(self._key_id, self.bytes)

    def take(self, more: int) -> None:
        """Hold more. Raises Refused when no budget is large enough, Retryable when it is used up now."""
        self._bodies.take(self._key_id, more, alone=self.bytes + more)
        self.bytes += more

    def pace_s(self, more: int, now_s: float) -> float:
        """Seconds to wait after reading ``more`` bytes."""
        return self._bodies.pace_s(self._key_id, more, now_s)

    @property
    def most(self) -> int:
        """The most that one request may hold."""
        return self._bodies.per_key


class Bodies:
    """The budget: bytes in all, and for each API key."""

    def __init__(self, total: int, per_key: int) -> None:
        self.total, self.per_key = total, per_key
        self.in_all = 0
        self._by_key: Counter[str] = Counter()
        self._read_until_s: dict[str, float] = {}

    def become(self, total: int, per_key: int) -> None:
        """Have another budget; what is held stays counted."""
        self.total, self.per_key = total, per_key

    def held(self, key_id: str) -> Held:
        """For the life of one request."""
        return Held(self, key_id)

    def take(self, key_id: str, more: int, *, alone: int) -> None:
        """Count ``more`` bytes of a request that then holds ``alone``. Raises as Held.take does."""
        if alone > self.per_key:
            raise too_heavy(self.per_key)
        if self._by_key[key_id] + more > self.per_key:
            raise _full("this API key's requests in flight hold too much memory", "key_bodies_full")
        if self.in_all + more > self.total:
            raise _full("the requests in flight hold too much memory", "bodies_full")
        self._by_key[key_id] += more
        self.in_all += more

    def release(self, key_id: str, bytes_held: int) -> None:
        """A request has ended that held so much."""
        self.in_all -= bytes_held
        self._by_key[key_id] -= bytes_held
        if not self._by_key[key_id]:
            del self._by_key[key_id]

    def pace_s(self, key_id: str, more: int, now_s: float) -> float:
        """Seconds until bytes of a key may be read again, after ``more`` of them."""
        earliest_s = now_s - AT_ONCE_BYTES / READ_BYTES_S
        self._read_until_s = {key: until_s for key, until_s in self._read_until_s.items() if until_s > earliest_s}
        until_s = max(self._read_until_s.get(key_id, 0.0), earliest_s) + more / READ_BYTES_S
        self._read_until_s[key_id] = until_s = min(until_s, now_s + MOST_WAIT_S)
        return max(0.0, until_s - now_s)


def too_heavy(limit: int) -> RackError:
    """The error for a body that decodes to more than any request may hold."""
    why = f"the request body holds too many values; decoded it may take {limit} bytes (limits.bodies_per_key_bytes)"
    return Refused(why, code="body_too_large")


def _full(why: str, code: str) -> RackError:
    return Retryable(why, code=code, retry_after_s=RETRY_S)
