"""Placements that fit, proposals that are executable, and correct reasons."""

import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import acceptance, intake, moves, packing, placement
from aggregator.config import Placement as Rules
from aggregator.demand import facts_of
from aggregator.moves import Step
from aggregator.packing import Copyable, Room
from aggregator.placement import PlacementReport
from shared.desired import Assignment, DesiredState
from shared.errors import Refused
from shared.records import EngineWindow, HostSample, ModelTimed, Record
from tests.builders import T0, batch, engine, host, resident, served, window


def case(
    seed: int, nodes: int, models: int, fill: float = 0.65, load: float = 0.5
) -> tuple[list[Copyable], list[Room], packing.Placement]:
    """A random rack, its copies placed where they happen to fit."""
    dice = random.Random(seed)
    rooms = [
        Room(name=f"n{i:03d}", budget_bytes=int(dice.choice((21.3, 36, 48)) * 1e9), speed=dice.choice((1.0, 2.0)))
        for i in range(nodes)
    ]
    needs = [dice.choice((5, 6, 9, 12, 18.5)) for _ in range(models)]
    copies = [dice.choice((1, 1, 1, 2)) for _ in range(models)]
    scale = fill * sum(r.budget_bytes for r in rooms) / sum(a * b for a, b in zip(needs, copies, strict=True))
    loads = [dice.expovariate(1) for _ in range(models)]
    carried = load * 0.8 * sum(r.speed for r in rooms) / sum(loads)
    made = [
        Copyable(
            name=f"m{j:03d}", need_bytes=int(needs[j] * scale), copies=min(copies[j], nodes), load=loads[j] * carried
        )
        for j in range(models)
    ]
    free, now = {r.name: r.budget_bytes for r in rooms}, set()
    for model in made:
        for room in dice.sample(rooms, model.copies):
            if free[room.name] >= model.need_bytes:
                now.add((model.name, room.name))
                free[room.name] -= model.need_bytes
    return made, rooms, frozenset(now)


cases = st.builds(
    case, st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 9), st.sampled_from((0.4, 0.7, 0.95, 1.3))
)


@settings(max_examples=40, deadline=None)
@given(cases, st.sampled_from((None, 0, 2)))
def test_no_placement_overfills_a_node_and_none_is_worse_than_greedy(
    made: tuple[list[Copyable], list[Room], packing.Placement], most: int | None
) -> None:
    models, rooms, now = made
    found = packing.pack(models, rooms, now, most)
    for room in rooms:
        assert packing.held(room, models, found.pairs) <= room.budget_bytes
    assert found.score <= found.greedy_score + 1e-9
    for model in models:
        placed = sum(name == model.name for name, _ in found.pairs)
        assert placed <= model.copies
        assert dict(found.short).get(model.name, 0) == model.copies - placed
    if most is not None:
        assert len(found.pairs - now) <= most


@settings(max_examples=40, deadline=None)
@given(cases)
def test_every_plan_is_executable(made: tuple[list[Copyable], list[Room], packing.Placement]) -> None:
    models, rooms, now = made
    goal = packing.pack(models, rooms, now).pairs
    ordered = moves.order(models, rooms, now, goal)
    reached, broken = moves.simulate(models, rooms, now, ordered.steps)
    assert not broken
    assert reached == ordered.reached
    assert set(ordered.blocked) == goal - reached
    if not ordered.blocked:
        assert reached >= goal


@settings(max_examples=15, deadline=None)
@given(cases, st.randoms())
def test_the_same_input_gives_the_same_placement(
    made: tuple[list[Copyable], list[Room], packing.Placement], dice: random.Random
) -> None:
    models, rooms, now = made
    one = packing.pack(models, rooms, now)
    dice.shuffle(models)
    dice.shuffle(rooms)
    assert one == packing.pack(models, rooms, now)


@pytest.mark.parametrize("seed", range(4))
def test_eight_nodes_and_twenty_models_are_solved_with_greedy_near_optimal(seed: int) -> None:
    models, rooms, now = case(seed, 8, 20)
    found = packing.pack(models, rooms, now)
    assert found.gap is not None
    assert not found.short


def test_two_full_nodes_swap_models_through_a_third() -> None:
    models = [Copyable(name=n, need_bytes=8, copies=1, load=0.1) for n in ("a", "b")]
    rooms = [Room(name=n, budget_bytes=10) for n in ("n1", "n2", "n3")]
    now, goal = frozenset({("a", "n1"), ("b", "n2")}), frozenset({("a", "n2"), ("b", "n1")})
    ordered = moves.order(models, rooms, now, goal)
    assert ordered.reached == goal
    assert any(step.parked for step in ordered.steps)
    assert not moves.simulate(models, rooms, now, ordered.steps)[1]


def test_moves_that_would_interrupt_service_are_left_out() -> None:
    models = [Copyable(name=n, need_bytes=8, copies=1, load=0.1) for n in ("a", "b")]
    rooms = [Room(name=n, budget_bytes=10) for n in ("n1", "n2")]
    now, goal = frozenset({("a", "n1"), ("b", "n2")}), frozenset({("a", "n2"), ("b", "n1")})
    ordered = moves.order(models, rooms, now, goal)
    assert (ordered.steps, ordered.reached) == ((), now)
    assert ordered.blocked == (("a", "n2"), ("b", "n1"))


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (Step(action="load", model="b", node="n1"), "n1 lacks the memory for b"),
        (Step(action="load", model="a", node="n1"), "a is already on n1"),
        (Step(action="load", model="a", node="n9"), "unknown node n9"),
        (Step(action="load", model="c", node="n2"), "unknown model c"),
        (Step(action="unload", model="b", node="n1"), "b is not on n1"),
        (Step(action="unload", model="a", node="n1"), "no node would serve a"),
    ],
)
def test_the_simulation_detects_broken_plans(step: Step, why: str) -> None:
    models = [Copyable(name=n, need_bytes=8, copies=1, load=0.1) for n in ("a", "b")]
    rooms = [Room(name=n, budget_bytes=10) for n in ("n1", "n2")]
    _, (broken, *_) = moves.simulate(models, rooms, frozenset({("a", "n1")}), [step])
    assert why in broken.why


def test_over_commitment_is_stated_first_with_remedies() -> None:
    big = [
        batch(
            [
                host(budget=10**10),
                resident(f"m{n}", version=f"v{n}", need=8 * 10**9),
                engine(f"m{n}", version=f"v{n}", busy_s=58),
            ],
            node=f"n{n}",
            minute=minute,
        )
        for n in range(2)
        for minute in range(12)
    ]
    report = placement.propose(window(*big))
    assert report.short
    assert report.short[0].startswith("Not enough memory for 1 x m0, 1 x m1 (16.0 GB): add 2 more nodes of 10.0 GB")


def test_small_gains_move_nothing_by_hysteresis() -> None:
    a = [batch([host(), resident("a"), engine("a", busy_s=20), served("a")], minute=n) for n in range(10)]
    b = [
        batch([host(), resident("b", version="v2"), engine("b", version="v2", busy_s=30)], node="n2", minute=n)
        for n in range(10)
    ]
    assert not placement.propose(window(*a, *b)).rebalance


def proposal() -> PlacementReport:
    """A hot node with two models beside an empty node: the idle model moves."""
    hot = [
        batch(
            [
                host(throttled=0.1),
                resident("a", version="va"),
                engine("a", version="va", busy_s=2),
                resident("b", version="vb"),
                engine("b", version="vb", busy_s=20),
            ],
            minute=n,
        )
        for n in range(10)
    ]
    return placement.propose(window(*hot, *(batch([host()], node="n2", minute=n) for n in range(10))))


def test_every_move_has_a_reason_and_the_cost_of_declining() -> None:
    report = proposal()
    load, unload = report.moves
    assert (load.action, load.source, load.gb, load.bound) == ("load", "n1", 1.0, "heat")
    assert load.load_before == 0.0
    assert load.load_after > 0
    assert load.free_before_bytes - load.free_after_bytes == 10**9
    assert "n1 stays throttled at" in load.declined
    assert unload.reason == "a is now served elsewhere"


@pytest.mark.parametrize(
    ("known_s", "hot_s", "count", "others", "moves"),
    [
        (60.0, 3.0, 1, 1, False),  # 3 s hot of 60 s known
        (60.0, 1.5, 2, 2, False),  # 2.5 %
        (60.0, 3.0, 10, 10, True),
        (6.0, 0.3, 10, 10, False),  # of 600 s that it reported, 60 are known
        (50.0, 2.5, 10, 10, True),
        (45.0, 2.5, 10, 10, False),  # less than four fifths
        (60.0, 3.0, 3, 40, False),  # the rack reported for 40 minutes, this node for three
        (60.0, 3.0, 5, 40, True),
    ],
)
def test_a_model_moves_only_for_heat_that_is_known(
    known_s: float, hot_s: float, count: int, others: int, moves: bool
) -> None:
    sample = HostSample(
        memory_budget_bytes=10**10, thermal_known_us=round(known_s * 1e6), throttled_us=round(hot_s * 1e6)
    )
    models: list[Record] = [
        *(resident("a", version="va"), engine("a", version="va", busy_s=2)),
        *(resident("b", version="vb"), engine("b", version="vb", busy_s=20)),
    ]
    hot = [batch([sample, *models], minute=others - count + n) for n in range(count)]
    report = placement.propose(window(*hot, *(batch([host()], node="n2", minute=n) for n in range(others))))
    assert any(move.bound == "heat" for move in report.moves) == moves
    assert report.rebalance == moves
    shown = {one.node: one.limit for one in report.nodes}
    assert (shown["n1"] < packing.CAP) == moves


# day one


INTAKE = """
[[models]]
name = "chat"
weights_gb = 4.5
kv_kib_per_tok = 144
[[workloads]]
model = "chat"
qps = 0.1
prompt_tok = 400
answer_tok = 100
min_copies = 2
first_token_s = 0.1
"""
INVENTORY = """
[[nodes]]
id = "mini-1"
chip = "M4 Pro"
memory_gb = 64
[[nodes]]
id = "mini-2"
chip = "M4"
memory_gb = 32
"""


def read(text: str, kind: type, name: str) -> object:
    return intake.parse(text.encode(), kind, name)


def test_a_first_placement_needs_no_telemetry() -> None:
    report = intake.propose(
        intake.parse(INTAKE.encode(), intake.Intake, "intake.toml"),
        intake.parse(INVENTORY.encode(), intake.Inventory, "inventory.toml"),
        {},
    )
    assert [(m.action, m.model, m.node) for m in report.moves] == [
        ("load", "chat", "mini-1"),
        ("load", "chat", "mini-2"),
    ]
    assert not report.short
    assert "TTFT target of 0.1 s cannot be met on mini-1" in report.notes[0]


@pytest.mark.parametrize(
    ("text", "kind", "why"),
    [
        (INVENTORY.replace('"M4"', '"M4 Max"'), intake.Inventory, "no Mac mini has M4 Max"),
        (INVENTORY.replace("= 32", "= 48"), intake.Inventory, "a Mac mini with M4 has 16, 24, 32 GB, not 48"),
        (INVENTORY.replace('"M4"', '"M9"'), intake.Inventory, "unknown chip 'M9'; add bandwidth_gb_s"),
        (INVENTORY.replace("mini-2", "mini-1"), intake.Inventory, "duplicate node 'mini-1'"),
        ("nodes = []", intake.Inventory, "no nodes defined"),
        (INTAKE.replace('model = "chat"', 'model = "code"'), intake.Intake, "'code': no such model in this file"),
        (INTAKE.replace("weights_gb = 4.5", ""), intake.Intake, "needs path, or weights_gb and kv_kib_per_tok"),
        (INTAKE.replace("qps = 0.1", "qps = -1"), intake.Intake, "workloads[0].qps"),
        ("models = [", intake.Intake, "intake.toml"),
        (INTAKE + "surprise = 1", intake.Intake, "surprise"),
    ],
)
def test_an_invalid_file_is_reported_with_the_error(text: str, kind: type, why: str) -> None:
    with pytest.raises(Refused, match="toml") as caught:
        read(text, kind, "intake.toml")
    assert why in caught.value.message


def test_a_studio_may_hold_what_a_mini_cannot() -> None:
    text = INVENTORY.replace('chip = "M4"\nmemory_gb = 32', 'chip = "M4 Max"\nmemory_gb = 128\nkind = "studio"')
    assert len(intake.parse(text.encode(), intake.Inventory, "inventory.toml").nodes) == 2


# acceptance


def test_an_accepted_proposal_becomes_the_next_generation_and_keeps_settings() -> None:
    report = proposal()
    old = Assignment(model="b", source="b", version="vb", rows=3)
    before = DesiredState(generation=7, nodes={"n1": (old,), "elsewhere": (old,)})
    chosen = acceptance.accepted(report, None)
    state = acceptance.desired(report, chosen, before, lambda model, version: f"{model}@{version}", 1)
    assert state.generation == 8
    assert state.nodes["n1"] == (old,)
    assert state.nodes["n2"] == (Assignment(model="a", source="a", version="va"),)
    assert state.nodes["elsewhere"] == (old,)


def test_steps_without_their_prerequisites_are_rejected() -> None:
    report = proposal()
    with pytest.raises(Refused, match="step 2 depends on steps left out: no node would serve a"):
        acceptance.accepted(report, {2})
    with pytest.raises(Refused, match="no step 9 in the proposal"):
        acceptance.accepted(report, {9})
    assert len(acceptance.accepted(report, {1})) == 1


def test_a_version_missing_from_the_bucket_is_named() -> None:
    report = proposal()
    with pytest.raises(Refused, match="does not hold version va of a; push it from a node that serves it: mlxrack"):
        acceptance.desired(report, acceptance.accepted(report, None), None, lambda *_: None, 1)


def test_a_proposal_round_trips_as_json() -> None:
    report = proposal()
    assert msgspec.json.decode(msgspec.json.encode(report), type=PlacementReport) == report


def test_nodes_that_have_served_nothing_are_as_fast_as_their_calibrations_say() -> None:
    """Unless both have worked with one model: what was done counts more than what was tried."""

    def timed(step_us: int, version: str = "v1") -> ModelTimed:
        return ModelTimed(t_ms=T0, model="m", version=version, rows=(1, 8), step_us=(step_us, 3 * step_us))

    def speeds(*records: tuple[str, Sequence[Record]]) -> dict[str, float]:
        batches = [batch([resident(), host(), *more], node=node) for node, more in records]
        return {room.name: room.speed for room in facts_of(window(*batches), Rules(), {}).rooms}

    assert speeds(("n1", [timed(20_000)]), ("n2", [timed(10_000)])) == {"n1": 0.75, "n2": 1.5}
    assert speeds(("n1", [timed(20_000)]), ("n2", [timed(10_000, "v2")])) == {"n1": 1.0, "n2": 1.0}
    assert speeds(("n1", [timed(0)]), ("n2", [timed(10_000)])) == {"n1": 1.0, "n2": 1.0}
    worked = EngineWindow(model="m", version="v1", busy_decode_us=10**7, decode_tok=10_000)
    assert speeds(("n1", [timed(20_000), worked]), ("n2", [timed(10_000), worked])) == {"n1": 1.0, "n2": 1.0}
