"""Content taint: a message that was in a SENSITIVE request makes every later request that contains it SENSITIVE. Pure.

What is kept of a message is a mark: a keyed hash of its normal form. The normal form has the text's letters and digits
alone, without case, accents and compatibility variants (full width, superscripts): so spaces, line breaks, punctuation,
Markdown and invisible characters change nothing. A text that is JSON is read first and counts by its sorted content, so
that another order of keys or other escapes change nothing, either. Whoever paraphrases, translates, shortens or quotes
a message within another one, or writes it with letters that only look alike, has another message.
"""

import hmac
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from agent.wire.frames import Ask, Embed, Message

MARK_BYTES = 16
RECORD_BYTES = MARK_BYTES + 4
KEY_BYTES = 32
BUCKETS = 256
"""Parts of a set that are compared between nodes; a mark's first byte is its bucket."""
LOST = b"\xff" * MARK_BYTES
"""In the place of marks that did not fit: whoever holds it does not know everything."""
_CELLS = 1 << 16
_JSON_CHARS = 64 << 10
"""A longer text counts as it is written."""
_PIECE_CHARS = 16 << 10
"""The interpreter is held no longer than this takes: other requests go on while a thread reads a long text."""
_UPPER, _LOWER = bytes(range(65, 91)), bytes(range(97, 123))
_FOLD = bytes.maketrans(_UPPER, _LOWER)
_ASCII_REST = bytes(code for code in range(128) if not chr(code).isalnum())
_REST = re.compile("[\\W_\u115f\u1160]+")
_UNSEEN = re.compile(
    "[\\s\u00ad\u034f\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]+"
)
_THOUGHT_ENDS = ("</think>", "</thinking>", "</thought>", "</reasoning>", "</details>", "[/THINK]")
"""What clients write after the reasoning that they put before an answer."""


class Reading(NamedTuple):
    """The records of a file: the marks, the bytes up to the end of the last one, and how many before it are invalid."""

    marks: "Marks"
    good_bytes: int
    damaged: int


def normal(text: str) -> bytes:
    """The normal form of a text; b"" for one of spaces. One without letters and digits keeps its other characters."""
    if len(text) <= _PIECE_CHARS:
        return _plain(text) or _signs(text)
    pieces = [text[at : at + _PIECE_CHARS] for at in range(0, len(text), _PIECE_CHARS)]
    return b"".join(map(_plain, pieces)) or b"".join(map(_signs, pieces))


def _plain(piece: str) -> bytes:
    """Letters and digits. No character depends on its neighbours, so a text may be cut anywhere."""
    if piece.isascii():
        return piece.encode().translate(_FOLD, _ASCII_REST)
    folded = unicodedata.normalize("NFKD", piece.casefold())
    return _REST.sub("", folded).casefold().encode("utf-8", "surrogatepass")


def _signs(piece: str) -> bytes:
    return _UNSEEN.sub("", unicodedata.normalize("NFKD", piece)).encode("utf-8", "surrogatepass")


def said(text: str) -> Iterator[bytes]:
    """The normal form of a text, and that of its content where it is JSON; nothing where that has none."""
    if text.lstrip()[:1] in ("{", "[", '"') and len(text) <= _JSON_CHARS:
        try:
            content = normal(" ".join(_leaves(msgspec.json.decode(text))))
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
            pass
        else:
            yield from (content, normal(text)) if content else ()
            return
    if found := normal(text):
        yield found


def forms(messages: Iterable[Message]) -> Iterator[bytes]:
    """Everything of a conversation that is marked, and looked for; none is empty.

    Of each message its content, its reasoning, both together as some clients send them back, the content without the
    reasoning that a client put before it, and each call's arguments. Then neighbours that another client sends as one
    message, or that came as one and are now several: those of one role, and system messages with the user's."""
    contents = list[tuple[str, bytes]]()
    for message in messages:
        found = tuple(said(message.content))
        yield from found
        yield from _without_thought(message.content)
        for call in message.calls:
            yield from said(call.arguments)
        content = found[-1] if found else b""
        contents.append((message.role, content))
        if thought := normal(message.reasoning):
            yield from (thought, thought + content)
    for group in (_role, _asked):
        for _, run in groupby(contents, group):
            several = [content for _, content in run if content]
            if len(several) > 1:
                yield b"".join(several)


def messages_of(ask: Ask) -> tuple[Message, ...]:
    """What a request says: its conversation, the prompt that it continues, or its inputs, which a later request may
    have as messages. Token ids count as their numbers."""
    if not isinstance(ask, Embed):
        return ask.messages if ask.prompt is None else (Message(role="user", content=ask.prompt),)
    texts = (one if isinstance(one, str) else " ".join(map(str, one)) for one in ask.inputs)
    return tuple(Message(role=f"input {n}", content=one) for n, one in enumerate(texts))


def name_of(key: bytes) -> bytes:
    """What tells a key from others, and reveals nothing of it."""
    return hmac.digest(key, b"name", "sha256")[:8]


def mark(key: bytes, one: bytes) -> bytes:
    """The mark of a form. A long one is hashed without holding the interpreter."""
    found = hmac.digest(key, one, "sha256") if len(one) < _PIECE_CHARS else hmac.new(key, one, "sha256").digest()
    return found[:MARK_BYTES]


def split(packed: bytes) -> list[bytes]:
    """Marks one after another; a remainder that is too short is left out."""
    return [packed[at : at + MARK_BYTES] for at in range(0, len(packed) - MARK_BYTES + 1, MARK_BYTES)]


def record(one: bytes) -> bytes:
    """A mark with its checksum, for a file."""
    return one + zlib.crc32(one).to_bytes(RECORD_BYTES - MARK_BYTES, "big")


def read_records(raw: bytes) -> Reading:
    """Records one after another. Invalid ones at the end are what a crash leaves; before others they are damage."""
    marks, end, damaged, invalid = Marks(), 0, 0, 0
    for at in range(0, len(raw) - RECORD_BYTES + 1, RECORD_BYTES):
        one = raw[at : at + MARK_BYTES]
        if zlib.crc32(one) == int.from_bytes(raw[at + MARK_BYTES : at + RECORD_BYTES], "big"):
            marks.add(one)
            end, damaged, invalid = at + RECORD_BYTES, damaged + invalid, 0
        else:
            invalid += 1
    return Reading(marks, end, damaged)


class Marks:
    """A set of marks that takes little more than their bytes: those with the same first two bytes lie in one string."""

    def __init__(self, marks: Iterable[bytes] = ()) -> None:
        self._cells = [b""] * _CELLS
        self._digests = [0] * BUCKETS
        self._count = 0
        for one in marks:
            self.add(one)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, one: bytes) -> bool:
        cell = self._cells[one[0] << 8 | one[1]]
        at = cell.find(one)
        while at > 0 and at % MARK_BYTES:
            at = cell.find(one, at + 1)
        return at >= 0

    def add(self, one: bytes) -> bool:
        """False if it was there."""
        if one in self:
            return False
        self._cells[one[0] << 8 | one[1]] += one
        self._digests[one[0]] ^= int.from_bytes(one, "big")
        self._count += 1
        return True

    @property
    def digest(self) -> str:
        """Of all marks."""
        found = 0
        for one in self._digests:
            found ^= one
        return f"{found:032x}"

    def digests(self) -> bytes:
        """Of each bucket, in order."""
        return b"".join(one.to_bytes(MARK_BYTES, "big") for one in self._digests)

    def differing(self, digests: bytes) -> list[int]:
        """Buckets whose digests are not these. Of a truncated answer all count as differing."""
        mine = self.digests()
        if mine == digests:
            return []
        spans = ((n, slice(n * MARK_BYTES, (n + 1) * MARK_BYTES)) for n in range(BUCKETS))
        return [n for n, span in spans if mine[span] != digests[span]]

    def bucket(self, number: int) -> bytes:
        """The marks of a bucket, one after another."""
        return b"".join(self._cells[number << 8 : (number + 1) << 8])


def _without_thought(content: str) -> Iterator[bytes]:
    """Reasoning that stands before the rest of a content, and the rest."""
    if "</" not in content and "[/" not in content:
        return
    for end in _THOUGHT_ENDS:
        thought, found, rest = content.partition(end)
        if found:
            thought = thought.lstrip()
            # "<think>" and its like; some templates leave it out
            begin = thought.find(">" if thought[:1] == "<" else "]") + 1 if thought[:1] in ("<", "[") else 0
            yield from (*said(thought[begin:]), *said(rest))
            return


def _role(turn: tuple[str, bytes]) -> str:
    return turn[0]


def _asked(turn: tuple[str, bytes]) -> str:
    """System messages and the user's are one group: some clients, and some templates, fold the first into the other."""
    return "user" if turn[0] == "system" else turn[0]


def _leaves(tree: Any) -> Iterator[str]:
    """The keys and values of JSON as texts, keys sorted."""
    if isinstance(tree, dict):
        for name in sorted(tree):
            yield name
            yield from _leaves(tree[name])
    elif isinstance(tree, list):
        for one in tree:
            yield from _leaves(one)
    else:
        whole = isinstance(tree, float) and tree.is_integer()
        yield str(int(tree) if whole else tree)


def marks_of(keys: Sequence[bytes], found: Iterable[bytes]) -> Iterator[bytes]:
    """The marks of forms under each key."""
    for one in dict.fromkeys(found):
        for key in keys:
            yield mark(key, one)
