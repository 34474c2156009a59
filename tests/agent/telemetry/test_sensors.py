"""Parsers of system output: correct values from valid text, and None, never a guess, from anything else."""

import random
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.process import machine
from agent.telemetry.gauge import Gauge, Seen
from agent.telemetry.ledger import Answered, Ledger
from agent.telemetry.meters import http
from agent.telemetry.sensors import (
    Sensors,
    chip,
    host,
    macmon,
    memory,
    power,
    powermetrics,
    source,
    sysctl,
    thermal,
    vm,
)
from agent.telemetry.sensors.child import Child
from agent.telemetry.sensors.chip import Chip, MacmonPipe
from agent.telemetry.sensors.cpu import CpuTimes, CpuUse, busy_ppm, parse_proc_stat
from agent.telemetry.sensors.host import HostCollector, hardware, hardware_of
from agent.telemetry.sensors.memory import MemoryCollector
from agent.telemetry.sensors.power import Energy, PowerCollector, Rapl, energy_of, spent_uj
from agent.telemetry.sensors.powermetrics import PowermetricsStream
from agent.telemetry.sensors.reading import Failure, text_of
from agent.telemetry.sensors.source import Guarded, command_bytes
from agent.telemetry.sensors.thermal import NOTIFY_KEY, ThermalCollector
from scripts import fuzz_parsers
from shared.records import HostSample

VM_STAT = b"""Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                3000.
Pages active:                            400000.
Pages wired down:                        100000.
Pages purgeable:                          10000.
"Translation faults":                 123456789.
Anonymous pages:                         310000.
Pages occupied by compressor:             50000.
Swapins:                                     20.
Swapouts:                                    30.
Pages tagged:                                      7.
"""
PLIST = (
    b'<?xml version="1.0"?><plist version="1.0"><dict><key>elapsed_ns</key><integer>1000000000</integer>'
    b"<key>processor</key><dict><key>cpu_power</key><real>500.5</real><key>gpu_power</key><real>20</real>"
    b"<key>ane_power</key><real>0</real></dict><key>thermal_pressure</key><string>Heavy</string></dict></plist>"
)


def test_vm_stat_is_read_by_label_and_page_size() -> None:
    found = vm.parse_vm_stat(VM_STAT)
    assert found is not None
    assert found.used_bytes == (300_000 + 100_000 + 50_000) * 16384
    assert (found.swapped_in_bytes, found.swapped_out_bytes) == (20 * 16384, 30 * 16384)
    for wrong in (
        b"",
        VM_STAT.replace(b"page size of", "Seitengröße".encode()),
        VM_STAT.replace(b"16384 bytes", b"777 bytes"),
        VM_STAT.replace(b"Anonymous pages", b"Anonyme Seiten"),
        VM_STAT.replace(b"310000.", b"310000"),
        VM_STAT.replace(b"310000.", b"-5."),
        VM_STAT.replace(b"310000.", b"9999999999999."),
        VM_STAT[: VM_STAT.index(b"50000.") + 3],
        VM_STAT + b"x" * (1 << 20),
        VM_STAT + b"\0",
        VM_STAT.replace(b"free", b"\xff\xfe"),
    ):
        assert vm.parse_vm_stat(wrong) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"vm.swapusage: total = 4096.00M  used = 1536.50M  free = 2559.50M  (encrypted)\n", (4 << 30, 1_611_137_024)),
        (b"total = 0.00M  used = 0.00M  free = 0.00M", (0, 0)),
        (b"total = 4096.00M  used = 1536.50M  free = 1.00M", None),
        (b"total = 4096,00M  used = 1536,50M  free = 2559,50M", None),
        (b"total = 4096.00M  used = 1536.5", None),
        (b"nonsense", None),
    ],
)
def test_swapusage(raw: bytes, expected: tuple[int, int] | None) -> None:
    assert sysctl.parse_swapusage(raw) == expected


@pytest.mark.parametrize(
    ("level", "name"), [(1, "normal"), (2, "warn"), (4, "critical"), (3, "unknown"), (0, "unknown"), (None, "unknown")]
)
def test_pressure_level(level: int | None, name: str) -> None:
    assert sysctl.pressure_name(level) == name


def test_only_complete_sysctl_lines_count() -> None:
    assert sysctl.parse_sysctl(b"hw.memsize: 25769803776\nhw.model: Mac16,11\nhw.ncpu: 1") == {
        "hw.memsize": "25769803776",
        "hw.model": "Mac16,11",
    }
    assert sysctl.parse_integer("12 ") == 12
    for text in ("", "x", "1e9", "12 34", "\u0663", "9" * 21):
        assert sysctl.parse_integer(text) is None


@pytest.mark.parametrize(
    ("text", "level"),
    [
        (f"{NOTIFY_KEY} 0\n", 0),
        (f"{NOTIFY_KEY} 4\n", 4),
        (f"{NOTIFY_KEY} 4", None),
        (f"{NOTIFY_KEY} 10\n", None),
        (f"{NOTIFY_KEY} 5\n", None),
        (f"{NOTIFY_KEY}: Failed with code 7\n", None),
        ("", None),
    ],
)
def test_thermal_level(text: str, level: int | None) -> None:
    assert level == thermal.parse_notifyutil(text.encode())


@pytest.mark.parametrize(
    ("raw", "value"),
    [(b"61500\n", 61.5), (b"-9200\n", None), (b"0\n", None), (b"x\n", None), (b"999999\n", None), (b"615", None)],
)
def test_zone(raw: bytes, value: float | None) -> None:
    assert value == chip.parse_millidegrees(raw)


def test_linux_sensors_are_read_and_absent_ones_named(tmp_path: Path) -> None:
    one = ThermalCollector(Chip("linux", sys_class=tmp_path), "linux")
    assert "no hwmon sensor" in one.read().failed["hwmon"]
    for number, value in enumerate(("41000\n", "63500\n", "junk\n")):
        zone = tmp_path / "thermal" / f"thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(value)
    assert ThermalCollector(Chip("linux", sys_class=tmp_path), "linux").read().fields["package_temp_mc"] == 63_500
    for number, (name, degrees) in enumerate((("nvme", "80000\n"), ("coretemp", "55000\n"))):
        folder = tmp_path / "hwmon" / f"hwmon{number}"
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "temp1_input").write_text(degrees)
        (folder / "fan1_input").write_text("1200\n")
    fields = ThermalCollector(Chip("linux", sys_class=tmp_path), "linux").read().fields
    assert fields["package_temp_mc"] == 55_000, "the processor's, not the disk's"
    assert fields["fan_rpm"] == (1200, 1200)
    assert "thermal_level" not in fields, "Linux has no such level"


def test_a_window_has_the_peak_and_time_weighted_mean_temperature(tmp_path: Path) -> None:
    zone = tmp_path / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    clock = [0.0]
    one = ThermalCollector(Chip("linux", sys_class=tmp_path, clock=lambda: clock[0]), "linux", clock=lambda: clock[0])
    for at_s, degrees in ((0, 40), (2, 80), (4, 50), (8, 50)):
        clock[0] = float(at_s)
        (zone / "temp").write_text(f"{degrees}000\n")
        one.poll()
    clock[0] = 10.0
    fields = one.read().fields
    assert fields["package_temp_mc"] == 80_000
    assert fields["package_temp_mean_mc"] == round((40 * 2 + 80 * 2 + 50 * 6) / 10 * 1000)


def test_a_gauge_is_time_weighted_and_drops_stale_values() -> None:
    gauge = Gauge()
    assert gauge.close(0.0) is None
    gauge.add(0.0, 10.0)
    gauge.add(3.0, 20.0)
    assert gauge.close(4.0) == Seen(mean=(10 * 3 + 20) / 4, most=20.0, covered_s=4.0)
    gauge.add(5.0, 0.0)
    assert gauge.close(6.0) == Seen(mean=10.0, most=20.0, covered_s=2.0), "what held at its beginning is in the window"
    assert gauge.close(12.0) == Seen(mean=0.0, most=0.0, covered_s=6.0)
    assert gauge.close(100.0) == Seen(mean=0.0, most=0.0, covered_s=8.0), "not seen since 5: it holds until 20"
    assert gauge.close(200.0) is None
    gauge.add(200.0, 7.0)
    assert gauge.close(200.0) == Seen(mean=7.0, most=7.0, covered_s=0.0)
    gauge.add(203.0, None)
    assert gauge.close(210.0) == Seen(mean=7.0, most=7.0, covered_s=3.0)


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.floats(0.0, 1e6)), min_size=1, max_size=30))
def test_gauge_windows_add_up(seen: list[tuple[float, float]]) -> None:
    whole, parts, now = Gauge(), Gauge(), 0.0
    energy = covered = 0.0
    for after_s, value in seen:
        now += after_s
        whole.add(now, value)
        parts.add(now, value)
        part = parts.close(now)
        assert part is not None
        energy, covered = energy + part.mean * part.covered_s, covered + part.covered_s
    all_of_it = whole.close(now)
    assert all_of_it is not None
    assert covered == pytest.approx(all_of_it.covered_s)
    assert energy == pytest.approx(all_of_it.mean * all_of_it.covered_s)


# ---- power ----


def powercap(folder: Path, counter: int, *, package: str = "intel-rapl:0") -> None:
    (folder / package).mkdir(exist_ok=True)
    (folder / package / "energy_uj").write_text(f"{counter}\n")
    (folder / package / "name").write_text("psys\n" if package == "intel-rapl:1" else "package-0\n")
    (folder / package / "max_energy_range_uj").write_text("10000000\n")


def test_power_is_a_counter_difference(tmp_path: Path) -> None:
    clock = [0.0]

    def collector() -> PowerCollector:
        return PowerCollector(
            Chip("linux", sys_class=tmp_path / "none"), "linux", counters=Rapl(tmp_path), clock=lambda: clock[0]
        )

    assert "no readable energy counter" in collector().read().failed["rapl"]
    powercap(tmp_path, 1_000_000)
    powercap(tmp_path, 999, package="intel-rapl:0:0")
    powercap(tmp_path, 999_999, package="intel-rapl:1")
    one = collector()
    assert one.read().fields == {}
    powercap(tmp_path, 6_000_000)
    clock[0] = 2.0
    fields = one.read().fields
    assert (fields["energy_mj"], fields["soc_power_mw"], fields["energy_source"]) == (5_000, 2_500, "rapl")
    powercap(tmp_path, 1_000_000)
    clock[0] = 4.0
    assert one.read().fields["energy_mj"] == 5_000, "it went round: 4 to the end of its range, 1 from there"


@pytest.mark.parametrize(
    ("after", "busy", "expected"),
    [
        ({"cpu": 1_500, "gpu": 300}, 0.5, 700),
        ({"cpu": 1_000, "gpu": 300}, 0.5, None),  # busy, and its counter is constant
        ({"cpu": 1_000, "gpu": 300}, 0.03, None),  # one of 32 cores
        ({"cpu": 1_000, "gpu": 300}, 0.01, 200),
        ({"cpu": 900, "gpu": 300}, 0.5, None),
        ({"cpu": 1_500}, 0.5, None),
        ({"cpu": 1_500, "gpu": 300, "ane": 5}, 0.5, None),
    ],
)
def test_constant_or_decreasing_counters_give_no_reading(
    after: dict[str, int], busy: float, expected: int | None
) -> None:
    assert spent_uj(Energy({"cpu": 1_000, "gpu": 100}), Energy(after), busy=busy) == expected


def test_counter_wrap_is_distinguished_from_reset(tmp_path: Path) -> None:
    whole = {"p": 262_143_328_850}
    near_the_end, low = Energy({"p": 262_000_000_000}), Energy({"p": 5_000_000_000})
    assert spent_uj(near_the_end, Energy({"p": 1_000_000}), busy=1.0, wraps=whole) == 144_328_850
    assert spent_uj(low, Energy({"p": 10_000_000}), busy=1.0, wraps=whole) is None, "5 kJ before, 10 J after"
    clock = [0.0]
    one = PowerCollector(
        Chip("linux", sys_class=tmp_path / "none"), "linux", counters=Rapl(tmp_path), clock=lambda: clock[0]
    )
    powercap(tmp_path, 1_000_000)
    one.read()
    clock[0] = 2.0
    powercap(tmp_path, 3_001_000_000)
    reading = one.read()
    assert "soc_power_mw" not in reading.fields
    assert "energy_mj" not in reading.fields
    assert reading.failed["rapl"] == "energy counters jumped", "1,500 W are none of a node's"


def test_a_sum_without_cpu_power_is_none(tmp_path: Path) -> None:
    line = b'{"temp":{},"cpu_power":%s,"gpu_power":9.0,"all_power":%s}'
    silent, measured = macmon.parse_macmon(line % (b"0.0", b"9.0")), macmon.parse_macmon(line % (b"0.1", b"9.1"))
    assert silent is not None
    assert measured is not None
    assert (silent.soc_w, measured.soc_w) == (None, 9.1)
    plist = '<plist version="1.0"><dict><key>elapsed_ns</key><integer>1000000000</integer><key>processor</key><dict>'
    for cpu, soc in ((0, None), (100, 9100)):
        power = f"<key>cpu_power</key><real>{cpu}</real><key>combined_power</key><real>{9000 + cpu}</real>"
        found = powermetrics.parse_document(f"{plist}{power}</dict></dict></plist>".encode())
        assert found is not None
        assert found.soc_mw == soc


def test_soc_energy_is_the_sum_of_reported_parts() -> None:
    class Metrics:
        cpu_total_mj, gpu_mj, ane_mj, dram_mj = 1200, 30.5, None, 7

    assert energy_of(Metrics()) == Energy({"cpu": 1_200_000, "gpu": 30_500}), "memory is no part of the chip's power"
    with pytest.raises(Failure, match="no CPU energy counter"):
        energy_of(object())


def test_three_power_sources_are_separate_and_parts_do_not_exceed_the_total() -> None:
    clock, watts = [0.0], {"system": 10.0, "soc": 4.0}

    class Fixed(Chip):
        def read(self) -> chip.ChipReading:
            return chip.ChipReading(source="x", system_w=watts["system"], soc_w=watts["soc"])

    one = PowerCollector(Fixed("darwin"), "darwin", counters=Rapl(Path("/none")), clock=lambda: clock[0])
    one.poll()
    clock[0] = 10.0
    fields = one.read().fields
    assert (fields["system_power_mw"], fields["soc_power_mw"]) == (10_000, 4_000)
    assert (fields["energy_mj"], fields["energy_source"]) == (100_000, "PSTR")
    watts.update(soc=140.0)
    one.poll()
    clock[0] = 20.0
    found = one.read()
    assert "soc_power_mw" not in found.fields
    assert "more than the whole system" in found.failed["soc_power"]


def test_power_known_for_part_of_a_window_is_not_its_energy(tmp_path: Path) -> None:
    clock, watts = [0.0], [10.0]

    class Fixed(Chip):
        def read(self) -> chip.ChipReading:
            return chip.ChipReading(source="smc", system_w=watts[0] or None)

    powercap(tmp_path, 0)
    one = PowerCollector(Fixed("darwin"), "darwin", counters=Rapl(tmp_path), clock=lambda: clock[0])
    one.read()
    for at_s in range(0, 62, 2):
        clock[0] = float(at_s)
        watts[0] = 10.0 if at_s < 20 else 0.0
        one.poll()
    powercap(tmp_path, 9_000_000)
    fields = one.read().fields
    assert (fields["energy_mj"], fields["energy_source"]) == (9_000, "ioreport")


def test_powermetrics_documents_are_independent_of_chunk_boundaries() -> None:
    stream = powermetrics.Documents()
    raw = PLIST + b"\n\0" + PLIST.replace(b"500.5", b"oops") + b"\n\0" + PLIST.replace(b"Heavy", b"Weird")
    found = [sample for n in range(len(raw)) for sample in stream.feed(raw[n : n + 1])]
    assert [(s.cpu_mw, s.gpu_mw, s.soc_mw, s.level) for s in found] == [
        (500.5, 20.0, 520.5, 2),
        (None, 20.0, None, 2),
        (500.5, 20.0, 520.5, None),
    ]
    assert stream.feed(b"x" * (2 << 20)) == []
    assert len(stream.feed(PLIST)) == 1, "noise without an end is dropped"


def test_an_xml_bomb_is_rejected() -> None:
    entities = b"".join(b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10) for n in range(1, 10))
    bomb = (
        b'<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a0 "x">' + entities + b"]><plist><string>&a9;</string></plist>"
    )
    assert powermetrics.parse_document(bomb) is None


# ---- how sources are read ----


def script(folder: Path, text: str) -> str:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [("exit 3", "exit 3"), ("exec sleep 60", "timed out after"), ("yes", "exceeds 1 MiB"), ("kill -9 $$", "exit -9")],
)
def test_a_command_that_fails_hangs_or_never_ends_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    monkeypatch.setattr(source, "COMMAND_TIMEOUT_S", 0.5)
    with pytest.raises(Failure, match=why):
        command_bytes(script(tmp_path, text))
    with pytest.raises(Failure, match="No such file"):
        command_bytes(str(tmp_path / "none"))
    assert command_bytes(script(tmp_path, "echo fine")) == b"fine\n"


def test_a_failing_source_is_retried_with_back_off() -> None:
    clock, asked = [0.0], [0]

    def read() -> int:
        asked[0] += 1
        raise Failure("broken")

    guarded = Guarded("x", lambda: clock[0])
    for second in range(3600):
        clock[0] = float(second)
        assert guarded.call(read) is None
        assert guarded.reason == "broken"
    assert asked[0] == 8, "three times, then after 1, 2, 4, 8 and 16 minutes"
    clock[0] = 10_000.0
    assert guarded.call(lambda: 5) == 5
    assert guarded.reason == ""


def test_a_child_is_read_without_blocking_and_restarted(tmp_path: Path) -> None:
    clock = [0.0]
    child = Child([script(tmp_path, "echo one; exec sleep 60")], lambda: clock[0])
    deadline = time.monotonic() + 10
    while not (said := child.read()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert said == b"one\n"
    clock[0] = 100.0
    with pytest.raises(Failure, match="no output for 30 s"):
        child.read()
    child.read()
    child.close()
    ended = Child([script(tmp_path, "exit 4")], lambda: clock[0])
    ended.read()
    time.sleep(0.3)
    with pytest.raises(Failure, match=r"exited \(status 4\)"):
        ended.read()
    ended.close()
    with pytest.raises(Failure, match="No such file"):
        Child([str(tmp_path / "none")]).read()


def test_macmon_and_powermetrics_as_children(tmp_path: Path) -> None:
    line = '{"temp":{"cpu_temp_avg":51.5,"gpu_temp_avg":0.0},"sys_power":9.5,"all_power":0.0,"fans":[{"rpm":1200}]}'
    program = script(tmp_path, f"echo noise; echo '{line}'; exec sleep 60")
    pipe = MacmonPipe(program=program)
    found = _eventually(lambda: pipe.last() or _refuse())
    assert found == macmon.Macmon(cpu_mean_c=51.5, system_w=9.5, fans_rpm=(1200,))
    pipe.close()
    with pytest.raises(Failure, match="not installed"):
        MacmonPipe(program=str(tmp_path / "none"))
    (tmp_path / "document").write_bytes(PLIST)
    stream = PowermetricsStream(Child([script(tmp_path, f"cat '{tmp_path}/document'; exec sleep 60")]))
    sample = _eventually(lambda: stream.last() or _refuse())
    assert sample.level == 2
    stream.close()


def test_a_child_that_exits_at_once_backs_off_and_is_reported(tmp_path: Path) -> None:
    clock, starts = [0.0], tmp_path / "starts"
    program = script(tmp_path, f"echo x >> '{starts}'; exit 3")
    stream = PowermetricsStream(Child([program], lambda: clock[0]), lambda: clock[0])
    reasons = set()
    for second in range(0, 60, 2):
        clock[0] = float(second)
        assert stream.last() is None
        process = stream._child._process
        if process is not None:
            process.wait()
        reasons.add(stream.guard.reason)
    stream.close()
    assert reasons == {"", f"{Path(program).name}: exited (status 3)"}, "nothing is wrong before it has ended"
    assert len(starts.read_text().split()) <= 4


def test_one_powermetrics_stall_costs_only_its_restart(tmp_path: Path) -> None:
    (tmp_path / "document").write_bytes(PLIST)
    clock, starts = [0.0], tmp_path / "starts"
    program = script(tmp_path, f"echo x >> '{starts}'; cat '{tmp_path}/document'; exec sleep 60")
    stream = PowermetricsStream(Child([program], lambda: clock[0]), lambda: clock[0])

    while stream.last() is None:
        time.sleep(0.02)
    known = []
    for second in range(2, 80, 2):
        clock[0] = float(second)
        if stream.last() is None and second > 30:
            time.sleep(0.05)  # real time for the restarted child
        known.append(stream.last() is not None)
    stream.close()
    gap = known.index(True, known.index(False)) - known.index(False)
    assert 2 * gap <= 24, "fresh for 15 s, restarted after 30"
    assert stream.guard.reason == ""


def test_a_fallback_source_stops_when_the_primary_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, broken = [0.0], [True]

    class Controller:
        def values(self) -> dict[str, float]:
            if broken[0]:
                raise Failure("smc: broken")
            return {"Tp01": 30.0, "PSTR": 5.0}

        def close(self) -> None:
            pass

    hot_line, cool_line = (f'{{"temp":{{"cpu_temp_avg":{celsius}}},"sys_power":9.0}}' for celsius in (95.0, 31.0))
    ran = tmp_path / "ran"
    says = f"if [ -e '{ran}' ]; then echo '{cool_line}'; else touch '{ran}'; echo '{hot_line}'; echo '{hot_line}'; fi"
    program = script(tmp_path, f"{says}; exec sleep 60")
    real = MacmonPipe
    monkeypatch.setattr("agent.telemetry.sensors.chip.MacmonPipe", lambda clock: real(clock, program))
    one = Chip("darwin", open_smc=Controller, clock=lambda: clock[0])  # type: ignore[arg-type]

    def hot() -> bool:
        clock[0] += 1.0
        found = one.read()
        return found is not None and found.source.startswith("macmon")

    _eventually(lambda: hot() or _refuse())
    child = one._macmon._child._process  # type: ignore[union-attr]
    assert child is not None
    assert set(one.failed) == {"smc"}
    broken[0], clock[0] = False, 10_000.0
    found = one.read()
    assert found is not None
    assert found.source.startswith("smc")
    assert child.returncode is not None, "it has been ended"
    assert one.failed == {}
    broken[0], clock[0] = True, 20_000.0
    again = one.read()
    one.close()
    assert again is None or again.package_c == 31.0, "what it says now is new"


def _eventually(read: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 10
    while True:
        try:
            return read()
        except Failure:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _refuse() -> Any:
    raise Failure("nothing yet")


# ---- the machine ----


@pytest.mark.parametrize(
    ("after", "share"),
    [
        ({"user": 3.0, "idle": 7.0}, 300_000),
        ({"user": 5.0, "idle": 2.0, "iowait": 3.0, "guest": 5.0}, 500_000),
        ({"user": 0.0, "idle": 0.0}, None),
        ({"user": -1.0, "idle": 2.0}, 0),
        ({"user": 3.0, "idle": -1.0}, None),
    ],
)
def test_cpu_use_is_a_counter_difference(after: dict[str, float], share: int | None) -> None:
    assert busy_ppm(dict.fromkeys(after, 0.0), after) == share


def test_core_tiers_are_recognised_by_any_name() -> None:
    values = {
        "hw.model": "Mac17,3",
        "machdep.cpu.brand_string": "Apple M5 Pro",
        "hw.memsize": "68719476736",
        "hw.perflevel0.logicalcpu": "6",
        "hw.perflevel1.logicalcpu": "12",
        "kern.osproductversion": "27.0",
        "kern.osversion": "26A428",
    }
    found = hardware_of(values, 0)
    assert (found.model, found.chip, found.cores) == ("Mac17,3", "Apple M5 Pro", (6, 12))
    assert (found.memory_bytes, found.system) == (64 << 30, "macOS 27.0 26A428")
    assert hardware_of({}, 5).memory_bytes == 5
    assert hardware().memory_bytes > 1 << 30


def test_psi() -> None:
    raw = b"some avg10=0.00 avg60=0.00 avg300=0.00 total=4242\nfull avg10=0.00 total=1\n"
    assert memory.parse_psi_total_us(raw) == 4242
    assert memory.parse_psi_total_us(b"some total=42") is None
    assert memory.parse_psi_total_us(b"") is None


STAT = b"cpu  300 0 100 500 100 0 0 0 50 0\ncpu0 300 0 100 500 100 0 0 0 50 0\n"


def test_kernel_files_of_linux() -> None:
    found = parse_proc_stat(STAT)
    assert found is not None
    assert (len(found), found["user"], found["iowait"], found["guest"]) == (10, 300.0, 100.0, 50.0)
    assert parse_proc_stat(b"cpu  1 2 3 4\n") == {"user": 1.0, "nice": 2.0, "system": 3.0, "idle": 4.0}
    for raw in (b"", STAT[:20], b"cpu0 1 2 3 4\n", b"cpu  1 2 3\n", b"cpu  1 2 3 x\n", b"cpu  1 -2 3 4\n"):
        assert parse_proc_stat(raw) is None
    assert machine.parse_meminfo(b"MemTotal:  16 kB\nHugePages_Total:  0\nMemFree: 8 kB\nSwapFr") == {
        "MemTotal": 16 << 10,
        "MemFree": 8 << 10,
    }
    assert memory.parse_vmstat(b"nr_free 7\npswpin 12\npswpout 34\n") == (12, 34)
    assert memory.parse_vmstat(b"pswpin 12\npswpout 3") is None


def test_a_missing_kernel_file_loses_its_own_fields(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\nSwapTotal: 8 kB\n")
    one = MemoryCollector("linux", proc=tmp_path)
    one.read()
    reading = one.read()
    assert reading.fields == {
        "memory_total_bytes": 4 << 30,
        "memory_used_bytes": 3 << 30,
        "memory_used_max_bytes": 3 << 30,
        "memory_source": "meminfo",
        "swap_total_bytes": 8 << 10,
    }
    assert reading.failed.keys() == {"vmstat", "psi"}
    (tmp_path / "meminfo").unlink()
    (tmp_path / "vmstat").write_text("pswpin 12\npswpout 34\n")
    one.read()  # what held when the window began
    reading = one.read()
    assert reading.fields == {"memory_total_bytes": machine.memory_bytes(), "swap_in_bytes": 0, "swap_out_bytes": 0}
    assert reading.failed.keys() == {"meminfo", "psi"}
    (tmp_path / "vmstat").write_text("pswpin 14\npswpout 34\n")
    assert one.read().fields["swap_in_bytes"] > 0


def test_times_of_two_sources_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "stat").write_bytes(STAT)
    use = CpuUse(CpuTimes("linux", stat=tmp_path / "stat", last=lambda: {"user": 0.0, "idle": 1.0}))
    (tmp_path / "stat").write_bytes(STAT.replace(b"300", b"400"))
    assert use.busy_ppm() == 1_000_000
    (tmp_path / "stat").unlink()
    assert use.busy_ppm() is None


def test_nothing_of_a_host_that_fails_takes_the_rest_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: object) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("agent.process.machine.shutil.disk_usage", fails)
    blind = HostCollector(tmp_path, CpuUse(lambda: None))
    assert blind.read().failed.keys() == {"cpu", "disk"}
    assert blind.read().fields == {}
    assert "no source tells CPU times" in blind.sources()[0].reason
    reading = HostCollector(tmp_path).read()
    assert reading.failed.keys() == {"disk"}
    collector = PowerCollector(Chip("linux", sys_class=tmp_path), "linux", cpu_times=lambda: None)
    assert collector.read().fields.keys() <= {"energy_mj", "energy_source", "soc_power_mw"}


def test_a_fact_of_the_start_that_cannot_be_learnt_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> bytes:
        raise ValueError("whatever a library or a system may raise")

    monkeypatch.setattr(host, "bytes_or_none", fails)
    monkeypatch.setattr(host, "command_bytes", fails)
    assert (hardware().chip, host.boot_id(), host.hardware_id()) == ("", "", "unknown")
    monkeypatch.setattr("sys.platform", "darwin")
    assert (hardware("darwin", fails).chip, host.boot_id(), host.hardware_id()) == ("", "", "unknown")


def test_free_space_is_of_the_folders_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def usage(path: Path) -> object:
        asked.append(str(path))
        return type("Usage", (), {"free": 7})

    monkeypatch.setattr("agent.process.machine.shutil.disk_usage", usage)
    assert HostCollector(tmp_path / "not" / "yet").read().fields["disk_free_bytes"] == 7
    assert HostCollector(tmp_path).read().fields["disk_free_bytes"] == 7
    assert asked == [str(tmp_path)] * 2


def test_an_implausible_disk_size_drops_only_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.process.machine.shutil.disk_usage", lambda _: SimpleNamespace(free=8 << 60))
    one = HostCollector(Path("/"))
    reading = one.read()
    assert "disk_free_bytes" not in reading.fields
    assert "exceeds the largest value of a window" in reading.failed["disk"]
    assert "exceeds the largest value of a window" in one.sources()[0].reason


def test_a_hanging_system_call_does_not_block_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.telemetry.sensors.chip.CLOSE_S", 0.05)
    chip, over, entered = Chip("linux", sys_class=tmp_path), threading.Event(), threading.Event()

    def hangs() -> None:
        entered.set()
        over.wait(30)

    monkeypatch.setattr(chip, "_read", hangs)
    reader = threading.Thread(target=chip.read)
    reader.start()
    try:
        assert entered.wait(10)
        chip.close()
        assert reader.is_alive(), "it was not waited for"
    finally:
        over.set()
        reader.join()


def test_this_machine_can_be_read() -> None:
    sensors, fields = Sensors(), dict[str, object]()
    try:
        for collector in sensors.all:
            collector.poll()
            fields.update(collector.read().fields)
            assert collector.sources(), collector.name
    finally:
        sensors.close()
    sample = HostSample(**fields)  # type: ignore[arg-type]
    assert sample.memory_total_bytes is not None
    assert sample.memory_used_bytes is not None
    assert 0 < sample.memory_used_bytes <= sample.memory_total_bytes
    assert MemoryCollector().read().fields["swap_used_bytes"] >= 0


# ---- noise ----

PARSERS: dict[str, Callable[[bytes], object]] = {
    "vm_stat": vm.parse_vm_stat,
    "memory_pressure": vm.parse_memory_pressure,
    "swapusage": sysctl.parse_swapusage,
    "psi": memory.parse_psi_total_us,
    "notifyutil": thermal.parse_notifyutil,
    "zone": chip.parse_millidegrees,
    "fan": chip.parse_rpm,
    "rapl": power.parse_energy_uj,
    "macmon": macmon.parse_macmon,
    "plist": powermetrics.parse_document,
    "shelly": http.parse_shelly,
    "tasmota": lambda raw: http.parse_tasmota(raw, 0),
}
NUMBERS = ("zone", "fan", "rapl")
"""Files that contain just one number: noise may happen to be one."""


@pytest.mark.parametrize("name", [name for name in PARSERS if name not in NUMBERS])
@given(seed=st.integers(0, 1 << 62), size=st.integers(0, 400), printable=st.booleans())
def test_noise_gives_no_reading(name: str, seed: int, size: int, *, printable: bool) -> None:
    # not hypothesis' own bytes: it prefers the valid ones in this file
    raw = random.Random(seed).randbytes(size)
    assert PARSERS[name](bytes(32 + byte % 95 for byte in raw) if printable else raw) is None


@pytest.mark.parametrize("name", fuzz_parsers.TARGETS)
def test_mutated_input_never_raises_nor_gives_impossible_values(name: str) -> None:
    fuzz_parsers.fuzz(name, 2_000, seed=7)


@pytest.mark.parametrize("name", PARSERS)
def test_oversized_output_gives_no_reading(name: str) -> None:
    for filling in (b"\0", b"9", b"vm.swapusage: total = 1.00M  used = 1.00M  free = 0.00M\n"):
        assert PARSERS[name](filling * (100_000_000 // len(filling))) is None


def test_text_must_be_bounded_utf8_without_nul() -> None:
    assert text_of("grüße".encode()) == "grüße"
    assert text_of(b"a\0b") == text_of(b"\xff\xfe") == text_of(b"x" * ((1 << 20) + 1)) == ""


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


def test_what_another_place_answered_is_a_record_of_its_own_without_a_worker() -> None:
    ledger = Ledger()
    one = Answered(model="m", outcome="ok", worker="n1", version="v", key_id="k", task_class="ROUTINE", prompt_tok=5)
    ledger.record(one)
    for usd_micro in (3, 4):
        left = msgspec.structs.replace(one, place="hosted", place_category="outside", usd_micro=usd_micro)
        ledger.record(left)
    here, there = sorted(ledger.drain(), key=lambda served: served.place)
    assert (here.place, here.worker, here.version, here.requests, here.usd_micro) == ("", "n1", "v", 1, 0)
    assert (there.place, there.place_category, there.requests, there.usd_micro) == ("hosted", "outside", 2, 7)
    assert (there.worker, there.version, there.key_id, there.task_class) == ("", "", "k", "ROUTINE")
