"""Parsers of what systems print: right values from right text, and None, never a guess, from anything else."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.collectors import all_collectors, memory, power, thermal
from agent.collectors.host import busy_ppm
from agent.collectors.inference import Answered, Ledger
from agent.collectors.memory import MemoryCollector
from agent.collectors.power import PowerCollector
from agent.collectors.thermal import NOTIFY_KEY, ThermalCollector
from shared.records import HostSample

CAPTURES = Path(os.environ.get("MLXRACK_CAPTURES", "../shared/captures"))

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                3000.
Pages active:                            400000.
Pages wired down:                        100000.
"Translation faults":                 123456789.
Pages occupied by compressor:             50000.
Swapins:                                     20.
Swapouts:                                    30.
Pages tagged:                                      7.
"""


def test_vm_stat_is_read_by_label_and_page_size() -> None:
    read = memory.parse_vm_stat(VM_STAT)
    assert read["Pages free"] == 3000 * 16384
    assert memory.used_bytes(read) == 550_000 * 16384
    assert memory.used_bytes({}) is None
    assert memory.parse_vm_stat(VM_STAT.replace("page size of", "Seitengröße")) == {}


@pytest.mark.parametrize(
    ("text", "used"),
    [
        ("vm.swapusage: total = 4096.00M  used = 1536.50M  free = 2559.50M  (encrypted)", 1_611_137_024),
        ("total = 0.00M  used = 0.00M  free = 0.00M", 0),
        ("nonsense", None),
    ],
)
def test_swapusage(text: str, used: int | None) -> None:
    assert used == memory.parse_swapusage(text)


@pytest.mark.parametrize(
    ("text", "level"),
    [("1\n", "normal"), ("kern.x: 4", "critical"), ("2", "warn"), ("3", "unknown"), ("", "unknown"), ("x", "unknown")],
)
def test_pressure_level(text: str, level: str) -> None:
    assert level == memory.parse_pressure_level(text)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        (f"{NOTIFY_KEY} 0\n", 0),
        (f"{NOTIFY_KEY} 4", 4),
        (f"{NOTIFY_KEY} 10", None),
        (f"{NOTIFY_KEY}: Failed with code 7", None),
        ("", None),
    ],
)
def test_thermal_level(text: str, level: int | None) -> None:
    assert level == thermal.parse_notifyutil(text)


@pytest.mark.parametrize(
    ("text", "value"), [("61500\n", 61_500), ("-9200", None), ("0", None), ("x", None), ("999999", None)]
)
def test_zone(text: str, value: int | None) -> None:
    assert value == thermal.parse_zone(text)


def test_zones_are_read_and_their_absence_is_named(tmp_path: Path) -> None:
    assert ThermalCollector(tmp_path).read().failed
    for number, value in enumerate(("41000", "63500", "junk")):
        zone = tmp_path / f"thermal_zone{number}"
        zone.mkdir()
        (zone / "temp").write_text(value)
    assert ThermalCollector(tmp_path).read().fields["package_temp_mc"] == 63_500


def test_power_is_a_difference_of_counters(tmp_path: Path) -> None:
    assert PowerCollector(tmp_path).read().failed
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "energy_uj").write_text("1000000")
    collector = PowerCollector(tmp_path)
    assert collector.read().fields == {}
    (package / "energy_uj").write_text("6000000")
    assert collector.read().fields["energy_mj"] == 5_000
    (package / "energy_uj").write_text("5")
    assert collector.read().fields == {}, "a counter that fell back gives nothing"


@pytest.mark.parametrize(
    ("after", "share"),
    [
        ({"user": 3.0, "idle": 7.0}, 300_000),
        ({"user": 5.0, "idle": 2.0, "iowait": 3.0, "guest": 5.0}, 500_000),
        ({"user": 0.0, "idle": 0.0}, None),
        ({"user": -1.0, "idle": 2.0}, 0),
    ],
)
def test_processor_use_is_a_difference(after: dict[str, float], share: int | None) -> None:
    assert busy_ppm(dict.fromkeys(after, 0.0), after) == share


def test_psi() -> None:
    text = "some avg10=0.00 avg60=0.00 avg300=0.00 total=4242\nfull avg10=0.00 total=1\n"
    assert memory.parse_psi_total_us(text) == 4242
    assert memory.parse_psi_total_us("") is None


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.decode("utf-8", "replace")))
def test_no_text_raises_past_a_parser(text: str) -> None:
    memory.used_bytes(memory.parse_vm_stat(text))
    memory.parse_swapusage(text)
    memory.parse_pressure_level(text)
    memory.parse_psi_total_us(text)
    thermal.parse_notifyutil(text)
    thermal.parse_zone(text)
    power.parse_energy_uj(text)


def test_the_real_machine_can_be_read() -> None:
    fields: dict[str, object] = {}
    for collector in all_collectors():
        collector.read()
        fields.update(collector.read().fields)
    sample = HostSample(**fields)  # type: ignore[arg-type]
    assert sample.memory_total_bytes is not None
    assert sample.memory_used_bytes is not None
    assert 0 < sample.memory_used_bytes <= sample.memory_total_bytes
    assert MemoryCollector().read().fields["swap_used_bytes"] >= 0


@pytest.mark.skipif(not CAPTURES.is_dir(), reason="no captures of real machines here (MLXRACK_CAPTURES)")
@pytest.mark.parametrize(
    ("name", "page", "used_gib"),
    [
        ("submission_24gb_swapped.txt", 16384, (1, 24)),
        ("wd-test_8gb_compressor-heavy.txt", 16384, (1, 8)),
        ("slotstream_mte-mac_before.txt", 16384, (1, 128)),
        ("go-osstat_intel-4k.txt", 4096, (1, 64)),
    ],
)
def test_captured_vm_stat(name: str, page: int, used_gib: tuple[int, int]) -> None:
    text = (CAPTURES / "vm_stat" / name).read_text(errors="replace")
    used = memory.used_bytes(memory.parse_vm_stat(text))
    assert f"page size of {page} bytes" in text
    assert used is not None
    assert used_gib[0] <= used / (1 << 30) <= used_gib[1]


def test_the_ledger_counts_each_request_once() -> None:
    seen: list[Answered] = []
    ledger = Ledger(seen.append)
    for total in (10, 20):
        ledger.record(
            Answered(
                model="m",
                outcome="ok",
                prompt_tok=5,
                completion_tok=2,
                ttft_us=total,
                itl_us=((1, 1), (2, 1)),
                total_us=total,
                retries=1,
            )
        )
    ledger.record(Answered(model="m", outcome="failed"))
    failed, ok = ledger.drain()
    assert (failed.outcome, failed.requests, ok.outcome, ok.requests) == ("failed", 1, "ok", 2)
    assert (ok.prompt_tok, ok.completion_tok, ok.retries) == (10, 4, 2)
    assert (ok.ttft_us.count, ok.itl_us.count, ok.total_us.sum) == (2, 4, 30)
    assert ledger.drain() == []
    assert len(seen) == 3
