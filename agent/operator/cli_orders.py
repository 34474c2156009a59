"""mlxrack-agent load, unload, swap, pin, unpin, and orders: what was ordered on this node and still stands."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from agent.config import AgentConfig
from agent.operator.admin_client import AdminClient
from agent.operator.statusview import progress, size, table
from shared.errors import RackError

LASTS = (
    "It lasts over restarts, crashes and upgrades, until a newer generation of the desired state, or until "
    "`mlxrack-agent orders clear MODEL`."
)
Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""
_HEAD = ("MODEL", "ORDERED", "OTHERWISE", "NOTE")


def add(outer: Outer, load: Load, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the orders, and ``orders`` with its verb ``clear``; without one it lists."""

    def client(args: argparse.Namespace) -> AdminClient:
        return AdminClient(*load(args))

    verbs: tuple[tuple[str, str, Callable[[AdminClient, argparse.Namespace], int]], ...] = (
        ("load", "Load a configured model into memory, evicting idle models if necessary.", _load),
        ("unload", "Drain a model and evict it from memory.", _load),
        ("pin", "Exclude a model from eviction.", _pin),
        ("unpin", "Allow eviction of a pinned model again.", _pin),
    )
    for name, text, run in verbs:
        order = outer(name, f"{text} {LASTS}", lambda args, run=run: run(client(args), args))  # type: ignore[misc]
        order.set_defaults(verb=name)
        order.add_argument("model", help="served name")
        order.add_argument("--json", action="store_true", help="print JSON")
    text = "Replace the version behind a served name without losing a request (hot or cold swap); OLD OLD swaps back."
    swap = outer("swap", f"{text} {LASTS}", lambda args: _swap(client(args), args))
    swap.add_argument("old", help="served name")
    swap.add_argument("new", help="configured model that takes over the name")
    swap.add_argument("--json", action="store_true", help="print JSON")
    _add_orders(outer, client, common)


def _add_orders(
    outer: Outer, client: Callable[[argparse.Namespace], AdminClient], common: Callable[[argparse.ArgumentParser], None]
) -> None:
    text = (
        "List what was ordered on this node and still stands: over agent.toml, and under a newer generation of the "
        "desired state."
    )
    orders = outer("orders", text, lambda args: _list(client(args), args))
    orders.add_argument("--json", action="store_true", help="print JSON")
    verbs = orders.add_subparsers(metavar="VERB")
    text = (
        "End the orders for one model, or all. What agent.toml (or the desired state) says is then served at once: "
        "other files by a hot swap, without a failed request. An order whose undoing is impossible (not enough memory, "
        "no files) stands, and the reason is printed."
    )
    clear = verbs.add_parser("clear", help="End the orders for one model, or all, and undo them now.", description=text)
    common(clear)
    clear.add_argument("model", nargs="?", default="", help="served name (default: all)")
    clear.add_argument("--later", action="store_true", help="change nothing now; the next start is without the order")
    clear.add_argument(
        "--unreadable",
        action="store_true",
        help="end no order, but the warning that a file of orders could not be read, and remove that file",
    )
    clear.set_defaults(run=lambda args: _clear(client(args), args))


def _load(client: AdminClient, args: argparse.Namespace) -> int:
    """Load and unload."""
    answer = _watched(client, args, args.verb, model=args.model)
    print(json.dumps(answer) if args.json else f"{args.verb} {args.model}: done{_lasts(answer)}")
    return 0


def _pin(client: AdminClient, args: argparse.Namespace) -> int:
    answer = client.order("pin", model=args.model, pinned="yes" if args.verb == "pin" else "no")
    words = "pinned, excluded from eviction" if answer["pinned"] else "unpinned, may be evicted"
    print(json.dumps(answer) if args.json else f"{args.model}: {words}{_lasts(answer)}")
    return 0


def _swap(client: AdminClient, args: argparse.Namespace) -> int:
    answer = _watched(client, args, "swap", model=args.old, new=args.new)
    if args.json:
        print(json.dumps(answer))
        return 0
    print(
        f"swap {args.old}: {answer['outcome']}, {answer['from_version'][:8]} -> {answer['to_version'][:8]} "
        f"in {answer['window_us'] / 1e6:.1f} s ({answer['probes']} timed probes, slowest "
        f"{(answer['probe_p99_us'] or 0) / 1e6:.2f} s; {size(answer['freed_bytes'])} freed)"
    )
    if answer["itl_before_us"] and answer["itl_during_us"]:
        before, during = answer["itl_before_us"] / 1e3, answer["itl_during_us"] / 1e3
        print(
            f"inter-token latency (ITL), p95: {before:.0f} ms before, {during:.0f} ms during the swap; "
            f"elevated for {answer['raised_us'] / 1e6:.1f} s"
        )
    print(f"swap {args.old}: done{_lasts(answer)}")
    return 0


def _lasts(answer: dict[str, Any]) -> str:
    """How long it lasts; an agent that was started before an upgrade does not say."""
    return f"; {answer['lasts']}" if "lasts" in answer else ""


def _watched(client: AdminClient, args: argparse.Namespace, verb: str, **body: str) -> dict[str, Any]:
    """Send an order and show its progress until it has ended."""
    said, began, live = "", time.monotonic(), sys.stderr.isatty()
    with ThreadPoolExecutor(1) as background:
        order = background.submit(client.order, verb, **body)
        while not wait([order], timeout=0.2).done:
            with contextlib.suppress(RackError):
                now = progress(client.status(), verb, body["model"])
                # a terminal's line is rewritten; elsewhere one line per phase is enough
                if now and (live or now.split()[0] != said.split(" ")[0]) and not args.json:
                    line = f"{time.monotonic() - began:6.1f} s  {now}"
                    print(f"\r{line:<70}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)
                    said = now
        if live and said:
            print(file=sys.stderr)
        return order.result()


def _list(client: AdminClient, args: argparse.Namespace) -> int:
    found = client.orders()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    _warn(found)
    rows = [(one["model"], one["ordered"], one["instead"] or "-", one["note"]) for one in found["orders"]]
    if not rows:
        print("no orders stand: what is served is what agent.toml or the desired state says")
        return 0
    print(table(_HEAD, rows))
    print("`mlxrack-agent orders clear [MODEL]` ends them and undoes them now")
    return 0


def _clear(client: AdminClient, args: argparse.Namespace) -> int:
    later, unreadable = ("yes" if chosen else "no" for chosen in (args.later, args.unreadable))
    answer = client.order("orders/clear", model=args.model, later=later, unreadable=unreadable)
    if args.json:
        print(json.dumps(answer, indent=2))
    else:
        _warn(answer)
        _say(answer["ended"], unreadable=args.unreadable)
    return 1 if any("failed" in one for one in answer["ended"]) else 0


def _say(ended: list[dict[str, Any]], *, unreadable: bool) -> None:
    for one in ended:
        if "failed" in one:
            print(f"{one['model']}: {one['ended']} stands: {one['failed']}", file=sys.stderr)
        else:
            print(f"{one['model']}: {one['ended']} has ended; {one['now']}")
    if not ended:
        print("the warning has ended" if unreadable else "no orders stand; nothing to clear")


def _warn(found: dict[str, Any]) -> None:
    for warning in found["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
