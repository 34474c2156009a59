"""The table of chips: found by Apple's brand string, honest about what it does not know."""

from pathlib import Path

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
        assert chip.memory_gb
        assert min(chip.memory_gb) > 0
        assert set(chip.mini_gb) <= set(chip.memory_gb)
        for less in chip.binned:
            assert set(less.memory_gb) < set(chip.memory_gb)
            assert less.bandwidth_gb_s < chip.bandwidth_gb_s
            assert less.gpu_cores <= chip.gpu_cores
        tiers = [one for one in chips.known() if one.generation == chip.generation]
        ordered = sorted(tiers, key=lambda one: ("", "Pro", "Max", "Ultra").index(one.tier))
        for name in ("bandwidth_gb_s", "tflops", "gpu_cores"):
            assert [getattr(one, name) for one in ordered] == sorted(getattr(one, name) for one in tiers)


@pytest.mark.parametrize("mac", chips.macs(), ids=lambda mac: mac.models[0])
def test_a_mac_is_consistent_with_its_chip(mac: chips.Mac) -> None:
    chip = chips.find(mac.chip)
    assert chip is not None
    assert set(mac.memory_gb) <= set(chip.memory_gb)
    assert all(chips.find_mac(f" {model} ") is mac for model in mac.models), "no identifier is that of two Macs"
    assert set(mac.price_usd) <= set(mac.memory_gb)
    assert list(mac.price_usd.values()) == sorted(set(mac.price_usd.values())), "more memory costs more"
    assert (mac.idle_w is None) == (mac.busy_w is None)
    if mac.idle_w is not None and mac.busy_w is not None:
        assert 0 < mac.idle_w < mac.busy_w
        assert [mac.watts(busy) for busy in (-1, 0, 1, 9)] == [mac.idle_w, mac.idle_w, mac.busy_w, mac.busy_w]
    if mac.kind != "other":
        assert mac.price_usd
        assert mac.thunderbolt in (3, 4, 5)
        assert chips.desktop(chip) is mac


ROWS: tuple[chips.Chip | chips.Mac, ...] = (*chips.known(), *chips.macs())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: getattr(row, "title", row.name))
def test_each_figure_cites_a_public_source_or_is_unconfirmed(row: chips.Chip | chips.Mac) -> None:
    facts = {"memory_gb", "bandwidth_gb_s", "gpu_cores", "tflops"} if isinstance(row, chips.Chip) else {"models"}
    if isinstance(row, chips.Mac):
        facts |= {"memory_gb"} | ({"thunderbolt", "price_usd", "watts"} if row.kind != "other" else set())
        assert (row.cites.get("watts") == chips.UNCONFIRMED) == (row.kind != "other" and row.idle_w is None)
    assert set(row.cites) == facts
    assert set(row.cites.values()) <= {*chips.sources(), chips.UNCONFIRMED}


def test_each_source_is_public_and_used() -> None:
    used = {key for row in ROWS for key in row.cites.values()}
    assert set(chips.sources()) == used - {chips.UNCONFIRMED}
    for source in chips.sources().values():
        assert source.name
        assert source.url.startswith("https://")


def test_the_documented_table_is_the_one_in_use() -> None:
    text = (Path(__file__).parents[2] / "docs/hardware.md").read_text(encoding="utf-8")
    table = text.partition("<!-- chips: generated -->")[2].partition("<!-- chips: end -->")[0]
    assert table.strip() == chips.markdown().strip(), "`mlxrack-agent chips --markdown` prints what belongs there"


def test_prefill_and_decode_gain_what_was_published() -> None:
    """M5 over M4: 3.3 to 4.1 times the prefill, 19 to 27 % more decode."""
    m4, m5 = chips.find("M4"), chips.find("M5")
    assert m4 is not None
    assert m5 is not None
    assert 3.3 <= m5.prefill_tok_s(24, 8e9) / m4.prefill_tok_s(24, 8e9) <= 4.1
    assert 1.19 <= m5.decode_tok_s(24, 4e9) / m4.decode_tok_s(24, 4e9) <= 1.28
    # llama.cpp discussion 4167: 7B in 3.56 GiB, 24.11 tokens/s
    assert m4.decode_tok_s(16, 3.56 * chips.GIB) == pytest.approx(24.11, rel=0.1)


@pytest.mark.parametrize(("memory_gb", "gb_s"), [(16, 153), (24, 170), (32, 170)])
def test_the_smallest_m6_has_less_bandwidth(memory_gb: int, gb_s: float) -> None:
    assert chips.identify("Mac18,5", "Apple M6", memory_gb * chips.GIB).text.count(f"{gb_s} GB/s") == 1


def test_prefill_follows_the_gpu_cores_of_a_binned_chip() -> None:
    chip = chips.find("M5 Max")
    assert chip is not None
    assert chip.prefill_tok_s(36, 8e9) == pytest.approx(chip.prefill_tok_s(48, 8e9) * 32 / 40)


@pytest.mark.parametrize(
    ("model", "brand", "memory_gb", "says"),
    [
        ("Mac16,11", "Apple M4 Pro", 64, "Mac mini (2024), M4 Pro, 64 GB: 273 GB/s, 8.5 TFLOPS, 5 W idle, at most 140"),
        ("Macmini9,1", "", 16, "Mac mini (2020), M1, 16 GB: 68 GB/s"),
        ("Mac14,12", "Apple M2 Pro", 32, "Mac mini (2023), M2 Pro"),
        ("Mac18,5", "Apple M6", 24, "TFLOPS (unconfirmed), watts unconfirmed"),
        ("Mac17,15", "Apple M5 Ultra", 96, "Mac Studio (2026), M5 Ultra, 96 GB: 1200 GB/s"),
        ("Mac16,10", "Apple M4 Pro", 24, "Mac16,10 is a Mac mini (2024), M4, but the chip calls itself Apple M4 Pro"),
        ("Mac16,10", "Apple M4", 48, "it was sold with 16, 24, 32 GB, not 48"),
        ("Mac99,1", "Apple M4", 16, "model 'Mac99,1' is not in the chip table"),
        ("Mac19,1", "Apple M7", 16, "the chip table has no row for 'Apple M7'"),
        ("Mac16,15", "Apple M4 Pro", 24, "Mac mini (2024), M4 Pro, 24 GB: 273 GB/s"),
        ("Mac16,10", "Apple M4", 0, "its memory is not known"),
        ("VirtualMac2,1", "Apple M5 Pro (Virtual)", 8, "is a virtual machine"),
        ("VirtualMac2,1", "Apple M4 Pro", 24, "'Apple M4 Pro' is a virtual machine"),
        ("VirtualMac2,1", "Apple processor", 8, "is a virtual machine"),
        ("VirtualMac2,1", "", 8, "'VirtualMac2,1' is a virtual machine"),
        ("", "VirtualApple @ 2.50GHz", 8, "is a virtual machine"),
        ("", "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", 16, "no row for 'Intel(R) Core(TM) i7-9750H"),
        ("", "", 16, "this machine names no chip"),
    ],
)
def test_a_machine_is_identified_by_all_it_says(model: str, brand: str, memory_gb: int, says: str) -> None:
    assert says in chips.identify(model, brand, memory_gb * chips.GIB).text


@given(st.text(max_size=80), st.text(max_size=80), st.integers(0, 1 << 50))
def test_whatever_a_machine_says_there_are_figures_or_a_sentence(model: str, brand: str, memory_bytes: int) -> None:
    found = chips.identify(model, brand, memory_bytes)
    assert found.text
    assert (found.chip is None) <= bool(found.remarks)


def test_the_inventory_s_own_figures_replace_those_of_the_table() -> None:
    machine = intake.Machine(id="n", chip="M4 Max", memory_gb=36, kind="studio")
    assert intake.chip_of(machine).bandwidth_gb_s == 410
    assert intake.chip_of(msgspec.structs.replace(machine, bandwidth_gb_s=500.0)).bandwidth_gb_s == 500
    unknown = intake.Machine(id="n", chip="X1", memory_gb=36, bandwidth_gb_s=90.0, tflops=2.0)
    assert (intake.chip_of(unknown).bandwidth_gb_s, intake.chip_of(unknown).tflops) == (90, 2)
