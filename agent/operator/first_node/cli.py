"""`doctor --first-node [FILE]` and `doctor --replay FILE`."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from agent.config import AgentConfig, Node
from agent.operator.checks import Finding
from shared.errors import RackError

Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
Show = Callable[[argparse.Namespace, list[Finding]], int]
"""Prints findings and returns the exit status."""


def add_options(doctor: argparse.ArgumentParser) -> None:
    """Both options; one excludes the other."""
    either = doctor.add_mutually_exclusive_group()
    text = "run all that only a Mac can prove and write what it shows to an archive (default: mlxrack-NODE-TIME.tar.gz)"
    either.add_argument("--first-node", nargs="?", const="", metavar="FILE", help=text)
    either.add_argument("--replay", metavar="FILE", help="say what such an archive shows; on any machine")


def replay(args: argparse.Namespace, show: Show) -> int:
    """The verdicts of an archive, from what is in it."""
    from agent.operator.first_node import bundle, judges

    found = bundle.read(Path(args.replay))
    made = judges.printable(f"made {found.made} by mlxrack {found.version}")
    print(f"{args.replay}: {made}", file=sys.stderr)
    return show(args, judges.verdicts(found))


def first_node(args: argparse.Namespace, load: Load, located: Path, show: Show) -> int:
    """Take every step, write the archive and say the verdicts. A configuration that this user cannot read, or that is
    wrong, is in the archive as such: it shows nothing of the machine."""
    from agent.operator.first_node import bundle, collect, judges, masking, steps
    from agent.operator.statusview import table

    there = _is_there(located)
    try:
        config, state = load(args)
    except RackError as error:
        if not there:
            raise
        print(f"{error.message}; going on without it", file=sys.stderr)
        config = AgentConfig(node=Node(id="node", rack="rack"))
        state = Path(tempfile.gettempdir(), "mlxrack-no-state")
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = Path(args.first_node or f"mlxrack-{config.node.id}-{stamp}.tar.gz").expanduser()
    bundle.check_place(path)
    mask = masking.masker(collect.names(config))
    taking = steps.steps(str(located.absolute()) if there else "", str(state), config.limits.drain_s)
    with collect.ended_by_signals():
        taken = collect.collect(taking, mask, lambda line: print(line, file=sys.stderr, flush=True))
        found = judges.verdicts(taken)
        rows = [(one.verdict, one.what, one.seen) for one in found]
        body = bundle.packed(taken, table(("", "WHAT", "SEEN"), rows) + "\n")
        bundle.write(path, body)
    masked = "names, serial numbers, addresses and secrets are masked; look into it before you send it"
    print(f"{path}: {len(body) / 1000:.0f} kB; {masked}: tar -xzOf {path} | less", file=sys.stderr)
    return show(args, found)


def _is_there(path: Path) -> bool:
    """Whether or not this user may read it, or enter its folder."""
    try:
        os.lstat(path)
    except PermissionError:
        return True
    except OSError:
        return False
    return True
