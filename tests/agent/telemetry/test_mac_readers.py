"""Readers of macOS libraries, run against a stand-in library with Apple's layouts that is compiled here."""

import asyncio
import ctypes
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.process.machine import memory_bytes
from agent.telemetry.sensors import chip, smc, sysctl, vm
from agent.telemetry.sensors.chip import Chip
from agent.telemetry.sensors.cpu import CpuTimes, CpuUse
from agent.telemetry.sensors.memory import MacMemory, MemoryCollector, verdict
from agent.telemetry.sensors.notify import Notify
from agent.telemetry.sensors.reading import Failure
from agent.telemetry.sensors.thermal import NOTIFY_KEY, ThermalCollector


class Fake:
    """The compiled library; ``lib.set(name=value)`` changes its results."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.lib = ctypes.CDLL(self.path)
        self.lib.fake_post.argtypes = [ctypes.c_uint64]

    def set(self, **values: int) -> None:
        for name, value in values.items():
            wide = name in ("fake_level", "fake_page_size", "fake_swapins", "fake_swapouts", "fake_memsize")
            (ctypes.c_uint64 if wide else ctypes.c_int).in_dll(self.lib, name).value = value

    def get(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.lib, name).value

    def keys(self, *found: tuple[str, str, bytes]) -> None:
        self.lib.fake_clear_keys()
        for name, kind, raw in found:
            self.lib.fake_add_key(name.encode(), kind.encode(), len(raw), raw)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("mac") / "libfake.so"
    source = Path(__file__).with_name("fake_mac.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", built, source], check=True, timeout=60)
    return built


@pytest.fixture
def mac(library: Path) -> Iterator[Fake]:
    fake = Fake(library)
    calm = {"fake_pressure": 1, "fake_has_smc": 1, "fake_page_size": 16384, "fake_swapins": 20, "fake_swapouts": 30}
    calm |= {"fake_vm_words": 38, "fake_vm_patience": -1, "fake_memsize": 24 << 30, "fake_ticks_user": 100}
    calm |= {"fake_ticks_idle": 900}
    zero = ("notify_status", "state_status", "level", "wired_limit_mb", "swap_broken", "vm_status", "open_status")
    more = ("call_status", "short_answer", "vm_calls", "vm_complaints", "cpu_status", "long_value")
    quiet = dict.fromkeys([f"fake_{name}" for name in (*zero, *more)], 0)
    fake.set(**quiet, **calm)
    yield fake
    fake.set(**quiet, **calm)


def degrees(value: float) -> bytes:
    return struct.pack("<f", value)


# ---- notify(3) ----


async def test_thermal_level_changes_are_notified(mac: Fake) -> None:
    notify = Notify(NOTIFY_KEY, mac.path)
    heard: asyncio.Queue[int] = asyncio.Queue()

    def posted() -> None:
        notify.drain()
        heard.put_nowait(notify.state())

    loop = asyncio.get_running_loop()
    loop.add_reader(notify.descriptor, posted)
    try:
        for level in (2, 0, 4):
            mac.lib.fake_post(level)
            assert await asyncio.wait_for(heard.get(), 5) == level
    finally:
        loop.remove_reader(notify.descriptor)
        before = mac.get("fake_cancelled")
        notify.close()
        notify.close()
    assert mac.get("fake_cancelled") == before + 1


def test_system_errors_are_reported(mac: Fake, tmp_path: Path) -> None:
    mac.set(fake_notify_status=1000000)
    with pytest.raises(Failure, match="cannot be registered"):
        Notify(NOTIFY_KEY, mac.path)
    mac.set(fake_notify_status=0, fake_state_status=2)
    notify = Notify(NOTIFY_KEY, mac.path)
    with pytest.raises(Failure, match="status 2"):
        notify.state()
    with pytest.raises(Failure, match="OSError"):
        Notify(NOTIFY_KEY, str(tmp_path / "none.so"))
    with pytest.raises(Failure, match="AttributeError"):
        Notify(NOTIFY_KEY, "libc.so.6")


def thermal(mac: Fake, clock: list[float]) -> ThermalCollector:
    def missing(*argv: str) -> bytes:
        raise Failure("notifyutil: No such file or directory")

    return ThermalCollector(
        Chip("darwin", open_smc=lambda: smc.Smc(mac.path, mac.path), clock=lambda: clock[0]),
        "darwin",
        notify=lambda: Notify(NOTIFY_KEY, mac.path),
        run=missing,
        clock=lambda: clock[0],
    )


def test_a_short_excursion_between_polls_is_recorded(mac: Fake) -> None:
    clock = [0.0]
    mac.keys(("Tp01", "flt ", degrees(70.5)), ("Tp02", "flt ", degrees(40.0)), ("PSTR", "flt ", degrees(12.5)))
    collector = thermal(mac, clock)
    assert collector.descriptor() is not None
    collector.poll()
    for at_s, level in ((10.0, 2), (13.0, 3), (14.0, 0)):
        clock[0] = at_s
        mac.lib.fake_post(level)
        collector.posted()
    clock[0] = 60.0
    fields = collector.read().fields
    assert fields["throttled_us"] == 4_000_000
    assert fields["thermal_level_us"] == (56_000_000, 0, 3_000_000, 1_000_000, 0)
    assert (fields["thermal_worst"], fields["thermal_level"], fields["thermal_source"]) == (
        "trapping",
        "nominal",
        "notify",
    )
    begun, ended = collector.take()
    assert (begun.start_s, begun.end_s, begun.open_at_start) == (10.0, None, False)
    assert (ended.end_s, ended.peak) == (14.0, 3)
    assert (fields["pcore_temp_mc"], fields["temp_source"]) == (70_500, "smc")
    collector.close()


def test_a_missing_thermal_level_is_unknown_with_a_reason(mac: Fake) -> None:
    mac.set(fake_notify_status=1)
    clock = [0.0]
    collector = thermal(mac, clock)
    mac.keys(("Tp01", "flt ", degrees(50.0)))
    collector.poll()
    clock[0] = 60.0
    reading = collector.read()
    assert (reading.sample.thermal_level, reading.sample.thermal_known_us) == ("unknown", 0)
    assert reading.sample.throttled_5m_ppm is None
    assert "registered" in reading.failed["notify"]
    assert "No such file" in reading.failed["notifyutil"]
    assert [source.name for source in collector.sources()] == ["pmset", "notify", "notifyutil", "smc", "macmon"]
    collector.close()


# ---- the SMC ----


def test_smc_keys_are_matched_by_prefix_and_decoded_by_type(mac: Fake) -> None:
    mac.keys(
        ("Tp01", "flt ", degrees(61.25)),
        ("Tp02", "flt ", degrees(3.4)),
        ("Tp03", "flt ", degrees(40.0)),
        ("Te05", "flt ", degrees(48.0)),
        ("Tg0G", "flt ", degrees(52.5)),
        ("TCMz", "flt ", degrees(63.0)),
        ("TB0T", "flt ", degrees(99.0)),
        ("F0Ac", "flt ", degrees(1000.4)),
        ("F1Ac", "fpe2", bytes((0x0F, 0xA0))),
        ("F0Mx", "flt ", degrees(4900.0)),
        ("PSTR", "flt ", degrees(33.75)),
        ("Tx00", "flt ", degrees(90.0)),
    )
    opened = smc.Smc(mac.path, mac.path)
    assert set(opened.keys) == {"Tp01", "Tp02", "Tp03", "Te05", "Tg0G", "TCMz", "F0Ac", "F1Ac", "PSTR"}
    reading = chip.of_smc(opened.values())
    assert (reading.pcore_c, reading.package_c, reading.gpu_c) == (61.25, 63.0, 52.5)
    assert reading.fans_rpm == (1000, 1000)
    assert reading.system_w == 33.75
    opened.close()
    assert mac.get("fake_open_connections") == 0
    assert mac.get("fake_unreleased") == 0


def test_a_sleeping_cluster_and_implausible_values_are_discarded(mac: Fake) -> None:
    wild = (float("nan"), float("inf"), -9200.0, 0.0, 40089.36)
    mac.keys(
        *((f"Tp0{n}", "flt ", degrees(40.0)) for n in range(4)),
        *((f"Tg0{n}", "flt ", degrees(value)) for n, value in enumerate(wild)),
        ("PSTR", "flt ", degrees(40089.36)),
        ("F0Ac", "flt ", degrees(-1.0)),
        ("TCMz", "ui8 ", b"\x28"),
    )
    opened = smc.Smc(mac.path, mac.path)
    reading = chip.of_smc(opened.values())
    assert (reading.pcore_c, reading.pcore_asleep, reading.package_c, reading.gpu_c) == (None, True, None, None)
    assert (reading.system_w, reading.fans_rpm) == (None, ())
    opened.close()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"fake_has_smc": 0}, "service AppleSMC not found"),
        ({"fake_has_smc": 2}, "AppleSMCKeysEndpoint not found"),
        ({"fake_open_status": -536870174}, "0xe00002e2"),
        ({"fake_call_status": -536870206}, "call failed \\(0xe00002c2\\)"),
        ({"fake_short_answer": 1}, "40 bytes instead of 80"),
    ],
)
def test_a_failing_smc_is_reported(mac: Fake, wrong: dict[str, int], why: str) -> None:
    mac.keys(("Tp01", "flt ", degrees(61.25)))
    mac.set(**wrong)
    with pytest.raises(Failure, match=why):
        smc.Smc(mac.path, mac.path)
    assert mac.get("fake_unreleased") == 0
    assert mac.get("fake_open_connections") == 0


def test_a_failing_key_does_not_affect_others(mac: Fake) -> None:
    mac.keys(("Tp!1", "flt ", degrees(99.0)), ("Tp01", "flt ", degrees(61.25)))
    opened = smc.Smc(mac.path, mac.path)
    assert opened.values() == {"Tp01": 61.25}
    opened.close()
    mac.keys(("Tp!1", "flt ", degrees(99.0)))
    alone = smc.Smc(mac.path, mac.path)
    with pytest.raises(Failure, match="result 133"):
        alone.values()
    alone.close()


def test_a_broken_connection_is_reopened_and_threads_share_a_read(mac: Fake) -> None:
    clock, opened = [0.0], list[smc.Smc]()

    def open_one() -> smc.Smc:
        opened.append(smc.Smc(mac.path, mac.path))
        return opened[-1]

    mac.keys(("Tp01", "flt ", degrees(61.25)))
    one = Chip("darwin", open_smc=open_one, clock=lambda: clock[0])
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: one.read(), range(64)))
    assert len({id(reading) for reading in found}) == 1
    assert (len(opened), mac.get("fake_open_connections")) == (1, 1)
    mac.set(fake_call_status=1)
    clock[0] = 2.0
    assert one.read() is None
    assert mac.get("fake_open_connections") == 0
    mac.set(fake_call_status=0)
    clock[0] = 4.0
    assert one.read() is not None
    assert len(opened) == 2
    one.close()


def test_an_unresponsive_smc_gives_no_stale_values(mac: Fake) -> None:
    clock = [0.0]
    mac.keys(("Tp01", "flt ", degrees(61.25)), ("PSTR", "flt ", degrees(20.0)))
    one = Chip("darwin", open_smc=lambda: smc.Smc(mac.path, mac.path), clock=lambda: clock[0])
    reading = one.read()
    assert reading is not None
    assert reading.system_w == 20.0
    mac.set(fake_call_status=1)
    clock[0] += 2.0
    assert one.read() is None
    assert "SMC: call failed" in one.failed["smc"]
    one.close()


# ---- memory ----


def test_memory_by_host_statistics(mac: Fake) -> None:
    found = vm.HostStatistics(mac.path).read()
    assert found.app_bytes == 350_000 * 16384
    assert found.used_bytes == 475_000 * 16384
    assert (found.swapped_in_bytes, found.swapped_out_bytes) == (20 * 16384, 30 * 16384)
    mac.set(fake_vm_status=5)
    with pytest.raises(Failure, match="kern_return 5"):
        vm.HostStatistics(mac.path).read()
    mac.set(fake_page_size=1)
    with pytest.raises(Failure, match="no valid page size"):
        vm.HostStatistics(mac.path)


RELEASES = [
    pytest.param({"fake_vm_words": 38}, 1, id="macOS 14"),
    pytest.param({"fake_vm_words": 62}, 1, id="macOS 26"),
    pytest.param({"fake_vm_words": 104, "fake_vm_patience": 3}, 2, id="macOS 27"),
    pytest.param({"fake_vm_words": 1000, "fake_vm_patience": 0}, 2, id="a later one"),
]


@pytest.mark.parametrize(("shape", "calls"), RELEASES)
def test_memory_is_read_whatever_this_release_added(mac: Fake, shape: dict[str, int], calls: int) -> None:
    """What reports of macOS 26 and 27 say: three calls are answered, then -307 and the count to pass; and more than the
    kernel's own count is logged as a likely memory corruption."""
    expected = vm.HostStatistics(mac.path).read()
    mac.set(**shape, fake_vm_calls=0)
    read = vm.HostStatistics(mac.path)
    assert [read.read() for _ in range(9)] == [expected] * 9
    assert mac.get("fake_vm_complaints") == 0
    before = mac.get("fake_vm_calls")
    read.read()
    assert mac.get("fake_vm_calls") - before == calls


@pytest.mark.parametrize("words", [1025, 1 << 30, -1])
def test_a_structure_of_an_implausible_size_is_refused(mac: Fake, words: int) -> None:
    mac.set(fake_vm_words=words, fake_vm_patience=0)
    with pytest.raises(Failure, match="kern_return -307 for 38 words"):
        vm.HostStatistics(mac.path).read()


def test_a_sysctl_structure_may_grow(mac: Fake) -> None:
    expected = sysctl.Sysctl(mac.path).swap()
    for more in (0, 8, 5_000, 200_000):
        mac.set(fake_long_value=more)
        assert sysctl.Sysctl(mac.path).swap() == expected
    mac.set(fake_long_value=900_000)
    with pytest.raises(Failure, match="errno 12"):
        sysctl.Sysctl(mac.path).swap()


def test_cpu_times_of_the_host(mac: Fake) -> None:
    use = CpuUse(CpuTimes("darwin", library=mac.path, last=lambda: None))
    mac.set(fake_ticks_user=175, fake_ticks_idle=925)
    assert use.busy_ppm() == 750_000
    mac.set(fake_ticks_user=200, fake_ticks_idle=5)
    assert use.busy_ppm() is None, "ticks are counted in 32 bits, and wrapped"
    mac.set(fake_cpu_status=5)
    assert use.busy_ppm() is None
    assert CpuTimes("darwin", library=mac.path, last=lambda: {"idle": 1.0})() == {"idle": 1.0}


def test_no_command_is_run_between_windows(mac: Fake, tmp_path: Path) -> None:
    """Neither where the library works (macOS 27) nor where nothing of it does: a poll comes every two seconds."""
    run: list[tuple[str, ...]] = []

    def missing(*argv: str) -> bytes:
        run.append(argv)
        raise Failure(f"{argv[0]}: No such file or directory")

    mac.set(fake_vm_words=104, fake_vm_patience=3)
    works = MemoryCollector("darwin", MacMemory(mac.path, run=missing))
    broken = MemoryCollector("darwin", MacMemory(str(tmp_path / "none.so"), run=missing))
    for _ in range(20):
        works.poll()
        broken.poll()
    assert run == []
    reading = works.read()
    assert (reading.fields["memory_used_bytes"], reading.failed, run) == (475_000 * 16384, {}, [])
    assert "vm_stat" in broken.read().failed["vm"], "asked once in a window"


def test_a_mac_of_any_release_tells_its_memory_without_psutil(mac: Fake, tmp_path: Path) -> None:
    mac.set(fake_memsize=24 << 30)
    nothing = (str(tmp_path / "none"),)
    assert memory_bytes("darwin", library=mac.path, command=nothing) == 24 << 30
    says = ("/bin/sh", "-c", "echo 17179869184")
    for fails in (0, 1, 1 << 60):  # no such name; values that no Mac has
        mac.set(fake_memsize=fails)
        assert memory_bytes("darwin", library=mac.path, command=says) == 16 << 30
    for none in (str(tmp_path / "none.so"), "libc.so.6"):
        assert memory_bytes("darwin", library=none, command=says) == 16 << 30


def test_a_window_of_a_mac_has_everything_while_psutil_raises(mac: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the other way round: without a total, what the kernel tells is kept."""

    class Raises:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("host_statistics64(HOST_VM_INFO64) syscall failed: (ipc/mig) array not large enough")

    def missing(*argv: str) -> bytes:
        raise Failure(f"{argv[0]}: No such file or directory")

    monkeypatch.setitem(sys.modules, "psutil", Raises())
    mac.set(fake_vm_words=104, fake_vm_patience=0, fake_wired_limit_mb=16_000)
    collector = MemoryCollector("darwin", MacMemory(mac.path, run=missing))
    collector.read()
    whole = collector.read().fields
    assert whole["memory_total_bytes"] == 24 << 30
    kept = {"memory_used_bytes", "memory_used_max_bytes", "memory_wired_bytes", "memory_compressed_bytes"}
    kept |= {"memory_source", "memory_pressure", "memory_verdict", "swap_total_bytes", "swap_used_bytes"}
    kept |= {"swap_in_bytes", "swap_out_bytes", "gpu_wired_limit_bytes"}
    assert whole.keys() == kept | {"memory_total_bytes"}
    mac.set(fake_memsize=0)
    monkeypatch.setattr("agent.process.machine._said", missing)
    less = MemoryCollector("darwin", MacMemory(mac.path, run=missing))
    less.read()
    assert less.read().fields.keys() == kept


def test_sysctl_integers_strings_and_swap(mac: Fake) -> None:
    read = sysctl.Sysctl(mac.path)
    mac.set(fake_pressure=4, fake_wired_limit_mb=12_000)
    assert read.integer("kern.memorystatus_vm_pressure_level") == 4
    assert read.integer("iogpu.wired_limit_mb") == 12_000
    assert read.text("hw.model") == "Mac16,10"
    assert read.swap() == (4096 << 20, 2744 << 20)
    with pytest.raises(Failure, match="errno 2"):
        read.integer("no.such.name")
    with pytest.raises(Failure, match="9 bytes, expected 4 or 8"):
        read.integer("hw.model")
    mac.set(fake_swap_broken=1)
    with pytest.raises(Failure, match="inconsistent values"):
        read.swap()


def test_memory_of_one_window(mac: Fake) -> None:
    clock = [0.0]
    collector = MemoryCollector("darwin", MacMemory(mac.path), clock=lambda: clock[0])
    collector.read()
    mac.set(fake_pressure=2, fake_swapouts=130, fake_wired_limit_mb=1_700)
    collector.poll()
    mac.set(fake_pressure=1)
    clock[0] = 60.0
    reading = collector.read()
    fields = reading.fields
    assert (fields["memory_pressure"], fields["memory_verdict"]) == ("warn", "warn")
    assert (fields["swap_in_bytes"], fields["swap_out_bytes"]) == (0, 100 * 16384)
    assert fields["memory_used_bytes"] == 475_000 * 16384
    assert (fields["memory_source"], reading.failed) == ("host_statistics64", {})


def test_commands_are_the_fallback_for_libraries(mac: Fake, tmp_path: Path) -> None:
    page = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
    parts = {"Anonymous pages": 1000, "Pages purgeable": 10, "Pages wired down": 500, "Pages occupied by compressor": 7}
    said = {
        "/usr/bin/vm_stat": page + "".join(f"{label}: {count}.\n" for label, count in parts.items()),
        "vm.swapusage": "vm.swapusage: total = 2048.00M  used = 1017.50M  free = 1030.50M  (encrypted)\n",
        "kern.memorystatus_vm_pressure_level": "kern.memorystatus_vm_pressure_level: 4\n",
        "iogpu.wired_limit_mb": "iogpu.wired_limit_mb: 0\n",
    }
    none = str(tmp_path / "none.so")
    collector = MemoryCollector("darwin", MacMemory(none, run=lambda *argv: said[argv[-1]].encode()))
    fields = collector.read().fields
    assert fields["memory_source"] == "vm_stat"
    assert fields["memory_used_bytes"] == (990 + 500 + 7) * 16384
    assert fields["swap_used_bytes"] == round(1017.5 * (1 << 20))
    assert fields["memory_pressure"] == "critical"
    assert "gpu_wired_limit_bytes" not in fields, "0 is the default, not a limit of nothing"


@pytest.mark.parametrize(
    ("level", "more", "expected"),
    [
        ("normal", {}, "normal"),
        ("unknown", {}, "unknown"),
        ("normal", {"swapped_out": 1, "compressed": 0.3}, "warn"),
        ("normal", {"swapped_out": 1, "compressed": 0.1}, "normal"),
        ("normal", {"compressed": 0.9}, "normal"),
        ("normal", {"wired": 0.95}, "warn"),
        ("critical", {"wired": 0.95}, "critical"),
    ],
)
def test_pressure_is_the_worst_of_three_sources(level: str, more: dict[str, float], expected: str) -> None:
    asked = {"swapped_out": 0, "compressed": 0.0, "wired": None, **more}
    assert verdict(level, **asked) == expected  # type: ignore[arg-type]
