"""Server-sent events, as they come in pieces of any size. Bounded: a line or an event that never ends is an error.
Pure."""

import re
from typing import NamedTuple

MOST_EVENT_BYTES = 1 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r")
_LINE_COST = 64
"""What a line of data counts beside its bytes: an event of empty lines holds memory, too."""


class Garbage(Exception):
    """What arrived is not what was asked for; the message says what it is, and quotes nothing of it."""


class Event(NamedTuple):
    """One event: its name ("" without one) and its data, the lines joined."""

    name: str
    data: bytes


class Events:
    """The events of one answer. The bytes that are held are at most those of one event and of one piece."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._searched = 0
        self._lines: list[bytes] = []
        self._bytes, self._name = 0, ""
        self._began = self._after_cr = False

    def feed(self, piece: bytes) -> list[Event]:
        """The events that are complete with this piece. Raises Garbage."""
        if self._after_cr and piece:
            self._after_cr, piece = False, piece.removeprefix(b"\n")  # it belongs to the CR before it
        self._rest += piece
        found, at = [], 0
        for end in _LINE_END.finditer(self._rest, self._searched):
            line = bytes(self._rest[at : end.start()])
            if (event := self._line(line)) is not None:
                found.append(event)
            at = end.end()
        self._after_cr = at > 0 and at == len(self._rest) and self._rest.endswith(b"\r")
        del self._rest[:at]
        self._searched = len(self._rest)
        if self._searched + self._bytes > MOST_EVENT_BYTES:
            raise Garbage(f"an event of more than {MOST_EVENT_BYTES >> 20} MiB")
        return found

    def _line(self, line: bytes) -> Event | None:
        if not self._began:
            self._began, line = True, line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            return self._dispatched()
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._lines.append(value)
            self._bytes += len(value) + _LINE_COST
        elif field == b"event":
            self._name = value[:64].decode("ascii", "replace")
        return None

    def _dispatched(self) -> Event | None:
        lines, name = self._lines, self._name
        self._lines, self._bytes, self._name = [], 0, ""
        return Event(name, b"\n".join(lines)) if lines else None
