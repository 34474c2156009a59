"""The aggregator's core: sums that add up, verdicts with reasons, and a month without data."""

from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import calendar, cost, eviction, placement
from aggregator.calendar import DAY_MS
from aggregator.config import AggregatorConfig
from aggregator.judgements import judge
from aggregator.report import markdown, pdf
from aggregator.report.pages import evictions as evictions_page
from shared.batch import Batch
from shared.errors import Refused
from shared.records import (
    AgentStarted,
    AgentStopped,
    LoaderExited,
    ModelEvicted,
    ModelLoaded,
    ModelMissed,
    PeerDown,
    PeerUp,
    Record,
    SwapFinished,
    ThrottleEvent,
)
from tests.builders import DAY, MINUTE, T0, batch, engine, host, pdf_text, resident, served, uptime_of, window


def config(*nodes: str, **more: object) -> AggregatorConfig:
    tree = {
        "rack": "r",
        "store": {"path": "x"},
        "nodes": [{"id": n, "price": 1399.0, "watts": 40.0} for n in nodes],
        **more,
    }
    return msgspec.convert(tree, AggregatorConfig)


# windows


def test_a_week_begins_on_monday_in_the_rack_time_zone() -> None:
    span = calendar.week("2026-W47", "Europe/Berlin")
    assert _iso(span.since_ms) == "2026-11-15T23:00"
    assert span.until_ms - span.since_ms == 7 * 86_400_000
    assert calendar.before(span).name == "2026-W46"


def test_a_month_with_a_dst_change_has_its_own_length() -> None:
    span = calendar.month("2026-10", "Europe/Berlin")
    assert span.until_ms - span.since_ms == 31 * 86_400_000 + 3_600_000


@pytest.mark.parametrize("name", ["2026-47", "2026-W60", "W47", "", "2026-W0"])
def test_an_invalid_week_is_rejected(name: str) -> None:
    with pytest.raises(Refused, match="give it as"):
        calendar.week(name, "UTC")


@pytest.mark.parametrize("name", ["2026-13", "2026", "november", "2026-W47"])
def test_an_invalid_month_is_rejected(name: str) -> None:
    with pytest.raises(Refused, match="give it as"):
        calendar.month(name, "UTC")


def test_times_outside_any_possible_telemetry_are_rejected() -> None:
    for t_ms in (0, 10**18, -5):
        with pytest.raises(Refused):
            calendar.utc_day(t_ms)


def _iso(t_ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(t_ms / 1000, UTC).isoformat()[:16]


batches = st.lists(
    st.builds(
        lambda node, minute, requests, model: batch([served(model, requests=requests)], node=node, minute=minute),
        st.sampled_from(("n1", "n2")),
        st.integers(0, 300),
        st.integers(1, 9),
        st.sampled_from(("m", "k")),
    ),
    max_size=12,
    unique_by=lambda b: b.id,
)


# cost


@given(batches, st.lists(st.tuples(st.sampled_from(("n1", "n2")), st.floats(0, 59)), max_size=6))
def test_rows_add_up_to_the_nodes_cost(made: list[Batch], busy: list[tuple[str, float]]) -> None:
    extra = [
        batch([engine(busy_s=seconds), served(worker=node)], node=node, minute=400 + n)
        for n, (node, seconds) in enumerate(busy)
    ]
    report = cost.compute(window(*made, *extra), config("n1", "n2"))
    if report.total is None:
        assert not made
        assert not extra
        return
    assert report.idle is not None
    assert report.unattributed is not None
    direct = sum((m.direct or Decimal(0) for m in report.models), Decimal(0))
    assert report.total == sum((n.cost for n in report.nodes if n.cost is not None), Decimal(0))
    assert report.silent is not None
    assert report.unshared is not None
    loaded = sum((m.loaded or Decimal(0) for m in report.models), Decimal(0))
    assert report.total == report.idle + direct + report.unattributed + report.silent
    assert report.total == loaded + report.unshared + report.unattributed + report.silent
    assert all(n.idle is not None and 0 <= n.idle <= n.cost for n in report.nodes if n.cost is not None)


def test_a_known_hour_costs_what_it_should() -> None:
    """1,399 with 20 % residual over 3 years is 0.04256 an hour; 40 W at 0.15 is 0.006."""
    hour = window(*(batch([engine(busy_s=30), served()], minute=n) for n in range(60)))
    report = cost.compute(hour, config("n1"))
    (node,) = report.nodes
    assert Decimal("0.048558") == node.rate_per_h == node.cost
    assert report.idle is not None
    assert abs(report.idle - Decimal("0.02428")) < Decimal("0.00001")
    (model,) = report.models
    assert report.total == model.loaded
    assert model.loaded_per_m is not None
    assert abs(model.loaded_per_m - Decimal("0.048558") / 6600 * 10**6) < Decimal("0.001")


def test_a_rack_with_prices_for_some_nodes_loses_no_cost() -> None:
    made = window(
        batch([engine(busy_s=20), served("a", worker="n1"), served("b", worker="n2", version="v2")]),
        batch([engine("b", version="v2", busy_s=50)], node="n2"),
    )
    report = cost.compute(made, config("n1"))
    a, b = report.models
    assert report.total == a.loaded
    assert (b.loaded, b.loaded_per_m) == (None, None)
    assert report.average_per_m == a.loaded_per_m


def test_without_a_price_there_is_no_cost() -> None:
    report = cost.compute(window(batch([engine(), served()])), config())
    assert (report.priced, report.total, report.average_per_m) == (False, None, None)
    assert report.models[0].loaded is None
    assert report.models[0].requests == 1


def test_one_loader_behind_two_served_names_is_split_by_tokens() -> None:
    made = window(batch([engine(busy_s=40), served("a", requests=3), served("b", requests=1)]))
    a, b = cost.compute(made, config("n1")).models
    assert (a.busy_s, b.busy_s) == (30.0, 10.0)
    assert a.direct is not None
    assert b.direct is not None
    assert abs(a.direct - 3 * b.direct) < Decimal("0.00001")


# uptime


def test_a_restart_after_a_crash_is_an_incident_and_a_plain_gap_is_unknown() -> None:
    up = [batch(minute=n) for n in (0, 1)]
    back = batch([AgentStarted(t_ms=T0 + 5 * MINUTE, version="0", previous="unclean")], minute=5, seq=1, epoch=2)
    silent = batch(minute=7, seq=2, epoch=2)
    report = uptime_of(window(*up, back, silent), T0 + 8 * MINUTE)
    (node,) = report.nodes
    assert (node.idle_s, node.down_s, node.unknown_s) == (240.0, 180.0, 60.0)
    assert (node.share, node.known_share) == (240 / 420, 420 / 480)
    (incident,) = report.incidents
    assert (incident.start_ms, incident.end_ms) == (T0 + 2 * MINUTE, T0 + 5 * MINUTE)
    assert incident.cause == "crash"


def test_an_orderly_stop_and_a_network_fault_are_distinguished() -> None:
    stopped = [
        batch([AgentStopped(t_ms=T0 + MINUTE, reason="x")]),
        batch([AgentStarted(t_ms=T0 + 5 * MINUTE, version="0", previous="clean")], minute=5, seq=1, epoch=2),
    ]
    (incident,) = uptime_of(window(*stopped), T0 + 6 * MINUTE).incidents
    assert incident.cause == "stopped"
    cut = [
        batch(),
        batch(minute=5),
        batch([PeerDown(t_ms=T0 + 2 * MINUTE, peer="n1", last_seen_ms=T0 + MINUTE)], node="n2", minute=2),
    ]
    found = uptime_of(window(*cut), T0 + 6 * MINUTE).incidents
    assert [i.cause for i in found if i.node == "n1"] == ["network"]


def test_a_node_that_is_still_down_is_an_open_incident() -> None:
    down = PeerDown(t_ms=T0 + 2 * MINUTE, peer="n1", last_seen_ms=T0 + MINUTE)
    made = [batch(), batch([down], node="n2"), batch(node="n2", minute=1)]
    (incident,) = uptime_of(window(*made), T0 + 10 * MINUTE).incidents
    assert (incident.node, incident.end_ms) == ("n1", None)
    back = batch([PeerUp(t_ms=T0 + 3 * MINUTE, peer="n1", down_us=1)], node="n2", minute=2)
    assert not uptime_of(window(*made, back), T0 + 10 * MINUTE).incidents


def test_a_node_down_at_the_start_of_the_month_was_not_up() -> None:
    back = AgentStarted(t_ms=T0 + 60 * MINUTE, version="0", previous="unclean")
    (node,) = uptime_of(window(batch(minute=-60), batch([back], minute=60)), T0 + 61 * MINUTE).nodes
    assert (node.idle_s, node.down_s, node.unknown_s) == (60.0, 3600.0, 0.0)
    (node,) = uptime_of(window(batch([back], minute=60)), T0 + 61 * MINUTE).nodes
    assert (node.idle_s, node.down_s, node.unknown_s) == (60.0, 0.0, 0.0), "it had never reported"
    new = AgentStarted(t_ms=T0 + 60 * MINUTE, version="0", previous="first")
    (node,) = uptime_of(window(batch([new], minute=60)), T0 + 61 * MINUTE).nodes
    assert (node.idle_s, node.down_s, node.unknown_s) == (60.0, 0.0, 0.0)


def test_availability_is_measured_by_requests() -> None:
    refused = [served(requests=n, outcome="refused", finish=why) for n, why in ((4, "capacity"), (30, "limit"))]
    refused += [served(requests=n, outcome="refused", finish=why) for n, why in ((20, "request"), (5, ""))]
    records = [served(requests=990), served(requests=1, outcome="failed"), served(outcome="cancelled"), *refused]
    report = uptime_of(window(batch(records)), T0 + MINUTE)
    assert (report.request_share, report.requests_bad) == (0.99, 10)
    assert (report.requests_failed, report.refused_capacity, report.refused_unsaid) == (1, 4, 5)
    assert (report.refused_limit, report.refused_request) == (30, 20)
    assert uptime_of(window(batch()), T0 + MINUTE).request_share is None


def test_an_exited_loader_is_named() -> None:
    event = LoaderExited(t_ms=T0, model="m", version="v", cause="signal 9", restarts=1)
    (incident,) = uptime_of(window(batch([event])), T0 + MINUTE).incidents
    assert (incident.scope, incident.text) == ("model m", "the loader exited (signal 9)")


# evictions


def missed(after_s: int) -> ModelMissed:
    return ModelMissed(t_ms=T0 + after_s * 1000, model="m", version="v", reason="memory", after_us=after_s * 1_000_000)


def evicted(minute: int = 0, **more: object) -> ModelEvicted:
    values: dict[str, object] = {"t_ms": T0 + minute * MINUTE, "model": "m", "version": "v", "reason": "memory"}
    return ModelEvicted(**{**values, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("records", "verdict", "hint"),
    [
        ([evicted(reason="ordered")], "ordered", "an operator"),
        ([evicted(for_model="k")], "traffic", "not wanted again there within 10.0 min"),
        ([evicted()], "placement", "although nothing needed its room"),
        ([evicted(reason="idle")], "idle", "keep-alive time ended"),
        ([evicted(reason="idle"), missed(30)], "idle", "wanted 30 s later: raise it"),
        ([evicted(reason="pressure")], "memory", "more memory than was planned"),
        ([evicted(), missed(45)], "placement", "wanted again after 45 s"),
        ([evicted(for_model="k"), missed(4_000)], "traffic", "not wanted again there within 10.0 min"),
        ([evicted(requests_last_hour=29, for_model="k")], "placement", "had served 29 requests"),
        ([evicted(for_model="k"), evicted(minute=5, model="k", for_model="m")], "placement", "push each other out"),
        (
            [evicted(), ModelLoaded(t_ms=T0 + 60_000, model="m", version="v", load_us=1, need_bytes=1)],
            "placement",
            "wanted again after 60 s",
        ),
    ],
)
def test_an_eviction_has_a_verdict(records: list[ModelEvicted], verdict: str, hint: str) -> None:
    row = next(r for r in eviction.report(window(batch(records))).rows if r.model == "m")
    assert verdict == row.verdict
    assert hint in row.hint


def test_evictions_of_one_kind_are_counted_together_whatever_their_figures() -> None:
    """The evidence is that of the most frequent kind; seconds and counts in a sentence do not set evictions apart."""
    busy = [evicted(minute=100 + 60 * n, for_model="k", requests_last_hour=30) for n in range(2)]
    wanted = [
        one
        for n in range(3)
        for one in (
            evicted(minute=10 * n),
            msgspec.structs.replace(missed(n + 5), t_ms=T0 + 10 * n * MINUTE + 1000 * (n + 5)),
        )
    ]
    (row,) = eviction.report(window(batch([*busy, *wanted]))).rows
    assert row.hint == "wanted again after 5 s"


def test_the_ten_most_evicted_models_are_listed_in_order() -> None:
    records = [evicted(model=f"m{n}", minute=t) for n in range(14) for t in range(n + 1)]
    report = eviction.report(window(batch(records)))
    assert len(report.rows) == 10
    assert (report.rows[0].model, report.rows[0].evictions) == ("m13", 14)


# placement


def minutes(node: str, *records: object, count: int = 10) -> list[Batch]:
    return [batch(list(records), node=node, minute=n) for n in range(count)]  # type: ignore[arg-type]


def test_rule_1_a_hot_node_moves_its_least_busy_model_away() -> None:
    hot = minutes(
        "n1",
        host(throttled=0.1),
        resident("a", version="va"),
        engine("a", version="va", busy_s=2),
        resident("b", version="vb"),
        engine("b", version="vb", busy_s=20),
    )
    cool = minutes("n2", host(), resident("c", version="vc"))
    report = placement.propose(window(*hot, *cool))
    assert [(m.action, m.model, m.node) for m in report.moves] == [("load", "a", "n2"), ("unload", "a", "n1")]
    assert "throttled 10.0%" in report.moves[0].reason


def test_rule_2_a_model_that_outgrows_its_node_gets_it_to_itself() -> None:
    busy = minutes(
        "n1",
        host(),
        resident("a", version="va"),
        engine("a", version="va", busy_s=2),
        resident("b", version="vb"),
        engine("b", version="vb", busy_s=50),
    )
    report = placement.propose(window(*busy, *minutes("n2", host())))
    assert [(m.action, m.model, m.node) for m in report.moves] == [("load", "a", "n2"), ("unload", "a", "n1")]
    alone = minutes("n1", host(), resident("b"), engine("b", busy_s=50))
    report = placement.propose(window(*alone, *minutes("n2", host())))
    assert [(m.action, m.model, m.node) for m in report.moves] == [("load", "b", "n2")], "another copy"


def test_rule_3_long_prompts_with_few_hits_need_more_cache() -> None:
    records = [
        served("long", requests=20, prompt_tok=180_000, cached_tok=2_000),
        served("short", requests=20, cached_tok=0),
    ]
    report = placement.propose(window(batch([*records, resident("long"), resident("short", version="v2"), host()])))
    (setting,) = report.settings
    assert (setting.model, setting.node, setting.setting, setting.value) == ("long", "n1", "cache_bytes", 4 * 10**9)
    assert "prompts of 9000 tokens on average, prompt cache hit rate 1%" in setting.reason


def test_rule_4_an_evicted_model_in_demand_moves_where_there_is_room() -> None:
    made = [
        batch([host(), resident("k"), evicted(requests_last_hour=50, for_model="k", bytes=8 * 10**9)]),
        *minutes("n2", host()),
    ]
    made[0] = batch([*made[0].records, resident("k", need=9 * 10**9)])
    (move,) = placement.propose(window(*made)).moves
    assert (move.action, move.model, move.node) == ("load", "m", "n2")


def test_well_placed_models_stay_and_unplaceable_ones_are_reported() -> None:
    assert not placement.propose(window(*minutes("n1", host(), resident(), engine(busy_s=5)))).rebalance
    full = minutes("n1", host(throttled=0.5), resident("a")) + minutes(
        "n2", host(budget=1), resident("b", version="vb", need=1)
    )
    report = placement.propose(window(*full))
    assert not report.rebalance
    assert "no other node has room for any of its models" in report.notes[0]


def test_a_move_never_overfills_its_target() -> None:
    hot = [
        b
        for n in range(4)
        for b in minutes(f"n{n}", host(throttled=0.2), resident(f"m{n}", version=f"v{n}", need=4 * 10**9), count=5)
    ]
    report = placement.propose(window(*hot, *minutes("cool", host(budget=9 * 10**9), count=5)))
    assert sum(m.node == "cool" for m in report.moves) == 2


# the month


def test_a_month_has_all_seven_sections_with_correct_figures() -> None:
    month = calendar.month("2026-11", "UTC")
    records: list[list[Record]] = [
        [served(requests=4), engine(), resident(), host(throttled=0.5), ThrottleEvent(t_ms=T0, level="heavy")],
        [evicted(requests_last_hour=1), host(), resident("k")],
        [
            SwapFinished(
                t_ms=T0, swap_id="s", model="m", from_version="a", to_version="b", outcome="flipped", window_us=9
            )
        ],
        [host()],
        [host()],
        [host()],
    ]
    made = window(*(batch(r, minute=n) for n, r in enumerate(records)), span=month)
    report = judge(made, None, config("n1"), T0 + 10 * MINUTE)
    assert (report.volume.requests, report.volume.completion_tok) == (4, 40)
    assert sum(d.tokens for d in report.volume.days) == 440
    assert len(report.volume.days) == 30
    assert (report.thermal.nodes[0].peak_package_mc, report.thermal.nodes[0].throttle_events) == (61_500, 1)
    assert "more air" in report.thermal.advice
    assert report.evictions.total == 1
    assert report.swaps.flipped == 1
    assert report.cost.total is not None
    assert report.headline.startswith("November 2026 so far cost ")
    assert " for 440 tokens, " in report.headline
    text = pdf_text(pdf.render(report))
    for title in ("1. Inference volume", "2. Thermal", "3. Evictions", "4. Place", "5. Cost", "6. Uptime", "7. Recomm"):
        assert title in text
    assert "61.5 °C" in text


def test_the_longest_swap_and_the_peak_are_the_same_in_every_place() -> None:
    month = calendar.month("2026-11", "UTC")
    swap = SwapFinished(
        t_ms=T0, swap_id="s", model="m", from_version="a", to_version="b", outcome="flipped", window_us=9_000_000
    )
    longer = msgspec.structs.replace(swap, outcome="failed", window_us=99_000_000)
    warm = msgspec.structs.replace(host(), package_temp_mc=95_002, pcore_temp_mc=95_802)
    made = window(batch([resident(), warm, swap, longer]), span=month)
    report = judge(made, None, config("n1"), T0 + 10 * MINUTE)
    (line,) = [one for one in report.scorecard if one.kind == "swap"]
    assert (line.value, report.swaps.longest_s) == (9.0, 9.0)
    assert (report.thermal.nodes[0].peak_mc, report.figures.peak_mc) == (95_802, 95_802)
    text = " ".join(pdf_text(pdf.render(report)).split())
    assert "1 model swap succeeded, 1 failed; the longest took 9" in text
    assert "peak 95.8 °C" in text


def test_a_month_without_data_states_it_in_every_section() -> None:
    report = judge(window(span=calendar.month("2025-01", "UTC")), None, config("n1"), T0)
    assert report.empty
    text = pdf_text(pdf.render(report))
    assert "No node reported anything in 2025-01." in text
    assert text.lower().count("no data") >= 6


def test_forty_models_with_long_names_fit_the_page() -> None:
    names = [f"org-{'x' * 60}-model-{n:02d}-instruct" for n in range(40)]
    records = [served(n, version=n[:16] + n[-14:], requests=3) for n in names]
    rows = [resident(n, version=n[:16] + n[-14:]) for n in names]
    report = judge(window(batch([*records, *rows, host()])), None, config("n1"), T0 + MINUTE)
    body = pdf.render(report)
    assert len(body) < 200_000
    assert "model-39-instruct" in pdf_text(body).replace("\n", "")


def test_equal_reports_give_equal_pdfs() -> None:
    report = judge(window(batch([served(), host()])), None, config("n1"), T0 + MINUTE)
    assert pdf.render(report) == pdf.render(report)


def test_evictions_are_added_up_over_everything_and_never_beside_a_median() -> None:
    """Finding A10: "3,500 requests" were five times 700; no total, none by model, no word of what is cut."""
    often = [evicted(n, for_model="k", requests_last_hour=700 + n, bytes=5 + n) for n in range(5)]
    others = [evicted(n, model=f"m{n:02d}", reason="ordered") for n in range(12)]
    made = window(batch([*often, *others]), batch([evicted(9, for_model="k", requests_last_hour=3)], node="n2"))
    found = eviction.report(made)
    assert (found.total, len(found.rows), found.left_out, found.left_out_evictions) == (18, 10, 4, 4)
    assert sum(row.evictions for row in found.rows) + found.left_out_evictions == found.total
    first = found.rows[0]
    assert (first.node, first.model, first.evictions) == ("n1", "m", 5)
    assert (first.requests_last_hour, first.bytes) == (702, 9), "the median and the largest of one eviction"
    assert next((m.model, m.evictions, m.nodes) for m in found.models) == ("m", 6, 2)
    assert sum(m.evictions for m in found.models) == found.total
    assert sum(found.verdicts.values()) == found.total
    text = markdown.render(evictions_page.page(found, "r")).decode()
    assert text.startswith("# Evictions")
    for said in ("18 evictions, ", "4 more rows with 4 evictions: see the totals by model.", "| 702 |"):
        assert said in text
    assert "3,5" not in text
    printed = pdf_text(pdf.render(judge(made, None, config("n1"), T0 + DAY_MS)))
    assert "4 more rows" in printed
    assert "Total" in printed


def test_without_evictions_there_is_no_table_of_them() -> None:
    page = evictions_page.page(eviction.report(window(batch([served()]))), "r")
    assert (page.lead, page.sections) == ("No model had to leave memory.", ())


def test_silence_that_began_before_the_period_says_so() -> None:
    nodes = ("n1", "n2")
    early = batch(node="n1", minute=-60, seq=1)
    made = window(early, *(batch(node="n2", minute=n, seq=n + 1) for n in range(90)), span=DAY, nodes=nodes)
    found = uptime_of(made, T0 + 90 * MINUTE, nodes=config(*nodes).nodes)
    (one,) = (i for i in found.incidents if i.node == "n1")
    assert (one.start_ms, one.end_ms) == (T0, None)
    assert one.text.endswith("; it began before this period")
    later = window(batch(node="n1", minute=0), *(batch(node="n2", minute=n, seq=n + 1) for n in range(90)), span=DAY)
    (one,) = (i for i in uptime_of(later, T0 + 90 * MINUTE).incidents if i.node == "n1")
    assert "before" not in one.text
