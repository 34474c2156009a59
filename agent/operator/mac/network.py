"""Who lets peers and clients in, and who lets the service out: the application firewall and Local Network privacy.
Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from agent.operator.checks import Finding

FIREWALL_FOLDER = "/usr/libexec/ApplicationFirewall"
FIREWALL = f"{FIREWALL_FOLDER}/socketfilterfw"

_BLOCKED = (
    "the running agent has no route to {peers}, and this shell connects to them at once: macOS keeps the agent from "
    "the local network (Local Network privacy, macOS 15 and newer). A LaunchDaemon is exempt, so run it as one: "
    "`sudo mlxrack-agent install`; else allow its Python in System Settings, Privacy & Security, Local Network; if it "
    "is allowed there already, restart this Mac"
)
_AWAY = (
    "neither the agent nor this shell has a route to {peers}: that machine is off, or the network between them is at "
    "fault, not Local Network privacy"
)


class App(NamedTuple):
    """A rule of the firewall for a program's path."""

    path: str
    allowed: bool


def apps(text: str) -> list[App]:
    """The output of `socketfilterfw --listapps`: a numbered path, then in parentheses what becomes of it."""
    found, path = list[App](), ""
    for line in text.splitlines():
        if numbered := re.fullmatch(r"\d+\s*:\s*(?P<path>.*\S)", line.strip()):
            path = numbered["path"]
        elif (rule := re.fullmatch(r"\(\s*(Allow|Block) incoming connections\s*\)", line.strip())) and path:
            found.append(App(path, rule[1] == "Allow"))
            path = ""
    return found


def firewall(state: str, block_all: str, listed: str, programs: Sequence[str]) -> Finding:
    """Whether peers and clients are let in. ``programs`` are the paths under which macOS may know the agent's Python:
    its executable, and folders (ending with /) that hold its application."""
    known = re.search(r"State = (\d)", state)
    if known is None:
        seen = "it does not say whether it is on (is this Mac managed?); look in System Settings, Network, Firewall"
        return Finding("firewall", "warning", seen)
    if known[1] == "0":
        return Finding("firewall", "ok", "off: peers and clients reach this node")
    if known[1] == "2" or re.search(r"set to enabled|block all enabled", block_all, re.IGNORECASE):
        seen = "it blocks all incoming connections, so no peer and no client reaches this node"
        return Finding("firewall", "problem", f"{seen}: `sudo {FIREWALL} --setblockall off`")
    rules = [one for one in apps(listed) if any(_is(one.path, program) for program in programs)]
    program = programs[0] if programs else "PYTHON"
    if any(not one.allowed for one in rules):
        path = next(one.path for one in rules if not one.allowed)
        return Finding("firewall", "problem", f"it blocks {path}: `sudo {FIREWALL} --unblockapp '{path}'`")
    if rules:
        return Finding("firewall", "ok", f"on, and it lets {rules[0].path} in")
    seen = "on, without a rule for the agent's Python: it asks on the screen, where nobody answers for a service"
    return Finding("firewall", "warning", f"{seen}: `sudo {FIREWALL} --add '{program}' --unblockapp '{program}'`")


def _is(path: str, program: str) -> bool:
    return path.startswith(program) if program.endswith("/") else path == program


def local_network(from_here: Mapping[str, bool]) -> Iterator[Finding]:
    """What it means that the agent has no route to these peers: by node, whether this shell reaches them, which Local
    Network privacy does not concern where ssh or Terminal started it."""
    if blocked := sorted(node for node, reached in from_here.items() if reached):
        yield Finding("local network", "problem", _BLOCKED.format(peers=", ".join(blocked)))
    if away := sorted(node for node, reached in from_here.items() if not reached):
        yield Finding("local network", "ok", _AWAY.format(peers=", ".join(away)))
