"""Heat: a node at its limit is named, advice is in degrees, and a share is one of enough time."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import cost, heat, load, placement, scorecard
from aggregator.calendar import week
from aggregator.commands import rollup
from aggregator.config import AggregatorConfig, Node, Scorecard
from aggregator.cost_change import Factors
from aggregator.cost_change import judge as price_change
from aggregator.judgements import judge
from aggregator.report import pdf
from aggregator.window import Window
from shared.batch import Batch
from shared.bucket import Store
from shared.records import HostSample, Record
from shared.store_dir import DirectoryStore
from tests.aggregator.test_rollup import put
from tests.builders import MINUTE, T0, batch, engine, host, pdf_text, resident, served, uptime_of, window

CONFIG = AggregatorConfig(rack="r", store=Store(path="b"))


def sample(
    throttled: float = 0.0,
    peak_c: float | None = None,
    mean_c: float | None = None,
    *,
    gpu_c: int | None = None,
    pcore_c: int | None = None,
) -> HostSample:
    """A minute whose thermal level is known."""
    return HostSample(
        thermal_known_us=60_000_000,
        throttled_us=round(throttled * 60_000_000),
        package_temp_mc=None if peak_c is None else round(peak_c * 1000),
        package_temp_mean_mc=None if mean_c is None else round(mean_c * 1000),
        gpu_temp_mc=None if gpu_c is None else gpu_c * 1000,
        pcore_temp_mc=None if pcore_c is None else pcore_c * 1000,
    )


def rack(**nodes: HostSample) -> Window:
    """Five minutes of each node."""
    return window(*(batch([one], node=name, minute=n) for name, one in nodes.items() for n in range(5)))


def advice(one: HostSample) -> heat.NodeHeat:
    (found,) = heat.thermal(rack(a=one)).nodes
    return found


# what a node needs


@pytest.mark.parametrize(
    ("one", "fix", "cooler_c"),
    [
        (sample(0.0, 61.5), "", None),
        (sample(0.0, 94.999), "", None),
        (sample(0.0, 95.0), "intake", 1),
        (sample(0.0, 96.0), "intake", 1),
        (sample(0.0, 96.001), "intake", 2),
        (sample(0.0, 105.0), "intake", 10),
        (sample(0.0, 105.001), "air", None),
        (sample(0.0, 110.0), "air", None),
        (sample(0.02, 98.0), "intake", 3),
        (sample(0.02, 88.0), "air", None),  # throttled, and not hot: not the room
        (sample(0.02), "air", None),
        (sample(0.01, 70.0), "", None),
        (sample(), "", None),
        (sample(0.0, 60.0, gpu_c=99), "intake", 4),
        (sample(0.0, None, pcore_c=97), "intake", 2),
    ],
)
def test_advice_is_in_degrees_of_intake_air(one: HostSample, fix: str, cooler_c: int | None) -> None:
    found = advice(one)
    assert (found.fix, found.cooler_c) == (fix, cooler_c)
    assert bool(found.advice) == bool(fix)
    if cooler_c is not None:
        assert found.advice.startswith(f"intake air cooler by {cooler_c} °C")
    if fix:
        assert "no ambient sensor: fit one" in found.advice


def test_every_node_at_its_limit_is_named_beside_those_that_were_throttled() -> None:
    seen = rack(a=sample(0.02, 96.0), b=sample(0.0, 110.0), c=sample(0.0, 95.0), d=sample(0.0, 94.0))
    found = heat.thermal(seen)
    assert found.kind == "throttled"
    assert found.advice == (
        "Make the intake air cooler: a by 1 °C or more, c by 1 °C. First give more air, then look for dust and another "
        "place: b. No ambient sensor: fit one at b, a, c."
    )
    assert found.because == (
        "Throttled by heat for more than 1 % of the time: a 2.0 %. At 95 °C or more: b 110.0 °C, a 96.0 °C, c 95.0 °C."
    )
    text = " ".join(pdf_text(pdf.render(judge(seen, None, CONFIG, T0 + 5 * MINUTE))).split())
    assert "b 110.0 °C" in text
    assert "intake air cooler by 1 °C or more" in text


def test_a_rack_that_is_hot_all_over_is_counted_and_listed() -> None:
    seen = rack(**{f"n{n:02}": sample(0.02, 96.0) for n in range(50)})
    found = heat.thermal(seen)
    assert "n07 2.0 % and 42 more." in found.because
    assert all(one.advice for one in found.nodes)
    text = pdf_text(pdf.render(judge(seen, None, CONFIG, T0 + 5 * MINUTE)))
    assert all(f"n{n:02}" in text for n in range(50))
    assert "…" not in text


def test_hot_nodes_are_advised_of_also_where_none_was_throttled() -> None:
    found = judge(rack(a=sample(0.0, 97.0)), None, CONFIG, T0 + 5 * MINUTE)
    (one,) = (r for r in found.recommendations if "intake" in r.text)
    assert (one.kind, one.because) == ("operations", "At 95 °C or more: a 97.0 °C.")


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (sample(0.005, 61.5), "no node came to 95 °C and heat throttled none for more than 1 % of its time"),
        (sample(0.005), "heat throttled none for more than 1 % of its time"),
        (HostSample(package_temp_mc=61_500), "no node came to 95 °C"),
    ],
)
def test_nothing_to_change_says_no_more_than_is_known(one: HostSample, text: str) -> None:
    assert heat.thermal(rack(a=one)).advice == f"Nothing to change: {text}."


def test_without_a_reading_there_is_no_verdict() -> None:
    for seen in (rack(a=HostSample()), window(), window(batch([sample(0.5)]))):
        found = heat.thermal(seen)
        assert found.kind == "unknown"
        assert found.advice == "No data: no node told a temperature, or a thermal level for 300 s."


@given(st.integers(20_000, 130_000), st.booleans())
def test_degrees_follow_the_peak(peak_mc: int, too_long: bool) -> None:
    fix, cooler_c = heat.needed(peak_mc, too_long=too_long)
    assert (fix != "") == (too_long or peak_mc >= heat.HOT_MC)
    if cooler_c is not None:
        assert 1 <= cooler_c <= heat.COOLER_C
        assert peak_mc - 1000 * cooler_c <= heat.HOT_MC < peak_mc - 1000 * (cooler_c - 1) + (peak_mc == heat.HOT_MC)


# the air of the room


def minutes_of(*each: tuple[float, float | None]) -> list[Batch]:
    """Minutes of (busy seconds, mean temperature of the package), each at a peak of 97 degrees."""
    return [
        batch([sample(0.0, 97.0, mean_c), engine(busy_s=busy_s)], minute=n) for n, (busy_s, mean_c) in enumerate(each)
    ]


@pytest.mark.parametrize(
    ("each", "idle_mc"),
    [
        ([(0.0, 34.0), (0.0, 31.0), (30.0, 29.0)], 31_000),  # 29 was while it worked, not idle
        ([(0.6, 33.0)], 33_000),  # a hundredth of the minute
        ([(0.7, 33.0)], None),
        ([(30.0, 60.0)], None),
        ([(0.0, None)], None),
    ],
)
def test_the_coolest_idle_window_bounds_the_intake_air(
    each: list[tuple[float, float | None]], idle_mc: int | None, tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path)
    put(store, *minutes_of(*each))
    rollup.run(CONFIG, store)
    for seen in (window(*minutes_of(*each)), load.window(store, week("2026-W47", "UTC"))):
        (one,) = heat.thermal(seen).nodes
        assert one.intake_mc == idle_mc
        assert ("fit one" in one.advice) == (idle_mc is None)
        if idle_mc is not None:
            assert f"{idle_mc / 1000:.1f} °C, is an upper bound of the intake air then" in one.advice


# figures beside their limits


@pytest.mark.parametrize(
    ("value", "limit", "said"),
    [
        (0.0104, 0.01, "1.04%"),
        (0.010004, 0.01, "1.0004%"),
        (0.00996, 0.01, "0.996%"),
        (0.0123, 0.01, "1.2%"),
        (0.01, 0.01, "1.0%"),
        (0.0, 0.01, "0.0%"),
        (1.0, 0.05, "100.0%"),
    ],
)
def test_a_share_never_contradicts_its_limit(value: float, limit: float, said: str) -> None:
    assert heat.percent_beside(value, limit) == said


@given(st.integers(0, 1_000_000), st.sampled_from((0.01, 0.03, 0.05, 0.0333)))
def test_a_share_as_shown_is_on_the_side_of_its_limit(millionths: int, limit: float) -> None:
    value = millionths / 1_000_000
    shown = float(heat.percent_beside(value, limit).removesuffix("%")) / 100
    if abs(value - limit) > 1e-9:
        assert (shown > limit + 1e-12) == (value > limit)
        assert (shown < limit - 1e-12) == (value < limit)
    assert shown == pytest.approx(value, abs=0.0005001)


def test_the_scorecard_shows_no_kept_figure_as_missed() -> None:
    busy = [batch([sample(0.010004), engine(busy_s=60.0)], minute=n) for n in range(5)]
    (line,) = (one for one in lines(window(*busy)) if one.kind == "heat")
    assert (line.kept, line.text) == (False, "1.0004% of the time in which models worked")


# enough time for a share


def lines(seen: Window) -> tuple[scorecard.Line, ...]:
    return scorecard.lines(seen, uptime_of(seen, T0), None, Scorecard())


@pytest.mark.parametrize(("count", "share"), [(1, None), (4, None), (5, 4 / 60)])
def test_one_hot_window_is_no_share_of_a_month(count: int, share: float | None) -> None:
    seen = window(*(batch([sample(4 / 60)], minute=n) for n in range(count)))
    assert heat.share(seen, "n1") == (None if share is None else pytest.approx(share))
    assert heat.thermal(seen).kind == ("unknown" if share is None else "throttled")
    assert judge(seen, None, CONFIG, T0 + 9 * MINUTE).distribution.nodes[0].throttled_share == heat.share(seen, "n1")


@pytest.mark.parametrize(
    ("busy_s", "models", "value", "text"),
    [
        (10.0, 1, None, "no data: models worked for 50 s, a share needs 300 s"),
        (0.0, 1, None, "no data"),
        (60.0, 1, 0.05, "5.00% of the time in which models worked"),
        (60.0, 2, 0.05, "5.00% of the time in which models worked"),  # a minute has no 120 s
        (40.0, 2, 0.05, "5.00% of the time in which models worked"),
    ],
)
def test_the_promise_needs_time_in_which_models_worked(
    busy_s: float, models: int, value: float | None, text: str
) -> None:
    records: list[Record] = [sample(0.05), *(engine(f"m{n}", version=f"v{n}", busy_s=busy_s) for n in range(models))]
    seen = window(*(batch(records, minute=n) for n in range(5)))
    (line,) = (one for one in lines(seen) if one.kind == "heat")
    assert (line.value, line.text) == (None if value is None else pytest.approx(value), text)
    assert line.kept == (None if value is None else False)
    (node,) = judge(seen, None, CONFIG, T0 + 5 * MINUTE).distribution.nodes
    assert node.busy_share is not None
    assert node.busy_share <= 1.0


@pytest.mark.parametrize(("answers", "kept"), [(1, None), (19, None), (20, True)])
def test_a_p95_is_one_of_twenty(answers: int, kept: bool | None) -> None:
    (line,) = (one for one in lines(window(batch([served(requests=answers)]))) if one.kind == "latency")
    assert line.kept is kept
    assert (line.text == f"no data: of {answers}, a p95 needs 20") == (kept is None)


def factors(throttled: float | None, slower: float = 1.0, **more: float) -> Factors:
    figures = {"cut_share": 0.0, "requests": 100, "completion_tok": 500_000, **more}
    return Factors(
        tokens=1_000_000,
        loaded=slower,
        direct=slower,
        prefill_s=10.0,
        decode_s=90.0 * slower,
        busy_s=10.0 + 90.0 * slower,
        prompt_tok=500_000,
        cached_tok=0,
        throttled_share=throttled,
        **figures,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("now", "before", "cause"), [(0.2, 0.0, "throttling"), (0.2, None, "decode"), (None, 0.0, "decode")]
)
def test_heat_that_is_not_known_explains_no_price(now: float | None, before: float | None, cause: str) -> None:
    change = price_change(factors(now, slower=3.0), factors(before), CONFIG.cost)
    assert change is not None
    assert change.cause == cause


@pytest.mark.parametrize(("count", "known"), [(4, False), (5, True)])
def test_a_model_whose_nodes_heat_is_not_known_has_none(count: int, known: bool) -> None:
    nodes = (Node(id="n1", price=1399.0, watts=40.0),)
    seen = window(*(batch([served(), engine(), sample(0.5)], minute=n) for n in range(count)))
    (model,) = cost.compute(seen, msgspec.structs.replace(CONFIG, nodes=nodes)).models
    assert model.factors is not None
    assert model.factors.throttled_share == (0.5 if known else None)


@pytest.mark.parametrize(("requests", "poisoned"), [(19, False), (20, True)])
def test_few_requests_prove_no_poisoned_cache(requests: int, poisoned: bool) -> None:
    change = price_change(
        factors(0.0, slower=3.0, cut_share=0.5, requests=requests, completion_tok=900_000),
        factors(0.0, requests=requests, completion_tok=500_000),
        CONFIG.cost,
    )
    assert change is not None
    assert (change.cause == "poisoned_kv") == poisoned


@pytest.mark.parametrize(("requests", "settings"), [(19, 0), (20, 1)])
def test_a_hit_rate_of_few_requests_changes_no_setting(requests: int, settings: int) -> None:
    records: list[Record] = [served(requests=requests, prompt_tok=9_000 * requests, cached_tok=0), resident(), host()]
    assert len(placement.propose(window(batch(records))).settings) == settings
