"""Host metrics in a scrape, and dashboard queries that match them."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import agent
from agent.api.host_metrics import HostMetrics
from agent.api.metrics import Metrics
from agent.telemetry.ledger import Answered
from agent.views import NodeView
from agent.wire.frames import Reported
from scripts import record_fixture
from shared.records import EngineWindow, HostSample, ThrottleEvent

FULL = HostSample(
    cpu_ppm=250_000,
    memory_total_bytes=16 << 30,
    memory_used_bytes=8 << 30,
    memory_used_max_bytes=9 << 30,
    memory_wired_bytes=2 << 30,
    memory_compressed_bytes=1 << 30,
    memory_source="host_statistics64",
    memory_pressure="warn",
    gpu_wired_limit_bytes=12 << 30,
    swap_used_bytes=5,
    swap_in_bytes=4096,
    swap_out_bytes=8192,
    disk_free_bytes=7,
    thermal_level="heavy",
    thermal_source="notify",
    thermal_level_us=(50_000_000, 0, 10_000_000, 0, 0),
    thermal_coverage_ppm=1_000_000,
    throttled_5m_ppm=50_000,
    pressured_5m_ppm=60_000,
    package_temp_mc=81_500,
    pcore_temp_mc=80_000,
    gpu_temp_mc=70_000,
    temp_source="smc",
    fan_rpm=(1200, 0),
    system_power_mw=33_500,
    soc_power_mw=20_000,
    energy_mj=2_010_000,
    energy_source="PSTR",
    sources_failed={"ioreport": "not installed"},
)
METERS: list[dict[str, Any]] = [
    {"meter": "shelf", "nodes": ["n1", "n2"], "watts": 71.5, "joules": 143.0, "problem": ""},
    {"meter": "spare", "nodes": ["n3"], "watts": None, "joules": 0.0, "problem": "no answer"},
]


def host(clock: list[float] | None = None) -> HostMetrics:
    push = {
        "state": "waiting",
        "reason": "x",
        "waiting_batches": 3,
        "sent_batches": 9,
        "dropped_batches": 2,
        "held_windows": 1,
    }
    ticks = clock if clock is not None else [0.0]
    return HostMetrics(
        {"node": "n1", "rack": "r", "version": "1"}, lambda: push, lambda: METERS, clock=lambda: ticks[0]
    )


def scraped(one: HostMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    registry = CollectorRegistry()
    registry.register(one)
    text = generate_latest(registry).decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


def test_all_readings_are_exported_in_base_units() -> None:
    clock = [100.0]
    one = host(clock)
    one.sampled(FULL)
    one.sampled(FULL)
    one.throttled(ThrottleEvent(t_ms=1, level="heavy"))
    one.throttled(ThrottleEvent(t_ms=1, level="heavy", open_at_start=True))
    clock[0] = 130.0
    found = scraped(one)
    expected: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
        ("mlxrack_package_temperature_celsius", ()): 81.5,
        ("mlxrack_thermal_pressure_level", ()): 2,
        ("mlxrack_thermal_throttled_fraction_5m", ()): 0.05,
        ("mlxrack_thermal_pressure_seconds_total", (("level", "heavy"),)): 20.0,
        ("mlxrack_thermal_throttle_events_total", (("to", "heavy"),)): 1,
        ("mlxrack_system_power_watts", ()): 33.5,
        ("mlxrack_energy_joules_total", (("source", "PSTR"),)): 4020.0,
        ("mlxrack_wall_power_watts", (("meter", "shelf"), ("nodes", "n1,n2"))): 71.5,
        ("mlxrack_meter_up", (("meter", "spare"),)): 0,
        ("mlxrack_fan_rpm", (("fan", "1"),)): 0,
        ("mlxrack_memory_pressure", (("level", "warn"),)): 1,
        ("mlxrack_memory_pressure", (("level", "normal"),)): 0,
        ("mlxrack_swapped_bytes_total", (("way", "out"),)): 16_384,
        ("mlxrack_source_up", (("source", "smc"),)): 1,
        ("mlxrack_source_up", (("source", "ioreport"),)): 0,
        ("mlxrack_sample_age_seconds", ()): 30,
        ("mlxrack_spool_waiting_batches", ()): 3,
        ("mlxrack_spool_held_batches", ()): 1,
        ("mlxrack_spool_dropped_batches_total", ()): 2,
        ("mlxrack_push_ok", ()): 0,
        ("mlxrack_wall_energy_joules_total", (("meter", "shelf"), ("nodes", "n1,n2"))): 143.0,
    }
    assert {key: found.get(key) for key in expected} == pytest.approx(expected)
    assert ("mlxrack_wall_power_watts", (("meter", "spare"), ("nodes", "n3"))) not in found


def test_missing_readings_are_omitted() -> None:
    one = host()
    one.sampled(HostSample(sources_failed={"smc": "no such service"}))
    names = {name for name, _ in scraped(one)}
    assert not {name for name in names if "temperature" in name or name.endswith("_power_watts")} - {
        "mlxrack_wall_power_watts"
    }
    assert not {name for name in names if "thermal" in name}
    assert "mlxrack_fan_rpm" not in names
    assert scraped(one)["mlxrack_source_up", (("source", "smc"),)] == 0


def test_every_metric_has_help_and_a_unit_in_its_name() -> None:
    one = host()
    one.sampled(FULL)
    units = ("bytes", "ratio", "celsius", "watts", "joules", "seconds", "fraction_5m", "rpm", "level", "batches")
    states = ("agent", "up", "ok", "pressure", "events")
    for family in one.collect():
        assert family.documentation.endswith("."), family.name
        assert family.name.endswith((*units, *states)), family.name


def test_dashboard_and_alert_examples_query_existing_metrics() -> None:
    folder = Path(agent.__file__).parent / "grafana"
    dashboard = json.loads((folder / "mlxrack.json").read_text())
    one = host()
    one.sampled(FULL)
    metrics = Metrics(_no_models, _no_peers, one)
    metrics.answered(Answered(model="m", outcome="ok", ttft_us=1, itl_us=((1, 1),), total_us=2, prompt_tok=1))
    metrics.engine("m", Reported(decode_tok=1))
    metrics.closed([EngineWindow(model="m", version="v", queue_max=3)])
    text = metrics.text().decode()
    there = set(re.findall(r"^(mlxrack_\w+)", text, re.MULTILINE)) | set(
        re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    )
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"mlxrack_\w+", target["expr"])
    }
    assert len(asked) > 20
    assert asked <= there, sorted(asked - there)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert "job_name" in (folder / "prometheus.yml").read_text()


def test_what_another_place_answered_is_no_measure_of_the_rack() -> None:
    metrics = Metrics(_no_models, _no_peers, host())
    one = Answered(model="m", outcome="ok", ttft_us=10**6, itl_us=((9, 1),), total_us=10**6, prompt_tok=7)
    metrics.answered(one)
    before = metrics.text().decode()
    metrics.answered(msgspec.structs.replace(one, place="hosted", place_category="outside", usd_micro=2_500_000))
    after = metrics.text().decode().splitlines()
    new = [line for line in after if line not in before.splitlines() and not line.startswith("mlxrack_requests_total")]
    assert sorted(line for line in new if not line.startswith("#")) == [
        'mlxrack_elsewhere_requests_total{category="outside",outcome="ok",place="hosted"} 1.0',
        'mlxrack_elsewhere_usd_total{place="hosted"} 2.5',
    ]
    assert 'mlxrack_requests_total{model="m",outcome="ok"} 2.0' in after


def test_an_unknown_thermal_level_has_no_duration() -> None:
    one = host()
    one.sampled(HostSample(thermal_level="unknown", thermal_level_us=(0, 0, 0, 0, 0)))
    names = {family.name for family in one.collect()}
    assert "mlxrack_thermal_pressure_seconds" not in names
    one.sampled(HostSample(thermal_level="nominal", thermal_level_us=(5, 0, 0, 0, 0)))
    assert "mlxrack_thermal_pressure_seconds" in {family.name for family in one.collect()}


def test_peaks_are_of_the_closed_window_regardless_of_scrapes() -> None:
    metrics = Metrics(_no_models, _no_peers, host())
    metrics.engine("m", Reported(queue_max=9, peak_bytes=100))
    metrics.closed([EngineWindow(model="m", version="v", queue_max=9, peak_bytes=100)])
    metrics.engine("m", Reported(queue_max=1, peak_bytes=10, cache_bytes=7))
    text = metrics.text().decode()
    for line in ('queue_max{model="m"} 9.0', 'peak_bytes{model="m"} 100.0', 'cache_bytes{model="m"} 7.0'):
        assert f"mlxrack_engine_{line}" in text


def _no_models() -> list[dict[str, Any]]:
    return []


def _no_peers() -> list[NodeView]:
    return []


def test_identifiers_of_a_mac_are_masked() -> None:
    raw = """
      "serial_number" : "C02XK1ABCDEF",
          Serial Number (system): C02XK1ABCDEF
    "IOPlatformSerialNumber" = "C02XK1ABCDEF"
    "Serial" = "F8Y1234QWERT"
    "Device Serial" = "F8Y1234QWERT"
    "serial-number" = <463859313233>
    "BatterySerialNumber" = "F8Y1234QWERT"
    "IOPlatformUUID" = "564D7B1A-11AA-22BB-33CC-0123456789AB"
    Hardware UUID: 564D7B1A-11AA-22BB-33CC-0123456789AB
    Wi-Fi: 3c:22:fb:11:22:33 at 192.168.1.17, home /Users/ada/models
    Kernel of ada's mini-office: 24.6.0
"""
    found = record_fixture.masked(raw, ("ada", "mini-office"))
    for secret in (
        "C02XK1ABCDEF",
        "F8Y1234QWERT",
        "463859313233",
        "564D7B1A",
        "3c:22:fb",
        "192.168.1.17",
        "ada",
        "mini-office",
    ):
        assert secret not in found
    assert "24.6.0" in found, "versions stay"
