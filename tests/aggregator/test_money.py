"""Money that adds up wherever it is shown: loaders that share a version, nodes that fall silent, the days of the FOCUS
export, the comparison with API hosts, the sentences about it, and the period before."""

import csv
import io
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import api_prices, calendar, cost, cost_change, focus, scorecard
from aggregator.allocation import rounded
from aggregator.calendar import DAY_MS, HOUR_MS, Span, days
from aggregator.config import AggregatorConfig, Cost, Scorecard
from aggregator.judgements import Judged, judge
from aggregator.report import markdown
from aggregator.report.pages import cost as cost_page
from aggregator.report.pages import scorecard as scorecard_page
from aggregator.report.pages import usage as usage_page
from aggregator.window import Window
from shared.batch import Batch
from shared.records import EngineWindow, Record
from tests.builders import DAY, MINUTE, T0, batch, engine, host, served, window

AT = datetime(2026, 11, 1, tzinfo=UTC)
CENT = Decimal("0.000001")


def config(*nodes: str | dict[str, Any], **more: object) -> AggregatorConfig:
    tree = {
        "rack": "r",
        "store": {"path": "x"},
        "nodes": [{"price": 1399.0, "watts": 40.0, **({"id": n} if isinstance(n, str) else n)} for n in nodes],
        **more,
    }
    return msgspec.convert(tree, AggregatorConfig)


def worked(model: str, prefill_s: int, decode_s: int, version: str = "v1") -> EngineWindow:
    return EngineWindow(
        model=model, version=version, busy_prefill_us=prefill_s * 10**6, busy_decode_us=decode_s * 10**6
    )


def priced(*records: Record) -> cost.CostReport:
    return cost.compute(window(batch(records)), config("n1"))


# loaders and names


def test_two_names_with_one_version_keep_their_own_loaders() -> None:
    """Finding A4: a version is not a key. Here b worked three times as long as a for the same tokens."""
    a, b = priced(served("a"), served("b"), worked("a", 0, 10), worked("b", 0, 30)).models
    assert (a.busy_s, b.busy_s) == (10.0, 30.0)
    assert a.direct is not None
    assert b.direct is not None
    assert abs(b.direct - 3 * a.direct) <= 3 * CENT


@pytest.mark.parametrize(
    ("names", "busy"),
    [
        ([("a", 900, 0, 10), ("b", 100, 0, 30)], {"a": 9 + 5, "b": 1 + 15}),  # prompt and answer tokens apart
        ([("a", 900, 800, 10), ("b", 900, 0, 10)], {"a": 1 + 10, "b": 9 + 10}),  # cached tokens cost nothing
        ([("a", 0, 0, 10), ("b", 100, 0, 0)], {"a": 20, "b": 10}),
    ],
    ids=["mix", "cached", "apart"],
)
def test_a_shared_loader_is_split_by_prefill_and_decode_work(
    names: list[tuple[str, int, int, int]], busy: dict[str, float]
) -> None:
    """Two names answered by one loader of a third: 10 s of prefill, 20 s of decode."""
    asked = [served(n, prompt_tok=p, cached_tok=c, completion_tok=a) for n, p, c, a in names]
    assert {m.model: m.busy_s for m in priced(*asked, worked("own", 10, 20)).models} == busy


def test_an_alias_beside_two_loaders_of_its_version_is_answered_by_both_in_proportion() -> None:
    """f was swapped to g's version, which h shares: its work belongs to both loaders, by their time."""
    asked = [served(n, completion_tok=t) for n, t in (("f", 40), ("g", 30), ("h", 90))]
    found = {m.model: m.busy_s for m in priced(*asked, worked("g", 0, 10), worked("h", 0, 30)).models}
    # of 40 tokens of f, 10 are g's and 30 are h's: 10 s x 10/40 + 30 s x 30/120
    assert found == {"f": 10.0, "g": 7.5, "h": 22.5}


def test_a_name_that_a_swap_gave_away_is_answered_by_the_loader_of_its_version_alone() -> None:
    asked = (served("f", version="v1"), served("f", version="v2"), served("h", version="v3"))
    loaders = (worked("f", 0, 7, "v1"), worked("g", 0, 20, "v2"), worked("h", 0, 30, "v3"))
    assert {m.model: m.busy_s for m in priced(*asked, *loaders).models} == {"f": 27.0, "h": 30.0}


def test_work_that_answered_nobody_is_in_no_model() -> None:
    report = priced(served("a", completion_tok=0), worked("a", 10, 30))
    assert {(r.kind, r.busy_s) for r in report.rows if r.busy_s} == {("model", 10.0), ("unattributed", 30.0)}
    (a,) = report.models
    assert a.direct is not None
    assert report.unattributed is not None
    assert abs(report.unattributed - 3 * a.direct) <= 3 * CENT
    assert a.output_per_m is None


counts = st.integers(0, 400)


@st.composite
def shelves(draw: st.DrawFn) -> list[Batch]:
    """Two days of two nodes: loaders that share versions, names without a loader, gaps."""
    made = []
    for minute in draw(st.sets(st.integers(0, 2 * 1440 - 2), min_size=1, max_size=6)):
        for node in draw(st.sampled_from((("n1",), ("n2",), ("n1", "n2")))):
            records: list[Record] = [
                served(
                    draw(st.sampled_from(("a", "b", "alias"))),
                    worker=node,
                    version=draw(st.sampled_from(("v1", "v2"))),
                    prompt_tok=draw(counts) + 400,
                    cached_tok=draw(counts),
                    completion_tok=draw(counts),
                    outcome=draw(st.sampled_from(("ok", "failed"))),
                ),
                *(worked(m, draw(st.integers(0, 20)), draw(st.integers(0, 20)), v) for m in "ab" for v in ("v1", "v2")),
            ]
            made.append(batch([*records, host()], node=node, minute=minute))
    return made


SPAN = Span("2026-11-21--2026-11-22", T0, T0 + 2 * DAY_MS, "UTC")
PRICED = config("n1", {"id": "n2", "price": 777.0, "other_per_month": 3.0})


def in_all(amounts: Sequence[Decimal | None]) -> Decimal:
    return sum((a for a in amounts if a is not None), Decimal(0))


@settings(max_examples=60, deadline=None)
@given(shelves(), st.integers(0, 60))
def test_every_table_of_money_adds_up_to_the_total(made: list[Batch], hours: int) -> None:
    report = cost.compute(window(*made, span=SPAN), PRICED, now_ms=T0 + hours * HOUR_MS)
    assert report.total == in_all([r.cost for r in report.rows]) == in_all([n.cost for n in report.nodes])
    rest = (report.unshared, report.silent, report.unattributed)
    assert report.total == in_all([m.loaded for m in report.models]) + in_all(rest)
    assert report.unshared is not None
    assert report.unshared >= 0
    for m in report.models:
        if m.direct is not None and m.loaded is not None:
            assert m.direct <= m.loaded
    for node in report.nodes:
        assert node.cost == in_all([r.cost for r in report.rows if r.node == node.node])


def renamed(one: Batch, names: dict[str, str]) -> Batch:
    records = tuple(
        msgspec.structs.replace(r, model=names[r.model]) if hasattr(r, "model") and r.model in names else r
        for r in one.records
    )
    return msgspec.structs.replace(one, records=records)


@settings(max_examples=40, deadline=None)
@given(shelves(), st.integers(2, 9))
def test_names_do_not_matter_and_tokens_scale(made: list[Batch], times: int) -> None:
    """Swapping two names swaps their figures; a multiple of all tokens costs the same."""
    plain = {m.model: m for m in cost.compute(window(*made, span=SPAN), PRICED).models}
    swapped = cost.compute(window(*(renamed(b, {"a": "b", "b": "a"}) for b in made), span=SPAN), PRICED)
    for m in swapped.models:
        other = plain[{"a": "b", "b": "a"}.get(m.model, m.model)]
        assert m.busy_s == other.busy_s
        assert abs(in_all([m.loaded]) - in_all([other.loaded])) <= 100 * CENT, "but for what is rounded"

    def more(record: Record) -> Record:
        fields = ("prompt_tok", "cached_tok", "completion_tok")
        changed = {name: getattr(record, name) * times for name in fields if hasattr(record, "completion_tok")}
        return msgspec.structs.replace(record, **changed)

    scaled = [msgspec.structs.replace(b, records=tuple(more(r) for r in b.records)) for b in made]
    for m in cost.compute(window(*scaled, span=SPAN), PRICED).models:
        assert (m.direct, m.loaded, m.busy_s) == (plain[m.model].direct, plain[m.model].loaded, plain[m.model].busy_s)


# silent time


def test_a_silent_node_is_paid_for_without_power_and_a_retired_one_is_not() -> None:
    """Finding A6: 0.04256 an hour for owning it, 0.006 for power while it runs."""
    up = [batch([served("a"), engine("a")], minute=n) for n in range(60)]
    until = T0 + 25 * HOUR_MS
    report = cost.compute(window(*up, span=SPAN), config("n1"), now_ms=until)
    (node,) = report.nodes
    assert (node.reported_s, node.silent_s) == (3600.0, 24 * 3600.0)
    assert node.silent is not None
    assert node.silent == report.silent == Decimal("1.021401")
    assert node.cost == Decimal("0.048558") + node.silent
    assert [r.cost for r in report.rows if r.kind == "silent"] == [node.silent]
    (a,) = report.models
    assert a.loaded == Decimal("0.048558"), "silence is in no model"
    retired = config({"id": "n1", "retired": "2026-11-22"})
    assert cost.compute(window(*up, span=SPAN), retired, now_ms=until).nodes[0].silent_s == 23 * 3600.0


def test_a_node_that_is_silent_in_all_of_a_span_costs_what_owning_it_costs() -> None:
    before = batch([engine()], node="n2", minute=-9)
    made = window(before, batch([served("a"), engine("a")]), nodes=["n1", "n2"])
    nodes = {n.node: n for n in cost.compute(made, config("n1", "n2"), now_ms=T0 + 10 * HOUR_MS).nodes}
    assert (nodes["n2"].reported_s, nodes["n2"].silent_s, nodes["n2"].idle) == (0.0, 36_000.0, Decimal(0))
    assert nodes["n2"].cost == nodes["n2"].silent == Decimal("0.425584")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 47), min_size=1, max_size=12, unique=True), st.data())
def test_the_total_never_falls_below_what_owning_costs_when_a_node_goes_silent(
    hours: list[int], data: st.DataObject
) -> None:
    """Silence saves power and nothing else: with free electricity the total stays the same."""
    free = config({"id": "n1", "since": "2026-11-21"}, cost={"electricity_per_kwh": 0.0})
    lost = data.draw(st.sets(st.sampled_from(hours), max_size=len(hours) - 1))
    totals = [
        cost.compute(
            window(*(batch([engine("a")], minute=60 * h) for h in hours if h not in gone), span=SPAN),
            free,
            now_ms=SPAN.until_ms,
        ).total
        for gone in (set[int](), lost)
    ]
    assert totals[0] is not None
    assert totals[1] is not None
    assert abs(totals[0] - totals[1]) <= 2 * CENT


# FOCUS

MANDATORY = {
    "BilledCost": "decimal",
    "BillingAccountId": "text",
    "BillingAccountName": "text",
    "BillingCurrency": "currency",
    "BillingPeriodEnd": "time",
    "BillingPeriodStart": "time",
    "ChargeCategory": {"Usage", "Purchase", "Tax", "Credit", "Adjustment"},
    "ChargeClass": {"", "Correction"},
    "ChargeDescription": "text",
    "ChargePeriodEnd": "time",
    "ChargePeriodStart": "time",
    "ContractedCost": "decimal",
    "EffectiveCost": "decimal",
    "HostProviderName": "text",
    "InvoiceIssuerName": "text",
    "ListCost": "decimal",
    "PricingQuantity": "decimal",
    "PricingUnit": "text",
    "ServiceCategory": {"AI and Machine Learning"},
    "ServiceName": "text",
    "ServiceProviderName": "text",
}
"""Columns that FOCUS 1.3 wants in every row of usage, and what may stand in them."""
CONDITIONAL = {
    "AllocatedMethodId": "text",  # of allocated and unallocated parts alike
    "AllocatedResourceId": "maybe",  # null for what is not allocated
    "AllocatedResourceName": "maybe",
    "AllocatedTags": "maybe",
    "ChargeFrequency": {"One-Time", "Recurring", "Usage-Based"},
    "ConsumedQuantity": "decimal",
    "ConsumedUnit": "text",
    "ProviderName": "text",  # of 1.2, still there in 1.3
    "PublisherName": "text",
    "ResourceId": "text",
    "ResourceName": "text",
    "ResourceType": "text",
    "ServiceSubcategory": {"Generative AI"},
    "SkuId": "text",
    "Tags": "text",
}
FORMS: dict[str, Callable[[str], bool]] = {
    "decimal": lambda v: Decimal(v).is_finite() and not set(v) - set("0123456789.-"),
    "text": lambda v: bool(v) and v == v.strip(),
    "maybe": lambda v: v == v.strip(),
    "currency": lambda v: len(v) == 3 and v.isupper(),
    "time": lambda v: bool(datetime.strptime(v, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)),
}


def broken(rows: Sequence[dict[str, str]]) -> list[str]:
    """What is against the rules of FOCUS 1.3 for usage that is allocated."""
    rules: dict[str, Any] = {**MANDATORY, **CONDITIONAL}
    found = [f"no column {name}" for name in rules if name not in rows[0]]
    found += [f"{name} is no column" for name in rows[0] if name not in rules and not name.startswith("x_")]
    for row in rows:
        found += [
            f"{name}: {row[name]!r}"
            for name, rule in rules.items()
            if name in row and not (row[name] in rule if isinstance(rule, set) else FORMS[rule](row[name]))
        ]
        if (
            not row["BillingPeriodStart"]
            <= row["ChargePeriodStart"]
            < row["ChargePeriodEnd"]
            <= row["BillingPeriodEnd"]
        ):
            found.append("a charge outside its billing period")
        if (row["ConsumedUnit"] == "Tokens") != bool(row["AllocatedResourceId"]):
            found.append("what is allocated has a model, what is not has none")
    return found


def exported(made: Sequence[Batch], span: Span, now_ms: int) -> tuple[cost.CostReport, list[dict[str, str]]]:
    whole = cost.compute(window(*made, span=span), PRICED, now_ms=now_ms)
    daily = [
        (day, cost.compute(window(*made, span=day, nodes=["n1", "n2"]), PRICED, now_ms=now_ms).rows)
        for day in days(span)
    ]
    body = focus.export("r", span, whole, daily)
    return whole, list(csv.DictReader(io.StringIO(body.decode())))


@settings(max_examples=60, deadline=None)
@given(shelves(), st.integers(0, 60))
def test_focus_adds_up_to_the_report_and_keeps_the_rules(made: list[Batch], hours: int) -> None:
    """Finding A11, to the last digit."""
    whole, rows = exported(made, SPAN, T0 + hours * HOUR_MS)
    assert in_all([Decimal(r["EffectiveCost"]) for r in rows]) == whole.total
    for row in whole.rows:
        of = (row.node, row.model if row.kind == "model" else row.kind)
        mine = [r for r in rows if (r["ResourceId"], r["SkuId"]) == of]
        assert in_all([Decimal(r["EffectiveCost"]) for r in mine]) == row.cost
        if row.kind == "model":
            assert sum(Decimal(r["ConsumedQuantity"]) for r in mine) == row.tokens
    assert not broken(rows)
    assert all(Decimal(r["EffectiveCost"]) >= 0 for r in rows)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "Australia/Lord_Howe", "America/St_Johns"])
@pytest.mark.parametrize("length", [10, 60])
def test_windows_across_midnight_are_shared_between_days(zone: str, length: int) -> None:
    span = calendar.between("2026-11-21", "2026-11-23", zone)
    made = []
    for node in ("n1", "n2"):
        start = span.since_ms - length // 2 * MINUTE
        for seq in range(3 * 1440 // length + 1):
            one = batch([served("a", worker=node), engine("a")], node=node, seq=seq)
            t_ms = start + seq * length * MINUTE
            made.append(msgspec.structs.replace(one, t_start_ms=t_ms, t_end_ms=t_ms + length * MINUTE))
    whole, rows = exported(made, span, span.until_ms)
    assert [n.reported_s for n in whole.nodes] == [3 * 86_400.0] * 2
    assert not whole.silent
    assert in_all([Decimal(r["EffectiveCost"]) for r in rows]) == whole.total
    idle = {
        r["ChargePeriodStart"]: Decimal(r["EffectiveCost"])
        for r in rows
        if (r["SkuId"], r["ResourceId"]) == ("idle", "n1")
    }
    assert len(idle) == 3
    assert max(idle.values()) - min(idle.values()) < Decimal("0.01"), "no day loses the part before its midnight"
    assert not [r for r in rows if r["SkuId"] == "silent"]


# against APIs

CHAT = [{"model": "chat", "same_as": "llama-3.3-70b-instruct", "frontier": "openai/gpt-4o"}]


def asked(**more: object) -> Window:
    values: dict[str, Any] = {"requests": 1000, "prompt_tok": 10**6, "completion_tok": 10**5, **more}
    return window(*(batch([served("chat", **values), engine("chat", busy_s=6)], minute=n) for n in range(10)))


def compared(made: Window, **more: object) -> api_prices.Comparisons:
    c = config("n1", compare=CHAT, **more)
    return api_prices.compare(made, cost.compute(made, c), c, AT)


def test_a_deprecated_offer_does_not_count() -> None:
    """Finding A13: the library marks offers that are about to end."""
    from genai_prices import data_snapshot

    gone = {(p.id, m.id) for p in data_snapshot.get_snapshot().providers for m in p.models if m.deprecated}
    assert gone
    assert not gone & set(api_prices.hosts_of("llama-3.1-8b-instruct"))
    assert not any(gone & set(api_prices.hosts_of(model)) for _, model in gone)


@pytest.mark.parametrize(("costs", "middle"), [((3,), 3), ((1, 9), 1), ((1, 2, 9), 2), ((9, 2, 1, 3), 2)])
def test_the_host_in_the_middle_is_one_of_them(costs: tuple[int, ...], middle: int) -> None:
    hosts = [api_prices.Host(provider=f"p{c}", model="m", cost=Decimal(c)) for c in sorted(costs)]
    found = api_prices._with_hosts(api_prices.Comparison(model="m", ours=Decimal(1)), "m", hosts)
    assert found.median == middle


def test_what_is_written_to_a_providers_cache_is_paid_where_it_costs() -> None:
    one = {"requests": 1, "prompt_tok": 1000, "completion_tok": 0, "at": AT}
    claude, gpt = (
        {"provider": p, "model": m, **one} for p, m in (("anthropic", "claude-sonnet-4-5"), ("openai", "gpt-4o"))
    )
    # 400 read at 0.30, 600 written at 3.75 per million; without a hit nothing is cached
    assert api_prices.price(**claude, cached_tok=400) == Decimal("0.00237")  # type: ignore[arg-type]
    assert api_prices.price(**claude, cached_tok=0) == Decimal("0.003")  # type: ignore[arg-type]
    assert api_prices.price(**gpt, cached_tok=400) == Decimal("0.002")  # type: ignore[arg-type]


def test_the_verdict_against_api_hosts_is_said_in_headline_scorecard_and_page() -> None:
    """Finding A3. The same work on a node that costs 100 or 60,000."""
    cheap, dear = asked(), asked()
    for made, price, verdict, kept, said in (
        (cheap, 100.0, "cheaper", True, "less than the same open models at API hosts"),
        (dear, 90_000_000.0, "dearer", False, "times as much as the same open models at API hosts"),
    ):
        c = config({"id": "n1", "price": price}, compare=CHAT)
        judged = judge(made, None, c, T0 + 10 * MINUTE)
        apis = judged.apis
        assert apis.verdict == verdict
        line = next(one for one in judged.scorecard if one.kind == "saving")
        assert (line.kept, line.value, line.target) == (kept, apis.share, 0.0)
        page = markdown.render(cost_page.page(judged.cost, apis, "r", "before")).decode()
        assert said in judged.headline
        assert said in line.text
        assert "same open models" in page
        assert "10 % busy now" in line.text
        assert ("10 % busy now" in page) == bool(apis.break_even)
        assert (
            apis.break_even == pytest.approx(0.1 * float(apis.ours / apis.median))
            if apis.ours and apis.median
            else True
        )
        board = markdown.render(scorecard_page.page(judged.scorecard, "p", "r")).decode()
        assert ("saving against API hosts" in board.split("\n")[2]) == (not kept)


@pytest.mark.parametrize(
    ("busy", "limit", "verdict", "said"),
    [
        (0.068, 0.19, "dearer", "6.8 % busy now; cheaper than API hosts above 19 %"),
        (0.5, 1.7, "dearer", "50 % busy now; not cheaper than API hosts even when fully busy"),
        (0.5, 0.031, "cheaper", "50 % busy now; cheaper than API hosts down to 3.1 %"),
        (None, None, "unknown", ""),
        (0.0, None, "unknown", ""),
    ],
)
def test_break_even_is_said_with_the_utilisation_now(
    busy: float | None, limit: float | None, verdict: Any, said: str
) -> None:
    found = api_prices.Comparisons(
        source="s",
        at="d",
        covered=1.0,
        ours=None,
        median=None,
        saving=None,
        share=None,
        models=(),
        verdict=verdict,
        break_even=limit,
        busy_share=busy,
    )
    assert api_prices.utilisation(found) == said


def test_at_its_break_even_a_rack_costs_what_api_hosts_charge() -> None:
    """As much work in the time as there must be: price and host cost the same."""
    found = compared(asked(prompt_tok=1000, completion_tok=100, requests=1))
    assert found.break_even is not None
    assert found.busy_share == pytest.approx(0.1)
    times = found.break_even / 0.1
    scaled = compared(asked(prompt_tok=int(1000 * times), completion_tok=int(100 * times), requests=int(times)))
    assert scaled.share == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("times", "share", "said"),
    [
        (5.2, 0.8077, "5.2 times cheaper (80.8 % less)"),
        (1.0, 0.0, "1.0 times cheaper (0.0 % less)"),
        (0.35, -1.86, "2.9 times as expensive"),
        (0.0001, -9999.0, "10,000.0 times as expensive"),
        (0.99, -0.01, "slightly dearer"),
    ],
)
def test_a_frontier_model_is_compared_as_people_say_it(times: float, share: float, said: str) -> None:
    assert scorecard.frontier(times, share) == said


def test_a_saving_has_a_target_of_its_own() -> None:
    apis = compared(asked())
    up = judge(asked(), None, config("n1", compare=CHAT), T0 + 10 * MINUTE).uptime
    for target, kept in ((0.0, True), (1.0, False), (-5.0, True)):
        lines = scorecard.lines(asked(), up, apis, Scorecard(saving=target))
        assert next(one.kept for one in lines if one.kind == "saving") is kept


# sentences

MONTH = calendar.month("2026-11", "UTC")


def month(*made: Batch, now_ms: int = MONTH.until_ms, **more: object) -> Judged:
    return judge(window(*made, span=MONTH), None, config("n1", **more), now_ms)


@pytest.mark.parametrize(
    ("judged", "begin", "end"),
    [
        (
            lambda: month(batch([served("chat"), engine("chat")]), compare=CHAT),
            "November 2026 cost ",
            "the rack answered 100 % of the requests that it should have; how long it was up is not known.",
        ),
        (
            lambda: month(batch([served("a"), engine("a")]), now_ms=T0 + MINUTE),
            "November 2026 so far cost 0.000809 USD for 110 tokens, 7.35 per million; the rack was up 100 %",
            "should have.",
        ),
        (
            lambda: month(batch([engine("a")]), now_ms=T0 + MINUTE),
            "November 2026 so far cost 0.000809 USD, and no token was computed for it; ",
            "the rack was up 100 % of the time, and nothing was asked of it.",
        ),
        (
            lambda: judge(window(batch([served("a", requests=1)]), span=MONTH), None, config(), MONTH.until_ms),
            "November 2026 had 110 tokens, and what they cost is not known: no node has a price; ",
            ".",
        ),
        (
            lambda: judge(window(batch([served("a", completion_tok=10**9)])), None, config("n1"), T0 + DAY_MS),
            "Week 2026-W47 cost ",
            "should have; how long it was up is not known.",
        ),
        (lambda: judge(window(span=MONTH), None, config("n1"), T0), "No node reported anything in 2026-11.", ""),
    ],
    ids=["compared", "so far", "no tokens", "no price", "huge", "empty"],
)
def test_the_headline_is_the_verdict_in_one_sentence(judged: Callable[[], Judged], begin: str, end: str) -> None:
    said = judged().headline
    assert said.startswith(begin)
    assert said.endswith(end)
    assert said.count(". ") == 0
    assert "no data" not in said
    assert "None" not in said


def test_price_and_tokens_of_the_headline_are_of_the_same_tokens() -> None:
    """Finding A2."""
    judged = month(batch([served("a", prompt_tok=3_000_000, completion_tok=1_000_000), engine("a")]))
    money = judged.cost
    assert money.total is not None
    assert money.average_per_m == rounded(money.total / 4)
    assert money.tokens == 4_000_000
    assert f"for 4.00 M tokens, {cost.amount(money.average_per_m)} per million" in judged.headline


# the period before


def test_a_month_knows_last_month_and_flags_a_doubled_price() -> None:
    """Finding A12."""
    october = calendar.month_before(MONTH)
    assert october.name == "2026-10"
    before_ms = october.since_ms - T0

    def made(seconds: float, shift_ms: int) -> list[Batch]:
        tokens: dict[str, Any] = {"prompt_tok": 10**6, "completion_tok": 10**5}
        whole = [batch([served("a", **tokens), engine("a", busy_s=seconds)], minute=n) for n in range(3)]
        return [
            msgspec.structs.replace(b, t_start_ms=b.t_start_ms + shift_ms, t_end_ms=b.t_end_ms + shift_ms)
            for b in whole
        ]

    now, last = window(*made(50, 0), span=MONTH), window(*made(20, before_ms), span=october)
    judged = judge(now, last, config({"id": "n1", "retired": "2026-11-22"}), MONTH.until_ms)
    assert judged.before_period == "2026-10"
    assert judged.before is not None
    assert (judged.figures.requests, judged.before.requests) == (3, 3)
    assert judged.before.busy_share == pytest.approx(1 / 3)
    assert judged.figures.busy_share == pytest.approx(5 / 6)
    (a,) = judged.cost.models
    assert a.change is not None
    assert (a.change.flagged, a.change.cause) == (True, "decode")
    assert "2.5 x that of 2026-10" in a.change.text
    assert any("2.5 x that of 2026-10" in one.because for one in judged.recommendations)
    alone = judge(now, window(span=october), config("n1"), MONTH.until_ms)
    assert (alone.before, alone.before_period) == (None, "")


def test_the_page_shows_its_totals() -> None:
    made = window(batch([served("a"), worked("a", 0, 10), worked("b", 0, 5)]))
    c = config("n1")
    money = cost.compute(made, c, now_ms=T0 + HOUR_MS)
    said = markdown.render(cost_page.page(money, api_prices.compare(made, money, c, AT), "r", "before")).decode()
    assert said.count("| Total |") == 3
    assert "silent time" in said
    assert "work that answered nobody" in said


def test_prices_are_of_the_last_moment_of_a_span_and_never_of_the_future() -> None:
    made = window(batch([served("a"), engine("a")]))
    assert judge(made, None, config("n1"), DAY.until_ms).apis.at == "2026-11-21"
    assert judge(made, None, config("n1"), T0 - DAY_MS).apis.at == "2026-11-20", "telemetry may be ahead of the clock"


def test_a_poisoned_cache_is_suspected_although_its_hit_rate_fell_too() -> None:
    """Two causes at once: longer answers, more of them cut off, and misses; the answers cost most."""
    before = cost_change.Factors(
        tokens=1_050_000,
        requests=1000,
        loaded=1.0,
        direct=1.0,
        prefill_s=200.0,
        decode_s=1000.0,
        busy_s=1200.0,
        prompt_tok=1_000_000,
        cached_tok=800_000,
        completion_tok=50_000,
        cut_share=0.05,
        throttled_share=0.0,
    )
    now = msgspec.structs.replace(
        before,
        tokens=1_200_000,
        completion_tok=200_000,
        decode_s=4000.0,
        prefill_s=400.0,
        busy_s=4400.0,
        loaded=4400 / 1200,
        direct=4400 / 1200,
        cached_tok=600_000,
        cut_share=0.6,
    )
    found = cost_change.judge(now, before, Cost())
    assert found is not None
    assert (found.flagged, found.cause) == (True, "poisoned_kv")
    plain = cost_change.judge(msgspec.structs.replace(now, cut_share=0.05), before, Cost())
    assert plain is not None
    assert plain.cause == "mix_shift"


def test_work_is_priced_by_exact_means_not_by_whole_tokens() -> None:
    # 1.9 tokens an answer: whole ones would be priced as 1
    many = {"requests": 10, "prompt_tok": 1009, "cached_tok": 0, "completion_tok": 19, "at": AT}
    dollars = Decimal("2.5") * 1009 / 10**6 + Decimal(10) * 19 / 10**6
    assert api_prices.price("openai", "gpt-4o", **many) == rounded(dollars)  # type: ignore[arg-type]


def test_a_mean_without_end_does_not_decide_a_tie() -> None:
    # 0.0000425 and 0.0000475 dollars, half to even; 17 / 3 has no last digit
    for prompt_tok, dollars in ((17, "0.000042"), (19, "0.000048"), (125, "0.000312")):
        three = {"requests": 3, "prompt_tok": prompt_tok, "cached_tok": 0, "completion_tok": 0, "at": AT}
        assert api_prices.price("openai", "gpt-4o", **three) == Decimal(dollars)  # type: ignore[arg-type]


# one population


def test_money_and_what_it_is_divided_by_are_of_the_same_nodes() -> None:
    """Work of a node without a price takes no part of other nodes' cost, by key or in the factors of a change."""
    here = batch([served("a", key_id="k1", requests=30), worked("a", 10, 10), host()])
    there: list[Record] = [
        served("a", worker="n2", key_id="k2", requests=90, finish="length"),
        worked("a", 20, 40),
        host(),
    ]
    alone = cost.compute(window(here), config("n1"))
    both = cost.compute(window(here, batch(there, node="n2")), config("n1"))
    (model,) = both.models
    assert (model.requests, model.busy_s) == (120, 80.0)
    assert both.total == alone.total
    assert model.factors == alone.models[0].factors
    assert {key.key_id: (key.requests, key.cost) for key in both.keys} == {
        "k1": (30, alone.keys[0].cost),
        "k2": (90, None),
    }
    page = markdown.render(cost_page.page(both, compared(window(here)), "r", "before")).decode()
    said = "Work is that of all nodes; money and prices are those of the nodes with a price, which computed 25.0 % of"
    assert page.count(said) == 1
    assert said in markdown.render(usage_page.page(both, "r")).decode()
    assert said not in markdown.render(cost_page.page(alone, compared(window(here)), "r", "before")).decode()


def test_no_work_is_not_a_free_offer() -> None:
    refused = batch([served("a", outcome="refused", prompt_tok=0, completion_tok=0), engine("a"), host()])
    compare = {"model": "a", "same_as": "llama-3.1-8b-instruct", "frontier": "openai/gpt-4o"}
    made = window(refused)
    table = config("n1", compare=[compare])
    (found,) = api_prices.compare(made, cost.compute(made, table), table, AT).models
    assert (found.why_not, found.hosts, found.frontier_cost) == (
        "nothing was answered at a node with a price",
        (),
        None,
    )


def test_a_price_that_rose_since_nodes_were_silent_is_not_said_to_lack_traffic() -> None:
    before = cost_change.Factors(
        tokens=1_000_000,
        requests=1000,
        loaded=10.0,
        direct=1.0,
        prefill_s=200.0,
        decode_s=1000.0,
        busy_s=1200.0,
        prompt_tok=900_000,
        cached_tok=0,
        completion_tok=100_000,
        cut_share=0.0,
        throttled_share=0.0,
        reported_share=1.0,
    )
    few = {"tokens": 300_000, "requests": 300, "direct": 0.3, "prefill_s": 60.0, "decode_s": 300.0, "busy_s": 360.0}
    less = msgspec.structs.replace(before, **few, prompt_tok=270_000, completion_tok=30_000, loaded=9.0)
    causes = {}
    for reported in (1.0, 0.76, 0.74, 0.3, None):
        found = cost_change.judge(msgspec.structs.replace(less, reported_share=reported), before, Cost())
        assert found is not None
        causes[reported] = found.cause
    assert causes == {1.0: "traffic_drop", 0.76: "traffic_drop", 0.74: "silence", 0.3: "silence", None: "traffic_drop"}


def test_the_reported_share_of_a_price_is_that_of_its_nodes_owned_time() -> None:
    made = [batch([served("a"), worked("a", 5, 5), host()], minute=n) for n in range(60)]
    report = cost.compute(window(*made), config("n1"), now_ms=T0 + 4 * HOUR_MS)
    (model,) = report.models
    assert model.factors is not None
    assert model.factors.reported_share == pytest.approx(0.25)
