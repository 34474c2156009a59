"""One step of an installation or removal. Paths are absolute; a step may be taken again without harm. Pure."""

from typing import NamedTuple

RETRY_S = 15.0
"""How long a command is tried again that fails as long as launchd is not done with what was before."""


class Command(NamedTuple):
    """A program. ``fine`` are exit statuses that mean that it is done already, ``again`` those that pass by themselves.
    ``why`` says what a failure means and what to do; an ``optional`` one is told and ends nothing."""

    argv: tuple[str, ...]
    fine: tuple[int, ...] = ()
    again: tuple[int, ...] = ()
    why: str = ""
    optional: bool = False


class Write(NamedTuple):
    """A file that root owns and everybody may read, replaced as a whole."""

    path: str
    text: str


class Gone(NamedTuple):
    """Wait until launchd does not know the service any more, for ``limit_s`` seconds at most."""

    limit_s: float


class Runs(NamedTuple):
    """Wait until launchd says that the service runs."""

    limit_s: float


Step = Command | Write | Gone | Runs


def command(*argv: str, why: str = "", optional: bool = False) -> Command:
    """A program that has to succeed, or else ``why``."""
    return Command(argv, why=why, optional=optional)
