"""The monthly executive report as PDF, and its figures as JSON."""

import time

import msgspec

from aggregator import load, publish
from aggregator.calendar import full_hour, month, month_before
from aggregator.commands.weekly import Published, notes, reported
from aggregator.config import AggregatorConfig
from aggregator.judgements import judge
from aggregator.report import pdf
from shared.store import ObjectStore


def run(config: AggregatorConfig, store: ObjectStore, name: str) -> Published:
    """Publish the month's report, compared with the month before. Raises NothingToPublish for one without telemetry."""
    span, nodes = month(name, config.timezone), [node.id for node in config.nodes]
    window = reported(store, span, nodes)
    last = load.window(store, month_before(span), nodes)
    now_ms = full_hour(time.time_ns() // 1_000_000)
    judged = judge(window, last, config, now_ms, notes(store), load.newest_manifest(store))
    body = msgspec.json.format(msgspec.json.encode(judged), indent=1)
    published = [
        publish.report(store, "monthly", span.name, "report", extension, content)
        for extension, content in (("json", body), ("pdf", pdf.render(judged, config.report.fallback_font)))
    ]
    return Published(published, judged.so_far)
