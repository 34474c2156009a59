"""Placement, cost and evictions of a week, each as JSON for programs and Markdown for people."""

import msgspec

from aggregator import cost, eviction, load, placement, publish
from aggregator.config import AggregatorConfig
from aggregator.report import markdown
from aggregator.window import before, week
from shared.store import ObjectStore


def run(config: AggregatorConfig, store: ObjectStore, name: str) -> list[str]:
    """Publish the week's artifacts; returns their keys."""
    span = week(name, config.timezone)
    window, last = load.window(store, span), load.window(store, before(span))
    reports: dict[str, msgspec.Struct] = {
        "placement": placement.propose(window),
        "cost": cost.compute(window, config, cost.compute(last, config) if last.batches else None),
        "evictions": eviction.report(window),
    }
    published = []
    for kind, report in reports.items():
        body = msgspec.json.format(msgspec.json.encode(report), indent=1)
        values = {"report": report, "rack": config.rack, "period": span.name, "before": last.span.name}
        published.append(publish.report(store, "weekly", span.name, kind, "json", body))
        published.append(publish.report(store, "weekly", span.name, kind, "md", markdown.render(kind, **values)))
    return published
