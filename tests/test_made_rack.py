"""The made rack is plausible: what its records say could have been measured on the machine that it claims to be."""

import itertools
from collections import Counter
from typing import TypeVar

import pytest

from scripts import sample_rack
from shared.batch import Batch
from shared.records import (
    AgentStarted,
    EngineWindow,
    HostSample,
    ModelEvicted,
    ModelLoaded,
    ModelMissed,
    Record,
    Resident,
    Served,
    SwapFinished,
)
from shared.sketch import Sketch
from tests.made_machine import BANDWIDTH, BUDGET_BYTES, CHIP, MEMORY_GB
from tests.made_rack import DAY_MS, HOUR_MS, Change, MadeModel, MadeRack, Outage, batches

RACK = sample_rack.rack()
R = TypeVar("R", bound=Record)
MODELS = {model.name: model for model in RACK.models}


@pytest.fixture(scope="module")
def made() -> dict[str, list[Batch]]:
    days = {"mini-2": 1, "mini-4": 2}  # all five models, and the node that cannot hold all of its own
    return {node: list(batches(RACK, node, RACK.since_ms + n * DAY_MS)) for node, n in days.items()}


def of(made: dict[str, list[Batch]], kind: type[R]) -> list[tuple[Batch, R]]:
    return [(b, r) for found in made.values() for b in found for r in b.records if isinstance(r, kind)]


def test_no_token_follows_another_sooner_than_the_weights_can_be_read(made: dict[str, list[Batch]]) -> None:
    medians = {}
    for _, served in of(made, Served):
        least_us = MODELS[served.model].weights_bytes / BANDWIDTH * 1e6
        if served.itl_us.count:
            assert (served.itl_us.min or 0) >= least_us
            medians[served.model] = Sketch.from_wire(served.itl_us).quantile(0.5)
    assert len({round((gap or 0) / 2000) for gap in medians.values()}) == len(MODELS), "each model has its own gap"
    for _, engine in of(made, EngineWindow):
        model = MODELS[engine.model]
        assert engine.busy_decode_us >= engine.steps * model.weights_bytes / BANDWIDTH * 1e6
        assert engine.decode_tok <= engine.steps * model.rows
        flops = 2 * model.params * engine.prefill_tok
        assert flops <= engine.busy_prefill_us / 1e6 * CHIP.gpu_tflops(MEMORY_GB) * 1e12


def test_a_loader_is_never_busy_for_longer_than_its_window(made: dict[str, list[Batch]]) -> None:
    shares = [
        (e.busy_prefill_us + e.busy_decode_us) / 1000 / max(1, b.t_end_ms - b.t_start_ms)
        for b, e in of(made, EngineWindow)
    ]
    assert max(shares) <= 1
    assert max(shares) > 0.9, "there is a busy window"
    assert min(shares) == 0, "and an idle one"


def test_loaders_compute_what_requests_get(made: dict[str, list[Batch]]) -> None:
    asked, computed = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for _, served in of(made, Served):
        asked[served.model, "prompt"] += served.prompt_tok - served.cached_tok
        asked[served.model, "answer"] += served.completion_tok
        asked[served.model, "lost"] += served.completion_tok * (served.outcome == "cancelled")
    for _, engine in of(made, EngineWindow):
        computed[engine.model, "prompt"] += engine.prefill_tok
        computed[engine.model, "answer"] += engine.decode_tok
        computed[engine.model, "lost"] += engine.wasted_tok
    for name in MODELS:
        for kind in ("prompt", "answer", "lost"):
            one, other = asked[name, kind], computed[name, kind]
            # what is under way when the telemetry ends is not counted for a request yet
            assert other * 0.97 <= one <= other, (name, kind)


def test_memory_explains_every_eviction(made: dict[str, list[Batch]]) -> None:
    evictions = of(made, ModelEvicted)
    assert evictions
    for batch, one in evictions:
        there = {r.model: r.need_bytes for r in batch.records if isinstance(r, Resident)}
        assert one.for_model in there
        held = sum(there.values())
        assert held <= BUDGET_BYTES < held + one.bytes, "there was no room for both"
        assert 0 <= (one.idle_us or 0) <= one.age_us
    for _, loaded in of(made, ModelLoaded):
        assert 0.9e9 <= MODELS[loaded.model].weights_bytes / (loaded.load_us / 1e6) <= 3.1e9
        assert loaded.need_bytes > MODELS[loaded.model].weights_bytes
    back = {(m.model, m.t_ms - m.after_us // 1000) for _, m in of(made, ModelMissed)}
    assert back <= {(e.model, e.t_ms) for _, e in evictions}


def test_nothing_is_evicted_where_memory_is_free() -> None:
    rack = MadeRack(models=(MadeModel(name="a", per_hour=90), MadeModel(name="b", per_hour=40)), faults=20.0)
    made = {node: list(batches(rack, node, DAY_MS)) for node in rack.nodes}
    assert not of(made, ModelEvicted)
    swaps = [s for _, s in of(made, SwapFinished) if s.outcome == "flipped"]
    assert all(s.from_version != s.to_version for s in swaps)


def test_temperatures_follow_work_and_stay_below_105_degrees() -> None:
    model = MadeModel(name="a", per_hour=3_000, params=8e9, weights_bytes=4_500_000_000)
    busy, idle = (
        MadeRack(models=(one,), nodes=("n",), hot=hot, intake_c=(27.0,))
        for one, hot in ((model, 1.0), (MadeModel(name="a", per_hour=1), 0.0))
    )
    hot = of({"n": list(batches(busy, "n", DAY_MS))}, HostSample)
    cool = of({"n": list(batches(idle, "n", DAY_MS))}, HostSample)
    assert 95_000 < max(h.pcore_temp_mc or 0 for _, h in hot) < 105_000
    assert max(h.package_temp_mc or 0 for _, h in cool) < 70_000
    throttled = [b.t_start_ms // HOUR_MS for b, h in hot if h.throttled_us]
    assert throttled
    assert not any(h.throttled_us for _, h in cool)
    assert min(throttled) >= 6, "the air is cooler at night"


def test_versions_are_hashes_and_differ() -> None:
    rack = MadeRack(
        models=(
            MadeModel(name="a", per_hour=90),
            MadeModel(name="b", per_hour=90, files="a"),
            MadeModel(name="c", per_hour=9),
        ),
        changes=(Change(cause="swap", since_ms=12 * HOUR_MS, model="c"),),
    )
    made = {"n1": list(batches(rack, "n1", DAY_MS))}
    seen = {(r.model, r.version) for _, r in of(made, Resident)}
    versions = {name: {v for n, v in seen if n == name} for name in "abc"}
    assert versions["a"] == versions["b"]
    assert len(versions["c"]) == 2
    assert not versions["a"] & versions["c"]
    assert all(len(v) == 16 and int(v, 16) >= 0 for _, v in seen)


def test_one_loader_answers_two_names() -> None:
    rack = MadeRack(models=(MadeModel(name="a", per_hour=90), MadeModel(name="b", per_hour=40, loader="a")))
    made = {"n1": list(batches(rack, "n1", DAY_MS))}
    assert {s.model for _, s in of(made, Served)} == {"a", "b"}
    assert {e.model for _, e in of(made, EngineWindow)} == {"a"}
    assert {s.version for _, s in of(made, Served) if s.worker} == {e.version for _, e in of(made, EngineWindow)}


@pytest.mark.parametrize(
    ("kind", "epochs", "boots", "previous"),
    [
        ("clean", 2, 1, "clean"),
        ("deploy", 2, 1, "clean"),
        ("unclean", 2, 1, "unclean"),
        ("power", 2, 2, "unclean"),
        ("asleep", 1, 1, ""),
        ("lost", 1, 1, ""),
    ],
)
def test_an_outage_leaves_its_traces(kind: str, epochs: int, boots: int, previous: str) -> None:
    gap = Outage("n1", 3 * HOUR_MS + 17_000, 5 * HOUR_MS, kind)
    rack = MadeRack(models=(MadeModel(name="a", per_hour=90),), planned=(gap,))
    made = list(batches(rack, "n1", 8 * HOUR_MS))
    assert len({b.epoch for b in made}) == epochs
    assert len({b.boot_id for b in made}) == boots
    assert {r.previous for b in made[1:] for r in b.records if isinstance(r, AgentStarted)} == ({previous} - {""})
    assert not any(b.t_end_ms > gap.start_ms and b.t_start_ms < gap.end_ms for b in made)
    steps = {b.seq - a.seq for a, b in itertools.pairwise(made) if a.epoch == b.epoch}
    assert steps == ({1, 120} if kind == "lost" else {1})
    assert {b.dropped_batches for b in made} == ({0, 119} if kind == "lost" else {0})


def test_requests_are_refused_for_each_reason() -> None:
    rack = MadeRack(
        models=(MadeModel(name="a", per_hour=2_000),),
        changes=(Change(cause="full", since_ms=0, strength=0.5),),
        faults=0.1,
        window_ms=HOUR_MS,
    )
    made = {"n1": list(batches(rack, "n1", 5 * DAY_MS))}
    refused = Counter({s.finish: 0 for _, s in of(made, Served)})
    for _, served in of(made, Served):
        refused[served.finish] += served.requests if served.outcome == "refused" else 0
    answered = sum(s.requests for _, s in of(made, Served) if s.outcome == "ok")
    assert refused["limit"]
    assert refused["request"]
    assert refused["capacity"] == pytest.approx(answered, rel=0.1)
