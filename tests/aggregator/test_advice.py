"""One judge: evictions, placement and recommendations never contradict each other."""

import random
import re
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import advice, cost
from aggregator.annotations import Annotation
from aggregator.calendar import HOUR_MS, Span
from aggregator.config import AggregatorConfig
from aggregator.judgements import Judged, judge
from aggregator.report.page import Page
from aggregator.report.pages import evictions as evictions_page
from aggregator.report.pages import placement as placement_page
from shared.batch import Batch
from shared.records import (
    AgentStarted,
    EngineWindow,
    HostSample,
    ModelEvicted,
    ModelMissed,
    PeerDown,
    Record,
    Resident,
    Served,
)
from tests.builders import MINUTE, T0, batch, window

GB = 10**9
NODES = tuple(f"n{n}" for n in range(1, 5))


def config(**more: object) -> AggregatorConfig:
    nodes = [{"id": node, "price": 1999.0} for node in NODES]
    return msgspec.convert({"rack": "r", "store": {"path": "x"}, "nodes": nodes, **more}, AggregatorConfig)


def host(budget: int = 50, total: int | None = None, hot: float = 0.0) -> HostSample:
    return HostSample(
        memory_budget_bytes=budget * GB,
        memory_total_bytes=total * GB if total is not None else None,
        thermal_known_us=60_000_000,
        throttled_us=int(hot * 60_000_000),
    )


def stands(model: str, need: int = 6, *, pinned: bool = False, version: str = "") -> Resident:
    return Resident(model=model, version=version or f"v-{model}", state="ready", need_bytes=need * GB, pinned=pinned)


def works(model: str, busy_s: float = 1.0, version: str = "") -> EngineWindow:
    return EngineWindow(model=model, version=version or f"v-{model}", busy_decode_us=int(busy_s * 1e6), decode_tok=10)


def evicted(minute: float, model: str, by: str = "", need: int = 6, rate: int = 0) -> ModelEvicted:
    return ModelEvicted(
        t_ms=T0 + int(minute * MINUTE),
        model=model,
        version=f"v-{model}",
        reason="memory",
        for_model=by,
        bytes=need * GB,
        requests_last_hour=rate,
    )


def missed(minute: float, model: str) -> ModelMissed:
    return ModelMissed(
        t_ms=T0 + int(minute * MINUTE), model=model, version=f"v-{model}", reason="memory", after_us=1_000_000
    )


def down(peer: str, minute: int, seen: int) -> PeerDown:
    return PeerDown(t_ms=T0 + minute * MINUTE, peer=peer, last_seen_ms=T0 + seen * MINUTE)


def minutes(node: str, *records: Record, since: int = 0, count: int = 10) -> list[Batch]:
    return [batch(list(records), node=node, minute=since + n) for n in range(count)]


def judged(*made: Batch, settings: AggregatorConfig | None = None, notes: Sequence[Annotation] = ()) -> Judged:
    until = max(b.t_end_ms for b in made)
    return judge(window(*made), None, settings or config(), until, notes)


def kinds(report: Judged, model: str) -> set[tuple[str, str]]:
    return {(c.kind, c.node) for c in report.distribution.conclusions if c.model == model}


def texts(report: Judged) -> list[str]:
    return [one.text for one in report.recommendations]


def words(page: Page) -> str:
    parts = [page.title, page.lead, page.foot]
    for section in page.sections:
        rows = section.table.rows if section.table else ()
        parts += [section.title, *section.text, *section.points, *(cell for row in rows for cell in row)]
    return "\n".join(parts)


# what to do about a model that was evicted without need


def pushed_out(by: str = "b", need: int = 6, total: int | None = None, budget: int = 50) -> list[Batch]:
    """``a`` leaves ``n1`` for ``b``, is wanted again, and is back at the end."""
    return [
        *minutes("n1", host(budget, total), stands("a", need), stands("c", 6), count=5),
        batch([host(budget, total), stands("c", 6), stands(by, need), evicted(5, "a", by, need), missed(5.5, "a")],
              minute=5),
        *minutes("n1", host(budget, total), stands("a", need), stands("c", 6), since=6, count=5),
    ]  # fmt: skip


def test_a_model_that_a_node_had_room_for_is_pinned_there_and_nothing_is_bought() -> None:
    report = judged(*pushed_out())
    assert kinds(report, "a") == {("pin", "n1")}
    (one,) = [c for c in report.distribution.conclusions if c.kind == "pin"]
    assert one.room_bytes == (50 - 18) * GB
    assert texts(report)[0] == "pin a on n1"
    assert "32.0 GB stay free on n1" in report.recommendations[0].because
    assert not report.distribution.rebalance
    assert report.distribution.lead == "No model has to move; a should be pinned."
    (row,) = report.evictions.rows
    assert (row.remedy, row.verdict) == ("pin", "placement")
    assert row.hint == f"wanted again after 30 s: {one.text}"
    assert not any(one.kind == "capacity" for one in report.recommendations)


@pytest.mark.parametrize(
    ("budget", "total", "kind"),
    [
        (18, None, "pin"),  # exactly as much as was wanted
        (17, None, "move"),  # b gets its place where there is room
        (17, 24, "move"),  # two thirds of its memory are less
        (17, 27, "budget"),
    ],
)
def test_the_budget_decides_and_then_the_memory(budget: int, total: int | None, kind: str) -> None:
    made = [*pushed_out(budget=budget, total=total), *minutes("n2", host(20), count=11)]
    report = judged(*made)
    found = {c.model: c for c in report.distribution.conclusions}
    assert (found["b"] if kind == "move" else found["a"]).kind == kind
    assert report.distribution.rebalance == (kind == "move")
    if kind == "budget":
        assert found["a"].budgets == (18 * GB,)
        assert report.distribution.short[0].endswith("raise memory.budget_bytes of n1 from 17.0 to 18.0 GB.")
    if kind == "move":
        assert found["b"].nodes == ("n2",)
        assert found["a"].kind == "fits", "once b stands elsewhere"


def test_what_no_node_has_memory_for_is_said_once_for_all_models_with_what_is_missing() -> None:
    made = []
    for node, model in (("n1", "a"), ("n2", "b")):
        made += [
            *minutes(node, host(10), stands(f"{model}2", 9), count=5),
            batch([host(10), stands(f"{model}2", 9), evicted(5, model, f"{model}2", 8, rate=60)], node=node, minute=5),
            *minutes(node, host(10), stands(f"{model}2", 9), since=6, count=5),
        ]
    report = judged(*made)
    (one,) = [r for r in report.recommendations if r.kind == "capacity"]
    assert (one.models, one.text) == (("a", "b"), "add 2 more nodes of 10.0 GB for models, or drop b")
    assert one.because == "Not enough memory for 1 x a, 1 x b (16.0 GB)"
    assert {row.remedy for row in report.evictions.rows} == {"capacity"}
    assert "no node has room for it" in report.evictions.rows[0].hint
    # with larger budgets allowed, there is nothing to buy
    raised = judged(*(_with_total(one, 40 * GB) for one in made))
    assert not [r for r in raised.recommendations if r.kind == "capacity"]
    assert [t for t in texts(raised) if "budget_bytes" in t] == [
        "raise memory.budget_bytes of n1 from 10.0 to 17.0 GB",
        "raise memory.budget_bytes of n2 from 10.0 to 17.0 GB",
    ]


def _with_total(one: Batch, total: int) -> Batch:
    records = [
        msgspec.structs.replace(r, memory_total_bytes=total) if isinstance(r, HostSample) else r for r in one.records
    ]
    return msgspec.structs.replace(one, records=tuple(records))


def test_a_model_that_other_nodes_serve_is_left_to_them() -> None:
    first = [
        *minutes("n1", host(10), stands("a", 6), count=5),
        batch([host(10), stands("b", 8), evicted(5, "a", "b", 6, rate=60)], minute=5),
        *minutes("n1", host(10), stands("b", 8), since=6, count=5),
    ]
    report = judged(*first, *minutes("n2", host(10), stands("a", 6), count=11))
    assert kinds(report, "a") == {("leave", "n1")}
    assert "take a off n1" in texts(report)
    assert not report.distribution.rebalance


def test_what_fits_only_with_a_node_that_is_away_is_no_capacity() -> None:
    gone = minutes("n2", host(10), stands("c", 8), count=2)
    report = judged(*minutes("n1", host(10), stands("a", 9), count=60), *gone)
    assert [c.kind for c in report.distribution.conclusions if c.model == "c"] == ["restore"]
    assert not [r for r in report.recommendations if r.kind == "capacity"]
    (one,) = [r for r in report.recommendations if r.topic == "silent"]
    assert one.text == "look at n2, or give its retirement date in [[nodes]]"
    assert "Not enough memory for 1 x c (8.0 GB) while n2 is away" in one.because


def test_a_rack_of_which_every_node_is_away_gets_a_look_and_nothing_else() -> None:
    made = [
        *minutes(
            "n1", host(10), stands("a", 9), PeerDown(t_ms=T0 + 9 * MINUTE, peer="n2", last_seen_ms=T0 + 5 * MINUTE)
        ),
        *minutes("n2", host(10), PeerDown(t_ms=T0 + 9 * MINUTE, peer="n1", last_seen_ms=T0 + 10 * MINUTE), count=5),
    ]
    report = judge(window(*made), None, config(), T0 + 600 * MINUTE)
    assert {r.topic for r in report.recommendations} == {"silent"}
    assert not report.distribution.moves
    assert not report.distribution.short
    assert "No node reports any more" in report.distribution.lead


# placed models


def test_requests_and_work_of_a_placed_model_are_its_own_and_those_of_all_its_versions() -> None:
    def asked(model: str, version: str, requests: int) -> Served:
        return Served(model=model, version=version, worker="n1", requests=requests, finish="stop")

    work: list[Record] = [works("b", 12, "v1"), works("a", 6, "v1")]
    lost = msgspec.structs.replace(asked("a", "v1", 7), outcome="failed")
    first: list[Record] = [stands("a", version="v1"), asked("a", "v1", 5), asked("b", "v1", 2), lost]
    then: list[Record] = [stands("a", version="v2"), works("a", 6, "v2"), asked("a", "v2", 3)]
    other: list[Record] = [host(), stands("b", version="v1")]
    made = [batch([*other, *work, *first]), batch([*other, work[0], *then], minute=1)]
    placed = {p.model: p for p in judged(*made).distribution.placed}
    assert (placed["a"].requests, placed["b"].requests) == (8, 2)
    assert placed["a"].busy_share == pytest.approx(0.1)
    assert placed["b"].busy_share == pytest.approx(0.2)
    assert placed["a"].version == "v2"


def test_names_of_one_loader_are_one_model_in_memory() -> None:
    """A loader reports its work, also when it had none; a name that reports none has no loader of its own."""
    one: list[Record] = [host(), stands("a", 20, version="v1"), works("a", version="v1")]
    one.append(stands("alias", 20, version="v1"))
    report = judged(*minutes("n1", *one))
    (placed,) = report.distribution.placed
    assert (placed.model, placed.names) == ("a", ("alias",))
    assert report.distribution.nodes[0].held_bytes == 20 * GB
    two = judged(*minutes("n1", *one, works("alias", 0.0, "v1")))
    assert two.distribution.nodes[0].held_bytes == 40 * GB


# grouping and order


def restarts(node: str, *minutes_of: int) -> list[Batch]:
    """A node that crashed before each of these minutes, five minutes long."""
    made, begin, epoch = [], 0, 1
    for at in (*minutes_of, 120):
        start: list[Record] = [AgentStarted(t_ms=T0 + begin * MINUTE, version="0", previous="unclean")]
        for n, minute in enumerate(range(begin, at - 5)):
            records = [host(), *(start if epoch > 1 and n == 0 else [])]
            made.append(batch(records, node=node, minute=minute, seq=n + 1, epoch=epoch))
        begin, epoch = at, epoch + 1
    return made


def test_outages_of_several_nodes_are_one_sentence_and_a_single_one_is_not_often() -> None:
    made = [*restarts("n1", 30, 60, 90), *restarts("n2", 30, 60), *restarts("n3", 40), *restarts("n4")]
    found = {r.topic: r for r in judged(*made).recommendations}
    assert found["outages"].text == "find out why n1 (3 outages), n2 (2 outages) went down so often"
    assert found["outage"].text == "find out why n3 (5.0 min) went down once"
    assert found["outage"].nodes == ("n3",)
    planned = Annotation(start_ms=T0, end_ms=T0 + 120 * MINUTE, node="", cause="planned", text="new rack")
    assert not [r for r in judged(*made, notes=[planned]).recommendations if r.topic in ("outage", "outages")]


def test_no_kind_vanishes_where_a_page_is_too_short_and_what_is_left_is_counted() -> None:
    many = [
        *(_one("pin", n) for n in range(40)),
        *(_one("outages", n) for n in range(3)),
        *(_one("memory", n) for n in range(2)),
        _one("spare", 0),
    ]
    found = advice.shown(many, 10)
    assert len(found.rows) == 10
    assert {r.kind for r in found.rows} == {"placement", "operations", "capacity", "retirement"}
    assert found.left == {"placement": 36}
    assert list(found.rows) == [r for r in many if r in found.rows], "in their order"
    assert advice.shown(many, 100) == advice.Shown(rows=tuple(many))
    assert advice.shown([], 3) == advice.Shown(rows=())


def _one(topic: advice.Topic, number: int) -> advice.Recommendation:
    return advice.Recommendation(kind=advice.KINDS[topic], topic=topic, text=f"do {topic} {number}", because="")


def test_a_dear_rack_is_told_what_would_make_it_cheaper_and_buys_nothing_without_a_word() -> None:
    cheap = {"api_prices": [{"model": "a", "name": "host", "input_per_m": 0.0001, "output_per_m": 0.0001}]}
    asked = Served(model="a", version="v-a", worker="n1", requests=9, prompt_tok=900, completion_tok=90, finish="stop")
    made = minutes("n1", host(10), stands("a", 9), works("a", 3.0), asked)
    report = judged(*made, settings=config(**cheap))
    first = report.recommendations[0]
    assert (first.kind, first.topic) == ("money", "dearer")
    assert report.apis.share is not None
    assert report.apis.share < 0
    assert first.text == "move work to API hosts: at its pace this rack cannot reach their price at any utilisation"
    assert report.apis.ours is not None
    assert f"{cost.amount(report.apis.ours, 'USD')} here" in first.because
    near = {"api_prices": [{"model": "a", "name": "host", "input_per_m": 0.3, "output_per_m": 0.3}]}
    report = judged(*made, settings=config(**near))
    assert report.apis.share is not None
    assert report.apis.share < 0
    needed = 0.05 * (1 - report.apis.share)
    assert report.recommendations[0].text.startswith(f"raise utilisation above {needed * 100:.0f} % (it was 5.0 %)")
    short = [*made, *minutes("n2", host(10), stands("b", 9), evicted(5, "c", "b", 9, rate=60))]
    (capacity,) = [r for r in judged(*short, settings=config(**cheap)).recommendations if r.kind == "capacity"]
    assert capacity.text.startswith("serve c from an API host, which costs less than this rack, or add one more node")


def idle(node: str, *models: str, hot: float = 0.0) -> list[Batch]:
    """Eight days in which a node did next to nothing."""
    warm = HostSample(
        memory_budget_bytes=50 * GB, thermal_known_us=21_600 * 10**6, throttled_us=int(hot * 21_600 * 10**6)
    )
    records: list[Record] = [warm, *(stands(m) for m in models), *(works(m) for m in models)]
    six = 6 * HOUR_MS
    return [
        msgspec.structs.replace(
            batch(records, node=node, seq=n + 1), t_start_ms=T0 + n * six, t_end_ms=T0 + (n + 1) * six
        )
        for n in range(32)
    ]


def over_days(*made: Batch) -> list[advice.Recommendation]:
    span = Span("eight days", T0, T0 + 193 * HOUR_MS, "UTC")
    report = judge(window(*made, span=span), None, config(), T0 + 192 * HOUR_MS)
    return [one for one in report.recommendations if one.topic == "spare"]


def test_a_node_is_given_up_only_where_others_have_what_stands_on_it() -> None:
    (one,) = over_days(*idle("n1", "a"), *idle("n2", "a", "b"), *idle("n3"))
    assert (one.nodes, one.text) == (("n1", "n3"), "give n1, n3 another task, or retire them")
    assert one.per_month is not None
    assert one.effect == f"saves {one.per_month:,.2f} USD in a whole month"
    assert not over_days(*idle("n1", "a"), *idle("n2", "b")), "each has the only copy of a model"
    assert not over_days(*idle("n1", "a"))
    (one,) = over_days(*idle("n1", "a"), *idle("n2", "a"))
    assert one.nodes == ("n1",), "one of two copies stays"
    assert not over_days(*idle("n1", "a", hot=0.02), *idle("n2", "a", "b")), "heat is to be dealt with first"
    assert not over_days(*idle("n1", "a")[:20], *idle("n2", "a", "b")), "it is silent"


# no two sections contradict each other, whatever happened


def any_rack(seed: int) -> Judged:
    """A random rack and hour: models that push each other out, nodes that are hot, silent, down or retired, long
    prompts, prices below and above the rack's own, work that was announced."""
    dice = random.Random(f"advice {seed}")
    names = [f"m{n}" for n in range(dice.randint(1, 6))]
    needs = {name: dice.choice((3, 6, 9, 14)) for name in names}
    nodes = NODES[: dice.randint(1, 4)]
    made: list[Batch] = []
    for node in nodes:
        made += _node(dice, node, nodes, names, needs)
    price = dice.choice((0.00001, 0.5, 1000.0))
    prices = [{"model": n, "name": "host", "input_per_m": price, "output_per_m": price} for n in names]
    retired = [{"id": n, "price": 1999.0} | ({"retired": "2026-11-20"} if dice.random() < 0.1 else {}) for n in NODES]
    limits = {"max_moves": dice.choice((0, 1, 6)), "models": [{"model": "m0", "min_copies": dice.choice((1, 2))}]}
    planned = Annotation(start_ms=T0, end_ms=T0 + 90 * MINUTE, node=dice.choice(nodes), cause="planned", text="work")
    settings_ = config(api_prices=prices, nodes=retired, placement=limits)
    until = T0 + dice.choice((60, 61, 80)) * MINUTE
    return judge(window(*made), None, settings_, until, (planned,) if dice.random() < 0.2 else ())


def _node(
    dice: random.Random, node: str, nodes: Sequence[str], names: Sequence[str], needs: dict[str, int]
) -> list[Batch]:
    budget, total = dice.choice((10, 20, 50)), dice.choice((None, 16, 64))
    hot = dice.choice((0.0, 0.0, 0.0, 0.02, 0.1))
    standing = dice.sample(names, dice.randint(0, len(names)))
    while sum(needs[n] for n in standing) > budget:
        standing.pop()
    stop = dice.choice((60, 60, 60, 60, 30, 10))
    pinned = dice.choice([*names, ""])
    made, at = [], 0
    while at < stop:
        records: list[Record] = [host(budget, total, hot)]
        if len(standing) > 0 and dice.random() < 0.15:
            gone, by = dice.choice(standing), dice.choice([*names, ""])
            if by != gone:
                rate = dice.choice((0, 5, 60))
                records.append(evicted(at, gone, by, needs[gone], rate))
                records += [missed(at + dice.choice((1, 20)), gone)] if dice.random() < 0.6 else []
                standing = [n for n in standing if n != gone]
                if by and by not in standing and sum(needs[n] for n in (*standing, by)) <= budget:
                    standing.append(by)
        records += [stands(n, needs[n], pinned=n == pinned) for n in standing]
        records += [works(n, dice.choice((0.1, 4.0, 50.0))) for n in standing]
        records += [_asked(n, node, dice.choice((100, 9000))) for n in standing]
        if dice.random() < 0.02:
            other = dice.choice(nodes)
            records += [down(other, at, at)] if other != node else []
        made.append(batch(records, node=node, minute=at, seq=at + 1))
        at += dice.choice((1, 1, 1, 1, 1, 1, 1, 1, 1, 6))
    return made


def _asked(model: str, node: str, prompt_tok: int) -> Served:
    return Served(
        model=model,
        version=f"v-{model}",
        worker=node,
        requests=2,
        prompt_tok=2 * prompt_tok,
        completion_tok=20,
        finish="stop",
    )


ABOUT_MODELS: tuple[advice.Topic, ...] = ("memory", "budget", "move", "leave", "pin", "blocked", "cache")


def contradictions(report: Judged) -> list[str]:
    """Every pair of statements of a report that cannot both be true."""
    map_, found = report.distribution, []
    mine = {topic: [r for r in report.recommendations if r.topic == topic] for topic in advice.KINDS}
    told = [model for topic in ABOUT_MODELS for r in mine[topic] for model in r.models]
    found += [f"two recommendations for {model}" for model in sorted({m for m in told if told.count(m) > 1})]
    moved = {c.model for c in map_.conclusions if c.kind == "move"}
    if not (map_.rebalance == bool(map_.moves) == bool(moved)) or moved != {
        m.model for m in map_.moves if not m.parked
    }:
        found.append("rebalance, moves and conclusions differ")
    found += [*_evictions(report), *_memory(report), *_nodes(report)]
    well = map_.lead.startswith("Every model stands well")
    aside = [c for c in map_.conclusions if c.kind not in ("fits", "none")]
    if well and (map_.hot or map_.silent or map_.short or aside):
        found.append("every model stands well, but")
    if mine["dearer"] and [r for r in (*mine["memory"], *mine["load"]) if not r.text.startswith("serve ")]:
        found.append("too expensive, but more nodes")
    return found


def _evictions(report: Judged) -> list[str]:
    """Evictions have the remedies of the placement, and add up."""
    kinds_of = {(c.model, c.node): c.kind for c in report.distribution.conclusions}
    found = []
    for row in report.evictions.rows:
        avoidable = row.verdicts.get("placement", 0)
        kind = kinds_of.get((row.model, row.node)) or kinds_of.get((row.model, ""))
        if row.remedy != (kind if avoidable else None):
            found.append(f"{row.model} on {row.node}: {row.remedy} here, {kind} there")
        if avoidable and row.remedy is None:
            found.append(f"{row.model} on {row.node}: nothing is said")
    if sum(report.evictions.remedies.values()) != report.evictions.verdicts.get("placement", 0):
        found.append("remedies do not add up")
    return found


def _memory(report: Judged) -> list[str]:
    """What is bought fits nowhere, what is pinned fits, and settings take memory that is free."""
    map_, found = report.distribution, []
    budgets = {n.node: n.budget_bytes or 0 for n in map_.nodes}
    held = {n.node: n.held_after_bytes for n in map_.nodes}
    needs = {p.model: p.need_bytes for p in map_.placed}
    stand = {(p.model, p.node) for p in map_.placed}
    raised = {n: value for c in map_.conclusions for n, value in zip(c.nodes, c.budgets, strict=False)}
    for short in map_.shortages:
        if short.kind == "memory":
            for model in short.models:
                need = needs.get(model, 10**15)
                free = [n for n in budgets if (model, n) not in stand and budgets[n] - held[n] >= need]
                found += [f"{model} is not placed, but {free} have room"] if free else []
    for node in budgets:
        pins = {c.model for c in map_.conclusions if c.kind == "pin" and c.node == node}
        pins |= {p.model for p in map_.placed if p.pinned and p.node == node and p.advice == "keep"}
        if sum(needs.get(m, 0) for m in pins) > max(budgets[node], raised.get(node, 0)):
            found.append(f"pins do not fit on {node}")
    for node in {s.node for s in map_.settings}:
        wanted = sum(s.value for s in map_.settings if s.node == node)
        found += [f"prompt caches do not fit on {node}"] if wanted > budgets[node] - held[node] else []
    return found


def _nodes(report: Judged) -> list[str]:
    """Nodes that are away, hot or to be given up."""
    map_, found = report.distribution, []
    mine = {topic: [r for r in report.recommendations if r.topic == topic] for topic in advice.KINDS}
    absent = {*map_.silent, *advice.away(report.uptime)}
    advised: tuple[advice.Topic, ...] = ("budget", "move", "pin", "cache", "spare", "outage", "outages")
    targets = {node for topic in advised for one in mine[topic] for node in one.nodes}
    found += [f"{node} is away, but advised" for node in sorted(absent & targets)]
    hot = {n.node for n in report.thermal.nodes if (n.throttled_share or 0) > 0.01}
    spare = {n for r in mine["spare"] for n in r.nodes}
    others = {node for one in report.recommendations if one.topic != "spare" for node in one.nodes}
    found += [f"{node} is given up, but needed" for node in sorted(spare & others)]
    left = {p.model for p in map_.placed if p.node not in spare}
    found += [f"{p.model} is given up" for p in map_.placed if p.node in spare and p.model not in left]
    if spare and (spare & hot or mine["memory"] or mine["load"]):
        found.append("given up, but hot or short")
    return found


ONE = re.compile(r"\b1 (outages|times|nodes|steps|evictions|models|rows|more nodes)\b|because: placement|make room")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_no_two_sections_contradict_each_other(seed: int) -> None:
    report = any_rack(seed)
    assert contradictions(report) == []
    said = [placement_page.page(report.distribution, "r"), evictions_page.page(report.evictions, "r")]
    text = "\n".join([*map(words, said), *(f"{r.text} ({r.because}) {r.effect}" for r in report.recommendations)])
    assert not ONE.search(text)
    weights = [list(advice.KINDS).index(r.topic) for r in report.recommendations]
    assert weights == sorted(weights)
    assert all(r.kind == advice.KINDS[r.topic] for r in report.recommendations)
    assert msgspec.json.decode(msgspec.json.encode(report), type=Judged) == report
