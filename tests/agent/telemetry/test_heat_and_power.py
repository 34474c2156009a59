"""Package temperature and power where sources mislead: placeholders, sums that pose as measurements, counters that
stand still or publish in batches, dies that are not counted, numbers that are none."""

import re
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.telemetry.sensors import chip, macmon, powermetrics, smc
from agent.telemetry.sensors.chip import Chip, ChipReading
from agent.telemetry.sensors.power import Energy, IoReport, PowerCollector, counts_one_die
from agent.telemetry.sensors.reading import Failure, Reading

# ---- package temperature ----

PREFIXES = ("Tp", "Te", "Tg", "Ta", "Tf", "TCM", "TB", "TV", "Ts", "F0")
keys = st.one_of(
    st.sampled_from(("TCMb", "TCMz", "TCHP", "TaLP", "PSTR", "F0Ac")),
    st.tuples(st.sampled_from(PREFIXES), st.text("0159abzAZ", min_size=1, max_size=2)).map(
        lambda parts: (parts[0] + parts[1])[:4]
    ),
)
degrees = st.one_of(st.floats(-10.0, 130.0), st.sampled_from((40.0, 0.0, 6.7, 8.4, 15.0, 120.0, -4.0)))


@pytest.mark.parametrize(
    ("values", "package_c", "pcore_c", "asleep"),
    [
        ({"TCMb": 61.5, "Tp00": 57.0, "Tg0U": 40.5}, 61.5, 57.0, False),
        ({"TCMz": 47.9, "Tp0Z": 52.8}, 52.8, 52.8, False),
        ({"TCMz": 48.1, "TCMb": 46.5, "Tp01": 53.3, "Te05": 42.0}, 53.3, 53.3, False),
        ({"Tp01": 6.7, "Tp02": 8.4, "Te05": 36.2}, 36.2, None, True),
        ({"Tp01": 4.633, "Tp09": 6.7, "TCMz": 64.4}, 64.4, None, True),
        ({"Tp01": 40.0, "Tp02": 40.0}, None, None, True),
        ({"Tp01": 40.0, "Tp02": 3.4, "Tp03": -4.0, "Tg0G": 35.0}, 35.0, None, True),
        ({"Tp01": 6.7, "Tp02": 51.0, "Te05": 36.2}, 51.0, 51.0, False),
        ({"Ta00": 58.5, "Tp00": 44.0}, 58.5, 44.0, False),  # E-cores of an M5
        ({"Tf04": 71.0, "Te05": 60.0, "TCMb": 62.0}, 71.0, 71.0, False),  # P-cores of an M3
        ({"Tf14": 66.0, "Te05": 60.0}, 66.0, None, False),  # its GPU
        ({"TB0T": 88.0, "TVMR": 93.0, "Ts0P": 70.0, "Tp01": 50.0}, 50.0, 50.0, False),
        ({"TCMz": 0.0, "TCMb": 127.5, "Te05": 33.0}, 33.0, None, False),  # no P-core was read
        ({"Tp01": 6.7}, None, None, False),  # nothing else is valid: unknown, not asleep
        ({}, None, None, False),
    ],
)
def test_the_package_is_the_hottest_valid_sensor(
    values: dict[str, float], package_c: float | None, pcore_c: float | None, asleep: bool
) -> None:
    found = smc.temperatures(values)
    assert (found.package_c, found.pcore_c, found.pcore_asleep) == (package_c, pcore_c, asleep)


@given(st.dictionaries(keys, degrees, max_size=30))
def test_a_package_is_never_below_a_sensor_of_the_same_second(values: dict[str, float]) -> None:
    found = smc.temperatures(values)
    valid = {
        key: value
        for key, value in values.items()
        if key.startswith(("Tp", "Te", "Tg", "Ta", "TCMb", "TCMz")) and len(key) == 4 and smc.is_valid(value)
    }
    if valid:
        assert found.package_c is not None
        assert found.package_c >= max(valid.values())
    for part in (found.pcore_c, found.gpu_c):
        assert part is None or (found.package_c is not None and smc.is_valid(part) and part <= found.package_c)
    assert found.package_c is None or found.package_c in values.values()
    assert not (found.pcore_asleep and found.pcore_c is not None)
    assert smc.temperatures(dict(reversed(values.items()))) == found
    assert set(smc.wanted(values)) >= valid.keys(), "what the package is made of is read"


def test_only_what_is_used_is_read() -> None:
    keys = ("Tp01", "TCMz", "TCMb", "Ta00", "Tf04", "F0Ac", "F1Ac", "PSTR", "F0Mx", "F0Mn", "FNum", "TB0T", "Ts0P")
    assert smc.wanted(keys) == ["Tp01", "TCMz", "TCMb", "Ta00", "Tf04", "F0Ac", "F1Ac", "PSTR"]


# ---- macmon ----

NAN, HUGE = float("nan"), 1e9


@pytest.mark.parametrize(
    ("said", "system_w", "soc_w"),
    [
        ({"all_power": 144.0, "sys_power": 144.0, "cpu_power": 4.0}, None, None),
        ({"all_power": 12.0, "sys_power": 41.0}, 41.0, 12.0),
        ({"all_power": 143.99999, "sys_power": 144.0, "cpu_power": 4.0}, None, None),  # rounded apart
        ({"sys_power": 9.0, "cpu_power": 4.0, "gpu_power": 5.0, "ane_power": 0.0}, None, None),  # without the sum
        ({"sys_power": 9.0, "all_power": NAN, "cpu_power": 4.0, "gpu_power": 5.0, "ane_power": 0.0}, None, None),
        ({"sys_power": 10.0, "all_power": 9.0, "cpu_power": 4.0, "gpu_power": 5.0, "ram_power": 1.0}, None, None),
        ({"sys_power": 3.0, "all_power": 144.0, "cpu_power": 4.0}, 3.0, None),  # the parts exceed the whole
        ({"sys_power": 20.0, "all_power": 21.0, "cpu_power": 4.0}, 20.0, 21.0),  # a moment against a mean
        ({"sys_power": 0.0, "all_power": 0.0, "cpu_power": 0.0}, None, None),
        ({"sys_power": 0.0, "all_power": 7.5, "cpu_power": 2.0}, None, 7.5),  # the whole cannot be read
        ({"sys_power": 8.0, "all_power": 5.0, "cpu_power": 0.0}, 8.0, None),
        ({"sys_power": 8.0, "all_power": 5.0, "cpu_power": None}, 8.0, None),
        ({"sys_power": 8.0, "all_power": 5.0, "cpu_power": 2.0, "gpu_power": -3.0}, 8.0, None),
        ({"sys_power": 8.0, "all_power": 1.0, "cpu_power": 2.0, "gpu_power": 3.0}, 8.0, None),  # a sum below a part
        ({"sys_power": NAN, "all_power": 5.0, "cpu_power": 2.0}, None, 5.0),
        ({"sys_power": -41.0, "all_power": -41.0}, None, None),
        ({"sys_power": HUGE, "all_power": HUGE}, None, None),
        ({"sys_power": "41", "all_power": True}, None, None),
        ({"sys_power": 41.0}, 41.0, None),
        ({}, None, None),
    ],
)
def test_macmons_sum_of_parts_is_no_reading_of_the_whole(
    said: dict[str, Any], system_w: float | None, soc_w: float | None
) -> None:
    found = macmon.powers(said)
    assert found[:2] == (system_w, soc_w)
    refused = isinstance(said.get("sys_power"), float) and 0 < said["sys_power"] < 1000 and system_w is None
    assert bool(found[2]) == (refused or said.get("sys_power") == 3.0), "what is refused has its reason"


watts = st.one_of(st.none(), st.floats(), st.floats(0.0, 200.0), st.sampled_from((0.0, 4.0, 144.0)))


@given(st.dictionaries(st.sampled_from(("sys_power", "all_power", "cpu_power", "gpu_power", "ane_power")), watts))
def test_believed_watts_are_possible(said: dict[str, float | None]) -> None:
    system_w, soc_w, why = macmon.powers(said)
    assert system_w is None or 0 < system_w < 1000
    assert soc_w is None or 0 < soc_w < 1000
    if system_w is not None:
        assert system_w != said.get("all_power")
        assert soc_w is None or soc_w <= 1.1 * system_w
    assert "\n" not in why


# ---- a window's power ----


class Said(Chip):
    """A chip whose reading is set."""

    reading = ChipReading(source="smc")

    def read(self) -> ChipReading:
        return self.reading


class Counters:
    """Counters that the test advances."""

    least_span_s = IoReport.least_span_s

    def __init__(self) -> None:
        self.wraps: dict[str, int] = {}
        self.cpu_j, self.gpu_j = 1000.0, 500.0

    def read(self) -> Energy:
        return Energy({"cpu": round(self.cpu_j * 1e6), "gpu": round(self.gpu_j * 1e6)})


class Rig:
    """A collector on a clock that the test moves; all CPUs are busy, unless they cannot be asked."""

    def __init__(self) -> None:
        self.now = 0.0
        self.soc_w: float | None = None
        self.chip, self.counters = Said("darwin"), Counters()
        self.collector = PowerCollector(
            self.chip,
            "darwin",
            counters=self.counters,  # type: ignore[arg-type]
            powermetrics=lambda: self.soc_w,
            clock=lambda: self.now,
            cpu_times=self.busy,
        )

    def busy(self) -> dict[str, float]:
        return {"user": self.now, "idle": 0.0}

    def window(self, length_s: float, poll_s: float = 2.0) -> Reading:
        end = self.now + length_s
        while self.now + poll_s < end:
            self.now += poll_s
            self.collector.poll()
        self.now = end
        return self.collector.read()


def test_a_sum_of_parts_leaves_the_windows_system_power_out_with_the_reason() -> None:
    rig = Rig()
    line = b'{"temp":{"cpu_temp_avg":51.0},"all_power":144.0,"sys_power":144.0,"cpu_power":4.0}'
    parsed = macmon.parse_macmon(line)
    assert parsed is not None
    rig.chip.reading = chip.of_macmon(parsed)
    rig.window(60.0)
    found = rig.window(60.0)
    assert (found.sample.system_power_mw, found.sample.energy_source) == (None, None)
    assert "only the sum of the chip's parts" in found.failed["macmon"]
    assert "only the sum of the chip's parts" in rig.collector.sources()[0].reason
    rig.chip.reading = ChipReading(source="smc", system_w=67.0)
    rig.window(60.0)
    assert "macmon" not in rig.window(60.0).failed


@pytest.mark.parametrize("window_s", [1.0, 2.0, 3.0, 5.0, 15.0, 60.0])
def test_counters_that_publish_in_batches_give_even_watts(window_s: float) -> None:
    """30 W, published every 2.2 s only, as an M5 Max does."""
    rig, seen, energy_mj = Rig(), list[float](), 0
    rig.window(1.0)
    for _ in range(round(240 / window_s)):
        published_s = (rig.now + window_s) // 2.2 * 2.2
        rig.counters.cpu_j, rig.counters.gpu_j = 1000.0 + 10.0 * published_s, 500.0 + 20.0 * published_s
        sample = (found := rig.window(window_s)).sample
        assert "ioreport" not in found.failed, found.failed
        if sample.soc_power_mw is not None:
            seen.append(sample.soc_power_mw / 1000)
            energy_mj += sample.energy_mj or 0
    assert len(seen) >= 240 / window_s - 10.0 / window_s - 1
    assert all(30 * 0.75 < one < 30 * 1.25 for one in seen), seen
    assert energy_mj / 1000 == pytest.approx(30.0 * window_s * len(seen), rel=0.05)


def test_a_stalled_cpu_counter_is_no_power_and_powermetrics_is_used() -> None:
    rig = Rig()
    rig.window(60.0)
    rig.counters.gpu_j += 300.0
    alone = rig.window(60.0)
    assert (alone.sample.soc_power_mw, alone.sample.energy_mj) == (None, None)
    assert "stalled" in alone.failed["ioreport"]
    rig.soc_w = 22.0
    rig.window(60.0)
    rig.counters.gpu_j += 300.0
    asked = rig.window(60.0)
    assert (asked.sample.soc_power_mw, asked.sample.energy_source) == (22_000, "soc_estimate")
    assert "stalled" in asked.failed["ioreport"]
    rig.counters.gpu_j, rig.counters.cpu_j = rig.counters.gpu_j + 300.0, rig.counters.cpu_j + 10.0
    part = rig.window(60.0)
    assert part.sample.soc_power_mw == 22_000, "5.2 W of 22: it stood still for most of the window"
    assert "another source has 22.0 W" in part.failed["ioreport"]
    rig.counters.gpu_j, rig.counters.cpu_j = rig.counters.gpu_j + 600.0, rig.counters.cpu_j + 660.0
    well = rig.window(60.0)
    assert (well.sample.soc_power_mw, well.sample.energy_source, well.failed) == (21_000, "ioreport", {})


def test_a_stall_is_seen_where_nothing_tells_cpu_times() -> None:
    now, counters, said = [0.0], Counters(), Said("darwin")
    said.reading = ChipReading(source="smc", system_w=12.0)
    one = PowerCollector(
        *(said, "darwin"),
        counters=counters,  # type: ignore[arg-type]
        clock=lambda: now[0],
        cpu_times=lambda: None,
    )
    one.read()
    now[0], counters.gpu_j = 10.0, 600.0
    found = one.read()
    assert (found.sample.system_power_mw, found.sample.soc_power_mw) == (12_000, None)
    assert "stalled" in found.failed["ioreport"]


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("Apple M2 Ultra", "1.1.0", True),
        ("Apple M5 Ultra", "1.0.4", True),
        ("Apple M1 Ultra", "1.1", True),
        ("Apple M3 Ultra", "1.2.0", False),
        ("Apple M3 Ultra", "1.1.1", False),
        ("Apple M4 Pro", "1.1.0", False),
        ("Apple M5 Max", "1.1.0", False),
        ("", "1.1.0", False),
    ],
)
def test_an_ultras_dies_are_all_counted_or_none(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, refused: bool
) -> None:
    library = ModuleType("zeus_apple_silicon")
    metrics = SimpleNamespace(cpu_total_mj=2351, gpu_mj=81, ane_mj=None)
    library.AppleEnergyMonitor = lambda: SimpleNamespace(get_cumulative_energy=lambda: metrics)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", library)
    counters = IoReport(lambda: name, lambda: version)
    assert counts_one_die(name, version) == refused
    if refused:
        with pytest.raises(Failure, match=f"{version} counts one die only, and an {name} has several"):
            counters.read()
    else:
        assert counters.read() == Energy({"cpu": 2_351_000, "gpu": 81_000})


@pytest.mark.parametrize("value", [NAN, float("inf"), -1, True, "7", None, 10**30])
def test_a_counter_that_is_no_number_is_missing(monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    library = ModuleType("zeus_apple_silicon")
    metrics = SimpleNamespace(cpu_total_mj=5, gpu_mj=value)
    library.AppleEnergyMonitor = lambda: SimpleNamespace(get_cumulative_energy=lambda: metrics)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", library)
    assert IoReport(lambda: "Apple M4", lambda: "1.1.0").read() == Energy({"cpu": 5_000})


# ---- powermetrics ----

HEAD = b'<?xml version="1.0"?><plist version="1.0"><dict><key>timestamp</key><date>2026-11-27T01:02:03Z</date>'
POWERS = {"cpu_power": b"500.5", "gpu_power": b"20", "ane_power": b"0", "combined_power": b"520.5"}


def document(
    powers: dict[str, bytes], *, elapsed: bytes = b"<integer>1000000000</integer>", tag: bytes = b"<real>%b</real>"
) -> bytes:
    listed = b"".join(
        b"<key>%b</key>" % name.encode() + (tag if name == "gpu_power" else b"<real>%b</real>") % (value,)
        for name, value in powers.items()
    )
    gpu = b"<key>gpu</key><dict><key>idle_ratio</key><real>nan(0x8)</real></dict>"
    level = b"<key>thermal_pressure</key><string>Heavy</string></dict></plist>"
    return HEAD + b"<key>elapsed_ns</key>" + elapsed + b"<key>processor</key><dict>" + listed + b"</dict>" + gpu + level


BAD: Sequence[bytes] = (
    *(b"nan(0x8)", b"nan", b"-nan", b"NaN", b"inf", b"-inf", b"infinity", b"1e999", b"0x1p3", b"0x10", b"12.", b"1e"),
    *(
        b".5",
        b"1_000",
        b"1,5",
        b"",
        b" ",
        b"--1",
        b"oops",
        b"\0",
        b"\x0b2",
        b"9" * 5000,
        b"-20",
        b"20.0.0",
        "２０".encode(),
    ),
)


@pytest.mark.parametrize("name", POWERS)
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad[:9]))
def test_one_bad_number_loses_that_number_only(name: str, bad: bytes) -> None:
    found = powermetrics.parse_document(document({**POWERS, name: bad}))
    assert found is not None
    whole = {"cpu_power": 500.5, "gpu_power": 20.0, "ane_power": 0.0, name: None}
    assert (found.cpu_mw, found.gpu_mw, found.ane_mw) == (whole["cpu_power"], whole["gpu_power"], whole["ane_power"])
    assert (found.soc_mw, found.level, found.elapsed_ns) == (520.5, 2, 10**9)


@pytest.mark.parametrize(
    "tag",
    [
        *(b"<real>%b", b"<real>", b"<real/>", b"<real></real>", b"<integer>%b.5</integer>", b"<integer>nan</integer>"),
        *(b"<real>%b</integer>", b"<date>%b</date>", b"<data>%b</data>", b"<date/>", b"<integer>0x14</integer>"),
    ],
)
def test_a_value_of_a_broken_or_wrong_type_loses_that_value_only(tag: bytes) -> None:
    tag = tag if b"%b" in tag else tag + b"%.0b"
    found = powermetrics.parse_document(document(POWERS, tag=tag))
    assert found is not None
    assert (found.cpu_mw, found.gpu_mw, found.soc_mw, found.level) == (500.5, None, 520.5, 2)


def test_good_numbers_are_read_as_they_are() -> None:
    for good, value in ((b"20", 20.0), (b"+2e1", 20.0), (b" 20.0\n", 20.0), (b"2.0E+1", 20.0), (b"0", 0.0)):
        found = powermetrics.parse_document(document({**POWERS, "gpu_power": good}))
        assert found is not None
        assert found.gpu_mw == value


@pytest.mark.parametrize(
    "elapsed", [b"<integer>oops</integer>", b"<integer>-5</integer>", b"<real>nan</real>", b"<true/>"]
)
def test_an_interval_of_unknown_length_loses_only_what_it_divides(elapsed: bytes) -> None:
    raw = document({"cpu_power": b"500.5", "gpu_energy": b"31"}, elapsed=elapsed)
    found = powermetrics.parse_document(raw)
    assert found is not None
    assert (found.elapsed_ns, found.cpu_mw, found.gpu_mw, found.level) == (0, 500.5, None, 2)
    known = powermetrics.parse_document(document({"cpu_power": b"500.5", "gpu_energy": b"31"}))
    assert known is not None
    assert known.gpu_mw == pytest.approx(31.0)


@pytest.mark.parametrize(
    ("powers", "soc_mw"),
    [
        (POWERS, 520.5),
        ({**POWERS, "combined_power": b"260"}, 520.5),  # one die's, or truncated
        ({"cpu_power": b"500.5", "combined_power": b"260"}, None),
        ({**POWERS, "combined_power": b"519"}, 519.0),  # rounded apart
        ({**POWERS, "cpu_power": b"0", "combined_power": b"20"}, None),
    ],
)
def test_a_sum_below_its_parts_is_none(powers: dict[str, bytes], soc_mw: float | None) -> None:
    found = powermetrics.parse_document(document(powers))
    assert found is not None
    assert found.soc_mw == soc_mw


def test_a_bad_number_in_the_text_loses_that_number_only() -> None:
    text = (
        "*** Sampled system activity (Mon Oct 23 16:51:12 2023 +0200) (1012.07ms elapsed) ***\n\n"
        "CPU Power: 211 mW\nGPU Power: 147 mW\nANE Power: 0 mW\nCombined Power (CPU + GPU + ANE): 358 mW\n"
    )
    for bad in ("nan", "-5", "9" * 400):
        twice = re.sub("1012.07", bad, text) + text.replace("147", bad)
        first, second = powermetrics.parse_text(twice.encode())
        assert (first.elapsed_ns, first.cpu_mw, first.gpu_mw, first.soc_mw) == (0, 211.0, 147.0, 358.0)
        assert (second.elapsed_ns, second.cpu_mw, second.gpu_mw, second.soc_mw) == (1_012_070_000, 211.0, None, 358.0)
