"""The monthly executive report as PDF, and its figures as JSON."""

import time

import msgspec

from aggregator import publish
from aggregator.calendar import full_hour, month
from aggregator.commands.weekly import Published, notes, reported
from aggregator.config import AggregatorConfig
from aggregator.judgements import judge
from aggregator.report import pdf
from shared.store import ObjectStore


def run(config: AggregatorConfig, store: ObjectStore, name: str) -> Published:
    """Publish the month's report. Raises NothingToPublish for one without telemetry."""
    span = month(name, config.timezone)
    window = reported(store, span, [node.id for node in config.nodes])
    judged = judge(window, None, config, full_hour(time.time_ns() // 1_000_000), notes(store).entries)
    body = msgspec.json.format(msgspec.json.encode(judged), indent=1)
    published = [
        publish.report(store, "monthly", span.name, "report", extension, content)
        for extension, content in (("json", body), ("pdf", pdf.render(judged)))
    ]
    return Published(published, judged.so_far)
