"""mlxrack-agent claim: which agent holds this node's id in the bucket, and how another machine takes it over."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.config import AgentConfig
from agent.telemetry import spool_identity
from agent.telemetry.claims import UNKNOWN, Claim, Grant, parse
from agent.telemetry.sensors.host import hardware_id
from agent.telemetry.spool_identity import Identity
from shared import keys
from shared.errors import Refused
from shared.store import ObjectStore, find
from shared.store_open import open_store

Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]


def add(outer: Outer, load: Load, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add ``claim``, which shows, and its verb ``take``."""
    text = "Show which machine holds this node's id in the bucket; take it over for this one."
    claim = outer("claim", text, lambda args: _show(args, *load(args)))
    claim.add_argument("--json", action="store_true", help="print JSON")
    verbs = claim.add_subparsers(metavar="VERB")
    text = "Take the node id over for this machine, from one that it replaces or that should not have it."
    take = verbs.add_parser("take", help=text, description=text)
    common(take)
    take.set_defaults(run=lambda args: _take(args, *load(args)))


def newest(store: ObjectStore, node: str) -> tuple[int, Claim | None]:
    """The number of a node id's newest claim, and the claim; 0 and None without any."""
    number, holder = 0, None
    while (stored := find(store, keys.claim_key(node, number + 1), keys.MOST_CLAIM_BYTES)) is not None:
        number, holder = number + 1, parse(stored.body)
    return number, holder


def _opened(config: AgentConfig, state: Path) -> tuple[ObjectStore, Identity]:
    hardware = hardware_id()
    mine = spool_identity.read(state / "spool", node=config.node.id, rack=config.node.rack, hardware=hardware)
    return open_store(config.store, os.environ, attempts=1), mine


def _show(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    store, mine = _opened(config, state)
    number, holder = newest(store, config.node.id)
    ours = holder is not None and holder.spool_id == mine.spool_id
    if args.json:
        held = None if holder is None else {"number": number, "hardware": holder.hardware, "rack": holder.rack}
        print(json.dumps({"node": config.node.id, "hardware": mine.hardware, "held_by": held, "here": ours}))
        return 0
    if holder is None:
        print(f"{config.node.id}: no agent has claimed this id yet; the first one that uploads does")
    else:
        whose = "this agent" if ours else "another agent, on " + _machine(holder, mine)
        print(f"{config.node.id}: held by {whose} (claim {number}, hardware {holder.hardware[:8]})")
    print(f"this machine: hardware {mine.hardware[:8]}")
    return 0


def _machine(holder: Claim, mine: Identity) -> str:
    if UNKNOWN in (holder.hardware, mine.hardware):
        return "a machine that cannot be told apart from this one"
    return "this machine, with another state folder" if holder.hardware == mine.hardware else "another machine"


def _take(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    store, mine = _opened(config, state)
    number, holder = newest(store, config.node.id)
    new = mine.epoch == 0  # no spool is here yet
    if new and mine.hardware == UNKNOWN:
        raise Refused("claim take: this machine has no hardware id; start the agent once, then take the id")
    needed = holder is not None and holder.spool_id != mine.spool_id
    if needed:
        grant = Grant(to=mine.hardware if new else mine.spool_id)
        store.put(keys.grant_key(config.node.id, number), msgspec.json.encode(grant))
    if args.json:
        print(json.dumps({"node": config.node.id, "granted": needed, "hardware": mine.hardware}))
    elif not needed:
        print(
            f"{config.node.id}: nothing to take; " + ("no agent holds it" if holder is None else "this agent holds it")
        )
    else:
        print(f"{config.node.id}: granted to this machine; its agent claims it with its next upload, and the one that")
        print("held it uploads nothing more (stop it, or give it its own node.id)")
    return 0
