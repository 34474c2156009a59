"""mlxrack-agent limits: the limits of keys and providers, and this node's part of each."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.config import AgentConfig
from agent.operator.admin_client import AdminClient
from agent.operator.statusview import table

Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]

_HEAD = ("OWNER", "LIMIT", "OF", "USED", "PART HERE", "SPARE HERE", "STATE")


def add(outer: Outer, load: Load) -> None:
    """Add ``limits``."""
    text = "Show the limits of API keys and providers: used by the rack, and this node's part of each."
    verb = outer("limits", text, lambda args: _show(args, AdminClient(*load(args)).limits()))
    verb.add_argument("--json", action="store_true", help="print JSON")


def _show(args: argparse.Namespace, found: dict[str, Any]) -> int:
    print(json.dumps(found, indent=2) if args.json else text_of(found))
    return 0


def text_of(found: dict[str, Any]) -> str:
    """The answer of the agent, for a terminal."""
    rows = [
        (one["owner"], one["name"], one["limit"], one["used"], one["part"], one["spare"], _state(one))
        for one in found["limits"]
    ]
    lines = [f"warning: the state cannot be saved: {found['problem']}"] if found["problem"] else []
    if not rows:
        return "\n".join([*lines, "no limits: the policy sets none for any key or provider"])
    return "\n".join([*lines, table(_HEAD, rows), f"divided among {', '.join(found['nodes'])}"])


def _state(one: dict[str, Any]) -> str:
    """Whether this node lacks something, or peers do."""
    if one["waits"]:
        return "waits to hear what peers have used"
    if one["wants"] not in (0, "0"):
        return f"wants {one['wants']}"
    return f"{', '.join(one['wanted_by'])} want some" if one["wanted_by"] else "-"
