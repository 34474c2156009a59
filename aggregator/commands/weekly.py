"""The weekly reports, each as JSON for programs, Markdown for chats and tickets, and HTML for display."""

import time
from collections.abc import Iterable

import msgspec

from aggregator import annotations, cost, focus, load, publish
from aggregator.annotations import Notes
from aggregator.calendar import Span, before, days, full_hour, is_week, local, utc_day_ms, week
from aggregator.commands import rates
from aggregator.commands.ended import NothingToPublish
from aggregator.config import AggregatorConfig
from aggregator.judgements import Judged, judge
from aggregator.report import html, markdown, wording
from aggregator.report.page import Page, so_far
from aggregator.report.pages import cost as cost_page
from aggregator.report.pages import evictions as evictions_page
from aggregator.report.pages import placement as placement_page
from aggregator.report.pages import scorecard as scorecard_page
from aggregator.report.pages import uptime as uptime_page
from aggregator.report.pages import usage as usage_page
from aggregator.window import Window
from shared import keys
from shared.logs import get_logger
from shared.store import ObjectStore, find

log = get_logger("aggregator.weekly")


class Published(list[str]):
    """Keys of what was published. ``so_far`` says how far a span that is not over was judged, "" if it is over."""

    def __init__(self, keys_: Iterable[str], so_far: str) -> None:
        super().__init__(keys_)
        self.so_far = so_far


def run(config: AggregatorConfig, store: ObjectStore, name: str) -> Published:
    """Publish the week's reports; returns their keys."""
    span = week(name, config.timezone)
    return publish_span(config, store, span, before(span))


def publish_span(config: AggregatorConfig, store: ObjectStore, span: Span, earlier: Span) -> Published:
    """Publish the reports of any span, compared with an earlier one; those of a week also tell the nodes what tokens
    cost. Raises NothingToPublish for one without telemetry."""
    nodes = [node.id for node in config.nodes]
    window = reported(store, span, nodes)
    last = load.window(store, earlier, nodes)
    now_ms = full_hour(time.time_ns() // 1_000_000)
    judged = judge(window, last, config, now_ms, notes(store), load.newest_manifest(store))
    published = []
    for kind, (report, page) in artifacts(judged, last.span.name).items():
        body = msgspec.json.format(msgspec.json.encode(_marked(report, judged)), indent=1)
        for extension, content in (("json", body), ("md", markdown.render(page)), ("html", html.render(page))):
            published.append(publish.report(store, "weekly", span.name, kind, extension, content))
    daily = [(day, cost.compute(load.window(store, day, nodes), config, now_ms=now_ms).rows) for day in days(span)]
    csv = focus.export(config.rack, span, judged.cost, daily, judged.so_far_until_ms or None)
    published.append(publish.report(store, "weekly", span.name, "focus", "csv", csv))
    csv = usage_page.export(judged.cost, judged.so_far_until_ms or None)
    published.append(publish.report(store, "weekly", span.name, "usage", "csv", csv))
    if is_week(span.name):
        rates.renew(store, judged, config.cost)
    return Published(published, judged.so_far)


def reported(store: ObjectStore, span: Span, nodes: Iterable[str]) -> Window:
    """What nodes reported in a span; ``nodes`` are the configured ones. Raises NothingToPublish if there is nothing: a
    full set of empty reports would look like a rack that stood still."""
    if span.since_ms > time.time_ns() // 1_000_000:
        begin = f"{local(span.since_ms, span.timezone):%Y-%m-%d} ({span.timezone})"
        raise NothingToPublish(f"{span.name} has not begun: it begins on {begin}; nothing was published")
    window = load.window(store, span, nodes)
    if window.batches:
        return window
    known = sorted(load.newest_manifest(store).days)
    new = not any(utc_day_ms(day) < span.until_ms for day in known)
    there = "there is no telemetry yet" if not known else f"the telemetry is from {known[0]} to {known[-1]}"
    raise NothingToPublish(f"no node reported anything in {span.name}; nothing was published ({there})", usual=new)


def _marked(report: object, judged: Judged) -> object:
    """The figures of a span that is not over say so, each row of a list for itself."""
    if not judged.so_far:
        return report
    mark = {"so_far_until_ms": judged.so_far_until_ms}
    plain = msgspec.to_builtins(report)
    return [one | mark for one in plain] if isinstance(plain, list | tuple) else plain | mark


def artifacts(judged: Judged, last: str) -> dict[str, tuple[object, Page]]:
    """Each report by name: its figures, and the page that shows them. ``last`` names the period before."""
    rack, period, place = judged.rack, judged.period, judged.distribution
    said = wording.remarks(judged.telemetry, judged.timezone, last)
    money, apis, evicted, up, score = judged.cost, judged.apis, judged.evictions, judged.uptime, judged.scorecard
    found = {
        "placement": (place, placement_page.page(place, rack)),
        "cost": ({"cost": money, "apis": apis}, cost_page.page(money, apis, rack, last)),
        "evictions": (evicted, evictions_page.page(evicted, rack)),
        "uptime": (
            {**msgspec.to_builtins(up), "telemetry": judged.telemetry},
            uptime_page.page(up, period, judged.timezone, rack, said),
        ),
        "usage": (usage_page.figures(money), usage_page.page(money, rack)),
        "scorecard": (score, scorecard_page.page(score, period, rack)),
    }
    if not judged.so_far:
        return found
    return {name: (report, so_far(page, judged.so_far)) for name, (report, page) in found.items()}


def notes(store: ObjectStore) -> Notes:
    """Incident annotations; what is wrong with the file, or with some of its entries, is logged and told."""
    stored = find(store, annotations.KEY, keys.MOST_NOTES_BYTES)
    found = annotations.read(stored.body) if stored is not None else Notes()
    for reason in found.refused:
        log.warning("annotation_refused", reason=reason)
    return found
