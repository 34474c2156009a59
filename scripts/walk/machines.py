"""The machines of the walk: folders of this one, each with a home, an address on loopback and an environment.

What is replaced is in one place here, and ``REPLACED`` tells it: the documents' commands themselves are not changed.
"""

import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT_NAME, FILE = "WALK_ROOT", "machines.json"
NAMES = ("mini-1", "mini-2", "mini-3", "mini-4")
AGENT_PORT, STORE_PORT = 8470, 8333
PORTS = (AGENT_PORT, STORE_PORT)
"""Documented ports: the agent's, and that of `mlxrack-agent store serve`."""
SITE = "llm.example.com"
REPLACED = (
    "mini-1.local to mini-4.local are folders of this machine, each with its own home, address on loopback and core",
    f"ports {' and '.join(map(str, PORTS))} are free ports of those addresses; {SITE} has the first three addresses",
    "mlxrack-agent store serve gets the store's port and an address on loopback on its command line",
    "ssh, scp, sudo and launchctl are stand-ins (scripts/walk/stand_ins.py): launchctl starts what the plist says",
    "the hub is a stand-in on loopback: under every name a small model for one node, a tiny one for a rack",
)
_DROPPED = ("MLXRACK_", "WALK_", "HF_", "XDG_", "SSL_", "CURL_", "PYTHON", "PYTEST")


class Machine(NamedTuple):
    """One machine: its name, home folder and address; the ports that stand for the documented ones."""

    root: Path
    name: str
    address: str
    ports: dict[int, int]
    hub: str
    path: tuple[str, ...]

    @property
    def home(self) -> Path:
        """Its user's home."""
        return self.root / self.name / "home"

    @property
    def services(self) -> Path:
        """What its launchd keeps."""
        return self.root / self.name / "launchd.json"

    def environ(self) -> dict[str, str]:
        """The environment of a terminal on it."""
        programs = (str(self.root / "bin"), *self.path, "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
        kept = {name: value for name, value in os.environ.items() if _is_kept(name)}
        hosts = {f"{name}.local": f"127.0.0.{n}" for n, name in enumerate(NAMES, 1)}
        hosts[SITE] = ",".join(list(hosts.values())[:3])
        return kept | {
            "HOME": str(self.home),
            "PATH": os.pathsep.join(programs),
            "PYTHONPATH": str(HERE / "hook"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CURL_HOME": str(self.home.parent),
            "HF_ENDPOINT": self.hub,
            "PIP_CONFIG_FILE": _pip_settings(),
            "PIP_QUIET": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "TERM": "dumb",
            ROOT_NAME: str(self.root),
            "WALK_MACHINE": self.name,
            "WALK_HERE": self.address,
            "WALK_HOSTS": " ".join(f"{name}={there}" for name, there in hosts.items()),
            "WALK_PORTS": " ".join(f"{port}={there}" for port, there in self.ports.items()),
        }


def make(root: Path, hub: str, path: tuple[str, ...]) -> list[Machine]:
    """Make the machines' folders, and the stand-ins of programs, under ``root``; ``path`` are folders of programs that
    every machine has."""
    from scripts.seaweed import free_port  # not needed by the stand-ins, which import this module often

    ports = {port: free_port() for port in PORTS}
    machines = [Machine(root, name, f"127.0.0.{n}", ports, hub, path) for n, name in enumerate(NAMES, 1)]
    for machine in machines:
        with socket.socket() as probe:
            try:
                probe.bind((machine.address, 0))
            except OSError:
                how = f"sudo ifconfig lo0 alias {machine.address}"
                raise SystemExit(f"walk: loopback has no address {machine.address}; on a Mac: {how}") from None
        machine.home.mkdir(parents=True)
        (machine.home.parent / ".curlrc").write_text(_curl_settings(machine))
    (root / "bin").mkdir()
    for name in ("ssh", "scp", "sudo", "launchctl"):
        program = root / "bin" / name
        module = "import sys; from scripts.walk.stand_ins import main; sys.exit(main(sys.argv[1:]))"
        program.write_text(
            f"#!/bin/sh\nexec env PYTHONPATH={shlex.quote(str(HERE.parents[1]))} {shlex.quote(sys.executable)} "
            f'-c {shlex.quote(module)} {name} "$@"\n'
        )
        program.chmod(0o755)
    described = [one._asdict() | {"root": str(root)} for one in machines]
    (root / FILE).write_text(json.dumps(described))
    return machines


def load() -> dict[str, Machine]:
    """The machines of the walk that this process belongs to, by name."""
    tree = json.loads((Path(os.environ[ROOT_NAME]) / FILE).read_text())
    return {
        one["name"]: Machine(
            **(one | {"root": Path(one["root"]), "ports": {int(k): v for k, v in one["ports"].items()}})
        )
        for one in tree
    }


def _is_kept(name: str) -> bool:
    return not name.startswith(_DROPPED) and not name.lower().endswith("_proxy") and name != "VIRTUAL_ENV"


def _pip_settings() -> str:
    """pip's settings of the real user: the machines have homes of their own."""
    places = [os.environ.get("PIP_CONFIG_FILE"), "~/.config/pip/pip.conf", "~/.pip/pip.conf"]
    return next((str(path) for one in places if one and (path := Path(one).expanduser()).is_file()), "/dev/null")


def _curl_settings(machine: Machine) -> str:
    """curl connects to addresses on loopback, and verifies the documented name."""
    lines = []
    for port, there in machine.ports.items():
        named = {f"{name}.local": f"127.0.0.{n}" for n, name in enumerate(NAMES, 1)}
        for host, address in {**named, "127.0.0.1": machine.address, "localhost": machine.address}.items():
            lines.append(f'connect-to = "{host}:{port}:{address}:{there}"')
    addresses = ",".join(f"127.0.0.{n}" for n in (1, 2, 3))
    agent = machine.ports[AGENT_PORT]
    lines += [f'connect-to = "{SITE}:{AGENT_PORT}:{SITE}:{agent}"', f'resolve = "{SITE}:{agent}:{addresses}"']
    return "\n".join(lines) + "\n"
