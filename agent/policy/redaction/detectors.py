"""Everything that is looked for in the texts of one request, and where it stands. Pure.

Each text is read in every view of it (views.py); what base64 or hexadecimal digits spell is read, too, and replaced as
a whole. Texts that follow each other are also read as one, for a value that is divided between them.
"""

import binascii
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import regex

from agent.policy.redaction import keys, mail, numbers
from agent.policy.redaction.national_ids import NationalIds
from agent.policy.redaction.phones import Phones
from agent.policy.redaction.views import View, closed_up, fold_character, readings
from agent.policy.rules import Rules
from shared.errors import Retryable

Scan = Callable[[str], Iterable[tuple[int, int]]]
"""Finds spans in a text: another library's rules for secrets, or a model's names."""
ORDER = ("secret", "card", "iban", "national_id", "email", "phone", "pattern", "name")
"""Of findings that overlap a secret names what is replaced, else the longest; of equal ones, the first of these."""
PATTERN_S = 1.0
_DEPTH = 2
_WORD = r"(?!(?:[A-Z]?[a-z]+|[0-9]+)(?![A-Za-z0-9+/_=-]))"
"""No plain word and no number: base64 of a text is neither."""
_ENCODED = re.compile(
    rf"(?<![A-Za-z0-9+/_-]){_WORD}[A-Za-z0-9+/_-]{{8,}}(?:[ \t]{{0,8}}\r?\n[ \t]{{0,8}}[A-Za-z0-9+/_-]{{4,}})*"
    r"(?:[ \t\r\n]{1,9}[A-Za-z0-9+/_-]{2,3}(?==))?[ \t\r\n]{0,2}={0,2}"
)
_HEX = re.compile(
    r"(?<![A-Za-z0-9])(?:0x|\\x)?[0-9a-fA-F]{2}(?:[\s:,-]{0,2}(?:0x|\\x)?[0-9a-fA-F]{2}){5,}(?![A-Za-z0-9])"
)
_MARKS = {
    "email": re.compile(r"[\d._+@-]"),
    "secret": re.compile(r"\d|[a-z][A-Z]"),
    "phone": re.compile(r"^\D{0,3}\d{1,6}\D{0,3}$"),
    "card": re.compile(r"^\D{0,3}\d{1,7}\D{0,3}$"),
}
"""What shows that a piece beside a finding belongs to it."""
_PIECE = re.compile(rf"{_WORD}[A-Za-z0-9]{{8,}}={{0,2}}|{_WORD}[A-Za-z0-9+/_-]{{8,}}={{0,2}}")
_HEX_GAP = re.compile(r"0x|\\x|[\s:,-]")
_URL_SAFE = str.maketrans("-_", "+/", " \t\r\n")
_UNSPOKEN = bytes(range(9)) + bytes(range(14, 32)) + b"\x0b\x0c\x7f"
_EDGE_CHARS, _WORD_CHARS, _JOINED_CHARS = 100, 2_000, 160
_APART = "\ue000"
"""Stands between the two ends of a long text; no detector reads across it."""
_NAME = re.compile(r"[\w.-]{1,64}")
"""What may be the name of a function, and not a part of the address that follows it."""
_LABEL = re.compile(r"\W{0,8}(?:\w{1,20}\W{1,3}){1,5}?(?<=[:=])\s{0,3}")
_FEW = 50_000_000
"""Values times characters up to which each value is looked for by itself."""
_SAME_CHARS = 6
"""A value of this many characters is replaced wherever the request says it again."""


class Found(msgspec.Struct, frozen=True, array_like=True):
    """A finding: ``texts[text][start:end]``. Findings with the same ``value`` are written differently at most."""

    kind: str
    text: int
    start: int
    end: int
    value: int


class _Hit(NamedTuple):
    kind: str
    start: int
    end: int
    value: str


class Detectors:
    """What a policy looks for. ``scan`` finds more secrets, ``names`` people; both are large, so they are given."""

    def __init__(self, rules: Rules, *, scan: Scan | None = None, names: Scan | None = None) -> None:
        self._ids, self._phones = NationalIds(rules.redaction.regions), Phones(rules.redaction.regions)
        self._patterns = [regex.compile(one, regex.V0) for one in rules.redaction.patterns]
        self._sensitive = rules.sensitive
        self._said = [
            (f"patterns[{n}]", regex.compile(one, regex.V0)) for n, one in enumerate(rules.sensitive.patterns)
        ]
        self._said += [(f"words[{n}]", _whole(one)) for n, one in enumerate(rules.sensitive.words)]
        self._scan, self._names = scan, names

    def find(self, texts: Sequence[str], joins: Iterable[Sequence[int]] = ()) -> tuple[Found, ...]:
        """Every finding, in order of text and position, none overlapping another. ``joins`` are indices of texts that
        follow each other. Raises Retryable where an operator's pattern takes too long."""
        known: dict[str, list[_Hit]] = {}
        for text in texts:
            if text not in known:
                known[text] = self._in_text(text, self._scan)
        hits = [known[text] for text in texts]  # the same text has the same findings wherever it stands
        for join in joins:
            self._divided(texts, join, hits)
        _again(known)
        values: dict[tuple[str, str], int] = {}
        return tuple(
            Found(one.kind, n, one.start, one.end, values.setdefault((one.kind, one.value), len(values)))
            for n, found in enumerate(hits)
            for one in _merged(texts[n], found)
        )

    def sensitive(self, texts: Sequence[str]) -> tuple[str, ...]:
        """What of ``rules.sensitive`` is in the texts: kinds, ``words[2]``, ``patterns[0]``; never what they say."""
        found = dict[str, None]()
        for text in dict.fromkeys(texts) if self._said else ():
            for reading in self._unpacked(text):
                found.update((name, None) for name, one in self._said if any(_matches(one, reading)))
        if kinds := set(self._sensitive.kinds):
            hits = self.find(texts, [range(len(texts))])
            found.update((one.kind, None) for one in hits if one.kind in kinds)
        return tuple(found)

    def _in_text(self, text: str, scan: Scan | None, depth: int = 0) -> list[_Hit]:
        """Findings of one text, some of them overlapping, by the positions in it."""
        found, divided = self._by_patterns(text), list[tuple[_Hit, bool]]()
        for n, view in enumerate(readings(text)):
            # where an escape was decoded there is something new; all else is in the first view
            hits = self._in_view(view.text, scan) if n == 0 else self._near_edits(view, scan)
            hits = [one for one in hits if n == 0 or view.touched(one.start, one.end)]
            for hit in (*hits, *self._encoded(view.text, depth)):
                start, end = view.span(hit.start, hit.end)
                found.append(hit._replace(start=start, end=end))
            closed = closed_up(view)
            for hit in self._near_edits(closed, None) if closed is not view else ():
                if crossed := closed.crossed(hit.start, hit.end):
                    start, end = closed.span(hit.start, hit.end)
                    unusual = all("\xa0" in view.text[edit[2] : edit[3]] for edit in crossed)
                    divided.append((hit._replace(start=start, end=end), unusual))
        if divided:
            known = _spans(found)
            found += (one for one, sure in divided if sure or _adds(one.kind, _new(text, one, known)))
        return found

    def _near_edits(self, view: View, scan: Scan | None) -> Iterator[_Hit]:
        text = view.text
        for near, far in view.windows(_EDGE_CHARS):
            # whole words, however long a key is
            start = max(0, near - _WORD_CHARS, text.rfind(" ", max(0, near - _WORD_CHARS), near) + 1)
            end = min(len(text), far + _WORD_CHARS, (text.find(" ", far, far + _WORD_CHARS) + 1 or len(text) + 1) - 1)
            for one in self._in_view(view.text[start:end], scan):
                yield one._replace(start=one.start + start, end=one.end + start)

    def _in_view(self, text: str, scan: Scan | None) -> list[_Hit]:
        """Findings of a text as it is written."""
        found = [
            *(_Hit("secret", *one) for one in keys.secrets(text)),
            *(_Hit("card", *one) for one in numbers.cards(text)),
            *(_Hit("iban", *one) for one in numbers.ibans(text)),
            *(_Hit("national_id", *one) for one in self._ids.find(text)),
            *(_Hit("email", *one) for one in mail.addresses(text)),
            *(_Hit("phone", *one) for one in self._phones.find(text)),
            *self._by_patterns(text),
        ]
        if scan is not None:
            # what is known already costs the other library most, and tells nothing new
            for start, end in scan(_masked(text, (one for one in found if one.kind == "secret"))):
                found.append(_Hit("secret", start, end, text[start:end]))
        if self._names is not None:
            found += (_Hit("name", start, end, text[start:end]) for start, end in self._names(text))
        return found

    def _by_patterns(self, text: str) -> list[_Hit]:
        found = (match for one in self._patterns for match in _matches(one, text))
        return [_Hit("pattern", match.start(), match.end(), match.group()) for match in found]

    def _encoded(self, text: str, depth: int) -> Iterator[_Hit]:
        """What is spelt in base64 or hexadecimal digits, as one finding for all of them."""
        if depth >= _DEPTH:
            return
        for start, end, data in _decoded(text):
            if keys.DER.match(data):
                yield _Hit("secret", start, end, text[start:end])
            elif (inner := _spoken(data)) and (found := self._in_text(inner, self._scan, depth + 1)):
                yield _Hit(min(found, key=_rank).kind, start, end, text[start:end])

    def _unpacked(self, text: str, depth: int = 0) -> Iterator[str]:
        """Every reading of a text, and of what is encoded in it."""
        yield text
        for view in readings(text):
            yield view.text
            yield closed_up(view).text
            for _, _, data in _decoded(view.text) if depth < _DEPTH else ():
                yield from self._unpacked(_spoken(data), depth + 1)

    def _divided(self, texts: Sequence[str], join: Sequence[int], hits: list[list[_Hit]]) -> None:
        """Add what only a join of texts says: a part of it to each."""
        known = [_spans(found) for found in hits]
        done = set[str]()
        for trim in (_edges, _bare_edges):
            joined, owners = _joined(texts, join, trim)
            for one in self._in_text(joined, None) if joined not in done else ():
                parts = [
                    (n, one._replace(start=max(one.start, start) + shift, end=min(one.end, end) + shift))
                    for n, start, end, shift in owners
                    if one.start < end and start < one.end
                ]
                new = [_new(texts[n], part, known[n]) for n, part in parts]
                added = [
                    piece
                    for (n, part), pieces in zip(parts, new, strict=True)
                    for piece in (pieces if pieces is not None else [texts[n][part.start : part.end]])
                ]
                named = one.kind == "email" and any(_NAME.fullmatch(texts[n]) for n, _ in parts)
                if len(parts) > 1 and _adds(one.kind, None if new == [None] * len(new) else [] if named else added):
                    for n, part in parts:
                        hits[n].append(part._replace(value=f"{texts[n][part.start : part.end]}\0part"))
            done.add(joined)


def found_in(texts: Sequence[str], detectors: Detectors) -> tuple[str, ...]:
    """What makes these texts SENSITIVE under the policy of the detectors; empty for nothing."""
    return detectors.sensitive(texts)


def _masked(text: str, hits: Iterable[_Hit]) -> str:
    for one in hits:
        text = text[: one.start] + "*" * (one.end - one.start) + text[one.end :]
    return text


_Spans = dict[str, list[tuple[int, int]]]


def _spans(found: Iterable[_Hit]) -> _Spans:
    by_kind: _Spans = {}
    for one in found:
        by_kind.setdefault(one.kind, []).append((one.start, one.end))
    return {kind: sorted(spans) for kind, spans in by_kind.items()}


def _new(text: str, one: _Hit, known: _Spans) -> list[str] | None:
    """What a finding adds before and after those of its kind that it overlaps; None where it overlaps none."""
    spans = known.get(one.kind, [])
    n = bisect_left(spans, (one.end,))
    inside = [span for span in spans[max(0, n - 8) : n] if span[1] > one.start]
    if not inside:
        return None
    return [text[one.start : min(a for a, _ in inside)], text[max(b for _, b in inside) : one.end]]


def _adds(kind: str, new: list[str] | None) -> bool:
    """Whether a divided value is one: not a whole one beside a word, like an address at the begin of a line."""
    if new is None:
        return True
    marks = _MARKS.get(kind)
    return marks is not None and any(marks.search(one) for one in new)


def _edges(text: str) -> list[tuple[int, str]]:
    """Where a text may hold a part of a divided value: (position, piece)."""
    if len(text) <= 2 * _JOINED_CHARS:
        return [(0, text)]
    return [(0, text[:_JOINED_CHARS]), (len(text) - _JOINED_CHARS, text[-_JOINED_CHARS:])]


def _bare_edges(text: str) -> list[tuple[int, str]]:
    """The same without white space at the ends and without a label like "the rest: "."""
    begin = label.end() if (label := _LABEL.match(text)) else len(text) - len(text.lstrip())
    return [(at + begin, piece) for at, piece in _edges(text[begin:].rstrip())]


def _joined(
    texts: Sequence[str], join: Sequence[int], trim: Callable[[str], list[tuple[int, str]]]
) -> tuple[str, list[tuple[int, int, int, int]]]:
    """The texts as one, and the owner of each part: (text, start, end, what to add for the position in the text)."""
    pieces, owners, length = list[str](), list[tuple[int, int, int, int]](), 0
    for n in join:
        for number, (at, piece) in enumerate(trim(texts[n])):
            if number:
                pieces.append(_APART)
                length += len(_APART)
            owners.append((n, length, length + len(piece), at - length))
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), [one for one in owners if one[1] < one[2]]


def _again(hits: dict[str, list[_Hit]]) -> None:
    """Add every place where a value that was found is said again, in whatever context."""
    values: dict[str, _Hit] = {}
    for text, found in hits.items():
        for one in found:
            said = text[one.start : one.end]
            if len(said) >= _SAME_CHARS and not one.value.endswith("\0part"):
                values[said] = min(values.get(said, one), one, key=_rank)
    few = len(values) * sum(map(len, hits)) < _FEW
    heads: dict[str, dict[int, dict[str, _Hit]]] = {}
    for said, one in values.items() if not few else ():
        heads.setdefault(said[:_SAME_CHARS], {}).setdefault(len(said), {})[said] = one
    for text, found in hits.items() if values else ():
        places = _each(text, values) if few else _by_heads(text, heads)
        found += [hit._replace(start=at, end=at + hit.end - hit.start) for at, hit in places]


def _each(text: str, values: dict[str, _Hit]) -> Iterator[tuple[int, _Hit]]:
    for said, hit in values.items():
        at = text.find(said)
        while at >= 0:
            yield at, hit
            at = text.find(said, at + 1)


def _by_heads(text: str, heads: dict[str, dict[int, dict[str, _Hit]]]) -> Iterator[tuple[int, _Hit]]:
    """The same in a time that does not grow with the number of values."""
    for at in range(len(text) - _SAME_CHARS + 1):
        for size, said in heads.get(text[at : at + _SAME_CHARS], {}).items():
            if (hit := said.get(text[at : at + size])) is not None:
                yield at, hit


def _merged(text: str, found: Iterable[_Hit]) -> Iterator[_Hit]:
    """In order, those that overlap made one."""
    group, end = list[_Hit](), -1
    for one in [*sorted(found, key=lambda hit: (hit.start, -hit.end)), _Hit("name", len(text) + 1, len(text) + 1, "")]:
        if group and one.start >= end:
            best = min(group, key=_rank)
            whole = (group[0].start, end)
            yield best if (best.start, best.end) == whole else _Hit(best.kind, *whole, text[whole[0] : end])
            group = []
        end = max(end, one.end) if group else one.end
        group.append(one)


def _rank(hit: _Hit) -> tuple[bool, int, int]:
    return hit.kind != "secret", hit.start - hit.end, ORDER.index(hit.kind)


def _matches(pattern: "regex.Pattern[str]", text: str) -> Iterator["regex.Match[str]"]:
    try:
        yield from (match for match in pattern.finditer(text, timeout=PATTERN_S) if match.end() > match.start())
    except TimeoutError:
        raise Retryable("a pattern of the policy file took too long", code="analysis_failed") from None


def _whole(word: str) -> "regex.Pattern[str]":
    parts = [regex.escape("".join(map(fold_character, part))) for part in word.split()]
    return regex.compile(r"(?<!\w)" + r"\W{1,3}".join(parts) + r"(?!\w)", regex.IGNORECASE | regex.FULLCASE)


def _decoded(text: str) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, what it spells) of base64 and hexadecimal digits that spell a text or a private key."""
    for match in _ENCODED.finditer(text):
        whole = _base64(match.group())
        pieces = [match] if whole else _PIECE.finditer(text, match.start(), match.end())
        for piece in pieces:
            if data := _base64(piece.group()):
                yield piece.start(), piece.end(), data
    for match in _HEX.finditer(text):
        data = bytes.fromhex(_HEX_GAP.sub("", match.group()))
        if _spoken(data):
            yield match.start(), match.end(), data


def _base64(text: str) -> bytes:
    digits = text.translate(_URL_SAFE).rstrip("=")
    if len(digits) % 4 == 1:
        return b""
    data = binascii.a2b_base64(digits + "=" * (-len(digits) % 4))
    return data if _spoken(data) or keys.DER.match(data) else b""


def _spoken(data: bytes) -> str:
    """The text that bytes are; "" where they are none."""
    try:
        if data[1::2].count(0) * 3 > len(data) > 8:
            return data.decode("utf-16-le")
        return data.decode() if len(data.translate(None, _UNSPOKEN)) == len(data) else ""
    except UnicodeDecodeError:
        return ""
