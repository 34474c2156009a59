"""How a verb ends, and the one place that prints it.

Every verb returns an `Ended`, which cannot be made without something to say; `tell` decides what of it is printed.
Texts may quote the bucket, so nothing that a terminal would act on is printed as it is.
"""

import json
import shlex
import sys
from typing import Any, TextIO

import msgspec

from shared.errors import Refused


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a run. ``line`` says what it did, where, and how to look at it; ``shown`` is what it was asked to
    show, if that was its purpose; ``details`` are for --verbose, ``problems`` for stderr, ``data`` for --json (a str is
    JSON already)."""

    line: str = ""
    data: Any = None
    shown: str = ""
    details: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    status: int = 0

    def __post_init__(self) -> None:
        if not (self.line or self.shown) or "\n" in self.line:
            raise ValueError("a verb ends with one line, or with what it shows")


class NothingToPublish(Refused):
    """The period or the proposal is empty. ``usual`` is set where nothing is wrong: a new rack has no last month."""

    code = "nothing_to_publish"

    def __init__(self, message: str, *, usual: bool = False) -> None:
        super().__init__(message)
        self.usual = usual


def tell(ended: Ended, *, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Print the end of a run; returns its exit status. ``quiet`` leaves out what nobody asked to see."""
    if as_json:
        say(ended.data if isinstance(ended.data, str) else json.dumps(msgspec.to_builtins(ended.data)))
    else:
        line = [ended.line] if ended.line and not quiet else []
        for text in (*([ended.shown] if ended.shown else []), *(ended.details if verbose else ()), *line):
            say(text)
    for problem in ended.problems:
        say(f"mlxrack-aggregator: {problem}", sys.stderr)
    return ended.status


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text of any origin. What a terminal cannot show, or its encoding cannot express, is replaced."""
    out = file if file is not None else sys.stdout
    encoding = out.encoding or "utf-8"
    print(printable(text).encode(encoding, "replace").decode(encoding), file=out, flush=True)


def printable(text: str) -> str:
    """A text without control characters, escape sequences and invisible ones; lines stay."""
    return "".join(one if one == "\n" or one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def command(verb: str, config: object = None) -> str:
    """A command to be copied, with the configuration that this run was given."""
    return f"mlxrack-aggregator {verb}" + (f" --config {shlex.quote(str(config))}" if config is not None else "")
