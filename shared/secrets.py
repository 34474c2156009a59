"""Secrets are configured as references and resolved when needed; none of our files holds one.

References: ``env:NAME``, ``file:/path`` (first line; the file must not be readable by others), ``keychain:service``
(macOS) and ``op://vault/item/field`` (1Password's ``op``). The caller passes the environment, so that access
to it is explicit.
"""

import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from shared.bucket import SECRET_KINDS
from shared.errors import Halt


def resolve(reference: str, environ: Mapping[str, str]) -> str:
    """The secret behind ``reference``. Raises Halt with the reference, never the value."""
    if reference.startswith("env:"):
        if not (value := environ.get(reference[4:], "")):
            raise Halt(f"secret {reference}: the environment variable is not set", code="no_secret")
        return value
    if reference.startswith("file:"):
        return _from_file(reference)
    if reference.startswith("keychain:"):
        return _from_command(reference, ["/usr/bin/security", "find-generic-password", "-w", "-s", reference[9:]])
    if reference.startswith("op://"):
        return _from_command(reference, ["op", "read", "--no-newline", reference])
    raise Halt(f"secret: invalid reference; expected one of {', '.join(SECRET_KINDS)}", code="no_secret")


def _from_file(reference: str) -> str:
    path = Path(reference[5:])
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Halt(f"secret {reference}: cannot be read ({type(error).__name__})", code="no_secret") from None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        raise Halt(f"secret {reference}: the file is readable by group or others; chmod 600 it", code="no_secret")
    if not (first := next(iter(text.splitlines()), "").strip()):
        raise Halt(f"secret {reference}: the file is empty", code="no_secret")
    return first


def _from_command(reference: str, argv: list[str]) -> str:
    try:
        run = subprocess.run(argv, capture_output=True, timeout=20, check=False, text=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Halt(f"secret {reference}: {argv[0]} failed ({type(error).__name__})", code="no_secret") from None
    if run.returncode != 0 or not run.stdout.strip():
        raise Halt(f"secret {reference}: {argv[0]} returned no value (exit {run.returncode})", code="no_secret")
    return run.stdout.strip()
