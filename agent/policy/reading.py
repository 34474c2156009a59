"""Reads a policy file from the disk: all of it and valid, or a ConfigError with every problem."""

import os
from pathlib import Path

import msgspec

from agent.policy.checking import check
from agent.policy.rules import DEFAULT, Rules, digest
from shared.config import ConfigError, load_settled

MOST_BYTES = 1 << 20

Stamp = tuple[int, ...] | None


class PolicyRead(msgspec.Struct, frozen=True, kw_only=True):
    """A valid policy and its digest; ``path`` as it was given, ``stamp`` that of the file before it was read."""

    path: str
    rules: Rules
    digest: str
    stamp: tuple[int, ...] | None = None


def read(path: str) -> PolicyRead:
    """Read a policy file; the rules of a node without one for "". Blocks until the file is settled. Raises ConfigError
    with every problem."""
    if not path:
        return PolicyRead(path=path, rules=DEFAULT, digest=digest(DEFAULT))
    file = _expanded(path)
    stamp = stamp_of(path)
    if stamp is None:
        raise ConfigError(str(file), ["no such file"])
    if stamp[1] > MOST_BYTES:
        raise ConfigError(str(file), [f"has {stamp[1]:,} bytes; at most {MOST_BYTES:,}"])
    rules = load_settled(file, Rules, check)
    return PolicyRead(path=path, rules=rules, digest=digest(rules), stamp=stamp)


def stamp_of(path: str) -> Stamp:
    """What changes when a file or its permissions do; None while there is none."""
    try:
        seen = _expanded(path).stat()
    except (OSError, ValueError):  # a NUL byte is no part of a name
        return None
    return seen.st_mtime_ns, seen.st_size, seen.st_ino, seen.st_ctime_ns


def _expanded(path: str) -> Path:
    """Where there is no such user, ~user is a name like any other."""
    return Path(os.path.expanduser(path))
