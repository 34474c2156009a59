"""The hash chain of the audit log, and what of it was changed. Pure.

A line is ``{"seq":N,...,"hash":"..."}``: the SHA-256 covers the hash of the line before and every byte of its own
before ``,"hash"``. Sequence numbers have no gaps, over files and restarts. Whoever can write the files can compute a
whole chain anew; against that stands what was shipped to the bucket before.
"""

import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import NamedTuple

from agent.audit.entry import Begin, Pruned, decode

SUFFIX = ".jsonl"
_LINE = re.compile(rb'(\{"seq":([1-9]\d{0,14}),.*),"hash":"([0-9a-f]{64})"\}\n', re.DOTALL)
_NAME = re.compile(r"(\d{12,15})\.jsonl", re.ASCII)


class Tip(NamedTuple):
    """The last line of a chain: its sequence number and its hash."""

    seq: int = 0
    hash: str = ""


NOTHING = Tip()


class Read(NamedTuple):
    """One line: its number and hash as they stand there, and what the hash covers of it."""

    seq: int
    hash: str
    content: bytes

    def follows(self, tip: Tip) -> bool:
        """Whether it is the line after ``tip``, unchanged."""
        return self.seq == tip.seq + 1 and self.hash == _hash(tip, self.content)


class Fault(NamedTuple):
    """The first thing that is wrong: in which file, at which line (counted from 1; 0 is the file itself), and what."""

    file: str
    line: int
    what: str

    def text(self) -> str:
        """For display."""
        return f"{self.file}{f', line {self.line}' if self.line else ''}: {self.what}"


class Verdict(NamedTuple):
    """What a verification saw: the number of the first line, the last line, and ``torn`` bytes of an unfinished one."""

    fault: Fault | None = None
    files: int = 0
    lines: int = 0
    first: int = 0
    last: Tip = NOTHING
    chain: str = ""
    torn: int = 0


def link(tip: Tip, body: bytes) -> tuple[bytes, Tip]:
    """The line that holds ``body``, a JSON object, after ``tip``; and the new tip."""
    content = b'{"seq":%d,%b' % (tip.seq + 1, body[1:-1])
    after = Tip(tip.seq + 1, _hash(tip, content))
    return b'%b,"hash":"%b"}\n' % (content, after.hash.encode()), after


def parse(line: bytes) -> Read | None:
    """A line of a log; None for anything else."""
    found = _LINE.fullmatch(line)
    return Read(int(found[2]), found[3].decode(), found[1]) if found else None


def file_name(first_seq: int) -> str:
    """The name of the file whose first line this is; names sort in the order of writing."""
    return f"{first_seq:012d}{SUFFIX}"


def first_seq(name: str) -> int | None:
    """The inverse; None for another file."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found and file_name(int(found[1])) == name else None


def whole_lines(content: bytes) -> tuple[list[bytes], int]:
    """The lines of a file, and the bytes of one at its end that was not finished."""
    lines = content.split(b"\n")
    torn = lines.pop()
    return [line + b"\n" for line in lines], len(torn)


def verify(files: Iterable[tuple[str, bytes]], *, tip: Tip = NOTHING, alone: bool = True) -> Verdict:
    """Check files, each by name and content, in the order of their names. ``tip`` is the last line that is known to
    have been written; with ``alone`` files before the first one must be accounted for."""
    seen, before, last, pruned = Verdict(), "", "", 0
    for name, content in files:
        lines, torn = whole_lines(content)
        if last != before:
            return seen._replace(fault=Fault(last, 0, "has no line"))
        last = name
        if not lines and first_seq(name) == seen.last.seq + 1:
            continue  # the newest file may have been created a moment ago, or right before the end of the process
        fault = _of_file(name, lines, seen, before)
        pruned = max([pruned, *(one.through for one in map(decode, filter(_of_pruning, lines)) if type(one) is Pruned)])
        if fault is None:
            fault, seen = _of_lines(name, lines, seen)
        if fault is not None:
            return seen._replace(fault=fault)
        before, seen = name, seen._replace(files=seen.files + 1, torn=torn)
    if alone and pruned < seen.first - 1:
        missing = f"the files before it, up to {seen.first - 1}, are missing"
        return seen._replace(fault=Fault(file_name(seen.first), 0, missing))
    return seen._replace(fault=_of_end(seen, last, tip))


def _of_end(seen: Verdict, last: str, tip: Tip) -> Fault | None:
    """The end of the newest file: nothing follows that could tell whether it is whole, but ``tip``."""
    if tip.seq > seen.last.seq:
        lost = f"{seen.last.seq + 1} to {tip.seq}"
        return Fault(last or "the folder", 0, f"its end was cut off: the lines {lost} had been written")
    if tip.seq and tip.seq == seen.last.seq and tip.hash != seen.last.hash:
        return Fault(last, 0, "was replaced: another last line had been written")
    return None


def _of_file(name: str, lines: Sequence[bytes], seen: Verdict, before: str) -> Fault | None:
    """Whether a file is the one that follows: by its first line, which tells what it follows."""
    number = first_seq(name)
    if number is None:
        return Fault(name, 0, "is not a file of this log")
    if not lines:
        return Fault(name, 0, "has no line")
    first, begin = parse(lines[0]), decode(lines[0])
    if first is None or not isinstance(begin, Begin):
        return Fault(name, 1, _of_first(lines[0], first, number))
    if first.seq != number:
        return Fault(name, 1, f"its first line is {first.seq}: the file was renamed, or lines before it were dropped")
    if not first.follows(Tip(first.seq - 1, begin.prev)):
        return Fault(name, 1, "was changed")
    if not seen.files:
        return None
    if begin.chain != seen.chain:
        return Fault(name, 0, "is of another log: a file that does not belong here")
    return _of_seam(name, begin, first, seen, before)


def _of_first(line: bytes, first: Read | None, number: int) -> str:
    if first is not None and first.seq > number:
        return f"the lines {number} to {first.seq - 1} before it were dropped"
    return "was changed: it is not the first line of a file" if line else "has no line"


def _of_seam(name: str, begin: Begin, first: Read, seen: Verdict, before: str) -> Fault | None:
    if begin.after != before and begin.after:
        return Fault(begin.after, 0, f"is missing: {name} follows it, not {before}")
    if first.seq > seen.last.seq + 1:
        return Fault(before, 0, f"its end was cut off: the lines {seen.last.seq + 1} to {first.seq - 1} are missing")
    if first.seq <= seen.last.seq:
        return Fault(before, 0, f"lines were inserted at its end: {name} begins with {first.seq}")
    if begin.prev != seen.last.hash:
        return Fault(before, 0, f"was replaced: {name} follows another last line")
    if begin.torn != seen.torn:
        cut = f"ends in {seen.torn} bytes of an unfinished line, and {name} knows of {begin.torn}"
        return Fault(before, 0, cut)
    return None


def _of_lines(name: str, lines: Sequence[bytes], seen: Verdict) -> tuple[Fault | None, Verdict]:
    """Follow the lines of a file whose first one is in order."""
    begin, first = decode(lines[0]), parse(lines[0])
    assert isinstance(begin, Begin)
    assert first is not None
    tip = Tip(first.seq, first.hash)
    seen = seen._replace(chain=begin.chain, first=seen.first or first.seq)
    for n, line in enumerate(lines[1:], 1):
        one = parse(line)
        if one is None or not one.follows(tip):
            return Fault(name, n + 1, _why(lines, n, one, tip)), seen._replace(last=tip)
        tip = Tip(one.seq, one.hash)
    return None, seen._replace(lines=seen.lines + len(lines), last=tip)


def _why(lines: Sequence[bytes], n: int, one: Read | None, tip: Tip) -> str:
    """What happened to line ``n`` (from 0), which does not follow ``tip``: by what stands around it."""
    after = [parse(line) for line in lines[n + 1 :]]
    if twice := [m + 1 for m, other in enumerate(lines) if other == lines[n] and m != n]:
        return f"is there twice: it is line {twice[0]}, too"
    place = next((m for m, other in enumerate(after) if other is not None and other.follows(tip)), None)
    if place is not None:
        right = after[place]
        assert right is not None
        swapped = place > 0 or (one is not None and one.follows(Tip(right.seq, right.hash)))
        return f"was swapped with line {n + place + 2}" if swapped else "was inserted"
    if one is None:
        return "was changed: it is not a line of this log"
    if one.seq > tip.seq + 1 and not (after and after[0] is not None and after[0].seq == tip.seq + 2):
        return f"the lines {tip.seq + 1} to {one.seq - 1} before it were dropped"
    return "was changed"


def compare(name: str, local: bytes, shipped: bytes) -> Fault | None:
    """The first line of a file here that differs from what was shipped of it."""
    here, there = whole_lines(local)[0], whole_lines(shipped)[0]
    line = next((n for n, (one, other) in enumerate(zip(here, there, strict=False), 1) if one != other), 0)
    if line:
        return Fault(name, line, "differs from what was shipped to the bucket")
    if len(here) < len(there):
        return Fault(name, 0, f"{len(there) - len(here)} lines at its end are in the bucket and not here")
    if len(here) > len(there):
        return Fault(name, 0, f"{len(here) - len(there)} lines at its end were added after it was shipped")
    return None


def _of_pruning(line: bytes) -> bool:
    return b'"line":"pruned"' in line


def _hash(tip: Tip, content: bytes) -> str:
    return sha256(tip.hash.encode() + content).hexdigest()
