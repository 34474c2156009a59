"""mlxrack-agent reload: have the running agent read its configuration again."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.config import AgentConfig
from agent.operator.admin_client import AdminClient
from shared.errors import Retryable

POLL_S = 0.5
Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""


def add(outer: Outer, load: Load) -> None:
    """Add ``reload``."""
    text = "Have the running agent read its configuration again, without losing a request (like SIGHUP)."
    verb = outer("reload", text, lambda args: _reload(args, *load(args)))
    verb.add_argument("--wait", action="store_true", help="wait until models are loaded, replaced or gone")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _reload(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    client = AdminClient(config, state)
    said = reloaded(client)
    if args.wait:
        said["models"] = waited(client)
    if args.json:
        print(json.dumps(said, indent=2))
    else:
        print("\n".join(lines(said)))
    return 1 if args.wait and said["models"] else 0


def reloaded(client: AdminClient) -> dict[str, Any]:
    """What changed. Raises RackError: why nothing did."""
    try:
        return client.order("reload")
    except Retryable as error:
        if error.code == "not_running":
            why = "(if node.id or [paths] were changed: these need a restart)"
            raise Retryable(f"{error.message} {why}", code=error.code) from None
        raise


def waited(client: AdminClient) -> dict[str, str]:
    """Wait until no model is being changed; those that could not be, with the reason."""
    while True:
        states: dict[str, str] = client.status()["reload"]["models"]
        if "changing" not in states.values():
            return states
        time.sleep(POLL_S)


def lines(said: dict[str, Any]) -> list[str]:
    """What changed, for display."""
    changed = said["changed"] or ["nothing: the configuration in force is the same"]
    failed = [f"model {name} could not be changed: {why}" for name, why in said.get("models", {}).items()]
    return [*(f"changed {one}" if said["changed"] else one for one in changed), *said["notes"], *failed]
