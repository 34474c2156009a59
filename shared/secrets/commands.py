"""Secrets that another program keeps: macOS's keychain (`security`) and 1Password (`op`).

Values and tokens travel in pipes and in the child's environment, never in arguments; what a program printed is never
quoted, because it may hold either.
"""

import os
import shlex
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from shared.errors import Halt

SECURITY = "/usr/bin/security"
SYSTEM_KEYCHAIN = "/Library/Keychains/System.keychain"
"""The only keychain that is open to a service, which nobody has logged in for."""
OP_TOKEN = Path("/etc/mlxrack/op.token")
"""The token of the 1Password service account, for an agent without one in its environment."""
OP_VARIABLE = "OP_SERVICE_ACCOUNT_TOKEN"
ROOTS = (0,)
"""Users who may own the folders that lead to it."""
ANSWER_S = 20
_MOST_TOKEN_BYTES = 16 << 10
_NOT_FOUND = -25300 & 0xFF
_STORED_WRONG = "delete it (`{delete}`) and store it again, with access for `security`: `{add}`"
_ASKS = f"macOS would ask on the screen before it gives it out; {_STORED_WRONG}"
_KEYCHAIN = {
    _NOT_FOUND: "neither the System keychain nor one of this user's has such an item; store it: `{add}`",
    -25308 & 0xFF: _ASKS,  # errSecInteractionNotAllowed
    -25315 & 0xFF: _ASKS,  # errSecInteractionRequired
    -25293 & 0xFF: f"macOS refuses it to this user and program; {_STORED_WRONG}",  # errSecAuthFailed
    -25294 & 0xFF: "this Mac has no System keychain; use file:/path instead",  # errSecNoSuchKeychain
    -25307 & 0xFF: "this user has no keychain of its own; store it in the System keychain: `{add}`",
    -128 & 0xFF: "somebody refused it on the screen; ask again, and allow it",  # errSecUserCanceled
}
"""By the exit status of `security`, which is the low byte of an OSStatus."""
_NO_ACCOUNT = "op knows no account here; a service needs the token of a service account in {file}: {how}"
_OP = (
    (("not currently signed in", "no account", "not signed in", "sign in"), _NO_ACCOUNT),
    (("invalid token", "unauthorized", "(401)", "deserialize", "signature"), "1Password refuses the token; renew it"),
    (("(403)", "forbidden"), "the account may not read that vault; let the service account read it"),
    (("isn't an item", "isn't a vault", "isn't a field", "not found", "could not find"), "1Password has no such item"),
    (("too many requests", "rate limit", "(429)"), "1Password has had too many requests of this account; wait"),
    (("dial tcp", "no such host", "network", "timeout"), "1Password cannot be reached; check this machine's network"),
)
"""What `op` says on its error output, and what it means; it exits with 1 whatever happens."""


def from_keychain(service: str, environ: Mapping[str, str]) -> str:
    """The generic password of ``service``: of the System keychain, else of those of this user. Raises Halt."""
    reference, searched = f"keychain:{service}", [SECURITY, "find-generic-password", "-w", "-s", service]
    run = _run(reference, [*searched, SYSTEM_KEYCHAIN], environ)
    if run.returncode == _NOT_FOUND:
        run = _run(reference, searched, environ)
    if run.returncode != 0:
        words = _KEYCHAIN.get(run.returncode, "").format(add=adding(service), delete=deleting(service))
        raise _halt(reference, f"security exits with {run.returncode}: {words}".removesuffix(": "))
    return _value(reference, run)


def adding(service: str) -> str:
    """The shell command that stores a secret where a service can read it: it asks for the value, and the value is no
    argument of a process."""
    item = f'-a mlxrack -s "{service}" -T {SECURITY}'.replace("%", "%%")
    line = f'add-generic-password -U {item} -w "%s" {SYSTEM_KEYCHAIN}\\n'
    return f'read -rs value; printf {shlex.quote(line)} "$value" | sudo security -i'


def deleting(service: str) -> str:
    """The shell command that removes it again."""
    return f"sudo security delete-generic-password -s {shlex.quote(service)} {SYSTEM_KEYCHAIN}"


def from_op(reference: str, environ: Mapping[str, str], file: Path | None = None) -> str:
    """What `op` reads at an op:// reference, as the account of the environment, else as that of the token in ``file``
    (``OP_TOKEN``). Raises Halt."""
    file, given = file or OP_TOKEN, dict(environ)
    if not given.get(OP_VARIABLE) and (token := token_in(reference, file)):
        given[OP_VARIABLE] = token
    run = _run(reference, ["op", "read", "--no-newline", reference], given)
    if run.returncode != 0:
        said = run.stderr.lower()
        words = next((words for marks, words in _OP if any(one in said for one in marks)), "")
        how = words.format(file=file, how=f"`{placing(file)}`")
        raise _halt(reference, f"op exits with {run.returncode}: {how}".removesuffix(": "))
    return _value(reference, run)


def placing(file: Path = OP_TOKEN, user: str = "_mlxrack") -> str:
    """The shell command that puts a token, which it asks for, where ``token_in`` takes it."""
    made = f"sudo install -d -o root -m 755 {file.parent} && sudo install -o {user} -m 400 /dev/null {file}"
    return f'{made} && read -rs token && printf "%s\\n" "$token" | sudo tee {file} > /dev/null'


def token_in(reference: str, file: Path) -> str:
    """The token in a file that its user alone can read, in a folder that root alone can change; "" where
    there is no such file. Raises Halt for a file that others could read or replace."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        why = "is a link" if os.path.islink(file) else f"cannot be read by this user ({error.strerror})"
        raise _halt(reference, f"{file} {why}; make it again: `{placing(file)}`") from None
    try:
        if why := next(chain(_of_file(os.fstat(descriptor)), _of_folders(file)), ""):
            raise _halt(reference, f"{file} {why}; make it again: `{placing(file)}`")
        text = os.read(descriptor, _MOST_TOKEN_BYTES).decode(errors="replace")
    finally:
        os.close(descriptor)
    if not (token := text.strip()):
        raise _halt(reference, f"{file} is empty; make it again: `{placing(file)}`")
    if any(one.isspace() or not one.isprintable() for one in token):
        raise _halt(reference, f"{file} holds more than one word; make it again: `{placing(file)}`")
    return token


def _of_file(seen: os.stat_result) -> Iterator[str]:
    if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1:
        yield "is not a regular file with one name"
    if seen.st_uid != os.geteuid():
        yield "belongs to another user than the one who runs this"
    if stat.S_IMODE(seen.st_mode) != stat.S_IRUSR:
        yield f"has mode {stat.S_IMODE(seen.st_mode):04o}, not 0400"


def _of_folders(file: Path) -> Iterator[str]:
    """What is wrong with the folders that lead to it, by the name given and by the name without links."""
    named = file.absolute().parent
    real = named.resolve()
    for folder in dict.fromkeys((named, *named.parents, real, *real.parents)):
        seen = folder.lstat()
        others = stat.S_IWGRP | stat.S_IWOTH
        if seen.st_uid not in ROOTS:
            yield f"is in {folder}, which does not belong to root"
        elif stat.S_ISDIR(seen.st_mode) and seen.st_mode & others and not seen.st_mode & stat.S_ISVTX:
            yield f"is in {folder}, which others than root may change"


def _run(reference: str, argv: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    kept: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        return subprocess.run(argv, **kept, timeout=ANSWER_S, check=False, env=dict(environ))
    except FileNotFoundError:
        where = "it is part of macOS" if argv[0] == SECURITY else "install it in a folder of the PATH that is used here"
        raise _halt(reference, f"{argv[0]} failed (there is no such program; {where})") from None
    except subprocess.TimeoutExpired:
        why = f"no answer in {ANSWER_S} s; does it wait for somebody at the screen?"
        raise _halt(reference, f"{argv[0]} failed ({why})") from None
    except OSError as error:
        raise _halt(reference, f"{argv[0]} failed ({error.strerror or type(error).__name__})") from None


def _value(reference: str, run: subprocess.CompletedProcess[str]) -> str:
    if not (value := run.stdout.strip()):
        raise _halt(reference, "the item is empty")
    return value


def _halt(reference: str, why: str) -> Halt:
    return Halt(f"secret {reference}: {why}", code="no_secret")
