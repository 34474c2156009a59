"""Costs that add up, changes decomposed without remainder, and dated, tiered API prices."""

import math
from datetime import UTC, datetime
from decimal import Decimal

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aggregator import api_prices, cost, cost_change
from aggregator.config import AggregatorConfig, Cost
from aggregator.cost_change import Factors
from shared.batch import Batch
from shared.records import OutletReading, Record
from tests.builders import batch, engine, host, resident, served, window

AT = datetime(2026, 11, 1, tzinfo=UTC)


def config(*nodes: str, **more: object) -> AggregatorConfig:
    tree = {
        "rack": "r",
        "store": {"path": "x"},
        "nodes": [{"id": n, "price": 1399.0, "watts": 40.0} for n in nodes],
        **more,
    }
    return msgspec.convert(tree, AggregatorConfig)


@st.composite
def racks(draw: st.DrawFn) -> list[Batch]:
    """Some minutes of two nodes with two loaders each, serving three names and two API keys."""
    made = []
    for minute in range(draw(st.integers(1, 6))):
        for node in ("n1", "n2"):
            records: list[Record] = [
                served(
                    draw(st.sampled_from("abc")),
                    worker=draw(st.sampled_from(("n1", "n2", ""))),
                    version=draw(st.sampled_from(("v1", "v2"))),
                    requests=draw(st.integers(0, 9)),
                    key_id=draw(st.sampled_from(("", "k"))),
                    task_class=draw(st.sampled_from(("", "ROUTINE"))),
                    cached_tok=draw(st.integers(0, 50)),
                ),
                engine("a", version="v1", busy_s=draw(st.integers(0, 59))),
                engine("b", version="v2", busy_s=draw(st.integers(0, 59))),
            ]
            pinned = msgspec.structs.replace(resident("a"), pinned=draw(st.booleans()))
            made.append(batch([*records, pinned, resident("b", version="v2"), host()], node=node, minute=minute))
    return made


@settings(max_examples=60, deadline=None)
@given(racks(), st.sampled_from((("n1",), ("n1", "n2"))))
def test_every_row_adds_up_to_the_cent(made: list[Batch], priced: tuple[str, ...]) -> None:
    report = cost.compute(window(*made), config(*priced))
    assert report.total is not None
    for node in report.nodes:
        mine = sum((r.cost for r in report.rows if r.node == node.node), Decimal(0))
        assert mine == (node.cost or 0)
    assert report.total == sum((r.cost for r in report.rows), Decimal(0))
    direct = sum((m.direct or Decimal(0) for m in report.models), Decimal(0))
    loaded = sum((m.loaded or Decimal(0) for m in report.models), Decimal(0))
    assert direct == sum((r.cost for r in report.rows if r.kind == "model"), Decimal(0))
    assert direct <= loaded <= report.total
    keyed = sum((k.cost or Decimal(0) for k in report.keys), Decimal(0))
    assert keyed <= loaded
    if all(m.prompt_tok - m.cached_tok + m.completion_tok for m in report.models if m.loaded):
        assert keyed == loaded
    records = [r for b in made for r in b.records]
    assert sum(k.requests for k in report.keys) == sum(getattr(r, "requests", 0) for r in records)


def test_pinned_models_pay_for_idle_time_by_the_memory_they_hold() -> None:
    pinned = msgspec.structs.replace(resident("a", need=3 * 10**9), pinned=True)
    made = window(
        batch(
            [
                served("a"),
                served("b", version="v2"),
                engine("a", busy_s=3),
                engine("b", version="v2", busy_s=3),
                pinned,
                resident("b", version="v2", need=10**9),
            ]
        )
    )
    a, b = cost.compute(made, config("n1")).models
    assert a.loaded is not None
    assert b.loaded is not None
    assert a.direct is not None
    assert b.direct is not None
    assert abs((a.loaded - a.direct) - 3 * (b.loaded - b.direct)) < Decimal("0.00001")


def test_outlet_power_is_used_and_shared_by_two_nodes() -> None:
    outlet = OutletReading(
        meter="pdu", nodes=("n1", "n2"), power_mw=0, power_max_mw=0, energy_mj=60 * 90_000, covered_us=60_000_000
    )
    made = window(batch([outlet, host()]), batch([host()], node="n2"))
    for node in ("n1", "n2"):
        assert cost.measured_watts(made, node) == (Decimal(45), "outlet")
    assert cost.measured_watts(window(batch()), "n1") == (None, "configured")


amounts = st.floats(0.001, 1e4)
factors = st.builds(
    Factors,
    tokens=st.just(1),
    requests=st.integers(1, 10**5),
    loaded=amounts,
    direct=amounts,
    prefill_s=st.floats(0, 1e5),
    decode_s=amounts,
    busy_s=st.just(0.0),
    prompt_tok=st.integers(1, 10**8),
    cached_tok=st.integers(0, 10**8),
    completion_tok=st.integers(1, 10**7),
    cut_share=st.floats(0, 1),
    throttled_share=st.floats(0, 1),
).map(
    lambda f: msgspec.structs.replace(
        f,
        tokens=f.prompt_tok + f.completion_tok,
        busy_s=f.prefill_s + f.decode_s,
        cached_tok=min(f.cached_tok, f.prompt_tok - 1),
        loaded=f.loaded + f.direct,
    )
)


@given(factors, factors)
@example(  # a replaced zero, times an absurd price of a busy second, was no longer negligible
    Factors(
        tokens=850_077,
        requests=1,
        loaded=2.0,
        direct=1.0,
        prefill_s=0.0,
        decode_s=1.0,
        busy_s=1.0,
        prompt_tok=1,
        cached_tok=0,
        completion_tok=850_076,
        cut_share=1.0,
        throttled_share=1.0,
    ),
    Factors(
        tokens=1_050_010,
        requests=100_000,
        loaded=4.0,
        direct=1.0,
        prefill_s=0.0,
        decode_s=0.001,
        busy_s=0.001,
        prompt_tok=1_019_996,
        cached_tok=0,
        completion_tok=30_014,
        cut_share=1.0,
        throttled_share=1.0,
    ),
)
def test_a_cost_change_is_decomposed_without_remainder(now: Factors, before: Factors) -> None:
    terms = cost_change.decompose(now, before)
    whole = now.per_m - before.per_m
    assert math.isclose(terms.total, whole, rel_tol=1e-6, abs_tol=1e-6 * max(now.per_m, before.per_m))


def test_each_component_is_moved_by_its_own_cause_alone() -> None:
    base = Factors(
        tokens=1_100_000,
        requests=1000,
        loaded=4.0,
        direct=2.0,
        prefill_s=500.0,
        decode_s=1500.0,
        busy_s=2000.0,
        prompt_tok=1_000_000,
        cached_tok=500_000,
        completion_tok=100_000,
        cut_share=0.05,
        throttled_share=0.0,
    )
    cases = {
        "rate": {"direct": 4.0, "loaded": 8.0},
        "utilisation": {"loaded": 8.0},
        "decode": {"decode_s": 3000.0, "busy_s": 3500.0, "direct": 3.5, "loaded": 7.0},
        "prefill": {"prefill_s": 2500.0, "busy_s": 4000.0, "direct": 4.0, "loaded": 8.0},
        "cache": {"cached_tok": 0, "prefill_s": 1000.0, "busy_s": 2500.0, "direct": 2.5, "loaded": 5.0},
    }
    for name, changes in cases.items():
        terms = msgspec.structs.asdict(cost_change.decompose(msgspec.structs.replace(base, **changes), base))
        assert max(terms, key=lambda t: abs(terms[t])) == name
        others = sum(abs(value) for term, value in terms.items() if term != name)
        assert others < 1e-6 * abs(terms[name]), (name, terms)


def test_a_small_volume_is_never_flagged() -> None:
    before = Factors(
        tokens=1000,
        requests=9,
        loaded=1.0,
        direct=0.5,
        prefill_s=1.0,
        decode_s=1.0,
        busy_s=2.0,
        prompt_tok=900,
        cached_tok=0,
        completion_tok=100,
        cut_share=0.0,
        throttled_share=0.0,
    )
    change = cost_change.judge(msgspec.structs.replace(before, loaded=9.0), before, Cost())
    assert change is not None
    assert (change.flagged, change.cause) == (False, "low_volume")
    assert "too few to judge" in change.text


# APIs


def test_prices_have_tiers_and_a_month_is_not_one_request() -> None:
    """Prompts over 200,000 tokens cost more per token at this provider: a thousand small ones are not a large one."""
    one = {"provider": "anthropic", "model": "claude-sonnet-4-5", "cached_tok": 0, "at": AT}
    many = api_prices.price(requests=1000, prompt_tok=10**6, completion_tok=10**6, **one)  # type: ignore[arg-type]
    single = api_prices.price(requests=1, prompt_tok=10**6, completion_tok=10**6, **one)  # type: ignore[arg-type]
    assert many == Decimal("18.00")
    assert single is not None
    assert many is not None
    assert single > many


def test_the_same_open_model_at_the_median_host() -> None:
    made = window(batch([served("chat", requests=1000, prompt_tok=10**6, completion_tok=10**5), engine("chat")]))
    priced = config("n1", compare=[{"model": "chat", "same_as": "llama-3.3-70b-instruct", "frontier": "openai/gpt-4o"}])
    money = cost.compute(made, priced)
    found = api_prices.compare(made, money, priced, AT)
    (one,) = found.models
    assert len(one.hosts) >= 5
    assert one.lowest is not None
    assert one.median is not None
    assert one.highest is not None
    assert one.lowest < one.median < one.highest
    assert one.frontier_cost == Decimal("3.5"), "2.50 and 10 for a million tokens"
    assert found.covered == 1.0
    assert one.saving == one.median - (one.ours or 0)


def test_a_model_no_host_offers_is_unknown_and_not_counted() -> None:
    made = window(batch([served("a", requests=9), served("b", requests=1, version="v2"), engine("a")]))
    priced = config(
        "n1",
        compare=[{"model": "a", "same_as": "no-such-model-7b"}],
        api_prices=[{"model": "b", "name": "hosted", "input_per_m": 0.01, "output_per_m": 0.02}],
    )
    found = api_prices.compare(made, cost.compute(made, priced), priced, AT)
    a, b = found.models
    assert (a.median, a.saving) == (None, None)
    assert "has no price for any host of no-such-model-7b" in a.why_not
    assert b.median == Decimal("0.000001"), "100 prompt tokens and 10 of an answer"
    assert found.covered is not None
    assert found.covered == 0.0, "b's loader cost nothing here, so nothing is compared"


def test_a_host_counts_once_and_work_of_unpriced_nodes_is_left_out() -> None:
    wish = [{"model": "chat", "same_as": "llama-3.1-8b-instruct", "frontier": "openai/gpt-4o"}]
    made = window(
        batch([served("chat", requests=500, prompt_tok=10**6, completion_tok=10**5), engine("chat")]),
        batch(
            [served("chat", worker="n2", requests=500, prompt_tok=10**6, completion_tok=10**5), engine("chat")],
            node="n2",
        ),
    )
    both, one = (
        api_prices.compare(made, cost.compute(made, c), c, AT).models[0]
        for c in (config("n1", "n2", compare=wish), config("n1", compare=wish))
    )
    companies = [api_prices.company(host.provider) for host in both.hosts]
    assert len(set(companies)) == len(companies)
    assert both.times_cheaper == pytest.approx(one.times_cheaper)
    assert one.median is not None
    assert both.median == 2 * one.median
    euros = config("n1", compare=wish, cost={"currency": "EUR"})
    assert "cost.usd_rate" in api_prices.compare(made, cost.compute(made, euros), euros, AT).models[0].why_not
    halves = config("n1", compare=wish, cost={"currency": "EUR", "usd_rate": 0.5})
    half = api_prices.compare(made, cost.compute(made, halves), halves, AT).models[0].median
    assert half is not None
    assert abs(half * 2 - one.median) < Decimal("0.00001")


def test_a_negative_saving_is_shown() -> None:
    made = window(batch([engine(), served()]))
    priced = config("n1", api_prices=[{"model": "m", "name": "x", "input_per_m": 0.01, "output_per_m": 0.02}])
    (one,) = api_prices.compare(made, cost.compute(made, priced), priced, AT).models
    assert one.saving is not None
    assert one.saving < 0
