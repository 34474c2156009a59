"""What a page tells its reader to run: its fenced blocks, and what HTML comments before them say to the walk. Pure.

A comment is on a line of its own, right before the block (other comments and blank lines may be between):

    <!-- walk: REASON -->       the block is not run, and why
    <!-- terminal: TEXT -->     it runs in a terminal of its own, until its section ends; the walk goes on when its
                                output has TEXT
    <!-- service: TEXT -->      likewise, until the walk ends
    <!-- expect: REGEX -->      its output must match
    <!-- scene: WORDS -->       what happens to the rack before it: "mini-3 dies", "the store stops", "the store starts"
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

RUNNABLE = ("sh", "python")
"""Languages of blocks that the walk runs."""
KINDS = ("walk", "terminal", "service", "expect", "scene")
_COMMENT = re.compile(rf"^<!-- ({'|'.join(KINDS)}):(.*)-->$")
_FENCE = re.compile(r"^( *)```(\S*)$")
_HEADING = re.compile(r"^#{1,6} (.+)$")


class Block(NamedTuple):
    """A fenced block. ``line`` is that of its fence; ``section`` the heading above it; ``reason`` why it is not run, ""
    for one that is; ``marked`` whether a comment says not to run it, with or without a reason; ``terminal`` what its
    output has once it runs, "" for one that ends; ``lasts`` whether it stays open beyond its section."""

    page: str
    line: int
    section: str
    language: str
    text: str
    reason: str = ""
    marked: bool = False
    terminal: str = ""
    lasts: bool = False
    expect: tuple[str, ...] = ()
    scenes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the walk runs it."""
        return not self.marked and self.language in RUNNABLE


def blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page in Markdown, in order."""
    return list(_blocks(page, text.splitlines()))


def faults(found: list[Block]) -> list[str]:
    """What is wrong with the marks of blocks: one that is neither run nor marked, a mark without a reason."""
    wrong = [f"{b.where}: marked as not run, without a reason" for b in found if b.marked and not b.reason]
    wrong += [
        f"{b.where}: a block of {b.language or 'no language'} is not run; put <!-- walk: REASON --> before it"
        for b in found
        if not b.marked and not b.runs
    ]
    return wrong + [f"{b.where}: marked as not run, and has other marks" for b in found if b.marked and _others(b)]


def _others(block: Block) -> bool:
    return bool(block.expect or block.scenes or block.terminal)


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    section, marks, number = "", list[tuple[str, str]](), 0
    while number < len(lines):
        line, number = lines[number], number + 1
        if fence := _FENCE.match(line):
            indent, began = fence[1], number
            while number < len(lines) and lines[number].strip() != "```":
                number += 1
            body = "\n".join(one.removeprefix(indent) for one in lines[began:number]) + "\n"
            yield _marked(Block(page, began, section, fence[2], body), marks)
            number, marks = number + 1, []
        elif comment := _COMMENT.match(line.strip()):
            marks.append((comment[1], comment[2].strip()))
        elif heading := _HEADING.match(line):
            section, marks = heading[1], []
        elif line.strip():
            marks = []


def _marked(block: Block, marks: list[tuple[str, str]]) -> Block:
    of = {kind: [text for one, text in marks if one == kind] for kind in KINDS}
    return block._replace(
        reason="; ".join(filter(None, of["walk"])),
        marked=bool(of["walk"]),
        terminal=next(iter(of["terminal"] + of["service"]), ""),
        lasts=bool(of["service"]),
        expect=tuple(of["expect"]),
        scenes=tuple(of["scene"]),
    )
