"""Secrets are configured as references and resolved when needed; none of our files holds one.

References: ``env:NAME``, ``file:/path`` (first line; the file must not be readable by others), ``keychain:service``
(macOS: the System keychain, else the user's) and ``op://vault/item/field`` (1Password's ``op``). The caller passes the
environment, so that access to it is explicit.
"""

import re
import stat
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from shared.bucket import SECRET_KINDS
from shared.errors import Halt
from shared.regular_file import read_file
from shared.secrets.commands import from_keychain, from_op

LEAST_CHARS, LEAST_DISTINCT = 32, 8
_MOST_BYTES = 64 << 10
_OTHERS = stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH
"""Who can write a secret can choose it."""
_PLACEHOLDERS = re.compile(
    r"change.?me|replace.?(?:me|this|it|with)|(?:my|your).?(?:secret|key)|passwor[dt]|passwd|example"
)
_ROWS = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm", "qwertzuiop", "yxcvbnm", "azertyuiop", "qsdfghjklm")
_COLUMNS = ("1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik,9ol.0p;/", "1q2w3e4r5t6y7u8i9o0p", "qazwsxedcrfvtgbyhnujmikolp")
_KEYS = 4
"""Neighbouring keys, in either direction, that are taken for a walk over the keyboard."""
_WALKS = frozenset(
    line[at : at + _KEYS]
    for row in (*_ROWS, *_COLUMNS)
    for line in (row, row[::-1])
    for at in range(len(row) - _KEYS + 1)
)
_LEAST_REPEATED = 10
"""Characters; fewer, among the letters of a random number, may repeat by chance."""


def resolve(reference: str, environ: Mapping[str, str]) -> str:
    """The secret behind ``reference``. Raises Halt with the reference, never the value."""
    if "\0" in reference:
        raise Halt("secret: invalid reference; it holds a NUL character", code="no_secret")
    if reference.startswith("env:"):
        if not (value := environ.get(reference[4:], "")):
            raise Halt(f"secret {reference}: the environment variable is not set", code="no_secret")
        return value
    if reference.startswith("file:"):
        return _from_file(reference)
    if reference.startswith("keychain:"):
        return from_keychain(reference[9:], environ)
    if reference.startswith("op://"):
        return from_op(reference, environ)
    raise Halt(f"secret: invalid reference; expected one of {', '.join(SECRET_KINDS)}", code="no_secret")


def strong(reference: str, what: str, environ: Mapping[str, str]) -> str:
    """A secret that keys are derived from; ``what`` is its key in the configuration. Raises Halt for a weak one: what
    is signed with it can be recorded, and guessed without asking anybody."""
    if why := weakness(secret := resolve(reference, environ)):
        how = "make one with `mlxrack-agent new-secret`, and use it on all nodes"
        raise Halt(f"{what}: {reference} {why}; {how}", code="weak_secret")
    return secret


def weakness(secret: str) -> str:
    """Why a secret is easy to guess, without quoting it: "" when it has ``LEAST_CHARS`` characters, ``LEAST_DISTINCT``
    different ones, and neither repeats a text, numbered or not, nor counts, walks over the keyboard or says that it
    is to be replaced. Passphrases pass; words in a list are not looked up."""
    if len(secret) < LEAST_CHARS:
        return f"has {len(secret)} characters, at least {LEAST_CHARS} random ones are required"
    if (distinct := len(set(secret))) < LEAST_DISTINCT:
        return f"has only {distinct} different characters, at least {LEAST_DISTINCT} are required"
    if _repeats(secret):
        return "repeats a shorter text"
    letters = re.sub(r"[^a-z]", "", secret.lower())
    if _repeats(letters):
        return "repeats a word, numbered or in other letters"
    if _PLACEHOLDERS.search(secret.lower()):
        return "contains a word that stands for a secret"
    if _on_keyboard(secret.lower()) > len(secret) / 2:
        return "is a walk over the keyboard"
    steps = [ord(b) - ord(a) for a, b in pairwise(secret)]
    if max(map(steps.count, steps)) > len(steps) / 2:
        return "goes on in equal steps"
    if sum(abs(step) <= 1 for step in steps) > len(steps) / 2:
        return "is a sequence of neighbouring characters"
    return ""


def _repeats(secret: str) -> bool:
    """Whether a text of at most half its length, over and over, gives it, the last time perhaps cut short."""
    longest = min(len(secret) // 2, len(secret) - _LEAST_REPEATED)
    return any(secret[:-length] == secret[length:] for length in range(1, longest + 1))


def _on_keyboard(secret: str) -> int:
    """How many characters are part of a run of neighbouring keys."""
    found = set[int]()
    for at in range(len(secret) - _KEYS + 1):
        if secret[at : at + _KEYS] in _WALKS:
            found.update(range(at, at + _KEYS))
    return len(found)


def _from_file(reference: str) -> str:
    try:
        text = read_file(Path(reference[5:]), _MOST_BYTES, unless_mode=_OTHERS).decode()
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, PermissionError) and error.errno is None:
            why = "the file is writable or readable by group or others; chmod 600 it"
        else:
            why = f"cannot be read ({(isinstance(error, OSError) and error.strerror) or type(error).__name__})"
        raise Halt(f"secret {reference}: {why}", code="no_secret") from None
    if not (first := next(iter(text.splitlines()), "").strip()):
        raise Halt(f"secret {reference}: the file is empty", code="no_secret")
    return first
