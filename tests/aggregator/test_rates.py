"""Rates for budgets of money: the costs of the usage report, per token, for the nodes."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import cost
from aggregator.calendar import DAY_MS, week
from aggregator.commands import rates as command
from aggregator.config import AggregatorConfig, Cost
from aggregator.judgements import Judged, judge
from shared import rates
from shared.errors import AccessDenied, Refused
from shared.keys import RATES
from shared.rates import ModelRate, Rates
from shared.records import EngineWindow, Record
from shared.store_dir import DirectoryStore
from tests.builders import T0, batch, host, served, window


def config(**cost_: Any) -> AggregatorConfig:
    tree = {"rack": "r", "store": {"path": "x"}, "nodes": [{"id": "n1", "price": 1399.0, "watts": 40.0}], "cost": cost_}
    return msgspec.convert(tree, AggregatorConfig)


def judged(prefill_s: int = 8, decode_s: int = 30, cached_tok: int = 40, span: str = "2026-W47") -> Judged:
    worked = EngineWindow(model="a", version="v1", busy_prefill_us=prefill_s * 10**6, busy_decode_us=decode_s * 10**6)
    records: list[Record] = [
        served("a", key_id="k", requests=30, cached_tok=cached_tok),
        served("a", key_id="j", requests=10, outcome="cancelled"),
        *(worked, host()),
    ]
    seen = window(batch(records), span=week(span, "UTC"))
    return judge(seen, None, config(), T0 + 30 * DAY_MS)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 25), st.integers(1, 30), st.integers(0, 3000))
def test_tokens_times_rates_are_the_costs_of_the_usage_report(prefill_s: int, decode_s: int, cached: int) -> None:
    report = judged(prefill_s, decode_s, cached)
    found = command.of_week(report, Cost())
    assert found is not None
    rate = found.models["a"]
    for key in report.cost.keys:
        assert key.cost is not None
        computed = (key.prompt_tok - key.cached_tok) * rate.usd_per_mtok_in + key.completion_tok * rate.usd_per_mtok_out
        assert abs(computed / 1_000_000 - key.cost) <= Decimal("0.000002")


def test_rates_are_in_dollars_or_there_are_none() -> None:
    dollars = command.of_week(judged(), Cost())
    euros = command.of_week(judged(), Cost(currency="EUR", usd_rate=0.5))
    assert dollars is not None
    assert euros is not None
    assert abs(euros.models["a"].usd_per_mtok_out - 2 * dollars.models["a"].usd_per_mtok_out) < Decimal("0.00001")
    assert command.of_week(judged(), Cost(currency="EUR")) is None
    unpriced = judge(window(batch([served("a"), host()])), None, config(), T0 + DAY_MS)
    assert command.of_week(msgspec.structs.replace(unpriced, cost=cost.compute(window(), config())), Cost()) is None


def week_of(period: str, so_far: bool = False, rack: str = "r") -> Rates:
    one = ModelRate(usd_per_mtok_in=Decimal(1), usd_per_mtok_out=Decimal(2))
    return Rates(rack=rack, period=period, so_far=so_far, models={"a": one})


@pytest.mark.parametrize(
    ("new", "old", "replaces"),
    [
        (week_of("2026-W47"), None, True),
        (week_of("2026-W47"), week_of("2026-W46"), True),
        (week_of("2026-W47"), week_of("2026-W47"), True),
        (week_of("2026-W01"), week_of("2025-W52"), True),
        (week_of("2026-W46"), week_of("2026-W47"), False),
        (week_of("2026-W48", so_far=True), week_of("2026-W47"), False),
        (week_of("2026-W48", so_far=True), None, True),
        (week_of("2026-W48", so_far=True), week_of("2026-W48", so_far=True), True),
        (week_of("2026-W47"), week_of("2026-W48", so_far=True), True),
        (week_of("2026-W46"), week_of("2026-W47", rack="renamed"), True),
    ],
)
def test_a_later_week_replaces_an_earlier_and_a_whole_one_a_part(new: Rates, old: Rates | None, replaces: bool) -> None:
    assert command.replaces(new, old) is replaces


def test_a_report_that_is_made_again_keeps_the_newer_rates(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    assert command.renew(store, judged(), Cost()) == RATES
    written = store.get(RATES, 1 << 20)
    assert rates.parse(written.body).period == "2026-W47"
    assert command.renew(store, judged(), Cost()) == "", "equal rates are not written again"
    store.put(RATES, rates.encode(week_of("2026-W50")))
    assert command.renew(store, judged(), Cost()) == ""
    assert rates.parse(store.get(RATES, 1 << 20).body).period == "2026-W50"
    store.put(RATES, b"not JSON")
    assert command.renew(store, judged(), Cost()) == RATES, "what cannot be read is replaced"


def test_a_bucket_that_refuses_rates_does_not_cost_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path)

    def denied(*_: object) -> None:
        raise AccessDenied("write: denied")

    monkeypatch.setattr(store, "put_if_absent", denied)
    assert command.renew(store, judged(), Cost()) == ""


GOOD = rates.encode(week_of("2026-W47"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        GOOD.replace(b'"schema": 1', b'"schema": 2'),
        GOOD.replace(b'"1"', b'"-1"'),
        GOOD.replace(b'"1"', b'"NaN"'),
        GOOD.replace(b'"1"', b'"Infinity"'),
        GOOD.replace(b'"1"', b'"1E+400000"'),
        GOOD.replace(b'"1"', b'"1000001"'),
        GOOD.replace(b'"1"', b"true"),
        GOOD.replace(b'"a"', b'"../a"'),
        GOOD.replace(b'"rack"', b'"rick"'),
    ],
)
def test_what_is_no_rate_is_refused(body: bytes) -> None:
    assert rates.parse(GOOD).models["a"].usd_per_mtok_out == 2
    with pytest.raises(Refused):
        rates.parse(body)
