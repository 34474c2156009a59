"""Whether to buy: within what the nodes can carry, from figures that somebody gave or that are said to be assumed."""

import itertools
import json
import math
import re
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agent.operator import recommended
from aggregator import api_prices, cli, economics
from aggregator.commands import cli_economics
from aggregator.economics import CLASSES, Economics, Inputs
from aggregator.economics.capacity import MONTH_S
from aggregator.intake import BATCHED
from aggregator.packing import CAP
from aggregator.report import chart, html, markdown
from aggregator.report.page import Curve
from aggregator.report.pages import economics as economics_page
from shared import chips
from shared.chips import BITS_PER_WEIGHT
from shared.errors import Refused
from shared.memory_plan import kv_bytes

AT = datetime(2026, 11, 27, tzinfo=UTC)


def judged(configured_rate: float | None = None, **inputs: Any) -> Economics:
    """At 2.86 USD for a million tokens, and by tokens per second that are given, unless the inputs say otherwise."""
    usual = {"nodes": 4, "price_per_m": 2.86, "same_as": "none"}
    if {"api_model", "input_per_m", "price_per_m"} & {*inputs}:
        del usual["price_per_m"]
    return economics.judge(Inputs(**{**usual, **inputs}), AT, configured_rate)


asked = st.fixed_dictionaries(
    {"nodes": st.integers(1, 60), "api_spend": st.floats(0, 1e6)},
    optional={
        "price_per_m": st.floats(0.01, 100),
        "node_price": st.floats(0, 1e5),
        "kept": st.floats(0, 1),
        "growth": st.floats(-0.5, 0.2),
        "duty": st.floats(0.05, 1),
        "people_per_month": st.floats(0, 1e5),
        "months": st.integers(1, 60),
        "model_class": st.sampled_from([*CLASSES, "27B", "235B-A22B"]),
        "mix": st.sampled_from(["3:1", "1:0", "0:1", "20:1"]),
        "cached": st.floats(0, 0.99),
        "watts": st.floats(0, 500),
        "node_tok_s": st.floats(0.001, 1e9),
        "same_as": st.sampled_from(["none", "gpt-oss-20b"]),
        "chip": st.sampled_from(["M4 Pro", "Apple M3 Ultra"]),
    },
)


def settled(figures: dict[str, Any]) -> dict[str, Any]:
    """With the memory that a chip is sold with."""
    sizes = {"M4 Pro": 24.0, "Apple M3 Ultra": 256.0}
    return {**figures, "memory": sizes[figures["chip"]]} if "chip" in figures else figures


# properties


@settings(max_examples=40)
@given(asked)
def test_break_even_is_the_first_month_without_a_loss(figures: dict[str, Any]) -> None:
    found = judged(**settled(figures))
    balances = [m.balance for m in found.months]
    assert found.break_even == next((n for n, balance in enumerate(balances, 1) if balance >= 0), None)
    assert found.total_saving == balances[-1]
    page = economics_page.page(found)
    assert page.lead == found.sentence
    text = markdown.render(page).decode()
    assert not re.search(r"(?<![\d.,])1 (nodes|months)\b|\de\+\d|\bnan\b|\binf\b|None", text)
    assert json.loads(msgspec.json.encode(found))["verdict"] == found.verdict


@settings(max_examples=40)
@given(asked)
def test_what_is_saved_never_exceeds_what_the_nodes_can_carry(figures: dict[str, Any]) -> None:
    found = judged(**settled(figures))
    price, carried = found.figures.price_per_m / 1e6, found.figures.capacity_tok
    for month in found.months:
        saved = float(month.api_only - month.with_rack + found.running)
        assert saved <= carried * price + 0.02 + 1e-9 * saved
        assert month.moved_tok <= carried + 1
        assert month.moved_tok <= month.wanted_tok
    assert found.load.moved_tok <= found.figures.full_tok * found.load.most_busy + 1


@settings(max_examples=40)
@given(asked, st.floats(1, 10))
def test_more_spend_pays_back_no_later_with_the_same_nodes(figures: dict[str, Any], times: float) -> None:
    figures = settled(figures)
    first = judged(**figures)
    other = judged(**{**figures, "api_spend": figures["api_spend"] * times})
    assert (other.break_even or math.inf) <= (first.break_even or math.inf)


@settings(max_examples=40)
@given(asked)
def test_twice_the_nodes_carry_no_less(figures: dict[str, Any]) -> None:
    figures = settled(figures)
    one, two = judged(**figures), judged(**{**figures, "nodes": 2 * figures["nodes"]})
    assert two.load.capacity_tok == pytest.approx(2 * one.load.capacity_tok, abs=1)
    assert two.load.moved_tok >= one.load.moved_tok


@settings(max_examples=40)
@given(asked)
def test_a_figure_that_was_given_is_no_assumption_and_every_other_one_is(figures: dict[str, Any]) -> None:
    figures = settled(figures)
    found = economics.judge(Inputs(**figures), AT)
    assumed = [one.name for one in found.assumptions]
    assert not {*assumed} & {*figures}
    assert len(assumed) == len({*assumed})
    assert all(one.source for one in found.assumptions)
    known = {*assumed, *figures}
    derived = {"tokens", "input_per_m", "cached_per_m", "output_per_m", "api_model", "usd_rate", "kv_kib_per_tok"}
    assert {*Inputs.__struct_fields__} - known - derived <= {"same_as"}, "same_as: a class without an example"


# capacity


def test_capacity_follows_from_the_chip_the_class_and_the_mix() -> None:
    found = judged(api_spend=12_000, chip="M4 Pro", memory=64, model_class="8B", mix="3:1", duty=0.5)
    chip, active = chips.find("M4 Pro"), CLASSES["8B"][1] * 1e9
    assert chip is not None
    prefill_s = 1 / chip.prefill_tok_s(64, active)
    decode_s = 1 / chip.decode_tok_s(64, active * BITS_PER_WEIGHT / 8) / BATCHED
    expected = 1 / (0.75 * prefill_s + 0.25 * decode_s)
    assert found.figures.node_tok_s == pytest.approx(expected)
    assert found.load.capacity_tok == pytest.approx(4 * expected * MONTH_S * CAP * 0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "faster"),
    [
        ({"model_class": "32B"}, False),
        ({"model_class": "30B-A3B"}, True),
        ({"cached": 0.5}, True),
        ({"mix": "1:0"}, True),
        ({"mix": "1:3"}, False),
        ({"bits": 8.5}, False),
        ({"chip": "M5 Pro", "memory": 64, "watts": 60}, True),
        ({"duty": 1.0}, True),
        ({"node_tok_s": 1000}, True),
    ],
)
def test_what_makes_a_node_carry_more(changes: dict[str, Any], faster: bool) -> None:
    first, other = judged(api_spend=1e6), judged(api_spend=1e6, **changes)
    assert (other.load.capacity_tok > first.load.capacity_tok) == faster


def test_bits_slow_decode_alone() -> None:
    """Prefill is bound by compute, which the number of parameters decides."""
    prompts = [judged(api_spend=1e6, mix="1:0", bits=bits).load.capacity_tok for bits in (4.5, 9)]
    answers = [judged(api_spend=1e6, mix="0:1", bits=bits).load.capacity_tok for bits in (4.5, 9)]
    assert prompts[0] == prompts[1]
    assert answers[0] == pytest.approx(2 * answers[1])


def test_half_a_million_on_one_node_saves_what_one_node_can_carry() -> None:
    found = judged(api_spend=500_000, nodes=1)
    monthly = found.months[0].api_only - found.months[0].with_rack + found.running
    assert Decimal(100) < monthly < Decimal(1_000)
    assert found.total_saving < 36_000
    assert found.load.nodes_needed == math.ceil(found.load.wanted_tok / found.load.capacity_tok)
    assert f"would need {found.load.nodes_needed:,} nodes" in found.sentence
    assert "1 node can carry" in found.sentence


def test_a_model_that_does_not_fit_is_not_bought() -> None:
    found = judged(api_spend=12_000, chip="M4", memory=16, model_class="70B")
    assert (found.verdict, found.reasons) == ("do_not_buy", ("does_not_fit",))
    assert "needs 51.0 GB" in found.sentence
    assert (found.load.moved_tok, found.load.nodes_needed, found.break_even) == (0, None, None)
    assert judged(api_spend=12_000, chip="M4 Pro", memory=64, model_class="70B").reasons != ("does_not_fit",)


def test_the_classes_are_the_models_that_are_recommended() -> None:
    """Figures of the same models stand in the agent's table."""
    table = {(m.params_b, m.active_b): m for m in recommended.MODELS}
    for name, (params_b, active_b, kv_kib, _) in CLASSES.items():
        if name == "8B":
            continue  # Llama's, which most hosts have
        shape = table[params_b, active_b].shape
        assert kv_kib == kv_bytes(shape, rows=1, row_tok=1024, chunk_tok=512) / 1024 / 1024, name


# price and volume


def test_two_of_spend_tokens_and_price_give_the_third() -> None:
    by_price = judged(api_spend=2_860)
    assert by_price.figures.tokens == pytest.approx(1e9)
    assert judged(tokens=1e9).figures.api_spend == pytest.approx(2_860)
    implied = economics.judge(Inputs(nodes=4, api_spend=2_860, tokens=1e9), AT)
    assert implied.figures.price_per_m == pytest.approx(2.86)
    assert "price_per_m" not in {one.name for one in implied.assumptions}
    assert judged(api_spend=2_860, tokens=1e9).figures == judged(api_spend=2_860, tokens=1e9, price_per_m=2.8).figures


def test_a_price_may_be_that_of_prompt_and_answer_or_of_a_model() -> None:
    split = judged(tokens=1e9, input_per_m=2.5, output_per_m=10, mix="3:1")
    assert split.figures.price_per_m == pytest.approx(4.375)
    cached = judged(tokens=1e9, input_per_m=2.5, cached_per_m=1.25, output_per_m=10, mix="3:1", cached=0.5)
    assert cached.figures.price_per_m == pytest.approx(0.75 * 1.875 + 0.25 * 10)
    undiscounted = judged(tokens=1e9, input_per_m=2.5, output_per_m=10, mix="3:1", cached=0.5)
    assert "cached_per_m" in {one.name for one in undiscounted.assumptions}
    model = judged(tokens=1e9, api_model="openai/gpt-4o", mix="3:1")
    one = api_prices.price("openai", "gpt-4o", requests=1, prompt_tok=750, cached_tok=0, completion_tok=250, at=AT)
    assert one is not None
    assert model.figures.price_per_m == pytest.approx(float(one) * 1e3)
    assumed = economics.judge(Inputs(nodes=4, tokens=1e9), AT)
    assert assumed.figures.price_per_m == model.figures.price_per_m
    assert "price_per_m" in {one.name for one in assumed.assumptions}


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({}, "give api-spend or tokens"),
        ({"api_spend": -1}, "api-spend: must not be below zero"),
        ({"api_spend": 1e16}, "api-spend: must be at most"),
        ({"api_spend": math.nan}, "finite"),
        ({"api_spend": 1, "nodes": 0}, "nodes: must be from 1"),
        ({"api_spend": 1, "nodes": 10**9}, "nodes: must be from 1 to 100,000"),
        ({"api_spend": 1, "kept": 1.5}, "kept: must be from 0 to 1"),
        ({"api_spend": 1, "cached": 1}, "cached: must be from 0 to 0.999"),
        ({"api_spend": 1, "months": 0}, "months: must be from 1 to 240"),
        ({"api_spend": 1, "growth": -0.6}, "growth"),
        ({"api_spend": 1, "watts": -5, "setup": -1}, "setup: must not be below zero; watts: must not be below zero"),
        ({"api_spend": 1, "price_per_m": 0}, "price of zero"),
        ({"tokens": 1, "price_per_m": 1e-9}, "is not a price"),
        ({"api_spend": 1, "tokens": 0}, "for no tokens"),
        ({"api_spend": 800, "tokens": 1e8}, "leave one of the three out"),
        ({"api_spend": 0, "tokens": 1e8}, "leave one of the three out"),
        ({"api_spend": 1, "price_per_m": 1, "api_model": "openai/gpt-4o"}, "give one of"),
        ({"api_spend": 1, "input_per_m": 1}, "needed together"),
        ({"api_spend": 1, "api_model": "gpt-4o"}, "write it like openai/gpt-4o"),
        ({"api_spend": 1, "api_model": "openai/gpt-nowhere"}, "has no price for api-model"),
        ({"api_spend": 1, "same_as": "no-such-model"}, "no price for any host"),
        ({"api_spend": 1, "model_class": "huge"}, "give a size like 27B"),
        ({"api_spend": 1, "model_class": "8B-A30B"}, "give a size like 27B"),
        ({"api_spend": 1, "mix": "3"}, "like 3:1"),
        ({"api_spend": 1, "mix": "0:0"}, "like 3:1"),
        ({"api_spend": 1, "mix": "-1:2"}, "like 3:1"),
        ({"api_spend": 1, "currency": "euro"}, "three letters"),
        ({"api_spend": 1, "usd_rate": 0.9}, "another currency than USD"),
        ({"api_spend": 1e15, "growth": 1, "months": 240}, "overflow"),
    ],
)
def test_impossible_and_contradictory_figures_are_rejected(inputs: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        judged(**inputs)


def test_dollars_are_not_taken_for_another_currency() -> None:
    with pytest.raises(Refused, match="give --node-price in EUR, --electricity-per-kwh in EUR"):
        judged(api_spend=1_000, currency="EUR")
    with pytest.raises(Refused, match="API hosts are in USD"):
        judged(api_spend=1, currency="EUR", node_price=1, electricity_per_kwh=0.3, same_as="qwen3-14b")
    plain = judged(api_spend=1_000, currency="EUR", node_price=1_800, electricity_per_kwh=0.3, same_as=None)
    assert (plain.alike, plain.rules, plain.rule_of_thumb) == (None, (), "")
    assert "EUR" in plain.sentence
    dollars = judged(api_spend=1_000, same_as="gpt-oss-20b")
    euros: dict[str, Any] = {"api_spend": 1_000, "same_as": "gpt-oss-20b", "currency": "EUR"}
    for found in (judged(**euros, usd_rate=0.8), judged(0.8, **euros)):
        assert found.figures.node_price == 1_600
        assert found.figures.electricity_per_kwh == pytest.approx(0.12)
        assert found.rules[0].api_spend == 4_000
        assert found.alike is not None
        assert dollars.alike is not None
        assert found.alike.per_m == pytest.approx(dollars.alike.per_m * 0.8)
    assert "usd_rate" in {one.name for one in judged(0.8, api_spend=1, currency="EUR").assumptions}


# verdict


@pytest.mark.parametrize(
    ("inputs", "verdict", "reason", "said"),
    [
        ({"api_spend": 12_000}, "buy", "pays_back", "Buy. 4 nodes break even in month"),
        ({"api_spend": 12_000, "nodes": 1}, "buy", "pays_back", "Buy. 1 node breaks even in month"),
        ({"api_spend": 300}, "do_not_buy", "never_pays_back", "4 nodes do not pay for themselves within 36 months"),
        (
            {"api_spend": 9, "nodes": 1},
            "do_not_buy",
            "never_pays_back",
            "1 node does not pay for itself within 36 months",
        ),
        ({"api_spend": 9_000, "months": 1}, "do_not_buy", "never_pays_back", "within 1 month; balance"),
        ({"api_spend": 0}, "do_not_buy", "nothing_to_save", "No cost of an API would move"),
        ({"tokens": 0}, "do_not_buy", "nothing_to_save", "No cost of an API would move"),
        ({"tokens": 1e9, "price_per_m": 0}, "do_not_buy", "nothing_to_save", "No cost of an API would move"),
        ({"api_spend": 12_000, "kept": 0}, "do_not_buy", "nothing_to_save", "No cost of an API would move"),
        ({"api_spend": 12_000, "nodes": 10_000}, "do_not_buy", "never_pays_back", "24 nodes would carry the work"),
        (
            {"api_spend": 3_000, "growth": -0.5, "nodes": 1, "node_price": 300, "people_per_month": 100},
            *("do_not_buy", "lost_again", "after 36 months the balance is negative again"),
        ),
        ({"api_spend": 1_000, "nodes": 2, "months": 6}, "marginal", "fragile", "if one of these is a fifth worse: "),
        (
            {"api_spend": 12_000, "same_as": "llama-3.1-8b"},
            *("marginal", "hosts_below_total", "what is saved comes from using another model"),
        ),
        (
            {"api_spend": 12_000, "same_as": "llama-3.1-8b", "people_per_month": 500},
            *("do_not_buy", "hosts_below_running", "running the rack 18,947 USD"),
        ),
        (
            {"api_spend": 900, "growth": 0.1, "months": 60},
            "buy",
            "pays_back",
            "on more is to move than 4 nodes can carry",
        ),
    ],
)
def test_the_verdict_and_its_sentence_follow_from_the_reason(
    inputs: dict[str, Any], verdict: str, reason: str, said: str
) -> None:
    found = judged(**inputs)
    assert (found.verdict, found.reasons[0]) == (verdict, reason)
    assert said in found.sentence
    assert found.sentence.startswith({"buy": "Buy. ", "marginal": "Marginal. ", "do_not_buy": "Do not buy. "}[verdict])


def test_the_busy_share_of_break_even_is_that_of_a_purchase_that_just_pays() -> None:
    found = judged(api_spend=1e6, months=24, people_per_month=300)
    share = found.load.break_even_busy
    assert share is not None
    tokens = share * found.figures.full_tok
    just = judged(tokens=tokens, kept=1, months=24, people_per_month=300, duty=1)
    assert just.load.busy == pytest.approx(share)
    assert abs(just.total_saving) < 1
    for name, above in (("llama-3.1-8b", True), ("llama-3.3-70b", False)):
        compared = judged(api_spend=1e6, same_as=name)
        assert compared.alike is not None
        assert compared.alike.below_busy is not None
        assert (compared.alike.below_busy > 1) == above
        assert ("% would be needed" in markdown.render(economics_page.page(compared)).decode()) == above
    assert judged(api_spend=0, same_as="none").alike is None


def test_what_it_hinges_on_is_what_moves_it() -> None:
    found = judged(api_spend=500_000)
    assert found.hinges[0].swing >= found.hinges[-1].swing
    by_name = {one.name: one for one in found.hinges}
    assert by_name["api_spend"].swing == 0, "the nodes are full"
    assert by_name["duty"].lower is not None
    assert by_name["duty"].higher is not None
    assert by_name["duty"].lower > by_name["duty"].higher


# rules of thumb


def test_the_rules_of_thumb_come_out_with_the_staff_that_is_said() -> None:
    found = judged(api_spend=12_000)
    assert [rule.month for rule in found.rules] == [12, 6, 1]
    assert [round(rule.people_per_month or 0, -1) for rule in found.rules] == [3_650, 10_640, 23_950]
    for rule in found.rules:
        wide = judged(
            api_spend=rule.api_spend,
            nodes=rule.nodes,
            people_per_month=float(rule.people_per_month or 0),
            node_tok_s=1e6,
        )
        assert wide.break_even == rule.months, "by nodes that can carry it"
        assert rule.wanted_tok == pytest.approx(rule.api_spend * 0.8 / 2.86 * 1e6, rel=1e-6)
        assert rule.capacity_tok < rule.wanted_tok
        narrow = judged(api_spend=rule.api_spend, nodes=rule.nodes)
        assert rule.nodes_needed == narrow.load.nodes_needed
        assert rule.capacity_tok == narrow.load.capacity_tok
        if rule.people_within_capacity is not None:
            people = float(rule.people_within_capacity)
            within = judged(api_spend=rule.api_spend, nodes=rule.nodes, people_per_month=people)
            assert within.break_even == rule.months
    assert found.rules[2].people_within_capacity is None, "eight nodes do not pay in a month by what they can carry"
    text = markdown.render(economics_page.page(found)).decode()
    assert "they cannot carry what is to move at 5,000, 15,000, 50,000 a month" in text
    fast = markdown.render(economics_page.page(judged(api_spend=12_000, node_tok_s=1e6))).decode()
    assert "they cannot carry" not in fast


@pytest.mark.parametrize(
    ("spend", "near"), [(12_000, 15_000), (15_000, 15_000), (90_000, 50_000), (1, 5_000), (8_000, 5_000), (0, None)]
)
def test_the_nearest_rule_says_for_which_spend_it_is(spend: float, near: int | None) -> None:
    found = judged(api_spend=spend)
    if near is None:
        assert (found.nearest_rule, found.rule_of_thumb) == (None, "")
        return
    assert found.nearest_rule is not None
    assert found.rules[found.nearest_rule].api_spend == near
    assert f"at {near:,} a month" in found.rule_of_thumb
    assert f"Asked for: {spend:,} a month and 4 nodes" in found.rule_of_thumb
    assert "about" not in found.rule_of_thumb


# page and command line


def test_the_curve_has_an_axis_a_mark_and_a_name() -> None:
    found = judged(api_spend=12_000)
    text = html.render(economics_page.page(found)).decode()
    drawing = text[text.index("<svg") : text.index("</svg>")]
    assert 'role="img"' in drawing
    assert (
        f"<title>Saved less paid, the start to month 36; balance: -8,000 USD to {found.total_saving:,.0f} USD; "
        in drawing
    )
    assert f">break-even: month {found.break_even}</text>" in drawing
    assert ">month 12</text>" in drawing
    assert ">0</text>" in drawing
    assert "e+0" not in text
    assert f"balance: {found.total_saving:,.0f} USD" in text
    never = html.render(economics_page.page(judged(api_spend=1))).decode()
    assert "break-even: month" not in never
    assert "Break-even: month" in markdown.render(economics_page.page(found)).decode()


@given(st.floats(-1e15, 1e15), st.floats(-1e15, 1e15))
def test_the_axis_is_a_few_round_numbers_around_every_value(a: float, b: float) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    assume(high - low > 1e-6 or high == low)
    marks = chart.ticks(low, high)
    steps = {round((y - x) / (marks[1] - marks[0]), 6) for x, y in itertools.pairwise(marks)}
    assert steps == {1.0}
    assert 2 <= len(marks) <= 7
    assert 0.0 in marks
    assert marks[0] <= low + 1e-9 * (high - low)
    assert marks[-1] >= high - 1e-9 * (high - low)


@pytest.mark.parametrize("values", [(0.0,), (0.0, 0.0), (-5.0, -5.0), (5.0,), (1e15, -1e15), (0.001, 0.002)])
def test_a_curve_of_few_or_odd_values_is_drawn(values: tuple[float, ...]) -> None:
    labels = tuple(f"<{n}>" for n in range(len(values)))
    drawing = chart.svg(Curve(title="<t>", labels=labels, lines=(("y", values),), mark=0, mark_text="<m>"))
    assert "nan" not in drawing
    assert "&lt;m&gt;" in drawing
    assert "<t>" not in drawing
    assert chart.svg(Curve(title="t", labels=(), lines=())) == ""


def test_what_nobody_gave_is_listed_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["economics", "--api-spend", "12k", "--nodes", "4", "--watts", "45"]
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["inputs"] == {"nodes": 4, "api_spend": 12_000.0, "watts": 45.0}
    assumed = {one["name"]: one for one in told["assumptions"]}
    assert assumed["electricity_per_kwh"]["value"] == 0.15
    assert assumed["node_price"]["value"] == 2_000
    assert "watts" not in assumed
    assert told["figures"]["watts"] == 45
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assumptions, _, given_ones = text.partition("## Assumed")[2].partition("## Given")
    assert "| `--node-price` | 2,000.00 USD |" in assumptions
    assert "| `--watts` | 45 W |" in given_ones
    assert "--watts" not in assumptions


def test_tokens_may_be_written_short(capsys: pytest.CaptureFixture[str]) -> None:
    for text, tokens in (("500M", 5e8), ("1.5b", 1.5e9), ("2e9", 2e9), ("70000k", 7e7)):
        assert cli.main(["economics", "--tokens", text, "--nodes", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["figures"]["tokens"] == tokens
    for text in ("", "M", "ten", "5X"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["economics", "--tokens", text, "--nodes", "2"])
        assert ended.value.code == 64


def test_the_rate_of_the_configuration_holds_for_its_currency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "aggregator.toml"
    monkeypatch.setenv(cli.CONFIG_VARIABLE, str(file))
    words = ["economics", "--api-spend", "12000", "--nodes", "4", "--json", "--currency"]
    assert cli.main([*words, "EUR"]) == 1, "no configuration"
    file.write_text('rack = "r"\n[store]\nkind = "directory"\npath = "x"\n[cost]\ncurrency = "EUR"\nusd_rate = 0.5\n')
    capsys.readouterr()
    assert cli.main([*words, "EUR"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["figures"]["node_price"] == 1_000
    assert {"name": "usd_rate", "value": 0.5, "source": "cost.usd_rate of the configuration"} in told["assumptions"]
    assert cli.main([*words, "PLN"]) == 1, "a rate of another currency"
    assert cli.main([*words, "USD"]) == 0
    file.write_text("broken")
    assert cli.main([*words, "USD"]) == 0, "economics needs no configuration"


def test_other_verbs_do_not_wait_for_what_economics_needs() -> None:
    heavy = "numpy", "highspy", "genai_prices", "jinja2"
    words = f"import sys, aggregator.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", words], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_help_explains_the_inputs_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["economics", "--help"])
    text = capsys.readouterr().out
    for title in (
        "the API work of today",
        "what moves to the nodes",
        "the nodes",
        "other costs",
        "horizon and currency",
    ):
        assert title in text
    for name in Inputs.__struct_fields__:
        assert f"--{name.replace('_', '-')}" in text
    helps = {name: told for flags in cli_economics.GROUPS.values() for name, told in flags.items()}
    assert {*helps} == {*Inputs.__struct_fields__}
    assumed = {one.name: one.value for one in economics.judge(Inputs(nodes=1, api_spend=1), AT).assumptions}
    said = {name: re.search(r"\(default: ([\d.:A-Z]+)(?: USD)?\)", told) for name, told in helps.items()}
    stated = {name: found[1] for name, found in said.items() if found}
    assert len(stated) == 14
    for name, value in stated.items():
        assert str(assumed[name]) in (value, f"{value}.0"), name
