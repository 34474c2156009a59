"""What the service's user can do: `doctor --as-service` looks at the configuration, its secrets and its folders as the
user, and with the environment, that launchd gives to the service. Nothing is written, and no value leaves the child.
"""

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agent.config import AgentConfig
from agent.operator import checks, facts, install
from agent.operator.checks import Finding
from agent.operator.resolved import Resolver

DEFAULT_USER = "_mlxrack"
_PATH = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_CHILD = ("-P", "-B", "-m", "agent", "doctor", "--in-place", "--json", "--config")
_MOST_LINES = 8
LIMIT_S = 180.0
"""For all secrets together; each may take twenty seconds."""


class Service(NamedTuple):
    """Who runs the service, and with which variables. ``why`` is where that is known from."""

    user: str
    uid: int
    gid: int
    environ: Mapping[str, str]
    why: str


def service(user: str = "") -> Service | str:
    """The installed service, or the one that would be installed for ``user`` (``_mlxrack``); or why there is none."""
    plist = (install.installed() or {}) if not user else {}
    name = user or str(plist.get("UserName", "")) or DEFAULT_USER
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        how = "create it (docs/operating.md, Prepare a Mac), or name another: `doctor --as-service USER`"
        return f"user {name} does not exist; {how}"
    given = plist.get("EnvironmentVariables")
    variables = {str(key): str(value) for key, value in given.items()} if isinstance(given, dict) else {}
    why = f"as {install.DAEMON_PLIST} says" if plist else "no service is installed; as `install` would"
    return Service(name, entry.pw_uid, entry.pw_gid, variables or {"HOME": entry.pw_dir, "PATH": _PATH}, why)


def examine(config: Path, found: Service | str) -> list[Finding]:
    """Everything that can be known in the service's place; a problem where this user may not take that place."""
    if isinstance(found, str):
        return [Finding("service", "problem", found)]
    if os.geteuid() not in (0, found.uid):
        how = f"`sudo mlxrack-agent doctor --as-service {found.user} --config {config}`"
        return [Finding("service", "problem", f"only root can look as {found.user}: run {how}")]
    head = Finding(
        "service", "ok", f"looked at as user {found.user}, with {', '.join(sorted(found.environ))} ({found.why})"
    )
    return [head, *_asked(config, found)]


def in_place(config: AgentConfig, state: Path, logs: Path) -> Iterator[Finding]:
    """What this process sees as the user that it is: each secret with a verdict of its own, and whatever else is wrong
    and known without asking anybody."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    looking = Resolver(os.environ, user, may_ask=True, for_service=True)
    yield Finding("configuration", "ok", f"{user} can read it")
    for secret in checks.references(config):
        why, _ = looking.problem(secret)
        seen = why or f"{secret.reference} can be used"
        yield Finding(f"secret {secret.key}", "problem" if why else "ok", seen, secret.key)
    known = facts.gather(config, state, logs, looking)._replace(secrets=())
    for found in checks.here(config, known):
        if found.verdict != "ok" and found.what != "listen":  # the running agent listens
            yield found


def _asked(config: Path, found: Service) -> list[Finding]:
    """Ask a child process that has become the user: one that changes itself could change back."""
    become: dict[str, Any] = {"user": found.uid, "group": found.gid, "extra_groups": [found.gid]}
    try:
        run = subprocess.run(
            [sys.executable, *_CHILD, str(config.absolute())],
            **(become if os.geteuid() != found.uid else {}),
            env=dict(found.environ),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except PermissionError:
        seen = f"{found.user} may not run {sys.executable}, and launchd could not either; put the environment into a "
        return [
            Finding("program", "problem", f"{seen}folder that this user can enter (`ls -ld` each part of the path)")
        ]
    except subprocess.TimeoutExpired:
        return [Finding("secrets", "problem", f"not answered within {LIMIT_S:.0f} s: `security` or `op` waits")]
    try:
        if not (findings := [Finding(**one) for one in json.loads(run.stdout)]):
            raise ValueError
        return findings
    except (ValueError, TypeError):
        lines = [line.strip() for line in run.stderr.splitlines()] or [f"exit status {run.returncode}"]
        seen = " ".join(lines[-_MOST_LINES:]).removeprefix("mlxrack-agent: ")
        return [Finding("configuration", "problem", f"as {found.user} it ends with: {seen}")]
