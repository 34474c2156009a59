"""Captures of real machines, each with its expected values. The captures are not part of this project."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agent.config import Meter, MeterKind
from agent.telemetry.meters import http, snmp
from agent.telemetry.meters.snmp import Outlet
from agent.telemetry.sensors import macmon, powermetrics, smc, sysctl, vm
from agent.telemetry.sensors.host import hardware_of
from tests.agent.telemetry.test_meters import pdu, plug, read

CAPTURES = Path(os.environ.get("MLXRACK_CAPTURES", "../shared/captures"))
pytestmark = pytest.mark.skipif(not CAPTURES.is_dir(), reason="no captures of real machines here (MLXRACK_CAPTURES)")

GIB = 1 << 30
_SMC_LINE = re.compile(r"^\s+(\S{4})\s+\[(.{4})\].*?\(bytes ([0-9a-f]{2}(?: [0-9a-f]{2})*)\)", re.MULTILINE)


def smc_values(raw: bytes) -> dict[str, float]:
    """SMC keys of a dump with their decoded values."""
    found = {}
    for key, kind, digits in _SMC_LINE.findall(raw.decode()):
        value = smc.decode(kind, bytes.fromhex(digits.replace(" ", "")))
        if value is not None:
            found[key] = value
    return found


def snmp_values(raw: bytes) -> dict[str, int]:
    """Integers of an SNMP walk by object identifier."""
    rows = [row.split("|") for row in raw.decode().splitlines()]
    return {row[0]: int(row[2]) for row in rows if len(row) == 3 and row[1] in ("2", "66", "67")}


def hottest(raw: bytes) -> tuple[float, float, float]:
    found = smc.temperatures(smc_values(smc_dump(raw)))
    assert found.pcore_c is not None
    assert found.package_c is not None
    assert found.gpu_c is not None
    return round(found.pcore_c, 1), round(found.package_c, 1), round(found.gpu_c, 1)


def smc_dump(raw: bytes) -> bytes:
    return raw


def used_gib(raw: bytes) -> float:
    found = vm.parse_vm_stat(raw)
    assert found is not None
    return round(found.used_bytes / GIB, 2)


def swapped(raw: bytes) -> tuple[int | None, int | None]:
    found = vm.parse_vm_stat(raw)
    assert found is not None
    return found.swapped_in_bytes, found.swapped_out_bytes


def watts(raw: bytes) -> list[tuple[float | None, float | None, float | None]]:
    """CPU, GPU and package power in milliwatts, of each sample."""
    samples = powermetrics.Documents().feed(raw) if raw.startswith(b"<?xml") else powermetrics.parse_text(raw)
    return [tuple(None if w is None else round(w) for w in (s.cpu_mw, s.gpu_mw, s.soc_mw)) for s in samples]  # type: ignore[misc]


def levels(raw: bytes) -> list[int | None]:
    samples = powermetrics.Documents().feed(raw) if raw.startswith(b"<?xml") else powermetrics.parse_text(raw)
    return [sample.level for sample in samples]


def line(raw: bytes) -> tuple[float | None, ...] | None:
    found = macmon.parse_macmon(raw)
    parts = (found.system_w, found.soc_w, found.cpu_mean_c, found.gpu_mean_c) if found else None
    return parts and tuple(None if part is None else round(part, 2) for part in parts)


def profile(raw: bytes) -> tuple[str, str, int]:
    found = hardware_of(sysctl.parse_system_profiler(raw), 0)
    return found.model, found.chip, found.memory_bytes


def first_limit(raw: bytes) -> int | None:
    """Only the first of several limits in a log."""
    blocks = raw.split(b"CPU Power notify")
    return sysctl.parse_pmset_therm(blocks[1])


def outlet(kind: str, *numbers: int) -> Callable[[bytes], float | None]:
    """Watts of one outlet in an SNMP walk."""
    one = Outlet(kind=kind, numbers=numbers)
    return lambda raw: snmp.watts(one, snmp_values(raw))


KNOWN: list[tuple[str, Callable[[bytes], Any], Any]] = [
    ("vm_stat/submission_24gb_swapped.txt", used_gib, 16.71),
    ("vm_stat/submission_24gb_swapped.txt", swapped, (997_990 * 16_384, 1_484_124 * 16_384)),
    ("vm_stat/wd-test_8gb_compressor-heavy.txt", used_gib, 5.98),
    ("vm_stat/slotstream_mte-mac_before.txt", used_gib, 16.49),
    ("vm_stat/slotstream_mte-mac_before.txt", swapped, (41_698_285 * 16_384, 69_922_789 * 16_384)),
    ("vm_stat/go-osstat_intel-4k.txt", used_gib, 11.67),
    ("vm_stat/physical-free-test_intel-4k_swapped.txt", used_gib, 3.88),
    ("memory_pressure/captured-host-16gb-4k_Q.txt", vm.parse_memory_pressure, 60),
    ("memory_pressure/submission-24gb_Q.txt", vm.parse_memory_pressure, 80),
    ("sysctl/px-80_swapusage.txt", sysctl.parse_swapusage, (4 * GIB, round(2743.5 * (1 << 20)))),
    ("sysctl/submission-24gb_swapusage.txt", sysctl.parse_swapusage, (4 * GIB, round(2694.19 * (1 << 20)))),
    ("sysctl/ansible_macos-sysctl-vm-partial.txt", sysctl.parse_swapusage, (2 * GIB, round(1017.5 * (1 << 20)))),
    (
        "sysctl/archspec-201_m4pro-12core_hw.txt",
        lambda raw: (lambda h: (h.memory_bytes, h.cores))(hardware_of(sysctl.parse_sysctl(raw), 0)),
        (24 * GIB, (8, 4)),
    ),
    ("smc/ismc_report-m4.txt", hottest, (55.8, 55.8, 32.0)),
    ("smc/ismc_report-m4-2.txt", hottest, (65.7, 65.7, 41.8)),
    ("smc/ismc_report-m4-6.txt", hottest, (53.3, 53.3, 40.2)),
    ("smc/ismc_report-m4-pro.txt", hottest, (80.4, 80.4, 57.2)),
    ("pmset/node_exporter-2031_intel12_therm.txt", sysctl.parse_pmset_therm, 100),
    ("pmset/session-log_intel16_2026_therm.txt", sysctl.parse_pmset_therm, 100),
    ("pmset/menumeters-158_intel8_thermlog.txt", sysctl.parse_pmset_therm, 100),
    ("pmset/thermlog-parser_intel_throttled_thermlog.txt", sysctl.parse_pmset_therm, 100),
    ("pmset/thermlog-parser_intel_throttled_thermlog.txt", first_limit, 90),
    ("system_profiler/m4-air_SPHardwareDataType_serial-removed.txt", profile, ("Mac16,12", "Apple M4", 16 * GIB)),
    ("system_profiler/macmon-51_m4-air_SPHardwareDataType.txt", profile, ("Mac16,12", "Apple M4", 16 * GIB)),
    ("macmon/beszel-test_v0.7-16gb.json", line, (10.5, 0.65, 23.04, 29.45)),
    ("macmon/trimmed_v0.8.0_64gb.json", line, (7.68, 0.55, 50.03, 47.14)),
    ("macmon/macmon-issue-51_m4-air_v0.6-soc-info.truncated.json.txt", line, None),
    (
        "powermetrics/matiasinsaurralde_gpu_power_multiple_samples.plist",
        watts,
        [(None, 4, None), (None, 21, None), (None, 157, None), (None, 29, None), (None, 25, None)],
    ),
    ("powermetrics/pumas_powermetrics-output-m1.plist", watts, [(44, 15, 59)]),
    ("powermetrics/pumas_powermetrics-output-m1.plist", levels, [0]),
    ("powermetrics/pumas_powermetrics-output-m1-2.plist", watts, [(103, 19, 122)]),
    ("powermetrics/pumas_powermetrics-output-m1-2.plist", levels, [0]),
    ("powermetrics/power-server_sonoma-m1max.txt", watts, [(211, 147, 359)]),
    ("powermetrics/power-server_tahoe-m4-summary.txt", watts, [(420, 98, 519)]),
    (
        "powermetrics/codecarbon_mock_powermetrics_log.txt",
        lambda raw: watts(raw)[:2],
        [(947, 153, 1100), (420, 67, 487)],
    ),
    ("powermetrics/codecarbon_mock_powermetrics_log.txt", lambda raw: len(watts(raw)), 10),
    (
        "powermetrics/singhkays_m1mini_macos11_first3samples.txt",
        watts,
        [(None, 1, None), (None, 1, None), (None, 0, None)],
    ),
    ("powermetrics/singhkays_powermetrics-help_macos11.txt", watts, []),
    ("powermetrics/all-smi_m1pro_excerpt.txt", watts, [(289, 112, 401)]),
    ("powermetrics/all-smi_m1ultra_excerpt.txt", watts, [(5247, 139, 5385)]),
    ("powermetrics/all-smi_m3pro_excerpt.txt", watts, [(3224, 31, 3254)]),
    ("powermetrics/beszel_m2pro_gpu_power.txt", watts, [(None, 4, None)]),
    ("powermetrics/thermal_m4air_nominal.txt", levels, [0]),
    ("shelly/plugusg4_GetStatus_switch0.json", http.parse_shelly, 0.0),
    ("shelly/evcc-gen2_switch_GetStatus.json", http.parse_shelly, 47.11),
    ("shelly/plugusg4_GetDeviceInfo.json", http.parse_shelly, None),
    ("tasmota/tasmota-10232_status8.json", lambda raw: http.parse_tasmota(raw, 0), 1.0),
    ("tasmota/tasmota-3340_status8_no-energy-sensor.json", lambda raw: http.parse_tasmota(raw, 0), None),
    ("snmp/librenms_apc_apdu9959eu3.snmprec", outlet("apc_device", 1), 1170.0),
    ("snmp/librenms_apc_apdu9959eu3.snmprec", outlet("apc_legacy"), 1160.0),
    ("snmp/librenms_apc_ap8853.snmprec", outlet("apc_device", 1), 1140.0),
    ("snmp/librenms_apc_ap7900b.snmprec", outlet("apc_device", 1), None),
    ("snmp/librenms_apc_ap7900b.snmprec", outlet("apc_legacy"), 312.0),
    ("snmp/librenms_raritan-pdu_px2.snmprec", outlet("raritan_outlet", 1, 3), 68.0),
    ("snmp/librenms_raritan-pdu_px2.snmprec", outlet("raritan_outlet", 1, 10), 35.0),
    ("snmp/librenms_raritan-pdu_px2.snmprec", outlet("raritan_inlet", 1, 1), 138.0),
    ("snmp/librenms_raritan-pdu_px2.snmprec", outlet("raritan_outlet", 1, 99), None),
]


@pytest.mark.parametrize(("name", "read", "expected"), KNOWN, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(KNOWN)])
def test_captures_of_real_machines_are_parsed_correctly(name: str, read: Callable[[bytes], Any], expected: Any) -> None:
    assert read((CAPTURES / name).read_bytes()) == expected


def test_a_sleeping_cluster_gives_no_temperature() -> None:
    values = smc_values((CAPTURES / "smc/ismc_report-m4-pro.txt").read_bytes())
    kept = [v for k, v in values.items() if k.startswith("Tp") and smc.is_valid(v)]
    assert len([k for k in values if k.startswith("Tp")]) == 102
    assert len(kept) == 51, "the rest are offsets"
    asleep = {key: smc.ASLEEP_C if key.startswith("Tp") and smc.is_valid(v) else v for key, v in values.items()}
    found = smc.temperatures(asleep)
    assert (found.pcore_c, found.pcore_asleep) == (None, True)


def test_truncated_output_gives_nothing_or_the_same() -> None:
    """Every truncation of a capture: it must not give a value that differs from the full capture's."""
    for name, parse, _ in KNOWN:
        raw = (CAPTURES / name).read_bytes()
        if name.startswith(("powermetrics", "smc", "snmp", "sysctl/archspec", "pmset", "system_profiler")):
            continue  # complete samples count, see below; a shorter list of keys has fewer sensors
        whole = parse(raw)
        for end in range(0, len(raw), max(1, len(raw) // 200)):
            try:
                found = parse(raw[:end])
            except AssertionError:
                continue  # nothing was read, which the test itself rejects
            parts = zip(found, whole, strict=True) if parse is swapped else [(found, whole)]
            assert all(part in (of_whole, None) for part, of_whole in parts), f"{name} cut at {end}"


def test_stream_samples_are_independent_of_chunk_boundaries() -> None:
    raw = (CAPTURES / "powermetrics/matiasinsaurralde_gpu_power_multiple_samples.plist").read_bytes()
    whole = powermetrics.Documents().feed(raw)
    for size in (1, 7, 1000, 8191):
        stream = powermetrics.Documents()
        found = [s for begin in range(0, len(raw), size) for s in stream.feed(raw[begin : begin + size])]
        assert found == whole


@pytest.mark.parametrize("name", ["plugusg4_GetStatus_switch0.json", "evcc-gen2_switch_GetStatus.json"])
async def test_plug_captures_are_parsed(name: str) -> None:
    said = (CAPTURES / "shelly" / name).read_bytes()
    async with plug(lambda _: web.Response(body=said, content_type="application/json")) as at:
        watts, problem = await read(Meter(name="x", kind="shelly", at=at, nodes=("n",)))
    assert (watts, problem) == (round(http.parse_shelly(said) or 0.0, 1), "")


async def test_tasmota_captures_with_and_without_a_meter() -> None:
    for name, expected in (("tasmota-10232_status8.json", 1.0), ("tasmota-3340_status8_no-energy-sensor.json", None)):
        said = (CAPTURES / "tasmota" / name).read_bytes()
        async with plug(lambda _, said=said: web.Response(body=said, content_type="application/json")) as at:  # type: ignore[misc]
            watts, problem = await read(Meter(name="x", kind="tasmota", at=at, nodes=("n",)))
        assert watts == expected
        assert bool(problem) == (expected is None)


@pytest.mark.parametrize(
    ("walk", "kind", "numbers", "expected"),
    [
        ("librenms_apc_apdu9959eu3.snmprec", "apc_device", (1,), 1170.0),
        ("librenms_apc_ap8853.snmprec", "apc_device", (1,), 1140.0),
        ("librenms_apc_ap7900b.snmprec", "apc_device", (1,), None),
        ("librenms_apc_ap7900b.snmprec", "apc_legacy", (), 312.0),
        ("librenms_raritan-pdu_px2.snmprec", "raritan_outlet", (1, 3), 68.0),
        ("librenms_raritan-pdu_px2.snmprec", "raritan_inlet", (1, 1), 138.0),
    ],
)
async def test_pdu_captures_are_parsed(
    walk: str, kind: MeterKind, numbers: tuple[int, ...], expected: float | None
) -> None:
    async with pdu(snmp_values((CAPTURES / "snmp" / walk).read_bytes())) as at:
        asked = Meter(name="x", kind=kind, at=at, numbers=numbers, nodes=("n",), secret="env:COMMUNITY")
        watts, problem = await read(asked)
    assert watts == expected
    assert bool(problem) == (expected is None)
