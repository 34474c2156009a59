"""Synthetic weeks and eviction traces with known causes, and the judgements of them."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from aggregator import cost, eviction
from aggregator.calendar import Span
from aggregator.config import AggregatorConfig, Cost
from aggregator.window import Window
from shared.records import ModelEvicted, ModelLoaded, ModelMissed, Record
from tests.builders import batch, window
from tests.made_rack import HOUR_MS, WEEK_MS, Change, MadeModel, MadeRack, batches

MONDAY_MS = 1_793_577_600_000
"""2026-11-02 00:00 UTC."""
WEEKS = (
    Span("2026-W45", MONDAY_MS, MONDAY_MS + WEEK_MS, "UTC"),
    Span("2026-W46", MONDAY_MS + WEEK_MS, MONDAY_MS + 2 * WEEK_MS, "UTC"),
)


WHOLE_RACK = ("throttling", "traffic_drop")


class Week(NamedTuple):
    """A pair of weeks of one rack: the injected changes, their model, and the judgement of each model: whether it is
    flagged, why, and by how much the price that changed most did."""

    causes: tuple[str, ...]
    model: str
    said: dict[str, tuple[bool, str, float]]

    @property
    def near(self) -> bool:
        """Whether a price changed by a ratio within 10 % of the one that is flagged."""
        return any(abs(ratio / FLAG_RATIO - 1) <= 0.1 for _, _, ratio in self.said.values())


FLAG_RATIO = Cost().flag_ratio


def rack(seed: int, causes: Sequence[str], figures: dict[str, Any]) -> tuple[MadeRack, str]:
    """A random rack, and the model that the causes affect."""
    dice = random.Random(f"rack {seed}")
    nodes = tuple(f"n{n}" for n in range(1, dice.choice(figures["nodes"]) + 1))
    models = tuple(
        MadeModel(
            name=f"m{n}",
            per_hour=dice.uniform(*figures["per_hour"]),
            prompt_tok=dice.uniform(*figures["prompt_tok"]),
            answer_tok=dice.uniform(*figures["answer_tok"]),
            share=dice.uniform(*figures["share"]),
        )
        for n in range(dice.choice(figures["models"]))
    )
    hit = dice.choice(models).name
    strength = dice.uniform(*figures["strength"])
    # heat and low traffic affect a whole rack, not one of its models
    changes = tuple(
        Change(cause=cause, since_ms=WEEKS[1].since_ms, strength=strength, model="" if cause in WHOLE_RACK else hit)
        for cause in causes
    )
    made = MadeRack(
        seed=seed,
        nodes=nodes,
        models=models,
        since_ms=MONDAY_MS,
        window_ms=HOUR_MS,
        faults=figures["faults"],
        wander=figures["wander"],
        changes=changes,
    )
    return made, hit


def judged(seed: int, causes: Sequence[str], figures: dict[str, Any]) -> Week:
    """The second week compared with the first."""
    made, hit = rack(seed, causes, figures)
    all_batches = [b for node in made.nodes for b in batches(made, node, WEEKS[1].until_ms)]
    config = msgspec.convert(
        {"rack": "r", "store": {"path": "x"}, "nodes": [{"id": n, "price": 1999.0} for n in made.nodes]},
        AggregatorConfig,
    )
    first, second = (window(*all_batches, span=span) for span in WEEKS)
    report = cost.compute(second, config, cost.compute(first, config))
    changes = {m.model: m.change for m in report.models if m.change is not None}
    said = {model: (c.flagged, c.cause, max(c.ratio, c.direct_ratio)) for model, c in changes.items()}
    return Week(tuple(causes), hit, said)


def right(week: Week) -> bool | None:
    """Whether a flagged week names its cause, or one of its two; None where nothing doubled and there is none to
    name."""
    flagged = {model: cause for model, (flag, cause, _) in week.said.items() if flag}
    whole = any(cause in WHOLE_RACK for cause in week.causes)
    mine = [cause for model, cause in flagged.items() if whole or model == week.model]
    return all(cause in week.causes for cause in mine) if mine else None


class Trace(NamedTuple):
    """Evictions of one node with known verdicts, as a window, by (model, time)."""

    window: Window
    truth: dict[tuple[str, int], str]


def trace(seed: int) -> Trace:
    """A random day of evictions, each constructed for its verdict: justified by traffic (idle for long, not missed for
    hours), requested again within minutes, one of a pair that evict each other, without need, of a busy model, by
    order, by idleness, or by memory that ran short."""
    dice = random.Random(f"evictions {seed}")
    records: list[Record] = []
    truth: dict[tuple[str, int], str] = {}
    begin = WEEKS[0].since_ms
    for number in range(dice.randint(6, 18)):
        at = begin + number * 4 * HOUR_MS + dice.randint(0, 600_000)
        model, other = f"m{dice.randint(0, 3)}-{number}", f"k{dice.randint(0, 3)}-{number}"
        kind = dice.choice(("traffic", "soon", "ping_pong", "no_need", "busy", "ordered", "idle", "memory"))
        records += _eviction(dice, kind, model, other, at, truth)
    days = [batch(records, minute=0)]
    span = Span("trace", 0, 4_000_000_000_000, "UTC")
    return Trace(window(*days, span=span), truth)


def _eviction(
    dice: random.Random, kind: str, model: str, other: str, at: int, truth: dict[tuple[str, int], str]
) -> Sequence[Record]:
    quiet, busy = dice.randint(0, 12), dice.randint(30, 400)
    reasons = {"ordered": "ordered", "idle": "idle", "memory": "pressure"}
    one = ModelEvicted(
        t_ms=at,
        model=model,
        version="v1",
        reason=reasons.get(kind, "memory"),
        for_model="" if kind in ("no_need", "ordered", "idle", "memory") else other,
        bytes=6 * 10**9,
        requests_last_hour=busy if kind == "busy" else quiet,
        idle_us=dice.randint(10, 3000) * 1_000_000,
    )
    verdicts = {"traffic": "traffic", "ordered": "ordered", "idle": "idle", "memory": "memory"}
    truth[model, at] = verdicts.get(kind, "placement")
    again_s = dice.uniform(20, 550) if kind == "soon" else dice.uniform(2000, 9000)
    back = at + int(again_s * 1000)
    found: list[Record] = [one]
    if kind == "ping_pong":
        later = at + dice.randint(15, 80) * 60_000
        found.append(msgspec.structs.replace(one, t_ms=later, model=other, for_model=model))
        truth[other, later] = "placement"
    elif kind == "soon" or dice.random() < 0.6:
        if dice.random() < 0.5:
            found.append(
                ModelMissed(t_ms=back, model=model, version="v1", reason=one.reason, after_us=int(again_s * 1e6))
            )
        else:
            found.append(ModelLoaded(t_ms=back, model=model, version="v1", load_us=9_000_000, need_bytes=6 * 10**9))
    return found


def verdicts(made: Trace) -> list[tuple[str, str]]:
    """(known, reported) verdicts of every eviction of a trace."""
    return [(made.truth[e.record.model, e.record.t_ms], e.verdict) for e in eviction.judge(made.window)]
