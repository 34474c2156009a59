"""mlxrack-agent chips: what the table of chips says, and where each figure comes from."""

import argparse
import json
from collections.abc import Callable

import msgspec

from agent.operator.statusview import table
from shared import chips
from shared.errors import Refused

Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]


def add(outer: Outer) -> None:
    """Add ``chips``, which needs no configuration."""
    text = "List Apple's chips: bandwidth, GPU, memory, watts and price, as every estimate takes them."
    verb = outer("chips", text, _show)
    verb.add_argument("name", nargs="?", default="", help='a chip like "M4 Pro", or a model identifier like Mac16,11')
    verb.add_argument("--sources", action="store_true", help="name the source of each figure")
    verb.add_argument("--markdown", action="store_true", help="print the tables of docs/hardware.md")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _show(args: argparse.Namespace) -> int:
    if args.markdown:
        print(chips.markdown())
        return 0
    shown = _chosen(args.name)
    if args.json:
        macs = [mac for mac in chips.macs() if mac.chip in {chip.name for chip in shown}]
        found = {"chips": shown, "macs": macs, "sources": chips.sources()}
        print(json.dumps(msgspec.to_builtins(found, str_keys=True), indent=2))
        return 0
    print(table([title.upper() for title in chips.HEAD], chips.rows(shown)))
    print(f"?: {chips.UNCONFIRMED}, no public source; --sources names those of the others")
    if args.sources:
        print(*("", *(f"{name}: {text}" for name, text in chips.cited(shown))), sep="\n")
    return 0


def _chosen(name: str) -> tuple[chips.Chip, ...]:
    """The chip by its own name or by that of a Mac; all without a name. Raises Refused."""
    if not name:
        return chips.known()
    mac = chips.find_mac(name)
    chip = chips.find(mac.chip if mac else name)
    if chip is None:
        raise Refused(f"chips: {chips.unknown(name)}; `mlxrack-agent chips` lists what it has", code="not_found")
    return (chip,)
