"""The table of chips: found by Apple's brand string, honest about what it does not know."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import intake
from shared import chips

NAMES = [chip.name for chip in chips.known()]


@pytest.mark.parametrize(
    ("brand", "gb_s", "generation", "tier", "matrix"),
    [
        ("Apple M1", 68, 1, "", False),
        ("Apple M2 Pro", 200, 2, "Pro", False),
        ("Apple M3 Ultra", 819, 3, "Ultra", False),
        ("Apple M4", 120, 4, "", False),
        ("M4 Pro", 273, 4, "Pro", False),
        ("Apple M5 Pro", 307, 5, "Pro", True),
        (" Apple M6 ", 170, 6, "", True),
    ],
)
def test_a_chip_is_found_by_its_brand_string(brand: str, gb_s: float, generation: int, tier: str, matrix: bool) -> None:
    chip = chips.find(brand)
    assert chip is not None
    assert (chip.bandwidth_gb_s, chip.generation, chip.tier, chip.matrix_units) == (gb_s, generation, tier, matrix)


@pytest.mark.parametrize(
    "brand",
    [
        "",
        "Apple",
        "Apple M",
        "Apple M9",
        "Apple M4 Mega",
        "Apple M4 Pro Max",
        "VirtualApple @ 2.50GHz",
        "Intel M4",
        "m4",
    ],
)
def test_an_unknown_chip_has_no_figures(brand: str) -> None:
    assert chips.find(brand) is None


@given(st.text(max_size=40))
def test_any_text_finds_a_known_chip_or_nothing(text: str) -> None:
    found = chips.find(text)
    assert found is None or text.strip().removeprefix("Apple ") == found.name


@pytest.mark.parametrize(
    ("name", "memory_gb", "gb_s"),
    [("M4 Max", 36, 410), ("M4 Max", 128, 546), ("M3 Max", 96, 300), ("M4 Pro", 24, 273), ("M4 Pro", 23.99, 273)],
)
def test_sizes_with_fewer_gpu_cores_have_less_bandwidth(name: str, memory_gb: float, gb_s: float) -> None:
    chip = chips.find(name)
    assert chip is not None
    assert chip.bandwidth(memory_gb) == gb_s


def test_the_table_is_consistent() -> None:
    assert len(NAMES) == len(set(NAMES))
    for chip in chips.known():
        assert chips.find(f"Apple {chip.name}") is chip
        assert set(chip.mini_gb) <= set(chip.memory_gb)
        assert set(chip.binned) <= set(chip.memory_gb)
        assert all(gb_s < chip.bandwidth_gb_s for gb_s in chip.binned.values())
        tiers = [one for one in chips.known() if one.generation == chip.generation]
        ordered = sorted(tiers, key=lambda one: ("", "Pro", "Max", "Ultra").index(one.tier))
        assert [one.bandwidth_gb_s for one in ordered] == sorted(one.bandwidth_gb_s for one in tiers)
        assert [one.tflops for one in ordered] == sorted(one.tflops for one in tiers)


@pytest.mark.parametrize("chip", [chip for chip in chips.known() if chip.mini_gb], ids=lambda chip: chip.name)
def test_the_intake_takes_every_mac_mini_of_the_table(chip: chips.Chip) -> None:
    toml = "".join(f'[[nodes]]\nid = "n{gb}"\nchip = "{chip.name}"\nmemory_gb = {gb}\n' for gb in chip.mini_gb)
    machines = intake.parse(toml.encode(), intake.Inventory, "inventory.toml").nodes
    speeds = {(intake.chip_of(one).bandwidth_gb_s, intake.chip_of(one).tflops) for one in machines}
    assert speeds == {(chip.bandwidth_gb_s, chip.tflops)}


def test_the_inventory_s_own_figures_replace_those_of_the_table() -> None:
    machine = intake.Machine(id="n", chip="M4 Max", memory_gb=36, kind="studio")
    assert intake.chip_of(machine).bandwidth_gb_s == 410
    assert intake.chip_of(msgspec.structs.replace(machine, bandwidth_gb_s=500.0)).bandwidth_gb_s == 500
    unknown = intake.Machine(id="n", chip="X1", memory_gb=36, bandwidth_gb_s=90.0, tflops=2.0)
    assert (intake.chip_of(unknown).bandwidth_gb_s, intake.chip_of(unknown).tflops) == (90, 2)
