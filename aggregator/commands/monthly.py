"""The monthly executive report as PDF, and its figures as JSON."""

import time

import msgspec

from aggregator import load, publish
from aggregator.calendar import full_hour, month
from aggregator.commands.weekly import notes
from aggregator.config import AggregatorConfig
from aggregator.judgements import judge
from aggregator.report import pdf
from shared.store import ObjectStore


def run(config: AggregatorConfig, store: ObjectStore, name: str) -> list[str]:
    """Publish the month's report; returns its keys."""
    window = load.window(store, month(name, config.timezone))
    judged = judge(window, None, config, full_hour(time.time_ns() // 1_000_000), notes(store).entries)
    body = msgspec.json.format(msgspec.json.encode(judged), indent=1)
    return [
        publish.report(store, "monthly", name, "report", "json", body),
        publish.report(store, "monthly", name, "report", "pdf", pdf.render(judged)),
    ]
