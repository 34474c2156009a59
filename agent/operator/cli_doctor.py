"""mlxrack-agent doctor and check-config: the same checks, with and without asking the world."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from agent import config_checks
from agent.config import AgentConfig
from agent.operator import checks
from agent.operator.checks import Finding
from agent.operator.first_node import cli as first_node
from agent.operator.statusview import fold, table
from shared import config as shared_config

Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""
Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Places = Callable[[AgentConfig], tuple[Path, Path]]
"""The state folder and the log of a configuration."""


def add(outer: Outer, load: Load, located: Callable[[argparse.Namespace], Path], places: Places) -> None:
    """Add both verbs. ``located`` is the configuration's path, whether or not it can be read."""
    text = "Check this machine: configuration, secrets, models, memory, store, peers, TLS, sensors."

    def looked(args: argparse.Namespace) -> int:
        if args.replay is not None:
            return first_node.replay(args, _shown)
        if args.as_service is not None:
            return _as_service(args, located(args))
        if args.first_node is not None:
            return first_node.first_node(args, load, located(args), _shown)
        return (_in_place if args.in_place else _doctor)(args, *load(args), places)

    doctor = outer("doctor", text, looked)
    why = "check only what the service's user can do, as that user: configuration, each secret, folders (with sudo)"
    doctor.add_argument("--as-service", nargs="?", const="", metavar="USER", help=f"{why}; USER if none is installed")
    doctor.add_argument("--in-place", action="store_true", help=argparse.SUPPRESS)
    first_node.add_options(doctor)
    doctor.add_argument("--mac", action="store_true", help="also list what somebody has to look at on a Mac")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    text = "Say everything that is wrong with the configuration, without starting or asking anything else."
    outer("check-config", text, lambda args: _check_config(located(args), places))


def width_of(stream: object) -> int:
    """The columns of a terminal; 0 (any number) for anything else."""
    is_terminal = getattr(stream, "isatty", lambda: False)()
    return shutil.get_terminal_size().columns if is_terminal else 0


def _doctor(args: argparse.Namespace, config: AgentConfig, state: Path, places: Places) -> int:
    from agent.operator import doctor

    return _shown(args, doctor.examine(config, state, places(config)[1].parent, os.environ, mac=args.mac))


def _as_service(args: argparse.Namespace, path: Path) -> int:
    from agent.operator import as_service

    return _shown(args, as_service.examine(path, as_service.service(args.as_service)))


def _in_place(args: argparse.Namespace, config: AgentConfig, state: Path, places: Places) -> int:
    """The child process of ``--as-service``, which is the service's user already."""
    from agent.operator import as_service

    return _shown(args, list(as_service.in_place(config, state, places(config)[1].parent)))


def _shown(args: argparse.Namespace, findings: Sequence[Finding]) -> int:
    if args.json:
        print(json.dumps([found._asdict() for found in findings], indent=2))
    else:
        rows = [(found.verdict, found.what, found.seen) for found in findings]
        print(table(("", "WHAT", "SEEN"), rows, width_of(sys.stdout)))
    return 1 if any(found.verdict == "problem" for found in findings) else 0


def _check_config(path: Path, places: Places) -> int:
    noted: list[Finding] = []

    def check(config: AgentConfig) -> Sequence[str]:
        noted.extend(_known(config, places))
        found = [f"{one.key}: {one.seen}" for one in noted if one.verdict == "problem"]
        return [*config_checks.check(config), *found]

    config = shared_config.load(path, AgentConfig, check)
    state, log = places(config)
    models = ", ".join(m.name for m in config.models) or "none"
    print(f"{path}: valid; node {config.node.id} of rack {config.node.rack}, models: {models}")
    print(f"state {state}, log {log}")
    for group in sorted({key.cache_group for key in config.keys if key.cache_group}):
        ids = ", ".join(key.id for key in config.keys if key.cache_group == group)
        print(f"prompt cache {group} is shared by the keys {ids}")
    for one in noted:
        if one.verdict == "warning":
            print(fold(f"warning: {one.what}: {one.seen}", width_of(sys.stdout)))
    return 0


def _known(config: AgentConfig, places: Places) -> list[Finding]:
    """What can be known of a configuration whose values may be wrong."""
    from agent.operator import facts
    from agent.operator.resolved import resolver

    state, log = places(config)
    return checks.here(config, facts.gather(config, state, log.parent, resolver(config, state, os.environ)))
