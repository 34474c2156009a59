"""What was asked of the rack: requests, tokens and latencies by model and day. Pure."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from aggregator.calendar import days, local
from aggregator.window import Latency, ServedSum, Window, at_least_one, both
from shared.sketch import Sketch

LEAST_GAPS = 20
"""The p95 of fewer values is their highest one."""


class ModelVolume(msgspec.Struct, frozen=True, kw_only=True):
    """One served name. Latencies in microseconds, within 1.1 %."""

    model: str
    requests: int
    prompt_tok: int
    cached_tok: int
    completion_tok: int
    ttft_p50_us: float | None
    ttft_p95_us: float | None
    itl_p95_us: float | None


class Day(msgspec.Struct, frozen=True, kw_only=True):
    """Answered requests and tokens of one day in the rack's zone. ``reported`` is False for a day without telemetry,
    which is not one without work; a day that is still to come is none."""

    date: str
    requests: int
    tokens: int
    reported: bool = True


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of the rack. ``requests`` and tokens are those that it answered, ``elsewhere`` requests that
    another place answered; failed, refused and cancelled ones are counted wherever they were sent."""

    requests: int
    elsewhere: int = 0
    failed: int
    refused: int
    cancelled: int
    prompt_tok: int
    completion_tok: int
    models: tuple[ModelVolume, ...]
    days: tuple[Day, ...]
    itl_p95_us: float | None


def volume(window: Window, until_ms: int) -> Volume:
    """The answered, failed, refused and cancelled requests of a span that is judged up to ``until_ms``."""
    ok = [s for s in window.served if s.outcome == "ok"]
    asked = window.requests
    outcomes = {o: sum(s.requests for s in asked if s.outcome == o) for o in ("failed", "refused", "cancelled")}
    times = answered(window)
    return Volume(
        requests=sum(s.requests for s in ok),
        elsewhere=sum(s.requests for s in window.elsewhere if s.outcome == "ok"),
        **outcomes,
        prompt_tok=sum(s.prompt_tok for s in ok),
        completion_tok=sum(s.completion_tok for s in ok),
        models=tuple(_model(name, ok, times) for name in sorted({s.model for s in ok})),
        days=tuple(_days(window, until_ms)),
        itl_p95_us=itl_p95_us(window)[0],
    )


def itl_p95_us(window: Window) -> tuple[float | None, int]:
    """The rack's p95 between tokens in microseconds, and how many values it is one of; None for fewer than
    LEAST_GAPS."""
    gaps = merged(answered(window), "itl_us")
    return (gaps.quantile(0.95) if gaps.count >= LEAST_GAPS else None), gaps.count


def _model(name: str, ok: Sequence[ServedSum], times: Sequence[Latency]) -> ModelVolume:
    mine = [s for s in ok if s.model == name]
    slow = [one for one in times if one.model == name]
    ttft = merged(slow, "ttft_us")
    return ModelVolume(
        model=name,
        requests=sum(s.requests for s in mine),
        prompt_tok=sum(s.prompt_tok for s in mine),
        cached_tok=sum(s.cached_tok for s in mine),
        completion_tok=sum(s.completion_tok for s in mine),
        ttft_p50_us=ttft.quantile(0.5),
        ttft_p95_us=ttft.quantile(0.95),
        itl_p95_us=merged(slow, "itl_us").quantile(0.95),
    )


def answered(window: Window) -> list[Latency]:
    """Times of answered requests."""
    return [one for one in window.latencies if one.outcome == "ok"]


def merged(times: Sequence[Latency], name: Literal["ttft_us", "itl_us", "total_us"]) -> Sketch:
    """One sketch of all of them."""
    whole = Sketch()
    for one in times:
        whole.merge(one.sketch(name))
    return whole


def _days(window: Window, until_ms: int) -> list[Day]:
    spans = days(window.span)
    sums = {day.name: [0, 0] for day in spans}
    covers = at_least_one(window.reported(node) for node in window.nodes)
    gone = [day for day in spans if day.since_ms < until_ms]
    blank = {day.name for day in gone if not both(covers, ((day.since_ms, day.until_ms),))}
    for asked in window.asked:
        day = local(asked.slot_ms, window.span.timezone).date().isoformat()
        if asked.outcome == "ok" and day in sums:
            sums[day][0] += asked.requests
            sums[day][1] += asked.prompt_tok + asked.completion_tok
    return [
        Day(date=day, requests=requests, tokens=tokens, reported=day not in blank or requests > 0)
        for day, (requests, tokens) in sums.items()
    ]
