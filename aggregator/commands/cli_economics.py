"""The verb that advises on a purchase: economics."""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from aggregator.commands.ended import Ended
from aggregator.config import Cost
from aggregator.report.page import Page

Verb = Callable[[str, str, Callable[[argparse.Namespace], Ended]], argparse.ArgumentParser]
Shown = Callable[[argparse.Namespace, msgspec.Struct, Page, int], Ended]
GROUPS = {
    "the API work of today (spend or tokens per month; the price per million tokens in one of three ways)": {
        "api_spend": "API spend per month",
        "tokens": "prompt and answer tokens per month, like 500M",
        "price_per_m": "blended price of a million tokens",
        "input_per_m": "or: price of a million prompt tokens",
        "cached_per_m": "price of a million prompt tokens that repeat",
        "output_per_m": "price of a million answer tokens",
        "api_model": "or: the model used today, at its list price (default: openai/gpt-4o)",
        "mix": "prompt tokens to answer tokens (default: 3:1)",
        "cached": "share of the prompt tokens that repeats (default: 0)",
        "growth": "monthly growth of the API work, for example 0.02 (default: 0)",
    },
    "what moves to the nodes": {
        "kept": "share of the API work that moves, as far as the nodes can carry it (default: 0.8)",
        "model_class": "class of the model that takes over: billions of parameters, with active ones for a mixture of "
        "experts, like 27B or 235B-A22B (default: 8B)",
        "bits": "bits per weight (default: 4.5)",
        "kv_kib_per_tok": "KiB of KV cache per token",
        "same_as": "the open model as API hosts name it, to compare like for like (default: an example of the class); "
        "none: no comparison",
    },
    "the nodes": {
        "nodes": "number of nodes to buy",
        "chip": 'chip, like "M5 Pro": speed, list price and watts (default: M4 Pro with 64 GB)',
        "memory": "memory in GB, with a chip",
        "node_tok_s": "tokens (prompt and answer) per second of a node that works all the time, if measured",
        "duty": "mean load as a share of the load in the busiest five minutes (default: 0.33); 1 for "
        "batches around the clock",
        "node_price": "price of one node (default: list price of the chip)",
        "watts": "mean power of one node in watts (default: by the chip)",
        "residual": "residual value of a node as a share of its price, reported, not counted (default: 0.2)",
    },
    "other costs": {
        "setup": "other one-time costs: switch, rack, labour (default: 0)",
        "electricity_per_kwh": "price per kWh (default: 0.15 USD)",
        "other_per_month": "other costs per node and month (default: 0)",
        "people_per_month": "cost of operating staff per month (default: 0)",
    },
    "horizon and currency": {
        "months": "horizon in months (default: 36)",
        "currency": "currency of every amount (default: USD)",
        "usd_rate": "its price of one US dollar (default: cost.usd_rate of aggregator.toml, if there is one)",
    },
}
_WHOLE, _TEXT = ("nodes", "months"), ("api_model", "mix", "model_class", "same_as", "chip", "currency")
_TIMES = {"k": 1e3, "m": 1e6, "b": 1e9}


def add(local: Verb, shown: Shown, cost: Callable[[], Cost | None]) -> None:
    """Add the verb to a parser. ``shown`` ends a run with a page, ``cost`` is that of a configuration, if there is
    one."""
    told = "Compute whether buying nodes pays: capacity, break-even month, comparison with API hosts."
    buy = local("economics", told, lambda args: _economics(args, shown, cost))
    buy.epilog = "What is not given is assumed, and the result lists each assumption with its source."
    for title, flags in GROUPS.items():
        group = buy.add_argument_group(title)
        for name, text in flags.items():
            kind = int if name in _WHOLE else str if name in _TEXT else amount
            flag = f"--{name.replace('_', '-')}"
            group.add_argument(flag, type=kind, required=name == "nodes", help=text, metavar=_metavar(kind))
    buy.add_argument("--html", type=Path, default=None, help="also write the page with the curve to this file")


def amount(text: str) -> float:
    """A number like 12000, 1.5e9, 12k, 500M or 2B."""
    times = _TIMES.get(text[-1:].lower(), 1.0)
    return float(text if times == 1.0 else text[:-1]) * times


def _metavar(kind: Callable[[str], object]) -> str:
    return "TEXT" if kind is str else "N"


def _economics(args: argparse.Namespace, shown: Shown, cost: Callable[[], Cost | None]) -> Ended:
    from aggregator import economics
    from aggregator.report.pages import economics as economics_page

    names = (name for flags in GROUPS.values() for name in flags)
    inputs = economics.Inputs(**{name: value for name in names if (value := getattr(args, name)) is not None})
    configured = cost() if inputs.currency and inputs.usd_rate is None else None
    rate = configured.usd_rate if configured and configured.currency == inputs.currency else None
    report = economics.judge(inputs, datetime.now(UTC), rate)
    return shown(args, report, economics_page.page(report), 0)
