"""Asks this Mac what agent/operator/mac judges. Each program has a few seconds; one that fails says nothing."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from agent.operator.checks import Finding
from agent.operator.mac import network
from agent.operator.mac.settings import QUESTIONS, judge
from shared.connection_errors import NO_ROUTE

FOLDERS = ("/usr/bin", "/usr/sbin", network.FIREWALL_FOLDER)
"""Where macOS has its own programs; a PATH may have others of the same names."""
ANSWER_S = 10.0
_CONNECT_S = 3.0


def settings() -> Iterator[Finding]:
    """Sleep, power loss, energy mode, FileVault and firewall."""
    yield from judge({name: said(*argv) for name, argv in QUESTIONS.items()}, programs())


def local_network(status: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Whether this process reaches the peers that the running agent, by its ``status``, has no route to."""
    away = {peer["node"]: peer["url"] for peer in (status or {}).get("peers", ()) if NO_ROUTE in peer["problem"]}
    return network.local_network({node: connects(url) for node, url in away.items()})


def connects(url: str) -> bool:
    """Whether anything at the address of ``url`` answers a connection, with a refusal, too."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), _CONNECT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def programs() -> list[str]:
    """The executable, and a framework's folder: its bin/python starts the Python.app that lies there."""
    executable, folder = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    return [executable, f"{folder}/"] if "Python.framework/" in f"{folder}/" else [executable]


def said(name: str, *arguments: str) -> str:
    """What a program of macOS prints; "" where there is none, or where it fails or waits."""
    program = shutil.which(name, path=os.pathsep.join(FOLDERS)) or name
    plain = {**os.environ, "LC_ALL": "C"}
    nothing = subprocess.DEVNULL
    try:
        run = subprocess.run([program, *arguments], capture_output=True, timeout=ANSWER_S, stdin=nothing, env=plain)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.decode(errors="replace")
