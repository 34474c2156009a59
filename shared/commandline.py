"""An argparse parser for both command lines: wrong usage exits with os.EX_USAGE; and what both do when the reader of
their output leaves."""

import argparse
import functools
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from shared.missing import Main

READER_LEFT = 128 + signal.SIGPIPE
"""The exit status of what a shell sees end by SIGPIPE."""


class Parser(argparse.ArgumentParser):
    """argparse's parser, but usage errors exit 64, so that scripts can tell them from other failures."""

    def error(self, message: str) -> NoReturn:
        self.print_usage()
        self.exit(os.EX_USAGE, f"{self.prog}: {message}; see --help\n")


def until_the_reader_leaves(main: Main) -> Main:
    """Makes an entry point end quietly, with READER_LEFT, once nobody reads its output any more (``| head``), and run
    where there never was an output. A broken connection to something else passes."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
        try:
            try:
                return main(argv)
            finally:  # what is still buffered, also of a verb that ends in SystemExit
                sys.stdout.flush()
                sys.stderr.flush()
        except BrokenPipeError as error:
            if not reader_left(error):
                raise
            for stream in filter(_left, (sys.stdout, sys.stderr)):  # or Python complains about it on its way out
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return READER_LEFT

    return run


def reader_left(error: OSError) -> bool:
    """Whether this is because standard output or standard error is a pipe that nobody reads any more."""
    return isinstance(error, BrokenPipeError) and (_left(sys.stdout) or _left(sys.stderr))


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _left(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
        return any(happened & (select.POLLERR | select.POLLHUP) for _, happened in poll.poll(0))
    except (OSError, ValueError):  # not a file: captured by a test
        return False
