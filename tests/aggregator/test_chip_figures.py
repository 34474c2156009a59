"""Whatever reads the table of chips gives an answer or a sentence: for every row, every memory size and no row."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import cli as agent_cli
from agent.operator import recommended
from aggregator import cli, config, cost, economics, intake, placement
from aggregator.config import AggregatorConfig
from shared import chips
from shared.errors import Refused
from shared.records import Hardware
from tests.builders import batch, engine, host, resident, served, window

ROWS = [(chip, gb) for chip in chips.known() for gb in chip.memory_gb]
UNKNOWN = (
    *("Apple M7", "Apple M5 Pro (Virtual)", "VirtualApple @ 2.50GHz", "", "Apple M4 Mega", "m4", "\x00"),
    "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz",
)
INTAKE = intake.parse(
    b'[[models]]\nname = "chat"\nweights_gb = 4.5\nkv_kib_per_tok = 64\n'
    b'[[workloads]]\nmodel = "chat"\nqps = 0.01\nprompt_tok = 500\nanswer_tok = 50\n',
    intake.Intake,
    "intake.toml",
)
rows = pytest.mark.parametrize(("chip", "memory_gb"), ROWS, ids=lambda one: str(getattr(one, "name", one)))


def machine(chip: str, memory_gb: float, **more: object) -> str:
    """An inventory of one node."""
    node = {"id": "n", "chip": chip, "memory_gb": memory_gb, "kind": "other", **more}
    return "[[nodes]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in node.items())


def planned(text: str) -> placement.PlacementReport:
    return intake.propose(INTAKE, intake.parse(text.encode(), intake.Inventory, "inventory.toml"), {})


@rows
def test_every_row_has_tokens_per_second_and_a_plan(chip: chips.Chip, memory_gb: int) -> None:
    assert all(fit.tokens_per_s for fit in recommended.for_memory(memory_gb, chip))
    report = planned(machine(f"Apple {chip.name}", memory_gb))
    assert (report.nodes[0].speed, report.nodes[0].load_after > 0) == (1.0, not report.short)
    unsure = [note for note in report.notes if chips.UNCONFIRMED in note]
    assert bool(unsure) == bool(chip.unconfirmed)
    assert all(chip.name in note and "`tflops`" in note for note in unsure)
    assert not planned(machine(chip.name, memory_gb, tflops=9.5)).notes, "the inventory's own figure is not in doubt"


@rows
def test_a_purchase_of_every_row_has_figures_or_a_reason(chip: chips.Chip, memory_gb: int) -> None:
    if memory_gb not in (*chips.sizes(chip, "mini"), *chips.sizes(chip, "studio")):
        with pytest.raises(Refused, match="give"):
            economics.bought(chip.name, memory_gb)
        return
    price, watts, said = economics.bought(chip.name, memory_gb)
    assert ("US list price" in said[0]) == (price is not None)
    assert (chips.UNCONFIRMED in said[1]) == (watts is None)


@pytest.mark.parametrize("brand", UNKNOWN)
def test_an_unknown_chip_is_asked_for_by_name_everywhere(brand: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused, match=r"unknown chip .*; add bandwidth_gb_s and tflops"):
        planned(machine(brand, 64))
    assert planned(machine(brand, 64, bandwidth_gb_s=300, tflops=9)).moves
    with pytest.raises(Refused, match="give node-price and watts"):
        economics.bought(brand, 64)
    assert agent_cli.main(["models", "recommend", "--memory", "64", "--chip", brand or " "]) == 0
    assert "--bandwidth gives its GB/s" in capsys.readouterr().out
    assert agent_cli.main(["models", "recommend", "--memory", "64", "--chip", brand or " ", "--bandwidth", "300"]) == 0
    assert "(300 GB/s)" in capsys.readouterr().out
    if brand:
        found = config.check(configured({"id": "n1", "chip": brand}))
        assert any(problem.startswith("nodes[0].chip: ") and "watts and bandwidth_gb_s" in problem for problem in found)


def configured(*nodes: dict[str, object]) -> AggregatorConfig:
    return msgspec.convert({"rack": "r", "store": {"path": "x"}, "nodes": list(nodes)}, AggregatorConfig)


def says(model: str, brand: str, memory_gb: int) -> Hardware:
    return Hardware(model=model, chip=brand, memory_bytes=memory_gb * chips.GIB)


def proposed(one: Hardware, other: Hardware, settings: AggregatorConfig) -> placement.PlacementReport:
    made = window(batch([host(), resident("a"), one]), batch([host(), other], node="n2"))
    return placement.propose(made, settings.placement, settings.bandwidths)


def test_a_placement_says_whose_speed_is_a_guess_and_which_key_tells_better() -> None:
    known = says("Mac16,11", "Apple M4 Pro", 64)
    report = proposed(known, says("Mac19,1", "Apple M7", 64), configured())
    (note,) = (note for note in report.notes if "M7" in note)
    assert "n2: the chip table has no row for 'Apple M7'" in note
    assert "`bandwidth_gb_s` in its [[nodes]] table" in note
    assert {n.node: n.speed for n in report.nodes} == {"n1": 1.0, "n2": 1.0}
    report = proposed(known, says("Mac19,1", "Apple M7", 64), configured({"id": "n2", "bandwidth_gb_s": 819.0}))
    assert not [note for note in report.notes if "M7" in note]
    speeds = {n.node: n.speed for n in report.nodes}
    assert speeds["n2"] / speeds["n1"] == pytest.approx(3, rel=0.01)


def test_a_placement_says_where_a_node_contradicts_itself() -> None:
    report = proposed(says("Mac16,11", "Apple M4 Pro", 64), says("Mac16,10", "Apple M4 Pro", 24), configured())
    assert any("n2: model Mac16,10 is a Mac mini (2024), M4, but the chip calls" in note for note in report.notes)


@given(st.text(max_size=30), st.text(max_size=30), st.integers(0, 1 << 45))
def test_whatever_a_node_says_a_placement_has_a_speed_for_it(model: str, brand: str, memory_bytes: int) -> None:
    odd = Hardware(model=model, chip=brand, memory_bytes=memory_bytes)
    report = proposed(says("Mac16,11", "Apple M4 Pro", 64), odd, configured())
    assert all(node.speed > 0 for node in report.nodes)
    assert chips.find(brand) is not None or chips.find_mac(model) is not None or any("n2: " in n for n in report.notes)


def costed(node: dict[str, object], hardware: Hardware) -> cost.NodeCost:
    made = window(batch([hardware, resident(), engine(busy_s=30), served()]))
    (found,) = cost.compute(made, configured({"id": "n1", **node})).nodes
    return found


@pytest.mark.parametrize(
    ("node", "watts", "power"),
    [
        ({"price": 1999.0, "watts": 33.0, "chip": "M4 Pro"}, 33.0, "configured"),
        ({"price": 1999.0, "chip": "M4 Pro"}, 5 + 135 / 2, "chip table"),
        ({"price": 1999.0, "chip": "M6"}, 45.0, "assumed"),
        ({"price": 1999.0}, 45.0, "assumed"),
        ({}, 45.0, "assumed"),
    ],
)
def test_watts_that_nobody_measured_are_those_of_the_chip(node: dict[str, object], watts: float, power: str) -> None:
    """Busy for half of the minute."""
    found = costed(node, says("Mac16,11", "Apple M4 Pro", 64))
    assert found.watts is not None
    assert float(found.watts) == pytest.approx(watts)
    assert found.power == power


def test_a_node_without_a_price_is_told_its_list_price() -> None:
    made = window(batch([says("Mac16,11", "Apple M4 Pro", 64), resident(), engine(), served()]))
    (hint,) = cost.compute(made, configured()).hints
    assert hint.startswith("n1: Mac mini (2024), M4 Pro, 64 GB: US list price 1,999 USD (")
    assert not cost.compute(made, configured({"id": "n1", "price": 1.0})).hints


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--chip", "M4 Pro", "--memory", "64"], 0, "Mac mini (2024), M4 Pro: 5 W idle, at most 140 W"),
        (["--chip", "M6", "--memory", "32"], 1, "watts unconfirmed, no public figure; give --watts"),
        (["--chip", "M6", "--memory", "32", "--watts", "30"], 0, "17.0 TFLOPS (unconfirmed)"),
        (["--chip", "M5 Ultra", "--memory", "512"], 1, "no public list price with 512 GB"),
        (["--chip", "M4", "--memory", "48"], 1, "has 16, 24, 32 GB; give one of them as memory"),
        (["--chip", "M3", "--memory", "8"], 1, "no mini or Studio has M3"),
        (["--chip", "M4", "--memory", "16", "--currency", "EUR"], 1, "give --node-price in EUR"),
        (["--chip", "M4", "--memory", "16", "--currency", "EUR", "--node-price", "650"], 1, "--price-per-m in EUR, "),
        (
            ["--chip", "M4", "--memory", "16", "--currency", "EUR", "--node-price", "650", "--usd-rate", "0.9"],
            0,
            "1,300.00 EUR",
        ),
        (["--chip", "M4", "--memory", "16", "--currency", "EUR", "--usd-rate", "0.9"], 0, "1,078.20 EUR"),
        ([], 0, "4,000.00 USD"),
    ],
)
def test_economics_takes_a_chip_s_price_and_watts(
    words: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["economics", "--api-spend", "5000", "--nodes", "2", *words]) == status
    told = capsys.readouterr()
    assert says in told.out + told.err
