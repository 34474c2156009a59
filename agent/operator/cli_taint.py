"""mlxrack-agent taint: what is remembered of SENSITIVE requests, and its end."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from agent.config import AgentConfig
from agent.operator.admin_client import AdminClient
from agent.operator.statusview import table
from shared.errors import Refused

Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""


def add(outer: Outer, load: Load, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add ``taint`` with its verb ``clear``; without one it shows."""
    text = (
        "Show what is remembered of SENSITIVE requests: how many messages, whether that is all, and how it stands with "
        "each node. A request that contains one of them is SENSITIVE."
    )
    taint = outer("taint", text, lambda args: _show(AdminClient(*load(args)), args))
    taint.add_argument("--json", action="store_true", help="print JSON")
    verbs = taint.add_subparsers(metavar="VERB")
    text = (
        "Forget every message of SENSITIVE requests, on every node of the rack. Conversations with them are no longer "
        "SENSITIVE by themselves, and may leave the premises where the policy allows it. Every node must be up."
    )
    clear = verbs.add_parser("clear", help="Forget all of it, on every node.", description=text)
    common(clear)
    clear.add_argument("--yes", action="store_true", help="do it; without this nothing is cleared")
    clear.set_defaults(run=lambda args: _clear(AdminClient(*load(args)), args))


def _show(client: AdminClient, args: argparse.Namespace) -> int:
    found = client.taint()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    why = f": {found['why']}" if found["why"] else ""
    meaning = "" if found["state"] == "ready" else "; every request counts as SENSITIVE"
    print(f"{found['marks']} of at most {found['most']} marks, {found['state']}{why}{meaning}")
    if found["peers"]:
        print(table(("NODE", "MARKS"), sorted(found["peers"].items())))
    return 0


def _clear(client: AdminClient, args: argparse.Namespace) -> int:
    if not args.yes:
        raise Refused("taint clear: conversations with SENSITIVE content could leave the premises; confirm with --yes")
    answer = client.order("taint/clear")
    print(json.dumps(answer) if args.json else f"{answer['cleared']} marks cleared on every node")
    return 0
